"""The training step that the Triton kernels make, against the one in PyTorch, and CUDA graphs.

On a GPU where there is one, else in Triton's interpreter.
"""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")  # not on every platform

from torch.nn.utils import parameters_to_vector
from torch.utils._python_dispatch import TorchDispatchMode

import trainer as trainer_module
from augment import epoch_plan
from conftest import DEVICE, FakeRank, make_trainer
import data
from kernels import functions, step, verify
from kernels.graph import GraphedFunction
from runtime import Runtime
from schedule import RECIPES
from test_kernels import fused_step
from vit import ViT

DEVICE = torch.device(DEVICE)


def small_trainers(recipe, monkeypatch, num_images=5, teacher=False, **overrides):
    """Trainers of a small network with kernels, with PyTorch, and with PyTorch in float64."""

    def build_model(recipe, num_classes, seed, device):
        torch.manual_seed(seed)
        sizes = dict(image_size=16, channels=16, dim=16, heads=1, mlp_dim=16)
        return ViT(num_classes, **sizes).to(device)

    monkeypatch.setattr(trainer_module, "build_model", build_model)
    monkeypatch.setattr(verify, "self_test", lambda step: None)
    monkeypatch.setattr(step, "AUGMENT_BATCH", 2)  # images of an epoch are augmented in parts
    recipe = dataclasses.replace(RECIPES[recipe], batch_size=2, epochs=4, l1=1e-4, **overrides)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (num_images, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.arange(num_images) % 3
    images, labels = images.to(DEVICE), labels.to(DEVICE)
    dataset = data.Dataset(
        "random", "random", images, labels, images, labels, ("a", "b", "c"), (0.5,) * 3, (0.25,) * 3
    )

    if teacher:
        logits = 3 * torch.randn(num_images, 3, generator=generator)
        dataset = dataclasses.replace(dataset, teacher_logits=logits.to(DEVICE))

    def make(kernels):
        return trainer_module.Trainer(recipe, dataset, Runtime(DEVICE.type, "fp32", kernels), 1)

    fused, plain, exact = make("triton"), make("torch"), make("torch")
    for model in (exact.model, exact.averaged_model):
        model.double()
    exact.totals = exact.totals.double()
    exact.targets = exact.targets.double() if teacher else exact.targets
    exact.runtime.logits = lambda model, images, **kwargs: model(images.double(), **kwargs)
    assert isinstance(fused.fused_step, step.FusedStep)
    return fused, plain, exact


def begin_epoch(trainer, epoch, first_step=0):
    first = epoch * trainer.steps_per_epoch
    values = [trainer.schedule(first + i) for i in range(trainer.steps_per_epoch)]
    trainer.begin_epoch(epoch, *zip(*values), first_step)


def state(trainer):
    """Flat tensors of a trainer: totals, gradient, weights and averaged weights."""
    fused, params = trainer.fused_step, list(trainer.model.parameters())
    grad = fused.grad[:-2] if fused else parameters_to_vector(p.grad for p in params)
    models = {"weights": trainer.model, "average": trainer.averaged_model}
    flat = {name: parameters_to_vector(m.parameters()).detach() for name, m in models.items()}
    return {"totals": trainer.totals, "grad": grad, **flat}


@pytest.mark.parametrize("recipe", ["original", "long"])  # long is default and more
def test_ten_steps(recipe, monkeypatch):
    """With L1 and a last batch of one image: totals, gradient and weights, 1, 2 and 10 steps on.

    Recipe long also has an average of the weights, and a teacher.
    """
    options = {"weight_avg_frac": 0.5, "teacher": True} if recipe == "long" else {}
    trainers = small_trainers(recipe, monkeypatch, **options)
    fused = trainers[0].fused_step
    buffers = lambda: [*trainers[0].model.parameters(), fused.exp_avg, fused.exp_avg_sq]
    addresses = [t.data_ptr() for t in buffers()]
    for n in range(10):
        epoch, i = divmod(n, 3)
        for trainer in trainers:
            if i == 0:
                begin_epoch(trainer, epoch)
            trainer.step(i)
        if n in (0, 1, 9):
            ours, theirs, exact = map(state, trainers)
            for name, value in exact.items():
                own = verify.relative_error(theirs[name], value)
                error = verify.relative_error(ours[name], value)
                # Muon makes much of a batch of two: its gradients have few directions.
                bound = 3 * own + (2e-5 if fused.recipe.optimizer == "muon" else 1e-6)
                assert error <= bound, f"{name} after {n + 1} steps: {error:.1e}, {own:.1e}"
        if n == 6:  # in place: a captured graph goes on reading the same addresses
            saved = copy.deepcopy(trainers[0].state_dict())
            torch._foreach_add_([fused.param, fused.exp_avg, fused.exp_avg_sq], 1)
            trainers[0].load_state_dict(saved)
            assert addresses == [t.data_ptr() for t in buffers()]
    assert trainers[0].finite_counts.tolist() == trainers[1].finite_counts.tolist()
    # Once the second loss has ended, the last block computes the CLS token alone again.
    assert {aux for _, aux in fused.run.graphs} == {False, recipe == "long"}


@pytest.mark.parametrize("i", [0, 1])
def test_two_ranks_make_the_step_of_one(i, monkeypatch):
    """Batches of 2 and 1 images in shards of 1 and 1, then 0 and 1; L1 is added once."""
    alone, _, _ = small_trainers("original", monkeypatch, num_images=3)
    second = FakeRank(1, 2)
    for rank in (second, FakeRank(0, 2, [second])):  # the second only leaves its gradient
        shard = copy.deepcopy(alone)
        shard.runtime.dist = rank
        shard.fused_step = step.FusedStep(shard)
        begin_epoch(shard, 0, i)
        shard.step(i)
    begin_epoch(alone, 0, i)
    alone.step(i)
    for name, value in state(alone).items():
        assert verify.relative_error(state(shard)[name], value) < 1e-6, name
    assert shard.finite_counts.tolist() == alone.finite_counts.tolist()


def test_finite_counts():
    """A parameter's gradient counts where its norm is finite; the loss and totals likewise."""
    fused = fused_step("default", torch.float32)
    fused.begin_epoch(epoch_plan(fused.recipe, 3, 32, 0, 0, DEVICE), [0.1] * 2, [0.9] * 2)
    fused.counter.fill_(1)
    grads = fused.grad[:-2].fill_(1e-3).split([p.numel() for p in fused.model.parameters()])
    grads[0][3], grads[4][100], grads[6][16383] = float("nan"), float("inf"), 1e20
    fused.grad[-2:] = torch.tensor([5.0, 2.0])
    fused.finite_counts.fill_(7)
    fused.totals.fill_(1.0)
    kernel, programs, args, constants = verify.record_launches(fused, 2, False)[-1]
    functions.launch(kernel, programs, *args, **constants)
    assert fused.finite_counts.tolist() == [8] + [7 if i in (0, 4, 6) else 8 for i in range(32)]
    assert fused.totals.tolist() == [6.0, 3.0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_launches_of_a_step(recipe):
    """At most 16 kernels of ours, and none of PyTorch's."""

    class NoOperations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            raise AssertionError(f"{function} within the step")

    fused = fused_step(recipe, torch.float32)
    with NoOperations():
        launches = verify.record_launches(fused, 2, fused.trainer.aux_weight > 0)
        names = [verify.kernel_name(kernel) for kernel, *_ in launches]
    assert len(names) == 13 + ("muon muon" in names) <= 16


def test_gradients_fit_fp16():
    """Those of the sum of losses: far below its greatest number and, where they matter, exact."""
    found, outputs = make_trainer(data.load_shapes(128, 1), RECIPES["default"]), []
    model, images = found.model, found.normalize(found.dataset.train_images)
    for module in (model.stem, *(half for block in model.blocks for half in block.children())):
        module.register_forward_hook(lambda module, args, output: outputs.append(output))
    _, _, total = found.losses(model(images, mean_token=True), found.dataset.train_labels)
    grads = torch.autograd.grad(total, outputs)
    assert len(grads) == 5
    for grad in grads:
        kept = grad.half().double()
        assert kept.abs().max() < 65504 / 64
        assert verify.relative_error(kept, grad) < 2**-10


# --- CUDA graphs ---


@pytest.mark.parametrize("failing, replayed", [((), 6), ((80,), 3), ((80, 128), 0)])
def test_a_step_is_captured_once_or_launched(failing, replayed, capsys):
    """One capture that fails ends the replays of all."""
    calls, replays, sizes = [], [], (128, 128, 80, 128, 128, 80, 80, 128)
    graphed = GraphedFunction(calls.append, torch.device("cpu"))
    graphed.is_enabled = True

    def capture(key):
        if key in failing:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return SimpleNamespace(replay=lambda: replays.append(key))

    graphed.capture = capture
    for size in sizes:
        graphed(size)
    assert len(replays) == replayed and len(calls) + len(replays) == len(sizes)
    assert replayed != 3 or calls == [128, 80, 80, 80, 128]
    assert capsys.readouterr().err.count("\n") == bool(failing)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_capture_that_fails_on_a_gpu(capsys):
    """Stream, random generator and training are as they were."""
    value, stream = torch.zeros(1, device=DEVICE), torch.cuda.current_stream()

    def function(key):
        value.add_(1)
        if torch.cuda.is_current_stream_capturing():
            value.item()  # waits for the device, which a capture does not permit

    graphed = GraphedFunction(function, DEVICE)
    for _ in range(3):
        graphed("key")
    assert "not captured" in capsys.readouterr().err
    assert value.item() == 3 and torch.cuda.current_stream() == stream
    assert torch.rand(2, device=DEVICE).isfinite().all()
