"""How long a training step takes, in every way that a user might run it.

    python bench.py --csv FILE            # a step of recipe default; a few minutes on a CPU
    python bench.py --only step           # on a GPU, which also measures attention by itself

per-image: images are augmented one at a time, in 2 workers of a DataLoader. eager: plain PyTorch,
--kernels torch. sdpa: eager with F.scaled_dot_product_attention. compile: eager under
torch.compile, on a GPU with max-autotune and CUDA graphs. compile+malloc: glibc keeps freed memory.
auto: what train.py runs, on a GPU the Triton kernels.

Each runs in a process of its own, in turn, round by round: other work on the machine falls on all
alike, and one that fails costs no other. A step is all that train.py does in one; `forward` and
`backward` are of the attention half of a block, with their error relative to float64.
"""

import copy
import multiprocessing
import os
import platform
import re
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

from cli import (
    Parser, ProgressBar, RunError, first_line, markdown_table, positive_int, run_script,
    writable_file, write_csv,
)  # fmt: skip

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import data
from augment import augment, epoch_plan
from runtime import Runtime, supports_bf16_matmul, tune_malloc, versions
from schedule import RECIPES
from trainer import Trainer
from vit import ViT

MODES = {
    "cpu": ["per-image", "eager", "compile", "compile+malloc", "auto"],
    "cuda": ["eager", "sdpa", "auto", "compile"],  # the last compiles for minutes
}
PARTS = {"cpu": ["step"], "cuda": ["forward", "backward", "step"]}
# Calls of a measurement, as the host runs ahead of a GPU; side of the matrices for the peak.
BLOCK, SIDE = {"cpu": 1, "cuda": 20}, {"cpu": 1024, "cuda": 8192}
WARM_UP, TIMEOUT, NAN = 3, 600, float("nan")  # measurements; seconds for a process


def augment_one_by_one(images, labels, plan, recipe, indices):
    """A batch of a DataLoader: each image by itself, as a pipeline of transforms does it."""
    one = [slice(i, i + 1) for i in indices]
    batch = [augment(images[i], plan.at(i), recipe, torch.Tensor.float) for i in one]
    return torch.cat(batch).byte(), labels[indices]


relative_error = lambda a, b: ((a.double() - b).norm() / b.norm()).item()  # b is float64
sdpa = lambda *qkv: F.scaled_dot_product_attention(*(x[None] for x in qkv))[0]  # (B H, T, D)


def make_trainer(mode, precision, recipe, dataset, device):
    """(Trainer, function that trains it for one step), as `mode` says."""
    is_cuda, loader, size = device.type == "cuda", [None], len(dataset.train_images)
    if mode == "compile+malloc" and not tune_malloc():
        raise RunError("only glibc can be told to keep freed memory")
    images, labels = dataset.train_images, dataset.train_labels
    if mode == "per-image":
        plan, size = epoch_plan(recipe, size, images.shape[2], 0, 0, "cpu"), recipe.batch_size
        collate = partial(augment_one_by_one, images, labels, plan, recipe)
        # Linux forks workers by default, but not in a spawned process.
        fork = {"multiprocessing_context": "fork"} if platform.system() == "Linux" else {}
        options = {"shuffle": True, "num_workers": 2, "collate_fn": collate, **fork}
        loader = DataLoader(range(len(labels)), size, **options)
        # The trainer has one batch, which those of the loader overwrite.
        recipe = replace(recipe, crop_padding=0, flip_p=0.0, affine_p=0.0, cutout_p=0.0)
    images, labels = (tensor[:size].clone().to(device) for tensor in (images, labels))
    dataset = replace(dataset, train_images=images, train_labels=labels)
    kernels = ("triton" if is_cuda else "auto") if mode == "auto" else "torch"
    runtime = Runtime(device.type, precision, kernels)
    trainer = Trainer(recipe, dataset, runtime, seed=1)
    for block in trainer.model.blocks if mode == "sdpa" else ():
        block.attention.attend.forward = sdpa
    if mode.startswith("compile"):
        runtime.logits = torch.compile(runtime.logits, mode="max-autotune" if is_cuda else None)
    return trainer, steps(trainer, loader).__next__


def steps(trainer, loader):
    """Train without end, a yield after each step."""
    n, (lr, momentum) = trainer.steps_per_epoch, trainer.schedule(0)
    trainer.begin_epoch(0, [lr] * n, [momentum] * n)
    while True:
        for batch in loader:
            if batch is not None:
                trainer.dataset.train_images.copy_(batch[0])
                trainer.dataset.train_labels.copy_(batch[1])
            for i in range(n):
                trainer.step(i)
                yield


def call_times(function, count, device):
    """Milliseconds of a call, in each of `count` measurements."""
    times, size = [], BLOCK[device.type]
    for _ in range(count):
        started = time.perf_counter()
        for _ in range(size):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started) / size)
    return times


def training_flops(module, *shape):
    """Floating point operations of an image, forward and backward: three forward passes."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, *shape, device=next(module.parameters()).device))
    return 3 * counter.get_total_flops()


# Each time_* returns images, operations an image, milliseconds, and another cell of the row.
def time_attention(part, mode, dtype, batch_size, device):
    """vit.Attention in CUDA graphs, forward or forward and backward; the error of its results."""
    import triton.testing  # Triton is not on every platform
    from kernels.attention import FusedAttention

    torch.manual_seed(0)
    model = ViT().to(device)
    module, (_, T, C) = model.blocks[0].attention, model.pos_embedding.shape
    exact, flops = copy.deepcopy(module).double(), training_flops(module, T, C)
    if mode == "auto":
        function = lambda x: FusedAttention.apply(x, *module.parameters(), module.heads)
    else:
        function = module.to(dtype)
        if mode == "sdpa":
            module.attend.forward = sdpa
        if mode == "compile":
            function = torch.compile(module, mode="max-autotune-no-cudagraphs")
    x = torch.randn(batch_size, T, C, device=device).to(dtype).requires_grad_()
    dz, x64 = torch.randn_like(x), x.detach().double().requires_grad_()

    def backward(function=function, module=module, x=x, dz=dz):
        z = function(x)
        # No autograd graph may outlive the call, or its capture in a CUDA graph fails.
        return z.detach(), *torch.autograd.grad(z, [x, *module.parameters()], dz)

    error = max(map(relative_error, backward(), backward(exact, exact, x64, dz.double())))
    call, flops = {
        "forward": (torch.no_grad()(lambda: function(x)), flops / 3), "backward": (backward, flops),
    }[part]  # fmt: skip
    times = triton.testing.do_bench_cudagraph(call, return_mode="all")
    return batch_size, flops, times, {"error": f"{error:.1e}"}


def time_step(mode, precision, recipe, count, device):
    """Training steps, and the first one with all that comes before it."""
    dataset = data.load_shapes((WARM_UP + count) * recipe.batch_size, 10)
    trainer, step = make_trainer(mode, precision, recipe, dataset, device)
    first, *times = call_times(step, WARM_UP + count, device)
    flops = training_flops(trainer.model, *dataset.train_images.shape[1:])
    cell = {"first_ms": f"{first * BLOCK[device.type]:.0f}"}
    return recipe.batch_size, flops, times[WARM_UP - 1 :], cell


def time_variant(args, part, variant):
    """What was measured of a part, as a dict, or a line about what failed."""
    recipe, device = RECIPES[args.recipe], args.device
    mode, _, precision = variant.rpartition("-")
    try:
        dtype, n = Runtime(device.type, precision, "torch").dtype, SIDE[device.type]
        a, b, out = torch.randn(3, n, n, device=device).to(dtype)
        peak = 2e3 * n**3 / min(call_times(lambda: torch.mm(a, b, out=out), 10, device))
        if part == "step":
            found = time_step(mode, precision, recipe, args.steps, device)
        else:
            found = time_attention(part, mode, dtype, recipe.batch_size, device)
    except Exception as error:
        return first_line(error)
    images, flops, times, cell = found
    speed = 1e3 * images / median(times)
    percent = 100 * speed * flops / peak
    return {"ms": median(times), "images_per_second": speed, "percent_of_peak": percent, **cell}


def in_process(*args):
    """time_variant(*args) in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(time_variant, *args).result(TIMEOUT)
        except Exception as error:  # it was killed, or hangs
            for process in multiprocessing.active_children():
                process.kill()
            return first_line(error)


def measure(calls, args, reference, machine):
    """Rows of the table, also written to args.csv after every call.

    `calls` maps (part, variant) to a function that does what time_variant does. Relative times are
    over those of the variant `reference` in the same round. What fails is not tried again.
    """
    samples, failures, rows = {key: [] for key in calls}, {}, []
    progress = ProgressBar("measuring", args.rounds * len(calls))
    for i, (key, call) in enumerate(list(calls.items()) * args.rounds):
        progress.update(i, " ".join(key))
        if key not in failures:
            found = call()
            if isinstance(found, dict):
                samples[key].append(found)
            else:
                failures[key] = f"failed: {found}"
            rows = [make_row(k, samples, failures, reference) for k in calls]
            if args.csv:
                write_csv(args.csv, [row | machine for row in rows])
    progress.clear()
    return rows


def make_row(key, samples, failures, reference):
    """A row of the table, nan where nothing was measured."""
    found = samples[key]
    pairs = zip(found, samples.get((key[0], reference), ()))
    ratios = [a["ms"] / b["ms"] for a, b in pairs] or [NAN]
    number = lambda name: median([sample[name] for sample in found] or [NAN])
    cells = {"error": "", "first_ms": ""} | (found[0] if found else {})
    return {
        "part": key[0], "variant": key[1], "ms": f"{number('ms'):.4g}",
        "images_per_second": f"{number('images_per_second'):.0f}",
        "relative_time": f"{median(ratios):.2f}",
        "range": f"{min(ratios):.2f} to {max(ratios):.2f}",
        "percent_of_peak": f"{number('percent_of_peak'):.1f}", "error": cells["error"],
        "first_ms": cells["first_ms"], "note": failures.get(key, ""),
    }  # fmt: skip


def measure_all(args):
    """`measure` of every variant of the device."""
    cpuinfo, is_cuda = Path("/proc/cpuinfo"), args.device.type == "cuda"
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    name = f"{name[1] if name else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    machine = {"gpu": torch.cuda.get_device_name()} if is_cuda else {}
    machine |= {"cpu": name, "cores": os.cpu_count(), **versions(), "recipe": args.recipe}
    machine |= {"rounds": args.rounds, "steps": args.steps, "date": time.strftime("%Y-%m-%d")}
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    has_bf16 = supports_bf16_matmul(args.device)
    precisions = ["fp32"] * (not is_cuda or not has_bf16) + ["bf16"] * has_bf16
    if not has_bf16:
        print("no rows in bf16, which this device does not multiply in hardware", flush=True)
    auto = f"auto-{precisions[-1]}"
    names = [f"{mode}-{p}" for mode in MODES[args.device.type] for p in precisions]
    keys = [(part, name) for part in args.only for name in names]
    return measure({key: partial(in_process, args, *key) for key in keys}, args, auto, machine)


def main():
    parser = Parser(description="Measure a training step in every way that this machine can run.")
    add = parser.add_argument
    add("--recipe", default="default", choices=["default", "original"], help="what to train")
    add("--only", action="append", choices=PARTS["cuda"], help="one part; may be repeated")
    add("--rounds", type=positive_int, default=3, help="repetitions, in turn")
    add("--steps", type=positive_int, default=15, help="steps in a round, on a GPU times 20")
    add("--csv", type=Path, metavar="FILE", help="also write the table there")
    args = parser.parse_args()
    if args.csv:
        writable_file(args.csv, "--csv")
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.only = args.only or PARTS[args.device.type]
    rows = measure_all(args)
    print(markdown_table([k.replace("_", " ") for k in rows[0]], [row.values() for row in rows]))


if __name__ == "__main__":
    run_script(main)
