"""Heat maps: what they equal where the answer is known, what they leave untouched, and that they show what was learned."""

import dataclasses
import itertools

import pytest
import torch
from conftest import make_model, make_trainer
from torch import nn

import data
import gradcam
from augment import Augmentation
from gradcam import LAYER, METHODS, GradCAM, check_layer, has_grid, layer_shapes, to_unit
from recipe import RECIPES

GRADIENT_METHODS = list(gradcam.GRADIENT_METHODS)


def pictures(count, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


class Small(nn.Module):
    """A convolution, ReLU and a linear head, on the mean of each channel or on every position."""

    def __init__(self, pooled):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu = nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU()
        self.pooled, self.head = pooled, nn.Linear(5 if pooled else 5 * 16 * 16, 4)

    def forward(self, images):
        maps = self.relu(self.conv(images))
        return self.head(maps.mean((2, 3)) if self.pooled else maps.flatten(1))


# --- maps whose answer is known ---


@pytest.mark.parametrize("method", ["gradcam", "hirescam"])
def test_with_global_average_pooling_it_is_cam(method):
    model, images, targets = Small(pooled=True), pictures(6), torch.tensor([0, 1, 2, 3, 0, 1])
    activations = model.relu(model.conv(images)).detach()
    cam = torch.einsum("bk,bkhw->bhw", model.head.weight[targets].detach(), activations).relu()  # Zhou et al. 2016
    assert torch.allclose(GradCAM(model, "relu", method)(images, targets), to_unit(cam, (32, 32)), atol=1e-5)


def test_where_the_head_reads_positions_hirescam_does_and_gradcam_averages():
    model, images, targets = Small(pooled=False), pictures(4), torch.tensor([3, 2, 1, 0])
    activations = model.relu(model.conv(images)).detach()
    weights = model.head.weight[targets].detach().view(4, 5, 16, 16)  # what is owed to each place adds up to logit - bias
    for method, owed in (("hirescam", weights * activations), ("gradcam", weights.mean((2, 3), keepdim=True) * activations)):
        expected = to_unit(owed.sum(1).relu(), (32, 32))
        assert expected.amax((1, 2)).tolist() == [1] * 4
        assert torch.allclose(GradCAM(model, "relu", method)(images, targets), expected, atol=1e-5)


def test_gradcam_plus_plus_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    activations, gradients = torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    activations = activations.abs()
    gradients[0, 0] = 0  # a channel that does not matter has no weight, and divides nothing by nothing
    expected = torch.zeros(2, 4, 4, dtype=torch.float64)
    for b, k in itertools.product(range(2), range(3)):
        weight, total = 0, activations[b, k].sum().item()
        for g in gradients[b, k].flatten().tolist():
            alpha = g**2 / (2 * g**2 + total * g**3) if g > 0 else 0
            weight += alpha * max(g, 0)
        expected[b] += weight * activations[b, k]
    assert torch.allclose(gradcam.gradcam_plus_plus(activations, gradients), expected, rtol=1e-10)


def test_rollout_of_known_attention():
    first = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]])
    second = torch.tensor([[[0.0, 0.5, 0.5], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    # second, with its residual, gives CLS (1/2, 1/4, 1/4); first's rows are (1/2, 1/2, 0), (0, 1/2, 1/2), (0, 0, 1).
    assert gradcam.rollout([first, second]).tolist() == [[0.25 + 0.125, 0.125 + 0.25]]
    assert gradcam.rollout([torch.eye(3)[None]]).tolist() == [[0, 0]]


def test_attention_maps_are_the_token_maps_weighted():
    model, images, attentions = make_model(), pictures(3), []
    for block in model.blocks:
        block.attention.attend.register_forward_hook(lambda module, inputs, output: attentions.append(module.weigh(inputs[0])[0].mean(1)))
    with GradCAM(model, LAYER, "attention") as cam:
        maps = cam(images)
        assert len(attentions) == 2 and attentions[0].shape == (3, 33, 33)
        weights = gradcam.rollout(attentions)
    stem = model.stem
    expected = torch.einsum("bc,bchw->bhw", weights, stem.gelu2(stem.conv2(stem.gelu1(stem.conv1(images)))))
    assert torch.allclose(maps, to_unit(expected.relu(), (32, 32)), atol=1e-5)
    assert torch.equal(cam(images, torch.tensor([0, 0, 0])), cam(images, torch.tensor([1, 2, 3])))


def test_a_channels_weight_agrees_with_finite_differences(monkeypatch):
    model, images, targets, channel, step = make_model().double(), pictures(2).double(), torch.tensor([3, 5]), 7, 1e-5
    kept = {}
    monkeypatch.setitem(gradcam.GRADIENT_METHODS, "gradcam", lambda a, g: kept.update(gradients=g) or a.sum(1))
    GradCAM(model, LAYER, "gradcam")(images, targets)

    def logits(change):
        def add(module, inputs, output):
            return output + change * (torch.arange(32) == channel).view(1, 32, 1, 1)

        handle = model.stem.gelu2.register_forward_hook(add)
        found = model(images).gather(1, targets[:, None])[:, 0]
        handle.remove()
        return found

    slopes = (logits(step) - logits(-step)) / (2 * step)
    weights = kept["gradients"].mean((2, 3))[:, channel]
    assert weights.abs().min() > 1e-9 and torch.allclose(weights * 16 * 16, slopes, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_pictures(method):
    model, images, targets = make_model(), pictures(5), torch.tensor([0, 4, 9, 2, 2])
    with GradCAM(model, method=method) as cam:
        together = cam(images, targets)
        alone = torch.cat([cam(images[i : i + 1], targets[i : i + 1]) for i in range(5)])
    assert together.shape == (5, 32, 32) and torch.allclose(together, alone, atol=1e-4)
    assert together.amin((1, 2)).tolist() == [0] * 5 and together.amax((1, 2)).tolist() == [1] * 5


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_maps_are_of_the_predicted_class_unless_told(method):
    model, images = make_model(), pictures(4)
    cam = GradCAM(model, method=method)
    maps = cam(images)
    assert torch.equal(cam.logits, model(images).detach())
    assert torch.equal(maps, cam(images, model(images).argmax(1))) and torch.equal(maps, cam(images, model(images).argmax(1).tolist()))
    assert not torch.allclose(maps, cam(images, model(images).argmin(1)), atol=0.1)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e6])
def test_a_constant_map_gives_zeros(value):
    assert torch.equal(to_unit(torch.full((2, 15, 13), value), (32, 32)), torch.zeros(2, 32, 32))


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_class_that_nothing_speaks_for_gives_zeros(method):
    model = make_model()
    nn.init.zeros_(model.head.weight)
    assert torch.equal(GradCAM(model, method=method)(pictures(2)), torch.zeros(2, 32, 32))


def test_bilinear_interpolation_keeps_the_place():
    maps = torch.zeros(1, 16, 16)
    maps[0, 3, 11] = 2.0
    found = to_unit(maps, (32, 32))[0]
    assert (found == 1).nonzero().tolist() == [[6, 22], [6, 23], [7, 22], [7, 23]] and found[8, 22] == pytest.approx(1 / 3)


# --- what is left untouched ---


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values())]


@pytest.mark.parametrize("method", METHODS)
def test_hooks_go_and_modes_and_gradients_stay(method):
    model = make_model().train()
    model.blocks[0].eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
        parameter.grad = torch.full_like(parameter, i) if i % 2 else None
    before = [(p.grad, None if p.grad is None else p.grad.clone(), p.requires_grad, p.detach().clone()) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    with GradCAM(model, method=method) as cam:
        assert not any(module.training for module in model.modules()) and hooks_of(model)
        cam(pictures(2))
    cam(pictures(2))
    assert not hooks_of(model) and [module.training for module in model.modules()] == modes
    for parameter, (grad, values, required, weights) in zip(model.parameters(), before):
        assert parameter.grad is grad and (grad is None or torch.equal(grad, values))
        assert parameter.requires_grad == required and torch.equal(parameter, weights)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["block", "forward", "pictures", "targets"])
def test_an_exception_passes_and_leaves_nothing_behind(method, where, monkeypatch):
    model = make_model().train()
    if where == "forward":
        monkeypatch.setattr(model.norm, "forward", lambda x: (_ for _ in ()).throw(Stopped))
    with pytest.raises((Stopped, ValueError)):
        with GradCAM(model, method=method) as cam:
            if where == "block":
                raise Stopped
            cam(pictures(2)[:, :2] if where == "pictures" else pictures(2), [0, 10] if where == "targets" else None)
    assert not hooks_of(model) and all(module.training for module in model.modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", METHODS)
def test_the_callers_mode_and_frozen_parameters_change_nothing(method, mode):
    model, targets = make_model(), torch.tensor([1, 2])
    expected = GradCAM(model, method=method)(pictures(2), targets)
    for required in (True, False):
        model.requires_grad_(required)
        with mode():
            assert torch.equal(GradCAM(model, method=method)(pictures(2), targets.clone()), expected)
            assert not torch.is_grad_enabled()


def test_a_block_within_its_own_block_is_refused():
    model = make_model()
    with GradCAM(model) as cam:
        with pytest.raises(RuntimeError):
            cam.__enter__()
    assert not hooks_of(model)


@pytest.mark.parametrize("targets", [[0, 10], [-1, 0], [0], [[0], [1]], 3])
def test_targets_that_are_no_classes_are_refused(targets):
    with pytest.raises(ValueError, match="2 classes from 0 to 9"):
        GradCAM(make_model())(pictures(2), targets)


# --- layers ---


def test_the_stem_has_a_grid_and_nothing_else():
    model = make_model()
    shapes = layer_shapes(model, pictures(1))
    assert not hooks_of(model) and set(shapes) == {name for name, _ in model.named_modules() if name}
    assert {name: shape for name, shape in shapes.items() if has_grid(shape)} == {
        "stem.conv1": (32, 32, 32), "stem.gelu1": (32, 32, 32), "stem.conv2": (32, 16, 16), "stem.gelu2": (32, 16, 16),
    }  # fmt: skip
    assert shapes["blocks.1"] == (33, 64) and shapes["head"] == (10,)
    assert not has_grid((64, 33, 1)) and not has_grid((64, 1, 33))
    for layer in ("stem.conv1", "stem.gelu1", "stem.conv2", "stem.gelu2"):
        assert GradCAM(model, layer)(pictures(1)).shape == (1, 32, 32)


@pytest.mark.parametrize("layer", ["blocks.0.attention.qkv", "stem", "head", "stem.gelu3", ""])
def test_a_layer_without_a_grid_is_refused(layer):
    model = make_model()
    with pytest.raises(ValueError, match="maps can be read off stem.conv1, stem.gelu1, stem.conv2, stem.gelu2$"):
        check_layer(layer, layer_shapes(model, pictures(1)))
    with pytest.raises(ValueError, match=f"layer '{layer}'"):
        GradCAM(model, layer)(pictures(1))
    assert not hooks_of(model)


@pytest.mark.parametrize("layer", ["stem.conv1", "stem.gelu1"])
def test_attention_speaks_of_tokens_alone(layer):
    with pytest.raises(ValueError, match="stem.conv2 and stem.gelu2"):
        GradCAM(make_model(), layer, "attention")
    with pytest.raises(ValueError):
        GradCAM(Small(pooled=True), "relu", "attention")


def test_a_method_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="gradcam, hirescam"):
        GradCAM(make_model(), LAYER, "scorecam")


# --- every method, and maps that know nothing ---


def test_rivals_know_nothing_of_the_network():
    images = torch.zeros(3, 3, 32, 32)
    images[:, :, :, 20:] = 1.0  # an edge between columns 19 and 20
    maps = gradcam.rivals(images, (16, 16), torch.Generator().manual_seed(0))
    assert list(maps) == ["random pixels", "random grid", "centre", "edges"]
    assert all(heat.shape == (3, 32, 32) and heat.min() >= 0 and heat.max() <= 1 for heat in maps.values())
    assert maps["edges"][0].nonzero()[:, 1].unique().tolist() == [19, 20]
    assert (maps["centre"][0] == 1).nonzero().tolist() == [[15, 15], [15, 16], [16, 15], [16, 16]]
    assert not torch.equal(maps["random grid"][0], maps["random grid"][1]) and not torch.equal(maps["random pixels"][0], maps["random pixels"][1])


# --- a network that has learned something ---


@pytest.fixture(scope="module")
def learned():
    """A network after a short training on shapes that knows half of them, and the data."""
    dataset = data.load_shapes(train=2000, test=200)
    small_start = {"l1": 0.0, "weight_decay": 0.05, "embedding_std": 0.02}
    recipe = dataclasses.replace(RECIPES["original"], epochs=8, batch_size=100, max_lr=0.004, augmentation=Augmentation(), **small_start)
    trainer = make_trainer(dataset, recipe)
    for epoch in range(recipe.epochs):
        _, accuracy = trainer.epoch(epoch, trainer.steps_per_epoch)
    assert accuracy > 40
    return trainer, dataset


def likeness(a, b):
    """Mean over pictures of the magnitude of the correlation of two maps (B, S, S)."""
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a.flatten(1), b.flatten(1))]).abs().nanmean()


@pytest.mark.parametrize("method", METHODS)
def test_maps_of_fresh_weights_do_not_resemble_those_of_trained_ones(learned, method):
    """The sanity check of Adebayo et al. 2018, arXiv:1810.03292; weights hardly changed show that the measure can tell."""
    trainer, dataset = learned
    images, labels = trainer.normalize(dataset.test_images), dataset.test_labels
    near, fresh = make_model(), make_model(seed=5)
    near.load_state_dict({name: weight * 1.001 for name, weight in trainer.model.state_dict().items()})
    maps, of_near, of_fresh = (GradCAM(model, method=method)(images, labels) for model in (trainer.model, near, fresh))
    assert likeness(maps, of_near) > 0.99 and likeness(maps, of_fresh) < 0.5


def test_maps_beat_chance(learned, monkeypatch):
    monkeypatch.setattr(gradcam, "METRICS_BATCH", 20)
    trainer, dataset = learned
    images, masks = trainer.normalize(dataset.test_images[:50]), dataset.test_masks[:50]
    found = gradcam.measure(trainer.model, trainer.runtime, LAYER, images, masks, torch.Generator().manual_seed(0))
    assert list(found) == ["random pixels", "random grid", "centre", "edges", *METHODS]
    mean = {name: {key: value.mean().item() for key, value in values.items()} for name, values in found.items()}
    assert all(len(value) == 50 for values in found.values() for value in values.values())
    ours, chance = mean[gradcam.METHOD], mean["random grid"]
    assert ours["insertion"] > chance["insertion"] + 0.05 and ours["deletion"] < chance["deletion"] - 0.05
    assert ours["inside"] > chance["inside"] + 0.05 and chance["inside"] == pytest.approx(masks.float().mean().item(), abs=0.02)
