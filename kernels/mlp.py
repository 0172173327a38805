"""The MLP half of a block, one kernel forward and one backward; vit.MLP is the same in PyTorch.

    y = LayerNorm(x),  h = y W1' + b1,  z = x + GELU(h) W2' + b2
    backward, given dz:  dg = dz W2,  dh = dg GELU'(h),  dW2 = dz' GELU(h),  db2 = colsum(dz),
    dW1 = dh' y,  db1 = colsum(dh),  dy = dh W1,  dx = dz + the gradient through LayerNorm

Every token stands alone, so a program takes R of them, of whichever images, with both matrices
whole: nothing between x and z goes to memory, and the backward computes y and h again, for several
tiles of R rows where there are many, and sums its weight gradients in registers. Dosovitskiy et al.
2020, arXiv:2010.11929; GELU: Hendrycks & Gimpel 2016, arXiv:1606.08415.

Letters: N tokens, C width (64), M hidden width (64), R rows of a tile.
"""

import triton
import triton.language as tl

from kernels.functions import cast, dot, gelu, layer_norm_backward, load, load_norm, split

ROWS = 16  # of a tile


@triton.jit(do_not_specialize=["N"])
def mlp_forward_kernel(
    x_ptr,  # (N, C), working dtype
    norm_weight_ptr,  # (C,)
    norm_bias_ptr,  # (C,)
    weight1_ptr,  # (M, C)
    bias1_ptr,  # (M,)
    weight2_ptr,  # (C, M)
    bias2_ptr,  # (C,)
    z_ptr,  # (N, C), working dtype
    N,
    C: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    DTYPE: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    c = tl.arange(0, C)
    m = tl.arange(0, M)
    offsets = n * C + c[None, :]
    mask = n < N
    x, y, _, _ = load_norm(x_ptr, offsets, mask, norm_weight_ptr, norm_bias_ptr)
    y = cast(y, DTYPE)
    w1 = load(weight1_ptr + m[:, None] * C + c[None, :], DTYPE)
    h = dot(y, tl.trans(w1)) + tl.load(bias1_ptr + m)[None, :]  # (R, C) x (C, M) -> (R, M)
    g = cast(gelu(h)[0], DTYPE)
    w2 = load(weight2_ptr + c[:, None] * M + m[None, :], DTYPE)
    z = x + tl.load(bias2_ptr + c)[None, :]
    z += dot(g, tl.trans(w2))  # (R, M) x (M, C) -> (R, C)
    tl.store(z_ptr + offsets, cast(z, DTYPE), mask=mask)


@triton.jit(do_not_specialize=["N"])
def mlp_backward_kernel(
    x_ptr,  # (N, C), working dtype
    norm_weight_ptr,  # (C,)
    norm_bias_ptr,  # (C,)
    weight1_ptr,  # (M, C)
    bias1_ptr,  # (M,)
    weight2_ptr,  # (C, M)
    dz_ptr,  # (N, C), working dtype
    dx_ptr,  # (N, C), working dtype
    partial_ptr,  # (programs, 2C + MC + M + CM + C), of norm, linear1, linear2; weight before bias
    N,
    C: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    DTYPE: tl.constexpr,
):
    c = tl.arange(0, C)
    m = tl.arange(0, M)
    at1 = m[:, None] * C + c[None, :]
    at2 = c[:, None] * M + m[None, :]
    dnorm_weight = tl.zeros((C,), tl.float32)
    dnorm_bias = tl.zeros((C,), tl.float32)
    dweight1 = tl.zeros((M, C), tl.float32)
    dbias1 = tl.zeros((M,), tl.float32)
    dweight2 = tl.zeros((C, M), tl.float32)
    dbias2 = tl.zeros((C,), tl.float32)
    first = tl.program_id(0) * R
    while first < N:
        # y, h and GELU(h) again.
        n = first.to(tl.int64) + tl.arange(0, R)[:, None]
        offsets = n * C + c[None, :]
        mask = n < N
        _, y, x_hat, rstd = load_norm(x_ptr, offsets, mask, norm_weight_ptr, norm_bias_ptr)
        y = cast(y, DTYPE)
        w1 = load(weight1_ptr + at1, DTYPE)
        h = dot(y, tl.trans(w1)) + tl.load(bias1_ptr + m)[None, :]  # (R, C) x (C, M) -> (R, M)
        g, dh = gelu(h)

        # Backward through linear2 and GELU.
        dz = tl.load(dz_ptr + offsets, mask=mask, other=0.0)
        dweight2 += dot(tl.trans(dz), cast(g, DTYPE))  # (C, R) x (R, M) -> (C, M)
        dbias2 += tl.sum(dz.to(tl.float32), 0)
        dh *= dot(dz, load(weight2_ptr + at2, DTYPE))  # (R, C) x (C, M) -> (R, M)

        # Backward through linear1.
        dbias1 += tl.sum(dh, 0)
        dh = cast(dh, DTYPE)
        dweight1 += dot(tl.trans(dh), y)  # (M, R) x (R, C) -> (M, C)
        dy = dot(dh, w1)  # (R, M) x (M, C) -> (R, C)

        # Backward through LayerNorm and the residual.
        dnorm_weight += tl.sum(dy * x_hat, 0)
        dnorm_bias += tl.sum(dy, 0)
        dx = dz.to(tl.float32) + layer_norm_backward(dy, x_hat, rstd, norm_weight_ptr)
        tl.store(dx_ptr + offsets, cast(dx, DTYPE), mask=mask)
        first += tl.num_programs(0) * R
    partial_ptr += tl.program_id(0).to(tl.int64) * (2 * C * M + M + 3 * C)
    tl.store(partial_ptr + c, dnorm_weight)
    tl.store(partial_ptr + C + c, dnorm_bias)
    tl.store(partial_ptr + 2 * C + at1, dweight1)
    tl.store(partial_ptr + 2 * C + C * M + m, dbias1)
    tl.store(partial_ptr + 2 * C + C * M + M + at2, dweight2)
    tl.store(partial_ptr + 2 * C + 2 * C * M + M + c, dbias2)


def num_programs(num_tokens):
    """Return the number of programs of the backward, and of rows of its partial gradients."""
    programs, _ = split(triton.cdiv(num_tokens, ROWS))
    return programs


def forward(x, mlp, z, num_images, target):
    """Write z (B, T, C) of x (B, T, C), with the parameters of a vit.MLP."""
    M, C = mlp.linear1.weight.shape
    num_tokens = num_images * x.shape[1]
    mlp_forward_kernel[(triton.cdiv(num_tokens, ROWS),)](
        x,
        mlp.norm.weight,
        mlp.norm.bias,
        mlp.linear1.weight,
        mlp.linear1.bias,
        mlp.linear2.weight,
        mlp.linear2.bias,
        z,
        num_tokens,
        C=C,
        M=M,
        R=ROWS,
        **target.options,
    )


def backward(x, mlp, dz, dx, partial_grads, num_images, target):
    """Write dx and the partial gradients of the parameters, given dz; x, dz, dx: (B, T, C)."""
    M, C = mlp.linear1.weight.shape
    num_tokens = num_images * x.shape[1]
    mlp_backward_kernel[(num_programs(num_tokens),)](
        x,
        mlp.norm.weight,
        mlp.norm.bias,
        mlp.linear1.weight,
        mlp.linear1.bias,
        mlp.linear2.weight,
        dz,
        dx,
        partial_grads,
        num_tokens,
        C=C,
        M=M,
        R=ROWS,
        **target.options,
    )
