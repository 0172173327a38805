"""Every Triton kernel against float64: on a GPU where there is one, else in Triton's interpreter.

The rule is that of flash-attention's tests: an error is at most twice (gradients: three times) the error that PyTorch
makes in the same dtype, and never above a bound of its own.
"""

import copy
import dataclasses

import pytest
import torch

pytest.importorskip("triton")  # not on every platform

import triton
import triton.language as tl

import kernels
import optimizers
from augment import Augmentation, Augmenter, Normalize
from cli import UsageError
from engine import Runtime
from kernels import adamw, attention, functions, gpu, mlp, muon, plain, stem
from kernels.augment import augment
from recipe import RECIPES
from conftest import DEVICE, make_trainer, small_recipe
from vit import Attention, FeedForward, ViT

DTYPES = [torch.float32, torch.bfloat16]
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def relative_error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-300)).item()


def run(function, module, x, upstream):
    """The result of function(x), and the gradients of x and of every parameter of `module` that it reads, by name."""
    x = x.detach().requires_grad_(x.requires_grad)
    y = function(x)
    named = ([("x", x)] if x.requires_grad else []) + list(module.named_parameters())
    gradients = torch.autograd.grad(y, [value for _, value in named], upstream.to(y.dtype), allow_unused=True)
    return {"result": y.detach(), **{name: g for (name, _), g in zip(named, gradients) if g is not None}}


def assert_parity(kernel, plainly, module, x, dtype, reference=None, bound=None):
    """`kernel(x)` and `plainly(module, x)` in `dtype` against `reference(module, x)` in float64, as the rule has it."""
    reference = reference or (lambda module, x: module(x))
    exact_module = copy.deepcopy(module).double()
    x = x.to(dtype)
    upstream = torch.randn(reference(module, x.float()).shape, device=x.device).to(dtype)
    exact = run(lambda x: reference(exact_module, x), exact_module, x.double().requires_grad_(x.requires_grad), upstream.double())
    theirs = run(lambda x: plainly(module, x), module, x, upstream)
    ours = run(kernel, module, x, upstream)
    assert ours.keys() == exact.keys()
    for name, wanted in exact.items():
        factor = 2 if name == "result" else 3
        error, allowed = relative_error(ours[name], wanted), factor * relative_error(theirs[name], wanted)
        # A single sum that PyTorch happens to hit exactly allows nobody else any error: one rounding is always granted.
        assert error <= max(allowed, torch.finfo(dtype).eps), f"{name}: {error:.2e}, allowed {allowed:.2e}"
        assert error <= (bound or BOUNDS[dtype]), f"{name}: {error:.2e}"


def random_module(module, seed=0):
    """`module` on DEVICE with every parameter random, norms and biases too."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    return module.to(DEVICE)


def random_tokens(*shape):
    return torch.randn(shape, device=DEVICE).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, T, C, H", [(1, 33, 64, 4), (3, 33, 64, 4), (7, 17, 32, 2), (2, 64, 64, 1), (3, 5, 32, 4), (1, 1, 64, 8)])
def test_attention(B, T, C, H, dtype):
    module = random_module(Attention(C, H, C // H))
    assert_parity(lambda x: gpu.attention(module, x), plain.call, module, random_tokens(B, T, C), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, T, C, M", [(1, 33, 64, 64), (3, 33, 64, 64), (7, 17, 32, 64), (3, 2, 64, 128), (5, 1, 32, 32)])
def test_feed_forward(B, T, C, M, dtype):
    module = random_module(FeedForward(C, M))
    assert_parity(lambda x: gpu.feed_forward(module, x), plain.call, module, random_tokens(B, T, C), dtype)


STEMS = [
    (1, {}),
    (3, {}),
    (7, {"image_size": 16, "in_channels": 1, "channels": 16, "dim": 32}),
    (2, {"image_size": 8, "patch_size": 1, "channels": 16}),
    (2, {"image_size": 32, "patch_size": 4, "channels": 16, "dim": 32}),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, sizes", STEMS)
def test_stem(B, sizes, dtype):
    model = random_module(ViT(**sizes))
    side = model.sizes["image_size"]
    images = torch.randn(B, model.sizes["in_channels"], side, side, device=DEVICE)
    assert gpu.fits(model.sizes)

    def plainly(model, x):
        return plain.call(Embedding(model), x)

    assert_parity(lambda x: gpu.stem(model, x), plainly, model, images, dtype, reference=lambda model, x: model.embed(x))


class Embedding(torch.nn.Module):
    """`model.embed` as a module, for functional_call."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model.embed(images)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_network(dtype):
    """Logits and every gradient, the last feed-forward run for the CLS token alone; errors of five kernels add up."""
    model = random_module(ViT())
    images = torch.randn(3, 3, 32, 32, device=DEVICE)
    assert_parity(lambda x: gpu.forward(model, x), plain.forward, model, images, dtype, bound=3 * BOUNDS[dtype])


def test_attention_of_large_scores():
    """Scores of +-80, where exp of a score that is not taken relative to its row's greatest would be infinite."""
    module = random_module(Attention(64, 4, 16))
    with torch.no_grad():
        module.qkv.weight[:128] *= 9
    x = random_tokens(3, 33, 64)
    q, k, _ = module.qkv(module.norm(x)).view(3, 33, 3, 4, 16).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(2, 3) / 4
    assert scores.max() > 80 and scores.min() < -80
    # A score of 80 carries a rounding of 4e-6, which exp makes the relative error of a weight, in PyTorch as well.
    assert_parity(lambda x: gpu.attention(module, x), plain.call, module, x, torch.float32, bound=1e-4)
    low = gpu.attention(module, x.bfloat16())
    assert low.isfinite().all() and relative_error(low, copy.deepcopy(module).double()(x.double())) < 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build, kernel", [(lambda: Attention(64, 4, 16), gpu.attention), (lambda: FeedForward(64, 64), gpu.feed_forward)])
def test_layer_norm_of_constant_rows(build, kernel, dtype):
    """A row of equal numbers has variance 0 and divides by the square root of epsilon alone."""
    module = random_module(build())
    x = torch.full((3, 33, 64), 0.5, device=DEVICE)
    x[1] = torch.randn(33, 64)
    x[2] = 0
    assert_parity(lambda x: kernel(module, x), plain.call, module, x.requires_grad_(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build, kernel", [(lambda: Attention(64, 4, 16), gpu.attention), (lambda: FeedForward(64, 64), gpu.feed_forward)])
def test_inputs_of_any_stride(build, kernel, dtype):
    module = random_module(build())
    x = torch.randn(33, 64, 3, device=DEVICE).to(dtype)
    strided, upstream = x.permute(2, 0, 1), torch.randn(1, 1, 64, device=DEVICE).to(dtype).expand(3, 33, 64)
    a = run(lambda x: kernel(module, x), module, strided.requires_grad_(), upstream)
    b = run(lambda x: kernel(module, x), module, strided.contiguous().requires_grad_(), upstream.contiguous())
    assert all(torch.equal(a[name], b[name]) for name in b)
    if kernel is gpu.feed_forward:  # rows far apart, as the CLS tokens lie
        tokens = torch.randn(3, 33, 64, device=DEVICE).to(dtype)
        assert torch.equal(kernel(module, tokens[:, :1]), kernel(module, tokens)[:, :1])
        columns, upstream = torch.randn(2, 64, 33, device=DEVICE).to(dtype).mT  # a row's numbers far apart
        a = run(lambda x: kernel(module, x), module, columns.requires_grad_(), upstream)
        b = run(lambda x: kernel(module, x), module, columns.contiguous().requires_grad_(), upstream.contiguous())
        assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_repeated_run_gives_the_same_bits(dtype):
    model, images = random_module(ViT()), torch.randn(2, 3, 32, 32, device=DEVICE).to(dtype)
    upstream = torch.randn(2, 10, device=DEVICE)
    first, second = (run(lambda x: gpu.forward(model, x), model, images, upstream) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


PLANS = {name: recipe.augmentation for name, recipe in RECIPES.items()} | {
    "nothing": Augmentation(),
    "crop": Augmentation(crop_padding=9, crop_border="wrap"),
    "warp": Augmentation(warp_p=1.0, warp_shift=0.9, warp_scale=0.5, warp_degrees=180.0),
    "cutout": Augmentation(cutout_p=0.5, cutout_size=32),
}


def augmenter(plan):
    """An Augmenter of 20 pictures."""
    normalize, generator = Normalize((0.5, 0.4, 0.3), (0.25, 0.2, 0.3), DEVICE), torch.Generator(DEVICE).manual_seed(0)
    return Augmenter(PLANS[plan], normalize, 20, generator, epochs=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PLANS)
def test_augmentation(name, dtype):
    """A batch in any order, with what was drawn for it, as augment.Augmenter makes it."""
    pictures = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
    indices, ours = torch.tensor([7, 3, 19, 0, 7, 11, 4], device=DEVICE), augmenter(name)
    for epoch in (0, 1):
        draws = ours.draw(indices, epoch, 32)
        expected = ours.apply(pictures[indices], draws)
        got = augment(ours, pictures, indices, draws, dtype)
        assert got.dtype == dtype
        assert torch.allclose(got.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


@triton.jit
def gelu_kernel(x_ptr, y_ptr, slope_ptr, N: tl.constexpr, DTYPE: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + i)
    y, slope = functions.gelu_and_derivative(x, DTYPE)
    tl.store(y_ptr + i, functions.gelu(x, DTYPE))
    tl.device_assert(tl.max(tl.abs(y - functions.gelu(x, DTYPE))) == 0)
    tl.store(slope_ptr + i, slope)


def run_gelu(x, dtype):
    """GELU and its derivative as the kernels compute them for a working dtype: fp32 numbers, before any rounding."""
    assert len(x) % 4096 == 0
    x = x.to(DEVICE)
    y, slope = torch.empty_like(x), torch.empty_like(x)
    gelu_kernel[(len(x) // 4096,)](x, y, slope, 4096, dtype)
    exact = x.double()
    cdf = torch.special.ndtr(exact)
    density = torch.exp(-exact.square() / 2) / (2 * torch.pi) ** 0.5
    return exact, y.double(), exact * cdf, slope.double(), cdf + exact * density


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's, where the tail is zero
def test_gelu_of_every_finite_bf16():
    """Within bf16's rounding, half a unit in the last place, of the exact function; 0.61 of it as measured."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = torch.where(every.isfinite(), every, 0).float()
    _, y, exact, slope, exact_slope = run_gelu(x, "bf16")
    assert y.isfinite().all()
    assert ((y - exact).abs() <= 0.62 * 2**-9 * exact.abs() + 5e-15).all()
    assert (slope - exact_slope).abs().max() < 2**-10


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_gelu_of_a_dense_fp32_grid():
    x = torch.cat([torch.linspace(-14, 14, 2**20), torch.logspace(-30, 30, 2**12), -torch.logspace(-30, 30, 2**12)])
    x, y, exact, slope, exact_slope = run_gelu(x, "fp32")
    assert ((y - exact).abs() <= 2**-23 * x.abs()).all()
    assert (slope - exact_slope).abs().max() < 4e-7


def test_ten_steps_of_training(small_there):
    """The losses of ten steps with the kernels, augmentation and optimizer among them, are those without."""
    plan = dataclasses.replace(PLANS["original"], flip="alternating")  # everything, and what depends on the picture's place
    recipe, losses = dataclasses.replace(small_recipe(), batch_size=2, augmentation=plan), {}
    order = torch.arange(20, device=DEVICE).view(10, 2)
    for name in ("triton", "torch"):
        trainer = make_trainer(small_there, recipe, device=DEVICE, precision="fp32", kernels_name=name)
        losses[name] = [trainer.step(indices, 0, 1e-3, 0.9)[0].item() for indices in order]
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-4)
    assert losses["triton"][0] != losses["triton"][9]


def step_astray_and_back(optimizer, parameters):
    """What an optimizer's state is saved as is a copy to be kept, and enough to go on from."""
    saved, before = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in parameters]
    optimizer.prepare(0.3, 0.5)
    optimizer.step()
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for parameter, value in zip(parameters, before):
            parameter.copy_(value)


@pytest.mark.parametrize(
    "shapes, stacked", [([(64, 64), (192, 64), (64, 256), (32, 3, 3, 3), (32, 32, 2, 2)], [1, 3, 1, 1, 1]), ([(5, 3), (140, 3), (1, 1)], [1, 2, 1])]
)
def test_muon(shapes, stacked):
    """Ten steps under a moving rate and momentum against float64, and from a state that was saved; nothing else is written."""
    torch.manual_seed(0)
    start = [torch.randn(shape, device=DEVICE) for shape in shapes]
    exact, plain, ours = [p.double().requires_grad_() for p in start], *([p.clone().requires_grad_() for p in start] for _ in range(2))
    each = [optimizers.Muon(exact, stacked, 0.1), optimizers.Muon(plain, stacked, 0.1), muon.Muon(ours, stacked, 0.1)]
    for i in range(10):
        gradients = [torch.randn_like(p) * 10.0 ** torch.randint(-6, 3, (), device=DEVICE) for p in start]
        if i == 5:
            step_astray_and_back(each[2], ours)
        for optimizer, parameters in zip(each, (exact, plain, ours)):
            for p, gradient in zip(parameters, gradients):
                p.grad = gradient.to(p.dtype)
            optimizer.prepare(0.1 / (i + 1), 0.95 - 0.01 * i)
            optimizer.step()
        for wanted, theirs, got in zip(exact, plain, ours):
            error, allowed = (got - wanted).abs().max().item(), (theirs - wanted).abs().max().item()
            assert error <= 2 * allowed + 1e-4, (i, tuple(wanted.shape))
    assert all((p - q).abs().max() > 0.1 for p, q in zip(ours, start))


def test_muon_leaves_a_matrix_of_zero_gradient_where_it_is():
    parameters = [torch.ones(4, 6, device=DEVICE).requires_grad_() for _ in range(2)]
    optimizer = muon.Muon(parameters, [1, 1], 0.0)
    for p, value in zip(parameters, (0.0, 1.0)):
        p.grad = torch.full_like(p, value)
    optimizer.prepare(0.1, 0.9)
    optimizer.step()
    assert (parameters[0] == 1).all() and (parameters[1] < 1).all()


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_adamw(weight_decay):
    """Ten steps under a moving rate and beta1 against torch.optim.AdamW, and from a state that was saved."""
    torch.manual_seed(0)
    theirs = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in [(40, 30), (3, 2, 2, 2), (7,), ()]]
    ours = [p.detach().clone().requires_grad_() for p in theirs]
    reference, optimizer = (build(p[:2], p[2:], weight_decay, 0.99, 1e-8) for build, p in ((optimizers.AdamW, theirs), (adamw.AdamW, ours)))
    for i in range(10):
        for a, b in zip(theirs, ours):
            a.grad = torch.randn_like(a) * 10.0 ** torch.randint(-6, 3, a.shape, device=DEVICE)
            b.grad = a.grad.clone()
        if i == 5:
            step_astray_and_back(optimizer, ours)
        for each in (reference, optimizer):
            each.prepare(0.1 / (i + 1), 0.95 - 0.01 * i)
        reference.step()
        optimizer.step()
        for a, b in zip(theirs, ours):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    optimizer.zero_grad()
    assert all(p.grad is None for p in ours)


# Where the kernels run, and where PyTorch does


def counting(monkeypatch):
    """A list that grows at every launch of a kernel."""
    launched, launch = [], functions.launch

    def counted(kernel, *arguments, **constants):
        launched.append(kernel)
        launch(kernel, *arguments, **constants)

    for module in (attention, mlp, stem):
        monkeypatch.setattr(module, "launch", counted)
    return launched


@pytest.mark.parametrize(
    "watched, launches",
    [(None, 5), ("stem.gelu2", 4), ("blocks.0.attention.qkv", 4), ("blocks.1.feed_forward", 4), ("blocks.1", 0), ("blocks", 0), ("norm", 5)],
)
def test_a_watched_module_runs_in_pytorch(watched, launches, monkeypatch):
    launched, model = counting(monkeypatch), random_module(ViT())
    images, seen = torch.randn(2, 3, 32, 32, device=DEVICE), []
    if watched:
        model.get_submodule(watched).register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    logits = gpu.forward(model, images)
    assert len(launched) == launches
    shapes = {"stem.gelu2": (2, 32, 16, 16), "blocks.0.attention.qkv": (2, 33, 192), "norm": (2, 64)}
    assert seen == ([shapes.get(watched, (2, 33, 64))] if watched else [])
    assert torch.allclose(logits, plain.forward(model, images), atol=1e-5)


def test_sizes_and_inputs_that_no_kernel_fits_run_in_pytorch(monkeypatch):
    launched = counting(monkeypatch)
    odd = ViT(dim=24, heads=3, dim_head=8).to(DEVICE)
    images = torch.randn(2, 3, 32, 32, device=DEVICE)
    assert torch.equal(gpu.forward(odd, images), plain.forward(odd, images)) and not launched
    model = random_module(ViT())
    images.requires_grad_()
    gpu.forward(model, images).sum().backward()
    assert images.grad.abs().sum() > 0 and len(launched) == 8  # all but the stem, forward and backward
    with pytest.raises(ValueError, match="this network takes"):
        gpu.forward(model, torch.zeros(2, 3, 16, 16, device=DEVICE))


def test_a_wrong_kernel_is_found_out_and_not_used(monkeypatch, capsys):
    right = gpu.attention
    monkeypatch.setattr(gpu, "attention", lambda module, x: right(module, x) * 1.001)
    runtime = Runtime(DEVICE, "fp32", "torch")
    forward, reason = kernels.choose("triton", runtime.device, torch.float32)
    assert forward is plain.forward and "attention kernel is off by 1.0e-03" in reason
    if DEVICE == "cuda":
        assert Runtime(DEVICE, "fp32", "auto").forward is plain.forward
        assert reason in capsys.readouterr().err


def test_a_kernel_that_fails_is_told_in_a_line(monkeypatch):
    def failing(module, x):
        raise RuntimeError("out of resources\nand a page more")

    monkeypatch.setattr(gpu, "feed_forward", failing)
    with pytest.raises(UsageError) as refused:
        Runtime(DEVICE, "fp32", "triton")
    assert str(refused.value) == "--kernels triton: the feed-forward kernel does not run here: out of resources"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_self_check_passes(dtype):
    assert gpu.check(torch.device(DEVICE), dtype) is None


@pytest.mark.parametrize("name", ["stem", "feed_forward", "augment", "AdamW", "Muon"])
def test_the_self_check_sees_every_kernel(name, monkeypatch):
    right = getattr(gpu, name)

    def wrong(*arguments):
        if name not in ("AdamW", "Muon"):
            return right(*arguments) * 1.01
        optimizer = right(*arguments)
        prepare = optimizer.prepare
        optimizer.prepare = lambda lr, momentum: prepare(1.01 * lr, momentum)
        return optimizer

    monkeypatch.setattr(gpu, name, wrong)
    assert "kernel is off by" in gpu.check(torch.device(DEVICE), torch.float32)
