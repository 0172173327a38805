"""Runs that are stopped or killed resume to the same bits; what resume refuses.

Twenty random SIGKILLs instead of two: KILLS=20 pytest tests/test_resume.py
"""

import dataclasses
import json
import math
import os
import random
import shlex
import shutil
import signal
import sys
import threading

import pytest
import torch
from conftest import PROCESSES, RUN_FILES, only_run, tampered, write_images

import data
import evaluate
import train
from checkpoint import load_checkpoint
from cli import read_csv, run_script, sha256
from runtime import Runtime
from train import Trainer

KILLS = int(os.environ.get("KILLS", 2))
ARGS = ["--data", "shapes", "--epochs", 2, "--batch-size", 8, "--set", "weight_avg_frac=0.4"]


def result_of(run_dir):
    """A digest of everything that a finished run leaves, but for its seconds."""
    rows = [{**row, "seconds": ""} for row in read_csv(run_dir / "history.csv")]
    found = [rows, (run_dir / "curves.png").read_bytes().hex()]
    for name in ("best.pt", "last.pt"):
        _, ckpt = load_checkpoint(run_dir / name, "cpu")
        found += [ckpt[key] for key in ("model", "epoch", "test_accuracy", "mean", "std")]
    found += [ckpt["train_state"][key] for key in ("weights", "exp_avg", "exp_avg_sq")]
    assert sorted(os.listdir(run_dir)) == RUN_FILES
    assert (run_dir.parent.parent / "best.pt").read_bytes() == (run_dir / "best.pt").read_bytes()
    return sha256(found)


class Killed(BaseException):
    """Caught by nobody, like SIGKILL."""


def test_a_run_killed_at_any_step_evaluation_or_write_resumes_to_the_same_bits(
    tiny_shapes, tmp_path, monkeypatch, invoke, succeeds, fails
):
    """Killed at the first call, then at the second, and so on, of everything that may be last."""
    calls = 0
    kill_at = math.inf

    def breakable(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                raise Killed
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(os, "replace", breakable(os.replace))
    monkeypatch.setattr(Runtime, "predict", breakable(Runtime.predict))
    monkeypatch.setattr(Trainer, "step", breakable(Trainer.step))
    succeeds(train, [*ARGS, "--out", tmp_path / "unbroken"])
    expected = result_of(only_run(tmp_path / "unbroken"))
    count = calls
    assert count >= 2 * 3 + 2 + 6  # steps, evaluations, files
    for number in range(1, count + 1):
        calls = 0
        kill_at = number
        out = tmp_path / str(number)
        with pytest.raises(Killed):
            invoke(train, [*ARGS, "--out", out])
        kill_at = math.inf
        run_dir = only_run(out)
        if (run_dir / "last.pt").exists():
            succeeds(train, ["--resume", run_dir])
            assert result_of(run_dir) == expected, number
        else:  # within the first epoch
            assert number < count / 2 + 2
            assert "no last.pt there" in fails(train, ["--resume", run_dir])


def test_ctrl_c_says_how_to_resume(tiny_shapes, tmp_path, monkeypatch, invoke, succeeds):
    """The command can be pasted, whatever the folder is called."""
    succeeds(train, [*ARGS, "--out", tmp_path / "unbroken"])
    step = Trainer.step

    def interrupted_step(trainer, i):
        if (trainer.epoch, i) == (1, 1):
            raise KeyboardInterrupt
        step(trainer, i)

    monkeypatch.setattr(Trainer, "step", interrupted_step)
    status, _, err = invoke(train, [*ARGS, "--out", tmp_path / "with space"])
    monkeypatch.setattr(Trainer, "step", step)
    run_dir = only_run(tmp_path / "with space")
    assert status == 130
    message, command = err.strip().split(": resume with: ".replace(": r", "; r"))
    assert message == "train.py: stopped"
    assert shlex.split(command) == ["python", "train.py", "--resume", str(run_dir)]
    assert "resumed after epoch 1" in succeeds(train, shlex.split(command)[2:])
    assert result_of(run_dir) == result_of(only_run(tmp_path / "unbroken"))


def train_process(args, seconds):
    """train.py, which SIGKILL ends so many seconds after its training begins."""
    train_run = train.train
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True

    def timed(run):
        timer.start()
        train_run(run)

    train.train = timed
    sys.argv = ["train.py", *map(str, args)]
    run_script(train.main)


def test_random_sigkills_change_no_bit(tmp_path, succeeds):
    images = write_images(tmp_path / "images", 100, 20)
    args = ["--data", images, "--data-dir", tmp_path / "data", "--recipe", "original"]
    args += ["--epochs", 5, "--batch-size", 20]
    succeeds(train, [*args, "--out", tmp_path])
    expected = result_of(only_run(tmp_path))
    history = read_csv(only_run(tmp_path) / "history.csv")
    duration = sum(float(row["seconds"]) for row in history)
    chance = random.Random(7)
    kills = 0
    out = None
    while kills < KILLS or out is not None:
        # Go on with the run that was killed, or begin another.
        if out is None:
            out = tmp_path / str(kills)
            command = [*args, "--out", out]
        else:
            command = ["--resume", only_run(out)]
        seconds = chance.uniform(0, duration / 2) if kills < KILLS else 3600
        process = PROCESSES.Process(target=train_process, args=(command, seconds))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            for left in only_run(out).glob(".*.tmp"):  # of a process killed while it wrote
                left.unlink()
            assert result_of(only_run(out)) == expected
            out = None
        else:
            kills += 1
            if not (only_run(out) / "last.pt").exists():
                out = None


# --- what resume refuses ---


@pytest.fixture
def finished(tiny_shapes, tmp_path, succeeds):
    """The folder of a finished run."""
    succeeds(train, [*ARGS, "--out", tmp_path, "--precision", "fp32", "--device", "cpu"])
    return only_run(tmp_path)


def test_a_finished_run_says_so_and_changes_nothing(finished, succeeds, monkeypatch):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    monkeypatch.chdir(finished)
    for path in (finished, finished / "last.pt", "."):
        out = succeeds(train, ["--resume", path])
        assert "the run is finished; --init trains its weights on in a new run" in out
        assert "last epoch: " in out
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


def test_settings_cannot_be_changed(finished, fails):
    for flag in ("--recipe", "--epochs", "--batch-size", "--max-lr", "--seed", "--val-split"):
        value = "default" if flag == "--recipe" else 1
        err = fails(train, ["--resume", finished, flag, value])
        assert f"error: {flag}: a resumed run continues with the settings" in err


def test_a_run_resumes_from_a_moved_folder_of_images(tmp_path, monkeypatch, succeeds, fails):
    """--data names where the images are now; other images are refused."""
    images = write_images(tmp_path / "images", 20, 10)
    args = ["--data-dir", tmp_path / "data", "--epochs", 1, "--batch-size", 10]
    succeeds(train, ["--data", images, *args, "--out", tmp_path])
    moved = images.rename(tmp_path / "moved")
    run_dir = only_run(tmp_path)
    assert "not a folder that exists" in fails(train, ["--resume", run_dir])
    (tmp_path / "link").symlink_to(run_dir)
    for place in (run_dir, tmp_path / "link"):
        assert "is finished" in succeeds(train, ["--resume", place, "--data", moved])
    assert json.loads((run_dir / "config.json").read_text())["data"] == str(moved)
    (moved / "train" / "cat" / "0.png").write_bytes((moved / "test/dog/0.png").read_bytes())
    err = fails(train, ["--resume", run_dir, "--data", moved])
    assert "was trained on other images, labels or classes" in err


def test_other_images_are_refused(finished, monkeypatch, invoke, fails):
    tiny = data.load_shapes()
    images = tiny.train_images
    labels = tiny.train_labels
    names = tiny.class_names
    for changes in (
        {"train_images": images[[1, 0, *range(2, 20)]]},  # swapped between two classes
        {"train_images": images.flip(0), "train_labels": labels.flip(0)},
        {"test_images": tiny.test_images[1:], "test_labels": tiny.test_labels[1:]},
        {"class_names": ("renamed", *names[1:])},
    ):
        other = dataclasses.replace(tiny, **changes)
        monkeypatch.setattr(data, "load_shapes", lambda other=other: other)
        assert "was trained on other images" in fails(train, ["--resume", finished])
        if "class_names" not in changes:
            status, _, err = invoke(evaluate, ["--ckpt", finished / "best.pt"])
            assert (status, err) == (0, "warning: these are not the images of the training run\n")


def test_a_run_moved_elsewhere_changes_nothing_around_it(finished, tmp_path, succeeds):
    """Only a folder within a folder named runs has a best.pt beside."""
    state = torch.load(finished / "last.pt", weights_only=True)
    state["epoch"] = 1
    row = {**state["train_state"]["history"][0], "test_accuracy": -1.0}  # so epoch 2 is better
    state = tampered(state, "train_state", "history", value=[row])
    place = tmp_path / "a" / "b" / "copy"
    place.mkdir(parents=True)
    (tmp_path / "a" / "best.pt").write_text("another file")
    (place / ".app-settings.json").write_text("another file")
    torch.save(state, place / "last.pt")
    succeeds(train, ["--resume", place])
    assert (tmp_path / "a" / "best.pt").read_text() == "another file"
    assert (place / ".app-settings.json").read_text() == "another file"
    shutil.rmtree(place)


def test_files_without_a_run_are_refused(finished, tmp_path, fails):
    assert "has weights only; the state of" in fails(train, ["--resume", finished / "best.pt"])
    assert "no last.pt there" in fails(train, ["--resume", tmp_path / "nothing"])
    assert "is not a checkpoint" in fails(train, ["--resume", finished / "history.csv"])


INVALID_STATES = [  # path and value, None deletes it; a part of the line
    (("config", "settings", "batch_size"), 0, "batch_size must be int from 1"),
    (("config", "settings", "batch_size"), None, "its settings are not those"),
    (("config", "settings", "no_such"), 1, "its settings are not those"),
    (("config", "seed"), "x", "no valid seed"),
    (("config", "seed"), -1, "no valid seed"),
    (("config", "seed"), 2**63, "no valid seed"),
    (("config", "val_split"), "x", "no valid val_split"),
    (("config", "val_split"), -1, "no valid val_split"),
    (("config", "kernels"), "x", "no valid kernels"),
    (("config", "precision"), "fp16", "no valid precision"),
    (("config", "data_sha256"), "0" * 64, "other images"),
    (("train_state", "weights"), None, "weights: "),
    (("train_state", "weights", "cls_token"), torch.zeros(2), "weights: cls_token"),
    (("train_state", "exp_avg", "cls_token"), torch.zeros(1), "exp_avg: cls_token"),
    (("train_state", "exp_avg_sq", "head.bias"), torch.zeros(10).double(), "head.bias"),
    (("train_state", "exp_avg_sq", "cls_token"), None, "the names of its tensors"),
    (("train_state", "history"), [], "its history does not have a row for each epoch"),
    (("epoch",), 1, "its history does not have a row for each epoch"),
    (("train_state", "history", 0), 3, "a row of its history does not have epoch, lr"),
    (("train_state", "history", 1, "lr"), None, "a row of its history does not have epoch, lr"),
    (("train_state", "history", 1, "x"), 1.0, "a row of its history does not have epoch, lr"),
    (("train_state", "history", 1, "lr"), "x", "has values that are no numbers"),
]


def test_a_state_that_does_not_fit_is_one_line(finished, invoke):
    ckpt = torch.load(finished / "last.pt", weights_only=True)
    for path, value, message in INVALID_STATES:
        torch.save(tampered(ckpt, *path, value=value), finished / "last.pt")
        status, _, err = invoke(train, ["--resume", finished])
        assert (status, err.count("\n")) == (2, 1), (path, err)
        assert message in err, (path, err)


def test_a_link_to_runs_is_where_best_pt_lies_beside(tiny_shapes, tmp_path, succeeds):
    """And a link to a last.pt is followed to its run."""
    (tmp_path / "store" / "elsewhere").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs").symlink_to("../store/elsewhere")
    succeeds(train, [*ARGS, "--out", tmp_path / "out"])
    run_dir = only_run(tmp_path / "out")
    assert (tmp_path / "out" / "best.pt").read_bytes() == (run_dir / "best.pt").read_bytes()
    assert os.listdir(tmp_path / "store") == ["elsewhere"]
    (tmp_path / "last.pt").symlink_to(run_dir / "last.pt")
    succeeds(train, ["--resume", tmp_path / "last.pt"])
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "out", "store"]
