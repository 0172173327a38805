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


def noise(count):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def explain(model, layer, method, *args, **kwargs):
    with GradCAM(model, layer, method) as cam:
        return cam(*args, **kwargs)


def upsampled(maps):
    return F.interpolate(maps[:, None], (32, 32), mode="bilinear", align_corners=False)[:, 0]


def test_maps_of_a_linear_head():
    """A convolution, an in-place ReLU, and a head that reads every position."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU(inplace=True))
    model = nn.Sequential(features, nn.Flatten(), nn.Linear(5 * 256, 4))
    images, classes = noise(4), torch.tensor([[3, 2, 1, 0], [1, 1, 2, 2]])
    activations = features(images).detach()
    model[2].weight.data[:2, :256] = 0  # gradcam++ is 0 / 0 in its paper there
    weights, others = model[2].weight[classes].detach().view(2, 4, 5, 16, 16)
    cubes = activations.sum((2, 3), keepdim=True) * weights**3
    alphas = torch.where(weights > 0, weights**2 / (2 * weights**2 + cubes), 0)
    factors = {"hirescam": weights, "gradcam": weights.mean((2, 3), keepdim=True)}
    factors |= {"layercam": weights.relu(), "finercam": weights - others}
    factors["gradcam++"] = (alphas * weights.relu()).sum((2, 3), keepdim=True)
    for method, factor in factors.items():
        expected = upsampled((factor * activations).sum(1).relu())
        raw = explain(model, "0.1", method, images, *classes, normalize=False)
        assert torch.allclose(raw, expected, atol=1e-6)
        maps = explain(model, "0.1", method, images, *classes)
        assert torch.allclose(maps, gradcam.normalize_map(expected), atol=1e-5)
        # The gradient before an in-place ReLU is 0 where the ReLU is.
        before = explain(model, "0.0", method, images, *classes, normalize=False)
        assert torch.allclose(before, raw, atol=1e-6) == ("gradcam" not in method)


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
    with pytest.raises(ValueError, match="16"), GradCAM(model, method=method) as cam:
        assert bool(hooks()) == (method not in gradcam.MASK_METHODS)
        cam(noise(2))
        cam(torch.zeros(1, 3, 16, 16))  # refused by the network
    assert not hooks()
    for i, parameter in enumerate(model.parameters()):
        assert parameter.requires_grad == (i % 3 > 0) and (parameter.grad == i).all()


@pytest.mark.parametrize("method, power", [*zip(gradcam.MASK_METHODS, (2, 1, 1))])
def test_masked_gradients_are_what_pixels_add(method, power):
    images, targets, others = noise(4), torch.tensor([3, 2, 1, 0]), torch.tensor([0, 1, 2, 3])
    weights = noise(4) / 100  # a straight path is exact for squares too
    model = lambda images: images.pow(power).flatten(1) @ weights.flatten(1).T
    maps = explain(model, "image", method, images, targets, others, normalize=False)
    factors = weights[targets] - (method == "contrast") * weights[others]
    added = images**power - faithfulness.blur(images, 4) ** power / 2  # the mean replaces half
    expected = faithfulness.blur((factors * added).sum(1).relu(), 1)  # the Shapley values
    assert torch.allclose(maps, expected, atol=1e-5)


@pytest.mark.parametrize("network", ["cnn", "resnet18"])
@pytest.mark.parametrize("method", METHODS)
def test_maps_of_other_networks(network, method):
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(245, 3))
    layer, images = "1", torch.rand(2, 1, 9, 9)
    if network == "resnet18":  # torchvision fails in several ways to import beside a CPU build
        models = pytest.importorskip("torchvision.models", exc_type=Exception)
        model, layer, images = models.resnet18().eval(), "layer4", torch.rand(2, 3, 64, 64)
    assert explain(model, layer, method, images).shape == (2, *images.shape[2:])


def test_methods_share_gradients():
    model, images = make_model(), noise(3)
    alone = {method: explain(model, None, method, images, normalize=False) for method in METHODS}
    model.forward = Mock(wraps=model.forward)
    maps = explain(model, None, METHODS, images, normalize=False)
    assert model.forward.call_count == 2 + 2 * 2 * gradcam.NUM_MASKS and list(maps) == [*METHODS]
    assert all(torch.allclose(maps[k], alone[k], rtol=1e-4, atol=1e-6) for k in METHODS)
    expected = alone["masked-gradients"] * (0.5 + explain(model, None, "gradcam++", images))
    assert torch.allclose(maps["combined"], expected, rtol=1e-3)


def test_imputed_pixels_are_means_of_their_neighbors():
    images, generator = noise(2), torch.Generator().manual_seed(0)
    removed = torch.rand(2, 1, 32, 32, generator=generator) < 0.3
    removed[0, :, 5:25, 6:26] = True
    imputed = faithfulness.impute(images, removed)
    assert torch.equal(imputed.where(~removed, 0), images.where(~removed, 0))
    kernel = torch.tensor([[1, 2, 1], [2, 0, 2], [1, 2, 1]]).float()
    sums = lambda x: F.conv2d(x, kernel.expand(3, 1, 3, 3), padding=1, groups=3)
    error = (sums(imputed) / sums(torch.ones_like(images)) - imputed) * removed
    assert error.abs().max() < faithfulness.ROAD_TOLERANCE
    ramp = torch.arange(32) / 8 - torch.arange(32)[:, None] / 9  # its own mean off the border
    imputed = faithfulness.impute(ramp.where(~removed[:1], 99), removed[:1])
    assert (imputed - ramp)[..., 5:25, 6:26].abs().max() < faithfulness.ROAD_NOISE


def test_randomization_of_known_maps():
    weights = lambda model: model.stem.proj.weight[:2, :225].detach().view(2, 15, 15)
    explain = lambda model, images: {"images": images.mean(1), "weights": weights(model)}
    generator = torch.Generator().manual_seed(0)
    results = faithfulness.randomization(explain, make_model(), noise(2), generator)
    for name, expected in (("images", 1), ("weights", 0)):
        for measure, value in (("mprt", expected), ("smprt", expected), ("emprt", 0)):
            assert results[name][measure].tolist() == pytest.approx([value] * 2, abs=0.2)


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
    bell = (-square / (2 * faithfulness.BLUR_STD**2)).softmax(1)
    blurred, mean = torch.einsum("yv,xu,bcvu->bcyx", bell, bell, images), torch.zeros_like(images)
    replaced = {"insertion": (blurred, images), "deletion": (images, mean)}
    replaced |= {"insertion_mean": (mean, images), "deletion_blur": (images, blurred)}
    for i, (name, (start, end)) in itertools.product(range(3), replaced.items()):
        order = saliency[i].flatten().argsort(descending=True)
        image, values = start[i].clone().flatten(1), []
        for step in range(steps):
            taken = order[: int((step + 0.5) * S * S / steps)]
            image[:, taken] = end[i].flatten(1)[:, taken]
            values.append(score(image.view(1, 3, S, S)).item())
        assert results[name][i].item() == pytest.approx(sum(values) / steps, abs=1e-5)
    assert results["pointing"].tolist() == [1, 1, 1]
    off_center = (saliency[:, 15:17, 15:17] <= 0.7).all((1, 2))
    assert torch.equal(results["inside_off_center"], results["inside"][off_center])
    assert {*faithfulness.evaluate(saliency, images, None, score, generator)} == {*replaced, "road"}


def test_ties_are_in_random_order():
    saliency = torch.zeros(400, 8, 8)
    saliency[:, 7, 7] = 1
    ranks = faithfulness.pixel_ranks(saliency, torch.Generator().manual_seed(0)).flatten(1)
    assert ranks.sort(1).values.equal(torch.arange(64).expand(400, 64)) and not ranks[:, 63].any()
    half = (ranks[:, :63] < 32).float().mean(0)
    assert half.min() > 0.35 and half.max() < 0.65


def test_pointing_games():
    masks = torch.zeros(4, 4, 4, dtype=torch.bool)
    masks[:, :2, :2] = True  # a quarter of the image
    saliency = torch.zeros(4, 4, 4)
    saliency[0, 1, 1], saliency[0, 3, 3] = 1.0, 0.5
    saliency[1, 3, 3], saliency[1, 0, 0] = 1.0, 0.25
    saliency[2, 0, 0] = saliency[2, 3, 0] = 1.0  # two maxima; the last map is zero
    pointing, inside = faithfulness.pointing_games(saliency, masks)
    assert pointing.tolist() == [1, 0, 0.5, 0.25]
    assert inside.tolist() == pytest.approx([2 / 3, 0.2, 0.5, 0.25])


def test_summary_is_mean_and_standard_error():
    batches = [{"a": {"insertion": torch.tensor(values)}} for values in ([1.0, 2.0, 3.0], [4.0])]
    rows = faithfulness.summarize(batches, n=4)
    assert rows == [{"n": 4, "map": "a", "insertion": 2.5, "insertion_se": pytest.approx(0.645497)}]
    assert faithfulness.table(rows).splitlines()[2] == "| a | 2.500 +- 0.645 |"


@pytest.fixture
def ckpt(small, small_shapes, tmp_path):
    """Fresh weights for `--data shapes`, which has 100 test images."""
    path = tmp_path / "made" / "best.pt"
    return save_small_checkpoint(path, small, data_sha256=small.fingerprint())


@pytest.fixture
def draw(ckpt, succeeds, monkeypatch):
    """draw(flags) runs the script: (arguments of plots.heat_maps, stdout)."""
    monkeypatch.setattr(plots, "heat_maps", Mock(wraps=plots.heat_maps))

    def run(flags):
        out = succeeds(gradcam, ["--ckpt", ckpt, "--n", 3, *flags.split()])
        return plots.heat_maps.call_args.args, out

    return run


@pytest.mark.parametrize("flags", ["--n 9", "--correct", "--class star", "--target ring"])
def test_maps_are_of_the_classes_named(flags, ckpt, small, draw):
    flags += " --method finercam"
    (images, titles, maps, captions, names, _), out = draw(f"{flags} --precision bf16")
    model, normalize = make_model(), Normalize(small.mean, small.std, "cpu")
    logits = model(normalize(images)).detach()
    for i, title in enumerate(titles):
        index = (small.test_images == images[i]).flatten(1).all(1).nonzero().item()
        predicted, second = logits[i].topk(2).indices.tolist()
        actual, target = small.test_labels[index].item(), SHAPE_NAMES.index("ring")
        choices = {"predicted": predicted, "second": second, "actual": actual, "target": target}
        assert title == SHAPE_NAMES[actual] and (predicted == actual) == ("--correct" in flags)
        raw, classes = [], torch.tensor([[choices[name]] for name in names])
        others = classes.flip(0) if len(names) == 2 else [None]  # each is contrasted with the other
        for caption, k, other in zip(captions[i], classes, others, strict=True):
            assert caption == f"{100 * logits[i].softmax(0)[k].item():.0f} % {SHAPE_NAMES[k]}"
            image = normalize(images[[i]])
            raw += explain(model, LAYER, "finercam", image, k, other, normalize=False)
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
    monkeypatch.setattr(gradcam, "BATCH_SIZE", 5)
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
    assert is_spatial((1, 2, 2)) and not is_spatial((64, 33, 1)) and not is_spatial((33, 64))
    for layer in (line.split()[0] for line in lines if line.endswith("no grid")):
        with pytest.raises(ValueError, match=f"layer '{layer}' outputs .* no grid"):
            explain(make_model(), layer, "gradcam", noise(1))


@pytest.mark.parametrize("args, message", [
    ("--layer blocks.0", "layers with a grid are image, stem.conv1, stem.gelu1, stem"),
    ("--layer stem.gelu1 --method contrast", "--layer: contrast is computed at the image"),
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
