"""What the kernels have in common: device functions, and how a kernel is launched.

Numbers: tensors are loaded in the working dtype (fp32 or bf16), sums and statistics are fp32, and a factor of a product
is rounded to the working dtype first, so that bf16 products run on tensor cores. fp32 products are IEEE, not TF32.

Triton's interpreter (TRITON_INTERPRET=1, CPU) computes bf16 wrongly, so there `launch` hands bf16 tensors over as fp32
and `to_working` rounds as bf16 would: the same numbers on a CPU.
"""

import torch
import triton
import triton.language as tl

# How a kernel is compiled: four warps share a program in bf16; in fp32, which runs without tensor cores, eight, or registers spill.
OPTIONS = {torch.bfloat16: {"num_warps": 4, "num_stages": 1}, torch.float32: {"num_warps": 8, "num_stages": 1}}
INTERPRETED = triton.knobs.runtime.interpret  # settled by the environment when a kernel's module is imported


def launch(kernel, programs, dtype, inputs, outputs, *numbers, **constants):
    """Run `kernel(*inputs, *outputs, *numbers)` as `programs` programs on the tensors' own device.

    `dtype`, torch.float32 or torch.bfloat16, is the working dtype.
    """
    tensors, name = (*inputs, *outputs), {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    if INTERPRETED and name == "bf16":
        name, originals = "rounded", tensors
        tensors = [in_float32(tensor) if tensor.dtype == dtype else tensor for tensor in originals]
    with torch.cuda.device_of(tensors[0]):
        kernel[(programs,)](*tensors, *numbers, DTYPE=name, **constants)
    if name == "rounded":
        for output, result in zip(outputs, tensors[len(inputs) :]):
            if output is not result:
                output.copy_(result)


def in_float32(tensor):
    """A copy in float32 with the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.float32).copy_(tensor)


def padded(size):
    """The power of two, at least 16, to which a kernel pads one side of a product."""
    return max(16, triton.next_power_of_2(size))


def split(flat, *like):
    """`flat` (N,) in consecutive pieces of the shapes and dtypes of the tensors `like`."""
    pieces = flat.split([tensor.numel() for tensor in like])
    return [piece.view(tensor.shape).to(tensor.dtype) for piece, tensor in zip(pieces, like)]


@triton.jit
def to_working(x, DTYPE: tl.constexpr):
    """fp32 `x` in the working dtype: "fp32", "bf16", or "rounded", bf16's values kept in fp32 (nearest, ties to even)."""
    if DTYPE == "bf16":
        x = x.to(tl.bfloat16)
    elif DTYPE == "rounded":
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x


@triton.jit
def load(pointers, DTYPE: tl.constexpr, mask=True):
    """Weights, which lie in memory as fp32, in the working dtype, zero where `mask` is false."""
    return to_working(tl.load(pointers, mask=mask, other=0.0), DTYPE)


@triton.jit
def dot(a, b):
    """The matrix product of two working-dtype matrices, in fp32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def standardize(x, EPS: tl.constexpr):
    """Rows of fp32 x (N, C) to mean 0 and variance 1, and the reciprocal deviation (N,), as LayerNorm has them."""
    centred = x - tl.sum(x, 1)[:, None] / x.shape[1]
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / x.shape[1] + EPS)
    return centred * rstd[:, None], rstd


@triton.jit
def scaled(standard, weight_ptr, bias_ptr, DTYPE: tl.constexpr):
    """LayerNorm's second half, weight and bias (C,) on standardized rows (N, C), in the working dtype."""
    c = tl.arange(0, standard.shape[1])
    return to_working(standard * tl.load(weight_ptr + c) + tl.load(bias_ptr + c), DTYPE)


@triton.jit
def standardize_backward(gradient, standard, rstd):
    """The gradient with respect to x of `standardize(x)`, given that with respect to its first result."""
    C: tl.constexpr = gradient.shape[1]
    mean = tl.sum(gradient, 1)[:, None] / C
    along = tl.sum(gradient * standard, 1)[:, None] / C
    return rstd[:, None] * (gradient - mean - standard * along)


@triton.jit
def normal_tail(a, DTYPE: tl.constexpr):
    """Phi(-a), the normal distribution's tail beyond a >= 0, as 2 to the power of a polynomial.

    log2 Phi(-a) is so smooth that a few terms do: for bf16 a minimax fit over [0, 8] (relative error 1.2e-3, where
    half a unit of bf16 is 2.0e-3), for fp32 one of a Phi(-a), the share of GELU's error, over [0, 5.8] (7.5e-9). Both
    leading terms are negative, so beyond the fit the tail vanishes faster than it should, never grows.
    """
    if DTYPE == "fp32":
        p = -2.77204913e-06 * a + 3.86207466e-05
        p = p * a - 0.000182547592
        p = p * a - 0.000145870144
        p = p * a + 0.0070754718
        p = p * a - 0.0525050275
        p = p * a - 0.459204912
        p = p * a - 1.15110576
        p = p * a - 1.0
    else:
        p = -0.000115073861 * a + 0.00314975134
        p = p * a - 0.0358908214
        p = p * a - 0.487466604
        p = p * a - 1.13379872
        p = p * a - 1.00171387
    return tl.exp2(p)


@triton.jit
def gelu(x, DTYPE: tl.constexpr):
    """x Phi(x) of fp32 x, exact GELU: 8 instructions an element in bf16 where erf takes 32.

    Error, measured over every finite bf16 number and 4 million fp32 ones in [-14, 14]: bf16, within 0.61 of half a unit
    in the last place where the result is above 5e-15; fp32, within 0.8 * 2^-23 |x|.
    """
    a = tl.abs(x)
    return tl.maximum(x, 0.0) - a * normal_tail(a, DTYPE)


@triton.jit
def gelu_and_derivative(x, DTYPE: tl.constexpr):
    """gelu(x) and its derivative Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi), of fp32 x."""
    a = tl.abs(x)
    tail = normal_tail(a, DTYPE)
    # exp(-a^2 / 2) / sqrt(2 pi) as a power of 2, whose logarithm is -a^2 log2(e) / 2 - log2(2 pi) / 2
    density = tl.exp2(a * a * -0.72134752 - 1.32574807)
    left = tail - a * density  # the derivative at -a; that at a is 1 minus it
    return tl.maximum(x, 0.0) - a * tail, tl.where(x < 0, left, 1.0 - left)
