"""Runs that are stopped or killed resume to the same bits; what resume refuses.

Twenty random SIGKILLs instead of three: KILLS=20 pytest tests/test_resume.py
"""

import dataclasses
import math
import os
import random
import signal
import sys
import threading

import pytest
import torch
from conftest import PROCESSES, RUN_FILES, only_run, tampered, write_images

import data
import evaluate
import train
from cli import read_csv, run_script, sha256
from runtime import Runtime
from schedule import RECIPES
from trainer import Run, Trainer, load_checkpoint

KILLS = int(os.environ.get("KILLS", 3))
ARGS = ["--data", "shapes", "--epochs", 2, "--batch-size", 8, "--save-every", 2]


def result_of(run_dir):
    """Everything that a finished run leaves, but for its seconds."""
    rows = [{**row, "seconds": ""} for row in read_csv(run_dir / "history.csv")]
    found = {"rows": rows, "curves": (run_dir / "curves.png").read_bytes().hex()}
    for name in ("best.pt", "last.pt"):
        _, ckpt = load_checkpoint(run_dir / name, "cpu")
        found[name] = [ckpt[key] for key in ("model", "epoch", "test_accuracy", "mean", "std")]
    found["trainer"] = ckpt["train_state"]["trainer"]
    assert sorted(os.listdir(run_dir)) == RUN_FILES
    newest = load_checkpoint(run_dir.parent.parent / "best.pt", "cpu")[1]["model"]
    assert sha256(newest) == sha256(found["best.pt"][0])
    return sha256(found)


class Killed(BaseException):
    """Caught by nobody, like SIGKILL."""


def test_a_run_killed_at_any_step_evaluation_or_write_resumes_to_the_same_bits(
    tiny_shapes, tmp_path, monkeypatch, invoke, succeeds, fails
):
    points, kill_at = 0, math.inf

    def breakable(function):
        def wrapper(*args, **kwargs):
            nonlocal points
            points += 1
            if points == kill_at:
                raise Killed
            return function(*args, **kwargs)

        return wrapper

    for module, name in ((os, "replace"), (Runtime, "predict"), (Trainer, "step")):
        monkeypatch.setattr(module, name, breakable(getattr(module, name)))
    succeeds(train, [*ARGS, "--out", tmp_path / "unbroken"])
    expected, count = result_of(only_run(tmp_path / "unbroken")), points
    assert count >= 2 * 3 + 2 + 10  # steps, evaluations, files
    for kill_at in range(1, count + 1):
        points, out = 0, tmp_path / str(kill_at)
        with pytest.raises(Killed):
            invoke(train, [*ARGS, "--out", out])
        run_dir, points = only_run(out), -10_000
        if kill_at <= 2:  # before the first last.pt
            assert "no last.pt there" in fails(train, ["--resume", run_dir])
        else:
            succeeds(train, ["--resume", run_dir])
            assert result_of(run_dir) == expected, kill_at


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_says_how_to_resume(
    tiny_shapes, tmp_path, monkeypatch, invoke, succeeds, signum
):
    succeeds(train, [*ARGS, "--out", tmp_path / "unbroken"])
    step = Trainer.step

    def interrupted_step(trainer, i):
        if (trainer.epoch, i) == (1, 1):
            signal.raise_signal(signum)
        step(trainer, i)

    monkeypatch.setattr(Trainer, "step", interrupted_step)
    status, _, err = invoke(train, [*ARGS, "--save-every", 9, "--out", tmp_path / "broken"])
    monkeypatch.setattr(Trainer, "step", step)
    run_dir = only_run(tmp_path / "broken")
    message = f"stopped by {signal.Signals(signum).name}; step 5 of 6 is saved, resume with"
    assert err == f"train.py: {message}: python train.py --resume {run_dir}\n"
    assert status == 128 + signum
    assert "resumed at step 5 of 6" in succeeds(train, ["--resume", run_dir])
    assert result_of(run_dir) == result_of(only_run(tmp_path / "unbroken"))


def train_process(args, seconds):
    """train.py, which SIGKILL ends so many seconds after its training begins."""
    fit, kill = Run.fit, threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    kill.daemon = True
    Run.fit = lambda run: kill.start() or fit(run)
    sys.argv = ["train.py", *map(str, args)]
    run_script(train.main)


def test_random_sigkills_change_no_bit(tmp_path, succeeds):
    images = write_images(tmp_path / "images", 100, 20)
    args = ["--data", images, "--data-dir", tmp_path / "data", "--recipe", "original"]
    args += ["--epochs", 8, "--batch-size", 20, "--save-every", 2]
    succeeds(train, [*args, "--out", tmp_path])
    history = read_csv(only_run(tmp_path) / "history.csv")
    duration = sum(float(row["seconds"]) for row in history)
    chance, kills, out = random.Random(7), 0, None
    while kills < KILLS or out:
        command = ["--resume", only_run(out)] if out else [*args, "--out", tmp_path / str(kills)]
        out = out or tmp_path / str(kills)
        seconds = chance.uniform(0, duration / 2) if kills < KILLS else 3600
        process = PROCESSES.Process(target=train_process, args=(command, seconds))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            assert result_of(only_run(out)) == result_of(only_run(tmp_path))
            out = None
        else:
            kills += 1
            out = out if (only_run(out) / "last.pt").exists() else None


# --- what resume refuses ---


@pytest.fixture
def finished(tiny_shapes, tmp_path, succeeds):
    """The folder of a finished run."""
    succeeds(train, [*ARGS, "--out", tmp_path, "--precision", "fp32", "--device", "cpu"])
    return only_run(tmp_path)


def test_a_finished_run_says_so_and_changes_nothing(finished, succeeds):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    for path in (finished, finished / "last.pt"):
        out = succeeds(train, ["--resume", path])
        assert f"{finished} is finished: nothing is left to do" in out and "last epoch: " in out
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


def test_other_settings_are_refused_by_name(finished, tmp_path, succeeds, fails):
    others = {  # flag -> another value, and that of the run
        "--recipe": ("original", "default"), "--epochs": (3, 2), "--batch-size": (9, 8),
        "--max-lr": (0.5, RECIPES["default"].max_lr), "--data": ("cifar10", "shapes"),
        "--precision": ("bf16", "fp32"), "--kernels": ("torch", "auto"), "--seed": (2, 1),
        "--runs": (2, 1), "--max-steps": (5, None), "--device": ("mps", "cpu"),
        "--out": ("/elsewhere", tmp_path), "--val-split": (5, None),
    }  # fmt: skip
    for flag, (other, began) in others.items():
        err = fails(train, ["--resume", finished, flag, other])
        assert f"error: {flag} {other}: the run in {finished} has {began} and continues" in err
        if began is not None:
            succeeds(train, ["--resume", finished, flag, began])


def test_other_images_are_refused(finished, monkeypatch, invoke, fails):
    tiny = data.load_shapes()
    images, labels = tiny.train_images, tiny.train_labels
    for changes in (
        {"train_images": images[[1, 0, *range(2, 20)]]},  # swapped between two classes
        {"train_images": images.flip(0), "train_labels": labels.flip(0)},
        {"test_images": tiny.test_images[1:], "test_labels": tiny.test_labels[1:]},
    ):
        other = dataclasses.replace(tiny, **changes)
        monkeypatch.setattr(data, "load_shapes", lambda other=other: other)
        assert "was trained on other images than" in fails(train, ["--resume", finished])
        status, _, err = invoke(evaluate, ["--ckpt", finished / "best.pt"])
        assert (status, err) == (0, "warning: these are not the images of the training run\n")
    two = dataclasses.replace(tiny, class_names=("even", "odd"))
    monkeypatch.setattr(data, "load_shapes", lambda: two)
    assert "the checkpoint has 10 classes" in fails(evaluate, ["--ckpt", finished / "best.pt"])


def test_files_without_a_run_are_refused(finished, tmp_path, fails):
    assert "has weights only; the state of" in fails(train, ["--resume", finished / "best.pt"])
    assert "no last.pt there" in fails(train, ["--resume", tmp_path / "nothing"])
    assert "is not a checkpoint" in fails(train, ["--resume", finished / "history.csv"])


def test_an_invalid_configuration_or_state_is_one_line(finished, invoke):
    ckpt = torch.load(finished / "last.pt", weights_only=True)
    state = ckpt["train_state"]
    paths = [("config", name) for name in ckpt["config"] if name not in ("elastic_run_id", "set")]
    paths += [("train_state", name) for name in state]
    paths += [("train_state", "trainer", name) for name in state["trainer"]]
    for path in paths:
        for value in (None, [1], "x" * (path[-1] != "kernels")):
            torch.save(tampered(ckpt, *path, value=value), finished / "last.pt")
            status, _, err = invoke(train, ["--resume", finished])
            lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
            assert status in ((2,) if value is None else (0, 2)) and len(lines) <= 1, (path, value)
