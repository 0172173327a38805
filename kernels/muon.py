"""Muon in one launch, one program a matrix, all on chip; schedule.Muon is the same in PyTorch.

    S = u u', chunk by chunk of u;  five times P = Q P, S = Q S Q, Q = a I + b S + c S^2;
    W -= lr P u, chunk by chunk

u is read twice and never stored. The shorter side of every matrix is at most 64, that of S.
"""

import triton
import triton.language as tl

from kernels.functions import INTERPRETED, launch, update_average
from schedule import COEFFICIENTS, EPS

SIDE = 64  # of gram matrices
CHUNK = SIDE if INTERPRETED else 16  # columns of a matrix that are read at once


@triton.jit
def nesterov_update(grad_ptr, exp_avg_ptr, i, mask, momentum):
    """The new running mean of gradients and the update, at offsets i."""
    g = tl.load(grad_ptr + i, mask=mask, other=0.0)
    m = tl.load(exp_avg_ptr + i, mask=mask, other=0.0)
    m += (1 - momentum) * (g - m)
    return m, g + momentum * (m - g)


@triton.jit
def muon_kernel(
    grad_ptr,  # (N,)
    counter_ptr,  # (1,), int32, steps done in the epoch, this one included
    hparams_ptr,  # (steps, 6), see adamw_kernel
    coefficients_ptr,  # (STEPS, 3): a, b, c
    layout_ptr,  # (programs, 3), int32: offset of a matrix (a chunk of a parameter), rows, columns
    param_ptr, exp_avg_ptr, average_ptr,  # (N,), updated in place
    weight_decay, eps,
    STEPS: tl.constexpr, SIDE: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    layout_ptr += 3 * tl.program_id(0)
    start, rows, columns = tl.load(layout_ptr), tl.load(layout_ptr + 1), tl.load(layout_ptr + 2)
    hparams_ptr += (tl.load(counter_ptr) - 1) * 6
    lr, momentum = tl.load(hparams_ptr), tl.load(hparams_ptr + 1)
    average_weight = tl.load(hparams_ptr + 5)
    n, m = tl.minimum(rows, columns), tl.maximum(rows, columns)
    step_n = tl.where(rows <= columns, columns, 1)  # a tall matrix is read across
    step_m = tl.where(rows <= columns, 1, columns)
    row, column = tl.arange(0, SIDE)[:, None], tl.arange(0, CHUNK)[None, :]
    gram = tl.zeros((SIDE, SIDE), tl.float32)
    first = 0
    while first < m:  # Triton 3.6 does not interpret a range that ends at a tensor
        i = start + row * step_n + (first + column) * step_m
        mask = (row < n) & (first + column < m)
        _, u = nesterov_update(grad_ptr, exp_avg_ptr, i, mask, momentum)
        gram += tl.dot(u, tl.trans(u), input_precision=PRECISION)
        first += CHUNK
    eye = tl.where(row == tl.arange(0, SIDE)[None, :], 1.0, 0.0)
    norm = tl.sqrt(tl.sum(gram * eye)) + eps
    gram, product = gram / (norm * norm), eye
    for step in range(STEPS):
        abc = coefficients_ptr + 3 * step
        q = tl.load(abc + 2) * tl.dot(gram, gram, input_precision=PRECISION)
        q += tl.load(abc) * eye + tl.load(abc + 1) * gram
        product = tl.dot(q, product, input_precision=PRECISION)
        gram = tl.dot(q, gram, input_precision=PRECISION)
        gram = tl.dot(gram, q, input_precision=PRECISION)
    scale = lr * tl.sqrt(tl.maximum(rows / columns, 1.0)) / norm
    first = 0
    while first < m:
        i = start + row * step_n + (first + column) * step_m
        mask = (row < n) & (first + column < m)
        exp_avg, u = nesterov_update(grad_ptr, exp_avg_ptr, i, mask, momentum)
        p = tl.load(param_ptr + i, mask=mask, other=0.0) * (1 - lr * weight_decay)
        p -= scale * tl.dot(product, u, input_precision=PRECISION)
        tl.store(param_ptr + i, p, mask=mask)
        tl.store(exp_avg_ptr + i, exp_avg, mask=mask)
        update_average(average_ptr + i, p, average_weight, mask)
        first += CHUNK


def options(target):
    """Three TF32 products of high and low halves are nearly an fp32 one, and spill less. There is
    no TF32 before sm_80, AMD's matrix cores take fp32 as it is, and on sm_100 Triton 3.7.1 turns
    the kernel into a trap.
    """
    has_tf32 = isinstance(target.arch, int) and target.arch >= 80 and target.arch // 10 != 10
    precision = "tf32x3" if has_tf32 else "ieee"
    is_amd = isinstance(target.arch, str)
    return {"PRECISION": precision, "num_warps": target.num_warps(has_tf32 or is_amd)}


def step(state):
    """Update every matrix; `state` is the FusedStep."""
    args = state.grad, state.counter, state.hparams, state.coefficients, state.matrices
    args = *args, state.param, state.exp_avg, state.average, state.recipe.weight_decay, EPS
    sizes = {"STEPS": len(COEFFICIENTS), "SIDE": SIDE, "CHUNK": CHUNK, **options(state.target)}
    launch(muon_kernel, len(state.matrices), *args, **sizes)
