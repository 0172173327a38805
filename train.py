"""Train the channel-token ViT and keep the best and the last of it.

    python train.py                                     # CIFAR-10, recipe default, the fastest device there is
    python train.py --recipe original --data FOLDER     # the run to reproduce, on a folder of pictures
    python train.py --runs 5 --seed 1                   # five seeds, then mean and standard deviation
    python train.py --resume runs/RUN                   # go on with a run that was stopped, to the same bits
    torchrun --nproc-per-node=8 train.py                # one run on eight GPUs; ranks.py says how

Every run writes best.pt, last.pt, history.csv, config.json and curves.png to a folder of its own under runs/;
best.pt beside runs/ is always the newest run's best. last.pt, from which a run goes on, is written at the start, after
every epoch, every --save-every steps, and on SIGINT and SIGTERM, which end the run after the step that it is in.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import checkpoint
import data
import plots
import ranks
from augment import Augmentation
from cli import (
    Parser, Progress, RunError, Stop, Stopped, UsageError, add_data_arguments, add_device_arguments, first_line,
    output_folder, positive_float, positive_int, run, seed_int,
)  # fmt: skip
from engine import Runtime, Trainer, check_batch, predict, score, versions
from files import replacing, sweep, write_csv
from recipe import RECIPES, Recipe, changed

ROW = "{:>5} {:>10} {:>8} {:>10} {:>9} {:>9} {:>8} {:>7}"
HEADER = ROW.format("epoch", "lr", "momentum", "train loss", "acc %", "test loss", "acc %", "seconds")


def of_recipes(field):
    """What a setting is without its flag, for --help."""
    return "(default: the recipe's: " + ", ".join(f"{name} {getattr(recipe, field)}" for name, recipe in sorted(RECIPES.items())) + ")"


def parse():
    """The arguments, and those of them that a flag has set; the others are None there."""
    parser = Parser(description="Train the channel-token ViT; ends with an evaluated best.pt.")
    parser.add_argument("--recipe", default="default", choices=sorted(RECIPES), help="the settings to start from; flags below override them")
    parser.add_argument("--epochs", type=positive_int, help=f"passes over the training pictures {of_recipes('epochs')}")
    parser.add_argument("--batch-size", type=positive_int, help=f"pictures a step {of_recipes('batch_size')}")
    parser.add_argument("--max-lr", type=positive_float, help=f"the schedule's peak learning rate {of_recipes('max_lr')}")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="any other setting of recipe.py, or of its augmentation; may be repeated (default: the recipe's)")
    add_data_arguments(parser)
    parser.add_argument("--val-split", type=positive_int, metavar="N", help="hold N training pictures out and evaluate on them instead of the test pictures (default: none)")
    add_device_arguments(parser)
    parser.add_argument("--seed", type=seed_int, default=1, help="of the weights, the order of pictures and the augmentation")
    parser.add_argument("--runs", type=positive_int, default=1, help="train this many seeds, counting up from --seed")
    parser.add_argument("--max-steps", type=positive_int, help="end after this many steps, the schedule left as it is (default: none)")
    parser.add_argument("--save-every", type=positive_int, metavar="STEPS", help="also write last.pt within an epoch (default: only after every epoch)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run, a folder or its last.pt; its settings are the run's (default: begin a run)")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="where runs/ and best.pt go")
    arguments = parser.parse_args()
    return arguments, vars(parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(vars(arguments)))))


def main():
    arguments, given = parse()
    if arguments.resume:
        return resume(arguments.resume, given)
    overrides = [f"{name}={getattr(arguments, name)}" for name in ("epochs", "batch_size", "max_lr") if getattr(arguments, name)]
    recipe = changed(RECIPES[arguments.recipe], [*(arguments.set or []), *overrides])
    runtime = Runtime(arguments.device, arguments.precision, arguments.kernels, torchrun=True)
    output_folder(arguments.out / "runs")
    with runtime.ranks.in_turn():
        dataset = data.load(arguments.data, arguments.data_dir, runtime.device)
    if arguments.val_split:
        dataset = data.hold_out(dataset, arguments.val_split)
    check_batch(recipe, dataset)

    config = {
        "recipe": arguments.recipe,
        "settings": dataclasses.asdict(recipe),
        "data": dataset.source,
        "data_dir": arguments.data_dir,
        "val_split": arguments.val_split,
        "set": arguments.set,
        "device": runtime.describe(),
        "precision": runtime.precision,
        "kernels": arguments.kernels,
        "max_steps": arguments.max_steps,
        "save_every": arguments.save_every,
        "job": ranks.job()[0],
        "versions": versions(),
        "git_commit": git_commit(),
    }
    print_header(config, dataset, recipe)
    histories = []
    for seed in range(arguments.seed, arguments.seed + arguments.runs):
        name = f"{arguments.recipe}-{dataset.name}-seed{seed}"
        folder, begun = runtime.ranks.share(run_folder(arguments.out / "runs", name, seed) if runtime.ranks.rank == 0 else None)
        content = checkpoint.load(folder / "last.pt", "cpu")[1] if begun else None
        histories.append(Run(recipe, dataset, runtime, {**config, "seed": seed}, folder, content).train())
    if arguments.runs > 1:
        print(summary(histories, pictures_of(config), dataset.name))


def run_folder(runs, name, seed):
    """A run's folder, and whether it was begun: a new one, unless torchrun has restarted the job that began it."""
    job, restarted = ranks.job()
    for last in sorted(runs.glob("*/last.pt"), reverse=True) if restarted else ():
        config = json.loads(last.with_name("config.json").read_text())
        if (config.get("job"), config.get("seed")) == (job, seed):
            return last.parent, True
    return new_folder(runs, name), False


def resume(kept, given):
    """Go on with the run kept in `kept`, a folder or its last.pt; raises UsageError for a file that does not let it and for flags that differ."""
    path = kept / "last.pt" if kept.is_dir() else kept
    if not path.is_file():
        raise UsageError(f"--resume {kept}: no run is kept there; each has a folder of its own under runs/")
    _, content = checkpoint.load(path, "cpu")
    if "progress" not in content:
        raise UsageError(f"{path} holds a network and not the state of its run; that is in last.pt")
    config = content["config"]
    with understood(path):
        settings = config["settings"]
        recipe = Recipe(**{**settings, "augmentation": Augmentation(**settings["augmentation"])})
        device = config["device"].split()[0]
        refuse_others(given, {**settings, **config, "device": device, "out": path.resolve().parent.parent, "runs": 1}, path.parent)
        config = {**config, **{name: given[name] for name in ("data_dir", "save_every") if given[name]}}
        runtime = Runtime(device, config["precision"], config["kernels"], torchrun=True)
        with runtime.ranks.in_turn():
            dataset = data.load(config["data"], config["data_dir"], runtime.device)
        if config["val_split"]:
            dataset = data.hold_out(dataset, config["val_split"])
        if [list(dataset.class_names), list(dataset.mean), list(dataset.std)] != [content[name] for name in ("class_names", "mean", "std")]:
            raise UsageError(f"{path} was trained on other pictures than {dataset.source} now holds")
        now = {"versions": versions(), "git_commit": git_commit(), "device": runtime.describe()}
        others = [f"{name} was {config[name]} and is {value}" for name, value in now.items() if config[name] != value]
        print_header(config, dataset, recipe)
    if others and runtime.ranks.rank == 0:
        print(f"warning: the run may end with other bits: {'; '.join(others)}", file=sys.stderr)
    Run(recipe, dataset, runtime, config, path.parent, content).train()


@contextlib.contextmanager
def understood(path):
    """Raise what the configuration or the state in a last.pt makes impossible as a UsageError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UsageError(f"{path} has a configuration or a state that this code does not know ({type(error).__name__}: {first_line(error)})") from None


def refuse_others(given, began, folder):
    """Raise UsageError for a flag that differs from what the run began with, names and values as in `parse`."""
    for name, value in given.items():
        if name == "data" and value and os.path.isdir(value):
            value = str(Path(value).resolve())
        if name == "out" and value:
            value = value.resolve()
        if name not in ("resume", "data_dir", "save_every") and value not in (None, "auto", began[name]):
            had = "none" if began[name] is None else began[name]
            raise UsageError(f"--{name.replace('_', '-')} {value}: the run in {folder} has {had}, and goes on with that")


class Run:
    """One run with config["seed"], from its start or from a last.pt's content; `train` leads it to its end.

    Of its files, last.pt is written after all others that go with it, so that what a kill leaves undone is done again.
    """

    def __init__(self, recipe, dataset, runtime, config, folder, content=None):
        self.recipe, self.dataset, self.runtime, self.config, self.folder = recipe, dataset, runtime, config, folder
        self.writes, self.resumed = runtime.ranks.rank == 0, content is not None
        self.command = f"{runtime.ranks.launcher()} train.py --resume {folder}"
        self.history, self.spent = [], 0.0  # and the seconds that the running epoch took before this process
        with understood(folder / "last.pt") if content else contextlib.nullcontext():
            self.seed, self.max_steps, self.save_every = config["seed"], config["max_steps"] or math.inf, config["save_every"] or math.inf
            self.trainer = Trainer(recipe, dataset, runtime, self.seed)
            self.total = min(self.trainer.schedule.total_steps, self.max_steps)
            if content:
                self.trainer.averaged.load_state_dict(content["model"])
                self.trainer.load_state_dict(content["progress"]["trainer"])
                self.history, self.spent = list(content["progress"]["history"]), content["progress"]["seconds"]
            self.best = max((row["test_accuracy"] for row in self.history), default=0.0)
            self.begun = len(self.history) * self.trainer.steps_per_epoch + (0 if self.trainer.order is None else self.trainer.done)

    def train(self):
        """Train, evaluate after every epoch, write the run's files; returns the history."""
        if self.begun >= self.total and self.trainer.order is None:
            print(f"\n{self.folder} is finished: nothing is left to do")
        else:
            onward = f", on from step {self.begun} of {self.total}" * self.resumed
            print(f"\nseed {self.seed}, {self.dataset.name}, {self.folder}{onward}\n{HEADER}", flush=True)
        with Stop() as stop:
            if self.resumed and self.writes:
                sweep(self.folder)
            elif self.writes:
                write_json(self.folder / "config.json", self.config)
                self.save()
            for epoch in range(len(self.history), self.recipe.epochs):
                done = epoch * self.trainer.steps_per_epoch
                if done >= self.max_steps:
                    break
                steps = min(self.trainer.steps_per_epoch, self.max_steps - done)
                self.history.append(self.epoch(epoch, steps, stop))
                self.tell()
                self.keep(finished=done + steps == self.total)
        kind = pictures_of(self.config)
        last, top = self.history[-1], max(self.history, key=lambda row: row["test_accuracy"])
        if self.total < self.trainer.schedule.total_steps:
            print(f"ended by --max-steps after {self.total:,} of {self.trainer.schedule.total_steps:,} steps")
        print(f"last epoch: {last['test_accuracy']:.2f} % on the {kind} pictures of {self.dataset.name} (epoch {last['epoch']})")
        print(f"best epoch: {top['test_accuracy']:.2f} % (epoch {top['epoch']}; picked by its accuracy, so a little flattered)", flush=True)
        if stop.number:
            raise Stopped(stop.number, f"{self.folder} is finished")
        return self.history

    def epoch(self, epoch, steps, stop):
        """One pass, or what is left of it, and a look at the test pictures: a row of the history."""
        self.started, self.spent = time.perf_counter() - self.spent, 0.0
        done = epoch * self.trainer.steps_per_epoch
        lr, momentum = self.trainer.schedule(done)
        bar = Progress(f"epoch {epoch + 1}/{self.recipe.epochs}", steps)

        def after_step(made):
            bar.update(made)
            step = done + made
            if self.writes and (stop.number or step % self.save_every == 0):
                self.save()
            if self.writes and stop.number:
                bar.clear()
                raise Stopped(stop.number, f"step {step} of {self.total} is saved, go on with: {self.command}")

        try:
            train_loss, train_accuracy = self.trainer.epoch(epoch, steps, after_step)
            logits = predict(self.runtime, self.trainer.averaged, self.trainer.normalize, self.dataset.test_images)
        except RunError as error:
            if stop.number and not self.writes:
                raise Stopped(stop.number, "rank 0 says how to go on") from None
            raise RunError(f"{error}; the last good state is kept: {self.command}") from None
        test_loss, test_accuracy = score(logits, self.dataset.test_labels)
        seconds = time.perf_counter() - self.started
        bar.clear()
        return {
            "epoch": epoch + 1, "lr": lr, "momentum": momentum, "train_loss": train_loss, "train_accuracy": train_accuracy,
            "test_loss": test_loss, "test_accuracy": test_accuracy, "seconds": seconds,
        }  # fmt: skip

    def tell(self):
        """Print the history's last row."""
        row = self.history[-1]
        print(
            ROW.format(
                row["epoch"], f"{row['lr']:.6f}", f"{row['momentum']:.4f}", f"{row['train_loss']:.4f}", f"{row['train_accuracy']:.2f}",
                f"{row['test_loss']:.4f}", f"{row['test_accuracy']:.2f}", f"{row['seconds']:.2f}",
            )
        )  # fmt: skip

    def keep(self, finished):
        """Write what an epoch leaves: best.pt if it is one, history.csv, curves.png if the run is finished, last.pt."""
        epoch, accuracy = len(self.history), self.history[-1]["test_accuracy"]
        if accuracy > self.best or epoch == 1:
            print(f"      accuracy improved from {self.best:.2f} to {accuracy:.2f}, saving best.pt")
            self.best = accuracy
            if self.writes:
                checkpoint.save(self.folder / "best.pt", self.trainer.averaged, self.dataset, self.config, epoch, accuracy)
                with replacing(self.folder.resolve().parent.parent / "best.pt") as temporary:
                    shutil.copyfile(self.folder / "best.pt", temporary)
        if self.writes:
            write_csv(self.folder / "history.csv", self.history)
            if finished:
                title = f"{self.dataset.name}, recipe {self.config['recipe']}, seed {self.seed}"
                plots.save(plots.curves(self.history, self.trainer.schedule, self.trainer.steps_per_epoch, title), self.folder / "curves.png")
            self.save()
        print(end="", flush=True)

    def save(self):
        """Write last.pt: all that is needed to go on from here; one rank has what every other has."""
        between = self.trainer.order is None  # epochs
        seconds = 0.0 if between else time.perf_counter() - self.started
        progress = {"trainer": self.trainer.state_dict(), "history": self.history, "seconds": seconds}
        accuracy = self.history[-1]["test_accuracy"] if between and self.history else None
        checkpoint.save(self.folder / "last.pt", self.trainer.averaged, self.dataset, self.config, len(self.history), accuracy, progress)


def pictures_of(config):
    """Which pictures a run is evaluated on, in a word."""
    return "held-out" if config["val_split"] else "test"


def summary(histories, kind, dataset_name):
    """Mean, standard deviation and each value of several runs, last and best epoch, as text."""
    lines = [f"\n{len(histories)} runs on {dataset_name}, accuracy on the {kind} pictures in %"]
    last = [history[-1]["test_accuracy"] for history in histories]
    best = [max(row["test_accuracy"] for row in history) for history in histories]
    for name, values in (("last epoch", last), ("best epoch", best)):
        each = ", ".join(f"{value:.2f}" for value in values)
        lines.append(f"{name}: mean {statistics.mean(values):.2f}, std {statistics.stdev(values):.2f} ({each})")
    return "\n".join(lines)


def print_header(config, dataset, recipe):
    print(" ".join(f"{name} {version}" for name, version in config["versions"].items()), f"commit {config['git_commit']}")
    print(f"device    {config['device']}")
    print(f"data set  {dataset.name}: {len(dataset.train_images):,} train, {len(dataset.test_images):,} {pictures_of(config)}, {dataset.num_classes} classes")
    settings = dataclasses.asdict(recipe)
    augmentation = settings.pop("augmentation")
    for name, values in ((f"recipe    {config['recipe']}:", settings), ("augment  ", augmentation)):
        told = ", ".join(f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items())
        print(textwrap.fill(f"{name} {told}", 79, subsequent_indent=" " * 10))


def git_commit():
    """The commit of this code, marked if files differ from it; "unknown" outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def new_folder(runs, name):
    """Make a folder `<time>-<name>` that no other run has."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        folder = runs / (f"{stamp}-{name}" + (f"-{attempt}" if attempt > 1 else ""))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise RunError(f"{runs} has no room for another run of {stamp}-{name}")


def write_json(path, content):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
