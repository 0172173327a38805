"""How fast a training step is, measured in one run, and what the kernels take of a GPU.

    python bench.py                          # on a GPU: kernels, steps and whole runs; else every way of training on the CPU
    python bench.py --csv results/bench.csv
    python bench.py --resources              # registers, shared memory and instructions of every kernel; no GPU needed
    python bench.py --scaling                # the same step on one and on two ranks of this CPU

On a CPU each way runs in a process of its own, round after round in turn, so that what else the machine does falls on all
of them alike. A step is everything: taking the pictures, augmentation, forward, loss, backward, optimizer.

What to expect on 8 GPUs and on 2 nodes is reasoned here and was not measured. A step talks once, within its graph: 74,348 fp32
numbers, of which a ring of 8 or 16 GPUs sends each one's 0.5 MB, 2 us at 300 GB/s within a node, 11 us at 50 GB/s between
nodes. Its 14 or 30 hops, some microseconds each, and five more kernels (scale, concatenate, reduce, copy back, count what is
finite) cost more, whatever the batch: tens of microseconds a step. So with 512 pictures over all GPUs, too few to fill one,
expect little of more of them; with 512 on each, nearly as many times the pictures a second, of batches that want a recipe of
their own.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import bench_gpu
import data
from bench_gpu import BATCH
from cli import Parser, Progress, RunError, UsageError, add_data_arguments, output_file, positive_int, run
from engine import Runtime, Trainer
from files import markdown, write_csv
from recipe import RECIPES

WARM_UP = 3  # steps before the timed ones
# Name -> (kernels, precision) of engine.Runtime. `torch` does nothing but call vit.py's modules.
WAYS = {
    "per-picture augmentation, DataLoader, 2 workers, eager fp32": ("torch", "fp32"),
    "eager fp32": ("torch", "fp32"),
    "eager bf16": ("torch", "bf16"),
    "--kernels auto, fp32": ("auto", "fp32"),
    "--kernels auto, bf16": ("auto", "bf16"),
}
PER_PICTURE, PLAIN, *_, OURS = WAYS


class PerPicture(torch.utils.data.Dataset):
    """The original recipe's augmentation as the original ran it: a picture at a time, in NumPy and Pillow, in workers."""

    def __init__(self, images, labels, normalize):
        self.images, self.labels = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()  # (N, 32, 32, 3)
        self.mean, self.std = normalize.mean.view(3).numpy(), normalize.std.view(3).numpy()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        random = np.random.default_rng()
        image = np.roll(self.images[i], tuple(random.integers(-4, 5, 2)), axis=(0, 1))  # wrap, pad and crop
        if random.random() < 0.45:
            image = image[:, ::-1]
        if random.random() < 0.5:
            image = self.warp(image, random)
        image = (image.astype(np.float32) - self.mean) / self.std
        if random.random() < 0.65:
            y, x = random.integers(0, 25, 2)
            image[y : y + 8, x : x + 8] = 0
        return torch.from_numpy(image.transpose(2, 0, 1).copy()), self.labels[i]

    @staticmethod
    def warp(image, random):
        angle, scale = np.radians(random.uniform(-15, 15)), random.uniform(0.8, 1.2)
        down, right = random.uniform(-0.07 * 32, 0.07 * 32, 2)
        cos, sin, centre = np.cos(angle) / scale, np.sin(angle) / scale, 12 + 15.5
        tiled = Image.fromarray(np.pad(image, ((12, 12), (12, 12), (0, 0)), mode="wrap"))
        matrix = (cos, sin, centre - cos * (15.5 + right) - sin * (15.5 + down), -sin, cos, centre + sin * (15.5 + right) - cos * (15.5 + down))
        return np.asarray(tiled.transform((32, 32), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))


def time_way(name, steps):
    """Milliseconds of the first step, of each timed one and of an all-reduce, this way, in this process, a rank or alone."""
    kernels_name, precision = WAYS[name]
    runtime = Runtime("cpu", precision, kernels_name, torchrun=True)
    dataset = data.load_shapes(train=(WARM_UP + steps) * BATCH, test=10)
    trainer = Trainer(RECIPES["original"], dataset, runtime, 1)
    update = per_picture_updates(trainer) if name == PER_PICTURE else batched_updates(trainer)
    talk = torch.zeros(sum(p.numel() for p in trainer.model.parameters()) + 2)
    times = milliseconds(update)
    return {"first": times[0], "steps": times[WARM_UP:], "all_reduce": statistics.median(milliseconds(runtime.ranks.add_up(talk) for _ in range(50)))}


def milliseconds(work):
    """How long each item of an iterable lets wait."""
    times, started = [], time.perf_counter()
    for _ in work:
        times.append(1e3 * (time.perf_counter() - started))
        started = time.perf_counter()
    return times


def batched_updates(trainer):
    """One epoch of training steps, a yield after each."""
    order = torch.randperm(trainer.count, generator=trainer.generator)
    for i, indices in enumerate(order.split(BATCH)):
        trainer.step(indices, 0, *trainer.schedule(i))
        yield


def per_picture_updates(trainer):
    """The same with a DataLoader in front."""
    pictures = PerPicture(trainer.dataset.train_images, trainer.dataset.train_labels, trainer.normalize)
    loader = torch.utils.data.DataLoader(pictures, BATCH, shuffle=True, num_workers=2)
    for images, labels in loader:
        loss = F.cross_entropy(trainer.model(images), labels)
        loss = loss + trainer.recipe.l1 * sum(p.abs().sum() for p in trainer.model.parameters())
        trainer.optimizer.zero_grad()
        loss.backward()
        trainer.optimizer.step()
        yield


def measure(commands, rounds, **environment):
    """Name -> what `time_way` told of each round, in turn, each in a fresh process; `commands` are by name."""
    results = {name: [] for name in commands}
    progress = Progress("measuring", rounds * len(commands))
    for i in range(rounds):
        for j, (name, command) in enumerate(commands.items()):
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
            if done.returncode:
                words = [line for line in done.stderr.splitlines() if line.strip("= ")]
                raise RunError(f"{name}: {(words or ['it failed without a word'])[-1]}")
            results[name].append(json.loads(done.stdout))
            progress.update(i * len(commands) + j + 1, name)
    progress.clear()
    return results


def median_steps(told):
    """Of each round, the median step's milliseconds."""
    return [statistics.median(each["steps"]) for each in told]


def ratios(others, ours):
    """Median and range, as text, of how many times as long the others took, round by round."""
    times = [theirs / our for theirs, our in zip(others, ours)]
    return f"{statistics.median(times):.2f}", f"{min(times):.2f} to {max(times):.2f}"


def report(results, machine):
    """Rows of the table: each way's step, pictures a second and speed against the two old ways, pair by pair."""
    rows = []
    for name, told in results.items():
        steps = median_steps(told)
        row = {"way": name, "ms_per_step": f"{statistics.median(steps):.1f}", "pictures_per_second": f"{BATCH * 1e3 / statistics.median(steps):.0f}"}
        for key, other in (("times_plain", PLAIN), ("times_per_picture", PER_PICTURE)):
            row[key], row[key + "_range"] = ratios(median_steps(results[other]), steps)
        row["first_step_ms"] = f"{statistics.median(each['first'] for each in told):.0f}"
        rows.append({**row, **machine})
    return rows


def table(rows, columns):
    """Rows as text; a column is headed by its name in words."""
    return markdown([column.replace("_", " ") for column in columns], [[row[column] for column in columns] for row in rows])


def resources():
    """Rows of what every kernel takes on every target, as they are compiled."""
    try:
        from kernels import functions, resources  # Triton is not on every platform
    except ImportError as error:
        raise RunError(f"--resources needs Triton ({error})") from None
    if functions.INTERPRETED:
        raise UsageError("--resources compiles the kernels; unset TRITON_INTERPRET")
    return resources.rows(), resources.COLUMNS


def cpu_name():
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(rounds, steps):
    """Where and how often the CPU was measured, printed and returned."""
    told = {
        "cpu": cpu_name(), "cores": os.cpu_count(), "torch": str(torch.__version__),
        "date": datetime.date.today().isoformat(), "rounds": rounds, "steps": steps,
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in told.items()))
    return told


def on_cpu(rounds, steps):
    """Rows of every way of training on this machine's CPU."""
    commands = {name: [sys.executable, __file__, "--way", name, "--steps", str(steps)] for name in WAYS}
    columns = ("way", "ms_per_step", "pictures_per_second", "times_plain", "times_plain_range", "times_per_picture", "first_step_ms")
    where = machine(rounds, steps)
    return report(measure(commands, rounds), where), columns


def scaling(rounds, steps):
    """Rows of our way of training on one and on two ranks of this CPU, a thread each: 512 pictures a step, over all ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    commands = {ranks: [*torchrun, str(ranks), __file__, "--way", OURS, "--steps", str(steps)] for ranks in (1, 2)}
    where = machine(rounds, steps)
    results, rows = measure(commands, rounds, OMP_NUM_THREADS="1"), []
    for ranks, told in results.items():
        row = {"ranks": ranks, "ms_per_step": f"{statistics.median(median_steps(told)):.1f}"}
        row["times_one_rank"], row["times_one_rank_range"] = ratios(median_steps(results[1]), median_steps(told))
        row["all_reduce_ms"] = f"{statistics.median(each['all_reduce'] for each in told):.2f}" if ranks > 1 else ""
        rows.append({**row, **where})
    return rows, ("ranks", "ms_per_step", "times_one_rank", "times_one_rank_range", "all_reduce_ms")


def main():
    parser = Parser(description="Measure a training step of 512 pictures every way that this machine can take.")
    parser.add_argument("--rounds", type=positive_int, default=5, help="on a CPU: how often each way is measured, in turn")
    parser.add_argument("--steps", type=positive_int, default=15, help="on a CPU: timed steps a round; the median counts")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table there (default: nowhere)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--resources", action="store_true", help="instead, compile every kernel for three GPUs and tell what it takes of them")
    instead.add_argument("--scaling", action="store_true", help="instead, measure our way on one and on two ranks of this CPU, a thread each")
    instead.add_argument("--way", choices=list(WAYS), metavar="WAY", help="measure this one way of the table once, on the CPU in this process, and print JSON (default: all)")
    add_data_arguments(parser, default="shapes")
    arguments = parser.parse_args()
    if arguments.csv:
        output_file(arguments.csv, "--csv")
    if arguments.way:
        return print(json.dumps(time_way(arguments.way, arguments.steps)))
    if arguments.resources:
        rows, columns = resources()
    elif arguments.scaling:
        rows, columns = scaling(arguments.rounds, arguments.steps)
    elif torch.cuda.is_available():
        device = torch.device("cuda")
        rows, columns = bench_gpu.measure(data.load(arguments.data, arguments.data_dir, device), device), bench_gpu.COLUMNS
        print(", ".join(f"{name} {value}" for name, value in rows[0].items() if name not in columns))
    else:
        print(table(bench_gpu.measure(None, torch.device("cpu")), ("what", "way", "us", "range", "error")))
        print("\nNothing was measured on a GPU: this machine, or this build of torch, has none.\n")
        rows, columns = on_cpu(arguments.rounds, arguments.steps)
    rows = list(rows)
    print(table(rows, columns))
    if arguments.csv:
        write_csv(arguments.csv, rows)


if __name__ == "__main__":
    run(main)
