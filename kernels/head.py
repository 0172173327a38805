"""Norm, head, cross entropy and their backward in one launch; vit.ViT and F.cross_entropy.

    y = LayerNorm(x),  logits = y W' + b,  p = softmax(logits / T)
    loss = -T sum(target log p),  target = onehot(label), or a teacher's probabilities
    dlogits = p - target,  dW = dlogits' y,  db = colsum(dlogits),
    dx = the gradient of dlogits W through LayerNorm

A program takes R images. All but x and dx is fp32 whatever the working dtype: these products are a
thousandth of the network's. Gradients are those of the sum of losses, not the mean (see step.py).

Letters: B batch, C width (64), K classes, KP: K padded, T temperature, 1 without a teacher.
"""

import triton
import triton.language as tl

from kernels.functions import cast, dot, launch, layer_norm_backward, load_norm, padded

ROWS = 16


@triton.jit(do_not_specialize=["batch_size", "B"])
def head_kernel(
    x_ptr,  # (B, C), working dtype
    norm_weight_ptr, norm_bias_ptr,  # (C,)
    weight_ptr, bias_ptr,  # (K, C), (K,)
    labels_ptr, targets_ptr,  # (N,), int64; the same, or (N, K); in the order of the epoch
    counter_ptr,  # (1,), int32, steps done in the epoch
    dx_ptr,  # (B, C), working dtype
    partial_ptr,  # (programs, 2C + KC + K + 2), of norm, weight, bias; sum of losses; correct
    batch_size, B,  # images of a full batch on this rank, of this batch
    K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr,
    T: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    b, c, k = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, C), tl.arange(0, KP)
    offsets, mask = b.to(tl.int64)[:, None] * C + c[None, :], b[:, None] < B
    _, y, x_hat, rstd = load_norm(x_ptr, offsets, mask, norm_weight_ptr, norm_bias_ptr)
    at, in_weight = k[:, None] * C + c[None, :], k[:, None] < K
    weight = tl.load(weight_ptr + at, mask=in_weight, other=0.0)  # (KP, C)
    logits = dot(y, tl.trans(weight)) + tl.load(bias_ptr + k, mask=k < K, other=0.0)[None, :]
    logits = tl.where(k[None, :] < K, logits, -float("inf"))  # (R, KP)

    row = tl.load(counter_ptr).to(tl.int64) * batch_size + b
    label = tl.load(labels_ptr + row, mask=b < B, other=0).to(tl.int32)
    correct = (tl.argmax(logits, 1) == label) & (b < B)
    logits /= T
    shifted = logits - tl.max(logits, 1)[:, None]
    total = tl.sum(tl.exp(shifted), 1)
    in_target = mask & (k[None, :] < K)
    if SOFT:
        target = tl.load(targets_ptr + row[:, None] * K + k[None, :], mask=in_target, other=0.0)
    else:
        target = tl.where(k[None, :] == label[:, None], 1.0, 0.0)
    log_p = tl.where(in_target, shifted - tl.log(total)[:, None], 0.0)
    loss = -T * tl.sum(target * log_p, 1)  # 0 for a row that is no image
    dlogits = tl.where(in_target, tl.exp(log_p) - target, 0.0)

    partial_ptr += tl.program_id(0).to(tl.int64) * (2 * C + K * C + K + 2)
    dy = dot(dlogits, weight)  # (R, KP) x (KP, C) -> (R, C)
    tl.store(partial_ptr + c, tl.sum(dy * x_hat, 0))
    tl.store(partial_ptr + C + c, tl.sum(dy, 0))
    dweight = dot(tl.trans(dlogits), y)  # (KP, R) x (R, C) -> (KP, C)
    tl.store(partial_ptr + 2 * C + at, dweight, mask=in_weight)
    tl.store(partial_ptr + 2 * C + K * C + k, tl.sum(dlogits, 0), mask=k < K)
    tl.store(partial_ptr + 2 * C + K * C + K, tl.sum(loss, 0))
    tl.store(partial_ptr + 2 * C + K * C + K + 1, tl.sum(correct.to(tl.float32), 0))
    dx = layer_norm_backward(dy, x_hat, rstd, norm_weight_ptr)
    tl.store(dx_ptr + offsets, cast(dx, DTYPE), mask=mask)


def num_programs(num_images):
    """Programs of the kernel, which is the rows of its partial gradients."""
    return triton.cdiv(num_images, ROWS)


def forward_backward(state, num_images):
    """Write state.dx[-1], and partial gradients of norm and head, loss and correct."""
    norm, head = state.model.norm, state.model.head
    K, C = head.weight.shape
    args = state.x[-1], *norm.parameters(), *head.parameters(), state.labels, state.targets
    args = *args, state.counter, state.dx[-1], state.partials["head"], state.batch_size, num_images
    sizes = {"K": K, "KP": padded(K), "C": C, "R": ROWS, **state.target.options}
    sizes |= {"T": state.trainer.temperature, "SOFT": state.targets.dim() == 2}
    launch(head_kernel, num_programs(num_images), *args, **sizes)
