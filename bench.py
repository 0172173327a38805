"""Measure a training step in PyTorch, under torch.compile, and as train.py runs it.

    python bench.py                                  # recipe default; a few minutes on a CPU
    python bench.py --recipe original --csv FILE
    python bench.py --variants auto                  # what train.py runs alone

`eager` is plain PyTorch, `--kernels torch` of train.py. `compile` is that under torch.compile, on a
GPU with mode="max-autotune", whose CUDA graphs hold the forward and the backward pass. `auto` is
what train.py runs with the same flags: on a GPU the Triton kernels, in CUDA graphs.

The variants are trained in one process and take turns, so that other work on the machine falls on
all alike. A round is an epoch of generated images with all that train.py does in it: the random
plan, augmentation, forward, backward and update. On a CPU glibc keeps freed memory for all of them.
"""

import os
import platform
import re
import statistics
import time
from pathlib import Path

import torch

import data
from cli import Parser, ProgressBar, RunError, add_runtime_arguments, first_line, markdown_table
from cli import positive_int, run_script, writable_file, write_csv
from recipes import RECIPES
from runtime import Runtime, tune_process, versions
from train import Trainer

VARIANTS = ["eager", "compile", "auto"]


def make_trainer(variant, recipe, dataset, args):
    """Return a Trainer of a variant."""
    kernels = args.kernels if variant == "auto" else "torch"
    runtime = Runtime(args.device, args.precision, kernels)
    if variant == "compile":
        mode = "max-autotune" if runtime.device.type == "cuda" else None
        runtime.logits = torch.compile(runtime.logits, mode=mode)
    return Trainer(recipe, dataset, runtime, seed=1)


def train_epoch(trainer, epoch):
    trainer.begin_epoch(epoch)
    for i in range(trainer.steps_per_epoch):
        trainer.step(i)
    trainer.end_epoch()  # reads the loss, so it waits for the device


def time_epoch(trainer):
    """Train the first epoch, maybe once more; return seconds."""
    started = time.perf_counter()
    train_epoch(trainer, 0)
    return time.perf_counter() - started


def make_row(variant, times, auto_times, batch_size, steps):
    """Return a row of the table from the seconds of each round."""
    ms = 1e3 * statistics.median(times) / steps
    row = {
        "variant": variant,
        "ms_per_step": f"{ms:.4g}",
        "images_per_s": f"{1e3 * batch_size / ms:.0f}",
        "time_over_auto": "",
        "range": "",
    }
    if auto_times:
        ratios = [a / b for a, b in zip(times, auto_times)]
        row["time_over_auto"] = f"{statistics.median(ratios):.2f}"
        row["range"] = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return row


def describe_machine(device):
    """Return what the figures depend on, by name."""
    cpu = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*: (.*)", cpuinfo.read_text())
        if found:
            cpu = found[1]
    machine = {"device": device.type}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    machine["cpu"] = cpu
    machine["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    machine["cores"] = os.cpu_count()
    machine["threads"] = torch.get_num_threads()
    return machine | versions() | {"date": time.strftime("%Y-%m-%d")}


def parse_args():
    parser = Parser(description="Measure a training step against PyTorch and torch.compile.")
    add = parser.add_argument
    add("--recipe", default="default", choices=RECIPES, help="what to train")
    add("--variants", nargs="+", choices=VARIANTS, help="what to measure (default: all)")
    add("--rounds", type=positive_int, default=5, help="how often each is measured")
    help = "of a round (default: 20 on a CPU, elsewhere those of 50,000 images)"
    add("--steps", type=positive_int, metavar="N", help=help)
    add("--csv", type=Path, metavar="FILE", help="also write the table there")
    add_runtime_arguments(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    if args.csv:
        writable_file(args.csv, "--csv")
    recipe = RECIPES[args.recipe]
    runtime = Runtime(args.device, args.precision, args.kernels)
    steps = args.steps
    tune_process(runtime.device)
    if runtime.device.type == "cpu":
        steps = steps or 20
    else:
        steps = steps or 50_000 // recipe.batch_size
    machine = describe_machine(runtime.device)
    machine |= {"recipe": args.recipe, "precision": runtime.precision}
    machine |= {"rounds": args.rounds, "steps": steps}
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)

    # The first epoch compiles kernels and captures graphs, and does not count.
    dataset = data.load_shapes(steps * recipe.batch_size, 10).to(runtime.device)
    trainers = {}
    for variant in args.variants or VARIANTS:
        try:
            trainers[variant] = make_trainer(variant, recipe, dataset, args)
            seconds = time_epoch(trainers[variant])
        except RuntimeError as error:  # torch.compile needs a C++ compiler
            if variant != "compile":
                raise
            advice = "to measure without it: --variants eager auto"
            raise RunError(f"torch.compile: {first_line(error)}; {advice}") from None
        print(f"{variant}: first epoch {seconds:.1f} s", flush=True)

    # The variants take turns.
    times = {variant: [] for variant in trainers}
    with ProgressBar("round", args.rounds) as progress:
        for done in range(args.rounds):
            for variant, trainer in trainers.items():
                times[variant].append(time_epoch(trainer))
            progress.update(done + 1)
    rows = []
    for variant in trainers:
        row = make_row(variant, times[variant], times.get("auto"), recipe.batch_size, steps)
        rows.append(row)

    head = [name.replace("_", " ") for name in rows[0]]
    print(markdown_table(head, [row.values() for row in rows]))
    if args.csv:
        write_csv(args.csv, [row | machine for row in rows])


if __name__ == "__main__":
    run_script(main)
