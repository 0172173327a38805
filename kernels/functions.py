"""What the kernels share: device functions, and what suits which GPU.

Activations lie in the working dtype, fp32 or bf16. Weights, statistics, sums and partial gradients
are fp32; a factor of a product is rounded to the working dtype first, so that bf16 products run on
tensor cores. fp32 products are IEEE, not TF32. A GPU before sm_80 has no bf16.

Triton's interpreter (TRITON_INTERPRET=1, on a CPU) computes bf16 wrongly, so there every buffer is
float32, and `cast` rounds to the values that bf16 has: the same numbers, on a CPU.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # fixed when a module with kernels is imported
EMULATED = tl.constexpr(INTERPRETED)
EPS = tl.constexpr(1e-5)  # of torch.nn.LayerNorm
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
MAX_PROGRAMS = 256  # with partial gradients: in a larger batch a program takes several images

# Columns of FusedStep.hparams, which has a row for every step of an epoch.
MUON_LR = tl.constexpr(0)
MOMENTUM = tl.constexpr(1)  # beta1 of AdamW
ONE_MINUS_MOMENTUM = tl.constexpr(2)  # made in float64: in fp32 it is off by up to 6e-7
ADAMW_LR = tl.constexpr(3)
CORRECTION1 = tl.constexpr(4)  # 1 - beta1^n, n steps since the training began
CORRECTION2 = tl.constexpr(5)  # 1 - beta2^n
NUM_HPARAMS = tl.constexpr(6)


class Target(NamedTuple):
    """The working dtype of kernels and the GPU that they are compiled for."""

    dtype: torch.dtype
    arch: int = 90  # 10 times the compute capability

    @classmethod
    def of(cls, device, dtype):
        """Return the target that is present: a GPU, or Triton's interpreter on a CPU."""
        if device.type != "cuda":
            return cls(dtype)
        major, minor = torch.cuda.get_device_capability(device)
        return cls(dtype, 10 * major + minor)

    @property
    def storage(self):
        """The dtype of buffers of activations."""
        return torch.float32 if INTERPRETED else self.dtype

    def num_warps(self, uses_tensor_cores):
        """Return the number of warps of a program: 8 spill least of those tried.

        But wgmma (sm_90) is unsafe with more than 4: by Triton's bug 11047 a barrier is missing
        between warp groups. On sm_100 4 spill less too.
        """
        return 4 if uses_tensor_cores and self.arch // 10 in (9, 10) else 8

    @property
    def options(self):
        """Arguments of a launch that depend on dtype and GPU."""
        return {
            "DTYPE": DTYPES[self.dtype],
            "num_warps": self.num_warps(uses_tensor_cores=self.dtype == torch.bfloat16),
            "num_stages": 1,
        }


def padded(size):
    """Return the power of two, at least 16, to which a kernel pads one side of a product."""
    return max(16, triton.next_power_of_2(size))


def split(count):
    """Return how many programs share `count` images, and how many images each has.

    Each program of a backward kernel writes a row of partial gradients.
    """
    images_each = max(1, triton.cdiv(count, MAX_PROGRAMS))
    return triton.cdiv(count, images_each), images_each


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """Return fp32 `x` in the working dtype, in the interpreter rounded to it."""
    if DTYPE == "bf16":
        if EMULATED:  # to nearest, ties to even
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = bits.to(tl.float32, bitcast=True)
        else:
            x = x.to(tl.bfloat16)
    return x


@triton.jit
def load(pointers, DTYPE: tl.constexpr, mask=True):
    """Return fp32 values of memory in the working dtype, zero where `mask` is false."""
    return cast(tl.load(pointers, mask=mask, other=0.0), DTYPE)


@triton.jit
def accumulate(pointers, value, is_later):
    """Store a program's partial gradient, or add to what its earlier images left there."""
    tl.store(pointers, value + tl.load(pointers, mask=is_later, other=0.0))


@triton.jit
def dot(a, b):
    """Return the matrix product, in fp32, of two matrices in the working dtype."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_norm(x_ptr, offsets, mask, weight_ptr, bias_ptr):
    """Load rows of x (N, C), zeros where `mask` is false, and compute LayerNorm y of them.

    Returns x, y, x_hat, which has mean 0 and variance 1, and 1 / std (N,); all fp32.
    """
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    centered = x - tl.sum(x, 1)[:, None] / x.shape[1]
    rstd = tl.rsqrt(tl.sum(centered * centered, 1) / x.shape[1] + EPS)
    x_hat = centered * rstd[:, None]
    c = tl.arange(0, x.shape[1])
    y = x_hat * tl.load(weight_ptr + c)[None, :] + tl.load(bias_ptr + c)[None, :]
    return x, y, x_hat, rstd


@triton.jit
def layer_norm_backward(dy, x_hat, rstd, weight_ptr):
    """Return the gradient of x, given that of y, which load_norm returns."""
    C: tl.constexpr = dy.shape[1]
    grad = dy * tl.load(weight_ptr + tl.arange(0, C))[None, :]
    mean = tl.sum(grad, 1)[:, None] / C
    along = tl.sum(grad * x_hat, 1)[:, None] / C
    return rstd[:, None] * (grad - mean - x_hat * along)


@triton.jit
def gelu(x):
    """Return exact GELU of fp32 x, x P(Z < x), error within 2^-23 |x|, and its derivative.

    P(Z > |x|) is 2 to the power of a polynomial, which takes fewer instructions than erf. Its log2
    is so smooth that a few terms do: a minimax fit of a P(Z > a), its share of GELU, over [0, 5.8],
    error 7.5e-9. The leading term is negative, so beyond the fit the value vanishes faster than it
    should, and never grows.
    """
    a = tl.abs(x)
    p = -2.77204913e-06 * a + 3.86207466e-05
    p = p * a - 0.000182547592
    p = p * a - 0.000145870144
    p = p * a + 0.0070754718
    p = p * a - 0.0525050275
    p = p * a - 0.459204912
    p = p * a - 1.15110576
    tail = tl.exp2(p * a - 1.0)
    # The normal density as a power of 2, of -a^2 log2(e) / 2 - log2(2 pi) / 2.
    density = tl.exp2(a * a * -0.72134752 - 1.32574807)
    left = tail - a * density  # the derivative at -a; that at a is 1 minus it
    return tl.maximum(x, 0.0) - a * tail, tl.where(x < 0, left, 1.0 - left)
