"""The attention half of a block, one kernel forward and one backward; vit.Attention says the same in PyTorch.

    y = LayerNorm(x),  and for each head  q = y Wq',  k = y Wk',  v = y Wv',  P = softmax(q k' / sqrt(D)),  o = P v,
    z = x + sum over heads of o Wo'
    backward, given dz:  do = dz Wo,  dv = P' do,  dP = do v',  dS = P (dP - rowsum(P dP)) / sqrt(D),  dq = dS k,  dk = dS' q,
    dWo = dz' o,  dWq = dq' y  and so on,  dy = dq Wq + dk Wk + dv Wv,  dx = dz + the gradient through LayerNorm

One program is one picture, its 33 tokens padded to 64 rows: Triton's sizes are powers of two, so half of most products
is padding (three quarters of the scores), which still costs less than to split the CLS token off: that adds products
and spills registers. A loop over heads with plain 2-D products keeps one head's scores in registers at a time; nothing
between x and z goes to memory. The backward recomputes y, q, k, v and P, which costs less than to store and load them,
and reads x and dz again where it needs them rather than keep them in registers. sm_90, bf16: 4 programs of 4 warps in
flight on a multiprocessor forward (128 registers, 12 KB), so a batch of 512 is one wave of 528, and 2 backward (210, 32 KB).

Weight gradients are sums over pictures: each program stores its own share, and one sum over programs ends it. There are
no atomics, so a repeated run gives the same bits. The backward's form is that of FlashAttention (Dao et al. 2022,
arXiv:2205.14135), for a sequence that fits in one tile.

Letters: B batch, T tokens (33), C width (64), H heads (4), D head width (16); TP and DP are T and D, padded.
"""

import torch
import triton
import triton.language as tl

from kernels.functions import OPTIONS, dot, launch, load, padded, scaled, split, standardize, standardize_backward, to_working

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softmax(scores, scale, columns, T):
    """Rows of scale * scores, columns from T on left out, to the base 2, whose power is one instruction."""
    scores = tl.where(columns[None, :] < T, scores, -float("inf"))
    factor = scale * LOG2_E
    powers = tl.exp2(scores * factor - (tl.max(scores, 1) * factor)[:, None])
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def forward_kernel(
    x_ptr,  # (B, T, C), working dtype
    norm_weight_ptr, norm_bias_ptr,  # (C,)
    qkv_ptr,  # (3HD, C)
    out_ptr,  # (C, HD)
    z_ptr,  # (B, T, C), working dtype
    T, scale,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, DP: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    t, c, d = tl.arange(0, TP), tl.arange(0, C), tl.arange(0, DP)
    cells = tl.program_id(0).to(tl.int64) * T * C + t[:, None] * C + c[None, :]  # (TP, C)
    present = t[:, None] < T
    z = tl.load(x_ptr + cells, mask=present, other=0.0).to(tl.float32)
    y = scaled(standardize(z, EPS)[0], norm_weight_ptr, norm_bias_ptr, DTYPE)
    row, in_row = d[:, None] * C + c[None, :], d[:, None] < D  # (DP, C), one head's rows of Wq, Wk or Wv
    column, in_column = c[:, None] * (H * D) + d[None, :], d[None, :] < D  # (C, DP), one head's columns of Wo
    for h in range(H):
        q = to_working(dot(y, tl.trans(load(qkv_ptr + h * D * C + row, DTYPE, in_row))), DTYPE)  # (TP, C) x (C, DP) -> (TP, DP)
        k = to_working(dot(y, tl.trans(load(qkv_ptr + (H + h) * D * C + row, DTYPE, in_row))), DTYPE)
        v = to_working(dot(y, tl.trans(load(qkv_ptr + (2 * H + h) * D * C + row, DTYPE, in_row))), DTYPE)
        p = softmax(dot(q, tl.trans(k)), scale, t, T)  # (TP, DP) x (DP, TP) -> (TP, TP)
        o = to_working(dot(to_working(p, DTYPE), v), DTYPE)  # (TP, TP) x (TP, DP) -> (TP, DP)
        z += dot(o, tl.trans(load(out_ptr + h * D + column, DTYPE, in_column)))  # (TP, DP) x (DP, C) -> (TP, C)
    tl.store(z_ptr + cells, to_working(z, DTYPE), mask=present)


@triton.jit
def backward_kernel(
    x_ptr,  # (B, T, C), working dtype
    norm_weight_ptr, norm_bias_ptr,  # (C,)
    qkv_ptr,  # (3HD, C)
    out_ptr,  # (C, HD)
    dz_ptr,  # (B, T, C), working dtype
    dx_ptr,  # (B, T, C), working dtype
    shares_ptr,  # (B, 3HDC + CHD + 2C), fp32: a picture's share of the gradients of qkv, out, norm weight and norm bias
    T, scale,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, DP: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    t, c, d = tl.arange(0, TP), tl.arange(0, C), tl.arange(0, DP)
    cells = tl.program_id(0).to(tl.int64) * T * C + t[:, None] * C + c[None, :]  # (TP, C)
    present = t[:, None] < T
    row, in_row = d[:, None] * C + c[None, :], d[:, None] < D  # (DP, C)
    column, in_column = c[:, None] * (H * D) + d[None, :], d[None, :] < D  # (C, DP)
    dqkv_ptr = shares_ptr + tl.program_id(0).to(tl.int64) * (4 * H * D * C + 2 * C)
    dout_ptr = dqkv_ptr + 3 * H * D * C
    dnorm_ptr = dout_ptr + H * D * C

    x = tl.load(x_ptr + cells, mask=present, other=0.0).to(tl.float32)
    y = scaled(standardize(x, EPS)[0], norm_weight_ptr, norm_bias_ptr, DTYPE)
    dy = tl.zeros((TP, C), tl.float32)
    for h in range(H):
        wq = load(qkv_ptr + h * D * C + row, DTYPE, in_row)
        q = to_working(dot(y, tl.trans(wq)), DTYPE)  # (TP, C) x (C, DP) -> (TP, DP)
        wk = load(qkv_ptr + (H + h) * D * C + row, DTYPE, in_row)
        k = to_working(dot(y, tl.trans(wk)), DTYPE)
        wv = load(qkv_ptr + (2 * H + h) * D * C + row, DTYPE, in_row)
        v = to_working(dot(y, tl.trans(wv)), DTYPE)
        dz = tl.load(dz_ptr + cells, mask=present, other=0.0)
        do = to_working(dot(dz, load(out_ptr + h * D + column, DTYPE, in_column)), DTYPE)  # (TP, C) x (C, DP) -> (TP, DP)
        p = softmax(dot(q, tl.trans(k)), scale, t, T)  # (TP, DP) x (DP, TP) -> (TP, TP)
        rounded = to_working(p, DTYPE)
        o = to_working(dot(rounded, v), DTYPE)  # (TP, TP) x (TP, DP) -> (TP, DP)
        tl.store(dout_ptr + h * D + column, dot(tl.trans(dz), o), mask=in_column)  # (C, TP) x (TP, DP) -> (C, DP)
        dv = to_working(dot(tl.trans(rounded), do), DTYPE)  # (TP, TP) x (TP, DP) -> (TP, DP)
        tl.store(dqkv_ptr + (2 * H + h) * D * C + row, dot(tl.trans(dv), y), mask=in_row)  # (DP, TP) x (TP, C) -> (DP, C)
        dy += dot(dv, wv)  # (TP, DP) x (DP, C) -> (TP, C)
        dp = dot(do, tl.trans(v))  # (TP, DP) x (DP, TP) -> (TP, TP)
        ds = to_working(p * (dp - tl.sum(p * dp, 1)[:, None]) * scale, DTYPE)
        dq = to_working(dot(ds, k), DTYPE)
        tl.store(dqkv_ptr + h * D * C + row, dot(tl.trans(dq), y), mask=in_row)
        dy += dot(dq, wq)
        dk = to_working(dot(tl.trans(ds), q), DTYPE)
        tl.store(dqkv_ptr + (H + h) * D * C + row, dot(tl.trans(dk), y), mask=in_row)
        dy += dot(dk, wk)

    standard, rstd = standardize(tl.load(x_ptr + cells, mask=present, other=0.0).to(tl.float32), EPS)
    tl.store(dnorm_ptr + c, tl.sum(dy * standard, 0))
    tl.store(dnorm_ptr + C + c, tl.sum(dy, 0))
    dx = standardize_backward(dy * tl.load(norm_weight_ptr + c), standard, rstd)
    dx += tl.load(dz_ptr + cells, mask=present, other=0.0).to(tl.float32)
    tl.store(dx_ptr + cells, to_working(dx, DTYPE), mask=present)


def constants(x, qkv, heads, eps):
    """The kernels' sizes for x (B, T, C) and qkv (3HD, C)."""
    D = qkv.shape[0] // (3 * heads)
    return {"H": heads, "D": D, "C": x.shape[2], "TP": padded(x.shape[1]), "DP": padded(D), "EPS": eps, **OPTIONS[x.dtype]}


def forward(x, norm_weight, norm_bias, qkv, out, heads, eps):
    """x (B, T, C), float32 or bfloat16, to z of its shape and dtype; weights as vit.Attention's, float32."""
    z = torch.empty_like(x)
    sizes = constants(x, qkv, heads, eps)
    launch(forward_kernel, len(x), x.dtype, (x, norm_weight, norm_bias, qkv, out), (z,), x.shape[1], sizes["D"] ** -0.5, **sizes)
    return z


def backward(dz, x, norm_weight, norm_bias, qkv, out, heads, eps):
    """Gradients of x, norm_weight, norm_bias, qkv and out, given that of z (B, T, C)."""
    dx = torch.empty_like(x)
    shares = x.new_empty(len(x), qkv.numel() + out.numel() + 2 * x.shape[2], dtype=torch.float32)
    sizes = constants(x, qkv, heads, eps)
    launch(backward_kernel, len(x), x.dtype, (x, norm_weight, norm_bias, qkv, out, dz), (dx, shares), x.shape[1], sizes["D"] ** -0.5, **sizes)
    dqkv, dout, dnorm_weight, dnorm_bias = split(shares.sum(0), qkv, out, norm_weight, norm_bias)
    return dx, dnorm_weight, dnorm_bias, dqkv, dout


class FusedAttention(torch.autograd.Function):
    """`FusedAttention.apply(x, norm_weight, norm_bias, qkv, out, heads, eps)` is `forward`, with gradients."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, qkv, out, heads, eps):
        x = x.contiguous()
        ctx.save_for_backward(x, norm_weight, norm_bias, qkv, out)
        ctx.settings = heads, eps
        return forward(x, norm_weight, norm_bias, qkv, out, heads, eps)

    @staticmethod
    def backward(ctx, dz):
        return *backward(dz.contiguous(), *ctx.saved_tensors, *ctx.settings), None, None
