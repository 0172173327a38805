"""Each Triton kernel against PyTorch and float64.

On a GPU where there is one, else in Triton's interpreter. The rule is that of flash-attention's
tests: an error is at most twice (gradients: three times) the one that PyTorch makes in the same
dtype, `own`.
"""

import copy
import dataclasses

import pytest
import torch

pytest.importorskip("triton")  # not on every platform

import triton
import triton.language as tl

from augment import Normalize, augment, epoch_plan
from conftest import DEVICE
from kernels import functions, step, verify
from kernels import augment as augment_module
from kernels.attention import FusedAttention
from schedule import RECIPES
from vit import Attention

DEVICE = torch.device(DEVICE)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_parity(name, actual, reference, dtype, factor=3):
    exact = reference(torch.float64)
    error = verify.relative_error(actual, exact)
    own = verify.relative_error(reference(dtype), exact)
    # What PyTorch happens to hit exactly allows nobody else an error: one rounding is granted.
    assert error <= max(factor * own, torch.finfo(dtype).eps), f"{name}: {error:.1e}, {own:.1e}"


def fused_step(recipe, dtype, num_images=3, **overrides):
    """A FusedStep of batches of 2 random images, with everything that the recipe lacks."""
    recipe = dataclasses.replace(RECIPES[recipe], batch_size=2, l1=1e-4, **overrides)
    return step.FusedStep(step.example_trainer(recipe, DEVICE, dtype, num_images))


# --- each kernel at the sizes of training ---


@pytest.fixture(scope="module")
def fp32_checks():
    fused = fused_step("long", torch.float32, weight_avg_frac=0.9)
    found = list(verify.checks(fused))
    assert fused.finite_counts.tolist() == [2] * len(fused.finite_counts)
    return found


def test_kernels_in_fp32(fp32_checks):
    """Forward, backward, Muon, AdamW and average, in the second step, whose batch is one image."""
    names = " ".join(name for name, _, _ in fp32_checks)
    assert all(part in names for part in ("augment", "head backward", "muon, stem", "average of"))
    for name, actual, reference in fp32_checks:
        assert_parity(name, actual, reference, torch.float32, 2 if "forward" in name else 3)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_kernels_in_half_precision(dtype, monkeypatch):
    """And with several images a program, the last of which has fewer."""
    monkeypatch.setattr(functions, "MAX_PROGRAMS", 1)
    for name, actual, reference in verify.checks(fused_step("original", dtype, 4)):
        assert_parity(name, actual, reference, dtype, 2 if "forward" in name else 3)


def test_self_test_names_the_wrong_kernel(fp32_checks, monkeypatch):
    monkeypatch.setattr(verify, "checks", lambda step: iter(fp32_checks))
    assert step.wrong_kernel(DEVICE, torch.float32) is None
    for i in (0, 4, len(fp32_checks) - 1):
        name, actual, reference = fp32_checks[i]
        for wrong in (actual * 1.02, torch.full_like(actual, float("nan"))):
            found = [*fp32_checks[:i], (name, wrong, reference), *fp32_checks[i + 1 :]]
            monkeypatch.setattr(verify, "checks", lambda step, found=found: iter(found))
            assert step.wrong_kernel(DEVICE, torch.float32).startswith(f"{name}: off by")

    def fail(step):
        functions.last_launched = step_kernel  # where Triton raises
        raise RuntimeError("out of resource: shared memory\nHint")

    step_kernel = step.record_launches(RECIPES["original"])[1][0]
    monkeypatch.setattr(verify, "checks", fail)
    line = step.wrong_kernel(DEVICE, torch.float32)
    assert line == "stem forward does not run here: out of resource: shared memory"


def test_self_test_where_nothing_compiles(monkeypatch):
    assert (step.self_test(torch.device("cpu"), torch.float32) is None) == functions.INTERPRETED
    monkeypatch.setattr(functions, "INTERPRETED", False)
    assert "does not compile for mps" in step.self_test(torch.device("mps"), torch.float32)


@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_attention(dtype, cls_only, monkeypatch):
    """The autograd function, on strided inputs and with three images a program, the last empty."""
    monkeypatch.setattr(functions, "MAX_PROGRAMS", 2)
    torch.manual_seed(0)
    module = Attention(32, 2, 16, cls_only)
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    module.to(DEVICE)
    x = torch.randn(5, 32, 5, device=DEVICE).to(dtype).transpose(1, 2)  # (B, T, C), strided
    x[1], x[2] = 0.5, 0  # rows of variance 0 divide by the root of epsilon
    dz = torch.randn(5, 1, 32, device=DEVICE).to(dtype).expand(5, 1 if cls_only else 5, 32)

    def run(function, x, params):
        x = x.detach().requires_grad_()
        z = function(x)
        return [z.detach(), *torch.autograd.grad(z, [x, *params], dz.to(z.dtype))]

    def reference(dtype):
        like = copy.deepcopy(module).to(dtype)
        return run(like, x.to(dtype), list(like.parameters()))

    params = list(module.parameters())
    actual = run(lambda x: FusedAttention.apply(x, *params, 2, cls_only), x, params)
    assert actual[0].dtype == actual[1].dtype == dtype
    results = {d: reference(d) for d in (dtype, torch.float64)}
    for i, value in enumerate(actual):
        assert_parity(f"{i}", value, lambda d, i=i: results[d][i], dtype, 3 if i else 2)


@pytest.mark.parametrize("cls_only", [False, True])
def test_attention_of_large_scores(cls_only):
    """Scores of +-80: exp of one that is not taken relative to its row's greatest overflows."""
    torch.manual_seed(0)
    module = Attention(32, 2, 16, cls_only).to(DEVICE)
    module.qkv.weight.data[:64] *= 40
    x = torch.randn(2, 33, 32, device=DEVICE)
    q, k, _ = module.qkv(module.norm(x)).view(2, 33, 3, 2, 16).permute(2, 0, 3, 1, 4)
    assert (q @ k.transpose(2, 3) / 4).abs().max() > 80
    z = FusedAttention.apply(x, *module.parameters(), 2, cls_only)
    exact = copy.deepcopy(module).double()(x.double())
    # A score of 80 carries a rounding of 4e-6, which exp makes the relative error of a weight.
    assert verify.relative_error(z.detach(), exact) < 1e-4


AUGMENTATIONS = {
    "nothing": {},
    "reflect": dict(crop_padding=31),
    "wrap": dict(crop_padding=9, padding_mode="wrap", flip_p=0.5),
    "affine": dict(affine_p=0.7, translate=0.9, scale=0.5, degrees=180.0, cutout_p=0.5,
                   cutout_size=31),
    **{name: dataclasses.asdict(recipe) for name, recipe in RECIPES.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation(name):
    """The second batch of a plan, for the second of two ranks."""
    recipe = dataclasses.replace(
        RECIPES["original"], **{"crop_padding": 0, "flip_p": 0.0, "affine_p": 0.0, "cutout_p": 0.0}
    )
    recipe = dataclasses.replace(recipe, **AUGMENTATIONS[name])
    images = torch.randint(0, 256, (13, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
    normalize = Normalize((0.5, 0.4, 0.3), (0.25, 0.2, 0.3), DEVICE)
    plan = epoch_plan(recipe, 13, 32, 0, 0, DEVICE)
    buffers = augment_module.kernel_plan(plan)
    out = torch.zeros(4, 3, 34, 34, device=DEVICE)
    counter = torch.ones(1, dtype=torch.int32, device=DEVICE)
    target = functions.Target.of(DEVICE, torch.float32)
    augment_module.augment(images, buffers, normalize, recipe, counter, out, (6, 2), 4, target)
    rows = plan.at(slice(8, 12))
    expected = augment(images[rows.indices], rows, recipe, normalize)
    assert torch.allclose(out[:, :, 1:-1, 1:-1], expected, rtol=1e-6, atol=1e-4)
    out[:, :, 1:-1, 1:-1] = 0
    assert (out == 0).all()  # the margin is left alone


@triton.jit
def gelu_kernel(x_ptr, y_ptr, grad_ptr, N: tl.constexpr, DTYPE: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + i)
    y, grad = functions.gelu_with_grad(x, DTYPE)
    tl.store(y_ptr + i, functions.gelu(x, DTYPE))
    tl.device_assert(tl.max(tl.abs(y - functions.gelu(x, DTYPE))) == 0)
    tl.store(grad_ptr + i, grad)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's, where GELU is 0
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(dtype):
    """Every finite number of a half precision, and a dense grid of fp32 ones."""
    if dtype == torch.float32:
        tails = torch.logspace(-30, 30, 2**12)
        x = torch.cat([torch.linspace(-14, 14, 2**19), tails, -tails])
    else:
        x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        x = torch.where(x.isfinite(), x, 0).float()
    x = x.to(DEVICE)
    y, grad = torch.empty_like(x), torch.empty_like(x)
    gelu_kernel[(len(x) // 4096,)](x, y, grad, 4096, functions.DTYPES[dtype])
    x = x.double()
    cdf, density = torch.special.ndtr(x), torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5
    error = (y - x * cdf).abs()
    if dtype == torch.bfloat16:  # 0.62 of half a unit in the last place
        assert (error <= 0.62 * 2**-9 * (x * cdf).abs() + 5e-15).all()
    else:
        assert (error <= 2**-23 * x.abs()).all()
    bound = 2**-10 if dtype == torch.bfloat16 else 4e-7
    assert ((grad - cdf - x * density).abs() < bound).all()
