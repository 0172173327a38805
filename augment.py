"""Augmentation as batched tensor operations on the pictures' own device: no loop over samples, no worker processes.

The functions below apply given parameters to a batch; `Augmenter` draws the parameters from a torch.Generator and
applies them in the order that an `Augmentation` names; kernels/augment.py applies them all at once. Pictures are
(B, 3, S, S); a row `i` of any parameter belongs to picture `i`.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training picture, in this order; the defaults do nothing."""

    crop_padding: int = 0  # pixels of border on each side before a random crop back to size
    crop_border: str = "reflect"  # what the border holds: "reflect" or "wrap"
    flip: str = "random"  # "random": each time with flip_p; "alternating": every other epoch, ignoring flip_p
    flip_p: float = 0.0
    warp_p: float = 0.0  # shift, scale and rotate, bilinear, wrapping at the border
    warp_shift: float = 0.0  # of the side, either way, on each axis
    warp_scale: float = 0.0  # either way around 1
    warp_degrees: float = 0.0  # either way
    cutout_p: float = 0.0
    cutout_size: int = 0  # side in pixels of one square filled with the dataset's mean
    calm_share: float = 0.0  # of the run, at its end, in which crops reach half as far


@dataclass
class Draws:
    """What was drawn for a batch of B pictures; None for what the plan leaves out."""

    offsets: torch.Tensor | None = None  # (B, 2), int64, rows and columns
    flipped: torch.Tensor | None = None  # (B,), bool
    warped: torch.Tensor | None = None  # (B,), bool; the next three are for these
    shifts: torch.Tensor | None = None  # (B, 2), pixels down and right
    scales: torch.Tensor | None = None  # (B,)
    angles: torch.Tensor | None = None  # (B,), radians
    corners: torch.Tensor | None = None  # (B, 2), int64, rows and columns
    cut: torch.Tensor | None = None  # (B,), bool

    def of(self, part):
        """The draws of the pictures in a slice of the batch."""
        return Draws(**{name: None if drawn is None else drawn[part] for name, drawn in vars(self).items()})


def take_pixels(images, index):
    """The pixels of each picture at `index`, row * S + column, int64 (B, S, S): (B, C, S, S) -> (B, C, S, S)."""
    B, C, S, _ = images.shape
    index = index.view(B, 1, S * S).expand(-1, C, -1)  # (B, S, S) -> (B, C, SS)
    return images.reshape(B, C, S * S).gather(2, index).view(B, C, S, S)


def crop(images, offsets, border):
    """The S x S window at `offsets` (B, 2; rows, columns; int64, pixels, either sign) of each picture.

    Outside the picture lies the picture again (border "wrap") or its mirror image without the edge ("reflect"), as
    torch.nn.functional.pad has them: this is padding and cropping in one, for any dtype.
    """
    B, _, S, _ = images.shape
    index = torch.arange(S, device=images.device) + offsets.view(B, 2, 1)  # (B, 2, S)
    if border == "wrap":
        index = index % S
    elif border == "reflect":
        index = (S - 1) - ((S - 1) - index.abs()).abs()
    else:
        raise ValueError(f"border is {border!r}; it must be wrap or reflect")
    rows, columns = index.unbind(1)  # 2 x (B, S)
    return take_pixels(images, rows.view(B, S, 1) * S + columns.view(B, 1, S))


def flip(images, chosen):
    """Mirror the chosen (B,; bool) pictures left to right."""
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(3), images)


def warp(images, shifts, scales, angles):
    """Shift, scale and rotate about the centre with bilinear sampling, wrapping at the border; float32.

    shifts (B, 2) are pixels down and right, scales (B,) magnify, angles (B,) are radians, positive clockwise on the
    screen. An output pixel p shows the picture at R(-angle) (p - centre - shift) / scale + centre.
    """
    B, _, S, _ = images.shape
    centred = torch.arange(S, device=images.device) - (S - 1) / 2
    down = centred.view(1, S, 1) - shifts[:, 0].view(B, 1, 1)
    right = centred.view(1, 1, S) - shifts[:, 1].view(B, 1, 1)
    cos = (angles.cos() / scales).view(B, 1, 1)
    sin = (angles.sin() / scales).view(B, 1, 1)
    y = cos * down - sin * right + (S - 1) / 2  # (B, S, S)
    x = sin * down + cos * right + (S - 1) / 2
    top, left = y.floor(), x.floor()
    below, beside = (y - top).unsqueeze(1), (x - left).unsqueeze(1)  # (B, 1, S, S), weights of the next row and column
    # Indices wrap in float32, where whole numbers up to 2^24 are exact: int64 division is not vectorised on a CPU.
    rows = [S * (row - S * (row / S).floor()) for row in (top, top + 1)]
    columns = [column - S * (column / S).floor() for column in (left, left + 1)]
    upper, lower = (
        torch.lerp(*(take_pixels(images, (row + column).long()).float() for column in columns), beside) for row in rows
    )
    return torch.lerp(upper, lower, below)


def cutout(images, corners, size, chosen):
    """Set to 0 a square of `size` pixels whose top left pixel is `corners` (B, 2; rows, columns) in the chosen (B,; bool)."""
    B, _, S, _ = images.shape
    index = torch.arange(S, device=images.device)
    inside = (index >= corners.view(B, 2, 1)) & (index < corners.view(B, 2, 1) + size)  # (B, 2, S)
    rows, columns = inside[:, 0] & chosen.view(B, 1), inside[:, 1]
    square = rows.view(B, 1, S, 1) & columns.view(B, 1, 1, S)
    return torch.where(square, 0.0, images)


class Normalize:
    """Pictures on the scale [0, 255] to mean 0 and deviation 1; `mean` and `std` are three numbers each, in [0, 1]."""

    def __init__(self, mean, std, device):
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device).view(1, 3, 1, 1) * 255
        self.std = torch.tensor(std, dtype=torch.float32, device=device).view(1, 3, 1, 1) * 255

    def __call__(self, images):
        """(B, 3, S, S), uint8 or float32 -> float32."""
        return (images.float() - self.mean) / self.std

    def invert(self, images):
        """Normalised (B, 3, S, S) back to uint8."""
        return (images * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)


class Augmenter:
    """uint8 pictures to normalised float32 ones, augmented for training.

    `count` is the number of training pictures, `epochs` that of the run's epochs; every random number comes from
    `generator`, which lives on the pictures' device.
    """

    def __init__(self, augmentation, normalize, count, generator, epochs):
        self.augmentation, self.normalize = augmentation, normalize
        self.calm_from = round(epochs * (1 - augmentation.calm_share))
        self.generator, self.device = generator, generator.device
        # Which pictures are flipped in epochs 0, 2, 4, ...; the others are in 1, 3, 5, ... Keller Jordan 2024,
        # "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv:2404.00498.
        self.flipped_first = self.uniform(0, 1, count) < 0.5 if augmentation.flip == "alternating" else None

    def uniform(self, low, high, *shape):
        return torch.rand(*shape, device=self.device, generator=self.generator) * (high - low) + low

    def integers(self, low, high, *shape):
        """Whole numbers from low to high, both included."""
        return torch.randint(low, high + 1, shape, device=self.device, generator=self.generator)

    def draw(self, indices, epoch, S):
        """Draws for the training pictures at places `indices` (B,), of side S, in an epoch counted from 0."""
        plan, B, draws = self.augmentation, len(indices), Draws()
        if plan.crop_padding:
            offsets = self.integers(-plan.crop_padding, plan.crop_padding, B, 2)
            draws.offsets = offsets.div(1 + (epoch >= self.calm_from), rounding_mode="trunc") if plan.calm_share else offsets
        if plan.flip == "alternating":
            draws.flipped = self.flipped_first[indices] ^ (epoch % 2 == 1)
        elif plan.flip_p:
            draws.flipped = self.uniform(0, 1, B) < plan.flip_p
        if plan.warp_p:
            draws.warped = self.uniform(0, 1, B) < plan.warp_p
            draws.shifts = self.uniform(-plan.warp_shift * S, plan.warp_shift * S, B, 2)
            draws.scales = self.uniform(1 - plan.warp_scale, 1 + plan.warp_scale, B)
            draws.angles = self.uniform(-math.radians(plan.warp_degrees), math.radians(plan.warp_degrees), B)
        if plan.cutout_p:
            draws.corners = self.integers(0, S - plan.cutout_size, B, 2)
            draws.cut = self.uniform(0, 1, B) < plan.cutout_p
        return draws

    def apply(self, images, draws):
        """Augment and normalise: uint8 (B, 3, S, S) -> float32."""
        if draws.offsets is not None:
            images = crop(images, draws.offsets, self.augmentation.crop_border)
        if draws.flipped is not None:
            images = flip(images, draws.flipped)
        if draws.warped is not None:
            images = warp_some(images, draws)
        images = self.normalize(images)
        if draws.cut is not None:
            images = cutout(images, draws.corners, self.augmentation.cutout_size, draws.cut)
        return images

    def __call__(self, images, indices, epoch):
        """Draw and apply: uint8 (B, 3, S, S), the pictures' places in the training set (B,), epoch from 0 -> float32."""
        return self.apply(images, self.draw(indices, epoch, images.shape[-1]))


def warp_some(images, draws):
    """`warp` the pictures that were drawn for it; float32."""
    chosen, parameters = draws.warped, (draws.shifts, draws.scales, draws.angles)
    if images.device.type != "cpu":  # no shape may depend on what was drawn, or the host would have to wait
        return torch.where(chosen.view(-1, 1, 1, 1), warp(images, *parameters), images.float())
    warped = images.float()
    warped[chosen] = warp(images[chosen], *(parameter[chosen] for parameter in parameters))
    return warped
