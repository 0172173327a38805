"""Runs that are stopped or killed resume to the same bits; what resume refuses.

Twenty random SIGKILLs instead of three: KILLS=20 pytest tests/test_resume.py
"""

import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, RUN_FILES, only_run, tampered, write_images

import data
import evaluate
import train
import trainer as trainer_module
from cli import read_csv, sha256
from schedule import RECIPES
from trainer import load_checkpoint

KILLS = int(os.environ.get("KILLS", 3))


def result_of(run_dir):
    """Everything that a finished run leaves, but for its seconds; and the rows of its history."""
    rows = [
        {k: v for k, v in r.items() if k != "seconds"} for r in read_csv(run_dir / "history.csv")
    ]
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
    tiny_shapes, tmp_path, monkeypatch, invoke
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

    monkeypatch.setattr(os, "replace", breakable(os.replace))
    monkeypatch.setattr(trainer_module, "predict", breakable(trainer_module.predict))
    step = breakable(trainer_module.Trainer.step)
    monkeypatch.setattr(trainer_module.Trainer, "step", step)
    args = ["--data", "shapes", "--epochs", 2, "--batch-size", 8, "--save-every", 2]
    assert invoke(train, [*args, "--out", tmp_path / "unbroken"])[0] == 0
    expected, count = result_of(only_run(tmp_path / "unbroken")), points
    assert count >= 2 * 3 + 2 + 10  # steps, evaluations, files
    for kill_at in range(1, count + 1):
        points, out = 0, tmp_path / str(kill_at)
        with pytest.raises(Killed):
            invoke(train, [*args, "--out", out])
        run_dir, points = only_run(out), -10_000
        status, _, err = invoke(train, ["--resume", run_dir])
        if kill_at <= 2:  # before the first last.pt
            assert status == 2 and "no last.pt there" in err
        else:
            assert (status, err) == (0, "") and result_of(run_dir) == expected, kill_at


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Arguments of a short run on an image folder, its result, and its seconds of training."""
    path = tmp_path_factory.mktemp("unbroken")
    images = write_images(path / "images", 200, 200)
    args = ["--data", images, "--data-dir", path / "data", "--recipe", "original"]
    args = [str(x) for x in [*args, "--epochs", 12, "--batch-size", 40, "--save-every", 2]]
    with start([*args, "--out", path]) as process:
        wait_for_table(process)
        started = time.monotonic()
        assert process.wait() == 0
    return args, result_of(only_run(path)), time.monotonic() - started


def start(args):
    command = [sys.executable, "train.py", *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "bufsize": 1}
    return subprocess.Popen(command, cwd=ROOT, **pipes)


def wait_for_table(process):
    """Wait for the head of the table; what was printed until then."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.split()[:2] == ["epoch", "lr"]:
            return "".join(lines)
    raise AssertionError("".join(lines) + process.stderr.read())


def test_random_sigkills_change_no_bit(unbroken, tmp_path):
    args, expected, seconds = unbroken
    chance, kills, out = random.Random(7), 0, None
    while kills < KILLS or out:
        if out is None:
            out, command = tmp_path / f"from-{kills}", [*args, "--out", tmp_path / f"from-{kills}"]
        else:
            command = ["--resume", only_run(out)]
        with start(command) as process:
            wait_for_table(process)
            try:
                process.wait(chance.uniform(0, seconds * 0.5) if kills < KILLS else None)
            except subprocess.TimeoutExpired:
                process.kill()
            assert process.wait() in (0, -signal.SIGKILL), process.stderr.read()
        if process.returncode == 0:
            assert result_of(only_run(out)) == expected
            out = None
        else:
            kills += 1
            out = out if (only_run(out) / "last.pt").exists() else None


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_says_how_to_resume(unbroken, tmp_path, signum):
    args, expected, seconds = unbroken
    with start([*args, "--out", tmp_path]) as process:
        wait_for_table(process)
        time.sleep(0.3 * seconds)
        process.send_signal(signum)
        assert process.wait() == 128 + signum
        line = process.stderr.read()
    run_dir = only_run(tmp_path)
    assert line.startswith(f"train.py: stopped by {signal.Signals(signum).name}; step ")
    assert line.endswith(f" of 60 is saved, resume with: python train.py --resume {run_dir}\n")
    step, state = (
        int(line.split("; step ")[1].split()[0]),
        load_checkpoint(run_dir / "last.pt", "cpu"),
    )
    state = state[1]["train_state"]["trainer"]
    assert state["epoch"] * 5 + state["step_in_epoch"] == step and 0 < step < 60
    with start(line.strip().split("python train.py ")[1].split()) as process:
        assert f"resumed at step {step} of 60" in wait_for_table(process)
        assert process.wait() == 0
    assert result_of(run_dir) == expected


# --- what resume refuses ---


@pytest.fixture
def finished(tiny_shapes, tmp_path, invoke):
    """The folder of a finished run."""
    args = ["--data", "shapes", "--out", tmp_path, "--epochs", 2, "--batch-size", 8]
    assert invoke(train, [*args, "--precision", "fp32", "--device", "cpu"])[0] == 0
    return only_run(tmp_path)


def test_a_finished_run_says_so_and_changes_nothing(finished, invoke):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    for path in (finished, finished / "last.pt"):
        status, out, err = invoke(train, ["--resume", path])
        assert (status, err) == (0, "") and "last epoch: " in out
        assert f"{finished} is finished: nothing is left to do" in out
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


OTHERS = {  # flag -> another value, and that of the run
    "--recipe": ("original", "default"), "--epochs": (3, 2), "--batch-size": (9, 8),
    "--max-lr": (0.5, RECIPES["default"].max_lr), "--data": ("cifar10", "shapes"),
    "--precision": ("bf16", "fp32"), "--kernels": ("torch", "auto"), "--seed": (2, 1),
    "--runs": (2, 1), "--max-steps": (5, None), "--device": ("mps", "cpu"),
    "--out": ("/elsewhere", None), "--val-split": (5, None),
}  # fmt: skip


@pytest.mark.parametrize("flag", OTHERS)
def test_other_settings_are_refused_by_name(finished, invoke, flag):
    other, began = OTHERS[flag]
    status, _, err = invoke(train, ["--resume", finished, flag, other])
    assert status == 2 and err.count("\n") == 1
    assert err.startswith(f"train.py: error: {flag} {other}: the run in {finished} has ")
    if began is not None:
        assert f" has {began} " in err
        assert invoke(train, ["--resume", finished, flag, began])[0] == 0


@pytest.mark.parametrize("change", ["swap", "delete", "reorder"])
def test_other_images_are_refused(finished, monkeypatch, invoke, change):
    tiny = data.load_shapes()
    if change == "swap":  # between two classes
        images = tiny.train_images.clone()
        images[[0, 1]] = images[[1, 0]]
        other = {"train_images": images}
    elif change == "delete":
        other = {"test_images": tiny.test_images[1:], "test_labels": tiny.test_labels[1:]}
    else:
        other = {
            "train_images": tiny.train_images.flip(0),
            "train_labels": tiny.train_labels.flip(0),
        }
    monkeypatch.setattr(data, "load_shapes", lambda: dataclasses.replace(tiny, **other))
    status, _, err = invoke(train, ["--resume", finished])
    assert status == 2 and "was trained on other images than shapes now has" in err
    status, _, err = invoke(evaluate, ["--ckpt", finished / "best.pt", "--out", finished / "x"])
    assert (status, err) == (0, "warning: these are not the images of the training run\n")


def test_files_without_a_run_are_refused(finished, tmp_path, invoke):
    for path, message in (
        (finished / "best.pt", "has weights only; the state of its run is in last.pt"),
        (tmp_path / "nothing", "no last.pt there"),
        (finished / "history.csv", "is not a checkpoint"),
    ):
        status, _, err = invoke(train, ["--resume", path])
        assert status == 2 and message in err and err.count("\n") == 1


def test_an_invalid_configuration_or_state_is_one_line(finished, invoke):
    ckpt = torch.load(finished / "last.pt", weights_only=True)
    unused = ("elastic_run_id", "set")
    paths = [("config", name) for name in ckpt["config"] if name not in unused]
    paths += [("train_state", name) for name in ckpt["train_state"]]
    paths += [("train_state", "trainer", name) for name in ckpt["train_state"]["trainer"]]
    for path in paths:
        for value in (None, [1], "x" * (path[-1] != "kernels")):
            torch.save(tampered(ckpt, *path, value=value), finished / "last.pt")
            status, _, err = invoke(train, ["--resume", finished])
            lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
            assert status in ((2,) if value is None else (0, 2)) and len(lines) <= 1, (path, value)


def test_other_code_resumes_with_a_warning(finished, monkeypatch, invoke):
    monkeypatch.setattr(train, "git_commit", lambda: "another")
    status, _, err = invoke(train, ["--resume", finished])
    assert status == 0 and err.count("\n") == 1
    assert err.startswith("warning: the bits may differ: git_commit was ")
