"""LayerNorm of the CLS token, head, cross entropy and their backward, in one launch.

    y = LayerNorm(x),  logits = y W' + b,  p = softmax(logits),  loss = -log p[label]
    dlogits = p - onehot(label),  dW = dlogits' y,  db = dlogits,  dy = dlogits W,
    dx = the gradient through LayerNorm

A program takes one image, or several where the batch is large. All but x and dx is fp32 whatever
the working dtype: these products are a thousandth of the network's. Gradients are those of the sum
of losses, not the mean (see step.py).

Letters: B batch, C width (64), K classes, KP: padded to a power of two.
"""

import triton
import triton.language as tl

from kernels.functions import cast, layer_norm_backward, load_norm, split


@triton.jit(do_not_specialize=["batch_size", "B", "count"])
def head_kernel(
    x_ptr,  # (B, C), working dtype
    norm_weight_ptr,  # (C,)
    norm_bias_ptr,  # (C,)
    weight_ptr,  # (K, C)
    bias_ptr,  # (K,)
    labels_ptr,  # (N,), int64, in the order of the epoch
    counter_ptr,  # (1,), int32, steps done in the epoch
    dx_ptr,  # (B, C), working dtype
    partial_ptr,  # (programs, 2C + KC + K + 2), of norm and head; sum of losses; correct
    batch_size,  # images of a full batch on this rank
    B,  # images of this batch
    count,  # images of a program
    C: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row = tl.arange(0, 1)[:, None]
    c = tl.arange(0, C)
    k = tl.arange(0, KP)
    in_weight = k[:, None] < K
    at = k[:, None] * C + c[None, :]
    weight = tl.load(weight_ptr + at, mask=in_weight, other=0.0)  # (KP, C)
    bias = tl.load(bias_ptr + k, mask=k < K, other=0.0)
    dnorm_weight = tl.zeros((C,), tl.float32)
    dnorm_bias = tl.zeros((C,), tl.float32)
    dweight = tl.zeros((KP, C), tl.float32)
    dbias = tl.zeros((KP,), tl.float32)
    total = 0.0
    correct = 0.0
    i = 0
    while i < count:
        # The image's token and label; the last program may have fewer images than others.
        b = tl.program_id(0).to(tl.int64) * count + i
        offsets = (b + row) * C + c[None, :]
        mask = b + row < B
        _, y, x_hat, rstd = load_norm(x_ptr, offsets, mask, norm_weight_ptr, norm_bias_ptr)
        y = tl.sum(y, 0)  # (1, C) -> (C,)
        place = tl.load(counter_ptr).to(tl.int64) * batch_size + b
        label = tl.load(labels_ptr + place, mask=b < B, other=-1).to(tl.int32)
        target = tl.where(k == label, 1.0, 0.0)  # all 0 without an image

        # Logits and loss.
        logits = tl.where(k < K, tl.sum(weight * y[None, :], 1) + bias, -float("inf"))  # (KP,)
        shifted = logits - tl.max(logits, 0)
        log_p = tl.where(k < K, shifted - tl.log(tl.sum(tl.exp(shifted), 0)), 0.0)
        total -= tl.sum(target * log_p, 0)
        correct += tl.where(tl.argmax(logits, 0) == label, 1.0, 0.0)

        # Backward through head and LayerNorm.
        dlogits = tl.where((k < K) & (b < B), tl.exp(log_p) - target, 0.0)
        dweight += dlogits[:, None] * y[None, :]
        dbias += dlogits
        dy = tl.sum(dlogits[:, None] * weight, 0)[None, :]  # (1, C)
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


def forward_backward(step, x, dx, num_images):
    """Write dx of the CLS token x, both (B, 1, C), and partial gradients, loss and correct.

    `step` is the FusedStep.
    """
    norm = step.model.norm
    head = step.model.head
    K, C = head.weight.shape
    programs, count = split(num_images)
    head_kernel[(programs,)](
        x,
        norm.weight,
        norm.bias,
        head.weight,
        head.bias,
        step.labels,
        step.counter,
        dx,
        step.partials["head"],
        step.batch_size,
        num_images,
        count,
        C=C,
        K=K,
        KP=triton.next_power_of_2(K),
        **step.target.options,
    )
