"""Each Triton kernel against PyTorch and float64.

On a GPU where there is one, else in Triton's interpreter. The rule is that of flash-attention's
tests: an error is at most twice (gradients: three times) PyTorch's in the same dtype, `own`.
"""

import copy
import dataclasses
import math

import pytest
import torch

pytest.importorskip("triton")  # not on every platform

import triton
import triton.language as tl

import data
from cli import UsageError
from conftest import DEVICE, make_trainer
from kernels import functions, verify
from kernels.attention import FusedAttention
from kernels.verify import relative_error
from schedule import RECIPES
from vit import Attention

DEVICE = torch.device(DEVICE)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_parity(name, actual, exact, pt, dtype):
    error, own = relative_error(actual, exact), relative_error(pt, exact)
    # What PyTorch happens to hit exactly allows nobody else an error: one rounding is granted.
    bound = max((2 if name in ("forward", "the loss") else 3) * own, torch.finfo(dtype).eps)
    assert error <= bound, f"{name}: {error:.1e}, {own:.1e}"


def fused_step(recipe, dtype, num_images=3, teacher=False, **overrides):
    """The FusedStep of a Trainer of noise, with batches of 2 and with L1, which most recipes lack.

    Gradients of smooth images have small singular values, of which Muon makes rounding errors.
    """
    recipe = dataclasses.replace(RECIPES[recipe], **{"batch_size": 2, "l1": 1e-4, **overrides})
    dataset, generator = data.load_shapes(num_images, 10), torch.Generator().manual_seed(0)
    noise = torch.randint(256, (num_images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tensors = {"train_images": noise.to(DEVICE), "train_labels": dataset.train_labels.to(DEVICE)}
    if teacher:
        tensors["teacher_logits"] = 3 * torch.randn(num_images, 10, generator=generator).to(DEVICE)
    dataset = dataclasses.replace(dataset, **tensors)
    runtime = {"device": DEVICE.type, "precision": functions.DTYPES[dtype], "kernels": "triton"}
    return make_trainer(dataset, recipe, **runtime).fused_step


@pytest.mark.parametrize("recipe, dtype", [*zip(("default", "original", "original"), DTYPES)])
def test_kernels_at_the_sizes_of_training(recipe, dtype, monkeypatch):
    """One image a program in fp32, else two, the second of which may be missing; soft in bf16.

    Without a second loss in fp16.
    """
    if dtype != torch.float32:
        monkeypatch.setattr(functions, "MAX_PROGRAMS", 2)
    batch_size = 2 if recipe == "default" else 3
    options = {"batch_size": batch_size, "aux_weight": 0.0 if dtype == torch.float16 else 0.5}
    step = fused_step(recipe, dtype, teacher=dtype == torch.bfloat16, **options)
    results = verify.train_and_compare(step, [torch.float64, dtype])
    names = " ".join(name for name, *_ in results)
    assert all(part in names for part in ("the loss", "gradient of cls_token", "adamw, pos"))
    assert ("muon, stem.conv1.weight" in names) == (recipe == "default")
    for name, actual, exact, pt in results:
        assert_parity(name, actual, exact, pt, dtype)


def test_self_test(monkeypatch):
    """What it finds on a GPU, and that it leaves no trace."""
    step, ones, seen = fused_step("long", torch.float32), torch.ones(2), []
    kernel, before = verify.record_launches(step, 2, False)[0][0], step.param.clone()

    def line(wrong):
        def train_and_compare(step, dtypes):
            seen.append(step.trainer.aux_weight)
            step.param += 1
            step.totals += 1
            functions.last_launched = kernel  # where Triton raises
            if wrong is None:
                raise RuntimeError("out of resource\nHint")
            return [("muon, a", torch.tensor([1.0, wrong]), ones)]

        monkeypatch.setattr(verify, "train_and_compare", train_and_compare)
        return verify.self_test(step)

    assert line(1.0) is None and sorted(seen) == [0.0, 0.5]  # with and without a second loss
    assert line(1.02).startswith("muon, a: off by") and line(math.nan).startswith("muon, a: off")
    assert line(None) == "stem forward does not run here: out of resource"
    assert torch.equal(step.param, before) and step.totals.tolist() == [0.0, 0.0]


def test_checked_step(monkeypatch, capsys):
    """A kernel that fails costs the kernels, not the training, unless the user asks for them."""
    trainer = fused_step("original", torch.float32).trainer
    assert verify.checked_step(trainer) is not None
    monkeypatch.setattr(verify, "self_test", lambda step: "mlp forward does not run here")
    monkeypatch.setattr(trainer.runtime, "device", torch.device("cuda"))
    with pytest.raises(UsageError, match="triton: mlp forward"):
        verify.checked_step(trainer)
    monkeypatch.setattr(trainer.runtime, "kernels", "auto")
    assert verify.checked_step(trainer) is None
    trainer.dataset = dataclasses.replace(trainer.dataset, class_names=("a",) * 300)
    assert verify.checked_step(trainer) is None
    trainer.recipe = dataclasses.replace(trainer.recipe, optimizer="sgd")
    assert verify.checked_step(trainer) is None
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "kernels: mlp forward does not run here; the network runs in plain PyTorch"
    assert "300 classes" in second and "SGD" in third


@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_attention(dtype, cls_only, monkeypatch):
    """The autograd function, on strided inputs and with three images a program, the last empty."""
    monkeypatch.setattr(functions, "MAX_PROGRAMS", 2)
    torch.manual_seed(0)
    module = Attention(32, 2, 16)
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    module.to(DEVICE)
    x = torch.randn(5, 32, 17, device=DEVICE).to(dtype).transpose(1, 2)  # (B, T, C), strided
    x[1], x[2] = 0.5, 0  # rows of variance 0 divide by the root of epsilon
    dz = torch.randn(5, 1, 32, device=DEVICE).to(dtype).expand(5, 1 if cls_only else 17, 32)

    def run(function, x, params):
        x = x.detach().requires_grad_()
        z = function(x)
        return [z.detach(), *torch.autograd.grad(z, [x, *params], dz.to(z.dtype))]

    def reference(dtype):
        like = copy.deepcopy(module).to(dtype)
        return run(lambda x: like(x, cls_only), x.to(dtype), list(like.parameters()))

    params = list(module.parameters())
    actual = run(lambda x: FusedAttention.apply(x, *params, 2, cls_only), x, params)
    assert actual[0].dtype == actual[1].dtype == dtype
    names = "forward", "x", "norm weight", "norm bias", "qkv", "out"
    for results in zip(names, actual, reference(torch.float64), reference(dtype)):
        assert_parity(*results, dtype)
    if dtype == torch.float32:  # exp of a score not taken relative to its row's greatest overflows
        module.qkv.weight.data[:64] *= 15
        q, k, _ = module.qkv(module.norm(x)).view(5, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
        assert (q @ k.transpose(2, 3) / 4).max() > 90
        z = FusedAttention.apply(x, *params, 2, cls_only)
        # A score of 90 carries a rounding of 4e-6, which exp makes the relative error of a weight.
        assert relative_error(z.detach(), reference(torch.float64)[0]) < 1e-4


@triton.jit
def gelu_kernel(x_ptr, y_ptr, grad_ptr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    y, grad = functions.gelu(tl.load(x_ptr + i))
    tl.store(y_ptr + i, y)
    tl.store(grad_ptr + i, grad)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's, where GELU is 0
def test_gelu():
    """On a dense grid, and far out in both tails."""
    tails = torch.logspace(-30, 30, 2**12)
    x = torch.cat([torch.linspace(-14, 14, 2**19), tails, -tails]).to(DEVICE)
    y, grad = torch.empty_like(x), torch.empty_like(x)
    gelu_kernel[(len(x) // 4096,)](x, y, grad, 4096)
    x = x.double()
    cdf, density = torch.special.ndtr(x), torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5
    assert ((y - x * cdf).abs() <= 2**-23 * x.abs()).all()
    assert ((grad - cdf - x * density).abs() < 4e-7).all()
