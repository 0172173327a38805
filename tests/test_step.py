"""The training step that the Triton kernels make, against Trainer.step in PyTorch.

On a GPU where there is one, else in Triton's interpreter.
"""

import copy
import dataclasses

import pytest
import torch

pytest.importorskip("triton")  # not on every platform

import train
from augment import augment
from conftest import DEVICE, FakeRank
from kernels import step
from kernels.functions import DTYPES as PRECISIONS
from kernels.self_test import reference_gradient, relative_error
from optim import build_optimizers, set_lr_momentum
from recipes import RECIPES
from runtime import Runtime
from test_kernels import BF16, FP32, assert_gradients, assert_within, noise_dataset
from vit import ViT

DEVICE = torch.device(DEVICE)
SIDE = 8  # of the images, in pixels


@pytest.fixture
def make_trainers(monkeypatch):
    """make_trainers(recipe, dtype): trainers of a small network on three images, in batches of two.

    One with the kernels, one with PyTorch, and one with PyTorch in float64.
    """

    def build_model(recipe, num_classes, seed, device):
        torch.manual_seed(seed)
        sizes = dict(image_size=SIDE, channels=16, dim=16, heads=1, mlp_dim=16)
        return ViT(num_classes, **sizes).to(device)

    monkeypatch.setattr(train, "build_model", build_model)
    monkeypatch.setattr(step, "self_test", lambda fused: None)
    monkeypatch.setattr(step, "AUGMENT_BATCH", 2)  # images of an epoch are augmented in parts

    def make(recipe, dtype=torch.float32):
        recipe = dataclasses.replace(
            RECIPES[recipe],
            batch_size=2,
            epochs=4,
            l1=1e-4,
            crop_padding=2,
            cutout_size=2,
            weight_decay=10 * RECIPES[recipe].weight_decay,  # or it would be lost beside Muon
            weight_avg_frac=0.9 if RECIPES[recipe].weight_avg_frac else 0.0,
        )
        dataset = noise_dataset(3, SIDE)

        def make_trainer(kernels):
            runtime = Runtime(DEVICE.type, PRECISIONS[dtype], kernels)
            return train.Trainer(recipe, dataset, runtime, 1)

        fused = make_trainer("triton")
        plain = make_trainer("torch")
        exact = make_trainer("torch")
        exact.model.double()
        exact.averaged_model.double()
        exact.totals = exact.totals.double()
        exact.optimizers = build_optimizers(recipe, exact.model)
        exact.runtime.logits = lambda model, images: model(images.double())
        return fused, plain, exact

    return make


def gradients(trainer):
    """The gradients of a trainer's last step, by name."""
    if trainer.fused_step:
        return trainer.fused_step.named(trainer.fused_step.grad)
    return {name: p.grad for name, p in trainer.model.named_parameters()}


def gradients_of_each_image(trainer, i):
    """The exact gradients of every image of batch i alone; of a step that is not yet made."""
    rows = trainer.plan.at(slice(2 * i, 2 * i + 2))
    images = trainer.dataset.train_images[rows.indices]
    images = augment(images, rows, trainer.recipe, trainer.normalize)
    labels = trainer.dataset.train_labels[rows.indices]
    found = []
    for k in range(len(images)):
        batch = (images[k : k + 1], labels[k : k + 1], len(images))
        _, grads = reference_gradient(trainer.model, *batch, 0.0, torch.float64)
        found.append(grads)
    return found


@pytest.mark.parametrize(
    "recipe, dtype, num_steps",
    [
        pytest.param("original", *FP32.values, 3, id="original fp32"),
        pytest.param("original", *BF16.values, 1, id="original bf16", marks=BF16.marks),
        pytest.param("default", *BF16.values, 1, id="default bf16", marks=BF16.marks),
        pytest.param("long", *FP32.values, 3, id="long fp32"),
        pytest.param("long", *BF16.values, 2, id="long bf16", marks=BF16.marks),
    ],
)
def test_every_step_from_the_same_state(recipe, dtype, num_steps, make_trainers):
    """Batches of two images, of one, and the first of the next epoch.

    Before a step the state of the training in PyTorch is copied to the others, so that an error is
    that of one step. Recipe default in fp32 is that of test_kernels.py.
    """
    fused, plain, exact = make_trainers(recipe, dtype)
    for n in range(num_steps):
        epoch, i = divmod(n, 2)
        if i == 0:
            for trainer in (fused, plain, exact):
                trainer.begin_epoch(epoch)
        before = copy.deepcopy(plain.state_dict())
        average = plain.averaged_model.state_dict()
        for trainer in (fused, exact):
            trainer.load_state_dict(before, n)
            trainer.averaged_model.load_state_dict(average)
            trainer.totals.copy_(plain.totals)
        average = copy.deepcopy(average)
        totals = plain.totals.double()
        each = gradients_of_each_image(exact, i)
        for trainer in (fused, plain, exact):
            trainer.step(i)

        # Loss, correct predictions and gradients.
        loss, own, exact_loss = [(t.totals - totals)[0] for t in (fused, plain, exact)]
        error = relative_error(loss, exact_loss)
        assert_within("loss", error, relative_error(own, exact_loss), 2, dtype)
        assert fused.totals[1] == exact.totals[1]
        assert_gradients(gradients(fused), gradients(exact), gradients(plain), each, dtype)

        # Weights and optimizers, against float64 with the same gradient.
        exact.load_state_dict(before, n)
        for name, p in exact.model.named_parameters():
            p.grad = gradients(fused)[name].double()
        lr, momentum = exact.schedule(n)
        set_lr_momentum(exact.optimizers, lr, momentum, exact.recipe.adamw_lr_scale)
        for optimizer in exact.optimizers:
            optimizer.step()
        expected = exact.state_dict()
        actual = fused.state_dict()
        for key in ("exp_avg", "exp_avg_sq"):
            assert list(actual[key]) == list(expected[key])
            for name, value in expected[key].items():
                assert relative_error(actual[key][name], value) < 1e-5, (key, name)
        for name, weight in before["weights"].items():
            # Muon makes much of rounding where a gradient of few images has no direction.
            bound = 1e-3 if name in expected["exp_avg_sq"] else 5e-2
            change = actual["weights"][name] - weight
            assert relative_error(change, expected["weights"][name] - weight) < bound, name

        # The average of the weights.
        if fused.recipe.weight_avg_frac:
            share = min(1.0, 1 / (fused.recipe.weight_avg_frac * (n + 1)))
            for name, value in fused.averaged_model.state_dict().items():
                change = (value - average[name]).double()
                expected_change = share * (actual["weights"][name] - average[name]).double()
                assert relative_error(change, expected_change) < 1e-3, name


def test_first_update_of_adamw(make_trainers):
    """From weights of 0 it is lr times the sign of the gradient, but for a few roundings.

    1 - beta and 1 - beta^n cancel: in fp32 1 - 0.999 alone is off by 1.3e-5.
    """
    fused, _, _ = make_trainers("original")
    fused.begin_epoch(0)
    fused = fused.fused_step
    torch.manual_seed(0)
    fused.param.zero_()
    fused.grad.copy_(torch.randn_like(fused.grad))
    fused.grad += fused.grad.sign()  # far from eps
    fused.counter.fill_(1)
    fused.update_weights()
    lr = fused.hparams[0, 0]
    expected = -lr.double() * fused.grad[:-2].sign()
    assert relative_error(fused.param, expected) < 3e-6


def test_state_is_that_of_pytorch_and_loads_in_place(make_trainers):
    """A captured graph goes on reading the same addresses."""
    fused, plain, _ = make_trainers("default")
    torch.manual_seed(0)
    for tensors in plain.state_dict().values():
        for tensor in tensors.values():
            tensor.copy_(torch.rand_like(tensor))
    buffers = [fused.fused_step.param, fused.fused_step.exp_avg, fused.fused_step.exp_avg_sq]
    fused.load_state_dict(plain.state_dict(), 0)
    addresses = [t.data_ptr() for tensors in fused.state_dict().values() for t in tensors.values()]
    for buffer in buffers:
        start = buffer.data_ptr()
        inside = [a for a in addresses if start <= a < start + buffer.nbytes]
        assert start in inside
    expected = plain.state_dict()
    for key, tensors in fused.state_dict().items():
        assert list(tensors) == list(expected[key])
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[key][name]), (key, name)


@pytest.mark.parametrize("i", [0, 1])
def test_two_ranks_make_the_step_of_one(i, make_trainers):
    """Batches of 2 and 1 images in shards of 1 and 1, then 0 and 1; L1 is added once."""
    alone, _, _ = make_trainers("original")
    second = FakeRank(1, 2)
    for rank in (second, FakeRank(0, 2, [second])):  # the second only leaves its gradient
        shard = copy.deepcopy(alone)
        shard.runtime.ranks = rank
        shard.fused_step = step.FusedStep(shard)
        shard.begin_epoch(0)
        shard.step(i)
    alone.begin_epoch(0)
    alone.step(i)
    assert relative_error(shard.fused_step.grad, alone.fused_step.grad) < 1e-6
    assert relative_error(shard.totals, alone.totals) < 1e-6
    for key, tensors in alone.state_dict().items():
        for name, tensor in tensors.items():
            assert relative_error(shard.state_dict()[key][name], tensor) < 1e-5, (key, name)


# --- CUDA graphs ---


def test_each_size_of_a_batch_is_captured_once(make_trainers, monkeypatch):
    """Its first step launches the kernels; those after it replay them."""
    fused, _, _ = make_trainers("original")
    fused = fused.fused_step
    calls = []

    class Graph:
        def __init__(self, name):
            self.name = name

        def replay(self):
            calls.append(f"replay {self.name}")

    def capture(function, *args):
        calls.append(f"capture {function.__name__} {args}")
        return Graph(f"{function.__name__} {args}")

    def gradient(size):
        calls.append(f"gradient {size}")

    def update_weights():
        calls.append("update_weights")

    monkeypatch.setattr(step, "INTERPRETED", False)
    monkeypatch.setattr(fused, "capture", capture)
    monkeypatch.setattr(fused, "gradient", gradient)
    monkeypatch.setattr(fused, "update_weights", update_weights)
    for i in (0, 1, 0, 1):
        fused.step(i)
    assert calls == [
        "gradient 2",
        "capture gradient (2,)",
        "update_weights",
        "capture update_weights ()",
        "gradient 1",
        "capture gradient (1,)",
        "replay update_weights ()",
        "replay gradient (2,)",
        "replay update_weights ()",
        "replay gradient (1,)",
        "replay update_weights ()",
    ]
