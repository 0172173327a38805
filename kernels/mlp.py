"""The feed-forward half of a block, one kernel forward and one backward; vit.FeedForward says the same in PyTorch.

    y = LayerNorm(x),  h = y W1' + b1,  z = x + GELU(h) W2' + b2
    backward, given dz:  dg = dz W2,  dh = dg GELU'(h),  dW2 = dz' GELU(h),  db2 = colsum(dz),  dW1 = dh' y,
    db1 = colsum(dh),  dy = dh W1,  dx = dz + the gradient through LayerNorm

Every token stands alone here, so one program takes 64 of them (16 in fp32), whichever pictures they belong to, and nothing
is padded but the last program's rows. Both matrices are whole in one program, so nothing between x and z goes to memory, and
the backward recomputes y and h. Weight gradients are a share a program and one sum, as in attention.py, without atomics.
sm_90, bf16: 5 programs of 4 warps in flight on a multiprocessor forward (92 registers, 16 KB), 2 backward (204, 40 KB).
The network is that of Dosovitskiy et al. 2020, arXiv:2010.11929; GELU is Hendrycks & Gimpel 2016, arXiv:1606.08415.

Letters: N tokens, C width (64), M hidden width (64), R rows of a program.
"""

import torch
import triton
import triton.language as tl

from kernels.functions import (
    OPTIONS, dot, gelu, gelu_and_derivative, launch, load, scaled, split, standardize, standardize_backward, to_working,
)  # fmt: skip

ROWS = {torch.bfloat16: 64, torch.float32: 16}  # of a program; fp32, which runs without tensor cores, spills with more


@triton.jit
def forward_kernel(
    x_ptr,  # (N, C), working dtype, rows `stride` apart
    norm_weight_ptr, norm_bias_ptr,  # (C,)
    weight1_ptr, bias1_ptr,  # (M, C), (M,)
    weight2_ptr, bias2_ptr,  # (C, M), (C,)
    z_ptr,  # (N, C), working dtype
    N, stride,
    C: tl.constexpr, M: tl.constexpr, R: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    c, m = tl.arange(0, C), tl.arange(0, M)
    x = tl.load(x_ptr + n * stride + c[None, :], mask=n < N, other=0.0).to(tl.float32)
    y = scaled(standardize(x, EPS)[0], norm_weight_ptr, norm_bias_ptr, DTYPE)
    w1 = load(weight1_ptr + m[:, None] * C + c[None, :], DTYPE)
    h = dot(y, tl.trans(w1)) + tl.load(bias1_ptr + m)  # (R, C) x (C, M) -> (R, M)
    w2 = load(weight2_ptr + c[:, None] * M + m[None, :], DTYPE)
    z = x + dot(to_working(gelu(h, DTYPE), DTYPE), tl.trans(w2)) + tl.load(bias2_ptr + c)  # (R, M) x (M, C) -> (R, C)
    tl.store(z_ptr + n * C + c[None, :], to_working(z, DTYPE), mask=n < N)


@triton.jit
def backward_kernel(
    x_ptr,  # (N, C), working dtype, rows `stride` apart
    norm_weight_ptr, norm_bias_ptr,  # (C,)
    weight1_ptr, bias1_ptr,  # (M, C), (M,)
    weight2_ptr,  # (C, M)
    dz_ptr,  # (N, C), working dtype
    dx_ptr,  # (N, C), working dtype
    shares_ptr,  # (programs, 2CM + M + 3C), fp32: gradients of weight1, weight2, bias1, bias2, norm weight and norm bias
    N, stride,
    C: tl.constexpr, M: tl.constexpr, R: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    c, m = tl.arange(0, C), tl.arange(0, M)
    dweight1_ptr = shares_ptr + tl.program_id(0).to(tl.int64) * (2 * C * M + M + 3 * C)
    dweight2_ptr = dweight1_ptr + C * M
    dbias1_ptr = dweight2_ptr + C * M
    dbias2_ptr = dbias1_ptr + M
    dnorm_ptr = dbias2_ptr + C

    standard, rstd = standardize(tl.load(x_ptr + n * stride + c[None, :], mask=n < N, other=0.0).to(tl.float32), EPS)
    y = scaled(standard, norm_weight_ptr, norm_bias_ptr, DTYPE)
    w1 = load(weight1_ptr + m[:, None] * C + c[None, :], DTYPE)
    h = dot(y, tl.trans(w1)) + tl.load(bias1_ptr + m)  # (R, C) x (C, M) -> (R, M)
    g, slope = gelu_and_derivative(h, DTYPE)
    dz = tl.load(dz_ptr + n * C + c[None, :], mask=n < N, other=0.0)
    tl.store(dbias2_ptr + c, tl.sum(dz.to(tl.float32), 0))
    tl.store(dweight2_ptr + c[:, None] * M + m[None, :], dot(tl.trans(dz), to_working(g, DTYPE)))  # (C, R) x (R, M) -> (C, M)
    w2 = load(weight2_ptr + c[:, None] * M + m[None, :], DTYPE)
    dh = dot(dz, w2) * slope  # (R, C) x (C, M) -> (R, M)
    tl.store(dbias1_ptr + m, tl.sum(dh, 0))
    dh = to_working(dh, DTYPE)
    tl.store(dweight1_ptr + m[:, None] * C + c[None, :], dot(tl.trans(dh), y))  # (M, R) x (R, C) -> (M, C)
    dy = dot(dh, w1)  # (R, M) x (M, C) -> (R, C)
    tl.store(dnorm_ptr + c, tl.sum(dy * standard, 0))
    tl.store(dnorm_ptr + C + c, tl.sum(dy, 0))
    dx = dz.to(tl.float32) + standardize_backward(dy * tl.load(norm_weight_ptr + c), standard, rstd)
    tl.store(dx_ptr + n * C + c[None, :], to_working(dx, DTYPE), mask=n < N)


def constants(x, weight1, eps):
    return {"C": x.shape[-1], "M": len(weight1), "R": ROWS[x.dtype], "EPS": eps, **OPTIONS[x.dtype]}


def forward(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, eps):
    """x (N, C), float32 or bfloat16, each row contiguous, to z of its shape and dtype; weights as vit.FeedForward's, float32."""
    z = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weights = norm_weight, norm_bias, weight1, bias1, weight2, bias2
    launch(forward_kernel, triton.cdiv(len(x), ROWS[x.dtype]), x.dtype, (x, *weights), (z,), len(x), x.stride(0), **constants(x, weight1, eps))
    return z


def backward(dz, x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, eps):
    """Gradients of x and of every weight, in the order of `forward`, given that of z (N, C)."""
    programs = triton.cdiv(len(x), ROWS[x.dtype])
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = weight1, weight2, bias1, bias2, norm_weight, norm_bias
    shares = x.new_empty(programs, sum(part.numel() for part in parts), dtype=torch.float32)
    weights = norm_weight, norm_bias, weight1, bias1, weight2
    launch(backward_kernel, programs, x.dtype, (x, *weights, dz), (dx, shares), len(x), x.stride(0), **constants(x, weight1, eps))
    dweight1, dweight2, dbias1, dbias2, dnorm_weight, dnorm_bias = split(shares.sum(0), *parts)
    return dx, dnorm_weight, dnorm_bias, dweight1, dbias1, dweight2, dbias2


class FusedFeedForward(torch.autograd.Function):
    """`FusedFeedForward.apply(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, eps)`: x (..., C), with gradients."""

    @staticmethod
    def forward(ctx, x, *weights_and_eps):
        *weights, ctx.eps = weights_and_eps
        rows = x.reshape(-1, x.shape[-1])  # a view where it can be one, of the CLS tokens alone too
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        ctx.save_for_backward(rows, *weights)
        return forward(rows, *weights, ctx.eps).view(x.shape)

    @staticmethod
    def backward(ctx, dz):
        rows, *weights = ctx.saved_tensors
        dx, *gradients = backward(dz.reshape(rows.shape).contiguous(), rows, *weights, ctx.eps)
        return dx.view(dz.shape), *gradients, None
