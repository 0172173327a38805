"""The attention half of a block, one kernel forward and one backward; vit.Attention is the same.

    y = LayerNorm(x),  and for each head  q = y Wq',  k = y Wk',  v = y Wv',
    P = softmax(q k' / sqrt(D)),  o = P v,  z = x + sum over heads of o Wo'
    backward, given dz:  do = dz Wo,  dv = P' do,  dP = do v',  dS = P (dP - rowsum(P dP)) / sqrt(D)
    dq = dS k,  dk = dS' q,  dWo = dz' o,  dWq = dq' y  and so on,  dy = dq Wq + dk Wk + dv Wv,
    dx = dz + the gradient through LayerNorm

A program is one image (backward: several, where the batch is large), its tokens padded to 64 rows.
A loop over heads keeps one head's scores in registers; nothing between x and z goes to memory. The
backward computes y, q, k, v and P again, which costs less than to store and load them, as in
FlashAttention (Dao et al. 2022, arXiv:2205.14135).

Letters: B batch, T tokens (33), Q queries (T, or 1 in the last block, which computes the CLS token
alone), TP and QP: padded, C width (64), H heads (4), D head width (16).
"""

import torch
import triton
import triton.language as tl

from kernels.functions import (
    DTYPES,
    INTERPRETED,
    Target,
    accumulate,
    cast,
    dot,
    layer_norm_backward,
    load,
    load_norm,
    padded,
    split,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softmax(scores, SCALE: tl.constexpr, T):
    """Return the softmax of SCALE * scores over the first T columns.

    It takes powers of 2, which are one instruction.
    """
    factor = SCALE * LOG2_E
    scores = tl.where(tl.arange(0, scores.shape[1])[None, :] < T, scores, -float("inf"))
    powers = tl.exp2(scores * factor - tl.max(scores, 1, keep_dims=True) * factor)
    return powers / tl.sum(powers, 1, keep_dims=True)


@triton.jit
def load_head(qkv_ptr, h, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr):
    """Return the rows of Wq, Wk and Wv of head h, each (D, C)."""
    qkv_ptr += h * D * C + tl.arange(0, D)[:, None] * C + tl.arange(0, C)[None, :]
    wq = load(qkv_ptr, DTYPE)
    wk = load(qkv_ptr + H * D * C, DTYPE)
    wv = load(qkv_ptr + 2 * H * D * C, DTYPE)
    return wq, wk, wv


@triton.jit
def attention_forward_kernel(
    x_ptr,  # (B, T, C), working dtype
    norm_weight_ptr,  # (C,)
    norm_bias_ptr,  # (C,)
    qkv_ptr,  # (3HD, C)
    out_ptr,  # (C, HD)
    z_ptr,  # (B, Q, C), working dtype
    T: tl.constexpr,
    TP: tl.constexpr,
    Q: tl.constexpr,
    QP: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, TP)[:, None]
    i = tl.arange(0, QP)[:, None]
    c = tl.arange(0, C)
    x_ptr += b * T * C
    out_ptr += c[:, None] * (H * D) + tl.arange(0, D)[None, :]  # (C, D)
    offsets = i * C + c[None, :]
    _, y, _, _ = load_norm(x_ptr, t * C + c[None, :], t < T, norm_weight_ptr, norm_bias_ptr)
    z, yq, _, _ = load_norm(x_ptr, offsets, i < Q, norm_weight_ptr, norm_bias_ptr)
    y = cast(y, DTYPE)
    yq = cast(yq, DTYPE)  # the queries' rows of y
    for h in range(H):
        wq, wk, wv = load_head(qkv_ptr, h, H, D, C, DTYPE)
        q = cast(dot(yq, tl.trans(wq)), DTYPE)  # (QP, C) x (C, D) -> (QP, D)
        k = cast(dot(y, tl.trans(wk)), DTYPE)  # (TP, C) x (C, D) -> (TP, D)
        v = cast(dot(y, tl.trans(wv)), DTYPE)
        p = cast(softmax(dot(q, tl.trans(k)), D**-0.5, T), DTYPE)  # (QP, D) x (D, TP) -> (QP, TP)
        o = cast(dot(p, v), DTYPE)  # (QP, TP) x (TP, D) -> (QP, D)
        z += dot(o, tl.trans(load(out_ptr + h * D, DTYPE)))  # (QP, D) x (D, C) -> (QP, C)
    tl.store(z_ptr + b * Q * C + offsets, cast(z, DTYPE), mask=i < Q)


@triton.jit
def heads_backward(
    y,  # (TP, C), working dtype
    yq,  # (QP, C), working dtype, the queries' rows of y
    dz_ptr,  # (Q, C), working dtype
    num_rows,  # rows of dz: Q, or 0 without an image
    qkv_ptr,  # (3HD, C)
    out_ptr,  # (C, HD)
    partial_ptr,  # (2C + 3HDC + CHD,)
    is_later,  # whether partial gradients are added to those of earlier images
    T: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return dy (TP, C) of one image; stores, or adds, its gradients of qkv and out."""
    TP: tl.constexpr = y.shape[0]
    QP: tl.constexpr = yq.shape[0]
    C: tl.constexpr = y.shape[1]
    i = tl.arange(0, QP)[:, None]
    c = tl.arange(0, C)
    d = tl.arange(0, D)
    row = d[:, None] * C + c[None, :]  # (D, C)
    column = c[:, None] * (H * D) + d[None, :]  # (C, D)
    dz_ptr += i * C + c[None, :]
    dout_ptr = partial_ptr + 2 * C + 3 * H * D * C + column
    dy = tl.zeros((TP, C), tl.float32)
    for h in range(H):
        # Forward again.
        wq, wk, wv = load_head(qkv_ptr, h, H, D, C, DTYPE)
        q = cast(dot(yq, tl.trans(wq)), DTYPE)  # (QP, C) x (C, D) -> (QP, D)
        k = cast(dot(y, tl.trans(wk)), DTYPE)  # (TP, C) x (C, D) -> (TP, D)
        v = cast(dot(y, tl.trans(wv)), DTYPE)
        dz = tl.load(dz_ptr, mask=i < num_rows, other=0.0)
        do = cast(dot(dz, load(out_ptr + h * D + column, DTYPE)), DTYPE)  # (QP, C) x (C, D)
        p = softmax(dot(q, tl.trans(k)), D**-0.5, T)  # (QP, D) x (D, TP) -> (QP, TP)
        rounded = cast(p, DTYPE)
        o = cast(dot(rounded, v), DTYPE)  # (QP, TP) x (TP, D) -> (QP, D)

        # Values and the output projection. dz and the weights are loaded twice: registers and
        # shared memory are scarce.
        dv = cast(dot(tl.trans(rounded), do), DTYPE)  # (TP, QP) x (QP, D) -> (TP, D)
        dqkv_ptr = partial_ptr + 2 * C + h * D * C + row
        accumulate(dqkv_ptr + 2 * H * D * C, dot(tl.trans(dv), y), is_later)  # (D, C)
        dz = tl.load(dz_ptr, mask=i < num_rows, other=0.0)
        accumulate(dout_ptr + h * D, dot(tl.trans(dz), o), is_later)  # (C, QP) x (QP, D)
        wq, wk, wv = load_head(qkv_ptr, h, H, D, C, DTYPE)
        dy += dot(dv, wv)  # (TP, D) x (D, C) -> (TP, C)

        # Scores, queries and keys.
        dp = dot(do, tl.trans(v))  # (QP, D) x (D, TP) -> (QP, TP)
        ds = cast(p * (dp - tl.sum(p * dp, 1)[:, None]) * D**-0.5, DTYPE)
        dq = cast(dot(ds, k), DTYPE)  # (QP, TP) x (TP, D) -> (QP, D)
        accumulate(dqkv_ptr, dot(tl.trans(dq), yq), is_later)
        if QP == TP:
            dy += dot(dq, wq)
        else:  # the CLS token alone: rows after the first are 0
            dy += tl.where(tl.arange(0, TP)[:, None] == 0, tl.sum(dot(dq, wq), 0)[None, :], 0.0)
        dk = cast(dot(tl.trans(ds), q), DTYPE)  # (TP, QP) x (QP, D) -> (TP, D)
        accumulate(dqkv_ptr + H * D * C, dot(tl.trans(dk), y), is_later)
        dy += dot(dk, wk)
    return dy


# Compiled once for a count of 1, without the sums over images, and once for others.
@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["count"])
def attention_backward_kernel(
    x_ptr,  # (B, T, C), working dtype
    norm_weight_ptr,  # (C,)
    norm_bias_ptr,  # (C,)
    qkv_ptr,  # (3HD, C)
    out_ptr,  # (C, HD)
    dz_ptr,  # (B, Q, C), working dtype
    dx_ptr,  # (B, T, C), working dtype or fp32
    partial_ptr,  # (programs, 2C + 3HDC + CHD), of norm weight and bias, qkv and out
    B,  # images
    count,  # images of a program
    T: tl.constexpr,
    TP: tl.constexpr,
    Q: tl.constexpr,
    QP: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    t = tl.arange(0, TP)[:, None]
    tq = tl.arange(0, QP)[:, None]
    c = tl.arange(0, C)
    offsets = t * C + c[None, :]
    partial_ptr += tl.program_id(0).to(tl.int64) * (4 * H * D * C + 2 * C)
    i = 0
    while i < count:
        # The image; the last program may have fewer of them than others.
        b = tl.program_id(0).to(tl.int64) * count + i
        num_rows = tl.where(b < B, T, 0)
        num_queries = tl.where(b < B, Q, 0)
        x_at = x_ptr + b * T * C
        dz_at = dz_ptr + b * Q * C

        mask = t < num_rows
        mask_q = tq < num_queries
        _, y, _, _ = load_norm(x_at, offsets, mask, norm_weight_ptr, norm_bias_ptr)
        _, yq, _, _ = load_norm(x_at, tq * C + c[None, :], mask_q, norm_weight_ptr, norm_bias_ptr)
        dy = heads_backward(
            cast(y, DTYPE),
            cast(yq, DTYPE),
            dz_at,
            num_queries,
            qkv_ptr,
            out_ptr,
            partial_ptr,
            i > 0,
            T,
            H,
            D,
            DTYPE,
        )

        # Backward through LayerNorm and the residual. x is loaded again: to keep it in registers
        # over the heads would spill.
        _, _, x_hat, rstd = load_norm(x_at, offsets, mask, norm_weight_ptr, norm_bias_ptr)
        accumulate(partial_ptr + c, tl.sum(dy * x_hat, 0), i > 0)
        accumulate(partial_ptr + C + c, tl.sum(dy, 0), i > 0)
        dx = layer_norm_backward(dy, x_hat, rstd, norm_weight_ptr)
        dx += tl.load(dz_at + offsets, mask=t < num_queries, other=0.0).to(tl.float32)
        tl.store(dx_ptr + b * T * C + offsets, cast(dx, DTYPE), mask=mask)
        tl.debug_barrier()  # what one thread has stored another may load for the next image
        i += 1


def forward(x, weights, heads, z, num_images, target):
    """Write z (B, Q, C) of x (B, T, C) and the parameters of a vit.Attention."""
    norm_weight, norm_bias, qkv, out = weights
    _, T, C = x.shape
    Q = z.shape[1]
    attention_forward_kernel[(num_images,)](
        x,
        norm_weight,
        norm_bias,
        qkv,
        out,
        z,
        T=T,
        TP=padded(T),
        Q=Q,
        QP=padded(Q),
        C=C,
        H=heads,
        D=out.shape[1] // heads,
        **target.options,
    )


def backward(x, weights, heads, dz, dx, partial_grads, num_images, target):
    """Write dx and the partial gradients of the parameters, given dz (B, Q, C)."""
    norm_weight, norm_bias, qkv, out = weights
    _, T, C = x.shape
    Q = dz.shape[1]
    programs, count = split(num_images)
    attention_backward_kernel[(programs,)](
        x,
        norm_weight,
        norm_bias,
        qkv,
        out,
        dz,
        dx,
        partial_grads,
        num_images,
        count,
        T=T,
        TP=padded(T),
        Q=Q,
        QP=padded(Q),
        C=C,
        H=heads,
        D=out.shape[1] // heads,
        **target.options,
    )


class FusedAttention(torch.autograd.Function):
    """`FusedAttention.apply(x, norm_weight, norm_bias, qkv, out, heads, cls_only=False)`.

    Computes vit.Attention as a function of x (B, T, C), float32 or bfloat16, and of its parameters,
    float32: norm_weight (C,), norm_bias (C,), qkv (3HD, C), out (C, HD). Returns z (B, T, C), or
    with cls_only (B, 1, C), in the dtype of x. Raises ValueError for sizes that do not fit, or that
    are no powers of two, and for other dtypes and devices.
    """

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, qkv, out, heads, cls_only=False):
        weights = (norm_weight, norm_bias, qkv, out)
        check_arguments(x, weights, heads)
        ctx.target = Target.of(x.device, x.dtype)
        ctx.heads = heads
        x = x.to(ctx.target.storage).contiguous()
        weights = [w.contiguous() for w in weights]
        ctx.save_for_backward(x, *weights)
        z = torch.empty_like(x[:, :1] if cls_only else x)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            forward(x, weights, heads, z, len(x), ctx.target)
        return z.to(ctx.target.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable  # what the kernels write has no gradient
    def backward(ctx, dz):
        x, *weights = ctx.saved_tensors
        dz = dz.to(x.dtype).contiguous()
        dx = torch.empty_like(x)
        programs, _ = split(len(x))
        sizes = [w.numel() for w in weights]
        partial_grads = x.new_empty(programs, sum(sizes), dtype=torch.float32)
        backward(x, weights, ctx.heads, dz, dx, partial_grads, len(x), ctx.target)
        grads = partial_grads.sum(0).split(sizes)
        grads = [g.view_as(w) for g, w in zip(grads, weights)]
        return dx.to(ctx.target.dtype), *grads, None, None


def check_arguments(x, weights, heads):
    """Raise ValueError for what the kernels of attention cannot take."""
    _, _, qkv, out = weights
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}, not float32 or bfloat16")
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}, not (B, T, C)")
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"x is on the device {x.device}; the kernels run on a CUDA GPU")
    C = x.shape[2]
    D = out.shape[-1] // heads
    shapes = [(C,), (C,), (3 * heads * D, C), (C, heads * D)]
    names = ("norm_weight", "norm_bias", "qkv", "out")
    for name, weight, shape in zip(names, weights, shapes):
        if weight.shape != shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, not {shape}")
        if weight.dtype != torch.float32 or weight.device != x.device:
            raise ValueError(
                f"{name} is {weight.dtype} on {weight.device}, not float32 on {x.device}"
            )
    for name, size in (("C", C), ("the width of a head", D)):
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name} is {size}, not a power of two of at least 16")
