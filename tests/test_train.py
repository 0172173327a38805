"""Runs from the command line to the last file, and runs that fail."""

import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CIFAR_FOLDER, ROOT, RUN_FILES, only_run

import cli
import data
import evaluate
import train
from augment import Normalize
from cli import RunError, atomic_write, read_csv, sha256
from runtime import Runtime
from schedule import OneCycle
from trainer import load_checkpoint, loss_and_accuracy, predict


def shell(*command):
    """A script as a user runs it."""
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


# --- whole runs ---

REAL = pytest.param(
    str(CIFAR_FOLDER),
    marks=pytest.mark.skipif(not CIFAR_FOLDER.is_dir(), reason="no folder of CIFAR-10 images"),
)


@pytest.mark.parametrize("spec", ["shapes", REAL])
def test_from_the_command_line_to_an_evaluated_checkpoint(tmp_path, spec):
    out, name, data_dir = tmp_path / "out", Path(spec).name, ["--data-dir", tmp_path / "data"]
    args = ["--data", spec, *data_dir, "--out", out, "--max-steps", 4, "--batch-size", 256]
    result = shell("train.py", *args)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"dataset  {name}: 50,000 train, 10,000 test, 10 classes" in result.stdout
    assert "\r" not in result.stdout and "--max-steps: 4 of " in result.stdout
    header = result.stdout.split("\nseed 1, ")[0]
    assert "avg_pool_init=True" in header and max(map(len, header.splitlines())) < 100
    run_dir = only_run(out)
    assert run_dir.name.endswith(f"-default-{name}-seed1")
    assert sorted(os.listdir(run_dir)) == RUN_FILES and sorted(os.listdir(out)) == [
        "best.pt",
        "runs",
    ]
    assert (out / "best.pt").read_bytes() == (run_dir / "best.pt").read_bytes()
    (row,) = read_csv(run_dir / "history.csv")
    ckpt = torch.load(out / "best.pt", weights_only=True)
    assert ckpt["test_accuracy"] == float(row["test_accuracy"])
    assert ckpt["config"] == json.loads((run_dir / "config.json").read_text())

    result = shell("evaluate.py", "--ckpt", out / "best.pt", "--tta", "flip", *data_dir)
    assert (result.returncode, result.stderr) == (0, "")
    accuracy, loss = float(row["test_accuracy"]), float(row["test_loss"])
    assert f"accuracy {accuracy:.2f} %" in result.stdout and f"{loss:.4f}" in result.stdout
    for name in ("confusion.png", "misclassified.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_held_out_images_replace_the_test_images(small, monkeypatch, tmp_path, invoke):
    blind = {"test_images": small.test_images[:0], "test_labels": small.test_labels[:0]}
    monkeypatch.setattr(data, "load_shapes", lambda: dataclasses.replace(small, **blind))
    args = ["--data", "shapes", "--out", tmp_path, "--batch-size", 100, "--val-split", 50]
    status, out, err = invoke(train, [*args, "--epochs", 1, "--set", "max_lr=0.01"])
    assert (status, err) == (0, "") and "shapes-val50: 250 train, 50 held-out" in out
    assert "max_lr=0.01" in out and "val loss" in out and "on held-out images" in out
    run_dir = only_run(tmp_path)
    config = json.loads((run_dir / "config.json").read_text())
    assert (config["val_split"], config["settings"]["max_lr"]) == (50, 0.01)
    assert "val_accuracy" in read_csv(run_dir / "history.csv")[0]
    status, out, err = invoke(train, ["--resume", run_dir])
    assert (status, err) == (0, "") and "is finished" in out and "shapes-val50" in out
    ckpt = torch.load(run_dir / "best.pt", weights_only=True)
    assert data.load_for_checkpoint(ckpt, None, tmp_path, "cpu").name == "shapes"
    status, out, _ = invoke(train, [*args, "--runs", 2, "--max-steps", 1])
    assert status == 0 and "2 runs on shapes-val50, accuracy on held-out images in %" in out


def test_the_averaged_model_is_evaluated_and_kept(small_shapes, small, tmp_path, invoke):
    args = ["--data", "shapes", "--out", tmp_path, "--epochs", 2, "--batch-size", 50]
    assert invoke(train, [*args, "--set", "weight_avg_frac=0.5"])[0] == 0
    run_dir, normalize = only_run(tmp_path), Normalize(small.mean, small.std, "cpu")
    for name in ("best.pt", "last.pt"):
        model, ckpt = load_checkpoint(run_dir / name, "cpu")
        row = read_csv(run_dir / "history.csv")[ckpt["epoch"] - 1]
        logits = predict(Runtime("cpu"), model, normalize, small.test_images)
        figures = loss_and_accuracy(logits, small.test_labels)
        assert [str(x) for x in figures] == [row["test_loss"], row["test_accuracy"]]
    trained = ckpt["train_state"]["trainer"]["model"]
    assert not any(torch.equal(w, trained[name]) for name, w in ckpt["model"].items())


def test_runs_have_folders_of_their_own_and_a_summary(small_shapes, tmp_path, invoke):
    args = ["--data", "shapes", "--out", tmp_path, "--epochs", 2, "--batch-size", 100]
    args += ["--runs", 2, "--seed", 3]
    status, out, err = invoke(train, args)
    assert (status, err) == (0, "")
    folders = sorted((tmp_path / "runs").iterdir())
    assert [folder.name.split("-")[-1] for folder in folders] == ["seed3", "seed4"]
    a, b = (float(read_csv(f / "history.csv")[-1]["test_accuracy"]) for f in folders)
    mean, std = (a + b) / 2, abs(a - b) / 2**0.5
    assert f"last epoch: mean {mean:.2f}, std {std:.2f} ({a:.2f}, {b:.2f})" in out
    assert out.count("accuracy improved from 0.00 to ") == 2
    assert (tmp_path / "best.pt").read_bytes() == (folders[1] / "best.pt").read_bytes()
    kept = {path: path.read_bytes() for folder in folders for path in folder.iterdir()}
    assert invoke(train, args)[0] == 0  # again: other folders, the same bits
    assert all(path.read_bytes() == content for path, content in kept.items())
    seed3 = list((tmp_path / "runs").glob("*seed3*"))
    weights = [torch.load(f / "last.pt", weights_only=True)["model"] for f in seed3]
    assert len(seed3) == 2 and sha256(weights[0]) == sha256(weights[1])


def test_the_head_has_the_classes_of_the_data(tmp_path, small, monkeypatch, invoke):
    labels = {"train_labels": small.train_labels % 2, "test_labels": small.test_labels % 2}
    two = dataclasses.replace(small, **labels, class_names=("even", "odd"), name="two")
    monkeypatch.setattr(data, "load_shapes", lambda: two)
    args = ["--data", "shapes", "--out", tmp_path, "--epochs", 1, "--batch-size", 100]
    assert invoke(train, args)[0] == 0
    best = ["--ckpt", tmp_path / "best.pt"]
    status, out, _ = invoke(evaluate, best)
    assert status == 0 and "odd" in out
    monkeypatch.setattr(data, "load_shapes", lambda: small)
    status, _, err = invoke(evaluate, best)
    assert status == 2 and "the checkpoint has 2 classes" in err


# --- failures ---


def test_a_run_that_is_not_finite_keeps_its_last_good_state(
    tiny_shapes, tmp_path, monkeypatch, invoke
):
    call = OneCycle.__call__
    poisoned = lambda self, step: (math.inf if step == 4 else 0.001, call(self, step)[1])
    monkeypatch.setattr(OneCycle, "__call__", poisoned)
    args = ["--data", "shapes", "--out", tmp_path, "--epochs", 3, "--batch-size", 8]
    status, _, err = invoke(train, [*args, "--save-every", 1])
    run_dir = only_run(tmp_path)
    assert status == 1 and err.count("\n") == 1
    assert err.startswith("train.py: error: step 2 of epoch 2, lr inf: cls_token is not finite")
    assert err.endswith(f"; last.pt is intact: python train.py --resume {run_dir}\n")
    _, ckpt = load_checkpoint(run_dir / "last.pt", "cpu")
    assert ckpt["train_state"]["trainer"]["step_in_epoch"] == 1


def test_a_full_disk_is_one_line_and_leaves_whole_files(tiny_shapes, tmp_path, invoke):
    """A limit on file size fails a write as a full disk does."""
    args = ["--data", "shapes", "--out", tmp_path, "--epochs", 1, "--batch-size", 8]
    assert invoke(train, args)[0] == 0
    before = (tmp_path / "best.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        status, _, err = invoke(train, args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    second = sorted((tmp_path / "runs").iterdir())[1]
    assert status == 1 and err.count("\n") == 1
    assert err == f"train.py: error: {second / 'last.pt'} could not be written: File too large\n"
    assert (tmp_path / "best.pt").read_bytes() == before and os.listdir(second) == ["config.json"]


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half of the ne")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]
    (tmp_path / ".a-12345678.txt").touch()
    cli.remove_stale_temp_files(tmp_path)
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_run_is_one_line_and_exit_status_1(tmp_path, monkeypatch, invoke):
    def fail():
        raise RunError("no images \x1b[31mtoday")

    monkeypatch.setattr(data, "load_shapes", fail)
    status, _, err = invoke(train, ["--data", "shapes", "--out", tmp_path])
    assert (status, err) == (1, "train.py: error: no images \\x1b[31mtoday\n")
