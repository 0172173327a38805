"""The range test and the short runs: what they train, and what they read off known curves."""

import dataclasses
import math
import random

import pytest
from conftest import make_trainer, small_recipe

import lr_range
from cli import read_csv
from data import train_val_split
from lr_range import fit_minimum, lr_grid, range_test, recommend, suggest
from schedule import RECIPES
from trainer import loss_and_accuracy

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


def bowl(x):
    """Falls from 2.3 to 1.3 at 0.3, fastest half way, then rises."""
    return 1.8 + 0.5 * math.cos(math.pi * x / 0.3) if x < 0.3 else 1.3 + 4 * (x - 0.3) ** 2


def logistic(lr):
    return 2.3 - 1 / (1 + (0.01 / lr) ** 3) + max(lr - 0.2, 0)


def noisy(values, std):
    noise = random.Random(0)
    return [value + noise.gauss(0, std) for value in values]


def test_grids():
    grid = lr_grid(1e-10, 1, 500, "linear")
    assert len(grid) == 500 and grid[0] == 1e-10
    assert grid[11] == pytest.approx(0.022000000097799996, rel=0, abs=1e-15)  # of the original
    assert lr_grid(1e-4, 1, 4, "exp") == pytest.approx([1e-4, 1e-3, 0.01, 0.1], rel=1e-12)


def test_one_model_is_trained_at_each_lr_in_turn(small):
    lrs = [1e-3, 2e-3, 3e-3]  # of two steps each, while an epoch has three
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


BOWL, LOGISTIC, NOTHING = [*map(bowl, GRID)], [*map(logistic, EXP_GRID)], ["the loss falls by"] * 3
# Losses, lrs, and each suggestion with its tolerance, or why there is none. Smoothing lags by 0.05.
CURVES = {
    "bowl": (noisy(BOWL, 0.02), GRID, (0.17, 0.1), (0.035, 0.015), (0.3, 0.1)),
    "log": (LOGISTIC, EXP_GRID, (0.015, 0.008), (0.02, 0.01), (0.1, 0.11)),
    "falls": ([2.3 - x for x in GRID], GRID, (0.5, 0.5), "the loss still", (1, 0.01)),
    "only noise": (noisy([2.3] * 200, 0.05), GRID, *NOTHING),
    "rises": ([2.3 + 5 * x for x in GRID], GRID, *NOTHING),
    "none": ([], GRID, *["0 lrs are too few"] * 3),
}


@pytest.mark.parametrize("curve", CURVES)
def test_suggestions(curve):
    losses, lrs, *expected = CURVES[curve]
    found = suggest(history_of(losses, lrs))
    assert [*found] == ["steepest", "minimum / 10", "best accuracy"]
    for (lr, reason), answer in zip(found.values(), expected):
        if isinstance(answer, str):
            assert lr is None and reason.startswith(answer)
        else:
            assert lr == pytest.approx(answer[0], abs=answer[1])


LRS, BEST = [2.0**k for k in range(-9, -2)], 2**-6.3
PARABOLA = [1 + 0.05 * math.log2(lr / BEST) ** 2 for lr in LRS]
MINIMA = {  # losses, and the minimum with its interval if it is not that of the parabola
    "exact": (PARABOLA,),
    "noise": (noisy(PARABOLA, 0.004),),
    "outlier": ([*PARABOLA[:3], 2.3, PARABOLA[4], math.nan, math.nan],),
    "diverged": ([*PARABOLA[:-2], math.nan, math.inf],),
    "falls": (range(7, 0, -1), LRS[-1], LRS[-1], math.inf),
    "rises": ([(k + 2) ** 2 for k in range(7)], LRS[0], 0, LRS[0]),
    "flat": ([1.0, 1.001, 1.0, 0.999, 1.0, 1.001, 1.0], LRS[3], 0, math.inf),
    "two runs": ([2.0, 1.0] + [math.nan] * 5, LRS[1], 0, math.inf),
    "cliff": ([7, 6, 5, 4, 3, math.inf, math.nan], LRS[4], LRS[4], LRS[5]),
    "none": ([math.nan] * 7, LRS[0], 0, math.inf),
}


@pytest.mark.parametrize("name", MINIMA)
def test_the_minimum_of_short_runs(name):
    losses, *expected = MINIMA[name]
    lr, low, high, _ = fit_minimum(LRS, losses)
    if not expected:
        assert 1 / 1.15 < lr / BEST < 1.15 and low < BEST < high and 1.05 < high / low < 1.5
    assert not expected or [lr, low, high] == expected
    assert fit_minimum(LRS[::-1], losses[::-1])[:3] == pytest.approx((lr, low, high))


def test_the_interval_holds_the_minimum():
    noise, held = random.Random(0), 0
    for _ in range(200):
        fit = fit_minimum(LRS, [y * (1 + noise.gauss(0, lr_range.NOISE)) for y in PARABOLA])
        held += fit.low < BEST < fit.high
    assert 180 < held < 200


def search(edge, best_lr):
    """The lr recommended for 24 epochs where best_lr(epochs) is best, and the number of runs."""
    rows = []

    def run(lr, epochs):
        loss = 1 + 0.04 * math.log2(lr / best_lr(epochs)) ** 2
        rows.append({"lr": lr, "epochs": epochs, "val_loss": loss})
        return loss

    lr_range.successive_halving(run, edge, (1, 3))
    return recommend(rows, 24)[0], len(rows)


@pytest.mark.parametrize("edge", [0.02, 0.084, 0.25])
def test_the_best_lr_follows_the_length_within_bounds(edge):
    for exponent in (0, -0.2, -0.4, -2, 0.5):
        found, num_runs = search(edge, lambda epochs, k=exponent: 0.01 * epochs**k)
        three = 0.01 * 3**exponent  # the best lr of three epochs: losses without noise are exact
        bounded, used = max(min(exponent, 0), -0.5), math.log(found.lr / three, 8)
        assert abs(used - bounded) <= abs(lr_range.EXPONENT_MEAN - bounded) / 2 + 1e-3
        assert found.low < found.lr < found.high and num_runs in (11, 13)
    for best in (100 * edge, edge / 10_000):  # beyond the end of the lrs, which are widened once
        found, num_runs = search(edge, lambda _, best=best: best)
        assert num_runs == 7 + 2 + 4 + 2 and (found.low == 0 or found.high == math.inf)


def test_an_uncertain_exponent_counts_less():
    def recommended(curvature):  # of the losses of one epoch: the flatter, the less is known
        rows = [{"lr": lr, "epochs": 3, "val_loss": y} for lr, y in zip(LRS, PARABOLA)]
        losses = [1 + curvature * math.log2(lr / BEST / 1.5) ** 2 for lr in LRS]
        rows += [{"lr": lr, "epochs": 1, "val_loss": y} for lr, y in zip(LRS, losses)]
        return recommend(rows, 24)[0]

    sure, unsure = recommended(0.2), recommended(0.005)
    assert sure.lr / BEST < 0.48 < 0.55 < unsure.lr / BEST < 8**lr_range.EXPONENT_MEAN
    assert unsure.high / unsure.low > sure.high / sure.low


def test_half_the_least_lr_that_diverged_is_recommended_at_most():
    losses = {0.125: 2.0, 0.25: 1.8, 0.5: 1.7, 1.0: math.inf}
    rows = [{"lr": lr, "epochs": n, "val_loss": y / n} for n in (1, 3) for lr, y in losses.items()]
    for part in (rows[:-1], rows[:3] + rows[4:7]):
        assert recommend(part, 3)[0].lr == 0.5
    rows[2]["val_loss"] = math.inf
    assert recommend(rows, 3)[0].lr == 0.25


@pytest.fixture
def script(small_shapes, tmp_path, monkeypatch, invoke):
    """script(args) -> (status, stdout, stderr, *rows of both tables); the sweep is `logistic`."""
    recipe = dataclasses.replace(RECIPES["default"], batch_size=100, crop_padding=0)
    monkeypatch.setitem(RECIPES, "default", recipe)
    sweep = lambda _, lrs, steps: ((logistic(lr), 30.0) for lr in lrs)  # noqa: E731
    values = {"MIN_STEPS": 1, "LENGTHS": (1, 2), "NUM_LRS": (3, 3), "train_each_lr": sweep}
    for name, value in values.items():
        monkeypatch.setattr(lr_range, name, value)

    def run(text):
        args = "--data shapes --mode exp --start-lr 1e-4 --epochs 24 --steps-per-epoch 2"
        result = invoke(lr_range, ["--out", tmp_path, *args.split(), *text.split()])
        files = [tmp_path / "lr_range.csv", tmp_path / "lr_runs.csv"]
        return *result, *(read_csv(path) if path.exists() else [] for path in files)

    return run


def test_files_short_runs_and_the_command_to_copy(script, tmp_path, small):
    status, out, _, rows, runs = script("--sweep-only")
    assert status == 0 and len(rows) == 24 and not runs and "--max-lr" not in out
    status, out, err, rows, runs = script("--set beta2=0.98")
    assert (status, err) == (0, "") and len(rows) == 24
    assert list(rows[0]) == ["lr", "loss", "smoothed_loss", "train_accuracy"]
    assert (tmp_path / "lr_range.png").read_bytes().startswith(b"\x89PNG")
    runs = [{k: float(v) for k, v in row.items()} for row in runs]
    command = "python train.py --data shapes --recipe default --set beta2=0.98 --max-lr"
    found, fits = recommend(runs, 24)
    assert f"  {command} {found.lr:.4g}\n" in out
    assert ("have no minimum" in out) != all(fit.parabola for fit in fits.values())

    recipe = dict(beta2=0.98, epochs=2, max_lr=runs[-1]["lr"])  # of the last short run
    dataset, recipe = train_val_split(small, 30), dataclasses.replace(RECIPES["default"], **recipe)
    trainer = make_trainer(dataset, recipe)
    for _ in range(2):
        trainer.train_epoch(trainer.steps_per_epoch)
    logits = trainer.runtime.predict(trainer.model, trainer.normalize, dataset.test_images)
    expected = recipe.max_lr, 2, *loss_and_accuracy(logits, dataset.test_labels)
    assert tuple(runs[-1].values()) == expected


@pytest.mark.parametrize("stop, rows, runs", [(12, 6, 0), (2 * 24 + 3 * 2 + 1, 24, 2)])
def test_ctrl_c_keeps_what_there_is(script, monkeypatch, stop, rows, runs, tmp_path):
    def update(bar, done, text=""):
        if done == stop and bar.label == "step":
            raise KeyboardInterrupt

    monkeypatch.setattr(lr_range.ProgressBar, "update", update)
    status, out, err, *saved = script("")
    assert status == 130 and [*map(len, saved)] == [rows, runs]
    kept = f"{rows} of 24 lrs" + f" and {runs} short runs" * bool(runs)
    assert err == f"lr_range.py: stopped by SIGINT; {kept} are kept\n"
    assert (tmp_path / "lr_range.png").exists() and "train.py --" not in out
