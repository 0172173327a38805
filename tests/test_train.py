"""Runs from the command line to the last file, and runs that fail."""

import dataclasses
import json
import math
import os
import resource

import pytest
import torch
from conftest import RUN_FILES, only_run

import data
import evaluate
import train
from cli import RunError, atomic_write, read_csv, remove_stale_temp_files
from schedule import OneCycle
from trainer import load_checkpoint


def test_from_the_command_line_to_an_evaluated_checkpoint(small_shapes, tmp_path, succeeds):
    """What is evaluated and kept is the averaged model; evaluate.py prints the same figures."""
    out = tmp_path / "out"
    args = ["--data", "shapes", "--out", out, "--max-steps", 3, "--batch-size", 128]
    stdout = succeeds(train, [*args, "--set", "weight_avg_frac=0.5"])
    assert "\r" not in stdout and "--max-steps: 3 of " in stdout
    header = stdout.split("\nseed 1, ")[0]
    assert "avg_pool_init=True" in header and max(map(len, header.splitlines())) < 100
    run_dir = only_run(out)
    assert run_dir.name.endswith("-default-shapes-seed1")
    assert sorted(os.listdir(run_dir)) == RUN_FILES and len(os.listdir(out)) == 2
    assert (out / "best.pt").read_bytes() == (run_dir / "best.pt").read_bytes()
    (row,) = read_csv(run_dir / "history.csv")
    last = torch.load(run_dir / "last.pt", weights_only=True)
    assert last["test_accuracy"] == float(row["test_accuracy"])
    assert last["config"] == json.loads((run_dir / "config.json").read_text())
    trained = last["train_state"]["trainer"]["model"]
    assert not any(torch.equal(w, trained[name]) for name, w in last["model"].items())

    stdout = succeeds(evaluate, ["--ckpt", out / "best.pt"])
    accuracy, loss = float(row["test_accuracy"]), float(row["test_loss"])
    assert f"accuracy {accuracy:.2f} %, cross entropy {loss:.4f} nats" in stdout


def test_held_out_images_are_evaluated(small, monkeypatch, text_figures, tmp_path, succeeds):
    blind = {"test_images": small.test_images[:0], "test_labels": small.test_labels[:0]}
    monkeypatch.setattr(data, "load_shapes", lambda: dataclasses.replace(small, **blind))
    args = ["--data", "shapes", "--out", tmp_path, "--val-split", 50, "--set", "max_lr=0.01"]
    out = succeeds(train, [*args, "--batch-size", 100, "--runs", 2, "--max-steps", 1])
    assert "shapes-val50: 250 train, 50 held-out" in out and "val loss" in out
    assert "2 runs on shapes-val50, accuracy on held-out images in %" in out
    run_dir, _ = (tmp_path / "runs").iterdir()
    config = json.loads((run_dir / "config.json").read_text())
    assert (config["val_split"], config["settings"]["max_lr"]) == (50, 0.01)
    assert "val_accuracy" in read_csv(run_dir / "history.csv")[0]
    out = succeeds(train, ["--resume", run_dir])
    assert "is finished" in out and "on held-out images" in out
    ckpt = torch.load(run_dir / "best.pt", weights_only=True)
    assert data.load_for_checkpoint(ckpt, None, tmp_path, "cpu").name == "shapes"


def test_runs_have_folders_of_their_own_and_a_summary(
    small_shapes, text_figures, tmp_path, succeeds
):
    args = ["--data", "shapes", "--out", tmp_path, "--epochs", 1, "--batch-size", 100]
    out = succeeds(train, [*args, "--runs", 2, "--seed", 3])
    folders = sorted((tmp_path / "runs").iterdir())
    assert [folder.name.split("-")[-1] for folder in folders] == ["seed3", "seed4"]
    a, b = (float(read_csv(f / "history.csv")[-1]["test_accuracy"]) for f in folders)
    mean, std = (a + b) / 2, abs(a - b) / 2**0.5
    assert std and f"last epoch: mean {mean:.2f}, std {std:.2f} ({a:.2f}, {b:.2f})" in out
    assert out.count("accuracy improved from 0.00 to ") == 2
    assert (tmp_path / "best.pt").read_bytes() == (folders[1] / "best.pt").read_bytes()
    kept = {path: path.read_bytes() for folder in folders for path in folder.iterdir()}
    succeeds(train, [*args, "--seed", 3])  # again: another folder
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_a_run_that_is_not_finite_keeps_its_last_good_state(
    tiny_shapes, tmp_path, monkeypatch, fails
):
    call = OneCycle.__call__
    poisoned = lambda self, step: (math.inf if step == 4 else 0.001, call(self, step)[1])
    monkeypatch.setattr(OneCycle, "__call__", poisoned)
    args = ["--data", "shapes", "--out", tmp_path, "--epochs", 3, "--batch-size", 8]
    err = fails(train, [*args, "--save-every", 1], status=1)
    run_dir = only_run(tmp_path)
    assert "error: step 2 of epoch 2, lr inf: cls_token is not finite" in err
    assert err.endswith(f"; last.pt is intact: python train.py --resume {run_dir}\n")
    _, ckpt = load_checkpoint(run_dir / "last.pt", "cpu")
    assert ckpt["train_state"]["trainer"]["step_in_epoch"] == 1


def test_a_full_disk_is_one_line_and_leaves_whole_files(tiny_shapes, tmp_path, succeeds, fails):
    """A limit on file size fails a write as a full disk does."""
    args = ["--data", "shapes", "--out", tmp_path, "--epochs", 1, "--batch-size", 8]
    succeeds(train, args)
    before = (tmp_path / "best.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        err = fails(train, args, status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    second = sorted((tmp_path / "runs").iterdir())[1]
    assert err.endswith(f"error: {second / 'last.pt'} could not be written: File too large\n")
    assert (tmp_path / "best.pt").read_bytes() == before and os.listdir(second) == ["config.json"]


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half of the ne")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    (tmp_path / ".a-12345678.txt").touch()
    remove_stale_temp_files(tmp_path)
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_run_is_one_line_and_exit_status_1(tmp_path, monkeypatch, fails):
    def fail():
        raise RunError("no images \x1b[31mtoday")

    monkeypatch.setattr(data, "load_shapes", fail)
    err = fails(train, ["--data", "shapes", "--out", tmp_path], status=1)
    assert err == "train.py: error: no images \\x1b[31mtoday\n"


def test_the_bar_shows_loss_accuracy_and_the_time_left(
    tiny_shapes, tmp_path, succeeds, monkeypatch
):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    args = ["--data", "shapes", "--epochs", 2, "--batch-size", 20, "--out", tmp_path]
    out = succeeds(train, args)
    row = read_csv(only_run(tmp_path) / "history.csv")[0]  # whose epoch is one step
    loss, accuracy = float(row["train_loss"]), float(row["train_accuracy"])
    bar = f"epoch 1/2 [{'=' * 30}] 1/1, 0:00 left, loss {loss:.3f}, {accuracy:.1f} %, run 0 min"
    assert bar[:79] in out and "evaluating [" in out
