"""The teacher, the table that it writes, and trainings on soft targets."""

import dataclasses
import json
import math
import signal

import numpy
import pytest
import torch
from conftest import make_trainer, only_run, small_recipe

import data
import teacher
import train
from cli import read_csv, sha256
from schedule import RECIPES
from trainer import Trainer, load_checkpoint


@pytest.fixture
def taught(small, tmp_path):
    """The file of a teacher that is certain of the class after the right one."""
    logits = 9 * torch.nn.functional.one_hot((small.train_labels + 1) % 10, 10).float()
    data.save_teacher_logits(tmp_path / "teacher.npz", logits, small)
    return tmp_path / "teacher.npz"


def test_the_table_is_of_the_trained_network(small, small_shapes, monkeypatch, tmp_path, succeeds):
    """Averaged over an image and its mirror image, with the statistics of batch norm at rest."""
    trainers, original = [], teacher.train
    monkeypatch.setattr(
        teacher, "train", lambda trainer: trainers.append(trainer) or original(trainer)
    )
    args = ["--data", "shapes", "--val-split", 60, "--epochs", 1, "--out"]
    for i, out in enumerate((tmp_path / "a", tmp_path / "b")):
        torch.manual_seed(i)  # no matter
        stdout = succeeds(teacher, [*args, out])
        assert "240 train, 60 evaluated" in stdout and f"saved {out / 'teacher.npz'}" in stdout
    split = data.train_val_split(small, 60)
    a, b = (data.load_teacher_logits(tmp_path / x / "teacher.npz", split) for x in "ab")
    assert torch.equal(a, b)
    trainer = trainers[1]
    assert not trainer.model.training
    views = split.train_images, split.train_images.flip(3)
    args = trainer.model, trainer.normalize
    upright, mirrored = (trainer.runtime.predict(*args, images) for images in views)
    assert torch.equal(a, (upright + mirrored) / 2) and not torch.equal(a, upright)


def test_the_cnn_learns(small):
    recipe = dataclasses.replace(teacher.TEACHER, epochs=8, batch_size=50, cutout_p=0.0)
    torch.manual_seed(0)
    runtime, model = teacher.AutocastRuntime(kernels="torch"), teacher.CNN(small.num_classes)
    trainer = Trainer(recipe, small, runtime, 1, model)
    losses = [trainer.train_epoch(6)[0] for _ in range(recipe.epochs)]
    assert losses[-1] < losses[0] / 2


def test_the_step_on_soft_targets(small):
    """Its gradient is that of the temperature times the cross entropy of softened distributions."""
    logits = torch.randn(300, 10, generator=torch.Generator().manual_seed(0)) * 4
    dataset = dataclasses.replace(small, teacher_logits=logits)
    recipe = small_recipe(l1=0.0, temperature=3.0)
    trainer = make_trainer(dataset, recipe, precision="fp32")
    model = make_trainer(small, recipe, precision="fp32").model
    loss, accuracy = trainer.train_epoch(1)
    indices = trainer.plan.indices[:128]
    found = model(trainer.normalize(small.train_images[indices]))
    targets = (logits[indices] / 3).softmax(1)
    expected = -3 * (targets * (found / 3).log_softmax(1)).sum(1).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    correct = (found.argmax(1) == small.train_labels[indices]).sum().item()
    assert accuracy == pytest.approx(100 * correct / 128, abs=0.8)
    expected.backward()
    for p, q in zip(trainer.model.parameters(), model.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-6)


def test_a_training_learns_what_the_teacher_says(
    small, small_shapes, taught, monkeypatch, succeeds
):
    args = ["--data", "shapes", "--batch-size", 50, "--epochs", 12, "--set", "crop_padding=0"]
    monkeypatch.chdir(taught.parent)
    succeeds(train, [*args, "--teacher", taught.name])
    run_dir = only_run(taught.parent)
    config = json.loads((run_dir / "config.json").read_text())
    logits = data.load_teacher_logits(taught, small)
    assert (config["teacher"], config["teacher_sha256"]) == (str(taught), sha256(logits))
    assert float(read_csv(run_dir / "history.csv")[-1]["train_accuracy"]) < 10
    model, _ = load_checkpoint(run_dir / "last.pt", "cpu")
    trainer = make_trainer(small, RECIPES["default"])
    found = trainer.runtime.predict(model, trainer.normalize, small.train_images).argmax(1)
    assert (found == logits.argmax(1)).float().mean() > 0.5


def test_a_run_resumes_on_the_same_table_only(
    small, small_shapes, taught, monkeypatch, invoke, succeeds, fails
):
    args = ["--data", "shapes", "--batch-size", 100, "--epochs", 2, "--teacher", taught, "--out"]
    succeeds(train, [*args, taught.parent / "whole"])
    with monkeypatch.context() as patch:
        stop = lambda *args: signal.raise_signal(signal.SIGINT)
        patch.setattr(Trainer, "check_finite", stop)
        assert invoke(train, [*args, taught.parent / "parts"])[0] == 130
    whole, run_dir = (only_run(taught.parent / name) for name in ("whole", "parts"))
    content = taught.read_bytes()
    data.save_teacher_logits(taught, torch.zeros(300, 10), small)
    assert "another file" in fails(train, ["--resume", run_dir])
    taught.write_bytes(content)
    assert "continues with it" in fails(train, ["--resume", run_dir, "--teacher", "other.npz"])
    monkeypatch.chdir(taught.parent)
    assert "resumed" in succeeds(train, ["--resume", run_dir, "--teacher", taught.name])
    models = [load_checkpoint(folder / "last.pt", "cpu")[1]["model"] for folder in (whole, run_dir)]
    assert sha256(models[0]) == sha256(models[1])


def test_other_files_are_refused(small, small_shapes, taught, tmp_path, fails):
    args = ["--data", "shapes", "--out", tmp_path, "--teacher"]
    text, other = tmp_path / "text.npz", tmp_path / "other.npz"
    text.write_text("text")
    assert f"--teacher {text}: not a file of teacher.py" in fails(train, [*args, text])
    for path in (tmp_path / "missing.npz", tmp_path):
        assert f"--teacher {path}: no such file" in fails(train, [*args, path])
    numpy.savez(other, numbers=numpy.zeros(3))
    assert "not a file of teacher.py" in fails(train, [*args, other])
    numpy.save(other.with_suffix(".npy"), numpy.zeros(3))
    assert "not a file of teacher.py" in fails(train, [*args, other.with_suffix(".npy")])
    for logits in (
        torch.zeros(299, 10),
        torch.zeros(300, 10).double(),
        torch.full((300, 10), math.nan),
    ):
        data.save_teacher_logits(other, logits, small)
        assert "not of these training images" in fails(train, [*args, other])
    assert "not of these training images" in fails(train, [*args, taught, "--val-split", 30])
    reversed_ = dataclasses.replace(small, train_images=small.train_images.flip(0))
    data.save_teacher_logits(other, torch.zeros(300, 10), reversed_)
    assert "not of these training images" in fails(train, [*args, other])
