"""Bytes and operations of every launch of a training step, counted in Triton's interpreter.

    TRITON_INTERPRET=1 python results/kernel_traffic.py

Writes kernel_traffic.csv: what the programs ask for in bf16, whatever a cache then saves. Programs
of most of the network's kernels are alike, so one of each is run.
"""

import collections
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))  # whose modules lie above this script

import torch  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

from cli import Parser, UsageError, run_script, write_csv  # noqa: E402
from data import load_shapes  # noqa: E402
from kernels.functions import INTERPRETED, Target, launch  # noqa: E402
from kernels.step import FusedStep  # noqa: E402
from kernels.verify import kernel_name, record_launches  # noqa: E402
from runtime import Runtime  # noqa: E402
from schedule import RECIPES  # noqa: E402
from trainer import Trainer  # noqa: E402

counts, half = collections.Counter(), []  # and the addresses of half-precision buffers


def num_bytes(pointers, mask):
    """Activations are fp32 in the interpreter and bf16 on a GPU."""
    first, size = int(pointers.data.flat[0]), pointers.get_element_ty().primitive_bitwidth // 8
    return int(mask.data.sum()) * (2 if any(first in span for span in half) else size)


def count(method, name, size):
    """Add size(args) to counts[name] at every call of a method of the interpreter."""
    original = getattr(InterpreterBuilder, method)

    def counted(self, *args):
        counts[name] += size(*args)
        return original(self, *args)

    setattr(InterpreterBuilder, method, counted)


def count_all():
    count("create_masked_load", "loaded", lambda pointers, mask, *_: num_bytes(pointers, mask))
    count(
        "create_masked_store", "stored", lambda pointers, _, mask, *rest: num_bytes(pointers, mask)
    )
    count("create_dot", "operations", lambda a, b, *_: 2 * a.data.size * b.data.shape[1])


def rows(recipe):
    """A dict for every launch of a step of a full batch."""
    B, runtime = RECIPES[recipe].batch_size, Runtime("cpu", "bf16", "torch")
    trainer = Trainer(RECIPES[recipe], load_shapes(B, 1), runtime, 1)
    step = FusedStep(trainer, Target(torch.bfloat16))
    activations = step.pixels, step.a, *(t for tensors in step.activations[True] for t in tensors)
    half[:] = [range(t.data_ptr(), t.data_ptr() + 4 * t.numel()) for t in activations]
    for kernel, programs, args, constants in record_launches(step, B, trainer.aux_weight > 0):
        name = kernel_name(kernel)
        alike = not name.startswith(("update", "muon", "mlp backward"))
        counts.clear()
        launch(kernel, 1 if alike else programs, *args, **constants)
        times = programs if alike else 1
        yield {
            "recipe": recipe, "batch_size": B, "kernel": name,
            "MB_loaded": f"{times * counts['loaded'] / 1e6:.2f}",
            "MB_stored": f"{times * counts['stored'] / 1e6:.2f}",
            "matrix_GFLOP": f"{times * counts['operations'] / 1e9:.2f}",
        }  # fmt: skip


def main():
    Parser(description="Count bytes and operations of the kernels.").parse_args()
    if not INTERPRETED:
        raise UsageError("set TRITON_INTERPRET=1, whose interpreter counts")
    count_all()
    found = [row for recipe in ("default", "original") for row in rows(recipe)]
    write_csv(RESULTS / "kernel_traffic.csv", found)
    for row in found:
        print(*row.values())


if __name__ == "__main__":
    run_script(main)
