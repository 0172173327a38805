"""The kernels and the training step against their peers in PyTorch; bench.py runs this, and `python bench.py` says how.

Every time is the median of repeated measurements between two CUDA events, after a warm-up. Half-blocks are replayed from
CUDA graphs, so that no way pays for the host, with inputs in the second level cache, as in training; a training step is
what a user runs. Each way is held to float64 first. Without a GPU the PyTorch half-blocks alone are timed, by the clock.
"""

import copy
import datetime
import statistics
import subprocess
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cli import Progress, RunError, first_line
from engine import Runtime, Trainer, predict, score, versions
from kernels import plain
from recipe import RECIPES
from vit import Attention

BATCH = 512
ALLOWED_ERROR = 3e-2  # of a bf16 result's norm, against float64
COLUMNS = "what", "way", "us", "range", "error", "bandwidth_percent", "matrix_percent"
COMPILED = "torch.compile max-autotune, CUDA graph"


class SdpaAttention(nn.Module):
    """vit.Attention, the same parameters, through torch's fused scaled dot-product attention."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        module, (B, T, _) = self.attention, x.shape
        H, D = module.attend.heads, module.attend.dim_head
        q, k, v = module.qkv(module.norm(x)).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)  # (B, T, 3HD) -> 3 x (B, H, T, D)
        values = F.scaled_dot_product_attention(q, k, v)
        return x + module.out(values.transpose(1, 2).reshape(B, T, H * D))


def microseconds(function, device, repeats=50, calls=20):
    """(median, lowest, highest) time of function() over `repeats` measurements of `calls` calls each."""
    times = []
    if device.type != "cuda":
        for _ in range(5):
            started = time.perf_counter()
            function()
            times.append(1e6 * (time.perf_counter() - started))
        return statistics.median(times), min(times), max(times)
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / calls)
    return statistics.median(times), min(times), max(times)


def graphed(function, device):
    """`function` as a CUDA graph's replay, warmed up; as it is without a GPU."""
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def ceilings(device):
    """Measured bytes a second of a large copy and bf16 operations a second of a large product; None without a GPU."""
    if device.type != "cuda":
        return None, None
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    copied, _, _ = microseconds(lambda: target.copy_(source), device, repeats=20, calls=5)
    multiplied, _, _ = microseconds(lambda: a @ b, device, repeats=20, calls=5)
    return 2 * source.nbytes / copied * 1e6, 2 * 8192**3 / multiplied * 1e6


def share(done, microseconds, ceiling):
    """`done` bytes or operations in that time, in percent of the measured ceiling, as text."""
    return f"{100 * done / (microseconds * 1e-6) / ceiling:.1f}" if ceiling else ""


def relative_error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


def half_block_ways(device):
    """Name -> (function of x, module whose parameters it trains), and the float32 module that they all spell."""
    torch.manual_seed(0)
    module = Attention(64, 4, 16).to(device)
    working = copy.deepcopy(module).bfloat16()
    ways = {"eager": (working, working), "scaled_dot_product_attention": (SdpaAttention(working), working)}
    if device.type == "cuda":
        from kernels import gpu  # Triton is not on every platform

        ways[COMPILED] = torch.compile(working, mode="max-autotune-no-cudagraphs"), working
        ways["ours"] = lambda x: gpu.attention(module, x), module
    return ways, module


def time_half_block(function, owner, module, device, limits):
    """Rows of one way of the attention half-block: forward, and forward with backward."""
    x = torch.randn(BATCH, 33, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(BATCH, 33, 64, device=device, dtype=torch.bfloat16)
    exact_x = x.detach().double().requires_grad_()
    exact = copy.deepcopy(module).double()(exact_x)
    result = function(x)
    error = max(
        relative_error(result.detach(), exact.detach()),
        relative_error(*(torch.autograd.grad(y, at, upstream.to(y.dtype))[0] for y, at in ((result, x), (exact, exact_x)))),
    )
    with FlopCounterMode(display=False) as counter:
        module(x[:1].float())
    operations = BATCH * counter.get_total_flops()

    def forward():
        with torch.no_grad():
            function(x)

    def both():
        torch.autograd.grad(function(x), [x, *owner.parameters()], upstream)

    # The fewest bytes: x in and z out; with the backward x, dz in and dx out as well.
    for what, run, tensors, passes in (("forward", forward, 2, 1), ("forward and backward", both, 5, 3)):
        times = microseconds(graphed(run, device), device)
        yield timed(f"attention half-block, {what}", times, error, tensors * x.nbytes, passes * operations, limits)


def step_ways(dataset, device):
    """Name -> a function that makes a fresh Trainer of recipe `default` for every way of training."""

    def make(kernels_name, graphs, forward=None):
        runtime = Runtime(device.type, "bf16", kernels_name)
        runtime.forward = forward or runtime.forward
        trainer = Trainer(RECIPES["default"], dataset, runtime, 1)
        trainer.graphs = trainer.graphs if graphs else None
        return trainer

    compiled = torch.compile(plain.forward, mode="max-autotune-no-cudagraphs")
    return {
        "eager": lambda: make("torch", graphs=False),
        COMPILED: lambda: make("triton", graphs=True, forward=compiled),  # optimizer and graph are ours, the network is not
        "ours, launched one by one": lambda: make("triton", graphs=False),
        "ours": lambda: make("triton", graphs=True),
    }


def time_step(make, device, limits):
    """The row of a whole training step: taking the pictures, augmentation, forward, loss, backward, optimizer."""
    trainer = make()
    images = torch.randn(BATCH, 3, 32, 32, device=device)
    with torch.no_grad():
        error = relative_error(trainer.runtime.logits(trainer.model, images), copy.deepcopy(trainer.model).double()(images.double()))
    with FlopCounterMode(display=False) as counter:
        trainer.model(images[:1])
    # The fewest bytes: every picture read once; a parameter, its gradient and Muon's one moment read, all but the gradient
    # written. AdamW's few parameters have a moment more.
    fewest = BATCH * 3 * 32 * 32 + 5 * 4 * sum(p.numel() for p in trainer.model.parameters())
    indices = torch.arange(BATCH, device=device)
    for _ in range(10):
        trainer.step(indices, 0, 1e-3, 0.9)
    times = microseconds(lambda: trainer.step(indices, 0, 1e-3, 0.9), device)
    yield timed(f"training step, batch {BATCH}", times, error, fewest, 3 * BATCH * counter.get_total_flops(), limits)


def time_run(make, dataset):
    """The row of a whole training with an evaluation after each epoch, by the clock, and before it a warm-up, apart."""

    def evaluate(trainer):
        return score(predict(trainer.runtime, trainer.averaged, trainer.normalize, dataset.test_images), dataset.test_labels)

    started = time.perf_counter()
    trainer = make()
    trainer.epoch(0, 5)
    evaluate(trainer)
    warm_up = time.perf_counter() - started
    trainer = make()
    started = time.perf_counter()
    for epoch in range(trainer.recipe.epochs):
        trainer.epoch(epoch, trainer.steps_per_epoch)
        _, accuracy = evaluate(trainer)  # a number on the host, so the device is done
    seconds = time.perf_counter() - started
    note = f"n = 1; {warm_up:.2f} s of warm-up before; {accuracy:.2f} % on {dataset.name}"
    yield {"what": f"{trainer.recipe.epochs} epochs and evaluations", "us": f"{1e6 * seconds:.0f}", "range": note}


def timed(what, times, error, fewest_bytes, operations, limits):
    """A row of results, once the error is one of rounding."""
    if not error <= ALLOWED_ERROR:
        raise RunError(f"off by {error:.1e} from float64")
    median, low, high = times
    return {
        "what": what, "us": f"{median:.1f}", "range": f"{low:.1f} to {high:.1f}", "error": f"{error:.1e}",
        "bandwidth_percent": share(fewest_bytes, median, limits[0]), "matrix_percent": share(operations, median, limits[1]),
    }  # fmt: skip


def measure(dataset, device):
    """All rows, with device, driver, versions and date; without a GPU those of PyTorch's half-blocks. `dataset` is on `device`."""
    limits, machine = ceilings(device), describe(device)
    ways, module = half_block_ways(device)
    parts = [(name, lambda way=way: time_half_block(*way, module, device, limits)) for name, way in ways.items()]
    if device.type == "cuda":
        machine |= {"copy_gb_per_s": f"{limits[0] / 1e9:.0f}", "matrix_tflops": f"{limits[1] / 1e12:.0f}"}
        ways = step_ways(dataset, device)
        parts += [(name, lambda make=make: time_step(make, device, limits)) for name, make in ways.items()]
        parts += [(name, lambda make=make: time_run(make, dataset)) for name, make in ways.items()]
    rows, progress = [], Progress("measuring", len(parts))
    for done, (name, part) in enumerate(parts):
        progress.update(done, name)
        try:
            made = list(part())
        except Exception as error:  # one way that fails must not cost the others' figures
            made = [{"range": f"failed: {first_line(error)}"}]
        rows += [{**dict.fromkeys(COLUMNS, ""), "way": name, **row, **machine} for row in made]
    progress.clear()
    return rows


def describe(device):
    """Device, driver, versions and date, for a row of a results file."""
    driver = name = "none"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        try:
            asked = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=True)
            driver = asked.stdout.splitlines()[0].strip()
        except (OSError, subprocess.SubprocessError, IndexError):
            driver = "unknown"
    return {"gpu": name, "driver": driver, **versions(), "date": datetime.date.today().isoformat()}
