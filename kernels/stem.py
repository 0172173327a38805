"""Images to the first block's input, one kernel forward and one backward; vit.Stem is the same.

    h = GELU(im2col(image) W1' + b1)            conv1 at one of the four pixels of every 2x2 patch
    a = sum over the four pixels of h W2' + b2  conv2, a patch's four pixels times a matrix each
    x = [cls; GELU(a)' Wp' + bp] + position     the projection: a token is a channel
    backward, given dx:  dWp = dx' GELU(a)',  da = (dx Wp)' GELU'(a),  dW2 = da' h,
    dc = (da W2) GELU'(.),  dW1 = dc' im2col;  biases are column sums

Images have a margin of zeros, so im2col is a gather without borders. The maps of conv1, 32x32x32
values, never exist; the backward computes them again, while `a` costs less to read than to compute.

A program of the forward is one image; of the backward one of the four pixels, for one image or
several: it sums its part of dW1 and dW2 over all patches, and dWp over its quarter of them, in
registers. Gradients of CLS token and positions are sums of dx, made with all the others.

Letters: B batch, S side of an image (32), P side of a patch (2), N patches (256), I input channels
(3), K = 9 I padded (32), L channels (32), C width (64), T tokens (L + 1).
"""

import triton
import triton.language as tl

from kernels.functions import INTERPRETED, cast, dot, gelu, load, padded, split

# Patches at once. The interpreter's time is that of operations, whatever their size.
TILE = 128 if INTERPRETED else 64
BACKWARD_TILE = 128 if INTERPRETED else 32


@triton.jit
def im2col(image_ptr, n, pixel, I: tl.constexpr, S: tl.constexpr, P: tl.constexpr, K: tl.constexpr):
    """Load what conv1 sees at one of the P P pixels of patches n: (n, K), zero from 9 I on."""
    k = tl.arange(0, K)
    patch = (n // (S // P)) * (P * (S + 2)) + (n % (S // P)) * P
    tap = (k // 9) * ((S + 2) * (S + 2)) + (k % 9 // 3) * (S + 2) + k % 3
    offsets = patch[:, None] + tap[None, :] + (pixel // P) * (S + 2) + pixel % P
    return tl.load(image_ptr + offsets, mask=k[None, :] < 9 * I, other=0.0)


@triton.jit(do_not_specialize=["batch_size"])
def stem_forward_kernel(
    images_ptr,  # (N, I, S + 2, S + 2), working dtype, in the order of the epoch
    counter_ptr,  # (1,), int32, steps done in the epoch
    weight1_ptr,  # (L, 9I)
    bias1_ptr,  # (L,)
    weight2_ptr,  # (L, L, P, P)
    bias2_ptr,  # (L,)
    proj_ptr,  # (C, N)
    bias_ptr,  # (C,)
    cls_ptr,  # (C,)
    position_ptr,  # (T, C)
    a_ptr,  # (B, N, L), working dtype
    x_ptr,  # (B, T, C), working dtype
    batch_size,  # images of a full batch on this rank
    I: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    TILE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    N: tl.constexpr = (S // P) * (S // P)
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, K)
    l = tl.arange(0, L)
    c = tl.arange(0, C)
    image = tl.load(counter_ptr).to(tl.int64) * batch_size + b
    image_ptr = images_ptr + image * (I * (S + 2) * (S + 2))
    taps = l[:, None] * (9 * I) + k[None, :]
    w1 = load(weight1_ptr + taps, DTYPE, k[None, :] < 9 * I)  # (L, K)
    b1 = tl.load(bias1_ptr + l)
    b2 = tl.load(bias2_ptr + l)
    tokens = tl.zeros((C, L), tl.float32)
    for first in range(0, N, TILE):
        # Both convolutions at a tile of patches.
        n = first + tl.arange(0, TILE)
        a = tl.zeros((TILE, L), tl.float32) + b2[None, :]
        for pixel in range(P * P):
            seen = im2col(image_ptr, n, pixel, I, S, P, K)
            h = gelu(dot(seen, tl.trans(w1)) + b1[None, :])[0]  # (n, K) x (K, L) -> (n, L)
            w2 = load(weight2_ptr + (l[:, None] * L + l[None, :]) * (P * P) + pixel, DTYPE)
            a += dot(cast(h, DTYPE), tl.trans(w2))  # (n, L) x (L, L) -> (n, L)
        a = cast(a, DTYPE)
        tl.store(a_ptr + b * (N * L) + n[:, None] * L + l[None, :], a)

        # The tile's part of every token.
        g = cast(gelu(a.to(tl.float32))[0], DTYPE)
        proj = load(proj_ptr + c[:, None] * N + n[None, :], DTYPE)
        tokens += dot(proj, g)  # (C, n) x (n, L) -> (C, L)

    # The CLS token comes first; every token has a position.
    offsets = (l[None, :] + 1) * C + c[:, None]
    tokens += tl.load(bias_ptr + c)[:, None] + tl.load(position_ptr + offsets)
    x_ptr += b * ((L + 1) * C)
    tl.store(x_ptr + c, cast(tl.load(cls_ptr + c) + tl.load(position_ptr + c), DTYPE))
    tl.store(x_ptr + offsets, cast(tokens, DTYPE))


@triton.jit(do_not_specialize=["batch_size", "B"], do_not_specialize_on_alignment=["count"])
def stem_backward_kernel(
    images_ptr,  # (N, I, S + 2, S + 2), working dtype, in the order of the epoch
    counter_ptr,  # (1,), int32, steps done in the epoch
    weight1_ptr,  # (L, 9I)
    bias1_ptr,  # (L,)
    weight2_ptr,  # (L, L, P, P)
    proj_ptr,  # (C, N)
    a_ptr,  # (B, N, L), working dtype
    dx_ptr,  # (B, T, C), fp32
    conv1_ptr,  # (groups PP, 9IL + L), partial gradients of conv1's weight and bias
    rest_ptr,  # (groups, LLPP + L + CN + C), of conv2's weight and bias, proj's weight and bias
    batch_size,  # images of a full batch on this rank
    B,  # images of this batch
    count,  # images of a group
    I: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    TILE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    N: tl.constexpr = (S // P) * (S // P)
    PP: tl.constexpr = P * P
    OWN: tl.constexpr = N // PP  # patches of dproj
    group = tl.program_id(0) // PP
    pixel = tl.program_id(0) % PP
    k = tl.arange(0, K)
    l = tl.arange(0, L)
    c = tl.arange(0, C)
    own = pixel * OWN + tl.arange(0, OWN)
    taps = l[:, None] * (9 * I) + k[None, :]
    in_taps = k[None, :] < 9 * I
    w1 = load(weight1_ptr + taps, DTYPE, in_taps)  # (L, K)
    b1 = tl.load(bias1_ptr + l)
    at = (l[:, None] * L + l[None, :]) * PP + pixel
    w2 = load(weight2_ptr + at, DTYPE)  # (L, L)
    dweight1 = tl.zeros((L, K), tl.float32)
    dbias1 = tl.zeros((L,), tl.float32)
    dweight2 = tl.zeros((L, L), tl.float32)
    dbias2 = tl.zeros((L,), tl.float32)
    dproj = tl.zeros((C, OWN), tl.float32)
    dbias = tl.zeros((C,), tl.float32)
    b = (group * count).to(tl.int64)
    stop = tl.minimum(b + count, B)
    while b < stop:
        image = tl.load(counter_ptr).to(tl.int64) * batch_size + b
        image_ptr = images_ptr + image * (I * (S + 2) * (S + 2))
        a_tile_ptr = a_ptr + b * (N * L)

        # The projection, at this program's quarter of the patches.
        tokens = (l[:, None] + 1) * C + c[None, :]  # without the CLS token
        dx = tl.load(dx_ptr + b * ((L + 1) * C) + tokens)  # (L, C)
        dbias += tl.sum(dx, 0)
        dx = cast(dx, DTYPE)
        a_own = tl.load(a_tile_ptr + own[:, None] * L + l[None, :]).to(tl.float32)
        g = cast(gelu(a_own)[0], DTYPE)
        dproj += dot(tl.trans(dx), tl.trans(g))  # (C, L) x (L, n) -> (C, n)

        # Both convolutions, at this program's pixel of every patch.
        for first in range(0, N, TILE):
            n = first + tl.arange(0, TILE)
            a = tl.load(a_tile_ptr + n[:, None] * L + l[None, :]).to(tl.float32)
            proj = load(proj_ptr + c[:, None] * N + n[None, :], DTYPE)
            da = gelu(a)[1] * dot(tl.trans(proj), tl.trans(dx))  # (n, C) x (C, L) -> (n, L)
            dbias2 += tl.sum(da, 0)
            da = cast(da, DTYPE)
            seen = im2col(image_ptr, n, pixel, I, S, P, K)
            h, dh = gelu(dot(seen, tl.trans(w1)) + b1[None, :])  # (n, L)
            dweight2 += dot(tl.trans(da), cast(h, DTYPE))  # (L, n) x (n, L) -> (L, L)
            dc = dot(da, w2) * dh  # (n, L) x (L, L) -> (n, L)
            dbias1 += tl.sum(dc, 0)
            dweight1 += dot(tl.trans(cast(dc, DTYPE)), seen)  # (L, n) x (n, K) -> (L, K)
        b += 1
    conv1_ptr += tl.program_id(0).to(tl.int64) * (9 * I * L + L)
    tl.store(conv1_ptr + taps, dweight1, mask=in_taps)
    tl.store(conv1_ptr + 9 * I * L + l, dbias1)
    rest_ptr += group.to(tl.int64) * (L * L * PP + L + C * N + C)
    tl.store(rest_ptr + at, dweight2)
    rest_ptr += L * L * PP
    tl.store(rest_ptr + l, dbias2, mask=pixel + l * 0 == 0)  # all programs of a group have it
    tl.store(rest_ptr + L + c[:, None] * N + own[None, :], dproj)
    tl.store(rest_ptr + L + C * N + c, dbias, mask=pixel + c * 0 == 0)


def forward(step, x, num_images):
    """Write step.a and x (B, T, C), the embedding of a batch of step.pixels.

    `step` is the FusedStep.
    """
    model = step.model
    stem = model.stem
    I = stem.conv1.in_channels
    stem_forward_kernel[(num_images,)](
        step.pixels,
        step.counter,
        stem.conv1.weight,
        stem.conv1.bias,
        stem.conv2.weight,
        stem.conv2.bias,
        stem.proj.weight,
        stem.proj.bias,
        model.cls_token,
        model.pos_embedding,
        step.a,
        x,
        step.batch_size,
        I=I,
        S=model.config["image_size"],
        P=model.config["patch_size"],
        K=padded(9 * I),
        L=stem.conv1.out_channels,
        C=x.shape[2],
        TILE=min(TILE, step.a.shape[1]),
        **step.target.options,
    )


def backward(step, dx, num_images):
    """Write the partial gradients of conv1, and of conv2 and proj, given dx (B, T, C)."""
    model = step.model
    stem = model.stem
    I = stem.conv1.in_channels
    P = model.config["patch_size"]
    groups, count = split(num_images)
    stem_backward_kernel[(groups * P * P,)](
        step.pixels,
        step.counter,
        stem.conv1.weight,
        stem.conv1.bias,
        stem.conv2.weight,
        stem.proj.weight,
        step.a,
        dx,
        step.partials["conv1"],
        step.partials["stem"],
        step.batch_size,
        num_images,
        count,
        I=I,
        S=model.config["image_size"],
        P=P,
        K=padded(9 * I),
        L=stem.conv1.out_channels,
        C=dx.shape[2],
        TILE=min(BACKWARD_TILE, step.a.shape[1]),
        **step.target.options,
    )
