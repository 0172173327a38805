"""The range test: its grid, what it leaves untouched, and what it reads off curves whose answer is known."""

import dataclasses
import math
import random

import pytest
import torch
from conftest import make_trainer, small_recipe

import lr_range
from augment import Augmentation
from files import read_csv
from lr_range import range_test, rates, suggest
from recipe import RECIPES

GRID = [k / 200 for k in range(200)]


def history_of(losses, sweep=GRID, accuracies=None):
    """A history as range_test would record it of these losses."""
    rows, running = [], 0.0
    for i, (rate, loss) in enumerate(zip(sweep, losses)):
        running = lr_range.SMOOTHING * running + (1 - lr_range.SMOOTHING) * loss
        smoothed = running / (1 - lr_range.SMOOTHING ** (i + 1))
        rows.append({"rate": rate, "loss": loss, "smoothed": smoothed, "train_accuracy": accuracies[i] if accuracies else 50 - 10 * loss})
    return rows


# --- the grid ---


def test_the_originals_finding_is_a_point_of_the_grid():
    grid = rates(1e-10, 1, 500, "linear")
    assert grid[11] == pytest.approx(0.022000000097799996, rel=0, abs=1e-15)
    assert len(grid) == 500 and grid[0] == 1e-10


def test_exponential_rates_have_equal_ratios():
    grid = rates(1e-4, 1, 8, "exp")
    assert grid == pytest.approx([10 ** (-4 + k / 2) for k in range(8)], rel=1e-12)


# --- the test itself ---


def frozen(trainer):
    """Everything that a range test must leave as it was, copied."""
    state = trainer.optimizer.state_dict()
    return [
        *[p.detach().clone() for model in (trainer.model, trainer.averaged) for p in model.parameters()],
        *[p.grad.clone() for p in trainer.model.parameters() if p.grad is not None],
        *[v.clone() for s in state["state"].values() for v in s.values()],
        *[torch.tensor([g["lr"], *g["betas"]], dtype=torch.float64) for g in state["param_groups"]],
        trainer.generator.get_state(),
        torch.random.get_rng_state(),
    ]


@pytest.mark.parametrize("steps_before", [0, 2])
def test_what_it_was_given_is_left_bit_for_bit(small, steps_before):
    recipe = dataclasses.replace(small_recipe(averaged_share=0.5), augmentation=RECIPES["original"].augmentation)
    trainer = make_trainer(small, recipe)
    for i in range(steps_before):
        trainer.step(torch.arange(50) + i, 0, 0.003, 0.9)
    before = frozen(trainer)
    history, ended = range_test(trainer, rates(1e-5, 0.1, 4, "exp"), steps=2)
    after = frozen(trainer)
    assert len(history) == 4 and ended is None
    assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after))
    assert trainer.model.training
    again, _ = range_test(trainer, rates(1e-5, 0.1, 4, "exp"), steps=2)
    assert again == history


def test_it_is_one_model_trained_on_with_the_rates_given(small):
    sweep = [1e-3, 2e-3, 3e-3]
    trainer = make_trainer(small, small_recipe())
    history, _ = range_test(trainer, sweep, steps=3)
    losses = []
    for rate in sweep:  # 300 pictures in batches of 128: three steps are one pass
        order = torch.randperm(300, generator=trainer.generator).split(128)
        losses.append(sum(trainer.step(indices, 0, rate, 0.95)[0].item() for indices in order) / 300)
    assert [row["loss"] for row in history] == pytest.approx(losses, rel=1e-6)
    assert history[0]["smoothed"] == pytest.approx(losses[0]) and history[1]["smoothed"] == pytest.approx((0.9 * losses[0] + losses[1]) / 1.9)


def test_divergence_ends_it_and_keeps_what_there_was(small):
    trainer = make_trainer(small, small_recipe())
    history, ended = range_test(trainer, [1e-3] * 5 + [30.0] * 40, steps=2, diverge=1.5)
    assert 5 < len(history) < 45 and "the smoothed loss is" in ended and "its best was" in ended
    assert history[-1]["smoothed"] > 1.5 * min(row["smoothed"] for row in history)


def test_a_loss_that_is_not_finite_ends_it(small, monkeypatch):
    trainer = make_trainer(small, small_recipe())
    step = trainer.step

    def poisoned(indices, epoch, lr, momentum):
        loss, correct = step(indices, epoch, lr, momentum)
        return (loss * math.nan if lr > 0.5 else loss), correct

    monkeypatch.setattr(trainer, "step", poisoned)
    history, ended = range_test(trainer, [0.1, 0.2, 0.9, 0.3], steps=1)
    assert len(history) == 2 and ended == "at rate 0.9 the loss is nan"


def test_ctrl_c_keeps_what_there_was(small):
    trainer = make_trainer(small, small_recipe())

    def interrupt(history):
        if len(history) == 3:
            raise KeyboardInterrupt

    history, ended = range_test(trainer, [0.001] * 10, steps=1, after_rate=interrupt)
    assert len(history) == 3 and ended == "stopped by Ctrl-C"


# --- what is read off ---


def bowl(x, low=0.3):
    """Falls from 2.3 to 1.3 at `low`, fastest half way, then rises."""
    return 1.8 + 0.5 * math.cos(math.pi * x / low) if x < low else 1.3 + 4 * (x - low) ** 2


def test_a_clean_bowl():
    picks = suggest(history_of([bowl(x) for x in GRID]), "linear")
    lag = 0.05  # the running mean's memory of ten rates
    assert picks["steepest"].rate == pytest.approx(0.15 + lag / 2, abs=0.04)
    assert picks["minimum / 10"].rate == pytest.approx(0.03 + lag / 10, abs=0.005)
    assert picks["best accuracy"].rate == pytest.approx(0.3, abs=0.005)
    assert picks["valley"].rate == pytest.approx(0.17, abs=0.03)
    assert all(pick.reason for pick in picks.values())


def test_a_noisy_bowl_gives_nearly_the_same():
    noise = random.Random(0)
    picks = suggest(history_of([bowl(x) + noise.gauss(0, 0.02) for x in GRID]), "linear")
    assert picks["steepest"].rate == pytest.approx(0.17, abs=0.1)
    assert picks["minimum / 10"].rate == pytest.approx(0.035, abs=0.015)
    assert picks["valley"].rate == pytest.approx(0.17, abs=0.08)


def test_a_recovery_from_a_burst_is_no_valley():
    """Most of the sweep falls, from high above to not quite the minimum; what lies before the minimum is read off all the same."""
    picks = suggest(history_of([bowl(x) if x < 0.4 else 9 - 7 * x for x in GRID]), "linear")
    assert picks["valley"].rate == pytest.approx(0.17, abs=0.03)


def test_steepest_is_measured_on_the_axis_that_was_swept():
    sweep = rates(1e-4, 1, 200, "exp")
    losses = [2.3 - 1 / (1 + math.exp(-3 * math.log(rate / 0.01))) + (max(rate - 0.2, 0)) for rate in sweep]
    picks = suggest(history_of(losses, sweep), "exp")
    assert 0.007 < picks["steepest"].rate < 0.025  # the middle of the logistic fall, a little late by smoothing
    assert suggest(history_of(losses, sweep), "linear")["steepest"].rate < picks["steepest"].rate


@pytest.mark.parametrize(
    "losses",
    [
        [2.3] * 200,  # plateau
        [2.3 + random.Random(k).gauss(0, 0.05) for k in range(200)],  # noise alone
        [2.3 + 5 * x for x in GRID],  # divergence at once
    ],
    ids=["plateau", "noise", "divergence at once"],
)
def test_where_nothing_falls_nothing_is_suggested(losses):
    picks = suggest(history_of(losses))
    assert all(pick.rate is None and "falls by" in pick.reason for pick in picks.values())


def test_noise_alone_is_seldom_taken_for_a_fall():
    fooled = 0
    for seed in range(100):
        noise = random.Random(seed)
        fooled += suggest(history_of([2.3 + noise.gauss(0, 0.05) for _ in GRID]))["valley"].rate is not None
    assert fooled <= 5


def test_a_loss_that_falls_to_the_end_has_no_minimum():
    picks = suggest(history_of([2.3 - x for x in GRID]))
    assert picks["minimum / 10"] == lr_range.Suggestion(None, "the loss still falls at the last rate")
    assert picks["valley"].rate == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_too_few_rates(count):
    assert all(pick.rate is None and "too few" in pick.reason for pick in suggest(history_of([2.3 - x for x in GRID[:count]])).values())


def test_suggest_does_not_touch_the_history():
    history = history_of([bowl(x) for x in GRID])
    before = [dict(row) for row in history]
    suggest(history)
    assert history == before


# --- the script ---


def test_script_writes_table_picture_and_the_line_to_copy(small_shapes, tmp_path, monkeypatch, invoke):
    monkeypatch.setitem(RECIPES, "default", dataclasses.replace(RECIPES["default"], batch_size=100, augmentation=Augmentation()))
    arguments = ["--data", "shapes", "--out", tmp_path, "--mode", "exp", "--start-lr", "1e-5", "--epochs", 40, "--steps-per-epoch", 3, "--val", "--set", "beta2=0.98"]
    status, out, err = invoke(lr_range, arguments)
    assert (status, err) == (0, "") and "expected time" in out
    rows = read_csv(tmp_path / "lr_range.csv")
    assert list(rows[0]) == ["rate", "loss", "smoothed", "train_accuracy", "test_accuracy"] and 10 < len(rows) <= 40
    assert (tmp_path / "lr_range.png").read_bytes().startswith(b"\x89PNG")
    assert "python train.py --data shapes --recipe default --set beta2=0.98 --max-lr " in out


def test_script_says_when_there_is_nothing_to_recommend(small_shapes, tmp_path, monkeypatch, invoke):
    monkeypatch.setitem(RECIPES, "default", dataclasses.replace(RECIPES["default"], batch_size=100))
    arguments = ["--data", "shapes", "--out", tmp_path, "--end-lr", "1e-9", "--epochs", 6, "--steps-per-epoch", 1]
    status, out, _ = invoke(lr_range, arguments)
    assert status == 0 and "nothing to recommend: the loss falls by" in out and "train.py --recipe" not in out
