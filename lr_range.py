"""Smith's learning rate range test: one model trained on while the rate rises, and what its loss says of --max-lr.

    python lr_range.py --epochs 500                    # 500 rates from 1e-10 to 1, evenly spaced, as the original run did
    python lr_range.py --epochs 300 --mode exp --start-lr 1e-6

Leslie N. Smith 2015, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186, section 3.3. An "epoch"
is the time that one rate gets: a full pass on a GPU, a few batches on a CPU. Writes lr_range.csv and lr_range.png.
"""

import contextlib
import copy
import itertools
import math
import shlex
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import plots
from cli import Parser, Progress, add_data_arguments, add_device_arguments, output_folder, positive_float, positive_int, run, seed_int
from engine import Runtime, Trainer, check_batch, predict, score
from files import write_csv
from recipe import RECIPES, changed

SMOOTHING = 0.9  # of the running mean of the loss: a memory of about ten rates
CPU_STEPS = 10  # batches a rate on a CPU: 500 rates in some minutes
# Of the four suggestions, the one whose short trainings of recipe original were the best; README, "Learning rate".
RECOMMENDED = {"linear": "minimum / 10", "exp": "best accuracy"}


def rates(start, end, count, mode):
    """`count` rates from start towards end: the k-th lies k / count of the way, on a linear or an exponential scale."""
    if mode == "exp":
        return [start * (end / start) ** (k / count) for k in range(count)]
    return [start + k * (end - start) / count for k in range(count)]


@contextlib.contextmanager
def preserved(trainer):
    """Give back `trainer` and its models, with gradients and random state, bit for bit, when the block ends."""
    model, averaged = trainer.model, trainer.averaged
    average, state = copy.deepcopy(averaged.state_dict()), copy.deepcopy(trainer.state_dict())
    gradients, training = [p.grad for p in model.parameters()], model.training
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        averaged.load_state_dict(average)
        trainer.load_state_dict(state)
        model.train(training)
        for parameter, gradient in zip(model.parameters(), gradients):
            parameter.grad = gradient


def batches(trainer):
    """(indices, epoch) without end: every training picture once, in random order, then again."""
    epoch = 0
    while True:
        order = torch.randperm(trainer.count, generator=trainer.generator, device=trainer.runtime.device)
        for indices in order.split(trainer.recipe.batch_size):
            yield indices, epoch
        epoch += 1


def range_test(trainer, sweep, steps, diverge=4.0, validate=None, after_rate=lambda history: None):
    """Train on from where `trainer` stands, `steps` updates at each rate of `sweep`; nothing of it is changed in the end.

    Returns the history, a dict a rate with rate, loss (mean over its steps), smoothed (bias-corrected running mean of
    the loss), train_accuracy and, from `validate()` if given, test_accuracy, both in percent; and why it ended early,
    or None. Momentum stays where the recipe's schedule begins. Ends when the smoothed loss exceeds `diverge` times its
    best or a loss is not finite, and on Ctrl-C.
    """
    history, running, best = [], 0.0, math.inf
    momentum = trainer.schedule(0)[1]
    with preserved(trainer):
        supply = batches(trainer)
        try:
            for rate in sweep:
                loss = correct = seen = 0
                for indices, epoch in itertools.islice(supply, steps):
                    batch_loss, batch_correct = trainer.step(indices, epoch, rate, momentum)
                    loss, correct, seen = loss + batch_loss, correct + batch_correct, seen + len(indices)
                loss = loss.item() / seen
                if not math.isfinite(loss):
                    return history, f"at rate {rate:.4g} the loss is {loss}"
                running = SMOOTHING * running + (1 - SMOOTHING) * loss
                smoothed = running / (1 - SMOOTHING ** (len(history) + 1))
                row = {"rate": rate, "loss": loss, "smoothed": smoothed, "train_accuracy": 100 * correct.item() / seen}
                history.append({**row, "test_accuracy": validate()} if validate else row)
                best = min(best, smoothed)
                if smoothed > diverge * best:
                    return history, f"at rate {rate:.4g} the smoothed loss is {smoothed:.3g}, its best was {best:.3g}"
                after_rate(history)
        except KeyboardInterrupt:
            return history, "stopped by Ctrl-C"
    return history, None


@dataclass(frozen=True)
class Suggestion:
    """A rate, or None, and one line that says how it was found or why there is none."""

    rate: float | None
    reason: str


def suggest(history, mode="linear"):
    """Suggestions by name from the history of a range test that was swept in `mode`; a pure function."""
    names = ("steepest", "minimum / 10", "best accuracy", "valley")
    if len(history) < 5:
        return dict.fromkeys(names, Suggestion(None, f"{len(history)} rates are too few to read anything off"))
    smoothed = [row["smoothed"] for row in history]
    lowest = min(range(len(history)), key=smoothed.__getitem__)
    steps = [abs(b["loss"] - a["loss"]) for a, b in zip(history, history[1:])]
    noise = 1.05 * statistics.median(steps)  # the standard deviation of one loss, were it all that moves it
    fall = history[0]["loss"] - smoothed[lowest]
    if fall <= max(4 * noise, 0.01 * abs(history[0]["loss"])):
        reason = f"the loss falls by {max(fall, 0):.2g} from its start, no more than its noise ({noise:.2g}) explains"
        return dict.fromkeys(names, Suggestion(None, reason))
    chosen = dict(zip(names, (steepest(history, lowest, mode), tenth_of_minimum(history, lowest), best_accuracy(history), valley(history[: lowest + 1]))))
    return {name: pick if pick.rate is None or pick.rate > 0 else Suggestion(None, "the rate found is 0") for name, pick in chosen.items()}


def steepest(history, lowest, mode):
    """Where the smoothed loss falls fastest, before its minimum, along the axis that was swept."""
    axis = [math.log(row["rate"]) if mode == "exp" else row["rate"] for row in history]
    smoothed = [row["smoothed"] for row in history]
    inner = range(1, max(lowest, 2))
    slopes = {k: (smoothed[k + 1] - smoothed[k - 1]) / (axis[k + 1] - axis[k - 1]) for k in inner}
    k = min(slopes, key=slopes.get)
    return Suggestion(history[k]["rate"], "the smoothed loss falls fastest here" + (", on a log axis" if mode == "exp" else ""))


def tenth_of_minimum(history, lowest):
    """A tenth of the rate at which the smoothed loss is lowest."""
    if lowest == len(history) - 1:
        return Suggestion(None, "the loss still falls at the last rate")
    return Suggestion(history[lowest]["rate"] / 10, f"a tenth of {history[lowest]['rate']:.4g}, where the loss is lowest")


def best_accuracy(history):
    """Where accuracy is highest: on the test pictures if they were looked at, else in training."""
    part = "test" if "test_accuracy" in history[0] else "train"
    row = max(history, key=lambda row: row[f"{part}_accuracy"])
    return Suggestion(row["rate"], f"{part} accuracy is highest here, {row[f'{part}_accuracy']:.1f} %")


def valley(history):
    """The middle of the longest fall, of a history up to its minimum: the longest falling subsequence of the smoothed loss."""
    smoothed = [row["smoothed"] for row in history]
    length, before = [1] * len(smoothed), [-1] * len(smoothed)
    for i, value in enumerate(smoothed):
        for j in range(i):
            if smoothed[j] > value and length[j] + 1 > length[i]:
                length[i], before[i] = length[j] + 1, j
    last = first = max(range(len(smoothed)), key=length.__getitem__)
    while before[first] >= 0:
        first = before[first]
    middle = history[(first + last) // 2]["rate"]
    return Suggestion(middle, f"the middle of the longest fall, {history[first]['rate']:.4g} to {history[last]['rate']:.4g}")


def rate_seconds(trainer, steps, validate):
    """How long one rate takes: `steps` updates, each as long as the last of three, and a look at the test pictures."""
    with preserved(trainer):
        for indices, epoch in itertools.islice(batches(trainer), 3):
            started = time.perf_counter()
            trainer.step(indices, epoch, 0.0, 0.9)[0].item()  # .item() waits for the device
            seconds = time.perf_counter() - started
        started = time.perf_counter()
        if validate:
            validate()
        return steps * seconds + time.perf_counter() - started


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def parse():
    parser = Parser(description="Learning rate range test: sweep the rate over one training and suggest a --max-lr for train.py.")
    parser.add_argument("--epochs", type=positive_int, default=500, metavar="N", help="how many rates")
    parser.add_argument("--start-lr", type=float, default=1e-10, help="the first rate")
    parser.add_argument("--end-lr", type=positive_float, default=1.0, help="where the rates lead")
    parser.add_argument("--mode", default="linear", choices=["linear", "exp"], help="how the rates are spaced")
    parser.add_argument("--steps-per-epoch", type=positive_int, help=f"batches each rate gets (default: {CPU_STEPS} on a CPU, else a full pass)")
    parser.add_argument("--recipe", default="default", choices=sorted(RECIPES), help="whose optimizer, augmentation and batch size to test with")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="a setting of the recipe, as train.py takes it; may be repeated (default: the recipe's)")
    parser.add_argument("--diverge", type=positive_float, default=4.0, help="end when the smoothed loss exceeds its best this many times")
    parser.add_argument("--val", action="store_true", help="also look at the test pictures after every rate")
    add_data_arguments(parser)
    add_device_arguments(parser)
    parser.add_argument("--seed", type=seed_int, default=1, help="of the weights, the order of pictures and the augmentation")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="where lr_range.csv and lr_range.png go")
    arguments = parser.parse_args()
    if not math.isfinite(arguments.start_lr) or arguments.start_lr < 0 or (arguments.mode == "exp" and arguments.start_lr == 0):
        parser.error(f"--start-lr {arguments.start_lr:g}: a rate is a finite number of at least 0, and above 0 with --mode exp")
    if arguments.start_lr >= arguments.end_lr:
        parser.error(f"--start-lr {arguments.start_lr:g} is not below --end-lr {arguments.end_lr:g}")
    return arguments


def main():
    arguments = parse()
    recipe = changed(RECIPES[arguments.recipe], arguments.set or [])
    output_folder(arguments.out)
    runtime = Runtime(arguments.device, arguments.precision, arguments.kernels)
    dataset = data.load(arguments.data, arguments.data_dir, runtime.device)
    check_batch(recipe, dataset)
    trainer = Trainer(recipe, dataset, runtime, arguments.seed)
    sweep = rates(arguments.start_lr, arguments.end_lr, arguments.epochs, arguments.mode)
    steps = arguments.steps_per_epoch or (CPU_STEPS if runtime.device.type == "cpu" else trainer.steps_per_epoch)

    print(f"{runtime.describe()}\n{dataset.name}, recipe {arguments.recipe}, seed {arguments.seed}")
    print(f"{len(sweep)} rates from {arguments.start_lr:g} towards {arguments.end_lr:g}, {arguments.mode}, {steps} steps of {recipe.batch_size} each")

    def validate():
        return score(predict(runtime, trainer.model, trainer.normalize, dataset.test_images), dataset.test_labels)[1]

    look = validate if arguments.val else None
    print(f"expected time {clock(rate_seconds(trainer, steps, look) * len(sweep))}", flush=True)
    progress, started = Progress("rate", len(sweep)), time.perf_counter()

    def after_rate(history):
        left = (time.perf_counter() - started) / len(history) * (len(sweep) - len(history))
        progress.update(len(history), f"lr {history[-1]['rate']:.3g}, loss {history[-1]['smoothed']:.3f}, {clock(left)} left")

    history, ended = range_test(trainer, sweep, steps, arguments.diverge, look, after_rate)
    progress.clear()
    print(f"{len(history)} of {len(sweep)} rates in {clock(time.perf_counter() - started)}" + (f"; ended early:\n  {ended}" if ended else ""))
    suggestions = suggest(history, arguments.mode)
    recommend(suggestions, arguments)
    if history:
        write_csv(arguments.out / "lr_range.csv", history)
        title = f"learning rate range test, {dataset.name}, recipe {arguments.recipe}"
        plots.save(plots.lr_range(history, suggestions, arguments.mode, title), arguments.out / "lr_range.png")
        print(f"saved {arguments.out / 'lr_range.csv'} and {arguments.out / 'lr_range.png'}")


def recommend(suggestions, arguments):
    """Print every suggestion, and the line to copy for the recommended one."""
    name = RECOMMENDED[arguments.mode]
    pick = suggestions[name]
    if any(other.rate for other in suggestions.values()):
        for other, suggestion in suggestions.items():
            print(f"  {other:<14} {'none' if suggestion.rate is None else f'{suggestion.rate:.4g}':>9}  {suggestion.reason}")
    if pick.rate is None:
        return print(f"\nnothing to recommend: {pick.reason}\n")
    given = {"--data": arguments.data, "--data-dir": arguments.data_dir, "--recipe": arguments.recipe}
    flags = [f"{flag} {shlex.quote(value)}" for flag, value in given.items() if value not in ("auto", "./data")]
    flags += [f"--set {shlex.quote(text)}" for text in arguments.set or []]
    print(f"\nrecommended ({name}), a start and not the truth:\n  python train.py {' '.join(flags)} --max-lr {pick.rate:.4g}\n")


if __name__ == "__main__":
    run(main)
