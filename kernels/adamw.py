"""AdamW in one launch for all parameters, rate and momentum read from the device, so that a CUDA graph can hold the step.

    m += (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2,
    p = p (1 - lr decay) - lr m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + eps)

torch.optim.AdamW computes the same, but its fused form takes beta1, which OneCycle moves, as a number of the host's, and
a graph would repeat the first one for ever. Loshchilov & Hutter 2017, arXiv:1711.05101.
"""

import torch
import triton
import triton.language as tl

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


class AdamW:
    """AdamW for float32 parameters on one device, `decayed` with `weight_decay` and `others` without.

    The parameters become views of one tensor. `prepare` tells the device the next step's rate and beta1; `step`, which
    reads nothing from the host, makes it.
    """

    def __init__(self, decayed, others, weight_decay, beta2, eps):
        self.parameters = [*decayed, *others]
        self.decayed = sum(p.numel() for p in decayed)
        self.weight_decay, self.beta2, self.eps, self.count = weight_decay, beta2, eps, 0
        self.flat = torch.cat([p.detach().flatten() for p in self.parameters])
        for parameter, piece in zip(self.parameters, self.flat.split([p.numel() for p in self.parameters])):
            parameter.data = piece.view(parameter.shape)
        self.mean, self.square = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.settings = torch.zeros(4, device=self.flat.device)

    def prepare(self, lr, momentum):
        self.count += 1
        settings = [lr, momentum, 1 - momentum**self.count, 1 - self.beta2**self.count]
        self.settings.copy_(torch.tensor(settings), non_blocking=True)

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None

    def step(self):
        gradient = torch.cat([p.grad.flatten() for p in self.parameters])
        numbers = len(self.flat), self.decayed, self.weight_decay, self.beta2, self.eps
        with torch.cuda.device_of(self.flat):
            adamw_kernel[(triton.cdiv(len(self.flat), BLOCK),)](gradient, self.settings, self.flat, self.mean, self.square, *numbers, BLOCK)

    def state_dict(self):
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state):
        self.count = state["count"]
        self.mean.copy_(state["mean"])
        self.square.copy_(state["square"])
