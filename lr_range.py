"""Find a --max-lr: a learning rate range test, then short annealed trainings near its edge.

    python lr_range.py --epochs 500                 # both, for recipe default
    python lr_range.py --epochs 500 --sweep-only    # the range test: 500 lrs from 1e-10 to 1

The sweep (Smith 2015, arXiv:1506.01186) trains one model while the lr rises, and finds the edge.
Short OneCycle runs find the best lr below it. Writes lr_range.csv, lr_runs.csv and lr_range.png.
"""

import math
import shlex
import signal
import statistics
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

from cli import (
    Interrupted, Parser, ProgressBar, RunError, add_data_arguments, add_device_arguments, number,
    positive_int, printable, run_script, seed_int, writable_dir, write_csv,
)  # fmt: skip
import numpy as np

import data
import plots
from runtime import Runtime
from schedule import RECIPES, with_overrides
from trainer import Trainer, loss_and_accuracy

SMOOTHING = 0.9  # of the running mean of the loss: a memory of about ten lrs
HELD_OUT = 5000  # training images, or a tenth of fewer
LENGTHS, NUM_LRS = (1, 3), (7, 4)  # of the two rounds of short runs: epochs, and how many lrs
MIN_STEPS = 80  # a short run of fewer steps says little: small datasets have more epochs
NOISE = 0.01  # of a short run's loss, relative, between seeds
# Of the best lr by the length: a normal prior, and a bound: noise, extrapolated, can be anything.
EXPONENT_MEAN, EXPONENT_STD, MAX_EXPONENT = -0.2, 0.2, 0.5
INTERRUPTED = "stopped by Ctrl-C"


def lr_grid(start, end, count, mode):
    """`count` lrs from start towards end; lr k lies k / count of the way, linear or exponential."""
    if mode == "exp":
        return [start * (end / start) ** (k / count) for k in range(count)]
    return [start + k * (end - start) / count for k in range(count)]


def train_each_lr(trainer, lrs, steps_per_lr):
    """Train `trainer` at each lr in turn; yields mean loss and accuracy in percent at that lr."""
    batch_size, count = trainer.recipe.batch_size, len(trainer.dataset.train_images)
    steps_per_epoch, (_, momentum), seen = trainer.steps_per_epoch, trainer.schedule(0), 0
    for step in range(len(lrs) * steps_per_lr):
        epoch, i = divmod(step, steps_per_epoch)
        if i == 0:
            steps = range(step, step + steps_per_epoch)
            epoch_lrs = [lrs[min(s // steps_per_lr, len(lrs) - 1)] for s in steps]
            trainer.begin_epoch(epoch, epoch_lrs, [momentum] * steps_per_epoch)
        trainer.step(i)
        seen += min(batch_size, count - i * batch_size)
        if (step + 1) % steps_per_lr == 0:
            trainer.check_finite()
            loss, correct = trainer.totals.tolist()
            yield loss / seen, 100 * correct / seen
            trainer.totals.zero_()
            seen = 0


def range_test(trainer, lrs, steps_per_lr, diverge=4.0, after_lr=len):
    """Train `trainer` for `steps_per_lr` batches at each of `lrs`, at the recipe's first momentum.

    Returns (history, stop_reason). The history has a dict an lr with lr, loss (mean over its
    batches), smoothed_loss (bias-corrected running mean) and train_accuracy in percent. It ends,
    with a stop_reason, if that loss exceeds `diverge` times its minimum, is not finite, on Ctrl-C.
    """
    history, running, best = [], 0.0, math.inf
    try:
        for lr, (loss, accuracy) in zip(lrs, train_each_lr(trainer, lrs, steps_per_lr)):
            running = SMOOTHING * running + (1 - SMOOTHING) * loss
            smoothed = running / (1 - SMOOTHING ** (len(history) + 1))
            row = {"lr": lr, "loss": loss, "smoothed_loss": smoothed, "train_accuracy": accuracy}
            history.append(row)
            best = min(best, smoothed)
            if smoothed > diverge * best:
                raise RunError(f"lr {lr:.4g}: smoothed loss {smoothed:.3g}, minimum {best:.3g}")
            after_lr(history)
    except RunError as error:
        return history, str(error)
    except KeyboardInterrupt:
        return history, INTERRUPTED
    return history, None


# An lr, or None, and how it was found, or why there is none.
Suggestion = namedtuple("Suggestion", "lr reason")


def suggest(history):
    """Suggestions by name from the history of a range test over an lr_grid; a pure function."""
    names = "steepest", "minimum / 10", "best accuracy"
    lrs, losses, smoothed = ([row[k] for row in history] for k in ("lr", "loss", "smoothed_loss"))
    if len(history) < 5:
        reason = f"{len(history)} lrs are too few for a suggestion"
        return dict.fromkeys(names, Suggestion(None, reason))
    lowest = smoothed.index(min(smoothed))
    # The standard deviation of a loss, if noise were all that moves it.
    noise = 1.05 * statistics.median(abs(b - a) for a, b in zip(losses, losses[1:]))
    fall = losses[0] - smoothed[lowest]
    if fall <= max(4 * noise, 0.01 * abs(losses[0])):
        reason = f"the loss falls by {max(fall, 0):.2g}, which its noise ({noise:.2g}) may explain"
        return dict.fromkeys(names, Suggestion(None, reason))
    # On the axis of the grid, log or linear, lrs are evenly spaced.
    steepest = min(range(1, max(lowest, 2)), key=lambda k: smoothed[k + 1] - smoothed[k - 1])
    tenth = lrs[lowest] / 10, f"a tenth of {lrs[lowest]:.4g}, where the loss is lowest"
    best = max(history, key=lambda row: row["train_accuracy"])
    found = (
        (lrs[steepest], "the smoothed loss falls fastest"),
        tenth if lowest < len(lrs) - 1 else (None, "the loss still falls at the last lr"),
        (best["lr"], f"train accuracy is highest, {best['train_accuracy']:.1f} %"),
    )
    return {name: Suggestion(*pair) for name, pair in zip(names, found)}


# --- short runs: which lrs to try, and what their losses say ---


def successive_halving(run, edge, lengths):
    """Call run(lr, epochs), a loss, at powers of 2 up to the edge, then at the best for longer.

    A round whose lowest loss is at an end of its lrs goes on beyond that end, once.
    """
    top = 2.0 ** math.floor(math.log2(edge))
    for count, epochs in zip(NUM_LRS, lengths):
        lrs, losses = [top / 2**k for k in range(count)], {}
        for lr in lrs:
            losses[lr] = run(lr, epochs)
            best = min(sorted(losses), key=losses.get)
            if len(losses) == count and best in (min(losses), max(losses)):
                factor = 0.5 if best == min(losses) else 2.0
                lrs += [best * factor, best * factor**2]
        top = 2 * best  # the best lr falls with the length: the next lrs are 2, 1, 1/2, 1/4 of it


# The lr of the lowest loss, its 95 % interval, and the parabola (a, b, c) in log2 lr, or None.
# `low` is 0, `high` is inf, or both, where the losses do not bound the lr on that side.
Minimum = namedtuple("Minimum", "lr low high parabola", defaults=[None])


def fit_minimum(lrs, losses):
    """The Minimum of a parabola in log lr through the lowest losses; a pure function.

    nan and outliers are left out: of the five lowest losses those count whose excess over the
    lowest is at most five times the median. Losses that fall to an end of the lrs have it there.
    """
    points = sorted((loss, lr) for lr, loss in zip(lrs, losses) if math.isfinite(loss))
    lowest, best = points[0] if points else (math.nan, min(lrs))
    if len(points) < 3:
        return Minimum(best, 0.0, math.inf)
    first, last = min(lr for _, lr in points), max(lr for _, lr in points)
    limit = lowest + 5 * statistics.median(loss - lowest for loss, _ in points[:5])
    x, y = np.array([(math.log2(lr), loss) for loss, lr in points[:5] if loss <= limit]).T
    if len(x) >= 3:
        (a, b, c), covariance = np.polyfit(x, y, 2, cov="unscaled")
        vertex = -b / (2 * a) if a > 0 else math.nan
        if math.log2(first) <= vertex <= math.log2(last):
            residual = y - np.polyval((a, b, c), x)
            variance = max(residual @ residual / max(len(x) - 3, 1), (NOISE * lowest) ** 2)
            gradient = np.array([b / (2 * a * a), -1 / (2 * a), 0])  # of the vertex by a, b, c
            octaves = 2 * math.sqrt(gradient @ covariance @ gradient * variance)
            if octaves < 3:  # else the losses are as good as flat
                return Minimum(*(2 ** (vertex + k * octaves) for k in (0, -1, 1)), (a, b, c))
    diverged = min({lr for lr in lrs if lr > best} - {lr for _, lr in points}, default=math.inf)
    return Minimum(best, 0.0 if best < last else best, diverged if best > first else best)


def recommend(rows, epochs):
    """(Minimum for a run of `epochs`, {length: Minimum of the short runs}); a pure function.

    The best lr is a power of the length. Its exponent is that between the minima of the shortest
    and the longest runs, drawn to EXPONENT_MEAN as far as their errors ask for, and held to
    [-MAX_EXPONENT, 0]. The lr is at most half the least lr that diverged.
    """
    fits = {}
    for length in sorted({row["epochs"] for row in rows}):
        points = [(row["lr"], row["val_loss"]) for row in rows if row["epochs"] == length]
        fits[length] = fit_minimum(*zip(*points))
    (short, first), *_, (long, last) = fits.items()
    errors = [math.log(fit.high / fit.low) / 4 if fit.low else math.inf for fit in (first, last)]
    span = math.log(long / short)
    exponent, error = math.log(last.lr / first.lr) / span, math.hypot(*errors) / span
    weight = 1 / (1 + (error / EXPONENT_STD) ** 2)
    exponent = weight * exponent + (1 - weight) * EXPONENT_MEAN
    exponent = min(max(exponent, -MAX_EXPONENT), 0.0)
    shift = (epochs / long) ** exponent
    factor = max(epochs / long, long / epochs) ** (2 * EXPONENT_STD * math.sqrt(1 - weight))
    diverged = min((row["lr"] for row in rows if math.isinf(row["val_loss"])), default=math.inf)
    lr, high = min(shift * last.lr, diverged / 2), min(shift * last.high * factor, diverged)
    return Minimum(lr, min(lr, shift * last.low / factor), high), fits


# --- the script ---


def parse_args():
    parser = Parser(description="Find a --max-lr for train.py: a range test, then short trainings.")
    add = parser.add_argument
    num_lrs = number(int, lambda n: 1 <= n <= 100_000, "from 1 to 100000, a day on a CPU")
    lr = number(float, lambda x: 1e-30 <= x <= 1e30, "from 1e-30 to 1e30")
    add("--epochs", type=num_lrs, default=500, metavar="N", help="number of lrs of the sweep")
    add("--start-lr", type=lr, default=1e-10, help="first lr of the sweep")
    add("--end-lr", type=lr, default=1.0, help="end of its lrs")
    add("--mode", default="linear", choices=["linear", "exp"], help="spacing of its lrs")
    add("--steps-per-epoch", type=positive_int, default=10, metavar="N", help="batches at each lr")
    add("--sweep-only", action="store_true", help="the range test without the short runs")
    add("--recipe", default="default", choices=RECIPES, help="what is to be trained with the lr")
    add("--set", action="append", metavar="NAME=VALUE", help="any setting of schedule.Recipe")
    add_data_arguments(parser)
    add_device_arguments(parser)
    add("--seed", type=seed_int, default=1, help="of weights, order of images and augmentation")
    add("--out", type=Path, default=Path("."), metavar="DIR", help="for tables and the figure")
    args = parser.parse_args()
    if args.start_lr >= args.end_lr:
        parser.error(f"--start-lr {args.start_lr:g} is not below --end-lr {args.end_lr:g}")
    return args


class Search:
    """The sweep and the short runs: of one recipe, on the same images, under one progress bar."""

    def __init__(self, args):
        self.args, self.recipe = args, with_overrides(RECIPES[args.recipe], args.set or [])
        writable_dir(args.out)
        self.runtime = Runtime(args.device, args.precision, args.kernels)
        print(f"{self.runtime.describe()}\nloading images", flush=True)
        dataset = data.load(args.data, args.data_dir, self.runtime.device)
        count = min(HELD_OUT, -(-len(dataset.train_images) // 10))
        self.dataset = data.train_val_split(dataset, count)
        recipe = replace(self.recipe, crop_decay_frac=0.0, weight_avg_frac=0.0)  # only the lr moves
        self.trainer = Trainer(recipe, self.dataset, self.runtime, args.seed)
        N, self.rows = self.trainer.steps_per_epoch, []
        self.lengths = () if args.sweep_only else [n * -(-MIN_STEPS // N) for n in LENGTHS]
        self.short_steps = N * sum(n * epochs for n, epochs in zip(NUM_LRS, self.lengths))
        self.progress = ProgressBar("step", args.epochs * args.steps_per_epoch + self.short_steps)

    def sweep(self):
        """The range test: (history, stop_reason)."""
        args, progress, steps = self.args, self.progress, self.args.steps_per_epoch
        lrs = lr_grid(args.start_lr, args.end_lr, args.epochs, args.mode)

        def after_lr(history):
            if len(history) == 1:  # without what the first step compiles
                progress.started = time.monotonic()
            if len(history) == 5:
                seconds = (time.monotonic() - progress.started) / (4 * steps) * progress.total
                print(f"this takes up to {math.ceil(seconds / 60)} min", flush=True)
            text = "lr {lr:.3g}, loss {smoothed_loss:.3f}"
            progress.update(len(history) * steps, text.format(**history[-1]))

        result = range_test(self.trainer, lrs, steps, after_lr=after_lr)
        progress.clear()
        self.steps = len(result[0]) * steps
        progress.total = self.steps + self.short_steps
        return result

    def run(self, lr, epochs):
        """Train a whole short run: its held-out loss, inf if it diverges; adds to lr_runs.csv."""
        recipe, loss, accuracy = replace(self.recipe, epochs=epochs, max_lr=lr), math.inf, 0.0
        trainer = Trainer(recipe, self.dataset, self.runtime, self.args.seed)
        text, images = f"lr {lr:.4g}, {epochs} epoch{'s' * (epochs > 1)}", self.dataset.test_images

        def after_step():
            self.steps += 1
            self.progress.total = max(self.progress.total, self.steps)
            self.progress.update(self.steps, text)

        try:
            for _ in range(epochs):
                trainer.train_epoch(trainer.steps_per_epoch, after_step)
            logits = self.runtime.predict(trainer.averaged_model, trainer.normalize, images)
            loss, accuracy = loss_and_accuracy(logits, self.dataset.test_labels)
        except RunError as error:
            text = str(error)
        self.progress.clear()
        print(f"  {text}: held-out loss {loss:.4f}, accuracy {accuracy:.2f} %", flush=True)
        self.rows.append({"lr": lr, "epochs": epochs, "val_loss": loss, "val_accuracy": accuracy})
        write_csv(self.args.out / "lr_runs.csv", self.rows)
        return loss

    def print_recommendation(self, found, fits):
        """Print the lr found as a command to copy, its interval, and what limits it."""
        args, best = self.args, f"{found.lr:.4g}, between {found.low:.3g} and {found.high:.3g}"
        given = {"--data": args.data, "--data-dir": args.data_dir, "--recipe": args.recipe}
        flags = [f"{k} {shlex.quote(v)}" for k, v in given.items() if v not in ("auto", "./data")]
        flags += [f"--set {shlex.quote(setting)}" for setting in args.set or []]
        print(f"\nrecommended for {self.recipe.epochs} epochs: {best} with 95 % confidence")
        print(f"  python train.py {' '.join(flags)} --max-lr {found.lr:.4g}\n")
        if not all(fit.parabola for fit in fits.values()):
            print("the losses of a length have no minimum: the best lr is at, or beyond, an end")
        accuracies = [r["val_accuracy"] for r in self.rows if r["epochs"] == self.lengths[-1]]
        if max(accuracies) - min(accuracies) < 0.5:
            print("the lr matters little: the longer runs differ by less than half a point")


def main():
    args = parse_args()
    search = Search(args)
    title = f"{printable(search.dataset.name)}, recipe {args.recipe}, seed {args.seed}"
    lrs = f"{args.epochs} lrs from {args.start_lr:g} to {args.end_lr:g} ({args.mode})"
    print(f"{title}\nsweep: {lrs}, {args.steps_per_epoch} steps each, or until it diverges")
    for count, epochs in zip(NUM_LRS, search.lengths):
        print(f"short runs: {count} lrs, {epochs} epoch{'s' * (epochs > 1)} each", flush=True)
    history, stop_reason = search.sweep()
    done, suggestions = f"{len(history)} of {args.epochs} lrs", suggest(history)
    print(f"sweep: {done}" + (f"; ended early: {stop_reason}" if stop_reason else ""))
    for name, (lr, reason) in suggestions.items():
        print(f"  {name:<14} {'none' if lr is None else f'{lr:.4g}':>9}  {reason}")
    fits, found = {}, None
    if suggestions["steepest"].lr is None:
        print(f"nothing to recommend: {suggestions['steepest'].reason}")
    elif search.lengths and stop_reason != INTERRUPTED:
        edge = min(history, key=lambda row: row["smoothed_loss"])["lr"]
        try:
            successive_halving(search.run, edge, search.lengths)
            found, fits = recommend(search.rows, search.recipe.epochs)
            search.print_recommendation(found, fits)
        except KeyboardInterrupt:
            stop_reason, done = INTERRUPTED, f"{done} and {len(search.rows)} short runs"
    if history:
        write_csv(args.out / "lr_range.csv", history)
        figure = plots.lr_range(history, suggestions, args.mode, title, search.rows, fits, found)
        plots.save_figure(figure, args.out / "lr_range.png")
        print(f"saved tables and lr_range.png in {args.out}")
    if stop_reason == INTERRUPTED:
        raise Interrupted(signal.SIGINT, f"{done} are kept")


if __name__ == "__main__":
    run_script(main)
