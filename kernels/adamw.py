"""AdamW in one launch for all parameters, rate and momentum read from the device, so that a CUDA graph can hold the step.

    m += (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2,
    p = p (1 - lr decay) - lr m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + eps)

torch.optim.AdamW computes the same, but its fused form takes beta1, which OneCycle moves, as a number of the host's, and
a graph would repeat the first one for ever. Loshchilov & Hutter 2017, arXiv:1711.05101.
"""

import torch
import triton
import triton.language as tl

from kernels.flat import FlatOptimizer

BLOCK = 1024


@triton.jit
def adamw_kernel(
    gradient_ptr,  # (N,)
    settings_ptr,  # (4,): rate, beta1, 1 - beta1^n, 1 - beta2^n
    parameter_ptr, mean_ptr, square_ptr,  # (N,), changed in place
    N, decayed, decay, beta2, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lr, beta1 = tl.load(settings_ptr), tl.load(settings_ptr + 1)
    correction1, correction2 = tl.load(settings_ptr + 2), tl.load(settings_ptr + 3)
    g = tl.load(gradient_ptr + i, mask=i < N, other=0.0)
    p = tl.load(parameter_ptr + i, mask=i < N, other=0.0)
    m = tl.load(mean_ptr + i, mask=i < N, other=0.0)
    v = tl.load(square_ptr + i, mask=i < N, other=0.0)
    m += (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    p *= 1 - lr * tl.where(i < decayed, decay, 0.0)
    p -= lr * (m / correction1) / (tl.sqrt(v / correction2) + eps)
    tl.store(parameter_ptr + i, p, mask=i < N)
    tl.store(mean_ptr + i, m, mask=i < N)
    tl.store(square_ptr + i, v, mask=i < N)


class AdamW(FlatOptimizer):
    """AdamW, `decayed` with `weight_decay` and `others` without; `prepare` comes before every step."""

    def __init__(self, decayed, others, weight_decay, beta2, eps):
        super().__init__([*decayed, *others], settings=4)
        self.decayed = sum(p.numel() for p in decayed)
        self.weight_decay, self.beta2, self.eps, self.count = weight_decay, beta2, eps, 0
        self.square = torch.zeros_like(self.flat)

    def prepare(self, lr, momentum):
        self.count += 1
        self.tell(lr, momentum, 1 - momentum**self.count, 1 - self.beta2**self.count)

    def step(self):
        numbers = len(self.flat), self.decayed, self.weight_decay, self.beta2, self.eps
        with torch.cuda.device_of(self.flat):
            adamw_kernel[(triton.cdiv(len(self.flat), BLOCK),)](
                self.gradient(), self.settings, self.flat, self.mean, self.square, *numbers, BLOCK
            )

    def state_dict(self):
        return {**super().state_dict(), "count": self.count, "square": self.square}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.count = state["count"]
        self.square.copy_(state["square"])
