"""Augmentation: the random plan of an epoch, and batched tensor operations that follow it.

Everything random about an epoch, the order of images and every parameter of every image, is drawn
at its start as one table, a pure function of recipe, seed, epoch and kind of device. Step i takes
rows i B to (i + 1) B.
"""

import hashlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

# --- the plan of an epoch ---


class EpochPlan(NamedTuple):
    """A table with a row for each image, in the order of the epoch; None where the recipe has 0."""

    indices: torch.Tensor  # (N,) int64, places in the training set
    offsets: torch.Tensor | None = None  # (N, 2) int64, of the crop: rows, columns, either sign
    flip: torch.Tensor | None = None  # (N,) bool
    affine: torch.Tensor | None = None  # (N,) bool; the next three are for these images
    translate: torch.Tensor | None = None  # (N, 2) float32, pixels down and right
    scale: torch.Tensor | None = None  # (N,) float32
    angle: torch.Tensor | None = None  # (N,) float32, radians
    cutout: torch.Tensor | None = None  # (N,) bool
    cutout_corner: torch.Tensor | None = None  # (N, 2) int64, top left row and column

    def at(self, rows):
        """Return the plan's rows of a slice or of indices."""
        return EpochPlan(*(None if column is None else column[rows] for column in self))


def epoch_plan(recipe, num_images, image_size, seed, epoch, device):
    """Return the EpochPlan of epoch `epoch`, counted from 0: a pure function of its arguments."""
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    number = int.from_bytes(digest[:7])  # 56 bits, as a seed has to fit into an int64
    generator = torch.Generator(device).manual_seed(number)

    def uniform(low, high, *shape):
        numbers = torch.rand(num_images, *shape, device=device, generator=generator)
        return numbers * (high - low) + low

    def pairs(low, high):  # of whole numbers, both ends included
        return torch.randint(low, high + 1, (num_images, 2), device=device, generator=generator)

    plan = {"indices": torch.randperm(num_images, device=device, generator=generator)}
    if recipe.crop_padding:
        offsets = pairs(-recipe.crop_padding, recipe.crop_padding)
        decay_epoch = round(recipe.epochs * (1 - recipe.crop_decay_frac))
        if recipe.crop_decay_frac and epoch >= decay_epoch:
            offsets = offsets.div(2, rounding_mode="trunc")
        plan["offsets"] = offsets
    if recipe.flip_p:
        plan["flip"] = uniform(0, 1) < recipe.flip_p
    if recipe.affine_p:
        pixels = recipe.translate * image_size
        radians = math.radians(recipe.degrees)
        plan["affine"] = uniform(0, 1) < recipe.affine_p
        plan["translate"] = uniform(-pixels, pixels, 2)
        plan["scale"] = uniform(1 - recipe.scale, 1 + recipe.scale)
        plan["angle"] = uniform(-radians, radians)
    if recipe.cutout_p:
        plan["cutout"] = uniform(0, 1) < recipe.cutout_p
        plan["cutout_corner"] = pairs(0, image_size - recipe.cutout_size)
    return EpochPlan(**plan)


# --- operations on a batch; B images, each S x S ---


def augment(images, rows, recipe, normalize):
    """Return uint8 images (B, 3, S, S) augmented by rows of a plan and normalized, float32."""
    if rows.offsets is not None:
        images = crop(images, rows.offsets, recipe.padding_mode)
    if rows.flip is not None:
        images = flip(images, rows.flip)
    if rows.affine is not None:
        # Only the images of the mask are moved, which takes less time than to move all.
        chosen = rows.affine.nonzero()[:, 0]
        moved = affine(
            images[chosen],
            rows.translate[chosen],
            rows.scale[chosen],
            rows.angle[chosen],
        )
        images = images.float()
        images[chosen] = moved
    images = normalize(images)
    if rows.cutout is not None:
        images = cutout(images, rows.cutout_corner, recipe.cutout_size, rows.cutout)
    return images


class Normalize:
    """Brings images from [0, 255] to mean 0 and std 1; `mean` and `std` are on the scale [0, 1]."""

    def __init__(self, mean, std, device):
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device).view(1, 3, 1, 1) * 255
        self.std = torch.tensor(std, dtype=torch.float32, device=device).view(1, 3, 1, 1) * 255

    def __call__(self, images):
        """Normalize uint8 or float32 images (B, 3, S, S); returns float32."""
        return (images.float() - self.mean) / self.std

    def invert(self, images):
        """Return normalized float32 images (B, 3, S, S) as uint8."""
        return (images * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)


def gather_pixels(images, index):
    """Return the pixels of each image at `index` = row * S + column, int64 (B, S, S).

    images (B, C, S, S) -> (B, C, S, S)
    """
    B, C, S, _ = images.shape
    index = index.view(B, 1, S * S).expand(-1, C, -1)  # (B, S, S) -> (B, C, S S)
    pixels = images.reshape(B, C, S * S).gather(2, index)
    return pixels.view(B, C, S, S)


def crop(images, offsets, padding_mode):
    """Return the S x S window at `offsets` (B, 2) of each image, padded by "reflect" or "wrap"."""
    B, _, S, _ = images.shape
    index = torch.arange(S, device=images.device) + offsets.view(B, 2, 1)  # (B, 2, S)
    if padding_mode == "wrap":
        index = index % S
    elif padding_mode == "reflect":
        index = (S - 1) - ((S - 1) - index.abs()).abs()  # -1 becomes 1, S becomes S - 2
    rows = index[:, 0].view(B, S, 1)
    columns = index[:, 1].view(B, 1, S)
    return gather_pixels(images, rows * S + columns)


def flip(images, mask):
    """Mirror the images of `mask` (B,; bool) left to right."""
    return torch.where(mask.view(-1, 1, 1, 1), images.flip(3), images)


def affine(images, translate, scale, angle):
    """Translate, scale and rotate about the center; bilinear, wrapping at the border; float32.

    translate (B, 2) is in pixels down and right, scale (B,) magnifies, angle (B,) is in radians,
    clockwise on the screen. Pixel p samples R(-angle) (p - center - translate) / scale + center.
    """
    B, _, S, _ = images.shape

    # Where each pixel of the result is sampled in the image.
    center = (S - 1) / 2
    grid = torch.arange(S, device=images.device) - center
    down = grid.view(1, S, 1) - translate[:, 0].view(B, 1, 1)
    right = grid.view(1, 1, S) - translate[:, 1].view(B, 1, 1)
    cos = (angle.cos() / scale).view(B, 1, 1)
    sin = (angle.sin() / scale).view(B, 1, 1)
    y = cos * down - sin * right + center  # (B, S, S)
    x = sin * down + cos * right + center

    # The four pixels around that place.
    top = y.floor()
    left = x.floor()
    row = S * wrap(top, S)
    next_row = S * wrap(top + 1, S)
    column = wrap(left, S)
    next_column = wrap(left + 1, S)
    top_left = gather_pixels(images, (row + column).long()).float()
    top_right = gather_pixels(images, (row + next_column).long()).float()
    bottom_left = gather_pixels(images, (next_row + column).long()).float()
    bottom_right = gather_pixels(images, (next_row + next_column).long()).float()

    # Between them, first along rows, then along columns.
    dy = (y - top).unsqueeze(1)  # (B, 1, S, S)
    dx = (x - left).unsqueeze(1)
    upper = torch.lerp(top_left, top_right, dx)
    lower = torch.lerp(bottom_left, bottom_right, dx)
    return torch.lerp(upper, lower, dy)


def wrap(index, size):
    """Return whole float32 numbers modulo `size`.

    float32 is exact for whole numbers up to 2^24, and int64 division is slow on a CPU.
    """
    return index - size * (index / size).floor()


def cutout(images, corners, size, mask):
    """Zero a square of `size` pixels at `corners` (B, 2; row, column) in the images of `mask`."""
    B, _, S, _ = images.shape
    index = torch.arange(S, device=images.device)
    corners = corners.view(B, 2, 1)
    inside = (index >= corners) & (index < corners + size)  # (B, 2, S)
    rows = inside[:, 0] & mask.view(B, 1)
    columns = inside[:, 1]
    square = rows.view(B, 1, S, 1) & columns.view(B, 1, 1, S)
    return torch.where(square, 0.0, images)


def tta_views(images, tta):
    """Return the views of normalized images over which test-time augmentation averages logits.

    "none": the images. "flip": their mirror images too. "shift": also both of crops moved by one
    pixel, up and left, down and right, as in Jordan 2024, arXiv:2404.00498.
    """
    views = [images]
    if tta == "shift":
        S = images.shape[-1]
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        views.append(padded[:, :, :S, :S])
        views.append(padded[:, :, 2:, 2:])
    if tta != "none":
        views += [view.flip(3) for view in views]
    return views
