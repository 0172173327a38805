"""Augmentation: the random plan of an epoch, and batched tensor operations that follow it.

Everything random about an epoch, the order of images and every parameter of every image, is drawn
at its start as one table, a pure function of (seed, epoch). Step i takes rows i B to (i + 1) B.
"""

import hashlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


class EpochPlan(NamedTuple):
    """One row an image, in the order of the epoch; None for what the recipe leaves out."""

    indices: torch.Tensor  # (N,) int64, places in the training set
    offsets: torch.Tensor | None = None  # (N, 2) int64, of the crop: rows, columns, either sign
    flip: torch.Tensor | None = None  # (N,) bool
    affine: torch.Tensor | None = None  # (N,) bool; the next three are for these images
    translate: torch.Tensor | None = None  # (N, 2) float32, pixels down and right
    scale: torch.Tensor | None = None  # (N,) float32
    angle: torch.Tensor | None = None  # (N,) float32, radians
    cutout: torch.Tensor | None = None  # (N,) bool
    cutout_xy: torch.Tensor | None = None  # (N, 2) int64, top left row and column

    def at(self, rows):
        """The rows of a slice or of indices."""
        return EpochPlan(*(None if column is None else column[rows] for column in self))


def epoch_plan(recipe, num_images, image_size, seed, epoch, device):
    """The EpochPlan of epoch `epoch`, counted from 0: a pure function of its arguments."""
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7]))
    N, S = num_images, image_size

    def uniform(low, high, *shape):
        return torch.rand(N, *shape, device=device, generator=generator) * (high - low) + low

    def randint(low, high):  # both included
        return torch.randint(low, high + 1, (N, 2), device=device, generator=generator)

    plan = {"indices": torch.randperm(N, device=device, generator=generator)}
    if recipe.crop_padding:
        plan["offsets"] = randint(-recipe.crop_padding, recipe.crop_padding)
        if epoch >= round(recipe.epochs * (1 - recipe.crop_decay_frac)):
            plan["offsets"] = plan["offsets"].div(2, rounding_mode="trunc")
    if recipe.flip_p:
        plan["flip"] = uniform(0, 1) < recipe.flip_p
    if recipe.affine_p:
        angle = math.radians(recipe.degrees)
        plan["affine"] = uniform(0, 1) < recipe.affine_p
        plan["translate"] = uniform(-recipe.translate * S, recipe.translate * S, 2)
        plan["scale"] = uniform(1 - recipe.scale, 1 + recipe.scale)
        plan["angle"] = uniform(-angle, angle)
    if recipe.cutout_p:
        plan["cutout"] = uniform(0, 1) < recipe.cutout_p
        plan["cutout_xy"] = randint(0, S - recipe.cutout_size)
    return EpochPlan(**plan)


def gather_pixels(images, index):
    """Pixels of each image at `index`, row * S + column, int64 (B, S, S): -> (B, C, S, S)."""
    B, C, S, _ = images.shape
    index = index.view(B, 1, S * S).expand(-1, C, -1)  # (B, S, S) -> (B, C, S S)
    return images.reshape(B, C, S * S).gather(2, index).view(B, C, S, S)


def crop(images, offsets, padding_mode):
    """The S x S window at `offsets` (B, 2) of each image, padded by "reflect" or "wrap"."""
    B, _, S, _ = images.shape
    index = torch.arange(S, device=images.device) + offsets.view(B, 2, 1)  # (B, 2, S)
    reflected = (S - 1) - ((S - 1) - index.abs()).abs()
    rows, columns = (index % S if padding_mode == "wrap" else reflected).unbind(1)  # 2 x (B, S)
    return gather_pixels(images, rows.view(B, S, 1) * S + columns.view(B, 1, S))


def flip(images, mask):
    """Mirror the images of `mask` (B,; bool) left to right."""
    return torch.where(mask.view(-1, 1, 1, 1), images.flip(3), images)


def affine(images, translate, scale, angle):
    """Translate, scale and rotate about the center; bilinear, wrapping at the border; float32.

    translate (B, 2) is in pixels down and right, scale (B,) magnifies, angle (B,) is in radians,
    clockwise on the screen. Pixel p samples R(-angle) (p - center - translate) / scale + center.
    """
    B, _, S, _ = images.shape
    center = (S - 1) / 2
    grid = torch.arange(S, device=images.device) - center
    down = grid.view(1, S, 1) - translate[:, 0].view(B, 1, 1)
    right = grid.view(1, 1, S) - translate[:, 1].view(B, 1, 1)
    cos = (angle.cos() / scale).view(B, 1, 1)
    sin = (angle.sin() / scale).view(B, 1, 1)
    y = cos * down - sin * right + center  # (B, S, S)
    x = sin * down + cos * right + center
    top, left = y.floor(), x.floor()
    dy, dx = (y - top).unsqueeze(1), (x - left).unsqueeze(1)  # (B, 1, S, S)
    # float32 is exact for whole numbers up to 2^24, and int64 division is slow on a CPU.
    rows = [S * (row - S * (row / S).floor()) for row in (top, top + 1)]
    columns = [column - S * (column / S).floor() for column in (left, left + 1)]
    corners = [[gather_pixels(images, (r + c).long()).float() for c in columns] for r in rows]
    return torch.lerp(*(torch.lerp(*pair, dx) for pair in corners), dy)


def cutout(images, corners, size, mask):
    """Zero a square of `size` pixels at `corners` (B, 2; row, column) in the images of `mask`."""
    B, _, S, _ = images.shape
    index = torch.arange(S, device=images.device)
    inside = (index >= corners.view(B, 2, 1)) & (index < corners.view(B, 2, 1) + size)  # (B, 2, S)
    rows, columns = inside[:, 0] & mask.view(B, 1), inside[:, 1]
    return torch.where(rows.view(B, 1, S, 1) & columns.view(B, 1, 1, S), 0.0, images)


class Normalize:
    """Images on the scale [0, 255] to mean 0, std 1; `mean` and `std` are on the scale [0, 1]."""

    def __init__(self, mean, std, device):
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device).view(1, 3, 1, 1) * 255
        self.std = torch.tensor(std, dtype=torch.float32, device=device).view(1, 3, 1, 1) * 255

    def __call__(self, images):
        """uint8 or float32 (B, 3, S, S) -> float32."""
        return (images.float() - self.mean) / self.std

    def invert(self, images):
        """Normalized float32 (B, 3, S, S) -> uint8."""
        return (images * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)


def augment(images, rows, recipe, normalize):
    """Augmented and normalized float32 images of uint8 `images` (B, 3, S, S), by rows of a plan."""
    if rows.offsets is not None:
        images = crop(images, rows.offsets, recipe.padding_mode)
    if rows.flip is not None:
        images = flip(images, rows.flip)
    if rows.affine is not None:
        mask, parameters = rows.affine, (rows.translate, rows.scale, rows.angle)
        moved = affine(images[mask], *(p[mask] for p in parameters))
        images = images.float()
        images[mask] = moved
    images = normalize(images)
    if rows.cutout is not None:
        images = cutout(images, rows.cutout_xy, recipe.cutout_size, rows.cutout)
    return images


def tta_views(images, tta):
    """The views of normalized images over which test-time augmentation averages logits.

    "none": the images. "flip": their mirror images too. "shift": also both of crops moved by one
    pixel, up and left, down and right, as in Jordan 2024, arXiv:2404.00498.
    """
    S, views = images.shape[-1], [images]
    if tta == "shift":
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        views += [padded[:, :, :S, :S], padded[:, :, 2:, 2:]]
    return views if tta == "none" else views + [view.flip(3) for view in views]
