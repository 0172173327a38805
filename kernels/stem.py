"""Images to the first block's input, one kernel forward and one backward; vit.Stem is the same.

    h = GELU(im2col(image) W1')                 conv1 at one of the four pixels of every 2x2 patch
    a = sum over the four pixels of h W2' + b2  conv2, a patch's four pixels times a matrix each
    x = [cls; GELU(a)' Wp' + bp] + position     the projection: a token is a channel
    backward, given dx:  dWp = dx' GELU(a)',  da = (dx Wp)' GELU'(a),  dW2 = da' h,
    dc = (da W2) GELU'(.),  dW1 = dc' im2col;  biases are column sums

Images have a margin of zeros, so im2col is a gather without borders; a column of it is 1, whose
weight is conv1's bias. The maps of conv1, 32x32x32 values, never exist; the backward computes them
again, while `a` costs less to read than to compute.

A program of the forward is one image; of the backward one half of the patches, of one image or
several: da is computed once, and then serves all four pixels. It sums its part of dW1 in registers,
of dW2 and dWp in its row of partial gradients. Gradients of CLS token and positions are sums of dx,
made with all the others.

Letters: B batch, S side of an image (32), P side of a patch (2), N patches (256), I input channels
(3), K = 9 I padded (32), L channels (32), C width (64), T tokens (L + 1).
"""

import torch
import triton
import triton.language as tl

from kernels.functions import accumulate, cast, dot, gelu, load, padded, split

PATCHES = 128  # of an image, at most, in a program of the backward


@triton.jit
def load_conv1(
    weight_ptr,  # (L, 9I)
    bias_ptr,  # (L,)
    I: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return conv1 as a matrix for im2col: (L, K), the bias in column 9 I."""
    l = tl.arange(0, L)[:, None]
    k = tl.arange(0, K)[None, :]
    weight = tl.load(weight_ptr + l * (9 * I) + k, mask=k < 9 * I, other=0.0)
    return cast(tl.where(k == 9 * I, tl.load(bias_ptr + l), weight), DTYPE)


@triton.jit
def im2col(image_ptr, n, pixel, I: tl.constexpr, S: tl.constexpr, P: tl.constexpr, K: tl.constexpr):
    """Load what conv1 sees at one of the P P pixels of patches n: (n, K).

    Column 9 I is 1, those after it 0.
    """
    k = tl.arange(0, K)[None, :]
    patch = (n // (S // P)) * (P * (S + 2)) + (n % (S // P)) * P
    tap = (k // 9) * ((S + 2) * (S + 2)) + (k % 9 // 3) * (S + 2) + k % 3
    image_ptr += (pixel // P) * (S + 2) + pixel % P
    one = tl.where(k == 9 * I, 1.0, 0.0)
    return tl.load(image_ptr + patch[:, None] + tap, mask=k < 9 * I, other=one)


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
    l = tl.arange(0, L)
    c = tl.arange(0, C)
    image = tl.load(counter_ptr).to(tl.int64) * batch_size + b
    image_ptr = images_ptr + image * (I * (S + 2) * (S + 2))
    w1 = load_conv1(weight1_ptr, bias1_ptr, I, K, L, DTYPE)
    b2 = tl.load(bias2_ptr + l)
    tokens = tl.zeros((C, L), tl.float32)
    for first in range(0, N, TILE):
        # Both convolutions at a tile of patches.
        n = first + tl.arange(0, TILE)
        a = tl.zeros((TILE, L), tl.float32) + b2[None, :]
        for pixel in range(P * P):
            seen = im2col(image_ptr, n, pixel, I, S, P, K)
            h = gelu(dot(seen, tl.trans(w1)))[0]  # (n, K) x (K, L) -> (n, L)
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
    convs_ptr,  # (programs, 9IL + L + LLPP + L), partial gradients of both convolutions
    dproj_ptr,  # (groups, CN + C), of the projection
    batch_size,  # images of a full batch on this rank
    B,  # images of this batch
    count,  # images of a group
    I: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    PATCHES: tl.constexpr,
    TILE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    N: tl.constexpr = (S // P) * (S // P)
    PARTS: tl.constexpr = N // PATCHES
    group = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    start = part * PATCHES
    k = tl.arange(0, K)[None, :]
    l = tl.arange(0, L)
    c = tl.arange(0, C)
    w1 = load_conv1(weight1_ptr, bias1_ptr, I, K, L, DTYPE)
    dweight1 = tl.zeros((L, K), tl.float32)
    dbias2 = tl.zeros((L,), tl.float32)
    dbias = tl.zeros((C,), tl.float32)
    convs_ptr += tl.program_id(0).to(tl.int64) * (9 * I * L + L + L * L * P * P + L)
    dweight2_ptr = convs_ptr + 9 * I * L + L
    dproj_ptr += group.to(tl.int64) * (C * N + C)
    i = 0
    while i < count:
        # The image. Where the last group has fewer of them, the last again, with a dx of 0.
        b = group.to(tl.int64) * count + i
        is_image = b < B
        b = tl.minimum(b, B - 1)
        image = tl.load(counter_ptr).to(tl.int64) * batch_size + b
        image_ptr = images_ptr + image * (I * (S + 2) * (S + 2))
        offsets = (l[:, None] + 1) * C + c[None, :]  # without the CLS token
        dx = tl.load(dx_ptr + b * ((L + 1) * C) + offsets, mask=is_image, other=0.0)  # (L, C)
        dbias += tl.sum(dx, 0)
        dx = cast(dx, DTYPE)
        first = start
        while first < start + PATCHES:
            # The projection, at a tile of patches.
            n = first + tl.arange(0, TILE)
            a = tl.load(a_ptr + b * (N * L) + n[:, None] * L + l[None, :]).to(tl.float32)
            g, dg = gelu(a)
            at = c[:, None] * N + n[None, :]
            dproj = dot(tl.trans(dx), tl.trans(cast(g, DTYPE)))  # (C, L) x (L, n) -> (C, n)
            accumulate(dproj_ptr + at, dproj, i > 0)
            proj = load(proj_ptr + at, DTYPE)
            da = dg * dot(tl.trans(proj), tl.trans(dx))  # (n, C) x (C, L) -> (n, L)
            dbias2 += tl.sum(da, 0)
            da = cast(da, DTYPE)

            # Both convolutions, at each pixel of the patches.
            for pixel in range(P * P):
                seen = im2col(image_ptr, n, pixel, I, S, P, K)
                h, dh = gelu(dot(seen, tl.trans(w1)))  # (n, K) x (K, L) -> (n, L)
                at2 = (l[:, None] * L + l[None, :]) * (P * P) + pixel
                dweight2 = dot(tl.trans(da), cast(h, DTYPE))  # (L, n) x (n, L) -> (L, L)
                accumulate(dweight2_ptr + at2, dweight2, (i > 0) | (first > start))
                dh *= dot(da, load(weight2_ptr + at2, DTYPE))  # (n, L) x (L, L) -> (n, L)
                dweight1 += dot(tl.trans(cast(dh, DTYPE)), seen)  # (L, n) x (n, K) -> (L, K)
            tl.debug_barrier()  # what one thread has stored another may load for the next tile
            first += TILE
        i += 1
    at1 = tl.where(k < 9 * I, l[:, None] * (9 * I) + k, 9 * I * L + l[:, None])
    tl.store(convs_ptr + at1, dweight1, mask=k <= 9 * I)  # and the bias
    tl.store(dweight2_ptr + L * L * P * P + l, dbias2)
    # Every part has the whole sum, so the first stores it; the mask needs the shape of c.
    tl.store(dproj_ptr + C * N + c, dbias, mask=part + c * 0 == 0)


def tile_size(step, fp32_size):
    """Return how many patches a kernel takes at once.

    On tensor cores a warp takes 16 rows of a product: 128 patches keep 8 warps busy, and with fewer
    some of them compute the same. In fp32 large tiles spill.
    """
    size = fp32_size if step.target.dtype == torch.float32 else 128
    return min(size, step.a.shape[1])


def num_programs(num_images, num_patches):
    """Return the number of programs of the backward, and of rows of the convolutions' gradients."""
    groups, _ = split(num_images)
    return groups * (num_patches // min(PATCHES, num_patches))


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
        TILE=tile_size(step, fp32_size=64),
        **step.target.options,
    )


def backward(step, dx, num_images):
    """Write the partial gradients of both convolutions, and of proj, given dx (B, T, C)."""
    model = step.model
    stem = model.stem
    I = stem.conv1.in_channels
    P = model.config["patch_size"]
    num_patches = step.a.shape[1]
    _, count = split(num_images)
    stem_backward_kernel[(num_programs(num_images, num_patches),)](
        step.pixels,
        step.counter,
        stem.conv1.weight,
        stem.conv1.bias,
        stem.conv2.weight,
        stem.proj.weight,
        step.a,
        dx,
        step.partials["convs"],
        step.partials["proj"],
        step.batch_size,
        num_images,
        count,
        I=I,
        S=model.config["image_size"],
        P=P,
        K=padded(9 * I),
        L=stem.conv1.out_channels,
        C=dx.shape[2],
        PATCHES=min(PATCHES, num_patches),
        TILE=tile_size(step, fp32_size=32),
        **step.target.options,
    )
