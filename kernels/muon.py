"""Muon in one launch, one program a matrix, all on chip; optim.Muon is the same in PyTorch.

    m += (1 - momentum) (g - m),  u = g + momentum (m - g)
    S = u u', chunk by chunk of u;  five times P = Q P, S = Q S Q, Q = a I + b S + c S^2;
    W = W (1 - lr decay) - lr sqrt(max(1, rows / columns)) P u, chunk by chunk

u is computed twice and never stored. The shorter side of every matrix is at most 64, that of S.
"""

import triton
import triton.language as tl

from kernels.functions import INTERPRETED, MOMENTUM, MUON_LR, NUM_HPARAMS, ONE_MINUS_MOMENTUM
from optim import COEFFICIENTS, EPS

SIDE = 64  # of gram matrices
CHUNK = SIDE if INTERPRETED else 16  # columns of a matrix that are read at once


@triton.jit
def nesterov_update(grad_ptr, exp_avg_ptr, mask, momentum, one_minus_momentum):
    """Return the new running mean of gradients and the update."""
    g = tl.load(grad_ptr, mask=mask, other=0.0)
    m = tl.load(exp_avg_ptr, mask=mask, other=0.0)
    m += one_minus_momentum * (g - m)
    return m, g + momentum * (m - g)


@triton.jit
def muon_kernel(
    grad_ptr,  # (N,)
    counter_ptr,  # (1,), int32, steps done in the epoch, this one included
    hparams_ptr,  # (steps, NUM_HPARAMS)
    coefficients_ptr,  # (STEPS, 3): a, b, c
    matrices_ptr,  # (programs, 3), int32: offset of a matrix in the parameters, rows, columns
    param_ptr,  # (N,), updated in place
    exp_avg_ptr,  # (N,), updated in place
    weight_decay,
    eps,
    STEPS: tl.constexpr,
    SIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    matrices_ptr += 3 * tl.program_id(0)
    start = tl.load(matrices_ptr)
    rows = tl.load(matrices_ptr + 1)
    columns = tl.load(matrices_ptr + 2)
    hparams_ptr += (tl.load(counter_ptr) - 1) * NUM_HPARAMS
    lr = tl.load(hparams_ptr + MUON_LR)
    momentum = tl.load(hparams_ptr + MOMENTUM)
    complement = tl.load(hparams_ptr + ONE_MINUS_MOMENTUM)

    # The matrix is read as (n, m), n the shorter side: a tall one is read across.
    n = tl.minimum(rows, columns)
    m = tl.maximum(rows, columns)
    stride_n = tl.where(rows <= columns, columns, 1)
    stride_m = tl.where(rows <= columns, 1, columns)
    row = tl.arange(0, SIDE)[:, None]
    column = tl.arange(0, CHUNK)[None, :]

    # The gram matrix of the update.
    gram = tl.zeros((SIDE, SIDE), tl.float32)
    first = 0
    while first < m:  # Triton 3.6 does not interpret a range that ends at a tensor
        i = start + row * stride_n + (first + column) * stride_m
        mask = (row < n) & (first + column < m)
        _, u = nesterov_update(grad_ptr + i, exp_avg_ptr + i, mask, momentum, complement)
        gram += tl.dot(u, tl.trans(u), input_precision=PRECISION)
        first += CHUNK

    # Newton-Schulz iterations, of the update with norm 1.
    eye = tl.where(row == tl.arange(0, SIDE)[None, :], 1.0, 0.0)
    norm = tl.sqrt(tl.sum(gram * eye)) + eps
    gram = gram / (norm * norm)
    product = eye
    for iteration in range(STEPS):
        abc_ptr = coefficients_ptr + 3 * iteration
        q = tl.load(abc_ptr + 2) * tl.dot(gram, gram, input_precision=PRECISION)
        q += tl.load(abc_ptr) * eye + tl.load(abc_ptr + 1) * gram
        product = tl.dot(q, product, input_precision=PRECISION)
        gram = tl.dot(q, gram, input_precision=PRECISION)
        gram = tl.dot(gram, q, input_precision=PRECISION)

    # The update of weights and running mean.
    scale = lr * tl.sqrt(tl.maximum(rows / columns, 1.0)) / norm
    first = 0
    while first < m:
        i = start + row * stride_n + (first + column) * stride_m
        mask = (row < n) & (first + column < m)
        exp_avg, u = nesterov_update(grad_ptr + i, exp_avg_ptr + i, mask, momentum, complement)
        p = tl.load(param_ptr + i, mask=mask, other=0.0) * (1 - lr * weight_decay)
        p -= scale * tl.dot(product, u, input_precision=PRECISION)
        tl.store(param_ptr + i, p, mask=mask)
        tl.store(exp_avg_ptr + i, exp_avg, mask=mask)
        first += CHUNK


def update(step):
    """Update the weights of every matrix; `step` is the FusedStep."""
    # Three TF32 products of high and low halves are nearly an fp32 one, and spill less. There is
    # no TF32 before sm_80, and on sm_100 Triton 3.7.1 turns the kernel into a trap.
    has_tf32 = step.target.arch >= 80 and step.target.arch // 10 != 10
    muon_kernel[(len(step.matrices),)](
        step.grad,
        step.counter,
        step.hparams,
        step.coefficients,
        step.matrices,
        step.param,
        step.exp_avg,
        step.recipe.weight_decay,
        EPS,
        STEPS=len(COEFFICIENTS),
        SIDE=SIDE,
        CHUNK=CHUNK,
        PRECISION="tf32x3" if has_tf32 else "ieee",
        num_warps=step.target.num_warps(uses_tensor_cores=has_tf32),
    )
