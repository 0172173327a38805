"""The classification report, the script, and figures with hostile names."""

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import make_model, save_small_checkpoint
from PIL import Image

import evaluate
import plots
from augment import Normalize
from data import load_for_checkpoint
from evaluate import classification_report, confusion_matrix, matrix_text
from runtime import Runtime
from schedule import OneCycle

LABELS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
PREDICTIONS = torch.tensor([0, 0, 0, 1, 2, 1, 1, 0, 2, 2, 2, 2])
REPORT = """\
              precision    recall  f1-score   support

         cat       0.75      0.60      0.67         5
  automobile       0.67      0.67      0.67         3
           a       0.80      1.00      0.89         4
        none       0.00      0.00      0.00         0

    accuracy                           0.75        12
   macro avg       0.55      0.57      0.56        12
weighted avg       0.75      0.75      0.74        12"""  # as scikit-learn prints it


def test_confusion_matrix_and_report():
    matrix, names = confusion_matrix(LABELS, PREDICTIONS, 4), ["cat", "automobile", "a", "none"]
    assert matrix.tolist() == [[3, 1, 1, 0], [1, 2, 0, 0], [0, 0, 4, 0], [0, 0, 0, 0]]
    rows = [line.split() for line in matrix_text(matrix, names).splitlines()]
    assert rows[0] == ["0", "1", "2", "3"] and rows[1] == ["cat", "0", "3", "1", "1", "0"]
    assert classification_report(matrix, names) == REPORT


@pytest.mark.parametrize("tta, offsets", [("flip", [1]), ("shift", [0, 1, 2])])
def test_script(tta, offsets, small, small_shapes, tmp_path, succeeds, monkeypatch):
    path, spy = tmp_path / "run" / "best.pt", Mock(wraps=load_for_checkpoint)
    config = {"data_sha256": small.fingerprint(), "data_dir": "../elsewhere", "recipe": "\x1b[31m"}
    save_small_checkpoint(path, small, **config)
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(evaluate, "load_for_checkpoint", spy)
    flags = "--tta", tta, "--n", 7, "--precision", "fp32"
    out = succeeds(evaluate, ["--ckpt", path, *flags])
    assert spy.call_args.args[1:3] == (None, "./data")
    assert "recipe \\x1b[31m) on shapes, 100 test images\n" in out
    images, model = Normalize(small.mean, small.std, "cpu")(small.test_images), make_model()
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    crops = [torch.from_numpy(padded[..., i : i + 32, i : i + 32]) for i in offsets]
    logits, views = model(images), [view for crop in crops for view in (crop, crop.flip(3))]
    for name, values in (("\n", logits), (f"{tta}: ", sum(map(model, views)) / len(views))):
        loss = torch.nn.functional.cross_entropy(values, small.test_labels)
        accuracy = (values.argmax(1) == small.test_labels).sum()  # of 100 images
        assert f"{name}accuracy {accuracy}.00 %, cross entropy {loss:.4f} nats\n" in out
    written = sorted(file.name for file in tmp_path.rglob("*.*"))
    assert written == ["best.pt", "confusion.png", "misclassified.png"]
    with Image.open(path.parent / "misclassified.png") as image:
        assert image.height > 500  # seven images are two rows


NAMES = ["$x_$", r"$\frac$", "\x1b[2J", "\udcff", "日本", "a\nb", "long name " * 30, *"abcd"]
IMAGES, MAPS = torch.zeros(11, 3, 32, 32, dtype=torch.uint8), torch.rand(11, 2, 32, 32)
ROW = {"epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "train_accuracy": 1.0, "val_accuracy": 1.0}
SWEEP = [{"lr": 0.1**k, "loss": k, "smoothed_loss": k, "train_accuracy": k} for k in (9, 5, 1)]
SUGGESTIONS = {"$x_$": SimpleNamespace(lr=0.01), "steepest": SimpleNamespace(lr=None)}
FIGURES = {
    "confusion": (plots.confusion_matrix, torch.eye(11).long(), NAMES),
    "many": (plots.confusion_matrix, torch.eye(150).long(), NAMES[:10] * 15),
    "images": (plots.image_grid, IMAGES, [f"{name}\n5 % {name}" for name in NAMES]),
    "samples": (plots.sample_grid, [IMAGES], NAMES, ["original"]),
    "curves": (plots.training_curves, [ROW], OneCycle(0.1, 3, 0.3, 10, 10), 3),
    "maps": (plots.heat_maps, IMAGES, NAMES, MAPS, [NAMES[:2]] * 11, NAMES[:2]),
    "lr": (plots.lr_range, SWEEP, SUGGESTIONS, "exp"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FIGURES)
def test_figures_take_any_name(name, tmp_path):
    function, *args = FIGURES[name]
    figure = function(*args, "$x_$" * 99, *["val"] * (name == "curves"))
    plots.save_figure(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and max(image.size) < 3000
    legend, limits = figure.axes[0].get_legend(), figure.axes[0].get_xlim()
    labels = [text.get_text() for text in legend.get_texts()] if legend else []
    if name == "curves":
        assert labels == ["train: 1 at the end", "held-out: 1 at the end"]
        assert limits[1] > 1  # dots of the only epoch are not clipped
    assert name != "lr" or labels[2:] == ["$x_$: 0.01"]
    texts = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    lines = [line for text in texts for line in text.get_text().split("\n")]
    assert all(len(line) <= 10 * figure.get_figwidth() and line.isprintable() for line in lines)
    assert "mathdefault" not in str(lines)


def test_classify(small, tmp_path):
    """Files and tensors alike are normalized; float images, perhaps normalized, are refused."""
    ckpt = save_small_checkpoint(tmp_path / "best.pt", small)
    image = small.test_images[0]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    names, probabilities = evaluate.classify(ckpt, [tmp_path / "a.png"])
    normalized = Normalize(small.mean, small.std, "cpu")(image[None])
    expected = Runtime().logits(make_model(), normalized).softmax(1)
    assert names == list(small.class_names)
    for found in (probabilities, evaluate.classify(ckpt, image[None], "cpu")[1]):
        assert torch.allclose(found, expected, atol=1e-4)
    for wrong in (image[None].float(), image[None, :, 1:]):
        with pytest.raises(ValueError, match="not uint8"):
            evaluate.classify(ckpt, wrong)
