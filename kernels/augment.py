"""The augmentation of a batch in one launch; augment.augment is the same in PyTorch.

    output pixel -> affine: position in the cropped image -> 4 neighbors, or 1 -> flip -> crop
    -> byte, then bilinear weights, (value - mean) / std, 0 inside the cutout

Every operation but the last says only where a pixel comes from, so they are followed backward from
the output to the byte: images are read in place in the training set, once, and written once. What
a recipe leaves out has neutral values in the plan, so all recipes share one compiled kernel.

One program is one image. S: its side.
"""

import torch
import triton
import triton.language as tl

from augment import EpochPlan
from kernels.functions import cast, launch, plan_row


@triton.jit
def floor_mod(index, S):
    """`index` modulo S, in [0, S) for either sign."""
    return (index % S + S) % S


@triton.jit
def pad_index(index, wrap, S):
    """Where padding by "wrap" or "reflect" takes the pixel at `index`, in (-S, 2 S)."""
    reflected = (S - 1) - tl.abs((S - 1) - tl.abs(index))
    return tl.where(wrap != 0, floor_mod(index, S), reflected)


@triton.jit
def load_pixel(image_ptr, row, column, flip, down, right, wrap, mask, S: tl.constexpr):
    """Bytes, as fp32, at (row, column) of one channel of the cropped and flipped image."""
    column = tl.where(flip, S - 1 - column, column)
    row, column = pad_index(row + down, wrap, S), pad_index(column + right, wrap, S)
    return tl.load(image_ptr + row * S + column, mask=mask, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["batch_size", "shard_start", "wrap", "cutout_size"])
def augment_kernel(
    images_ptr,  # (N, 3, S, S), uint8
    indices_ptr,  # (N,), int64
    offsets_ptr,  # (N, 2), int64
    flip_ptr, affine_ptr,  # (N,), bool
    translate_ptr, cos_ptr, sin_ptr,  # (N, 2), (N,), (N,); cos and sin of the angle over the scale
    cutout_ptr, cutout_xy_ptr,  # (N,), bool; (N, 2), int64
    mean_ptr, std_ptr,  # (3,), of bytes
    counter_ptr,  # (1,), int32, steps done in the epoch
    out_ptr,  # (B, 3, S + 2, S + 2), working dtype; the margin of 1 pixel is not written
    batch_size, shard_start, wrap, cutout_size,
    S: tl.constexpr, PIXELS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    plan = plan_row(counter_ptr, batch_size, shard_start) + b
    i = tl.arange(0, PIXELS)
    row, column, mask = i // S, i % S, i < S * S
    down = tl.load(offsets_ptr + 2 * plan).to(tl.int32)
    right = tl.load(offsets_ptr + 2 * plan + 1).to(tl.int32)
    flip, is_affine = tl.load(flip_ptr + plan) != 0, tl.load(affine_ptr + plan) != 0
    top = tl.load(cutout_xy_ptr + 2 * plan).to(tl.int32)
    left = tl.load(cutout_xy_ptr + 2 * plan + 1).to(tl.int32)
    hidden = (row >= top) & (row < top + cutout_size)
    hidden &= (column >= left) & (column < left + cutout_size) & (tl.load(cutout_ptr + plan) != 0)

    cos, sin, center = tl.load(cos_ptr + plan), tl.load(sin_ptr + plan), (S - 1) / 2
    y = row - center - tl.load(translate_ptr + 2 * plan)
    x = column - center - tl.load(translate_ptr + 2 * plan + 1)
    y, x = cos * y - sin * x + center, sin * y + cos * x + center
    dy, dx = y - tl.floor(y), x - tl.floor(x)
    row0, column0 = floor_mod(tl.floor(y).to(tl.int32), S), floor_mod(tl.floor(x).to(tl.int32), S)
    row1, column1 = floor_mod(row0 + 1, S), floor_mod(column0 + 1, S)

    image_ptr = images_ptr + tl.load(indices_ptr + plan) * (3 * S * S)
    out_ptr += b * (3 * (S + 2) * (S + 2)) + (row + 1) * (S + 2) + column + 1
    for channel in range(3):
        at = image_ptr + channel * S * S
        if is_affine:
            value = load_pixel(at, row0, column0, flip, down, right, wrap, mask, S)
            other = load_pixel(at, row0, column1, flip, down, right, wrap, mask, S)
            value += dx * (other - value)
            lower = load_pixel(at, row1, column0, flip, down, right, wrap, mask, S)
            other = load_pixel(at, row1, column1, flip, down, right, wrap, mask, S)
            value += dy * (lower + dx * (other - lower) - value)
        else:
            value = load_pixel(at, row, column, flip, down, right, wrap, mask, S)
        value = (value - tl.load(mean_ptr + channel)) / tl.load(std_ptr + channel)
        value = cast(tl.where(hidden, 0.0, value), DTYPE)
        tl.store(out_ptr + channel * (S + 2) * (S + 2), value, mask=mask)


def kernel_plan(plan):
    """An EpochPlan as the kernel reads it: neutral values for what the recipe leaves out, and
    cos(angle) / scale and sin(angle) / scale in place of scale and angle.
    """
    fp32 = torch.zeros_like(plan.indices, dtype=torch.float32)
    pairs, mask = torch.zeros_like(plan.indices).repeat(2, 1).T.contiguous(), fp32.bool()
    if plan.affine is not None:
        cos, sin = plan.angle.cos() / plan.scale, plan.angle.sin() / plan.scale
        plan = plan._replace(scale=cos, angle=sin)
    neutral = EpochPlan(plan.indices, pairs, mask, mask, pairs.float(), fp32, fp32, mask, pairs)
    return EpochPlan(*(b if a is None else a for a, b in zip(plan, neutral)))


def augment(images, plan, normalize, recipe, counter, out, row, num_images, target):
    """Write augmented images of a step to out (B, 3, S + 2, S + 2).

    `images` (N, 3, S, S) is the training set; `row` is (batch size, start of the shard in it).
    """
    S = images.shape[-1]
    launch(
        augment_kernel, num_images, images, *plan, normalize.mean, normalize.std, counter, out,
        *row, int(recipe.padding_mode == "wrap"), recipe.cutout_size,
        S=S, PIXELS=triton.next_power_of_2(S * S), **target.options("augment"),
    )  # fmt: skip
