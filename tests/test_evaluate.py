"""The classification report, the script, classify, and figures with hostile names."""

import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, make_model, save_small_checkpoint
from PIL import Image

import evaluate
import plots
from augment import Normalize
from cli import read_csv
from data import load_for_checkpoint
from evaluate import classification_report, confusion_matrix, matrix_text
from optim import OneCycle
from runtime import Runtime

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
    matrix = confusion_matrix(LABELS, PREDICTIONS, 4)
    names = ["cat", "automobile", "a", "none"]
    assert matrix.tolist() == [[3, 1, 1, 0], [1, 2, 0, 0], [0, 0, 4, 0], [0, 0, 0, 0]]
    rows = [line.split() for line in matrix_text(matrix, names).splitlines()]
    assert rows[0] == ["0", "1", "2", "3"]
    assert rows[1] == ["cat", "0", "3", "1", "1", "0"]
    assert classification_report(matrix, names) == REPORT


@pytest.mark.parametrize("tta, offsets", [("flip", [1]), ("shift", [0, 1, 2])])
def test_script(tta, offsets, small, small_shapes, tmp_path, succeeds, monkeypatch):
    """Figures and report are of the images as they are; --tta averages views of an image."""
    path = tmp_path / "run" / "best.pt"
    spy = Mock(wraps=load_for_checkpoint)
    config = {"data_sha256": small.fingerprint(), "recipe": "\x1b[31m"}
    save_small_checkpoint(path, small, **config)
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(evaluate, "load_for_checkpoint", spy)
    out = succeeds(evaluate, ["--tta", tta, "--n", 7, "--precision", "fp32"])
    assert spy.call_args.args[1:3] == (None, None)
    assert "\x1b" not in out
    assert "its epoch was chosen by test accuracy, so that accuracy is too high" in out

    model = make_model()
    images = Normalize(small.mean, small.std, "cpu")(small.test_images)
    logits = model(images)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    views = []
    for offset in offsets:
        crop = padded[:, :, offset : offset + 32, offset : offset + 32]
        views += [crop, crop.flip(3)]
    averaged = sum(model(view) for view in views) / len(views)
    for name, values in (("\n", logits), (f"with --tta {tta}: ", averaged)):
        loss = torch.nn.functional.cross_entropy(values, small.test_labels)
        accuracy = (values.argmax(1) == small.test_labels).sum()  # of 100 images
        assert f"{name}accuracy {accuracy}.00 %, cross entropy {loss:.4f} nats\n" in out
    written = sorted(file.name for file in tmp_path.rglob("*.*"))
    assert written == ["best.pt", "confusion.png", "misclassified.png"]
    with Image.open(path.parent / "misclassified.png") as image:
        assert image.height > 500  # seven images are two rows


NAMES = ["$x_$", r"$\frac$", "日本", "long name " * 30, *"abcdefg"]
IMAGES = torch.zeros(11, 3, 32, 32, dtype=torch.uint8)
ROW = {"epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "train_accuracy": 1.0, "val_accuracy": 1.0}
SCHEDULE = OneCycle(0.1, 3, 0.3, 10, 10)
TITLE = "$x_$" * 99
FIGURES = {
    "confusion": lambda: plots.confusion_matrix(torch.eye(11).long(), NAMES, TITLE),
    "many": lambda: plots.confusion_matrix(torch.eye(150).long(), NAMES[:10] * 15, TITLE),
    "images": lambda: plots.image_grid(IMAGES, [f"{name}\n5 % {name}" for name in NAMES], TITLE),
    "samples": lambda: plots.sample_grid([IMAGES, IMAGES], NAMES, ["original", "b" * 99], TITLE),
    "curves": lambda: plots.training_curves([ROW], SCHEDULE, 3, TITLE, "val"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FIGURES)
def test_figures_take_any_name(name, tmp_path):
    figure = FIGURES[name]()
    plots.save_figure(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert max(image.size) < 3000
    texts = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    lines = [line for text in texts for line in text.get_text().split("\n")]
    assert all(len(line) <= 10 * figure.get_figwidth() for line in lines)
    assert "mathdefault" not in str(lines)


DRAW = """
import os
import sys
import plots

@plots.styled
def draw():
    fig, ax = plots.new_figure(3, 2, "title")
    ax.imshow([[0, 1], [2, 3]])
    return fig

before = dict(os.environ)
plots.save_figure(draw(), sys.argv[1])
assert os.environ == before
"""


def test_figures_ignore_the_settings_of_the_user(tmp_path):
    """The backend of a notebook, pictures upside down, an absent LaTeX, a damaged file."""
    settings = tmp_path / "matplotlibrc"
    settings.write_bytes(b"image.origin: lower\ntext.usetex: True\n# caf\xe9\n")
    changed = {"MPLBACKEND": "nonsense", "MATPLOTLIBRC": str(settings)}
    pictures = []
    for name, environment in (("plain.png", {}), ("user.png", changed)):
        command = [sys.executable, "-c", DRAW, tmp_path / name]
        subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1]


def test_classify(small, tmp_path):
    """Files and tensors alike are normalized; float images, perhaps normalized, are refused."""
    ckpt = save_small_checkpoint(tmp_path / "best.pt", small)
    image = small.test_images[0]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    names, from_file = evaluate.classify(ckpt, [tmp_path / "a.png"])
    _, from_tensor = evaluate.classify(ckpt, image[None], "cpu")
    normalized = Normalize(small.mean, small.std, "cpu")(image[None])
    expected = Runtime().logits(make_model(), normalized).softmax(1)
    assert names == list(small.class_names)
    assert torch.allclose(from_file, expected, atol=1e-2)  # bf16 on some processors
    assert torch.allclose(from_tensor, from_file, atol=1e-4)
    for path in (tmp_path / "a.png", str(tmp_path / "a.png"), tmp_path):  # one file, or a folder
        _, from_path = evaluate.classify(ckpt, path)
        assert torch.equal(from_path, from_file)
    for wrong in (image[None].float(), image[None, :, 1:]):
        with pytest.raises(ValueError, match="not uint8"):
            evaluate.classify(ckpt, wrong)


def test_the_script_classifies_files_and_folders(small, tmp_path, succeeds, invoke, fails):
    """One line an image, in the order given; predictions.csv has the same where --out is given."""
    ckpt = save_small_checkpoint(tmp_path / "best.pt", small)
    folder = tmp_path / "caf\u00e9"
    (folder / "within").mkdir(parents=True)
    paths = [tmp_path / "z.png", folder / "b.png", folder / "within" / "a.png"]
    for path, image in zip(paths, small.test_images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    names, probabilities = evaluate.classify(ckpt, small.test_images[:3], precision="fp32")
    _, rounded = evaluate.classify(ckpt, small.test_images[:3], precision="bf16")
    assert not torch.equal(rounded, probabilities)
    probabilities, labels = probabilities.max(1)

    args = ["--ckpt", ckpt, "--precision", "fp32", "--images", paths[0], folder]
    out = succeeds(evaluate, [*args, "--out", tmp_path / "out"])
    table = tmp_path / "out" / "predictions.csv"
    lines = []
    rows = read_csv(table)
    assert len(rows) == 3
    for path, label, probability, row in zip(paths, labels, probabilities, rows):
        lines.append(f"{path}: {100 * probability:.1f} % {names[label]}\n")
        assert (row["image"], row["class"]) == (str(path), names[label])
        assert float(row["probability"]) == pytest.approx(probability.item(), rel=1e-4)
    assert out == f"{''.join(lines)}saved {table}\n"
    assert succeeds(evaluate, args) == "".join(lines)

    (folder / "note.txt").touch()
    status, out, err = invoke(evaluate, args)
    assert (status, out) == (0, "".join(lines))
    assert err.endswith(f"folder: 1, the first is {folder / 'note.txt'}\n")
    assert "out: no files with the extension" in fails(evaluate, ["--images", tmp_path / "out"])
    assert "cannot be read" in fails(evaluate, ["--ckpt", ckpt, "--images", "no.png"], status=1)
    for flags in (["--tta", "flip"], ["--data", "shapes"], ["--data-dir", "x"]):
        assert "--images are classified as they are" in fails(evaluate, [*args, *flags])
