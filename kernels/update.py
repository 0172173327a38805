"""Partial gradients to the flat gradient, one launch, and AdamW with the step's counts, another.

    grad = scale * sum over partial gradients + l1 * sign(p)
    m += (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2,
    p = p (1 - lr decay) - lr m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + eps)

`reduce` advances the counter of steps. torch.optim.AdamW computes the same, but takes beta1, which
OneCycle moves, as a number of the host. Loshchilov & Hutter 2017, arXiv:1711.05101.
"""

import triton
import triton.language as tl

from kernels.functions import INTERPRETED, launch, update_average

# Of a tile of partial gradients, and of AdamW. The interpreter's time is that of programs.
COLUMNS, ROWS = (8192, 4) if INTERPRETED else (128, 32)
BLOCK, COUNT_BLOCK = (16384, 16384) if INTERPRETED else (1024, 4096)


@triton.jit(do_not_specialize=["num_params"])
def reduce_kernel(
    partial_ptr,  # all partial gradients, fp32
    tiles_ptr,  # (programs, 5), int64: offset, rows, distance of rows, columns, offset in grad
    param_ptr,  # (N,)
    grad_ptr,  # (N + 2,): gradient, sum of losses, correct
    counter_ptr,  # (1,), int32
    num_params, scale, l1,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tiles_ptr += 5 * tl.program_id(0)
    partial_ptr += tl.load(tiles_ptr)
    num_rows, stride = tl.load(tiles_ptr + 1), tl.load(tiles_ptr + 2)
    column, row = tl.arange(0, COLUMNS), tl.arange(0, ROWS)[:, None].to(tl.int64)
    mask, i = column < tl.load(tiles_ptr + 3), tl.load(tiles_ptr + 4) + column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = num_rows * 0
    while first < num_rows:
        valid = mask[None, :] & (first + row < num_rows)
        at = (first + row) * stride + column[None, :]
        total += tl.load(partial_ptr + at, mask=valid, other=0.0)
        first += ROWS
    is_param = i < num_params
    grad = tl.sum(total, 0) * tl.where(is_param, scale, 1.0)
    p = tl.load(param_ptr + i, mask=mask & is_param, other=0.0)
    sign = tl.where(p > 0, 1.0, 0.0) - tl.where(p < 0, 1.0, 0.0)
    tl.store(grad_ptr + i, grad + l1 * sign, mask=mask)
    if tl.program_id(0) == 0:
        tl.store(counter_ptr, tl.load(counter_ptr) + 1)


@triton.jit(do_not_specialize=["num_counts"])
def adamw_kernel(
    grad_ptr,  # (N + 2,)
    counter_ptr,  # (1,), int32, steps done in the epoch, this one included
    hparams_ptr,  # (steps, 6): lr of Muon, momentum, lr, 1 - beta1^n, 1 - beta2^n, average's weight
    blocks_ptr,  # (programs, 3), int32: first offset, end, whether it decays; counts come first
    param_ptr, exp_avg_ptr, exp_avg_sq_ptr, average_ptr,  # (N,), updated in place
    finite_counts_ptr,  # (num_counts,), int64: loss, and every parameter
    totals_ptr,  # (2,): sum of losses, correct
    num_counts, weight_decay, beta2, eps,
    BLOCK: tl.constexpr, COUNT_BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    start, stop = tl.load(blocks_ptr + 3 * pid), tl.load(blocks_ptr + 3 * pid + 1)
    if pid < num_counts:  # the norm of one gradient, or the loss: is it finite?
        squares = tl.zeros((COUNT_BLOCK,), tl.float32)
        while start < stop:
            i = start + tl.arange(0, COUNT_BLOCK)
            g = tl.load(grad_ptr + i, mask=i < stop, other=0.0)
            squares += g * g
            start += COUNT_BLOCK
        is_finite = tl.sum(squares, 0) < float("inf")  # NaN is not
        count = tl.load(finite_counts_ptr + pid) + is_finite.to(tl.int64)
        tl.store(finite_counts_ptr + pid, count)
        if pid == 0:
            i = tl.arange(0, 2)
            batch = tl.load(grad_ptr + tl.load(blocks_ptr) + i)
            tl.store(totals_ptr + i, tl.load(totals_ptr + i) + batch)
    else:
        hparams_ptr += (tl.load(counter_ptr) - 1) * 6
        momentum, lr = tl.load(hparams_ptr + 1), tl.load(hparams_ptr + 2)
        correction1, correction2 = tl.load(hparams_ptr + 3), tl.load(hparams_ptr + 4)
        decay = tl.where(tl.load(blocks_ptr + 3 * pid + 2) != 0, weight_decay, 0.0)
        i = start + tl.arange(0, BLOCK)
        mask = i < stop
        g = tl.load(grad_ptr + i, mask=mask, other=0.0)
        p = tl.load(param_ptr + i, mask=mask, other=0.0) * (1 - lr * decay)
        m = tl.load(exp_avg_ptr + i, mask=mask, other=0.0)
        v = tl.load(exp_avg_sq_ptr + i, mask=mask, other=0.0)
        m += (1 - momentum) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        p -= lr * (m / correction1) / (tl.sqrt(v / correction2) + eps)
        tl.store(param_ptr + i, p, mask=mask)
        tl.store(exp_avg_ptr + i, m, mask=mask)
        tl.store(exp_avg_sq_ptr + i, v, mask=mask)
        update_average(average_ptr + i, p, tl.load(hparams_ptr + 5), mask)


def reduce(state, tiles, scale, l1):
    """Sum partial gradients into state.grad, add L1's, and advance the counter."""
    args = state.partials["embedding"], tiles, state.param, state.grad, state.counter
    numbers = len(state.param), scale, float(l1)
    launch(reduce_kernel, len(tiles), *args, *numbers, COLUMNS=COLUMNS, ROWS=ROWS)


def adamw(state):
    """Update AdamW's parameters; count finite gradients; add loss and correct to the totals."""
    recipe, counts, programs = state.recipe, state.finite_counts, len(state.blocks)
    args = state.grad, state.counter, state.hparams, state.blocks, state.param, state.exp_avg
    args = *args, state.exp_avg_sq, state.average, counts, state.totals, len(counts)
    args = *args, recipe.weight_decay, recipe.beta2, recipe.eps
    launch(adamw_kernel, programs, *args, BLOCK=BLOCK, COUNT_BLOCK=COUNT_BLOCK)
