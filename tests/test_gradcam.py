"""Saliency maps where the answer is known, the measures that judge them, and the script."""

import itertools
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, save_small_checkpoint
from PIL import Image
from torch import nn

import faithfulness
import gradcam
import plots
from augment import Normalize
from cli import read_csv
from gradcam import LAYER, METHODS, GradCAM, is_spatial
from sources import SHAPE_NAMES

BASELINES = ["random pixels", "random grid", "center", "edges"]


@pytest.fixture(autouse=True)
def few_masks(monkeypatch):
    monkeypatch.setattr(gradcam, "NUM_MASKS", 4)


def noise(count, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def explain(model, layer, method, *args, **kwargs):
    with GradCAM(model, layer, method) as cam:
        return cam(*args, **kwargs)


def upsampled(maps):
    return F.interpolate(maps[:, None], (32, 32), mode="bilinear", align_corners=False)[:, 0]


def unit(maps):
    return gradcam.normalize_map(upsampled(maps.relu()))


def test_maps_of_a_linear_head():
    """A convolution, an in-place ReLU, and a head that reads every position."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU(inplace=True))
    model = nn.Sequential(features, nn.Flatten(), nn.Linear(5 * 256, 4))
    images, targets = noise(4), torch.tensor([3, 2, 1, 0])
    activations, weights = features(images).detach(), model[2].weight[targets].detach()
    weights = weights.view(4, 5, 16, 16)
    factors = {"hirescam": weights, "gradcam": weights.mean((2, 3), keepdim=True)}
    factors["layercam"] = weights.relu()
    for method, factor in factors.items():
        expected = (factor * activations).sum(1)
        raw = explain(model, "0.1", method, images, targets, normalize=False)
        assert torch.allclose(raw, upsampled(expected.relu()), atol=1e-6)
        maps = explain(model, "0.1", method, images, targets)
        assert torch.allclose(maps, unit(expected), atol=1e-5)
    # The gradient before an in-place ReLU is 0 where the ReLU is.
    maps = explain(model, "0.0", "hirescam", images, targets)
    assert torch.allclose(maps, unit((weights * activations).sum(1)), atol=1e-5)


def test_gradcam_plus_plus_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    activations, gradients = torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    activations = activations.abs()
    gradients[0, 0] = 0  # the formula is 0 / 0 here
    g, total = gradients, activations.sum((2, 3), keepdim=True)
    alpha = torch.where(g > 0, g**2 / (2 * g**2 + total * g**3), 0)
    expected = ((alpha * g.relu()).sum((2, 3), keepdim=True) * activations).sum(1)
    assert torch.allclose(gradcam.gradcam_plus_plus(activations, gradients), expected, rtol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_batches_and_targets(method):
    model, images, targets = make_model(), noise(5), torch.tensor([0, 4, 9, 2, 2])
    with GradCAM(model, method=method) as cam, torch.no_grad():
        maps, predicted = cam(images, targets), model(images).argmax(1)
        alone = torch.cat([cam(images[i : i + 1], targets[i : i + 1]) for i in range(5)])
        assert maps.shape == (5, 32, 32) and torch.allclose(maps, alone, atol=1e-4)
        assert maps.amin((1, 2)).tolist() == [0] * 5 and maps.amax((1, 2)).tolist() == [1] * 5
        assert torch.equal(cam(images), cam(images, predicted))
        assert not torch.equal(cam(images), cam(images, (predicted + 1) % 10))
        model.head.weight.zero_()
        assert not cam(images).any()  # nothing speaks for any class


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_behind(method):
    model = make_model()
    hooks = lambda: [1 for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
        parameter.grad = torch.full_like(parameter, i)
    for images in (noise(2), torch.zeros(1, 3, 16, 16)):  # the second is refused by the network
        try:
            with GradCAM(model, method=method) as cam:
                assert hooks() or method == "combined"  # which has them in the call
                cam(images)
        except ValueError as error:
            assert "16" in str(error)
        assert not hooks()
    for i, parameter in enumerate(model.parameters()):
        assert parameter.requires_grad == (i % 3 > 0) and (parameter.grad == i).all()


@pytest.mark.parametrize("method", gradcam.MASK_METHODS)
def test_masked_gradients_of_a_linear_network(method):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    images, targets, others = noise(4), torch.tensor([3, 2, 1, 0]), torch.tensor([0, 1, 2, 3])
    maps = explain(model, "image", method, images, targets, others, normalize=False)
    weights = model[1].weight.detach().view(4, 3, 32, 32)
    weights = weights[targets] - (method == "contrast") * weights[others]
    change = images - faithfulness.blur(images, 4) / 2  # half of the replacements are the mean
    expected = faithfulness.blur((weights * change).sum(1).relu(), 1)  # the Shapley values
    assert torch.allclose(maps, expected, atol=1e-5)


@pytest.mark.parametrize("network", ["cnn", "resnet18"])
@pytest.mark.parametrize("method", METHODS)
def test_maps_of_other_networks(network, method):
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(245, 3))
    layer, images = "1", torch.rand(2, 1, 9, 9)
    if network == "resnet18":  # torchvision fails in several ways to import beside a CPU build
        models = pytest.importorskip("torchvision.models", exc_type=Exception)
        model, layer, images = models.resnet18().eval(), "layer4", torch.rand(2, 3, 64, 64)
    with pytest.raises(KeyError), GradCAM(model, layer, method) as cam:
        assert cam(images).shape == (2, *images.shape[2:])
        raise KeyError
    assert not model.get_submodule(layer)._forward_hooks


def test_finercam_is_the_gradient_of_a_difference():
    model, images, others = make_model(), noise(3), torch.tensor([5, 6, 7])
    maps = explain(model, LAYER, "finercam", images, others - 4, others)
    model.head.weight.data[1:4] -= model.head.weight.data[5:8]
    expected = explain(model, LAYER, "hirescam", images, others - 4)
    assert torch.allclose(maps, expected, atol=1e-4)


def test_combined_is_a_weighted_product():
    model, images = make_model(), noise(3)
    fine = explain(model, "image", "masked-gradients", images, normalize=False)
    expected = fine * (0.5 + explain(model, LAYER, "gradcam++", images))
    maps = explain(model, LAYER, "combined", images, normalize=False)
    assert torch.allclose(maps, expected, rtol=1e-3)


def test_imputed_pixels_are_means_of_their_neighbors():
    images, removed = noise(2), torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    removed[:, :, 5, 5] = True
    sides = images[:, :, 5, [4, 6]].sum(2) + images[:, :, [4, 6], 5].sum(2)
    corners = images[:, :, 4:7, 4:7].sum((2, 3)) - sides - images[:, :, 5, 5]
    imputed = faithfulness.impute(images, removed)
    assert torch.allclose(imputed[:, :, 5, 5], sides / 6 + corners / 12, atol=1e-5)
    assert torch.equal(imputed.where(~removed, 0), images.where(~removed, 0))
    ramp = torch.arange(8.0).expand(2, 1, 8, 8) + torch.arange(8.0)[:, None]
    removed = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    removed[:, :, 2:5, 3:6] = True  # a linear function is its own mean
    assert torch.allclose(faithfulness.impute(ramp.where(~removed, 99), removed), ramp, atol=1e-4)


def test_randomization_of_known_maps():
    of_images = lambda model, images: images.mean(1)
    of_weights = lambda model, images: model.stem.proj.weight[:2, :225].detach().view(2, 15, 15)
    for explain, expected in ((of_images, 1), (of_weights, 0)):
        generator = torch.Generator().manual_seed(0)
        results = faithfulness.randomization(explain, make_model(), noise(2), generator)
        for name, value in (("mprt", expected), ("smprt", expected), ("emprt", 0)):
            assert results[name].tolist() == pytest.approx([value] * 2, abs=0.2)


def test_layers_without_a_grid():
    model = make_model()
    assert is_spatial((1, 2, 2)) and not is_spatial((64, 33, 1)) and not is_spatial((33, 64))
    for layer in ("blocks.0.attention.qkv", "stem", "head"):
        with pytest.raises(ValueError, match=f"layer '{layer}' outputs .* no grid"):
            explain(model, layer, "gradcam", noise(1))


def test_baselines_do_not_know_the_network():
    images = (torch.arange(32) >= 20).float().expand(3, 3, 32, 32)  # an edge, columns 19 and 20
    maps = faithfulness.baselines(images, torch.Generator().manual_seed(0))
    assert list(maps) == BASELINES
    assert all(m.shape == (3, 32, 32) and m.min() >= 0 and m.max() <= 1 for m in maps.values())
    assert not gradcam.normalize_map(upsampled(torch.full((2, 15, 13), 0.1))).any()  # rounding
    assert maps["edges"][0].nonzero()[:, 1].unique().tolist() == [19, 20]
    assert (maps["center"][0] == 1).nonzero().unique().tolist() == [15, 16]
    assert not torch.equal(*maps["random grid"][:2])


def test_insertion_and_deletion_are_loops_over_images_and_steps():
    generator, S, steps = torch.Generator().manual_seed(0), 32, faithfulness.STEPS
    saliency, images = torch.rand(3, S, S, generator=generator), noise(3)
    weights = torch.randn(3, S, S, generator=generator) / 20
    score = lambda images: (images * weights).sum((1, 2, 3)).sigmoid()
    results = faithfulness.evaluate(saliency, images, saliency > 0.7, score, generator)
    square = (torch.arange(S)[:, None] - torch.arange(S)) ** 2
    bell = (-square / (2 * faithfulness.BLUR_STD**2)).exp()
    bell /= bell.sum(1, keepdim=True)
    blurred = torch.einsum("yv,xu,bcvu->bcyx", bell, bell, images)
    mean = torch.zeros_like(images)
    replaced = {"insertion": (blurred, images), "deletion": (images, mean)}
    replaced |= {"insertion_mean": (mean, images), "deletion_blur": (images, blurred)}
    for i, (name, (start, end)) in itertools.product(range(3), replaced.items()):
        order = saliency[i].flatten().argsort(descending=True)
        image, values = start[i].clone().flatten(1), []
        for step in range(steps + 1):
            taken = order[: step * S * S // steps]
            image[:, taken] = end[i].flatten(1)[:, taken]
            values.append(score(image.view(1, 3, S, S)).item())
        area = (sum(values) - (values[0] + values[-1]) / 2) / steps
        assert results[name][i].item() == pytest.approx(area, abs=1e-5)
    assert results["pointing"].tolist() == [1, 1, 1]
    off_center = (saliency[:, 15:17, 15:17] <= 0.7).all((1, 2))
    assert torch.equal(results["inside_off_center"], results["inside"][off_center])
    without_masks = faithfulness.evaluate(saliency, images, None, score, generator)
    assert set(without_masks) == {*replaced, "road"}


def test_ties_are_in_random_order():
    end, saliency, seen = torch.ones(400, 3, 8, 8), torch.zeros(400, 8, 8), []
    saliency[:, 7, 7] = 1
    score = lambda images: seen.append(images[:, 0]) or torch.zeros(len(images))
    generator = torch.Generator().manual_seed(0)
    faithfulness.perturbation_curve(score, 0 * end, end, saliency, generator)
    assert (seen[1][:, 7, 7] == 1).all() and (seen[1].sum((1, 2)) == 4).all()
    half = seen[faithfulness.STEPS // 2].mean(0).flatten()[:63]
    assert half.min() > 0.35 and half.max() < 0.65


def test_pointing_games():
    masks = torch.zeros(4, 4, 4, dtype=torch.bool)
    masks[:, :2, :2] = True  # a quarter of the image
    saliency = torch.zeros(4, 4, 4)
    saliency[0, 1, 1], saliency[0, 3, 3] = 1.0, 0.5
    saliency[1, 3, 3], saliency[1, 0, 0] = 1.0, 0.25
    saliency[2, 0, 0] = saliency[2, 3, 0] = 1.0  # two maxima; the last map is zero
    assert faithfulness.pointing_game(saliency, masks).tolist() == [1, 0, 0.5, 0.25]
    energy = faithfulness.energy_pointing_game(saliency, masks).tolist()
    assert energy == pytest.approx([2 / 3, 0.2, 0.5, 0.25])


def test_summary_is_mean_and_standard_error():
    rows = faithfulness.summarize({"a": {"insertion": torch.tensor([1.0, 2.0, 3.0, 4.0])}}, n=4)
    row = {"n": 4, "map": "a", "insertion": 2.5, "insertion_se": pytest.approx(0.645497)}
    assert rows == [row]
    assert faithfulness.table(rows).splitlines()[2] == "| a | 2.500 +- 0.645 |"


@pytest.fixture
def ckpt(small, small_shapes, tmp_path):
    """Fresh weights for `--data shapes`, which has 100 test images."""
    path = tmp_path / "made" / "best.pt"
    return save_small_checkpoint(path, small, data_sha256=small.fingerprint())


@pytest.fixture
def draw(ckpt, succeeds, monkeypatch):
    """draw(flags) runs the script: (arguments of plots.heat_maps, stdout)."""
    spy = Mock(wraps=plots.heat_maps)
    monkeypatch.setattr(plots, "heat_maps", spy)

    def run(flags):
        out = succeeds(gradcam, ["--ckpt", ckpt, "--n", 3, *flags.split()])
        return spy.call_args.args, out

    return run


@pytest.mark.parametrize("flags", ["--n 9", "--correct", "--class star", "--target ring"])
def test_maps_are_of_the_classes_named(flags, ckpt, small, draw):
    flags += " --method hirescam"
    (images, titles, maps, captions, names, _), out = draw(f"{flags} --precision bf16")
    model, normalize = make_model(), Normalize(small.mean, small.std, "cpu")
    logits = model(normalize(images)).detach()
    for i, title in enumerate(titles):
        index = (small.test_images == images[i]).flatten(1).all(1).nonzero().item()
        predicted, second = logits[i].topk(2).indices.tolist()
        actual, target = small.test_labels[index].item(), SHAPE_NAMES.index("ring")
        choices = {"predicted": predicted, "second": second, "actual": actual, "target": target}
        assert title == SHAPE_NAMES[actual] and (predicted == actual) == ("--correct" in flags)
        raw = []
        for caption, name in zip(captions[i], names, strict=True):
            k = torch.tensor([choices[name]])
            assert caption == f"{100 * logits[i].softmax(0)[k].item():.0f} % {SHAPE_NAMES[k]}"
            raw += explain(model, LAYER, "hirescam", normalize(images[[i]]), k, normalize=False)
        assert torch.allclose(maps[i], torch.stack(raw) / torch.stack(raw).max(), atol=1e-4)
    assert len(titles) in (3, 9) and len(names) == (1 if "--target" in flags else 2)
    # Classes take turns; fresh weights predict one class only.
    expected = {"--class": {"star"}, "--correct": {"triangle"}}.get(flags.split()[0])
    assert set(titles) == expected if expected else len(set(titles)) == len(titles)
    if "--correct" in flags:
        assert draw(f"{flags} --seed 1")[1] == out != draw(f"{flags} --seed 2")[1]
    assert sorted(path.name for path in ckpt.parent.iterdir()) == ["best.pt", "gradcam.png"]


def test_image_files(tmp_path, draw):
    paths = [tmp_path / "wide\x1b.png", tmp_path / "small.jpg"]
    for path, size in zip(paths, [(300, 200), (8, 8)]):
        Image.new("RGB", size, (200, 30, 90)).save(path)
    args, out = draw(f"--image {paths[0]} {paths[1]} --save-maps {tmp_path}/maps.npy")
    _, names, maps, (caption, _), *_ = args
    assert maps.shape == (2, 3, 32, 32) and names == ["wide\\x1b.png", "small.jpg"]
    assert f"wide\\x1b.png: 1st {caption[0]}, 2nd {caption[1]}, 3rd {caption[2]}\n" in out
    raw = torch.from_numpy(np.load(tmp_path / "maps.npy"))
    scaled = raw / raw.amax((1, 2, 3), keepdim=True)
    assert torch.equal(scaled, maps) and not torch.equal(raw, maps)


def test_metrics(ckpt, tmp_path, succeeds, monkeypatch):
    monkeypatch.setattr(faithfulness, "STEPS", 4)
    monkeypatch.setattr(gradcam, "SANITY_IMAGES", 2)
    args = ["--ckpt", ckpt, "--metrics", 8, "--out", tmp_path, "--seed", 3]
    out = succeeds(gradcam, args)
    assert "| hirescam | 0." in out and out.isascii()
    rows = read_csv(tmp_path / "gradcam_metrics.csv")
    assert [row["map"] for row in rows] == [*BASELINES, *METHODS] and rows[0]["n"] == "8"
    assert succeeds(gradcam, args) == out
    assert rows[-1]["mprt"] and not rows[0]["mprt"]  # baselines do not know the weights


def test_list_layers(ckpt, succeeds):
    lines = succeeds(gradcam, ["--ckpt", ckpt, "--list-layers"]).splitlines()
    layers = [line.split()[0] for line in lines if line.endswith("has a grid")]
    assert layers == ["image", "stem.conv1", "stem.gelu1", "stem.conv2", "stem.gelu2"]
    assert "blocks.0.attention.qkv       (33, 192)      no grid" in lines


@pytest.mark.parametrize("args, message", [
    ("--layer blocks.0", "layers with a grid are image, stem.conv1, stem.gelu1, stem"),
    ("--n 101", "--n 101: shapes has "),
    ("--metrics 101", "--metrics 101: it takes 2 to 100 test images of shapes"),
    ("--metrics --save-maps x.npy", "--metrics shows no images"),
    ("--image x.png --correct", "--image no test images"),
    ("--class cat", "--class cat: the classes are checkered, crescent"),
    ("--target cat", "--target cat: the classes are checkered, crescent"),
    ("--out made/best.pt", "--out"),
])  # fmt: skip
def test_wrong_usage(args, message, ckpt, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    out = [] if "--out" in args else ["--out", "made/new"]
    assert message in fails(gradcam, ["--ckpt", ckpt, *args.split(), *out])
    assert sorted(tmp_path.rglob("*")) == before
