"""The attention half of a block, one kernel forward and one backward; vit.Attention is the same.

    y = LayerNorm(x),  and for each head  q = y Wq',  k = y Wk',  v = y Wv',
    P = softmax(q k' / sqrt(D)),  o = P v,  z = x + sum over heads of o Wo'
    backward, given dz:  do = dz Wo,  dv = P' do,  dP = do v',  dS = P (dP - rowsum(P dP)) / sqrt(D)
    dq = dS k,  dk = dS' q,  dWo = dz' o,  dWq = dq' y  and so on,  dy = dq Wq + dk Wk + dv Wv,
    dx = dz + the gradient through LayerNorm

A program is one image (backward: several, where the batch is large), its 33 tokens padded to 64
rows. A loop over heads keeps one head's scores in registers; nothing between x and z goes to
memory. The backward computes y, q, k, v and P again, which costs less than to store and load them,
as FlashAttention does (Dao et al. 2022, arXiv:2205.14135), for a sequence that fits in one tile.

CLS_ONLY is the last block, whose z is wanted for the CLS token alone. Scores of one q are
y (Wk' q'), a product with a vector, and o = (P y) Wv': k and v of the tokens are not needed, a
head's weight gradients are outer products, and no matrix product is left.

Every program stores its part of the weight gradients, and one sum over programs ends it: without
atomics, a repeated run gives the same bits.

Letters: B batch, T tokens (33), TP: T padded, C width (64), H heads (4), D head width (16).
"""

from types import SimpleNamespace

import torch
import triton
import triton.language as tl

from kernels.functions import (
    Target, accumulate, cast, dot, images_per_program, launch, layer_norm_backward, load,
    normalize_rows, num_programs, padded, scale_shift,
)  # fmt: skip

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softmax(scores, scale, mask, axis: tl.constexpr):
    """Of scale * scores where `mask`, along `axis`; powers of 2 are one instruction."""
    scores, factor = tl.where(mask, scores, -float("inf")), scale * LOG2_E
    powers = tl.exp2(scores * factor - tl.max(scores, axis, keep_dims=True) * factor)
    return powers / tl.sum(powers, axis, keep_dims=True)


@triton.jit
def load_head(qkv_ptr, h, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr):
    """Rows of Wq, Wk and Wv of head h, each (D, C)."""
    qkv_ptr += h * D * C + tl.arange(0, D)[:, None] * C + tl.arange(0, C)[None, :]
    wq, wk = load(qkv_ptr, DTYPE), load(qkv_ptr + H * D * C, DTYPE)
    return wq, wk, load(qkv_ptr + 2 * H * D * C, DTYPE)


@triton.jit
def cls_scores(y, y_cls, wq, wk, scale, T):
    """q (D,) of the CLS token, Wk' q (C,), P (TP,) and P y (C,), fp32."""
    q = tl.sum(wq * y_cls[None, :], 1)
    kq = tl.sum(wk * q[:, None], 0)
    p = softmax(tl.sum(y * kq[None, :], 1), scale, tl.arange(0, y.shape[0]) < T, 0)
    return q, kq, p, tl.sum(p[:, None] * y, 0)


@triton.jit
def forward_kernel(
    x_ptr,  # (B, T, C), working dtype
    norm_weight_ptr, norm_bias_ptr,  # (C,)
    qkv_ptr, out_ptr,  # (3HD, C), (C, HD)
    z_ptr,  # (B, T or 1, C), working dtype
    scale,
    T: tl.constexpr, TP: tl.constexpr, C: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    CLS_ONLY: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    t, c = tl.arange(0, TP)[:, None], tl.arange(0, C)
    x_ptr += b * T * C + t * C + c[None, :]
    out_ptr += c[:, None] * (H * D) + tl.arange(0, D)[None, :]  # (C, D)
    x = tl.load(x_ptr, mask=t < T, other=0.0).to(tl.float32)
    y = scale_shift(normalize_rows(x)[0], norm_weight_ptr, norm_bias_ptr)
    if CLS_ONLY:
        z, y_cls = tl.sum(tl.where(t == 0, x, 0.0), 0), tl.sum(tl.where(t == 0, y, 0.0), 0)
        for h in range(H):
            wq, wk, wv = load_head(qkv_ptr, h, H, D, C, "fp32")
            _, _, _, py = cls_scores(y, y_cls, wq, wk, scale, T)
            o = tl.sum(wv * py[None, :], 1)
            z += tl.sum(tl.load(out_ptr + h * D) * o[None, :], 1)
        tl.store(z_ptr + b * C + c, cast(z, DTYPE))
    else:
        z, y = x, cast(y, DTYPE)
        for h in range(H):
            wq, wk, wv = load_head(qkv_ptr, h, H, D, C, DTYPE)
            q = cast(dot(y, tl.trans(wq)), DTYPE)  # (TP, C) x (C, D) -> (TP, D)
            k = cast(dot(y, tl.trans(wk)), DTYPE)
            v = cast(dot(y, tl.trans(wv)), DTYPE)
            scores = dot(q, tl.trans(k))  # (TP, D) x (D, TP) -> (TP, TP)
            p = cast(softmax(scores, scale, tl.arange(0, TP)[None, :] < T, 1), DTYPE)
            o = cast(dot(p, v), DTYPE)  # (TP, TP) x (TP, D) -> (TP, D)
            z += dot(o, tl.trans(load(out_ptr + h * D, DTYPE)))  # (TP, D) x (D, C) -> (TP, C)
        tl.store(z_ptr + b * T * C + t * C + c[None, :], cast(z, DTYPE), mask=t < T)


@triton.jit
def heads_backward(
    y, dz_ptr, mask, qkv_ptr, out_ptr, dqkv_ptr, dout_ptr, is_later, scale,
    T: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dy (TP, C); stores the weight gradients of one image, or adds them to those before."""
    TP: tl.constexpr = y.shape[0]
    C: tl.constexpr = y.shape[1]
    c, d = tl.arange(0, C), tl.arange(0, D)
    row, column = d[:, None] * C + c[None, :], c[:, None] * (H * D) + d[None, :]  # (D, C), (C, D)
    dy = tl.zeros((TP, C), tl.float32)
    for h in range(H):
        wq, wk, wv = load_head(qkv_ptr, h, H, D, C, DTYPE)
        q = cast(dot(y, tl.trans(wq)), DTYPE)  # (TP, C) x (C, D) -> (TP, D)
        k = cast(dot(y, tl.trans(wk)), DTYPE)
        v = cast(dot(y, tl.trans(wv)), DTYPE)
        dz = tl.load(dz_ptr, mask=mask, other=0.0)
        do = cast(dot(dz, load(out_ptr + h * D + column, DTYPE)), DTYPE)  # (TP, C) x (C, D)
        scores = dot(q, tl.trans(k))  # (TP, D) x (D, TP) -> (TP, TP)
        p = softmax(scores, scale, tl.arange(0, TP)[None, :] < T, 1)
        rounded = cast(p, DTYPE)
        o = cast(dot(rounded, v), DTYPE)  # (TP, TP) x (TP, D) -> (TP, D)
        dv = cast(dot(tl.trans(rounded), do), DTYPE)  # (TP, TP) x (TP, D) -> (TP, D)
        dhead_ptr = dqkv_ptr + h * D * C
        accumulate(dhead_ptr + 2 * H * D * C + row, dot(tl.trans(dv), y), is_later)  # (D, C)
        # dz and the weights are read twice: registers and shared memory are scarce.
        dz = tl.load(dz_ptr, mask=mask, other=0.0)
        accumulate(dout_ptr + h * D + column, dot(tl.trans(dz), o), is_later)  # (C, TP) x (TP, D)
        wq, wk, wv = load_head(qkv_ptr, h, H, D, C, DTYPE)
        dy += dot(dv, wv)  # (TP, D) x (D, C) -> (TP, C)
        dp = dot(do, tl.trans(v))  # (TP, D) x (D, TP) -> (TP, TP)
        ds = cast(p * (dp - tl.sum(p * dp, 1)[:, None]) * scale, DTYPE)
        dq = cast(dot(ds, k), DTYPE)
        accumulate(dhead_ptr + row, dot(tl.trans(dq), y), is_later)
        dy += dot(dq, wq)
        dk = cast(dot(tl.trans(ds), q), DTYPE)
        accumulate(dhead_ptr + H * D * C + row, dot(tl.trans(dk), y), is_later)
        dy += dot(dk, wk)
    return dy


@triton.jit
def cls_heads_backward(
    y, dz, qkv_ptr, out_ptr, dqkv_ptr, dout_ptr, is_later, scale,
    T: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The same with dz (C,) of the CLS token alone."""
    TP: tl.constexpr = y.shape[0]
    C: tl.constexpr = y.shape[1]
    c, d, is_cls = tl.arange(0, C), tl.arange(0, D), tl.arange(0, TP)[:, None] == 0
    row, column = d[:, None] * C + c[None, :], c[:, None] * (H * D) + d[None, :]  # (D, C), (C, D)
    y_cls = tl.sum(tl.where(is_cls, y, 0.0), 0)
    dy, dy_cls = tl.zeros((TP, C), tl.float32), tl.zeros((C,), tl.float32)
    for h in range(H):
        wq, wk, wv = load_head(qkv_ptr, h, H, D, C, "fp32")
        q, kq, p, py = cls_scores(y, y_cls, wq, wk, scale, T)
        o = tl.sum(wv * py[None, :], 1)
        accumulate(dout_ptr + h * D + column, dz[:, None] * o[None, :], is_later)
        do = tl.sum(tl.load(out_ptr + h * D + column) * dz[:, None], 0)
        dhead_ptr = dqkv_ptr + h * D * C
        accumulate(dhead_ptr + 2 * H * D * C + row, do[:, None] * py[None, :], is_later)
        vdo = tl.sum(wv * do[:, None], 0)  # Wv' do
        dp = tl.sum(y * vdo[None, :], 1)
        ds = p * (dp - tl.sum(p * dp, 0)) * scale
        dsy = tl.sum(ds[:, None] * y, 0)
        accumulate(dhead_ptr + H * D * C + row, q[:, None] * dsy[None, :], is_later)
        dq = tl.sum(wk * dsy[None, :], 1)
        accumulate(dhead_ptr + row, dq[:, None] * y_cls[None, :], is_later)
        dy_cls += tl.sum(wq * dq[:, None], 0)
        dy += ds[:, None] * kq[None, :] + p[:, None] * vdo[None, :]
    return dy + tl.where(is_cls, dy_cls[None, :], 0.0)


# Compiled once for a count of 1, without the sums over images, and once for others.
@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["count"])
def backward_kernel(
    x_ptr,  # (B, T, C), working dtype
    norm_weight_ptr, norm_bias_ptr,  # (C,)
    qkv_ptr, out_ptr,  # (3HD, C), (C, HD)
    dz_ptr,  # (B, T or 1, C), working dtype
    dx_ptr,  # (B, T, C), working dtype or fp32
    partial_ptr,  # (programs, 2C + 3HDC + CHD), of norm weight and bias, qkv and out
    scale, B, count,  # images; images of a program
    T: tl.constexpr, TP: tl.constexpr, C: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    CLS_ONLY: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    t, c = tl.arange(0, TP)[:, None], tl.arange(0, C)
    partial_ptr += tl.program_id(0).to(tl.int64) * (4 * H * D * C + 2 * C)
    dqkv_ptr, dout_ptr = partial_ptr + 2 * C, partial_ptr + 2 * C + 3 * H * D * C
    i = 0
    while i < count:
        b = tl.program_id(0).to(tl.int64) * count + i
        offsets, mask = b * T * C + t * C + c[None, :], (t < T) & (b < B)
        x_hat, rstd = normalize_rows(tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32))
        y = scale_shift(x_hat, norm_weight_ptr, norm_bias_ptr)
        if CLS_ONLY:
            dz = tl.load(dz_ptr + b * C + c, mask=(c < C) & (b < B), other=0.0).to(tl.float32)
            dy = cls_heads_backward(
                y, dz, qkv_ptr, out_ptr, dqkv_ptr, dout_ptr, i > 0, scale, T, H, D
            )
        else:
            dy = heads_backward(
                cast(y, DTYPE), dz_ptr + offsets, mask, qkv_ptr, out_ptr, dqkv_ptr, dout_ptr,
                i > 0, scale, T, H, D, DTYPE,
            )  # fmt: skip
            # Read again: to keep it in registers over the heads would spill.
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            x_hat, rstd = normalize_rows(x)
        accumulate(partial_ptr + c, tl.sum(dy * x_hat, 0), i > 0)
        accumulate(partial_ptr + C + c, tl.sum(dy, 0), i > 0)
        dx = layer_norm_backward(dy, x_hat, rstd, norm_weight_ptr)
        if CLS_ONLY:
            dx += tl.where(t == 0, dz[None, :], 0.0)
        else:
            dx += tl.load(dz_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, cast(dx, DTYPE), mask=mask)
        tl.debug_barrier()  # what one thread has stored another may load for the next image
        i += 1


def unpack(module, x, target):
    """Parameters of a vit.Attention, the scale of scores, and constants of the kernels."""
    weights, H, (_, T, C) = list(module.parameters()), module.heads, x.shape
    D = len(weights[2]) // (3 * H)
    sizes = {"T": T, "TP": padded(T), "C": C, "H": H, "D": D, "CLS_ONLY": module.cls_only}
    return weights, D**-0.5, sizes | target.options("attention")


def forward(module, x, z, num_images, target):
    """Write z = module(x), (B, T, C) or (B, 1, C), of x (B, T, C) and a vit.Attention."""
    weights, scale, sizes = unpack(module, x, target)
    launch(forward_kernel, num_images, x, *weights, z, scale, **sizes)


def backward(module, x, dz, dx, partial_grads, num_images, target):
    """Write dx and the partial gradients of the parameters, given dz (B, T or 1, C)."""
    weights, scale, sizes = unpack(module, x, target)
    args = partial_grads, scale, num_images, images_per_program(num_images)
    launch(backward_kernel, num_programs(num_images), x, *weights, dz, dx, *args, **sizes)


class FusedAttention(torch.autograd.Function):
    """`FusedAttention.apply(x, norm_weight, norm_bias, qkv, out, heads, cls_only=False)`.

    vit.Attention as a function of x (B, T, C), float32, bfloat16 or float16, and its parameters,
    float32: z (B, T, C), or with cls_only (B, 1, C), in the dtype of x. C and the width of a head
    are powers of two, at least 16.
    """

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, qkv, out, heads, cls_only=False):
        ctx.target, weights = Target.of(x.device, x.dtype), (norm_weight, norm_bias, qkv, out)
        ctx.module = SimpleNamespace(parameters=lambda: weights, heads=heads, cls_only=cls_only)
        x = x.to(ctx.target.storage).contiguous()
        ctx.save_for_backward(x, *weights)
        z = torch.empty_like(x[:, :1] if cls_only else x)
        forward(ctx.module, x, z, len(x), ctx.target)
        return z.to(ctx.target.dtype)

    @staticmethod
    def backward(ctx, dz):
        x, *weights = ctx.saved_tensors
        dz, dx = dz.to(x.dtype).contiguous(), torch.empty_like(x)
        sizes = [w.numel() for w in weights]
        partial_grads = x.new_empty(num_programs(len(x)), sum(sizes), dtype=torch.float32)
        backward(ctx.module, x, dz, dx, partial_grads, len(x), ctx.target)
        grads = zip(partial_grads.sum(0).split(sizes), weights)
        return dx.to(ctx.target.dtype), *(grad.view(w.shape) for grad, w in grads), None, None
