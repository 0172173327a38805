"""Learning rate range test: train one model while the lr rises, and suggest a --max-lr.

    python lr_range.py --epochs 500                    # 500 lrs from 1e-10 to 1, evenly spaced
    python lr_range.py --epochs 300 --mode exp --start-lr 1e-6

Smith 2015, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186, section 3.3.
An "epoch" is the time of one lr: a full pass on a GPU, a few batches on a CPU. Writes lr_range.csv
and lr_range.png, also when it ends early.
"""

import math
import shlex
import signal
import statistics
from bisect import bisect_left
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import data
import plots
from cli import (
    Interrupted, Parser, ProgressBar, RunError, add_data_arguments, add_device_arguments, number,
    positive_float, positive_int, printable, run_script, seed_int, writable_dir, write_csv,
)  # fmt: skip
from runtime import Runtime
from schedule import RECIPES, with_overrides
from trainer import Trainer, loss_and_accuracy, predict

SMOOTHING = 0.9  # of the running mean of the loss: a memory of about ten lrs
CPU_STEPS = 10  # batches an lr on a CPU: 500 lrs take minutes
# The suggestion whose short trainings of recipe original were best, see docs/lr_range.md.
RECOMMENDED = {"linear": "minimum / 10", "exp": "best accuracy"}
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


def range_test(trainer, lrs, steps_per_lr, diverge=4.0, validate=None, after_lr=len):
    """Train `trainer` for `steps_per_lr` batches at each of `lrs`, at the recipe's first momentum.

    Returns (history, stop_reason). The history has a dict an lr with lr, loss (mean over its
    batches), smoothed_loss (bias-corrected running mean), train_accuracy and, where `validate` is
    given, test_accuracy = validate(), in percent. It ends early, with a stop_reason, if the
    smoothed loss exceeds `diverge` times its minimum, on what is not finite, and on Ctrl-C.
    """
    history, running, best = [], 0.0, math.inf
    try:
        for lr, (loss, accuracy) in zip(lrs, train_each_lr(trainer, lrs, steps_per_lr)):
            running = SMOOTHING * running + (1 - SMOOTHING) * loss
            smoothed = running / (1 - SMOOTHING ** (len(history) + 1))
            row = {"lr": lr, "loss": loss, "smoothed_loss": smoothed, "train_accuracy": accuracy}
            history.append({**row, "test_accuracy": validate()} if validate else row)
            best = min(best, smoothed)
            if smoothed > diverge * best:
                raise RunError(f"lr {lr:.4g}: smoothed loss {smoothed:.3g}, minimum {best:.3g}")
            after_lr(history)
    except RunError as error:
        return history, str(error)
    except KeyboardInterrupt:
        return history, INTERRUPTED
    return history, None


# --- suggestions ---


class Suggestion(NamedTuple):
    """An lr, or None, and how it was found, or why there is none."""

    lr: float | None
    reason: str


def suggest(history):
    """Suggestions by name from the history of a range test over an lr_grid; a pure function."""
    names = "steepest", "minimum / 10", "best accuracy", "valley"
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
    accuracy = "test_accuracy" if "test_accuracy" in history[0] else "train_accuracy"
    best = max(history, key=lambda row: row[accuracy])
    first, last = longest_fall(smoothed[: lowest + 1])
    span = f"the middle of the longest fall, {lrs[first]:.4g} to {lrs[last]:.4g}"
    found = (
        (lrs[steepest], "the smoothed loss falls fastest"),
        tenth if lowest < len(lrs) - 1 else (None, "the loss still falls at the last lr"),
        (best["lr"], f"{accuracy.replace('_', ' ')} is highest, {best[accuracy]:.1f} %"),
        (lrs[(first + last) // 2], span),
    )
    return {name: Suggestion(*pair) for name, pair in zip(names, found)}


def longest_fall(values):
    """(first, last) index of the longest strictly decreasing subsequence of a list."""
    # Of the subsequences of each length, the highest last value, negated, and its index.
    lasts, ends, before = [], [], []
    for i, value in enumerate(values):
        length = bisect_left(lasts, -value)
        before.append(ends[length - 1] if length else None)
        lasts[length : length + 1], ends[length : length + 1] = [-value], [i]
    first = last = ends[-1]
    while before[first] is not None:
        first = before[first]
    return first, last


# --- the script ---


def parse_args():
    parser = Parser(description="Train while the lr rises, and suggest a --max-lr for train.py.")
    add = parser.add_argument
    count = number(int, lambda n: 1 <= n <= 100_000, "from 1 to 100000, a day on a CPU")
    lr = number(float, lambda x: 1e-30 <= x <= 1e30, "from 1e-30 to 1e30")
    add("--epochs", type=count, default=500, metavar="N", help="number of lrs")
    add("--start-lr", type=lr, default=1e-10, help="first lr")
    add("--end-lr", type=lr, default=1.0, help="end of the lrs")
    add("--mode", default="linear", choices=["linear", "exp"], help="spacing of the lrs")
    help = f"batches at each lr (default: {CPU_STEPS} on a CPU, else a full pass)"
    add("--steps-per-epoch", type=positive_int, metavar="N", help=help)
    add("--recipe", default="default", choices=RECIPES, help="optimizer, augmentation, batch size")
    add("--set", action="append", metavar="NAME=VALUE", help="any setting of schedule.Recipe")
    help = "stop when the smoothed loss exceeds its minimum this many times"
    add("--diverge", type=positive_float, default=4.0, metavar="X", help=help)
    add("--val", action="store_true", help="also evaluate the test images at each lr")
    add_data_arguments(parser)
    add_device_arguments(parser)
    add("--seed", type=seed_int, default=1, help="of weights, order of images and augmentation")
    add("--out", type=Path, default=Path("."), metavar="DIR", help="for lr_range.csv and .png")
    args = parser.parse_args()
    if args.start_lr >= args.end_lr:
        parser.error(f"--start-lr {args.start_lr:g} is not below --end-lr {args.end_lr:g}")
    return args


def main():
    args = parse_args()
    recipe = with_overrides(RECIPES[args.recipe], args.set or [])
    recipe = replace(recipe, crop_decay_frac=0.0, weight_avg_frac=0.0)  # only the lr changes
    writable_dir(args.out)
    runtime = Runtime(args.device, args.precision, args.kernels)
    print(f"{runtime.describe()}\nloading images", flush=True)
    dataset = data.load(args.data, args.data_dir, runtime.device)
    trainer = Trainer(recipe, dataset, runtime, args.seed)
    lrs = lr_grid(args.start_lr, args.end_lr, args.epochs, args.mode)
    steps, title = trainer.steps_per_epoch, f"{printable(dataset.name)}, recipe {args.recipe}"
    steps = args.steps_per_epoch or (CPU_STEPS if runtime.device.type == "cpu" else steps)
    print(f"range test, {title}, seed {args.seed}: {len(lrs)} lrs", end=" ")
    print(f"from {args.start_lr:g} to {args.end_lr:g}, {args.mode}, {steps} steps each", flush=True)
    progress = ProgressBar("lr", len(lrs))

    def validate():
        logits = predict(runtime, trainer.model, trainer.normalize, dataset.test_images)
        return loss_and_accuracy(logits, dataset.test_labels)[1]

    def after_lr(history):
        progress.update(len(history), "lr {lr:.3g}, loss {smoothed_loss:.3f}".format(**history[-1]))

    validate = validate if args.val else None
    history, stop_reason = range_test(trainer, lrs, steps, args.diverge, validate, after_lr)
    progress.clear()
    done = f"{len(history)} of {len(lrs)} lrs"
    print(done + (f"; ended early: {stop_reason}" if stop_reason else ""))
    suggestions, name = suggest(history), RECOMMENDED[args.mode]
    print_suggestions(suggestions, name, args)
    if history:
        write_csv(args.out / "lr_range.csv", history)
        figure = plots.lr_range(history, suggestions, name, args.mode, f"range test, {title}")
        plots.save_figure(figure, args.out / "lr_range.png")
        print(f"saved lr_range.csv and lr_range.png in {args.out}")
    if stop_reason == INTERRUPTED:
        raise Interrupted(signal.SIGINT, f"{done} are kept")


def print_suggestions(suggestions, name, args):
    """Print every suggestion, and a command to copy for the one of this name."""
    recommended = suggestions[name]
    for other, (lr, reason) in suggestions.items():
        print(f"  {other:<14} {'none' if lr is None else f'{lr:.4g}':>9}  {reason}")
    if recommended.lr is None:
        return print(f"\nnothing to recommend: {recommended.reason}\n")
    given = {"--data": args.data, "--data-dir": args.data_dir, "--recipe": args.recipe}
    flags = [f"{k} {shlex.quote(v)}" for k, v in given.items() if v not in ("auto", "./data")]
    flags += [f"--set {shlex.quote(setting)}" for setting in args.set or []]
    command = f"python train.py {' '.join(flags)} --max-lr {recommended.lr:.4g}"
    print(f"\nrecommended ({name}), a starting point:\n  {command}\n")


if __name__ == "__main__":
    run_script(main)
