"""The whole augmentation of a batch in one launch: augment.Augmenter.apply says the same in PyTorch.

    output pixel -> warp: where in the cropped picture -> 4 neighbours, or 1 -> flip -> crop: where in the source -> its byte,
    then bilinear weights, (value - mean) / deviation, 0 in the square that is cut out

Every step of an augmentation but the last only says from where a pixel comes, so they are followed backwards, from the
output to the byte: the pictures are read where they lie in the training set, once, and written once, in the working
dtype, where PyTorch takes some twenty launches and passes every picture through memory in fp32 several times.

One program is one picture, its S S pixels at once and its channels in turn; neighbours come from the first level cache.
Letters: N training pictures, B batch, S side. The steps and their sources are those of augment.py.
"""

import torch
import triton
import triton.language as tl

from kernels.functions import launch, to_working


@triton.jit
def wrapped(index, S):
    """`index` modulo S, from 0 to S - 1 for either sign."""
    return (index % S + S) % S


@triton.jit
def tap(channel_ptr, row, column, flipped, down, right, mask, S, FLIP: tl.constexpr, BORDER: tl.constexpr):
    """The bytes, as fp32, that the cropped and flipped picture has at (row, column)."""
    if FLIP:
        column = tl.where(flipped, S - 1 - column, column)
    row, column = row + down, column + right
    if BORDER == "wrap":
        row, column = wrapped(row, S), wrapped(column, S)
    elif BORDER == "reflect":
        row, column = (S - 1) - tl.abs((S - 1) - tl.abs(row)), (S - 1) - tl.abs((S - 1) - tl.abs(column))
    return tl.load(channel_ptr + row * S + column, mask=mask, other=0).to(tl.float32)


@triton.jit
def augment_kernel(
    pictures_ptr,  # (N, 3, S, S), uint8
    indices_ptr,  # (B,), int64
    offsets_ptr, flipped_ptr, warped_ptr, shifts_ptr, scales_ptr, angles_ptr, corners_ptr, cut_ptr,  # as augment.Draws has them
    mean_ptr, std_ptr,  # (3,), fp32, of bytes
    z_ptr,  # (B, 3, S, S), working dtype
    BORDER: tl.constexpr,  # of the crop, "reflect" or "wrap"; "" where there is none
    FLIP: tl.constexpr, WARP: tl.constexpr,
    CUT: tl.constexpr,  # the square's side; 0 where there is none
    S: tl.constexpr,  # known to the compiler, so that taking a remainder is no division
    PIXELS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PIXELS)
    row, column, mask = i // S, i % S, i < S * S
    down, right, flipped = 0, 0, 0
    if BORDER != "":
        down, right = tl.load(offsets_ptr + 2 * b).to(tl.int32), tl.load(offsets_ptr + 2 * b + 1).to(tl.int32)
    if FLIP:
        flipped = tl.load(flipped_ptr + b) != 0
    if CUT > 0:
        top, left = tl.load(corners_ptr + 2 * b).to(tl.int32), tl.load(corners_ptr + 2 * b + 1).to(tl.int32)
        cut = (row >= top) & (row < top + CUT) & (column >= left) & (column < left + CUT) & (tl.load(cut_ptr + b) != 0)
    if WARP:
        centre, scale, angle = (S - 1) / 2, tl.load(scales_ptr + b), tl.load(angles_ptr + b)
        cos, sin = tl.cos(angle) / scale, tl.sin(angle) / scale
        y, x = row - centre - tl.load(shifts_ptr + 2 * b), column - centre - tl.load(shifts_ptr + 2 * b + 1)
        warped = tl.load(warped_ptr + b) != 0
        y, x = tl.where(warped, cos * y - sin * x + centre, row), tl.where(warped, sin * y + cos * x + centre, column)
        below, beside = y - tl.floor(y), x - tl.floor(x)
        row, column = wrapped(tl.floor(y).to(tl.int32), S), wrapped(tl.floor(x).to(tl.int32), S)
    for channel in range(3):
        channel_ptr = pictures_ptr + (tl.load(indices_ptr + b) * 3 + channel) * S * S
        value = tap(channel_ptr, row, column, flipped, down, right, mask, S, FLIP, BORDER)
        if WARP:
            next_row, next_column = wrapped(row + 1, S), wrapped(column + 1, S)
            value += beside * (tap(channel_ptr, row, next_column, flipped, down, right, mask, S, FLIP, BORDER) - value)
            lower = tap(channel_ptr, next_row, column, flipped, down, right, mask, S, FLIP, BORDER)
            lower += beside * (tap(channel_ptr, next_row, next_column, flipped, down, right, mask, S, FLIP, BORDER) - lower)
            value += below * (lower - value)
        value = (value - tl.load(mean_ptr + channel)) / tl.load(std_ptr + channel)
        if CUT > 0:
            value = tl.where(cut, 0.0, value)
        tl.store(z_ptr + (b * 3 + channel) * S * S + i, to_working(value, DTYPE), mask=mask)


def augment(augmenter, pictures, indices, draws, dtype):
    """`augmenter.apply(pictures[indices], draws)` in `dtype`: uint8 (N, 3, S, S), (B,) -> (B, 3, S, S)."""
    plan, normalize, S = augmenter.augmentation, augmenter.normalize, pictures.shape[-1]
    z = torch.empty(len(indices), *pictures.shape[1:], dtype=dtype, device=pictures.device)
    drawn = draws.offsets, draws.flipped, draws.warped, draws.shifts, draws.scales, draws.angles, draws.corners, draws.cut
    drawn = [indices if each is None else each for each in drawn]  # what a kernel does not read still needs an address
    launch(
        augment_kernel, len(indices), dtype, (pictures, indices, *drawn, normalize.mean, normalize.std), (z,), S=S,
        BORDER=plan.crop_border if draws.offsets is not None else "", FLIP=draws.flipped is not None,
        WARP=draws.warped is not None, CUT=plan.cutout_size if draws.cut is not None else 0, PIXELS=triton.next_power_of_2(S * S),
    )  # fmt: skip
    return z
