"""Train the channel-token ViT and keep the best and the last of it.

    python train.py                                     # CIFAR-10, recipe default, the fastest device there is
    python train.py --recipe original --data FOLDER     # the run to reproduce, on a folder of pictures
    python train.py --runs 5 --seed 1                   # five seeds, then mean and standard deviation

Every run writes best.pt, last.pt, history.csv, config.json and curves.png to a folder of its own under runs/;
best.pt beside runs/ is always the newest run's best.
"""

import dataclasses
import datetime
import json
import platform
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import numpy
import torch

import checkpoint
import data
import plots
from augment import Normalize
from cli import Parser, Progress, RunError, UsageError, add_data_arguments, add_device_arguments, output_folder, positive_float, positive_int, run, seed_int
from engine import Runtime, Trainer, predict, score
from files import replacing, write_csv
from recipe import RECIPES, build_model

ROW = "{:>5} {:>10} {:>8} {:>10} {:>9} {:>9} {:>8} {:>7}"
HEADER = ROW.format("epoch", "lr", "momentum", "train loss", "acc %", "test loss", "acc %", "seconds")


def of_recipes(field):
    """What a setting is without its flag, for --help."""
    return "(default: the recipe's: " + ", ".join(f"{name} {getattr(recipe, field)}" for name, recipe in sorted(RECIPES.items())) + ")"


def parse():
    parser = Parser(description="Train the channel-token ViT; ends with an evaluated best.pt.")
    parser.add_argument("--recipe", default="default", choices=sorted(RECIPES), help="the settings to start from; flags below override them")
    parser.add_argument("--epochs", type=positive_int, help=f"passes over the training pictures {of_recipes('epochs')}")
    parser.add_argument("--batch-size", type=positive_int, help=f"pictures a step {of_recipes('batch_size')}")
    parser.add_argument("--max-lr", type=positive_float, help=f"the schedule's peak learning rate {of_recipes('max_lr')}")
    add_data_arguments(parser)
    add_device_arguments(parser)
    parser.add_argument("--seed", type=seed_int, default=1, help="of the weights, the order of pictures and the augmentation")
    parser.add_argument("--runs", type=positive_int, default=1, help="train this many seeds, counting up from --seed")
    parser.add_argument("--max-steps", type=positive_int, help="end after this many steps, the schedule left as it is (default: none)")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="where runs/ and best.pt go")
    return parser.parse_args()


def main():
    arguments = parse()
    overrides = {name: getattr(arguments, name) for name in ("epochs", "batch_size", "max_lr") if getattr(arguments, name)}
    recipe = dataclasses.replace(RECIPES[arguments.recipe], **overrides)
    runtime = Runtime(arguments.device, arguments.precision, arguments.kernels)
    output_folder(arguments.out / "runs")
    dataset = data.load(arguments.data, arguments.data_dir, runtime.device)
    count = len(dataset.train_images)
    if recipe.batch_size > count:
        raise UsageError(f"--batch-size {recipe.batch_size} is larger than the {count} training pictures of {dataset.name}")

    config = {
        "recipe": arguments.recipe,
        "settings": dataclasses.asdict(recipe),
        "data": dataset.source,
        "dataset": dataset.name,
        "device": runtime.describe(),
        "precision": runtime.precision,
        "kernels": arguments.kernels,
        "max_steps": arguments.max_steps,
        "versions": versions(),
        "git_commit": git_commit(),
    }
    print_header(config, dataset, recipe)
    histories = []
    for seed in range(arguments.seed, arguments.seed + arguments.runs):
        histories.append(train(recipe, dataset, runtime, {**config, "seed": seed}, arguments.out))
    if arguments.runs > 1:
        print(summary(histories, dataset.name))


def train(recipe, dataset, runtime, config, out):
    """One run with config["seed"]: trains, evaluates after every epoch, writes the run's files. Returns its history."""
    seed, max_steps = config["seed"], config["max_steps"] or float("inf")
    folder = new_folder(out / "runs", f"{config['recipe']}-{dataset.name}-seed{seed}")
    print(f"\nseed {seed}, {dataset.name}, {folder}\n{HEADER}", flush=True)
    write_json(folder / "config.json", config)
    model = build_model(recipe, dataset.num_classes, seed, runtime.device)
    normalize = Normalize(dataset.mean, dataset.std, runtime.device)
    trainer = Trainer(model, dataset, recipe, runtime, normalize, seed)
    history, best = [], 0.0
    for epoch in range(recipe.epochs):
        done = epoch * trainer.steps_per_epoch
        if done >= max_steps:
            break
        steps = min(trainer.steps_per_epoch, max_steps - done)
        started = time.perf_counter()
        lr, momentum = trainer.schedule(done)
        progress = Progress(f"epoch {epoch + 1}/{recipe.epochs}", steps)
        train_loss, train_accuracy = trainer.epoch(epoch, steps, progress.update)
        test_loss, test_accuracy = score(predict(runtime, model, normalize, dataset.test_images), dataset.test_labels)
        seconds = time.perf_counter() - started
        progress.clear()
        history.append(
            {
                "epoch": epoch + 1, "lr": lr, "momentum": momentum, "train_loss": train_loss, "train_accuracy": train_accuracy,
                "test_loss": test_loss, "test_accuracy": test_accuracy, "seconds": seconds,
            }
        )  # fmt: skip
        print(
            ROW.format(
                epoch + 1, f"{lr:.6f}", f"{momentum:.4f}", f"{train_loss:.4f}", f"{train_accuracy:.2f}",
                f"{test_loss:.4f}", f"{test_accuracy:.2f}", f"{seconds:.2f}",
            )
        )  # fmt: skip
        checkpoint.save(folder / "last.pt", model, dataset, config, epoch + 1, test_accuracy)
        if test_accuracy > best or epoch == 0:
            print(f"      accuracy improved from {best:.2f} to {test_accuracy:.2f}, saving best.pt")
            best = test_accuracy
            for place in (folder, out):
                with replacing(place / "best.pt") as temporary:
                    shutil.copyfile(folder / "last.pt", temporary)
        write_csv(folder / "history.csv", history)
        print(end="", flush=True)
    title = f"{dataset.name}, recipe {config['recipe']}, seed {seed}"
    plots.save(plots.curves(history, trainer.schedule, trainer.steps_per_epoch, title), folder / "curves.png")
    top = max(history, key=lambda row: row["test_accuracy"])
    print(f"last epoch: {history[-1]['test_accuracy']:.2f} % on the test pictures of {dataset.name} (epoch {history[-1]['epoch']})")
    print(f"best epoch: {top['test_accuracy']:.2f} % (epoch {top['epoch']}; picked by its test accuracy, so a little flattered)", flush=True)
    return history


def summary(histories, dataset_name):
    """Mean, standard deviation and each value of several runs, last and best epoch, as text."""
    lines = [f"\n{len(histories)} runs on {dataset_name}, test accuracy in %"]
    last = [history[-1]["test_accuracy"] for history in histories]
    best = [max(row["test_accuracy"] for row in history) for history in histories]
    for name, values in (("last epoch", last), ("best epoch", best)):
        each = ", ".join(f"{value:.2f}" for value in values)
        lines.append(f"{name}: mean {statistics.mean(values):.2f}, std {statistics.stdev(values):.2f} ({each})")
    return "\n".join(lines)


def print_header(config, dataset, recipe):
    print(" ".join(f"{name} {version}" for name, version in config["versions"].items()), f"commit {config['git_commit']}")
    print(f"device    {config['device']}")
    print(f"data set  {dataset.name}: {len(dataset.train_images):,} train, {len(dataset.test_images):,} test, {dataset.num_classes} classes")
    settings = dataclasses.asdict(recipe)
    augmentation = settings.pop("augmentation")
    for name, values in ((f"recipe    {config['recipe']}", settings), ("augment  ", augmentation)):
        print(f"{name} " + ", ".join(f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()))


def versions():
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": numpy.__version__}
    try:
        import triton  # not on every platform, and needed by none of the code that runs without it

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found


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
