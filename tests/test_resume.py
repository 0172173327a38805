"""Runs that are killed, stopped, poisoned or out of disk, and what is left of them: nothing lost, nothing silently wrong.

Twenty moments of SIGKILL instead of five: KILLS=20 pytest tests/test_resume.py
"""

import copy
import dataclasses
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, make_trainer, run_folder, small_recipe, tampered, write_pictures

import checkpoint
import data
import engine
import train
from cli import RunError
from files import read_csv
from recipe import RECIPES, Recipe
from schedule import OneCycle

KILLS = int(os.environ.get("KILLS", 5))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))]


def ending(folder):
    """Everything that a finished run leaves, but for the seconds it took and the place where pictures are kept."""
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in read_csv(folder / "history.csv")]
    told = {"rows": rows, "curves": (folder / "curves.png").read_bytes().hex()}
    for name in ("best.pt", "last.pt"):
        content = torch.load(folder / name, weights_only=True)
        assert checkpoint.load(folder / name, "cpu")
        told[name] = [content[part] for part in ("model", "epoch", "test_accuracy", "class_names", "mean", "std")]
    told["trainer"] = content["progress"]["trainer"]
    assert sorted(os.listdir(folder)) == ["best.pt", "config.json", "curves.png", "history.csv", "last.pt"]
    assert checkpoint.sha256(checkpoint.load(folder.parent.parent / "best.pt", "cpu")[1]["model"]) == checkpoint.sha256(told["best.pt"][0])
    return checkpoint.sha256(told), rows


# --- a trainer, taken apart and put together ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["original", "averaged"])
@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_a_state_goes_on_to_the_same_bits(small, recipe, device, stop):
    """Taken after `stop` of the three steps of the second epoch, put into a fresh trainer of another seed."""
    small = dataclasses.replace(small, **{name: value.to(device) for name, value in vars(small).items() if torch.is_tensor(value)})
    averaged = dataclasses.replace(RECIPES["default"], averaged_share=0.3)
    plan = dataclasses.replace(averaged if recipe == "averaged" else RECIPES[recipe], epochs=3, batch_size=128)
    unbroken = make_trainer(small, plan, device=device)
    taken = []

    def take(done):
        if done == stop:
            taken.append(copy.deepcopy((unbroken.averaged.state_dict(), unbroken.state_dict())))

    told = [unbroken.epoch(0, 3)]
    take(0)
    told += [unbroken.epoch(1, 3, take), unbroken.epoch(2, 3)]
    resumed = make_trainer(small, plan, seed=2, device=device)
    ((weights, state),) = taken
    resumed.averaged.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert [resumed.epoch(epoch, 3) for epoch in (1, 2)] == told[1:]
    for model in ("model", "averaged"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(unbroken, model).parameters(), getattr(resumed, model).parameters()))
    assert checkpoint.sha256(unbroken.state_dict()) == checkpoint.sha256(resumed.state_dict())


# --- a run, ended at every point where its files change ---


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


def test_a_run_ended_at_any_step_evaluation_or_write_goes_on_to_the_same_bits(tiny_shapes, tmp_path, monkeypatch, invoke):
    points, kill_at = 0, math.inf

    def breakable(function):
        def broken(*arguments, **options):
            nonlocal points
            points += 1
            if points == kill_at:
                raise Killed
            return function(*arguments, **options)

        return broken

    monkeypatch.setattr(os, "replace", breakable(os.replace))
    monkeypatch.setattr(train, "predict", breakable(train.predict))
    monkeypatch.setattr(engine.Trainer, "step", breakable(engine.Trainer.step))
    arguments = ["--data", "shapes", "--epochs", 2, "--batch-size", 8, "--save-every", 2]
    assert invoke(train, [*arguments, "--out", tmp_path / "unbroken"])[0] == 0
    wanted, everywhere = ending(run_folder(tmp_path / "unbroken")), range(1, points + 1)
    assert len(everywhere) >= 2 * 3 + 2 + 10  # steps, evaluations, files
    for kill_at in everywhere:
        points, out = 0, tmp_path / str(kill_at)
        with pytest.raises(Killed):
            invoke(train, [*arguments, "--out", out])
        folder = run_folder(out)
        points, again = -10_000, invoke(train, ["--resume", folder])
        if kill_at <= 2:  # neither config.json nor the first last.pt was there
            assert again[0] == 2 and "no run is kept there" in again[2]
        else:
            assert again[0] == 0 and again[2] == "" and ending(folder) == wanted, kill_at


# --- a run, killed as the system kills ---


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The arguments of a short run on a folder of pictures, what it ends with, and the seconds that it trained for."""
    place = tmp_path_factory.mktemp("unbroken")
    pictures = write_pictures(place / "pictures", 200, 200)
    arguments = ["--data", pictures, "--data-dir", place / "data", "--recipe", "original", "--epochs", 20, "--batch-size", 40, "--save-every", 2]
    arguments = list(map(str, arguments))
    with start([*arguments, "--out", place]) as process:
        training_begins(process)
        started = time.monotonic()
        assert process.wait() == 0
    return arguments, ending(run_folder(place)), time.monotonic() - started


def start(arguments):
    command = [sys.executable, "train.py", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)


def training_begins(process):
    """Wait for the head of the table, or for word that there is nothing to do; what was printed until then."""
    told = []
    for line in process.stdout:
        told.append(line)
        if line.split()[:2] == ["epoch", "lr"] or "is finished" in line:
            return "".join(told)
    raise AssertionError("".join(told) + process.stderr.read())


def test_sigkill_at_random_moments_changes_no_bit(unbroken, tmp_path):
    """One run after another, killed and resumed again and again, until KILLS kills have met it."""
    arguments, wanted, seconds = unbroken
    moments, kills, out = random.Random(7), 0, None
    met = []
    while kills < KILLS or out:
        if out is None:
            out = tmp_path / f"from-{kills}"
            command = [*arguments, "--out", out]
        else:
            command = ["--resume", run_folder(out)]
        with start(command) as process:
            finished = "is finished" in training_begins(process)
            delay = moments.uniform(0, seconds * 0.4)
            try:
                process.wait(delay if kills < KILLS and not finished else None)
            except subprocess.TimeoutExpired:
                process.kill()
            assert process.wait() in (0, -signal.SIGKILL), process.stderr.read()
        if process.returncode == 0:
            assert ending(run_folder(out)) == wanted
            out = None
        else:
            kills += 1
            content = torch.load(run_folder(out) / "last.pt", weights_only=True) if (run_folder(out) / "last.pt").exists() else None
            met.append((round(delay, 2), content and content["epoch"], len(list(run_folder(out).glob(".*")))))
            if content is None:
                out = None
    print(f"{kills} kills; seconds into the process, whole epochs kept, temporary files left: {met}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_says_how_to_go_on(unbroken, tmp_path, number):
    arguments, wanted, seconds = unbroken
    with start([*arguments, "--out", tmp_path]) as process:
        training_begins(process)
        time.sleep(0.3 * seconds)
        process.send_signal(number)
        assert process.wait() == 128 + number
        told = process.stderr.read()
    folder = run_folder(tmp_path)
    assert told.startswith(f"train.py: stopped by {signal.Signals(number).name}; step ") and told.count("\n") == 1
    assert told.endswith(f" of 100 is saved, go on with: python train.py --resume {folder}\n")
    step = int(told.split("; step ")[1].split()[0])
    progress = checkpoint.load(folder / "last.pt", "cpu")[1]["progress"]
    assert progress["trainer"]["running"] * 5 + progress["trainer"]["done"] == step and 0 < step < 100
    with start(told.strip().split("python train.py ")[1].split()) as process:
        assert f"on from step {step} of 100" in training_begins(process)
        assert process.wait() == 0
    assert ending(folder) == wanted


# --- what does not go on ---


@pytest.fixture
def finished(tiny_shapes, tmp_path, invoke):
    """A finished run's folder."""
    arguments = ["--data", "shapes", "--out", tmp_path, "--epochs", 2, "--batch-size", 8, "--precision", "fp32", "--device", "cpu"]
    assert invoke(train, arguments)[0] == 0
    return run_folder(tmp_path)


def test_a_finished_run_says_so_and_stays_as_it_is(finished, invoke):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    for run in (finished, finished / "last.pt"):
        status, out, err = invoke(train, ["--resume", run])
        assert (status, err) == (0, "") and f"{finished} is finished: nothing is left to do" in out and "last epoch: " in out
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


OTHERS = {
    "--recipe": ("original", "default"), "--epochs": (3, 2), "--batch-size": (9, 8), "--max-lr": (0.5, RECIPES["default"].max_lr), "--data": ("cifar10", "shapes"),
    "--precision": ("bf16", "fp32"), "--kernels": ("torch", "auto"), "--seed": (2, 1), "--runs": (2, 1), "--max-steps": (5, None),
    "--device": ("mps", "cpu"), "--out": ("/elsewhere", None), "--val-split": (5, None),
}  # fmt: skip


@pytest.mark.parametrize("flag", OTHERS)
def test_other_settings_are_refused_by_name(finished, invoke, flag):
    other, began = OTHERS[flag]
    status, _, err = invoke(train, ["--resume", finished, flag, other])
    assert status == 2 and err.startswith(f"train.py: error: {flag} {other}: the run in {finished} has ") and err.count("\n") == 1
    if began is not None:
        assert f" has {began}, " in err and invoke(train, ["--resume", finished, flag, began])[0] == 0


def test_other_pictures_under_the_same_name_are_refused(finished, monkeypatch, invoke):
    monkeypatch.setattr(data, "load_shapes", lambda load=data.load_shapes: dataclasses.replace(load(), mean=(0.1, 0.2, 0.3)))
    status, _, err = invoke(train, ["--resume", finished])
    assert status == 2 and "was trained on other pictures than shapes now holds" in err


def test_what_holds_no_state_is_refused(finished, tmp_path, invoke):
    for run, told in (
        (finished / "best.pt", "holds a network and not the state of its run"),
        (tmp_path / "nothing", "no run is kept there"),
        (tmp_path, "no run is kept there"),
        (finished / "history.csv", "is not a checkpoint"),
    ):
        status, _, err = invoke(train, ["--resume", run])
        assert status == 2 and told in err and err.count("\n") == 1


def test_a_tampered_configuration_or_state_is_a_line(finished, tmp_path, invoke):
    content = torch.load(finished / "last.pt", weights_only=True)
    paths = [("config", name) for name in content["config"] if name not in ("job", "set")]
    paths += [("config", "settings", field.name) for field in dataclasses.fields(Recipe) if field.default is dataclasses.MISSING]
    paths += [("progress", name) for name in content["progress"]] + [("progress", "trainer", name) for name in content["progress"]["trainer"]]
    for path in paths:
        for value in (None, [1]):
            torch.save(tampered(content, *path, value=value), finished / "last.pt")
            status, _, err = invoke(train, ["--resume", finished])
            told = [line for line in err.splitlines() if not line.startswith("warning: ")]
            assert status in ((2,) if value is None else (0, 2)) and len(told) <= 1, (path, value, err)
            assert value or "does not know" in err or path[-1] == "data", (path, err)


def test_a_run_of_other_code_goes_on_with_a_warning(finished, monkeypatch, invoke):
    monkeypatch.setattr(train, "git_commit", lambda: "another")
    status, _, err = invoke(train, ["--resume", finished])
    assert status == 0 and err.startswith("warning: the run may end with other bits: git_commit was ") and err.count("\n") == 1


# --- not finite ---


@pytest.mark.parametrize(
    "poison, told",
    [
        (lambda trainer: trainer.model.cls_token.data.fill_(math.nan), "the loss"),
        (lambda trainer: trainer.model.stem.conv2.bias.register_hook(lambda gradient: gradient * math.inf), "the gradient of stem.conv2.bias"),
        (lambda trainer: trainer.model.head.weight.register_hook(lambda gradient: gradient * math.nan), "the gradient of head.weight"),
    ],
)
def test_what_is_not_finite_stops_the_run_in_its_step(small, poison, told):
    trainer = make_trainer(small, small_recipe())
    trainer.epoch(0, 3)
    made = []

    def after_step(done):
        made.append(done)
        if done == 1:
            poison(trainer)

    lr = trainer.schedule(4)[0]
    with pytest.raises(RunError, match=f"^step 5, in epoch 2 at rate {lr:.4g}: {told} is not finite"):
        trainer.epoch(1, 3, after_step)
    assert made == [1]
    with pytest.raises(RunError, match="^step 5"):
        trainer.state_dict()


def test_away_from_the_cpu_it_is_found_within_the_epoch(small, monkeypatch):
    """As on CUDA, where no step is looked at: the look at the epoch's end tells the first step all the same."""
    trainer = make_trainer(small, small_recipe())
    looked = []
    monkeypatch.setattr(trainer, "check_finite", lambda check=trainer.check_finite: looked.append(trainer.done) or (check() if len(looked) == 4 else None))
    with pytest.raises(RunError, match=r"^step 2, in epoch 1 .* the gradient of head.bias is not finite"):
        trainer.epoch(0, 3, lambda done: trainer.model.head.bias.register_hook(lambda gradient: gradient / 0) if done == 1 else None)
    assert looked == [1, 2, 3, 3]


def test_a_gradient_whose_square_overflows_is_not_finite(small):
    """AdamW would divide by it for ever after, and the parameter stand still without a word."""
    for size, good in ((1e18, 1), (1e20, 0)):
        trainer = make_trainer(small, small_recipe())
        trainer.model.head.bias.register_hook(lambda gradient: gradient.sign() * size)
        trainer.step(torch.arange(8), 0, 0.0, 0.9)
        assert trainer.good.tolist() == [1] * (len(trainer.good) - 1) + [good]


def test_a_run_that_is_not_finite_keeps_its_last_good_state(tiny_shapes, tmp_path, monkeypatch, invoke):
    monkeypatch.setattr(OneCycle, "__call__", lambda self, step, call=OneCycle.__call__: (math.inf if step == 4 else 0.001, call(self, step)[1]))
    status, _, err = invoke(train, ["--data", "shapes", "--out", tmp_path, "--epochs", 3, "--batch-size", 8, "--save-every", 1])
    folder = run_folder(tmp_path)
    assert status == 1 and err.count("\n") == 1
    assert err.startswith("train.py: error: step 5, in epoch 2 at rate inf: what it made of cls_token is not finite")
    assert err.endswith(f"; the last good state is kept: python train.py --resume {folder}\n")
    model, content = checkpoint.load(folder / "last.pt", "cpu")
    assert content["progress"]["trainer"]["done"] == 1


# --- a full disk ---


def test_a_full_disk_is_one_line_and_leaves_whole_files(tiny_shapes, tmp_path, invoke):
    """A limit on a file's size stands for the disk: past it a write fails, as it does there."""
    arguments = ["--data", "shapes", "--out", tmp_path, "--epochs", 1, "--batch-size", 8]
    assert invoke(train, arguments)[0] == 0
    before = (tmp_path / "best.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        status, _, err = invoke(train, arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1 and err.startswith("train.py: error: [Errno 27] File too large") and err.count("\n") == 1
    assert (tmp_path / "best.pt").read_bytes() == before
    second = sorted((tmp_path / "runs").iterdir())[1]
    assert os.listdir(second) == ["config.json"]
