"""Norm, head, cross entropy and their backward in one launch; vit.ViT and Trainer.losses.

    y = LayerNorm(x),  u = y of the CLS token, or the mean of all other y,  logits = u W' + b
    p = softmax(logits / T),  loss = -T sum(target log p),  target = onehot(label), or a teacher's
    dlogits = p - target,  for the mean token times aux_weight,  dW = dlogits' u,  db = dlogits
    dx = the gradient of dlogits W through mean and LayerNorm

A program takes one image, or several where the batch is large. Without a second loss, x is the CLS
token alone. All but x and dx is fp32 whatever the working dtype: these products are a thousandth of
the network's. Gradients are those of the sum of losses, not the mean (see step.py).

Letters: B batch, Q tokens (33, or 1), C width (64), K classes, QP and KP: padded, T temperature, 1
without a teacher.
"""

import triton
import triton.language as tl

from kernels.functions import cast, launch, layer_norm_backward, load_norm, split


@triton.jit
def classify(u, weight, bias, target, K: tl.constexpr, T: tl.constexpr):
    """logits (KP,), loss and dlogits (KP,) of u (C,)."""
    k = tl.arange(0, bias.shape[0])
    logits = tl.where(k < K, tl.sum(weight * u[None, :], 1) + bias, -float("inf"))
    shifted = (logits - tl.max(logits, 0)) / T
    log_p = tl.where(k < K, shifted - tl.log(tl.sum(tl.exp(shifted), 0)), 0.0)
    return logits, -T * tl.sum(target * log_p, 0), tl.where(k < K, tl.exp(log_p) - target, 0.0)


@triton.jit(do_not_specialize=["batch_size", "B", "count"])
def head_kernel(
    x_ptr,  # (B, Q, C), working dtype
    norm_weight_ptr, norm_bias_ptr,  # (C,)
    weight_ptr, bias_ptr,  # (K, C), (K,)
    labels_ptr, targets_ptr,  # (N,), int64; the same, or (N, K); in the order of the epoch
    counter_ptr,  # (1,), int32, steps done in the epoch
    aux_weight_ptr,  # (1,)
    dx_ptr,  # (B, Q, C), working dtype
    partial_ptr,  # (programs, 2C + KC + K + 2), of norm, weight, bias; sum of losses; correct
    batch_size, B, count,  # images of a full batch on this rank, of this batch, of a program
    Q: tl.constexpr, QP: tl.constexpr, C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    DTYPE: tl.constexpr, T: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    t, c, k = tl.arange(0, QP)[:, None], tl.arange(0, C), tl.arange(0, KP)
    at, in_weight = k[:, None] * C + c[None, :], k[:, None] < K
    weight = tl.load(weight_ptr + at, mask=in_weight, other=0.0)  # (KP, C)
    bias = tl.load(bias_ptr + k, mask=k < K, other=0.0)
    dnorm_weight, dnorm_bias = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    dweight, dbias = tl.zeros((KP, C), tl.float32), tl.zeros((KP,), tl.float32)
    total, correct = 0.0, 0.0
    i = 0
    while i < count:
        b = tl.program_id(0).to(tl.int64) * count + i
        num_rows, is_image = tl.where(b < B, Q, 0), tl.where(b < B, 1.0, 0.0)
        offsets, mask = (b * Q + t) * C + c[None, :], t < num_rows
        _, y, x_hat, rstd = load_norm(x_ptr, offsets, mask, norm_weight_ptr, norm_bias_ptr)
        row = tl.load(counter_ptr).to(tl.int64) * batch_size + b
        label = tl.load(labels_ptr + row, mask=b < B, other=-1).to(tl.int32)
        if SOFT:
            target = tl.load(targets_ptr + row * K + k, mask=(k < K) & (b < B), other=0.0)
        else:
            target = tl.where(k == label, 1.0, 0.0)

        u = tl.sum(tl.where(t == 0, y, 0.0), 0)  # (C,)
        logits, loss, dlogits = classify(u, weight, bias, target, K, T)
        total += loss  # 0 without a target
        correct += tl.where(tl.argmax(logits, 0) == label, 1.0, 0.0)
        dlogits *= is_image
        dweight += dlogits[:, None] * u[None, :]
        dbias += dlogits
        dy = tl.where(t == 0, tl.sum(dlogits[:, None] * weight, 0)[None, :], 0.0)  # (QP, C)
        if Q > 1:
            others = (t > 0) & (t < Q)
            u = tl.sum(tl.where(others, y, 0.0), 0) / (Q - 1)
            _, _, dlogits = classify(u, weight, bias, target, K, T)
            dlogits *= is_image * tl.load(aux_weight_ptr)
            dweight += dlogits[:, None] * u[None, :]
            dbias += dlogits
            du = tl.sum(dlogits[:, None] * weight, 0) / (Q - 1)
            dy += tl.where(others, du[None, :], 0.0)

        dnorm_weight += tl.sum(dy * x_hat, 0)
        dnorm_bias += tl.sum(dy, 0)
        dx = layer_norm_backward(dy, x_hat, rstd, norm_weight_ptr)
        tl.store(dx_ptr + offsets, cast(dx, DTYPE), mask=mask)
        i += 1
    partial_ptr += tl.program_id(0).to(tl.int64) * (2 * C + K * C + K + 2)
    tl.store(partial_ptr + c, dnorm_weight)
    tl.store(partial_ptr + C + c, dnorm_bias)
    tl.store(partial_ptr + 2 * C + at, dweight, mask=in_weight)
    tl.store(partial_ptr + 2 * C + K * C + k, dbias, mask=k < K)
    tl.store(partial_ptr + 2 * C + K * C + K, total)
    tl.store(partial_ptr + 2 * C + K * C + K + 1, correct)


def forward_backward(state, x, dx, num_images):
    """Write dx of x, both (B, Q, C), and partial gradients of norm and head, loss and correct."""
    norm, head, (programs, count) = state.model.norm, state.model.head, split(num_images)
    (K, C), Q = head.weight.shape, x.shape[1]
    args = x, *norm.parameters(), *head.parameters(), state.labels, state.targets, state.counter
    args = *args, state.aux_weight, dx, state.partials["head"], state.batch_size, num_images, count
    QP, KP = map(triton.next_power_of_2, (Q, K))
    sizes = {"Q": Q, "QP": QP, "C": C, "K": K, "KP": KP, "T": state.trainer.temperature}
    sizes["SOFT"] = state.targets.dim() == 2
    launch(head_kernel, programs, *args, **sizes, **state.target.options)
