"""The range test: its grid, what it trains, and what it reads off curves with a known answer."""

import dataclasses
import math
import random

import pytest
from conftest import make_trainer, small_recipe

import lr_range
from cli import read_csv
from lr_range import longest_fall, lr_grid, range_test, suggest
from schedule import RECIPES

GRID = [k / 200 for k in range(200)]
EXP_GRID = lr_grid(1e-4, 1, 200, "exp")


def history_of(losses, lrs=GRID):
    """A history as range_test records it; accuracy falls as the loss rises."""
    rows, running = [], 0.0
    for i, (lr, loss) in enumerate(zip(lrs, losses)):
        running = 0.9 * running + 0.1 * loss
        smoothed = running / (1 - 0.9 ** (i + 1))
        rows.append({"lr": lr, "loss": loss, "smoothed_loss": smoothed, "train_accuracy": -loss})
    return rows


def bowl(x, low=0.3):
    """Falls from 2.3 to 1.3 at `low`, fastest half way, then rises."""
    return 1.8 + 0.5 * math.cos(math.pi * x / low) if x < low else 1.3 + 4 * (x - low) ** 2


def noisy(values, std):
    noise = random.Random(0)
    return [value + noise.gauss(0, std) for value in values]


def test_grids_and_the_longest_fall():
    assert longest_fall([5, 1, 4, 3, 9, 2]) == (0, 5) and longest_fall([1, 9, 8, 3, 10]) == (1, 3)
    grid = lr_grid(1e-10, 1, 500, "linear")
    assert len(grid) == 500 and grid[0] == 1e-10
    assert grid[11] == pytest.approx(0.022000000097799996, rel=0, abs=1e-15)  # of the original
    exp = [10 ** (-4 + k / 2) for k in range(8)]
    assert lr_grid(1e-4, 1, 8, "exp") == pytest.approx(exp, rel=1e-12)


def test_one_model_is_trained_at_each_lr_in_turn(small):
    """300 images in batches of 128 are three steps an epoch: an lr of two steps spans epochs."""
    lrs = [1e-3, 2e-3, 3e-3]
    history, stop_reason = range_test(make_trainer(small, small_recipe()), lrs, 2)
    assert [row["lr"] for row in history] == lrs and stop_reason is None

    trainer, losses = make_trainer(small, small_recipe()), []
    for epoch, epoch_lrs in enumerate(([1e-3, 1e-3, 2e-3], [2e-3, 3e-3, 3e-3])):
        trainer.begin_epoch(epoch, epoch_lrs, [0.95] * 3)
        for i in range(3):
            before = trainer.totals[0].item()
            trainer.step(i)
            losses.append(trainer.totals[0].item() - before)
    sums = [losses[i] + losses[i + 1] for i in (0, 2, 4)]
    means = [total / seen for total, seen in zip(sums, (256, 172, 172))]
    assert [row["loss"] for row in history] == pytest.approx(means, rel=1e-5)
    assert history[1]["smoothed_loss"] == pytest.approx((0.9 * means[0] + means[1]) / 1.9, rel=1e-5)
    correct = 1.72 * history[2]["train_accuracy"]  # of 172 images
    assert 0 < correct < 172 and correct == pytest.approx(round(correct))


@pytest.mark.parametrize(
    "lrs, reason",
    [([1e-3] * 5 + [30.0] * 40, "smoothed loss"), ([1e-3, 1e-3, 1e25, 1e-3], "is not finite")],
)
def test_divergence_ends_it_and_keeps_the_history(small, lrs, reason):
    history, stop_reason = range_test(make_trainer(small, small_recipe()), lrs, 2, diverge=1.5)
    assert 2 <= len(history) < len(lrs) and reason in stop_reason
    assert all(math.isfinite(row["loss"]) for row in history)
    best = min(row["smoothed_loss"] for row in history)
    assert (history[-1]["smoothed_loss"] > 1.5 * best) == (reason == "smoothed loss")


BOWL = [bowl(x) for x in GRID]
# Falls for most of the grid, but not before the minimum.
BURST = [bowl(x) if x < 0.4 else 9 - 7 * x for x in GRID]
LOGISTIC = [2.3 - 1 / (1 + (0.01 / lr) ** 3) + max(lr - 0.2, 0) for lr in EXP_GRID]
# Losses, lrs, and each suggestion with its tolerance. Smoothing lags by some ten lrs, 0.05.
CURVES = {
    "bowl": (BOWL, GRID, (0.175, 0.04), (0.035, 0.005), (0.3, 0.005), (0.17, 0.03)),
    "noise": (noisy(BOWL, 0.02), GRID, (0.17, 0.1), (0.035, 0.015), (0.3, 0.1), (0.17, 0.08)),
    "burst": (BURST, GRID, (0.175, 0.04), (0.035, 0.005), (0.3, 0.005), (0.17, 0.03)),
    "log": (LOGISTIC, EXP_GRID, (0.015, 0.008), (0.02, 0.01), (0.1, 0.11), (0.005, 0.004)),
    "falls": ([2.3 - x for x in GRID], GRID, (0.5, 0.5), None, (0.995, 1e-6), (0.5, 0.01)),
}


@pytest.mark.parametrize("curve", CURVES)
def test_suggestions(curve):
    losses, lrs, *expected = CURVES[curve]
    history = history_of(losses, lrs)
    found = suggest(history)
    assert history == history_of(losses, lrs)
    for name, answer in zip(("steepest", "minimum / 10", "best accuracy", "valley"), expected):
        if answer is None:
            assert found[name] == (None, "the loss still falls at the last lr"), name
        else:
            assert found[name].lr == pytest.approx(answer[0], abs=answer[1]), name


def test_where_nothing_falls_nothing_is_suggested():
    for losses, reason in (
        ([2.3] * 200, "the loss falls by"),
        (noisy([2.3] * 200, 0.05), "the loss falls by"),
        ([2.3 + 5 * x for x in GRID], "the loss falls by"),
        ([2.3, 2.2, 2.1, 2.0], "4 lrs are too few"),
        ([], "0 lrs are too few"),
    ):
        found = suggest(history_of(losses)).values()
        assert len(found) == 4 and all(s.lr is None and s.reason.startswith(reason) for s in found)


@pytest.fixture
def args(small_shapes, tmp_path, monkeypatch):
    """Arguments of a short range test of recipe default."""
    small = dataclasses.replace(RECIPES["default"], batch_size=50, crop_padding=0)
    monkeypatch.setitem(RECIPES, "default", small)
    return ["--data", "shapes", "--out", tmp_path, "--steps-per-epoch", 1]


def test_files_and_the_command_to_copy(args, tmp_path, monkeypatch, succeeds):
    def falling(*args, train_each_lr=lr_range.train_each_lr):
        for loss, (_, accuracy) in zip([2.5, 2.0, 1.5] + [1.0] * 7, train_each_lr(*args)):
            yield loss, accuracy

    monkeypatch.setattr(lr_range, "train_each_lr", falling)
    args += ["--mode", "exp", "--start-lr", 1e-3, "--epochs", 10, "--val", "--set", "beta2=0.98"]
    out, rows = succeeds(lr_range, args), read_csv(tmp_path / "lr_range.csv")
    assert list(rows[0]) == ["lr", "loss", "smoothed_loss", "train_accuracy", "test_accuracy"]
    assert (tmp_path / "lr_range.png").read_bytes().startswith(b"\x89PNG")
    best = max(rows, key=lambda row: float(row["test_accuracy"]))
    command = "python train.py --data shapes --recipe default --set beta2=0.98 --max-lr"
    assert f"  {command} {float(best['lr']):.4g}\n" in out


def test_ctrl_c_keeps_the_history(args, tmp_path, monkeypatch, invoke):
    def update(bar, done, text):
        if done == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(lr_range.ProgressBar, "update", update)
    status, out, err = invoke(lr_range, [*args, "--end-lr", "1e-9", "--epochs", 9])
    assert (status, err) == (130, "lr_range.py: stopped by SIGINT; 6 of 9 lrs are kept\n")
    assert "nothing to recommend: the loss falls by" in out and "train.py --" not in out
    assert len(read_csv(tmp_path / "lr_range.csv")) == 6
