"""Pictures to the first block's input, one kernel forward and one backward; vit.Stem and vit.ViT say the same in PyTorch.

    h = GELU(im2col(picture) W1' + b1)          conv1 at one of the four pixels of every 2x2 patch
    g = GELU(sum over the four of h W2' + b2)   conv2, a patch's four pixels times a matrix each
    x = [cls; g' Wp' + bp] + position           the projection: g is (256 patches, 32 channels), a token a channel
    backward, given dx:  dWp = dx' g',  dg = (dx Wp)',  da = dg GELU'(.),  dW2 = da' h,  dh = da W2,
    dc = dh GELU'(.),  dW1 = dc' im2col;  biases are column sums

One program is one picture: 64 patches at a time forward, all 256 backward, where sums over patches then need one pass.
conv2's sums over four pixels stay in registers, and the maps of 32x32x32 numbers, the largest thing in the network, never
exist. The pixels that conv1 needs come straight from the picture, which the first level cache holds; 27 of them are padded
to 32 for the product, nothing else is padded. The backward computes everything again, conv1 twice: to store h would move
64 KB a picture each way. Weight gradients: a share a program and one sum, as in attention.py. sm_90, bf16: 3 programs of 4
warps in flight on a multiprocessor forward (142 registers, 22 KB), 1 of 8 warps backward (244 registers, 70 KB).

Letters: B batch, S side of a picture (32), p side of a patch (2), N patches (256), I input channels (3), K = 9 I padded
(32), L channels (32), C width (64), T tokens (L + 1). A convolution as a product of gathered pixels is Chellapilla et
al. 2006, "High performance convolutional neural networks for document processing".
"""

import torch
import triton
import triton.language as tl

from kernels.functions import OPTIONS, dot, gelu, gelu_and_derivative, launch, load, padded, split, to_working

TILE = 64  # patches that the forward holds at once: more of them spill in fp32 and leave fewer programs in flight
BACKWARD_OPTIONS = OPTIONS[torch.float32]  # its programs hold four times as many patches


@triton.jit
def pixels(picture_ptr, n, pixel, I: tl.constexpr, S: tl.constexpr, P: tl.constexpr, K: tl.constexpr):
    """What conv1 sees at the `pixel`-th of the P P pixels of patches `n`: (n, K), zero outside the picture and from 9 I on."""
    n, k = n[:, None], tl.arange(0, K)[None, :]
    row = (n // (S // P)) * P + pixel // P + k % 9 // 3 - 1
    column = (n % (S // P)) * P + pixel % P + k % 3 - 1
    inside = (row >= 0) & (row < S) & (column >= 0) & (column < S) & (k < 9 * I)
    return tl.load(picture_ptr + (k // 9) * S * S + row * S + column, mask=inside, other=0.0)


@triton.jit
def convolved(picture_ptr, n, w1, b1, weight2_ptr, bias2_ptr, I: tl.constexpr, S: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr):
    """conv2 at patches `n`, before its GELU, from w1 (L, K) and b1 (L,): fp32 (n, L)."""
    L: tl.constexpr = w1.shape[0]
    l = tl.arange(0, L)
    a = tl.zeros((n.shape[0], L), tl.float32) + tl.load(bias2_ptr + l)
    for pixel in range(P * P):
        h = gelu(dot(pixels(picture_ptr, n, pixel, I, S, P, w1.shape[1]), tl.trans(w1)) + b1, DTYPE)  # (n, K) x (K, L) -> (n, L)
        w2 = load(weight2_ptr + (l[:, None] * L + l[None, :]) * (P * P) + pixel, DTYPE)  # (L, L)
        a += dot(to_working(h, DTYPE), tl.trans(w2))  # (n, L) x (L, L) -> (n, L)
    return a


@triton.jit
def forward_kernel(
    images_ptr,  # (B, I, S, S), working dtype
    weight1_ptr, bias1_ptr,  # (L, 9I), (L,)
    weight2_ptr, bias2_ptr,  # (L, L, p, p), (L,)
    project_ptr, bias_ptr,  # (C, N), (C,)
    cls_ptr, position_ptr,  # (C,), (T, C)
    x_ptr,  # (B, T, C), working dtype
    I: tl.constexpr, S: tl.constexpr, P: tl.constexpr, K: tl.constexpr, L: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = (S // P) * (S // P)
    k, l, c = tl.arange(0, K), tl.arange(0, L), tl.arange(0, C)
    picture_ptr = images_ptr + tl.program_id(0).to(tl.int64) * (I * S * S)
    w1 = load(weight1_ptr + l[:, None] * (9 * I) + k[None, :], DTYPE, k[None, :] < 9 * I)  # (L, K)
    b1 = tl.load(bias1_ptr + l)
    tokens = tl.zeros((C, L), tl.float32)
    for first in range(0, N, TILE):
        n = first + tl.arange(0, TILE)
        a = convolved(picture_ptr, n, w1, b1, weight2_ptr, bias2_ptr, I, S, P, DTYPE)
        g = to_working(gelu(a, DTYPE), DTYPE)
        tokens += dot(load(project_ptr + c[:, None] * N + n[None, :], DTYPE), g)  # (C, n) x (n, L) -> (C, L)
    tokens += tl.load(bias_ptr + c)[:, None] + tl.load(position_ptr + (l[None, :] + 1) * C + c[:, None])
    x_ptr += tl.program_id(0).to(tl.int64) * ((L + 1) * C)
    tl.store(x_ptr + c, to_working(tl.load(cls_ptr + c) + tl.load(position_ptr + c), DTYPE))
    tl.store(x_ptr + (l[None, :] + 1) * C + c[:, None], to_working(tokens, DTYPE))


@triton.jit
def backward_kernel(
    images_ptr,  # (B, I, S, S), working dtype
    weight1_ptr, bias1_ptr,  # (L, 9I), (L,)
    weight2_ptr, bias2_ptr,  # (L, L, p, p), (L,)
    project_ptr,  # (C, N)
    dx_ptr,  # (B, T, C), working dtype
    shares_ptr,  # (B, 9IL + L + LLpp + L + CN), fp32: gradients of weight1, bias1, weight2, bias2 and project
    I: tl.constexpr, S: tl.constexpr, P: tl.constexpr, K: tl.constexpr, L: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = (S // P) * (S // P)
    k, l, c, n = tl.arange(0, K), tl.arange(0, L), tl.arange(0, C), tl.arange(0, N)
    picture_ptr = images_ptr + tl.program_id(0).to(tl.int64) * (I * S * S)
    dweight1_ptr = shares_ptr + tl.program_id(0).to(tl.int64) * (9 * I * L + L + L * L * P * P + L + C * N)
    dbias1_ptr = dweight1_ptr + 9 * I * L
    dweight2_ptr = dbias1_ptr + L
    dbias2_ptr = dweight2_ptr + L * L * P * P
    dproject_ptr = dbias2_ptr + L
    w1 = load(weight1_ptr + l[:, None] * (9 * I) + k[None, :], DTYPE, k[None, :] < 9 * I)  # (L, K)
    b1 = tl.load(bias1_ptr + l)

    a = convolved(picture_ptr, n, w1, b1, weight2_ptr, bias2_ptr, I, S, P, DTYPE)
    g, slope = gelu_and_derivative(a, DTYPE)
    tokens = (l[:, None] + 1) * C + c[None, :]  # (L, C), without the CLS token
    dx = tl.load(dx_ptr + tl.program_id(0).to(tl.int64) * ((L + 1) * C) + tokens)
    dproject = dot(tl.trans(dx), tl.trans(to_working(g, DTYPE)))  # (C, L) x (L, N) -> (C, N)
    tl.store(dproject_ptr + c[:, None] * N + n[None, :], dproject)
    project = load(project_ptr + c[:, None] * N + n[None, :], DTYPE)
    da = dot(tl.trans(project), tl.trans(dx)) * slope  # (N, C) x (C, L) -> (N, L)
    tl.store(dbias2_ptr + l, tl.sum(da, 0))
    da = to_working(da, DTYPE)

    dweight1 = tl.zeros((L, K), tl.float32)
    dbias1 = tl.zeros((L,), tl.float32)
    for pixel in range(P * P):
        seen = pixels(picture_ptr, n, pixel, I, S, P, K)
        h, slope = gelu_and_derivative(dot(seen, tl.trans(w1)) + b1, DTYPE)  # (N, L)
        kernel = (l[:, None] * L + l[None, :]) * (P * P) + pixel
        tl.store(dweight2_ptr + kernel, dot(tl.trans(da), to_working(h, DTYPE)))  # (L, N) x (N, L) -> (L, L)
        dc = dot(da, load(weight2_ptr + kernel, DTYPE)) * slope  # (N, L) x (L, L) -> (N, L)
        dbias1 += tl.sum(dc, 0)
        dweight1 += dot(tl.trans(to_working(dc, DTYPE)), seen)  # (L, N) x (N, K) -> (L, K)
    tl.store(dweight1_ptr + l[:, None] * (9 * I) + k[None, :], dweight1, mask=k[None, :] < 9 * I)
    tl.store(dbias1_ptr + l, dbias1)


def sizes(images, weight2, project):
    """The kernels' sizes for images (B, I, S, S), weight2 (L, L, p, p) and project (C, N)."""
    _, I, S, _ = images.shape
    return {"I": I, "S": S, "P": weight2.shape[-1], "K": padded(9 * I), "L": len(weight2), "C": len(project)}


def forward_constants(images, weight2, project):
    return {**sizes(images, weight2, project), "TILE": min(TILE, project.shape[1]), **OPTIONS[images.dtype]}


def backward_constants(images, weight2, project):
    return {**sizes(images, weight2, project), **BACKWARD_OPTIONS}


def forward(images, weight1, bias1, weight2, bias2, project, bias, cls_token, position):
    """images (B, I, S, S), float32 or bfloat16, to x (B, L + 1, C) of the same dtype; weights as vit.ViT's, float32."""
    x = torch.empty(len(images), len(weight1) + 1, len(project), dtype=images.dtype, device=images.device)
    weights = weight1, bias1, weight2, bias2, project, bias, cls_token, position
    launch(forward_kernel, len(images), images.dtype, (images, *weights), (x,), **forward_constants(images, weight2, project))
    return x


def backward(dx, images, weight1, bias1, weight2, bias2, project, bias, cls_token, position):
    """Gradients of every weight, in the order of `forward`, given that of x (B, L + 1, C)."""
    parts = weight1, bias1, weight2, bias2, project
    shares = torch.empty(len(images), sum(part.numel() for part in parts), dtype=torch.float32, device=images.device)
    launch(backward_kernel, len(images), images.dtype, (images, *parts, dx), (shares,), **backward_constants(images, weight2, project))
    dposition = dx.sum(0, dtype=torch.float32)  # (T, C)
    rest = dposition[1:].sum(0), dposition[0].view(cls_token.shape), dposition.view(position.shape)
    return *split(shares.sum(0), *parts), *rest


class FusedStem(torch.autograd.Function):
    """`FusedStem.apply(images, *weights)` is `forward`, with gradients of the weights; pictures get none."""

    @staticmethod
    def forward(ctx, images, *weights):
        images = images.contiguous()
        ctx.save_for_backward(images, *weights)
        return forward(images, *weights)

    @staticmethod
    def backward(ctx, dx):
        return None, *backward(dx.contiguous(), *ctx.saved_tensors)
