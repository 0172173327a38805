"""Saliency maps where the answer is known, the measures that judge them, and the script."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, save_small_checkpoint
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import gradcam
import plots
from augment import Normalize
from cli import read_csv
from gradcam import LAYERS, METHODS, GradCAM
from shapes import SHAPE_NAMES


@pytest.fixture(autouse=True)
def few_masks(monkeypatch):
    monkeypatch.setattr(gradcam, "NUM_MASKS", 4)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def explain(model, layer, method, *args, **kwargs):
    with GradCAM(model, layer, method) as cam:
        return cam(*args, **kwargs)


# --- maps ---


def test_maps_of_a_linear_head():
    """A convolution, an in-place ReLU, and a head that reads every position."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU(inplace=True))
    model = nn.Sequential(features, nn.Flatten(), nn.Linear(5 * 16 * 16, 4))
    images = noise(4, 3, 32, 32)
    targets = torch.tensor([3, 2, 1, 0])
    weights = model[2].weight[targets].detach().view(4, 5, 16, 16)
    before = features[0](images).detach()
    after = before.relu()
    # The ReLU lets no gradient through where its input is negative.
    layers = {"0.0": (before, weights * (before > 0)), "0.1": (after, weights)}
    for layer, (activations, gradients) in layers.items():
        means = gradients.mean((2, 3), keepdim=True)
        for method, factor in (("gradcam", means), ("hirescam", gradients)):
            expected = (factor * activations).sum(1, keepdim=True).relu()
            expected = F.interpolate(expected, (32, 32), mode="bilinear")[:, 0]
            found = explain(model, layer, method, images, targets, normalize=False)
            assert torch.allclose(found, expected, atol=1e-5)

            low = expected.amin((1, 2), keepdim=True)
            high = expected.amax((1, 2), keepdim=True)
            found = explain(model, layer, method, images, targets)
            assert torch.allclose(found, (expected - low) / (high - low), atol=1e-4)


@pytest.mark.parametrize("power", [1, 2])
def test_masked_gradients_are_what_pixels_add(power):
    images = noise(4, 3, 24, 32)
    targets = torch.tensor([3, 2, 1, 0])
    weights = noise(4, 3, 24, 32) / 100
    seen = []

    def model(images):
        seen.append(images.detach())
        return images.pow(power).flatten(1) @ weights.flatten(1).T

    found = explain(model_of(model), None, "masked-gradients", images, targets, normalize=False)
    blurred = gradcam.blur(images, 3)
    mean = torch.zeros_like(images)
    replacements = [blurred, mean] * 4
    total = 0
    for masked, replacement in zip(seen, replacements, strict=True):
        low = torch.minimum(images, replacement) - 1e-5
        high = torch.maximum(images, replacement) + 1e-5
        assert (low <= masked).all() and (masked <= high).all()
        assert not torch.allclose(masked, images, atol=0.1)
        assert not torch.allclose(masked, replacement, atol=0.1)
        gradient = power * weights[targets] * masked ** (power - 1)
        total = total + (gradient * (images - replacement)).sum(1)
    expected = gradcam.blur((total / 8).relu(), 1)
    assert torch.allclose(found, expected, atol=1e-5)
    if power == 1:  # whatever the masks
        added = weights[targets] * (images - blurred / 2)
        assert torch.allclose(found, gradcam.blur(added.sum(1).relu(), 1), atol=1e-5)


def model_of(function):
    model = nn.Module()
    model.forward = function
    return model


@pytest.mark.parametrize("method", METHODS)
def test_batches_and_targets(method):
    model = make_model()
    images = noise(5, 3, 32, 32)
    targets = torch.tensor([0, 4, 9, 2, 2])
    predicted = model(images).argmax(1)
    with GradCAM(model, method=method) as cam:
        maps = cam(images, targets)
        assert maps.shape == (5, 32, 32)
        assert maps.amin((1, 2)).tolist() == [0] * 5
        assert maps.amax((1, 2)).tolist() == [1] * 5
        for i in range(5):  # an image's map depends on nothing else in the batch
            alone = cam(images[i : i + 1], targets[i : i + 1])
            assert torch.allclose(maps[i], alone[0], atol=1e-3)
        assert torch.equal(cam(images), cam(images, predicted))
        assert not torch.equal(cam(images), cam(images, (predicted + 1) % 10))
        with torch.no_grad():
            assert torch.equal(cam(images, targets), maps)
        with torch.inference_mode():
            made_here = images + 0
            assert torch.equal(cam(made_here, targets + 0), maps)
        model.head.weight.data.zero_()
        assert not cam(images).any()  # nothing speaks for any class


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_behind(method):
    model = make_model()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
        parameter.grad = torch.full_like(parameter, i)

    def num_hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    with pytest.raises(ValueError, match="16"), GradCAM(model, method=method) as cam:
        assert num_hooks() == (0 if method == "masked-gradients" else 1)
        images = noise(2, 3, 32, 32)
        cam(images)
        assert cam.activations is None and not images.requires_grad
        cam(noise(1, 3, 16, 16))  # refused by the network
    assert num_hooks() == 0
    for i, parameter in enumerate(model.parameters()):
        assert parameter.requires_grad == (i % 3 > 0)
        assert (parameter.grad == i).all()


@pytest.mark.parametrize("method", METHODS)
def test_other_networks_and_sizes(method):
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))
    model = nn.Sequential(nn.Conv2d(1, 5, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), head)
    for parameter in model.parameters():
        parameter.data.fill_(0.1)  # bright pixels speak for any class
    images = torch.zeros(2, 1, 10, 18)
    images[0, 0, 7, 4] = 1
    images[1, 0, 3, 13] = 1
    maps = explain(model, "1", method, images, torch.tensor([0, 2]))
    assert maps.shape == (2, 10, 18)
    assert maps[0, 5:, :9].sum() > 0.9 * maps[0].sum()
    assert maps[1, :5, 9:].sum() > 0.9 * maps[1].sum()


def test_layers_without_rows_and_columns():
    model = make_model()
    images = noise(1, 3, 32, 32)
    for name, module in model.named_modules():
        if name in LAYERS:
            assert explain(model, name, "gradcam", images).shape == (1, 32, 32)
        elif not list(module.children()):
            with pytest.raises(ValueError, match=f"layer '{name}' outputs .*: no rows"):
                explain(model, name, "gradcam", images)
    with pytest.raises(ValueError, match="no layer 'stem.gelu3'"):
        GradCAM(model, "stem.gelu3")
    with pytest.raises(ValueError, match="no method 'cam'; there are gradcam, hirescam, masked"):
        GradCAM(model, method="cam")


# --- measures ---


def test_center_map():
    (blob,) = gradcam.center_maps(torch.zeros(1, 3, 32, 32))
    assert (blob == 1).nonzero().unique().tolist() == [15, 16]
    assert blob.min() == 0 and torch.equal(blob, blob.T)
    assert not gradcam.normalize_maps(torch.full((2, 5, 7), 0.1)).any()


def test_insertion_and_deletion_are_loops_over_images_and_steps():
    S = 32
    steps = gradcam.STEPS
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(3, S, S, generator=generator)
    images = noise(3, 3, S, S)
    targets = torch.tensor([1, 0, 1])
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * S * S, 2))
    model[1].weight.data = noise(2, 3 * S * S) / 50
    insertion, deletion = gradcam.insertion_and_deletion(maps, images, model, targets, generator)

    square = (torch.arange(S)[:, None] - torch.arange(S)) ** 2
    bell = (-square / (2 * gradcam.BLUR_STD**2)).softmax(1)
    blurred = torch.einsum("yv,xu,bcvu->bcyx", bell, bell, images)
    mean = torch.zeros_like(images)
    for found, start, end in ((insertion, blurred, images), (deletion, images, mean)):
        for i in range(3):
            order = maps[i].flatten().argsort(descending=True)
            image = start[i].clone().flatten(1)
            probabilities = []
            for step in range(steps):
                changed = order[: int((step + 0.5) * S * S / steps)]
                image[:, changed] = end[i].flatten(1)[:, changed]
                logits = model(image.view(1, 3, S, S))
                probabilities.append(logits.softmax(1)[0, targets[i]].item())
            assert found[i].item() == pytest.approx(sum(probabilities) / steps, abs=1e-4)


def test_ties_are_in_random_order():
    maps = torch.zeros(400, 4, 16)
    maps[:, 3, 15] = 1
    ranks = gradcam.pixel_ranks(maps, torch.Generator().manual_seed(0)).flatten(1)
    assert torch.equal(ranks.sort(1).values, torch.arange(64).expand(400, 64))
    assert not ranks[:, 63].any()
    share_in_first_half = (ranks[:, :63] < 32).float().mean(0)
    assert share_in_first_half.min() > 0.35 and share_in_first_half.max() < 0.65


def test_pointing_games():
    masks = torch.zeros(4, 4, 4, dtype=torch.bool)
    masks[:, :2, :2] = True  # a quarter of the image
    maps = torch.zeros(4, 4, 4)
    maps[0, 1, 1] = 1.0
    maps[0, 3, 3] = 0.5
    maps[1, 3, 3] = 1.0
    maps[1, 0, 0] = 0.25
    maps[2, 0, 0] = 1.0  # two maxima; the last map is zero
    maps[2, 3, 0] = 1.0
    pointing, inside = gradcam.pointing_games(maps, masks)
    assert pointing.tolist() == [1, 0, 0.5, 0.25]
    assert inside.tolist() == pytest.approx([2 / 3, 0.2, 0.5, 0.25])


# --- the script ---


@pytest.fixture
def ckpt(small, small_shapes, tmp_path):
    """Fresh weights for `--data shapes`, which has 100 test images."""
    path = tmp_path / "made" / "best.pt"
    return save_small_checkpoint(path, small, data_sha256=small.fingerprint())


@pytest.fixture
def draw(ckpt, succeeds, monkeypatch):
    """draw(flags) runs the script without drawing: (arguments of plots.heat_maps, stdout)."""
    calls = []

    def heat_maps(*args):
        calls.append(args)
        return Figure(figsize=(1, 1))

    monkeypatch.setattr(plots, "heat_maps", heat_maps)

    def run(*flags):
        out = succeeds(gradcam, ["--ckpt", ckpt, *flags])
        return calls[-1], out

    return run


@pytest.mark.parametrize("flags, title", [
    (["--n", 5], "misclassified test images of shapes"),
    (["--n", 2, "--correct"], "correctly classified test images of shapes"),
    (["--n", 2, "--class", "star", "--method", "hirescam", "--layer", "stem.gelu1"],
     "misclassified test images of shapes, star"),
])  # fmt: skip
def test_pictures_of_test_images(flags, title, ckpt, small, draw):
    (images, names, maps, captions, found_title), out = draw(*flags)
    assert found_title == title and out.endswith(f"saved {ckpt.parent / 'gradcam.png'}\n")
    assert sorted(path.name for path in ckpt.parent.iterdir()) == ["best.pt", "gradcam.png"]
    model = make_model()
    normalize = Normalize(small.mean, small.std, "cpu")
    logits = model(normalize(small.test_images)).detach()
    methods = {"Grad-CAM": "gradcam", "masked gradients": "masked-gradients"}
    layer = "stem.gelu2"
    if "--method" in flags:
        methods = {"HiResCAM at stem.gelu1": "hirescam"}
        layer = "stem.gelu1"
    assert list(maps) == list(methods)
    indices = [int(name.removeprefix("test image ")) for name in names]
    roles = ["predicted", "second" if "--correct" in flags else "actual"]
    targets = logits[indices].topk(2).indices
    actual = small.test_labels[indices]
    assert ((targets[:, 0] == actual) == ("--correct" in flags)).all()
    if "--correct" not in flags:
        targets[:, 1] = actual

    # Each image has a line with both classes and their probabilities.
    for name, index, classes, found in zip(names, indices, targets.tolist(), captions):
        percents = 100 * logits[index].softmax(0)
        pair = [f"{percents[k]:.0f} % {SHAPE_NAMES[k]}" for k in classes]
        assert found == [f"{role}\n{label}" for role, label in zip(roles, pair)]
        assert f"{name}: {roles[0]} {pair[0]}, {roles[1]} {pair[1]}\n" in out

    # Images and maps are eight times as large; the two maps of an image have one scale.
    shown = F.avg_pool2d(images.float(), 8)
    assert (shown - small.test_images[indices].float()).abs().mean() < 10
    inputs = normalize(small.test_images[indices])
    for head, method in methods.items():
        pair = [explain(model, layer, method, inputs, classes, False) for classes in targets.T]
        pair = torch.stack(pair, dim=1)
        pair = gradcam.enlarge(pair / pair.amax((1, 2, 3), keepdim=True), 1)
        assert torch.allclose(maps[head], pair, atol=1e-3)

    # Classes take turns.
    if "--class" in flags:
        assert {SHAPE_NAMES[k] for k in actual} == {"star"}
    elif "--correct" not in flags:  # fresh weights predict few classes right
        assert len(set(actual.tolist())) == len(names) == 5


def test_seed_chooses_other_images(draw):
    def names(*flags):
        return draw("--n", 2, "--method", "gradcam", *flags)[0][1]

    assert names("--seed", 1) == names()
    assert names("--seed", 2) != names()
    out = draw("--n", 100, "--class", "star", "--method", "gradcam")[1]
    assert "there are only " in out and " misclassified test images of shapes, star\n" in out


def test_image_files(tmp_path, draw):
    paths = [tmp_path / "a" / "cat.png", tmp_path / "b\x1b" / "cat.png", tmp_path / "wide.jpg"]
    for path, size in zip(paths, [(300, 200), (8, 8), (40, 30)]):
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", size, (200, 30, 90)).save(path)
    (images, names, maps, captions, _), out = draw("--image", *paths)
    assert names == ["a/cat.png", "b\\x1b/cat.png", "wide.jpg"]
    assert images.shape == (3, 3, 256, 256)
    assert [values.shape for values in maps.values()] == [(3, 2, 256, 256)] * 2
    predicted, second = captions[1]
    line = f"b\\x1b/cat.png: {predicted}, {second}".replace("\n", " ")
    assert predicted.startswith("predicted\n") and second.startswith("second\n") and line in out
    assert draw("--image", paths[0], paths[2])[0][1] == ["cat.png", "wide.jpg"]


def test_picture(ckpt, succeeds):
    succeeds(gradcam, ["--ckpt", ckpt, "--n", 2])
    with Image.open(ckpt.parent / "gradcam.png") as picture:
        assert picture.width > 800 and picture.height > 500


def test_maps_are_transparent_where_they_are_0():
    maps = torch.zeros(1, 2, 32, 32)
    maps[0, 0, 4, 7] = 1
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    figure = plots.heat_maps(images, ["name"], {"method": maps}, [["one", "two"]], "title")
    layers = [ax.images[1] for ax in figure.axes if len(ax.images) == 2]
    assert len(layers) == 2
    for layer, values in zip(layers, maps[0]):
        opacity = layer.to_rgba(layer.get_array())[:, :, 3]
        assert ((opacity > 0.5) == (values > 0).numpy()).all() and opacity.min() == 0


def test_metrics(ckpt, small, tmp_path, succeeds, monkeypatch):
    monkeypatch.setattr(gradcam, "STEPS", 4)
    monkeypatch.setattr(gradcam, "BATCH_SIZE", 5)
    args = ["--ckpt", ckpt, "--metrics", 8, "--out", tmp_path, "--seed", 3]
    out = succeeds(gradcam, args)
    assert "| map | insertion | deletion | pointing | inside |\n" in out
    assert "| hirescam | 0." in out and out.isascii()
    rows = read_csv(tmp_path / "gradcam_metrics.csv")
    assert [row["map"] for row in rows] == ["center", *METHODS]
    assert rows[0]["dataset"] == "shapes" and rows[0]["n"] == "8"
    for row in rows:
        for measure in ("insertion", "deletion", "pointing", "inside"):
            mean = float(row[measure])
            error = float(row[f"{measure}_se"])
            assert 0 <= mean <= 1 and 0 <= error < 0.4
            assert f" {mean:.3f} +- {error:.3f} |" in out
    succeeds(gradcam, args)
    assert read_csv(tmp_path / "gradcam_metrics.csv") == rows

    # The pointing games of one map, of the images that the seed chooses.
    indices = torch.randperm(100, generator=torch.Generator().manual_seed(3))[:8]
    inputs = Normalize(small.mean, small.std, "cpu")(small.test_images[indices])
    maps = explain(make_model(), "stem.gelu2", "hirescam", inputs)
    pointing, inside = gradcam.pointing_games(maps, small.test_masks[indices])
    row = rows[1 + list(METHODS).index("hirescam")]
    assert float(row["pointing"]) == pytest.approx(pointing.mean().item(), abs=1e-3)
    assert float(row["inside"]) == pytest.approx(inside.mean().item(), abs=1e-3)


@pytest.mark.parametrize("args, message", [
    ("--layer blocks.0", "invalid choice: 'blocks.0'"),
    ("--layer stem.gelu1 --method masked-gradients", "--layer: masked-gradients are computed at"),
    ("--metrics 1", "--metrics takes at least two test images"),
    ("--metrics --method gradcam", "--metrics shows no images"),
    ("--image x.png --correct", "--image shows no test images"),
    ("--class cat", "--class cat: the classes are checkered, crescent"),
    ("--out made/best.pt", "--out"),
])  # fmt: skip
def test_wrong_usage(args, message, ckpt, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    out = [] if "--out" in args else ["--out", "made/new"]
    assert message in fails(gradcam, ["--ckpt", ckpt, *args.split(), *out])
    assert sorted(tmp_path.rglob("*")) == before
