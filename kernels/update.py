"""Partial gradients to the flat gradient, one launch, and AdamW, another.

    grad = scale * sum over partial gradients + l1 * sign(p)
    m += (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2,
    p = p (1 - lr decay) - lr m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + eps)

torch.optim.AdamW computes the same, but takes beta1, which OneCycle moves, as a number of the
host. Loshchilov & Hutter 2017, arXiv:1711.05101.
"""

import triton
import triton.language as tl

from kernels.functions import (
    ADAMW_LR,
    CORRECTION1,
    CORRECTION2,
    INTERPRETED,
    NUM_HPARAMS,
    ONE_MINUS_MOMENTUM,
)

# Sizes of a tile of partial gradients, and of AdamW. The interpreter's time is that of programs.
COLUMNS = 8192 if INTERPRETED else 128
ROWS = 4 if INTERPRETED else 32
BLOCK = 16384 if INTERPRETED else 1024


@triton.jit(do_not_specialize=["num_params"])
def reduce_kernel(
    partial_ptr,  # all partial gradients, fp32
    tiles_ptr,  # (programs, 5), int64: offset, rows, distance of rows, columns, offset in grad
    param_ptr,  # (N,)
    grad_ptr,  # (N + 2,): gradient, sum of losses, correct
    counter_ptr,  # (1,), int32, steps done in the epoch
    num_params,  # N
    scale,
    l1,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    tiles_ptr += 5 * tl.program_id(0)
    partial_ptr += tl.load(tiles_ptr)
    num_rows = tl.load(tiles_ptr + 1)
    stride = tl.load(tiles_ptr + 2)
    column = tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)[:, None].to(tl.int64)
    mask = column < tl.load(tiles_ptr + 3)
    i = tl.load(tiles_ptr + 4) + column

    # The sum over rows.
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = num_rows * 0  # not 0: a loop keeps the type of its variable, here int64
    while first < num_rows:
        valid = mask[None, :] & (first + row < num_rows)
        at = (first + row) * stride + column[None, :]
        total += tl.load(partial_ptr + at, mask=valid, other=0.0)
        first += ROWS

    # The mean over images and the gradient of the L1 norm; sums stay sums for loss and correct.
    is_param = i < num_params
    grad = tl.sum(total, 0) * tl.where(is_param, scale, 1.0)
    p = tl.load(param_ptr + i, mask=mask & is_param, other=0.0)
    sign = tl.where(p > 0, 1.0, 0.0) - tl.where(p < 0, 1.0, 0.0)
    tl.store(grad_ptr + i, grad + l1 * sign, mask=mask)

    # Nothing in this launch reads the counter.
    if tl.program_id(0) == 0:
        tl.store(counter_ptr, tl.load(counter_ptr) + 1)


@triton.jit
def adamw_kernel(
    grad_ptr,  # (N + 2,): gradient, sum of losses, correct
    counter_ptr,  # (1,), int32, steps done in the epoch, this one included
    hparams_ptr,  # (steps, NUM_HPARAMS)
    blocks_ptr,  # (programs, 3), int32: first offset, end, whether it decays
    param_ptr,  # (N,), updated in place
    exp_avg_ptr,  # (N,), updated in place
    exp_avg_sq_ptr,  # (N,), updated in place
    totals_ptr,  # (2,), updated in place: sum of losses, correct
    num_params,  # N
    weight_decay,
    beta2,
    one_minus_beta2,  # made in float64: in fp32 it is off by up to 1.3e-5
    eps,
    BLOCK: tl.constexpr,
):
    blocks_ptr += 3 * tl.program_id(0)
    i = tl.load(blocks_ptr) + tl.arange(0, BLOCK)
    mask = i < tl.load(blocks_ptr + 1)
    decay = tl.where(tl.load(blocks_ptr + 2) != 0, weight_decay, 0.0)
    hparams_ptr += (tl.load(counter_ptr) - 1) * NUM_HPARAMS
    lr = tl.load(hparams_ptr + ADAMW_LR)
    correction1 = tl.load(hparams_ptr + CORRECTION1)
    correction2 = tl.load(hparams_ptr + CORRECTION2)

    g = tl.load(grad_ptr + i, mask=mask, other=0.0)
    p = tl.load(param_ptr + i, mask=mask, other=0.0) * (1 - lr * decay)
    m = tl.load(exp_avg_ptr + i, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq_ptr + i, mask=mask, other=0.0)
    m += tl.load(hparams_ptr + ONE_MINUS_MOMENTUM) * (g - m)
    v = beta2 * v + one_minus_beta2 * g * g
    p -= lr * (m / correction1) / (tl.sqrt(v / correction2) + eps)
    tl.store(param_ptr + i, p, mask=mask)
    tl.store(exp_avg_ptr + i, m, mask=mask)
    tl.store(exp_avg_sq_ptr + i, v, mask=mask)

    if tl.program_id(0) == 0:
        j = tl.arange(0, 2)
        totals = tl.load(totals_ptr + j) + tl.load(grad_ptr + num_params + j)
        tl.store(totals_ptr + j, totals)


def reduce(step, tiles, scale, l1):
    """Write step.grad, scaled and with the gradient of L1; advance the counter.

    `step` is the FusedStep.
    """
    reduce_kernel[(len(tiles),)](
        step.partial,
        tiles,
        step.param,
        step.grad,
        step.counter,
        len(step.param),
        scale,
        l1,
        COLUMNS=COLUMNS,
        ROWS=ROWS,
    )


def adamw(step):
    """Update the weights of AdamW; add loss and correct predictions to the totals."""
    adamw_kernel[(len(step.blocks),)](
        step.grad,
        step.counter,
        step.hparams,
        step.blocks,
        step.param,
        step.exp_avg,
        step.exp_avg_sq,
        step.totals,
        len(step.param),
        step.recipe.weight_decay,
        step.recipe.beta2,
        1 - step.recipe.beta2,
        step.recipe.eps,
        BLOCK=BLOCK,
    )
