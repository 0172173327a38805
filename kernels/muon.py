"""Muon in one launch for all matrices, one program a matrix, all on chip; optimizers.py says the same in PyTorch.

    S = u u^T, chunk by chunk of u;  five times P = Q P, S = Q S Q, Q = a I + b S + c S^2;  W -= lr P u, chunk by chunk

u is read twice and never stored, and whatever is repeated is (64, 64), as n, the shorter side of every matrix, is at most 64.
"""

import torch
import triton
import triton.language as tl

from kernels.flat import FlatOptimizer
from kernels.functions import padded
from optimizers import COEFFICIENTS, EPS

CHUNK, OPTIONS = 16, {"num_warps": 4}  # of those tried, what spills least
# Three TF32 products of high and low halves are nearly an fp32 one; IEEE ones spill many times as much on NVIDIA's, and
# AMD's matrix cores take fp32 as it is.
PRODUCTS = "ieee" if torch.version.hip else "tf32x3"


@triton.jit
def update_at(gradient_ptr, mean_ptr, i, mask, momentum):
    """The new running mean of gradients and Nesterov's update at places `i`."""
    g = tl.load(gradient_ptr + i, mask=mask, other=0.0)
    m = tl.load(mean_ptr + i, mask=mask, other=0.0)
    m += (1 - momentum) * (g - m)
    return m, g + momentum * (m - g)


@triton.jit
def muon_kernel(
    gradient_ptr,  # (N,)
    settings_ptr,  # (2,): rate, momentum
    coefficients_ptr,  # (STEPS, 3): a, b, c
    layout_ptr,  # (programs, 3), int32: where a matrix begins, its rows, its columns
    parameter_ptr, mean_ptr,  # (N,), changed in place
    decay, eps,
    STEPS: tl.constexpr, SIDE: tl.constexpr, CHUNK: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    layout_ptr += 3 * tl.program_id(0)
    begin, rows, columns = tl.load(layout_ptr), tl.load(layout_ptr + 1), tl.load(layout_ptr + 2)
    lr, momentum = tl.load(settings_ptr), tl.load(settings_ptr + 1)
    n, m = tl.minimum(rows, columns), tl.maximum(rows, columns)
    step_n, step_m = tl.where(rows <= columns, columns, 1), tl.where(rows <= columns, 1, columns)  # a tall matrix is read across
    row, column = tl.arange(0, SIDE)[:, None], tl.arange(0, CHUNK)[None, :]
    square = tl.zeros((SIDE, SIDE), tl.float32)
    start = 0
    while start < m:  # Triton 3.6 interprets no range that ends at a tensor
        i, mask = begin + row * step_n + (start + column) * step_m, (row < n) & (start + column < m)
        _, u = update_at(gradient_ptr, mean_ptr, i, mask, momentum)
        square += tl.dot(u, tl.trans(u), input_precision=PRODUCTS)
        start += CHUNK
    eye = tl.where(row == tl.arange(0, SIDE)[None, :], 1.0, 0.0)
    norm = tl.sqrt(tl.sum(square * eye)) + eps
    square, product = square / (norm * norm), eye
    for step in range(STEPS):
        a, b, c = tl.load(coefficients_ptr + 3 * step), tl.load(coefficients_ptr + 3 * step + 1), tl.load(coefficients_ptr + 3 * step + 2)
        q = a * eye + b * square + c * tl.dot(square, square, input_precision=PRODUCTS)
        product = tl.dot(q, product, input_precision=PRODUCTS)
        square = tl.dot(tl.dot(q, square, input_precision=PRODUCTS), q, input_precision=PRODUCTS)
    size = lr * tl.sqrt(tl.maximum(rows / columns, 1.0)) / norm
    start = 0
    while start < m:
        i, mask = begin + row * step_n + (start + column) * step_m, (row < n) & (start + column < m)
        mean, u = update_at(gradient_ptr, mean_ptr, i, mask, momentum)
        p = tl.load(parameter_ptr + i, mask=mask, other=0.0)
        moved = size * tl.dot(product, u, input_precision=PRODUCTS)
        tl.store(parameter_ptr + i, p * (1 - lr * decay) - moved, mask=mask)
        tl.store(mean_ptr + i, mean, mask=mask)
        start += CHUNK


class Muon(FlatOptimizer):
    """optimizers.Muon for matrices whose shorter side is at most 64, on one device."""

    def __init__(self, parameters, stacked, weight_decay):
        super().__init__(parameters, settings=2)
        layout, begin = [], 0
        for p, count in zip(self.parameters, stacked):
            rows, columns = len(p) // count, p.numel() // len(p)
            layout += [[begin + i * rows * columns, rows, columns] for i in range(count)]
            begin += p.numel()
        self.layout = torch.tensor(layout, dtype=torch.int32, device=self.flat.device)
        self.coefficients = torch.tensor(COEFFICIENTS, device=self.flat.device)
        self.side, self.weight_decay = padded(max(min(shape) for _, *shape in layout)), weight_decay

    def prepare(self, lr, momentum):
        self.tell(lr, momentum)

    def step(self):
        inputs = self.gradient(), self.settings, self.coefficients, self.layout
        numbers = self.weight_decay, EPS, len(COEFFICIENTS)
        with torch.cuda.device_of(self.flat):
            muon_kernel[(len(self.layout),)](*inputs, self.flat, self.mean, *numbers, self.side, CHUNK, PRODUCTS, **OPTIONS)
