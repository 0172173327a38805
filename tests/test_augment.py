"""The plan of an epoch, and every batched operation against one image and one pixel at a time."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from augment import Normalize, affine, augment, crop, cutout, epoch_plan, flip, tta_views
from recipes import RECIPES, Recipe

MEAN = (0.5, 0.4, 0.3)
STD = (0.25, 0.2, 0.3)
NORMALIZE = Normalize(MEAN, STD, "cpu")


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=generator)


# --- the plan ---


def test_a_plan_is_a_pure_function_of_seed_and_epoch():
    def plan_of(seed, epoch):
        return epoch_plan(RECIPES["original"], 50, 32, seed, epoch, "cpu")

    plan = plan_of(seed=1, epoch=3)
    assert sorted(plan.indices.tolist()) == list(range(50))
    for column, again in zip(plan, plan_of(seed=1, epoch=3)):
        assert torch.equal(column, again)
    for other in (plan_of(seed=1, epoch=4), plan_of(seed=2, epoch=3), plan_of(seed=3, epoch=1)):
        assert not torch.equal(plan.indices, other.indices)
        assert not torch.equal(plan.angle, other.angle)


def test_rows_of_a_batch_go_with_their_images():
    """Augmented in batches of any size, an image is the same: ranks and steps only slice."""
    recipe = RECIPES["original"]
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    plan = epoch_plan(recipe, 20, 32, 1, 0, "cpu")
    whole = augment(images[plan.indices], plan, recipe, NORMALIZE)
    for start, stop in ((0, 7), (7, 8), (8, 8), (8, 20)):
        rows = plan.at(slice(start, stop))
        part = augment(images[rows.indices], rows, recipe, NORMALIZE)
        assert torch.allclose(part, whole[start:stop], rtol=0, atol=1e-3)


def test_original_augmentation_has_its_probabilities_and_ranges():
    N = 20_000
    plan = epoch_plan(RECIPES["original"], N, 32, 0, 0, "cpu")
    for name, p in (("flip", 0.45), ("affine", 0.5), ("cutout", 0.65)):
        assert getattr(plan, name).double().mean().item() == pytest.approx(p, abs=0.03)
    angle = math.radians(15)
    ranges = {"translate": (-2.24, 2.24), "scale": (0.8, 1.2), "angle": (-angle, angle)}
    for name, (low, high) in ranges.items():
        values = getattr(plan, name)
        margin = 0.02 * (high - low)
        assert low <= values.min() < low + margin
        assert high - margin < values.max() <= high
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=margin)
    for name, low, high in (("offsets", -4, 4), ("cutout_corner", 0, 24)):
        counts = (getattr(plan, name) - low).flatten().bincount()
        expected = 2 * N / (high - low + 1)
        assert len(counts) == high - low + 1
        assert counts.min() > 0.7 * expected and counts.max() < 1.3 * expected


@pytest.mark.parametrize("decay, reach", [(0.2, [4] * 8 + [2] * 2), (0.0, [4] * 10)])
def test_crops_reach_half_as_far_at_the_end(decay, reach):
    """From the ninth of ten epochs on, without a bias to one side."""
    recipe = Recipe(epochs=10, crop_padding=4, crop_decay_frac=decay)
    for epoch in range(10):
        offsets = epoch_plan(recipe, 10_000, 32, 0, epoch, "cpu").offsets
        assert offsets.dtype == torch.int64
        assert (offsets.min(), offsets.max()) == (-reach[epoch], reach[epoch])
        assert abs(offsets.double().mean()) < 0.2


# --- the operations ---


@pytest.mark.parametrize("padding_mode, mode", [("wrap", "circular"), ("reflect", "reflect")])
def test_crop_is_padding_and_a_window(images, padding_mode, mode):
    offsets = torch.tensor([[-4, -4], [4, 4], [0, 0], [-1, 3], [4, -2], [2, 0]])
    results = crop(images, offsets, padding_mode)
    padded = F.pad(images.float(), (4, 4, 4, 4), mode=mode)
    for image, (down, right), result in zip(padded, offsets.tolist(), results):
        expected = image[:, 4 + down : 36 + down, 4 + right : 36 + right]
        assert torch.equal(result.float(), expected)


def test_flip_mirrors_the_images_of_its_mask(images):
    mask = torch.tensor([True, False, True, False, False, True])
    for image, mirrored, result in zip(images, mask, flip(images, mask)):
        expected = image.flip(2) if mirrored else image
        assert torch.equal(result, expected)


def affine_one(image, translate, scale, angle):
    """Find every output pixel's source by solving for it; bilinear; indices wrap."""
    cos = scale * math.cos(angle)
    sin = scale * math.sin(angle)
    forward = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
    result = torch.zeros(image.shape, dtype=torch.float64)
    for y in range(32):
        for x in range(32):
            target = torch.tensor([y - 15.5 - translate[0], x - 15.5 - translate[1]]).double()
            v, u = (torch.linalg.solve(forward, target) + 15.5).tolist()
            top = math.floor(v)
            left = math.floor(u)
            for row, a in ((top, 1 - v + top), (top + 1, v - top)):
                for column, b in ((left, 1 - u + left), (left + 1, u - left)):
                    result[:, y, x] += a * b * image[:, row % 32, column % 32]
    return result


@pytest.mark.parametrize(
    "translate, scale, angle",
    [([2.24, -1.3], 0.8, math.radians(-7)), ([0.0, 0.5], 1.2, 0.3)],
)
def test_affine_is_the_image_sampled_pixel_by_pixel(images, translate, scale, angle):
    # float32 places a pixel to within 1e-5 of its width; neighbors differ by at most 255.
    moved = affine(
        images[:1],
        torch.tensor([translate]),
        torch.tensor([scale]),
        torch.tensor([angle]),
    )
    expected = affine_one(images[0], translate, scale, angle)
    assert torch.allclose(moved[0].double(), expected, rtol=0, atol=0.01)


def test_affine_without_a_move_is_the_image(images):
    moved = affine(images, torch.zeros(6, 2), torch.ones(6), torch.zeros(6))
    assert torch.equal(moved, images.float())


@pytest.mark.parametrize("size", [1, 8, 32])
def test_cutout_zeros_one_square_of_the_images_of_its_mask(images, size):
    last = 32 - size
    corners = torch.tensor([[0, 0], [last, last], [0, last], [3, 5], [7, 1], [2, 2]])
    corners = corners.clamp(max=last)
    mask = torch.tensor([True, True, True, True, False, True])
    results = cutout(images + 1.0, corners, size, mask)
    for image, (y, x), cut, result in zip(images, corners.tolist(), mask, results):
        expected = image + 1.0
        if cut:
            expected[:, y : y + size, x : x + size] = 0.0
        assert torch.equal(result, expected)


def test_without_augmentation_images_are_normalized(images):
    recipe = Recipe()
    plan = epoch_plan(recipe, 6, 32, 0, 0, "cpu")
    drawn = [name for name, column in plan._asdict().items() if column is not None]
    assert drawn == ["indices"]
    result = augment(images, plan, recipe, NORMALIZE)
    mean = torch.tensor(MEAN).view(3, 1, 1)
    std = torch.tensor(STD).view(3, 1, 1)
    expected = (images.double() / 255 - mean) / std
    assert torch.allclose(result.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(NORMALIZE.invert(result), images)


def test_augment_applies_every_part_in_order(images):
    recipe = dataclasses.replace(RECIPES["original"], affine_p=1.0, cutout_p=1.0, flip_p=1.0)
    plan = epoch_plan(recipe, 6, 32, 0, 0, "cpu")
    expected = flip(crop(images, plan.offsets, "wrap"), plan.flip)
    expected = NORMALIZE(affine(expected, plan.translate, plan.scale, plan.angle))
    expected = cutout(expected, plan.cutout_corner, 8, plan.cutout)
    assert torch.equal(augment(images, plan, recipe, NORMALIZE), expected)
    assert (expected == 0).flatten(1).any(1).all()


def test_views_are_mirrored_and_moved_by_a_pixel(images):
    image = NORMALIZE(images)
    assert [view is image for view in tta_views(image, "none")] == [True]
    same, mirrored = tta_views(image, "flip")
    assert torch.equal(same, image) and torch.equal(mirrored, image.flip(3))
    views = tta_views(image, "shift")
    assert len(views) == 6
    assert torch.equal(views[0], image)
    assert torch.equal(views[1][:, :, 1:, 1:], image[:, :, :-1, :-1])  # moved down and right
    assert torch.equal(views[2][:, :, :-1, :-1], image[:, :, 1:, 1:])
    for view, mirrored in zip(views[:3], views[3:]):
        assert torch.equal(mirrored, view.flip(3))
