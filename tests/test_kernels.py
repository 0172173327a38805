"""Each Triton kernel against PyTorch and float64, at the sizes of training.

On a GPU where there is one, else in Triton's interpreter. The rule is that of flash-attention's
tests: an error is at most twice PyTorch's in the same dtype, for gradients three times.
"""

import copy
import dataclasses
import math
import re

import pytest
import torch

pytest.importorskip("triton")  # not on every platform

import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

import data
from cli import UsageError
from conftest import DEVICE, FakeRank, make_trainer, small_recipe
from kernels import functions, self_test, step
from kernels.attention import FusedAttention
from kernels.self_test import reference_gradient, relative_error
from recipes import RECIPES
from runtime import supports_bf16_matmul
from vit import Attention, ViT

DEVICE = torch.device(DEVICE)
HAS_BF16 = DEVICE.type == "cpu" or supports_bf16_matmul(DEVICE)  # the interpreter always has
FP32 = pytest.param(torch.float32, id="fp32")
BF16 = pytest.param(
    torch.bfloat16,
    id="bf16",
    marks=pytest.mark.skipif(not HAS_BF16, reason="this GPU does not multiply bf16 matrices"),
)


# What PyTorch hits by luck allows nobody else an error: so much is always granted. In fp32 it is
# far below what one TF32 product costs, 1e-3.
LEAST_BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 5e-2}


def bound_of(own, multiple, dtype):
    """Return `multiple` times PyTorch's error, and at least that of LEAST_BOUNDS."""
    return max(multiple * own, LEAST_BOUNDS[dtype])


def assert_within(name, error, own, multiple, dtype):
    """Assert that an error is at most `multiple` times PyTorch's `own`."""
    bound = bound_of(own, multiple, dtype)
    assert error <= bound, f"{name}: {error:.1e}, bound {bound:.1e}, PyTorch's {own:.1e}"


def assert_gradients(actual, exact, own, images, dtype):
    """Assert that the gradients {name: tensor} of a batch are as good as PyTorch's `own`.

    A gradient is a sum over images, in which much may cancel. What rounding is relative to is what
    is added: so errors are divided by the sum of the magnitudes of `images`, the exact gradients
    of each image alone. PyTorch's error in one tensor may be small by luck: three times its
    largest is the bound of all.
    """
    errors = {}
    own_errors = {}
    shares = {}  # the least of an image
    for name, value in exact.items():
        magnitudes = torch.stack([image[name].norm() for image in images])
        errors[name] = ((actual[name].double() - value).norm() / magnitudes.sum()).item()
        own_errors[name] = ((own[name].double() - value).norm() / magnitudes.sum()).item()
        shares[name] = (magnitudes.min() / magnitudes.sum()).item()
    largest = max(own_errors.values())
    for name in exact:
        assert_within(f"gradient of {name}", errors[name], largest, 3, dtype)
        # The rule can fail: a kernel that leaves an image out is off by that image's share.
        assert shares[name] > bound_of(largest, 3, dtype), f"{name}: a share of {shares[name]}"


def noise_dataset(num_images, image_size=32):
    """Images of noise: gradients of smooth ones have small singular values, which Muon enlarges."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_images, 3, image_size, image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    dataset = data.load_shapes(num_images, 10)
    return dataclasses.replace(dataset, train_images=images).to(DEVICE)


def fused_step(recipe, dtype, num_images, **overrides):
    """The FusedStep of a Trainer of noise, one batch an epoch, with L1, which most recipes lack."""
    overrides = {"batch_size": num_images, "l1": 1e-4, **overrides}
    recipe = dataclasses.replace(RECIPES[recipe], **overrides)
    options = {"precision": functions.DTYPES[dtype], "kernels": "triton"}
    trainer = make_trainer(noise_dataset(num_images), recipe, device=DEVICE.type, **options)
    return trainer.fused_step


def test_step_at_the_sizes_of_training(monkeypatch):
    """Loss, gradients, updates of a first step, two images a program, of which one is missing."""
    monkeypatch.setattr(functions, "MAX_PROGRAMS", 2)
    num_images = 3
    dtype = torch.float32
    fused = fused_step("default", dtype, num_images)
    before = copy.deepcopy(fused.model)
    results = self_test.train_and_compare(fused, [torch.float64, dtype])
    assert fused.counter.tolist() == [1]

    gradients = [{}, {}, {}]  # the step's, exact, PyTorch's own
    for kind, name, actual, exact, own in results:
        if kind == "loss":
            error = relative_error(actual, exact)
            assert_within("loss", error, relative_error(own, exact), 2, dtype)
        elif kind == "gradient":
            for grads, value in zip(gradients, (actual, exact, own)):
                grads[name] = value
        else:  # from the same gradient; what Muon does with small singular values is uncertain
            bound = 5e-2 if kind == "muon" else 1e-4
            assert relative_error(actual, exact) <= bound, (kind, name)

    images, labels = self_test.first_batch(fused)
    each = []
    for i in range(num_images):
        batch = (images[i : i + 1], labels[i : i + 1])
        _, grads = reference_gradient(before, *batch, num_images, 0.0, torch.float64)
        each.append(grads)
    assert_gradients(*gradients, each, dtype)


@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_fused_attention(dtype, cls_only, monkeypatch):
    """The autograd function, on strided inputs, two images a program, of which one is missing."""
    monkeypatch.setattr(functions, "MAX_PROGRAMS", 2)
    torch.manual_seed(0)
    module = Attention(32, 2, 16)
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    module.to(DEVICE)
    params = dict(module.named_parameters())
    x = torch.randn(3, 32, 17, device=DEVICE).to(dtype).transpose(1, 2)  # (B, T, C), strided
    x[1, 3] = 0.5  # a row of variance 0 is divided by the root of epsilon
    num_queries = 1 if cls_only else 17
    dz = torch.randn(3, 1, 32, device=DEVICE).to(dtype).expand(3, num_queries, 32)

    def results(function, inputs, weights, dz):
        """Return z and the gradients of inputs and weights."""
        inputs = inputs.detach().requires_grad_()
        z = function(inputs)
        dx, *grads = torch.autograd.grad(z, [inputs, *weights], dz)
        return z.detach(), dx, dict(zip(params, grads))

    def reference(dtype, rows=slice(None)):
        like = copy.deepcopy(module).to(dtype)
        weights = list(like.parameters())
        return results(lambda x: like(x, cls_only), x[rows].to(dtype), weights, dz[rows].to(dtype))

    def fused(x):
        return FusedAttention.apply(x, *params.values(), 2, cls_only)

    z, dx, grads = results(fused, x, params.values(), dz)
    exact_z, exact_dx, exact_grads = reference(torch.float64)
    own_z, own_dx, own_grads = reference(dtype)
    assert z.dtype == dx.dtype == dtype
    assert_within("z", relative_error(z, exact_z), relative_error(own_z, exact_z), 2, dtype)
    own = relative_error(own_dx, exact_dx)
    assert_within("gradient of x", relative_error(dx, exact_dx), own, 3, dtype)
    each = [reference(torch.float64, slice(i, i + 1))[2] for i in range(len(x))]
    assert_gradients(grads, exact_grads, own_grads, each, dtype)


def test_fused_attention_with_great_scores():
    """exp of a score that is not taken relative to its row's greatest overflows."""
    torch.manual_seed(0)
    module = Attention(32, 2, 16).to(DEVICE)
    module.qkv.weight.data[:64] *= 15
    x = torch.randn(1, 17, 32, device=DEVICE)
    with torch.no_grad():
        q, k, _ = module.qkv(module.norm(x)).view(1, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) / 4
        z = FusedAttention.apply(x, *module.parameters(), 2)
        exact = copy.deepcopy(module).double()(x.double())
    assert scores.max() > 90
    # A score of 90 carries a rounding of 4e-6, which exp makes the relative error of a weight.
    assert relative_error(z, exact) < 1e-4


def test_fused_attention_has_one_derivative():
    """A second one would be wrong without a word."""
    weights = Attention(32, 2, 16).to(DEVICE).parameters()
    x = torch.randn(1, 17, 32, device=DEVICE, requires_grad=True)
    z = FusedAttention.apply(x, *weights, 2)
    dx = torch.autograd.grad(z.square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_fused_attention_refuses_what_it_cannot_take():
    x = torch.zeros(1, 17, 32, device=DEVICE)
    weights = list(Attention(32, 2, 16).to(DEVICE).parameters())
    for wrong, message in [
        ((x.half(), *weights, 2), "float16"),
        ((x[0], *weights, 2), "(B, T, C)"),
        ((x[:, :, :24], *weights, 2), "norm_weight has shape"),
        ((x, *weights, 4), "width of a head is 8"),
        ((x, *[w.double() for w in weights], 2), "float64"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            FusedAttention.apply(*wrong)


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
    y = torch.empty_like(x)
    grad = torch.empty_like(x)
    gelu_kernel[(len(x) // 4096,)](x, y, grad, 4096)
    x = x.double()
    cdf = torch.special.ndtr(x)
    density = torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5
    # The error is 0.8 * 2^-23 |x| here; processors differ in the last bits of a power of 2.
    assert ((y - x * cdf).abs() <= 2**-21 * x.abs()).all()
    assert ((grad - cdf - x * density).abs() < 4e-7).all()


# --- before a training trusts the kernels ---


def test_self_test(monkeypatch):
    """A line for a result that is wrong or not finite; weights and totals are as before."""
    fused = fused_step("original", torch.float32, 2)
    before = fused.param.clone()

    def line(kind, value):
        def train_and_compare(fused, dtypes):
            fused.param += 1
            fused.totals += 1
            if kind == "error":
                raise RuntimeError
            return [(kind, "a", torch.tensor([1.0, value]), torch.ones(2))]

        monkeypatch.setattr(self_test, "train_and_compare", train_and_compare)
        return self_test.self_test(fused)

    assert line("muon", 1.02) is None
    assert line("muon", 1.2).startswith("muon a: off by 1.4e-01 on this device")
    assert line("gradient", 1.00001) is None
    assert line("gradient", 1.001).startswith("gradient a: off by")
    assert line("loss", math.nan).startswith("loss a: off by nan")
    with pytest.raises(RuntimeError):
        line("error", 1.0)
    assert torch.equal(fused.param, before)
    assert fused.totals.tolist() == [0, 0]


def test_checked_step(monkeypatch, capsys):
    """A kernel that fails costs the kernels, not the training, unless the user asks for them."""
    trainer = make_trainer(noise_dataset(2), small_recipe(batch_size=2), device=DEVICE.type)

    def outcome(self_test, ranks=trainer.runtime.ranks):
        monkeypatch.setattr(step, "INTERPRETED", False)
        monkeypatch.setattr(step, "self_test", self_test)
        monkeypatch.setattr(trainer.runtime, "ranks", ranks)
        trainer.runtime.tested_kernels.clear()
        fused = step.checked_step(trainer)
        return fused, capsys.readouterr().err

    def right(fused):
        return None

    def wrong(fused):
        return "gradient cls_token: off by 1"

    def too_large(fused):
        raise OutOfResources(300_000, 232_448, "shared memory")

    # With --kernels auto.
    fused, line = outcome(right)
    assert isinstance(fused, step.FusedStep) and line == ""
    fallback = "; the network runs in plain PyTorch\n"
    assert outcome(wrong) == (None, "kernels: gradient cls_token: off by 1" + fallback)
    fused, line = outcome(too_large)
    assert fused is None and "out of resource: shared memory" in line and line.count("\n") == 1

    # With --kernels triton.
    monkeypatch.setattr(trainer.runtime, "kernels", "triton")
    with pytest.raises(UsageError, match="--kernels triton: gradient cls_token"):
        outcome(wrong)

    # All ranks do the same.
    monkeypatch.setattr(trainer.runtime, "kernels", "auto")
    other = FakeRank(1, 2)
    outcome(wrong, other)
    fused, line = outcome(right, FakeRank(0, 2, [other]))
    assert fused is None and line == "kernels: they fail on another rank" + fallback
    outcome(right, other)
    fused, line = outcome(right, FakeRank(0, 2, [other]))
    assert fused is not None and line == ""


def other_optimizers(recipe, model):
    return [torch.optim.SGD(model.parameters())]


@pytest.mark.parametrize(
    "change, line",
    {
        "dropout": "they do not know the module Dropout",
        "optimizer": "they do not know the optimizer SGD",
        "classes": "300 classes are more than 256",
        "width": "dim is 48, not a power of two",
        "gelu": "they do not compute GELU(approximate='tanh')",
        "muon": "Muon has a 128x256 matrix, both sides more than 64",
    }.items(),
)
def test_what_the_kernels_do_not_implement_is_left_to_pytorch(change, line, monkeypatch, capsys):
    trainer = make_trainer(noise_dataset(2), small_recipe(batch_size=2), device=DEVICE.type)
    assert step.why_not_implemented(trainer.model, trainer.recipe) is None
    if change == "dropout":
        trainer.model.blocks[0].mlp.gelu = torch.nn.Dropout()
    elif change == "gelu":
        trainer.model.blocks[0].mlp.gelu = torch.nn.GELU("tanh")
    elif change == "optimizer":
        monkeypatch.setattr(step, "build_optimizers", other_optimizers)
    elif change == "classes":
        trainer.model = ViT(num_classes=300)
    elif change == "muon":
        trainer.recipe = small_recipe(batch_size=2, optimizer="muon")
        trainer.model = ViT(dim=128, mlp_dim=128)
    else:
        trainer.model = ViT(dim=48)
    assert step.checked_step(trainer) is None
    assert capsys.readouterr().err == f"kernels: {line}; the network runs in plain PyTorch\n"
