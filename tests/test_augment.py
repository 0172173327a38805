"""The plan of an epoch, and every batched operation against one image and one pixel at a time."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import augment
from augment import Normalize, affine, crop, cutout, epoch_plan, flip
from schedule import RECIPES, Recipe

NORMALIZE = Normalize((0.5, 0.4, 0.3), (0.25, 0.2, 0.3), "cpu")
NONE = Recipe(epochs=10, crop_padding=0)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=generator)


# --- the plan ---


def test_a_plan_is_a_pure_function_of_seed_and_epoch():
    plan, again, *others = (
        epoch_plan(RECIPES["original"], 50, 32, seed, epoch, "cpu")
        for seed, epoch in ((1, 3), (1, 3), (1, 4), (2, 3), (3, 1))
    )
    assert all(map(torch.equal, plan, again))
    assert sorted(plan.indices.tolist()) == list(range(50))
    assert not any(torch.equal(plan.indices, other.indices) for other in others)
    assert not any(torch.equal(plan.angle, other.angle) for other in others)


def test_rows_of_a_batch_go_with_their_images():
    """Augmented in batches of any size, an image is the same: ranks and steps only slice."""
    recipe, images = RECIPES["original"], torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    plan = epoch_plan(recipe, 20, 32, 1, 0, "cpu")
    whole = augment.augment(images[plan.indices], plan, recipe, NORMALIZE)
    for start, stop in ((0, 7), (7, 8), (8, 8), (8, 20)):
        rows = plan.at(slice(start, stop))
        part = augment.augment(images[rows.indices], rows, recipe, NORMALIZE)
        assert torch.equal(part, whole[start:stop])


def test_original_augmentation_has_its_probabilities_and_ranges():
    N, recipe = 20_000, RECIPES["original"]
    plan = epoch_plan(recipe, N, 32, 0, 0, "cpu")
    for name, p in (("flip", 0.45), ("affine", 0.5), ("cutout", 0.65)):
        assert getattr(plan, name).double().mean().item() == pytest.approx(p, abs=0.015)
    angle = math.radians(15)
    ranges = {"translate": (-2.24, 2.24), "scale": (0.8, 1.2), "angle": (-angle, angle)}
    for name, (low, high) in ranges.items():
        values, margin = getattr(plan, name), 0.01 * (high - low)
        assert low <= values.min() < low + margin and high - margin < values.max() <= high
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=margin)
    for name, low, high in (("offsets", -4, 4), ("cutout_xy", 0, 24)):
        counts = (getattr(plan, name) - low).flatten().bincount(minlength=high - low + 1)
        expected = 2 * N / (high - low + 1)
        assert len(counts) == high - low + 1
        assert counts.min() > 0.85 * expected and counts.max() < 1.15 * expected


def test_crops_reach_half_as_far_at_the_end():
    """From the ninth of ten epochs on, without a bias to one side."""
    for decay, reach in ((0.2, [4] * 8 + [2] * 2), (0.0, [4] * 10)):
        recipe = Recipe(epochs=10, crop_padding=4, crop_decay_frac=decay)
        for epoch in range(10):
            offsets = epoch_plan(recipe, 1000, 32, 0, epoch, "cpu").offsets
            assert (-offsets.min(), offsets.max()) == (reach[epoch], reach[epoch])
            assert offsets.dtype == torch.int64 and abs(offsets.float().mean()) < 0.2


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
        assert torch.equal(result, image.flip(2) if mirrored else image)


def affine_one(image, translate, scale, angle):
    """Every output pixel's source, found by solving for it; bilinear; indices wrap."""
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    forward = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
    result = torch.zeros(image.shape, dtype=torch.float64)
    for y, x in itertools.product(range(32), range(32)):
        target = torch.tensor([y - 15.5 - translate[0], x - 15.5 - translate[1]]).double()
        v, u = (torch.linalg.solve(forward, target) + 15.5).tolist()
        top, left = math.floor(v), math.floor(u)
        for row, a in ((top, 1 - v + top), (top + 1, v - top)):
            for column, b in ((left, 1 - u + left), (left + 1, u - left)):
                result[:, y, x] += a * b * image[:, row % 32, column % 32]
    return result


def test_affine_is_the_image_sampled_pixel_by_pixel(images):
    translate = torch.tensor([[2.24, -1.3], [0.0, 0.5]])
    scale, angle = torch.tensor([0.8, 1.2]), torch.tensor([math.radians(-7), 0.3])
    results = affine(images[:2], translate, scale, angle)
    rows = zip(images, translate.tolist(), scale.tolist(), angle.tolist(), results)
    for image, *parameters, result in rows:
        # float32 places a pixel to within 1e-5 of its width; neighbors differ by at most 255.
        expected = affine_one(image, *parameters)
        assert torch.allclose(result.double(), expected, rtol=0, atol=0.01)
    unchanged = affine(images, torch.zeros(6, 2), torch.ones(6), torch.zeros(6))
    assert torch.equal(unchanged, images.float())


@pytest.mark.parametrize("size", [1, 8, 32])
def test_cutout_zeros_one_square_of_the_images_of_its_mask(images, size):
    last = 32 - size
    corners = torch.tensor([[0, 0], [last, last], [0, last], [3, 5], [7, 1], [2, 2]])
    corners, mask = corners.clamp(max=last), torch.tensor([True, True, True, True, False, True])
    results = cutout(images + 1.0, corners, size, mask)
    for image, (y, x), cut, result in zip(images, corners.tolist(), mask, results):
        expected = image + 1.0
        if cut:
            expected[:, y : y + size, x : x + size] = 0.0
        assert torch.equal(result, expected)


def test_without_augmentation_images_are_normalized(images):
    plan = epoch_plan(NONE, 6, 32, 0, 0, "cpu")
    assert [name for name, column in plan._asdict().items() if column is not None] == ["indices"]
    result = augment.augment(images, plan, NONE, NORMALIZE)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.25, 0.2, 0.3)))
    assert torch.allclose(result.double(), (images.double() / 255 - mean) / std, rtol=0, atol=1e-5)
    assert torch.equal(NORMALIZE.invert(result), images)


def test_augment_applies_every_part_in_order(images):
    recipe = dataclasses.replace(RECIPES["original"], affine_p=1.0, cutout_p=1.0, flip_p=1.0)
    plan = epoch_plan(recipe, 6, 32, 0, 0, "cpu")
    expected = flip(crop(images, plan.offsets, "wrap"), plan.flip)
    expected = NORMALIZE(affine(expected, plan.translate, plan.scale, plan.angle))
    expected = cutout(expected, plan.cutout_xy, 8, plan.cutout)
    assert torch.equal(augment.augment(images, plan, recipe, NORMALIZE), expected)
    assert (expected == 0).flatten(1).any(1).all()
