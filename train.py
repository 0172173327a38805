"""Train the channel-token ViT; ends with an evaluated best.pt.

    python train.py                                     # CIFAR-10, recipe default, best device
    python train.py --recipe original --data FOLDER     # the run to reproduce, on an image folder
    python train.py --runs 5 --seed 1                   # five seeds, then mean and std
    python train.py --resume runs/RUN                   # continue a stopped run with the same bits
    torchrun --nproc-per-node=8 train.py                # one run on eight GPUs

A run writes best.pt, last.pt, history.csv, config.json and curves.png to a folder under runs/;
best.pt beside runs/ is that of the newest run. last.pt, from which a run resumes, is written at the
start, after every epoch, every --save-every steps, and on SIGINT and SIGTERM.
"""

import argparse
import contextlib
from cli import (
    Parser, RunError, UsageError, add_data_arguments, add_device_arguments, atomic_write,
    first_line, positive_float, positive_int, printable, remove_stale_temp_files, run_script,
    seed_int, sha256, writable_dir, writable_file,
)  # fmt: skip

import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

import data
import plots
from runtime import Runtime, elastic_run_id, versions
from schedule import RECIPES, Recipe, with_overrides
from trainer import Run, Trainer, load_checkpoint

OVERRIDES = {"epochs": positive_int, "batch_size": positive_int, "max_lr": positive_float}
INVALID_STATE = LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError
# Flags that may differ from those of a resumed run.
RESUME_FLAGS = ("resume", "data_dir", "save_every")


def parse_args():
    """(args, explicit): all arguments, and those that were given, None for the others."""
    parser = Parser(description="Train the channel-token ViT; ends with an evaluated best.pt.")
    add = parser.add_argument
    add("--recipe", default="default", choices=RECIPES, help="settings, which other flags override")
    for name, type_ in OVERRIDES.items():
        values = ", ".join(f"{recipe} {getattr(r, name)}" for recipe, r in RECIPES.items())
        help = f"of the training (the recipe's: {values})"
        add(f"--{name.replace('_', '-')}", type=type_, metavar="X", help=help)
    add("--set", action="append", metavar="NAME=VALUE", help="any setting of schedule.Recipe")
    add_data_arguments(parser)
    help = "evaluate on N training images, which are not trained on, instead of the test images"
    add("--val-split", type=positive_int, metavar="N", help=help)
    help = "train on the soft targets of teacher.py, not on the labels"
    add("--teacher", metavar="FILE", help=help)
    add_device_arguments(parser)
    add("--seed", type=seed_int, default=1, help="of weights, order of images and augmentation")
    add("--runs", type=positive_int, default=1, help="number of seeds, counted up from --seed")
    add("--max-steps", type=positive_int, help="stop after these steps of an unchanged schedule")
    help = "also write last.pt within an epoch"
    add("--save-every", type=positive_int, metavar="STEPS", help=help)
    add("--resume", type=Path, metavar="RUN", help="continue a run: its folder or its last.pt")
    add("--out", type=Path, default=Path("."), metavar="DIR", help="for runs/ and best.pt")
    args = parser.parse_args()
    absent = argparse.Namespace(**dict.fromkeys(vars(args)))
    return args, vars(parser.parse_args(namespace=absent))


def main():
    args, explicit = parse_args()
    if args.resume:
        return resume(args.resume, explicit)
    overrides = [f"{n}={getattr(args, n)}" for n in OVERRIDES if getattr(args, n)]
    recipe = with_overrides(RECIPES[args.recipe], [*(args.set or []), *overrides])
    runtime = Runtime(args.device, args.precision, args.kernels, distributed=True)
    if args.teacher and not Path(args.teacher).is_file():
        raise UsageError(f"--teacher {args.teacher}: no such file; `python teacher.py` writes one")
    writable_dir(args.out / "runs")
    writable_file(args.out / "best.pt")
    names = ["recipe", "data", "data_dir", "val_split", "set", "kernels", "max_steps", "save_every"]
    config = {name: getattr(args, name) for name in names} | {
        "teacher": args.teacher and str(Path(args.teacher).resolve()),
        "settings": dataclasses.asdict(recipe),
        "device": runtime.describe(),
        "precision": runtime.precision,
        "elastic_run_id": elastic_run_id()[0],
        "versions": versions(),
        "git_commit": git_commit(),
    }
    dataset, data_sha256 = load_dataset(config, runtime)
    config |= {"data": dataset.spec, "data_sha256": data_sha256}
    config["teacher_sha256"] = sha256(dataset.teacher_logits)
    histories = []
    for seed in range(args.seed, args.seed + args.runs):
        trainer, dist = Trainer(recipe, dataset, runtime, seed), runtime.dist
        name = f"{args.recipe}-{dataset.name}-seed{seed}"
        found = find_or_create_run_dir(args.out / "runs", name, seed) if dist.rank == 0 else None
        run_dir, restarted = dist.broadcast_object(found)
        ckpt = load_checkpoint(run_dir / "last.pt", "cpu")[1] if restarted else None
        if not restarted and dist.rank == 0:
            with atomic_write(run_dir / "config.json") as temporary:
                temporary.write_text(json.dumps({**config, "seed": seed}, indent=2) + "\n")
        histories.append(fit(Run(trainer, run_dir, {**config, "seed": seed}, ckpt)))
    if args.runs > 1:
        print(summarize(histories, dataset.name))


def load_dataset(config, runtime):
    """The dataset of a run, and its fingerprint before any split; prints what the run is."""
    print(", ".join(f"{k} {v}" for k, v in versions().items()), git_commit())
    print(f"device   {runtime.describe()}")
    settings = config["settings"].items()
    values = [f"{k}={v:.6g}" if type(v) is float else f"{k}={v}" for k, v in settings]
    text = f"recipe   {config['recipe']}: {', '.join(values)}"
    print(textwrap.fill(text, 79, subsequent_indent=" " * 9), flush=True)
    with runtime.dist.local_main_first():
        dataset = data.load(config["data"], config["data_dir"], runtime.device)
    split, fingerprint = config["val_split"], dataset.fingerprint()
    dataset = data.train_val_split(dataset, split) if split else dataset
    if teacher := config["teacher"]:
        logits = data.load_teacher_logits(teacher, dataset)
        dataset = dataclasses.replace(dataset, teacher_logits=logits)
    counts = [f"{len(images):,}" for images in (dataset.train_images, dataset.test_images)]
    counts = f"{counts[0]} train, {counts[1]} {'held-out' if split else 'test'}"
    print(f"dataset  {printable(dataset.name)}: {counts}, {dataset.num_classes} classes")
    return dataset, fingerprint


def fit(run):
    """Train to the end and print the result; returns the history."""
    trainer = run.trainer
    if run.resumed and run.is_main_process:
        remove_stale_temp_files(run.run_dir)
    if run.step >= run.total_steps and not trainer.step_in_epoch:
        print(f"\n{run.run_dir} is finished: nothing is left to do")
        history = run.history
    else:
        resumed = f", resumed at step {run.step} of {run.total_steps}" * run.resumed
        print(f"\nseed {trainer.seed}, {trainer.dataset.name}, {printable(run.run_dir)}{resumed}")
        history = run.fit()
    if run.is_main_process:
        title = f"{trainer.dataset.name}, recipe {run.config['recipe']}, seed {trainer.seed}"
        args = trainer.schedule, trainer.steps_per_epoch, title, run.split
        plots.save_figure(plots.training_curves(history, *args), run.run_dir / "curves.png")
    if run.total_steps < trainer.schedule.total_steps:
        print(f"--max-steps: {run.total_steps:,} of {trainer.schedule.total_steps:,} steps")
    key, images = f"{run.split}_accuracy", {"val": "held-out", "test": "test"}[run.split]
    best = max(history, key=lambda row: row[key])
    print(f"last epoch: {history[-1][key]:.2f} % on {images} images")
    chosen = f"(epoch {best['epoch']}; chosen by it, so too high)"
    print(f"best epoch: {best[key]:.2f} % {chosen}", flush=True)
    return history


def resume(path, explicit):
    """Continue the run of a folder or its last.pt; raises UsageError for flags that differ."""
    last = path / "last.pt" if path.is_dir() else path
    if not last.is_file():
        raise UsageError(f"--resume {path}: no last.pt there; every run has a folder under runs/")
    _, ckpt = load_checkpoint(last, "cpu")
    if "train_state" not in ckpt:
        raise UsageError(f"{last} has weights only; the state of its run is in last.pt")
    config, run_dir = ckpt["config"], last.parent
    try:
        recipe, device = Recipe(**config["settings"]), config["device"].split()[0]
        out = last.resolve().parent.parent.parent
        began = {**config["settings"], **config, "device": device, "out": out, "runs": 1}
        check_resume_flags(explicit, began, run_dir)
        config = {**config, **{n: explicit[n] for n in RESUME_FLAGS[1:] if explicit[n]}}
        runtime = Runtime(device, config["precision"], config["kernels"], distributed=True)
        dataset, data_sha256 = load_dataset(config, runtime)
        if data_sha256 != config["data_sha256"]:
            raise UsageError(f"{last} was trained on other images than {dataset.spec} now has")
        if sha256(dataset.teacher_logits) != config["teacher_sha256"]:
            raise UsageError(f"{last} was trained on another file than {config['teacher']} now is")
        now = {"versions": versions(), "git_commit": git_commit(), "device": runtime.describe()}
        changed = [f"{k} was {config[k]} and is {v}" for k, v in now.items() if config[k] != v]
        run = Run(Trainer(recipe, dataset, runtime, config["seed"]), run_dir, config, ckpt)
    except INVALID_STATE as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"{last} has an invalid configuration or state ({reason})") from None
    if changed and run.is_main_process:
        print(f"warning: the bits may differ: {printable('; '.join(changed))}", file=sys.stderr)
    fit(run)


def check_resume_flags(explicit, began, run_dir):
    """Raise UsageError for a flag that differs from what the run began with."""
    for name, value in explicit.items():
        if value and (name in ("out", "teacher") or (name == "data" and os.path.isdir(value))):
            value = type(value)(Path(value).resolve())
        if name not in RESUME_FLAGS and value not in (None, "auto", began[name]):
            flag, has = f"--{name.replace('_', '-')} {value}", began[name]
            raise UsageError(f"{flag}: the run in {run_dir} has {has} and continues with it")


def find_or_create_run_dir(runs, name, seed):
    """(run_dir, restarted): a new folder, unless torchrun restarted the job that began one."""
    run_id, restarted = elastic_run_id()
    for last in sorted(runs.glob("*/last.pt"), reverse=True) if restarted else ():
        config = json.loads(last.with_name("config.json").read_text())
        if (config.get("elastic_run_id"), config.get("seed")) == (run_id, seed):
            return last.parent, True
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        run_dir = runs / (f"{stamp}-{name}" + f"-{attempt}" * (attempt > 1))
        with contextlib.suppress(FileExistsError):
            run_dir.mkdir(parents=True)
            return run_dir, False
    raise RunError(f"{runs} has no free name for another run {stamp}-{name}")


def summarize(histories, dataset_name):
    """Mean and std of last and best epoch over runs, as text."""
    key = next(name for name in ("test_accuracy", "val_accuracy") if name in histories[0][0])
    images = {"test_accuracy": "test", "val_accuracy": "held-out"}[key]
    lines = [f"\n{len(histories)} runs on {dataset_name}, accuracy on {images} images in %"]
    last = [history[-1][key] for history in histories]
    best = [max(row[key] for row in history) for history in histories]
    for name, values in (("last", last), ("best", best)):
        each = ", ".join(f"{value:.2f}" for value in values)
        mean, std = statistics.mean(values), statistics.stdev(values)
        lines.append(f"{name} epoch: mean {mean:.2f}, std {std:.2f} ({each})")
    return "\n".join(lines)


def git_commit():
    """The commit of this code, "-dirty" if files differ from it; "unknown" outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()


if __name__ == "__main__":
    run_script(main)
