"""python gradcam.py: which pictures it chooses, what it draws and prints, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from PIL import Image
from torch import nn

import checkpoint
import faithfulness
import gradcam
from augment import Normalize
from cli import UsageError
from files import read_csv
from gradcam import METHODS, GradCAM


@pytest.fixture
def ckpt(small, small_shapes, tmp_path):
    """A checkpoint of fresh weights that was made for `--data shapes`, which is 100 test pictures."""
    path = tmp_path / "made" / "best.pt"
    checkpoint.save(path, make_model(), small, {"data": "shapes", "recipe": "default"}, 1, 10.0)
    return path


def test_script_draws_ten_misclassified_pictures(ckpt, invoke):
    status, out, err = invoke(gradcam, ["--ckpt", ckpt])
    assert (status, err) == (0, "")
    lines = [line for line in out.splitlines() if ": predicted " in line]
    assert len(lines) == 10 and all(line.split(":")[0] in line.split("actual ")[1] for line in lines)
    assert (ckpt.parent / "gradcam.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in ckpt.parent.iterdir()) == ["best.pt", "gradcam.png"]


def test_maps_are_drawn_for_the_classes_that_are_named(ckpt, small, invoke, monkeypatch):
    drawn = []
    heat_maps = gradcam.plots.heat_maps
    monkeypatch.setattr(gradcam.plots, "heat_maps", lambda *arguments: drawn.append(arguments) or heat_maps(*arguments))
    model, normalize = make_model(), Normalize(small.mean, small.std, "cpu")
    for flags in ([], ["--correct"]):
        assert invoke(gradcam, ["--ckpt", ckpt, "--n", 3, *flags])[0] == 0
        images, titles, maps, captions = drawn[-1][:4]
        logits = model(normalize(images)).detach()
        for i in range(3):
            place = (small.test_images == images[i]).flatten(1).all(1).nonzero().item()
            predicted, actual = logits[i].argmax().item(), small.test_labels[place].item()
            assert titles[i] == small.class_names[actual] and (predicted == actual) == bool(flags)
            for map_, caption, k in zip(maps[i], captions[i], (predicted, logits[i].topk(2).indices[1].item() if flags else actual)):
                assert caption == f"{small.class_names[k]} {100 * logits[i].softmax(0)[k]:.0f} %"
                assert torch.allclose(map_, GradCAM(model)(normalize(images[i : i + 1]), [k])[0], atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_kernels_and_precision_change_nothing(ckpt, invoke, monkeypatch, method):
    drawn = []
    monkeypatch.setattr(gradcam.plots, "heat_maps", lambda *arguments: drawn.append(arguments) or gradcam.plots.figure(1, 1))
    for kernels, precision in (("torch", "fp32"), ("auto", "fp32"), ("auto", "bf16"), ("torch", "bf16")):
        flags = ["--method", method, "--kernels", kernels, "--precision", precision]
        assert invoke(gradcam, ["--ckpt", ckpt, "--n", 80, *flags])[0] == 0
        assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(drawn[0], drawn[-1]))
    assert drawn[0][2].shape == (80, 2, 32, 32)


def test_seed_chooses_the_pictures(ckpt, invoke):
    def listing(*flags):
        status, out, _ = invoke(gradcam, ["--ckpt", ckpt, "--n", 2, *flags])
        assert status == 0
        return out

    assert listing("--seed", 1) == listing() != listing("--seed", 2)


def options(**changes):
    return SimpleNamespace(**{"correct": False, "class_name": None, "n": 3, "seed": 1, **changes})


def test_choice_is_right_or_wrong_as_asked_and_in_turn(small):
    logits = nn.functional.one_hot(small.test_labels, 10).float()
    logits[::2] = logits[::2].roll(1, dims=1)  # every other picture is misclassified
    names, wrong = list(small.class_names), torch.arange(100) % 2 == 0
    for correct in (False, True):
        places = gradcam.choose(options(n=10, correct=correct), names, small, logits)
        assert (wrong[places] != correct).all() and small.test_labels[places].tolist() == list(range(10))
        assert places.tolist() != gradcam.choose(options(n=10, correct=correct, seed=2), names, small, logits).tolist()
    places = gradcam.choose(options(class_name="star", n=2), names, small, logits)
    assert wrong[places].all() and {names[label] for label in small.test_labels[places]} == {"star"}


def test_a_class_without_mistakes_is_told_and_passed_over(small, capsys):
    names, logits = list(small.class_names), nn.functional.one_hot(small.test_labels, 10).float()
    ring, star = ((small.test_labels == names.index(name)).nonzero()[:2, 0] for name in ("ring", "star"))
    logits[torch.cat([ring, star])] *= -1
    places = gradcam.choose(options(n=3), names, small, logits)
    out = capsys.readouterr().out
    assert set(places.tolist()) <= {*ring.tolist(), *star.tolist()} and out.count("no misclassified test picture of class") == 8
    assert "class disc\n" in out and "class ring\n" not in out
    with pytest.raises(UsageError, match="--n 5 is more than there are: 4 misclassified test pictures in shapes"):
        gradcam.choose(options(n=5), names, small, logits)
    with pytest.raises(UsageError, match="0 misclassified test pictures of class disc"):
        gradcam.choose(options(n=1, class_name="disc"), names, small, logits)


def test_script_explains_pictures_of_any_size(ckpt, tmp_path, invoke):
    paths = [tmp_path / "wide.png", tmp_path / "small.jpg"]
    for path, size in zip(paths, [(300, 200), (8, 8)]):
        Image.new("RGB", size, (200, 30, 90)).save(path)
    status, out, err = invoke(gradcam, ["--ckpt", ckpt, "--image", *paths])
    assert (status, err) == (0, "") and (ckpt.parent / "gradcam.png").exists()
    for path in paths:
        (line,) = [line for line in out.splitlines() if line.startswith(f"{path.name}: likeliest ")]
        assert ", second " in line and ", third " in line and line.count(" %") == 3


def test_script_measures_every_method(ckpt, tmp_path, invoke, monkeypatch):
    monkeypatch.setattr(faithfulness, "STEPS", 4)
    arguments = ["--ckpt", ckpt, "--metrics", 20, "--out", tmp_path, "--seed", 3]
    status, out, err = invoke(gradcam, arguments)
    assert (status, err) == (0, "") and "| hirescam | 0." in out
    rows = read_csv(tmp_path / "gradcam_metrics.csv")
    assert [row["map"] for row in rows] == ["random pixels", "random grid", "centre", "edges", *METHODS]
    assert list(rows[0])[:4] == ["dataset", "n", "layer", "map"] and rows[0]["n"] == "20"
    assert {f"{name}{end}" for name in faithfulness.MEASURES for end in ("", "_se")} <= set(rows[0])
    assert invoke(gradcam, arguments)[1] == out
    assert "attention" not in invoke(gradcam, [*arguments, "--layer", "stem.gelu1"])[1]


def test_list_layers(ckpt, invoke):
    status, out, _ = invoke(gradcam, ["--ckpt", ckpt, "--list-layers"])
    lines = out.splitlines()
    assert status == 0 and len(lines) == 31 and sum("has a grid" in line for line in lines) == 4
    assert [line.split()[0] for line in lines if "has a grid" in line] == ["stem.conv1", "stem.gelu1", "stem.conv2", "stem.gelu2"]
    assert any(line.startswith("blocks.0.attention.qkv ") and "(33, 192)" in line and line.endswith("no grid") for line in lines)


@pytest.mark.parametrize(
    "arguments, expected, told",
    [
        (["--layer", "blocks.0"], 2, "layer 'blocks.0' gives (33, 64) a picture: no rows and columns"),
        (["--layer", "stem.gelu9"], 2, "no layer 'stem.gelu9'"),
        (["--layer", "stem.gelu1", "--method", "attention"], 2, "stem.conv2 and stem.gelu2"),
        (["--n", 101], 2, "--n 101 is more than there are"),
        (["--metrics", 101], 2, "--metrics 101: a mean and its error take 2 to 100 test pictures of shapes"),
        (["--metrics", 1], 2, "--metrics 1: "),
        (["--class", "cat"], 2, "--class cat: the checkpoint's classes are checkered, crescent"),
        (["--data", "nowhere"], 2, "nowhere"),
        (["--out", __file__], 2, "--out"),
        (["--image", "missing.png"], 2, "--image missing.png: there is no such file"),
        (["--image", __file__], 1, "cannot be read as a picture"),
        (["--image", "grey.png"], 1, "grey.png cannot be read as a picture (its mode is L, not RGB; convert it first)"),
        (["--image", "good.png", "clear.png"], 1, "clear.png cannot be read as a picture (its mode is RGBA, not RGB; convert it first)"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(arguments, expected, told, ckpt, tmp_path, monkeypatch, invoke):
    for name, mode in (("good", "RGB"), ("grey", "L"), ("clear", "RGBA")):
        Image.new(mode, (32, 32)).save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    made = arguments if "--out" in arguments else [*arguments, "--out", "made/new"]
    status, _, err = invoke(gradcam, ["--ckpt", ckpt, *made])
    assert status == expected and told in err and err.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before
