"""The sweep is a real training, short runs are tried where they should be, and the choice of lr."""

import dataclasses
import math
import random

import pytest
import torch
from conftest import make_trainer, small_recipe, train_epoch

import lr_range
from cli import read_csv
from evaluate import loss_and_accuracy
from lr_range import (
    ShortRun,
    doubts,
    find_edge,
    lr_grid,
    lrs_within,
    range_test,
    recommend,
    train_short_run,
)
from recipes import RECIPES

# --- the sweep ---


def test_grids():
    grid = lr_grid(1e-10, 1, 500, "linear")
    assert len(grid) == 500
    assert grid[0] == 1e-10
    assert grid[11] == pytest.approx(0.022000000097799996, rel=0, abs=1e-15)  # of the original
    assert lr_grid(1e-4, 1, 4, "exp") == pytest.approx([1e-4, 1e-3, 0.01, 0.1], rel=1e-12)


def test_one_model_is_trained_at_each_lr_in_turn(small):
    lrs = [1e-3, 2e-3, 3e-3]  # of two batches each, while an epoch has three
    swept = make_trainer(small, small_recipe())
    history = []
    assert range_test(swept, lrs, 2, history) is None
    assert [row["lr"] for row in history] == lrs

    # The same, step by step.
    trainer = make_trainer(small, small_recipe())
    losses = []
    for epoch, epoch_lrs in enumerate([[1e-3, 1e-3, 2e-3], [2e-3, 3e-3, 3e-3]]):
        trainer.begin_epoch(epoch, epoch_lrs, [0.95] * 3)
        for i in range(3):
            before = trainer.totals[0].item()
            trainer.step(i)
            losses.append(trainer.totals[0].item() - before)
    for actual, expected in zip(swept.model.parameters(), trainer.model.parameters()):
        assert torch.equal(actual, expected)

    # Batches have 128, 128 and 44 images.
    means = [
        (losses[0] + losses[1]) / 256,
        (losses[2] + losses[3]) / 172,
        (losses[4] + losses[5]) / 172,
    ]
    assert [row["loss"] for row in history] == pytest.approx(means, rel=1e-5)
    assert history[1]["smoothed_loss"] == pytest.approx((0.9 * means[0] + means[1]) / 1.9, rel=1e-5)
    correct = history[2]["train_accuracy"] / 100 * 172
    assert correct == pytest.approx(round(correct))


def test_a_loss_that_explodes_ends_the_sweep(small):
    lrs = [1e-3] * 5 + [30.0] * 40
    history = []
    stop_reason = range_test(make_trainer(small, small_recipe()), lrs, 2, history, diverge=1.5)
    assert "smoothed loss" in stop_reason
    assert 5 < len(history) < len(lrs)
    smoothed = [row["smoothed_loss"] for row in history]
    assert smoothed[-1] > 1.5 * min(smoothed)


def test_a_loss_that_is_not_finite_ends_the_sweep(small):
    history = []
    stop_reason = range_test(make_trainer(small, small_recipe()), [1e-3, 1e25, 1e-3], 2, history)
    assert stop_reason == "lr 1e+25: the loss or a weight is not finite"
    assert [row["lr"] for row in history] == [1e-3]


def test_weights_that_are_not_finite_end_the_sweep(small):
    history = []
    stop_reason = range_test(make_trainer(small, small_recipe()), [1e-3, 1e39], 1, history)
    assert stop_reason == "lr 1e+39: the loss or a weight is not finite"
    assert len(history) == 1


GRID = [k / 200 for k in range(200)]


def history_of(losses):
    """A history as range_test records it."""
    rows = []
    running = 0.0
    for k, loss in enumerate(losses):
        running = 0.9 * running + 0.1 * loss
        smoothed = running / (1 - 0.9 ** (k + 1))
        rows.append({"lr": GRID[k], "loss": loss, "smoothed_loss": smoothed})
    return rows


def bowl(x):
    """Falls from 2.3 to 1.3 at 0.3, then rises."""
    if x < 0.3:
        return 1.8 + 0.5 * math.cos(math.pi * x / 0.3)
    return 1.3 + 4 * (x - 0.3) ** 2


def noise(std):
    generator = random.Random(0)
    return [generator.gauss(0, std) for _ in GRID]


def test_the_edge_has_the_least_smoothed_loss():
    losses = [bowl(x) + e for x, e in zip(GRID, noise(0.02))]
    assert find_edge(history_of(losses)) == pytest.approx(0.35, abs=0.06)  # smoothing lags by 0.05
    assert find_edge(history_of([2.3 - x for x in GRID])) == GRID[-1]


def test_no_edge_where_noise_is_all_that_falls():
    assert find_edge(history_of([2.3 + e for e in noise(0.05)])) is None
    assert find_edge(history_of([2.3 + x for x in GRID])) is None
    assert find_edge(history_of([2.3, 2.0, 1.7])) is None
    assert find_edge([]) is None


# --- which lrs are tried ---


def tried(best_lr, edge=0.1):
    """(epochs, lr) of the short runs where the loss is least at best_lr."""

    def train(lr, epochs):
        return short_run(lr, abs(math.log2(lr / best_lr)), epochs)

    return [(run.epochs, run.lr) for run in lr_range.short_runs(train, edge, (1, 3))]


def test_seven_lrs_below_the_edge_then_four_around_the_best():
    first = [(1, 2.0**-k) for k in range(4, 11)]  # 1/16 is the first power of two below 0.1
    assert tried(2.0**-6) == first + [(3, 2.0**-k) for k in (5, 6, 7, 8)]


def test_a_round_goes_on_beyond_an_end_once():
    first = [(1, 2.0**-k) for k in range(4, 11)]
    # The best is the highest: two higher ones. Four around 1/4 do not end there.
    assert tried(0.25) == first + [
        (1, 0.125),
        (1, 0.25),
        (3, 0.5),
        (3, 0.25),
        (3, 0.125),
        (3, 1 / 16),
    ]
    # The best is far below: two lower ones in each round, and no more.
    lower = [(1, 2.0**-11), (1, 2.0**-12)]
    four = [(3, 2.0**-k) for k in (11, 12, 13, 14)]
    assert tried(1e-9) == first + lower + four + [(3, 2.0**-15), (3, 2.0**-16)]


def test_a_short_run_is_a_whole_training(small):
    recipe = small_recipe(epochs=2, max_lr=0.004)
    trainer = make_trainer(small, recipe)
    for epoch in range(2):
        train_epoch(trainer, epoch)
    logits = trainer.runtime.predict(trainer.model, trainer.normalize, small.test_images)
    loss, accuracy = loss_and_accuracy(logits, small.test_labels)

    run = train_short_run(small_recipe(epochs=9), small, trainer.runtime, 1, lr=0.004, epochs=2)
    assert run.loss == pytest.approx(loss, rel=1e-5)
    assert run.accuracy == pytest.approx(accuracy)
    variance = sum((x - loss) ** 2 for x in run.losses.tolist()) / 99
    assert run.loss_error == pytest.approx((variance / 100) ** 0.5, rel=1e-4)
    assert not run.diverged
    assert train_short_run(small_recipe(), small, trainer.runtime, 1, lr=1e25, epochs=2).diverged


# --- which lr is chosen ---


def short_run(lr, loss, epochs=3, own=0.5, count=1000, accuracy=50):
    """A run with a mean loss; half the images are `own` above and half below what is common.

    The standard error of a difference to a run with own=0 is own / sqrt(count), 0.016 by default.
    """
    common = torch.linspace(-2, 2, count, dtype=torch.float64)
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64).repeat(count // 4)
    correct = torch.arange(count) < count * accuracy / 100
    return ShortRun(lr, epochs, loss + common + own * sign, correct.double())


def test_the_least_held_out_loss_of_the_longest_runs():
    runs = [short_run(0.004, 1.5), short_run(0.008, 1.0, own=0), short_run(0.016, 1.2)]
    runs.append(short_run(0.004, 0.5, epochs=1))
    assert recommend(runs) == 0.008
    assert doubts(runs) == []
    runs.append(short_run(0.002, 0.9, epochs=6))
    assert recommend(runs) == 0.002


def test_within_one_standard_error_the_lowest_lr_wins():
    high, best = short_run(0.032, 1.001), short_run(0.016, 1.0, own=0)
    for excess, expected in ((0.014, 0.008), (0.018, 0.016)):
        assert recommend([high, best, short_run(0.008, 1 + excess)]) == expected
    # Paired: the same mean on images that both find as hard is a difference without noise.
    assert recommend([high, best, short_run(0.008, 1.014, own=0)]) == 0.016


def test_within_two_standard_errors_lrs_are_as_good():
    best = short_run(0.016, 1.0, own=0)
    runs = [short_run(0.032, 1.03), best, short_run(0.008, 1.034), short_run(0.004, 1.0, epochs=1)]
    assert lrs_within(runs, 2) == [0.016, 0.032]


def test_half_the_least_lr_that_diverged_is_recommended_at_most():
    runs = [short_run(0.25, 1.8), short_run(0.5, 1.7), short_run(1.0, math.inf)]
    assert recommend(runs) == 0.5
    runs.append(short_run(0.5, math.inf, epochs=1))
    assert recommend(runs) == 0.25
    assert recommend([short_run(1.0, math.inf), short_run(1.0, 1.0, epochs=1)]) is None


def test_it_says_what_it_cannot_know():
    def three(**changes):
        """0.008 has the least loss of three; `changes` are of the run at 0.016."""
        first = short_run(0.004, 1.5)
        best = short_run(0.008, 1.0, own=0)
        return [first, best, short_run(0.016, 1.2, **changes)]

    (sentence,) = doubts([short_run(run.lr, run.loss, count=64) for run in three()])
    assert sentence.startswith("64 held-out images are too few")

    # One point in a thousand images is within two standard errors, ten points are not.
    assert doubts(three(accuracy=50.1)) == []
    (sentence,) = doubts(three(accuracy=60))
    assert "disagree" in sentence and "0.008" in sentence and "0.016 has 60.00 %" in sentence

    (sentence,) = doubts(three()[:2])
    assert sentence.startswith("0.008 is at an end")
    assert doubts([*three()[:2], short_run(0.016, math.inf)]) == []


# --- the script ---


def logistic(lr):
    return 2.3 - 1 / (1 + (0.01 / lr) ** 3) + max(lr - 0.2, 0)


@pytest.fixture
def script(small_shapes, text_figures, tmp_path, monkeypatch, invoke):
    """script(args) -> (status, stdout, stderr, rows of lr_range.csv, rows of lr_runs.csv).

    The losses of the sweep are `logistic`; short runs are few and short.
    """

    def train_each_lr(trainer, lrs, steps_per_lr):
        for lr in lrs:
            yield logistic(lr), 30.0

    recipe = dataclasses.replace(RECIPES["default"], batch_size=100)
    monkeypatch.setitem(RECIPES, "default", recipe)
    monkeypatch.setattr(lr_range, "train_each_lr", train_each_lr)
    monkeypatch.setattr(lr_range, "MIN_STEPS", 1)
    monkeypatch.setattr(lr_range, "LENGTHS", (1, 2))
    monkeypatch.setattr(lr_range, "NUM_LRS", (2, 2))

    def run(*args):
        flags = "--data shapes --mode exp --start-lr 1e-4 --epochs 24 --steps-per-epoch 2"
        result = invoke(lr_range, ["--out", tmp_path, *flags.split(), *args])
        tables = []
        for name in ("lr_range.csv", "lr_runs.csv"):
            path = tmp_path / name
            tables.append(read_csv(path) if path.exists() else [])
        return *result, *tables

    return run


def test_the_sweep_alone_gives_one_reading(script, tmp_path):
    status, out, err, rows, runs = script("--sweep-only")
    assert (status, err) == (0, "")
    assert len(rows) == 24
    assert list(rows[0]) == ["lr", "loss", "smoothed_loss", "train_accuracy"]
    assert runs == []
    edge = min(rows, key=lambda row: float(row["smoothed_loss"]))["lr"]
    assert f"classic reading: lr {float(edge) / 10:.4g}, a tenth of the edge" in out
    assert "--max-lr" not in out
    assert (tmp_path / "lr_range.png").exists()


def test_a_sweep_of_few_lrs_recommends_nothing(script):
    status, out, _, rows, runs = script("--epochs", 4)
    assert (status, len(rows), runs) == (0, 4, [])
    assert "nothing to recommend: fewer than 5 lrs were trained" in out


def test_tables_and_the_command_to_copy(script, monkeypatch, tmp_path):
    def train(recipe, dataset, runtime, seed, lr, epochs):
        return short_run(lr, abs(lr - 0.03), epochs, own=0, count=40)

    monkeypatch.setattr(lr_range, "train_short_run", train)
    status, out, err, rows, runs = script("--set", "beta2=0.98", "--precision", "fp32")
    assert (status, err) == (0, "")
    assert len(rows) == 24
    assert list(runs[0]) == ["lr", "epochs", "val_loss", "val_loss_se", "val_accuracy"]
    lr = min(runs, key=lambda run: float(run["val_loss"]))["lr"]
    assert f"\nbest guess for 24 epochs, from runs of 2: {lr}\n" in out  # of 40 images
    command = "python train.py --data shapes --recipe default --set beta2=0.98"
    assert f"\n  {command} --max-lr {lr} --precision fp32\n" in out
    assert "40 held-out images are too few" in out
    assert (tmp_path / "lr_range.png").exists()


def test_a_run_that_diverges_is_named_and_goes_on(script, monkeypatch):
    def train(recipe, dataset, runtime, seed, lr, epochs):
        return short_run(lr, math.inf if lr > 0.1 else lr, epochs)

    monkeypatch.setattr(lr_range, "train_short_run", train)
    status, out, err, _, runs = script()
    assert (status, err) == (0, "")
    assert "inf" in [run["val_loss"] for run in runs]
    assert "diverged: at most half of it is recommended" in out


def test_ctrl_c_in_the_sweep_keeps_what_there_is(script, monkeypatch, tmp_path):
    def train_each_lr(trainer, lrs, steps_per_lr):
        for lr in lrs[:6]:
            yield logistic(lr), 30.0
        raise KeyboardInterrupt

    monkeypatch.setattr(lr_range, "train_each_lr", train_each_lr)
    status, _, err, rows, runs = script()
    assert (status, err) == (130, "\nlr_range.py: stopped\n")
    assert (len(rows), runs) == (6, [])
    assert (tmp_path / "lr_range.png").exists()


def test_ctrl_c_in_a_short_run_keeps_what_there_is(script, monkeypatch, tmp_path):
    lrs = []

    def train(recipe, dataset, runtime, seed, lr, epochs):
        if len(lrs) == 2:
            raise KeyboardInterrupt
        lrs.append(lr)
        return short_run(lr, 1.0, epochs)

    monkeypatch.setattr(lr_range, "train_short_run", train)
    status, out, err, rows, runs = script()
    assert (status, err) == (130, "\nlr_range.py: stopped\n")
    assert (len(rows), [float(run["lr"]) for run in runs]) == (24, lrs)
    assert (tmp_path / "lr_range.png").exists()
    assert "--max-lr" not in out
