"""Every batched augmentation against a reference that treats one picture at a time, one pixel at a time."""

import math

import pytest
import torch
import torch.nn.functional as F

from augment import Augmentation, Augmenter, Normalize, crop, cutout, flip, warp
from recipe import RECIPES


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def augmenter(count=6, seed=0, **plan):
    normalize = Normalize((0.5, 0.4, 0.3), (0.25, 0.2, 0.3), "cpu")
    return Augmenter(Augmentation(**plan), normalize, count, torch.Generator().manual_seed(seed), epochs=1)


@pytest.mark.parametrize("border, mode", [("wrap", "circular"), ("reflect", "reflect")])
def test_crop_is_pad_then_window(images, border, mode):
    offsets = torch.tensor([[-4, -4], [4, 4], [0, 0], [-1, 3], [4, -2], [2, 0]])
    got = crop(images, offsets, border)
    for image, (down, right), result in zip(images, offsets.tolist(), got):
        padded = F.pad(image[None].float(), (4, 4, 4, 4), mode=mode)[0]
        assert torch.equal(result.float(), padded[:, 4 + down : 36 + down, 4 + right : 36 + right])


def test_crop_refuses_another_border(images):
    with pytest.raises(ValueError, match="wrap or reflect"):
        crop(images, torch.zeros(6, 2, dtype=torch.long), "zero")


def test_flip_mirrors_the_chosen_alone(images):
    chosen = torch.tensor([True, False, True, False, False, True])
    for image, mirrored, result in zip(images, chosen, flip(images, chosen)):
        assert torch.equal(result, image[:, :, range(31, -1, -1)] if mirrored else image)


def warp_one(image, shift, scale, angle):
    """Where each output pixel comes from, found by solving for it; bilinear; indices wrap."""
    forward = scale * torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    result = torch.empty(image.shape, dtype=torch.float64)
    for y in range(32):
        for x in range(32):
            target = torch.tensor([y - 15.5 - shift[0], x - 15.5 - shift[1]], dtype=torch.float64)
            v, u = (torch.linalg.solve(forward, target) + 15.5).tolist()
            total = torch.zeros(3, dtype=torch.float64)
            for row, a in ((math.floor(v), 1 - v + math.floor(v)), (math.floor(v) + 1, v - math.floor(v))):
                for column, b in ((math.floor(u), 1 - u + math.floor(u)), (math.floor(u) + 1, u - math.floor(u))):
                    total += a * b * image[:, row % 32, column % 32].double()
            result[:, y, x] = total
    return result


def test_warp_is_the_picture_taken_pixel_by_pixel(images):
    shifts = torch.tensor([[0.0, 0.0], [2.24, -1.3], [0.0, 0.5]])
    scales = torch.tensor([1.0, 0.8, 1.2])
    angles = torch.tensor([math.radians(15), math.radians(-7), 0.3])
    got = warp(images[:3], shifts, scales, angles)
    for image, shift, scale, angle, result in zip(images, shifts.tolist(), scales.tolist(), angles.tolist(), got):
        # float32 places a pixel to within 1e-5 of its width, and neighbours differ by at most 255 levels
        assert torch.allclose(result.double(), warp_one(image, shift, scale, angle), rtol=0, atol=0.01)


def test_warp_by_nothing_changes_no_bit(images):
    got = warp(images, torch.zeros(6, 2), torch.ones(6), torch.zeros(6))
    assert torch.equal(got, images.float())


def test_warp_agrees_with_torchvision_away_from_the_border(images):
    try:
        from torchvision.transforms.functional import InterpolationMode, affine
    except Exception as error:  # beside a CPU-only torch it raises RuntimeError
        pytest.skip(f"torchvision does not import: {error}")
    got = warp(images[:1], torch.tensor([[2.0, -1.0]]), torch.tensor([1.1]), torch.tensor([math.radians(12)]))
    theirs = affine(images[:1].float(), angle=12, translate=[-1, 2], scale=1.1, shear=[0.0], interpolation=InterpolationMode.BILINEAR)
    assert torch.allclose(got[..., 10:22, 10:22], theirs[..., 10:22, 10:22], rtol=0, atol=0.05)


def test_flip_and_reflect_crop_agree_with_torchvision(images):
    try:
        from torchvision.transforms import functional
    except Exception as error:
        pytest.skip(f"torchvision does not import: {error}")
    assert torch.equal(flip(images, torch.ones(6, dtype=torch.bool)), functional.hflip(images))
    padded = functional.pad(images, [4, 4, 4, 4], padding_mode="reflect")
    assert torch.equal(crop(images, torch.full((6, 2), 3), "reflect"), functional.crop(padded, 7, 7, 32, 32))


@pytest.mark.parametrize("size", [1, 8, 32])
def test_cutout_fills_one_square_of_the_chosen(images, size):
    corners = torch.tensor([[0, 0], [32 - size, 32 - size], [0, 32 - size], [3, 5], [7, 1], [2, 2]]).clamp(max=32 - size)
    chosen = torch.tensor([True, True, True, True, False, True])
    for image, (y, x), cut, result in zip(images, corners.tolist(), chosen, cutout(images + 1.0, corners, size, chosen)):
        expected = image + 1.0
        if cut:
            expected[:, y : y + size, x : x + size] = 0.0
        assert torch.equal(result, expected)


def test_no_augmentation_normalises_and_nothing_else(images):
    got = augmenter()(images, torch.arange(6), 0)
    expected = (images.double() / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.25, 0.2, 0.3]).view(3, 1, 1)
    assert torch.allclose(got.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(augmenter().normalize.invert(got), images)


def test_alternating_flip_flips_every_picture_every_other_epoch(images):
    augment = augmenter(flip="alternating")
    epochs = [augment(images, torch.arange(6), epoch) for epoch in range(4)]
    plain = augment.normalize(images)
    first = torch.tensor([torch.equal(a, b) for a, b in zip(epochs[0], plain)])
    assert first.any() and not first.all()  # about half start flipped
    assert torch.equal(epochs[0].flip(3), epochs[1])
    assert torch.equal(epochs[0], epochs[2]) and torch.equal(epochs[1], epochs[3])
    # which way a picture starts is its own, in whatever batch and place it comes
    assert torch.equal(augment(images[[4, 1]], torch.tensor([4, 1]), 0), epochs[0][[4, 1]])


def test_same_generator_same_pictures_and_another_seed_others(images):
    plan = vars(RECIPES["original"].augmentation)
    a, b, c = (augmenter(seed=seed, **plan)(images, torch.arange(6), 0) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_original_augmentation_does_each_thing_as_often_as_it_should():
    plan = RECIPES["original"].augmentation
    count = 4000
    blank = torch.full((count, 3, 32, 32), 200, dtype=torch.uint8)
    cut = augmenter(count, **vars(plan))(blank, torch.arange(count), 0)
    share = (cut[:, 0] == 0).flatten(1).sum(1)
    assert set(share.tolist()) == {0, 64}  # a square of 8 x 8, whole
    assert (share > 0).double().mean().item() == pytest.approx(0.65, abs=0.03)
    marked = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
    marked[:, :, :, :16] = 200  # crop moves the edge by 4 at most, so pixels 6 and 25 tell left from right
    turned = augmenter(count, flip_p=plan.flip_p, crop_padding=4, crop_border="wrap")(marked, torch.arange(count), 0)
    assert (turned[:, 0, 16, 25] > turned[:, 0, 16, 6]).double().mean().item() == pytest.approx(0.45, abs=0.03)
    gradient = torch.arange(32, dtype=torch.uint8).mul(8).view(1, 1, 1, 32).expand(count, 3, 32, 32)
    warped = augmenter(count, warp_p=0.5, warp_shift=0.07, warp_scale=0.2, warp_degrees=15)
    same = torch.isclose(warped(gradient, torch.arange(count), 0), warped.normalize(gradient)).flatten(1).all(1)
    assert same.double().mean().item() == pytest.approx(0.5, abs=0.03)


def test_random_crop_reaches_every_offset_equally():
    count = 8100
    images = torch.arange(32, dtype=torch.uint8).view(1, 1, 32, 1).expand(count, 3, 32, 32)
    moved = augmenter(count, crop_padding=4, crop_border="wrap")
    rows = moved.normalize.invert(moved(images, torch.arange(count), 0))[:, 0, 10, 0].long() - 10
    counts = (rows + 4).bincount(minlength=9)
    assert len(counts) == 9 and counts.min() > 750 and counts.max() < 1050


@pytest.mark.parametrize("as_tensor", [False, True])  # an epoch is a tensor inside a CUDA graph
def test_crops_reach_half_as_far_at_the_end(as_tensor):
    """From the ninth of ten epochs on, and towards no side more than another."""
    normalize = Normalize((0.5,) * 3, (0.25,) * 3, "cpu")
    plan = Augmentation(crop_padding=4, calm_share=0.2)
    reach = []
    for epoch in range(10):
        augmenter = Augmenter(plan, normalize, 1000, torch.Generator().manual_seed(epoch), epochs=10)
        offsets = augmenter.draw(torch.arange(1000), torch.tensor(epoch) if as_tensor else epoch, 32).offsets
        assert offsets.dtype == torch.int64 and abs(offsets.float().mean()) < 0.2
        reach.append((offsets.min().item(), offsets.max().item()))
    assert reach == [(-4, 4)] * 8 + [(-2, 2)] * 2
