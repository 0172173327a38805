"""Find a --max-lr for train.py: a learning rate range test, then short trainings near its edge.

    python lr_range.py --epochs 500                 # both, for recipe default
    python lr_range.py --epochs 500 --sweep-only    # the range test: 500 lrs from 1e-10 to 1

The sweep (Smith 2015, arXiv:1506.01186) trains one model on while the lr rises, and finds the edge.
Whole OneCycle trainings of a few epochs, below the edge, are then compared on held-out images.
Writes lr_range.csv, lr_runs.csv and lr_range.png.
"""

import math
import shlex
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from cli import Parser, ProgressBar, RunError, add_data_arguments, add_runtime_arguments
from cli import number, parse_before_imports, positive_int, run_script, seed_int, writable_dir
from cli import write_csv
from recipes import RECIPES, with_overrides

# --- the flags ---


def parse_args():
    parser = Parser(description="Find a --max-lr for train.py: a range test, then short trainings.")
    num_lrs = number(int, lambda n: 1 <= n <= 100_000, "a whole number from 1 to 100,000")
    lr = number(float, lambda x: 1e-30 <= x <= 1e30, "from 1e-30 to 1e30")
    add = parser.add_argument
    help = "number of lrs of the sweep, with --steps-per-epoch batches each"
    add("--epochs", type=num_lrs, default=500, metavar="LRS", help=help)
    help = "batches at each lr of the sweep"
    add("--steps-per-epoch", type=positive_int, default=10, metavar="BATCHES", help=help)
    add("--start-lr", type=lr, default=1e-10, metavar="LR", help="first lr of the sweep")
    add("--end-lr", type=lr, default=1.0, metavar="LR", help="end of its lrs")
    add("--mode", default="linear", choices=["linear", "exp"], help="spacing of its lrs")
    add("--sweep-only", action="store_true", help="the range test without the short trainings")
    add("--recipe", default="default", choices=RECIPES, help="what is to be trained with the lr")
    add("--set", action="append", metavar="NAME=VALUE", help="any setting of recipes.Recipe")
    add_data_arguments(parser)
    add_runtime_arguments(parser)
    add("--seed", type=seed_int, default=1, help="of weights, order of images and augmentation")
    help = "directory of the tables and the figure"
    add("--out", type=Path, default=Path("."), metavar="DIR", help=help)
    args = parser.parse_args()
    if args.start_lr >= args.end_lr:
        parser.error(f"--start-lr {args.start_lr:g} is not below --end-lr {args.end_lr:g}")
    return args


if __name__ == "__main__":
    parse_before_imports(parse_args)

import torch
import torch.nn.functional as F

import data
import plots
from runtime import Runtime, tune_process
from train import Trainer, warn_of_large_batch

SMOOTHING = 0.9  # of the running mean of the loss: a memory of about ten lrs
MIN_LRS = 5  # with fewer, chance decides
HELD_OUT = 5000  # training images, or a tenth of fewer
FEW_IMAGES = 500  # held-out images; with fewer, chance decides between lrs
NUM_LRS = (7, 4)  # of the two rounds of short runs
LENGTHS = (1, 3)  # their epochs
MIN_STEPS = 80  # a short run of fewer steps says little: small datasets have more epochs


# --- the sweep ---


def lr_grid(start, end, count, mode):
    """Return `count` lrs from start towards end; lr k lies k / count of the way.

    Mode "linear" has equal differences, "exp" equal ratios.
    """
    if mode == "exp":
        return [start * (end / start) ** (k / count) for k in range(count)]
    return [start + k * (end - start) / count for k in range(count)]


def train_each_lr(trainer, lrs, steps_per_lr):
    """Train at each lr in turn; yields mean loss and accuracy in percent over its batches.

    Momentum stays at the first value of the recipe's schedule.
    """
    batch_size = trainer.recipe.batch_size
    num_images = len(trainer.dataset.train_images)
    steps_per_epoch = trainer.steps_per_epoch
    _, momentum = trainer.schedule(0)
    seen = 0  # images at the present lr
    for step in range(len(lrs) * steps_per_lr):
        epoch, i = divmod(step, steps_per_epoch)

        # A new epoch wants the lrs of all its steps. Its end may lie beyond the last lr.
        if i == 0:
            epoch_lrs = []
            for s in range(step, step + steps_per_epoch):
                k = min(s // steps_per_lr, len(lrs) - 1)
                epoch_lrs.append(lrs[k])
            trainer.begin_epoch(epoch, epoch_lrs, [momentum] * steps_per_epoch)

        trainer.step(i)
        seen += min(batch_size, num_images - i * batch_size)  # an epoch's last batch is smaller

        # The last batch at this lr: the totals since the last one are its result.
        if (step + 1) % steps_per_lr == 0:
            trainer.check_finite()
            loss, correct = trainer.totals.tolist()
            yield loss / seen, 100 * correct / seen
            trainer.totals.zero_()
            seen = 0


def range_test(trainer, lrs, steps_per_lr, history, diverge=4.0):
    """Train one model on, for `steps_per_lr` batches at each of `lrs`.

    Appends a dict an lr to `history`: lr, loss, smoothed_loss (a bias-corrected running mean) and
    train_accuracy in percent. Returns None, or why it ended early: the smoothed loss exceeds
    `diverge` times its minimum, or the loss is not finite.
    """
    running = 0.0
    least = math.inf
    results = zip(lrs, train_each_lr(trainer, lrs, steps_per_lr))
    try:
        with ProgressBar("sweep", len(lrs)) as progress:
            for lr, (loss, accuracy) in results:
                # The mean starts at 0; dividing by the sum of the weights so far corrects for that.
                running = SMOOTHING * running + (1 - SMOOTHING) * loss
                smoothed = running / (1 - SMOOTHING ** (len(history) + 1))
                history.append(
                    {
                        "lr": lr,
                        "loss": loss,
                        "smoothed_loss": smoothed,
                        "train_accuracy": accuracy,
                    }
                )
                progress.update(len(history), f"lr {lr:.3g}, loss {smoothed:.3f}")

                least = min(least, smoothed)
                if smoothed > diverge * least:
                    return f"lr {lr:.4g}: smoothed loss {smoothed:.3g}, its minimum {least:.3g}"
    except RunError:
        return f"lr {lrs[len(history)]:.4g}: the loss or a weight is not finite"
    return None


def find_edge(history):
    """Return the lr of the least smoothed loss; None where the loss falls no more than by chance.

    `history` is that of range_test; a pure function.
    """
    if len(history) < MIN_LRS:
        return None
    losses = [row["loss"] for row in history]
    lowest = min(history, key=lambda row: row["smoothed_loss"])
    # The std of a loss if nothing but noise moved it: the difference of two normal numbers has a
    # median magnitude of 0.95 std.
    noise = statistics.median(abs(b - a) for a, b in zip(losses, losses[1:])) / 0.95
    fall = losses[0] - lowest["smoothed_loss"]
    if fall <= max(4 * noise, 0.01 * losses[0]):
        return None
    return lowest["lr"]


# --- short runs ---


@dataclass(frozen=True)
class ShortRun:
    """A whole OneCycle training of a few epochs, and its result on each held-out image."""

    lr: float
    epochs: int
    losses: torch.Tensor  # float64 (N,): cross entropy of each image; inf if the training diverged
    correct: torch.Tensor  # float64 (N,): 1 where the prediction is right, else 0

    @property
    def loss(self):
        """Mean loss, inf if the training diverged."""
        loss = self.losses.mean().item()
        return loss if math.isfinite(loss) else math.inf

    @property
    def loss_error(self):
        """Standard error of the mean loss: what other held-out images would change."""
        return standard_error(self.losses)

    @property
    def accuracy(self):
        """Accuracy in percent."""
        return 100 * self.correct.sum().item() / len(self.correct)

    @property
    def diverged(self):
        return self.loss == math.inf


def standard_error(values):
    """Return the standard error of the mean of values (N,)."""
    return values.std().item() / math.sqrt(len(values))


def train_short_run(recipe, dataset, runtime, seed, lr, epochs):
    """Train the recipe from fresh weights for `epochs` with max_lr `lr`, as a ShortRun."""
    trainer = Trainer(replace(recipe, max_lr=lr, epochs=epochs), dataset, runtime, seed)
    labels = dataset.test_labels
    num_steps = epochs * trainer.steps_per_epoch
    try:
        with ProgressBar(f"lr {lr:.4g}, step", num_steps) as progress:
            for epoch in range(epochs):
                trainer.begin_epoch(epoch)
                for i in range(trainer.steps_per_epoch):
                    trainer.step(i)
                    progress.update(epoch * trainer.steps_per_epoch + i + 1)
                trainer.end_epoch()
        logits = runtime.predict(trainer.averaged_model, trainer.normalize, dataset.test_images)
        losses = F.cross_entropy(logits, labels, reduction="none").cpu().double()
        correct = (logits.argmax(1) == labels).cpu().double()
    except RunError:  # a loss or weight is not finite
        losses = torch.full([len(labels)], math.inf, dtype=torch.float64)
        correct = torch.zeros(len(labels), dtype=torch.float64)
    return ShortRun(lr, epochs, losses, correct)


def short_runs(train, edge, lengths):
    """Yield ShortRuns train(lr, epochs): seven lrs below the edge, then four around the best.

    `lengths` are the epochs of the two rounds. A round whose least loss is at an end of its lrs
    goes on beyond that end, once.
    """
    highest = 2.0 ** math.floor(math.log2(edge))
    for count, epochs in zip(NUM_LRS, lengths):
        # Powers of two, from the highest down.
        runs = []
        for k in range(count):
            runs.append(train(highest / 2**k, epochs))
            yield runs[-1]

        # The best lr may lie beyond an end of these: then two more there.
        best = best_run(runs)
        if best is runs[0]:
            more = [2 * best.lr, 4 * best.lr]
        elif best is runs[-1]:
            more = [best.lr / 2, best.lr / 4]
        else:
            more = []
        for lr in more:
            runs.append(train(lr, epochs))
            yield runs[-1]

        # The best lr falls as runs get longer: the next lrs are 2, 1, 1/2 and 1/4 of it.
        highest = 2 * best_run(runs).lr


def best_run(runs):
    """Return the run of the least held-out loss; the lowest lr of several."""
    return min(runs, key=lambda run: (run.loss, run.lr))


# --- which lr, and how sure ---


def recommend(runs):
    """Return the lr to train with, from ShortRuns; None if all of the longest diverged.

    It is that of the least held-out loss among the longest runs. Losses within one standard error
    of the least count as equal, and then the lowest lr wins, since the best lr falls as runs get
    longer. It is at most half the least lr that diverged in any run: a long run may diverge where
    a short one does not. A pure function.
    """
    if not longest_runs(runs):
        return None
    lr = min(lrs_within(runs, 1))
    for run in runs:
        if run.diverged:
            lr = min(lr, run.lr / 2)
    return lr


def longest_runs(runs):
    """Return the longest runs, without those that diverged."""
    epochs = max(run.epochs for run in runs)
    return [run for run in runs if run.epochs == epochs and not run.diverged]


def lrs_within(runs, num_errors):
    """Return the lrs of the longest runs whose loss is within standard errors of the least."""
    candidates = longest_runs(runs)
    best = best_run(candidates)
    lrs = [run.lr for run in candidates if not is_higher(run.losses, best.losses, num_errors)]
    return sorted(lrs)


def is_higher(values, others, num_errors):
    """Return whether values (N,) exceed others (N,), on average, by more than chance.

    Chance is `num_errors` standard errors of the mean difference. It is paired, as both are of the
    same images: an image that is hard for one network is hard for the other.
    """
    difference = values - others
    return difference.mean().item() > num_errors * standard_error(difference)


def doubts(runs):
    """Return sentences that say why recommend(runs) may be wrong; a pure function."""
    candidates = longest_runs(runs)
    best = best_run(candidates)
    sentences = []
    if len(best.losses) < FEW_IMAGES:
        sentences.append(f"{len(best.losses)} held-out images are too few to tell lrs apart")
    accurate = max(candidates, key=lambda run: run.accuracy)
    if is_higher(accurate.correct, best.correct, 2):
        sentences.append(
            f"loss and accuracy disagree: the loss is least at lr {best.lr:.4g}, with an accuracy "
            f"of {best.accuracy:.2f} %, but lr {accurate.lr:.4g} has {accurate.accuracy:.2f} %"
        )
    lrs = [run.lr for run in runs if run.epochs == best.epochs]
    if best.lr in (min(lrs), max(lrs)):
        sentences.append(f"{best.lr:.4g} is at an end of the lrs tried: the best may lie beyond")
    return sentences


# --- the script ---


class Search:
    """The sweep and the short runs of the script, and what they have found so far."""

    def __init__(self, args):
        self.args = args
        self.recipe = with_overrides(RECIPES[args.recipe], args.set or [])
        writable_dir(args.out)
        self.runtime = Runtime(args.device, args.precision, args.kernels)
        tune_process(self.runtime.device)
        print(f"{self.runtime.describe()}\nloading images", flush=True)
        dataset = data.load(args.data, args.data_dir, self.runtime.device)
        self.title = f"{dataset.name}, recipe {args.recipe}, seed {args.seed}"
        print(self.title)
        # Neither part trains on these images, nor looks at the test images.
        num_held_out = min(HELD_OUT, math.ceil(len(dataset.train_images) / 10))
        self.dataset = data.train_val_split(dataset, num_held_out)
        warn_of_large_batch(self.recipe, self.dataset)

        self.history = []  # of the sweep: a dict an lr
        self.marks = {}  # of the sweep: name -> lr
        self.runs = []  # ShortRuns
        self.recommended = None  # (name, lr)

    def sweep(self):
        """Run the range test; returns the edge, or None."""
        args = self.args
        lrs = lr_grid(args.start_lr, args.end_lr, args.epochs, args.mode)
        print(
            f"sweep: {len(lrs)} lrs from {args.start_lr:g} to {args.end_lr:g} ({args.mode}), "
            f"{args.steps_per_epoch} batches each, or until it diverges",
            flush=True,
        )
        # Nothing but the lr is to change on the way.
        recipe = replace(self.recipe, crop_decay_frac=0.0, weight_avg_frac=0.0)
        trainer = Trainer(recipe, self.dataset, self.runtime, args.seed)
        stop_reason = range_test(trainer, lrs, args.steps_per_epoch, self.history)
        if stop_reason:
            print(f"  ended after {len(self.history)} lrs: {stop_reason}")

        edge = find_edge(self.history)
        if len(self.history) < MIN_LRS:
            print(f"nothing to recommend: fewer than {MIN_LRS} lrs were trained")
        elif edge is None:
            print("nothing to recommend: the loss falls by no more than its noise may explain")
        else:
            print(f"  edge: lr {edge:.4g}, where the smoothed loss is least")
            self.marks["edge"] = edge
            if edge == self.history[-1]["lr"]:
                print("  the loss still falls there: a higher --end-lr would tell more")
            else:
                print(f"  classic reading: lr {edge / 10:.4g}, a tenth of the edge")
                self.marks["classic reading"] = edge / 10
        return edge

    def compare_lrs(self, edge):
        """Train the short runs, with a line for each, and print the lr that they recommend."""
        steps_per_epoch = math.ceil(len(self.dataset.train_images) / self.recipe.batch_size)
        factor = math.ceil(MIN_STEPS / steps_per_epoch)
        lengths = [factor * epochs for epochs in LENGTHS]
        epochs = sum(count * length for count, length in zip(NUM_LRS, lengths))
        num_held_out = len(self.dataset.test_images)
        print(f"short runs: {epochs} epochs in all, compared on {num_held_out:,} held-out images")
        print("       lr  epochs  held-out loss  std error  accuracy", flush=True)

        def train(lr, epochs):
            return train_short_run(
                self.recipe, self.dataset, self.runtime, self.args.seed, lr, epochs
            )

        for run in short_runs(train, edge, lengths):
            self.runs.append(run)
            line = f"{run.lr:9.4g}  {run.epochs:6}  "
            if run.diverged:
                line += "     diverged"
            else:
                line += f"{run.loss:13.4f}  {run.loss_error:9.4f}  {run.accuracy:6.2f} %"
            print(line, flush=True)
            self.save_tables()

        lr = recommend(self.runs)
        if lr is None:
            print("nothing to recommend: all of the longest runs diverged")
        else:
            self.print_recommendation(lr)

    def print_recommendation(self, lr):
        """Print the lr as a command to copy, with what speaks for it and against it."""
        reasons = doubts(self.runs)
        verdict = "best guess" if reasons else "recommended"
        length = max(run.epochs for run in self.runs)
        name = f"{verdict} for {self.recipe.epochs} epochs, from runs of {length}"
        self.recommended = (name, lr)
        print(f"\n{name}: {lr:.4g}")
        print(f"  {train_command(self.args, lr)}\n")

        lrs = ", ".join(f"{lr:.4g}" for lr in lrs_within(self.runs, 2))
        print(f"within two standard errors of the least loss, so as good: {lrs}")
        diverged = [run.lr for run in self.runs if run.diverged]
        if diverged:
            print(f"lr {min(diverged):.4g} diverged: at most half of it is recommended")
        for reason in reasons:
            print(f"not sure: {reason}")
        if reasons:
            own = self.recipe.max_lr
            print(f"compare it with the recipe's own lr, {own:.4g}, in whole trainings")

    def save_tables(self):
        if self.history:
            write_csv(self.args.out / "lr_range.csv", self.history)
        if self.runs:
            rows = []
            for run in self.runs:
                row = {
                    "lr": run.lr,
                    "epochs": run.epochs,
                    "val_loss": run.loss,
                    "val_loss_se": run.loss_error,
                    "val_accuracy": run.accuracy,
                }
                rows.append(row)
            write_csv(self.args.out / "lr_runs.csv", rows)

    def save(self):
        """Write tables and figure of what there is."""
        self.save_tables()
        if self.history:
            figure = plots.lr_range(
                self.history, self.marks, self.title, self.runs, self.recommended
            )
            plots.save_figure(figure, self.args.out / "lr_range.png")
            print(f"saved tables and lr_range.png in {self.args.out}")


def train_command(args, lr):
    """Return the command that trains with an lr, to copy into a shell."""
    words = ["python", "train.py"]
    if args.data != "auto":
        words += ["--data", args.data]
    if args.data_dir != "./data":
        words += ["--data-dir", args.data_dir]
    words += ["--recipe", args.recipe]
    for setting in args.set or []:
        words += ["--set", setting]
    words += ["--max-lr", f"{lr:.4g}"]
    for name in ("device", "precision", "kernels"):
        value = getattr(args, name)
        if value != "auto":
            words += [f"--{name}", value]
    return shlex.join(words)


def main():
    args = parse_args()
    search = Search(args)
    try:
        edge = search.sweep()
        if edge is not None and not args.sweep_only:
            search.compare_lrs(edge)
    finally:  # Ctrl-C keeps what there is
        search.save()


if __name__ == "__main__":
    run_script(main)
