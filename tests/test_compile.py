"""Every kernel of a step, compiled for GPUs that are not here: does it fit, and does it spill?

python tests/test_compile.py    # prints what each kernel takes
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")  # not on every platform

ROOT = Path(__file__).parent.parent
SHARED_LIMITS = {80: 163, 90: 227, 120: 99}  # KiB a program: A100, H100, RTX 50
# Bytes of a thread that do not fit into registers, with triton 3.6 and 3.7. Muon, of fp32 accuracy,
# spills everywhere.
SPILLED_LIMITS = {80: 128, 90: 8, 120: 128}
MUON_SPILLED_LIMITS = {80: 1280, 90: 64, 120: 1280}


def test_every_kernel_fits():
    """In bf16; to compile attention's backward in fp32, without tensor cores, takes 20 s alone."""
    # In a process of its own: in this one kernels may be interpreted.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 12 * len(SHARED_LIMITS)
    for row in rows:
        kernel = row["kernel"]
        arch = row["arch"]
        assert row["shared"] <= 1024 * SHARED_LIMITS[arch], row
        limits = MUON_SPILLED_LIMITS if kernel == "muon" else SPILLED_LIMITS
        assert row["spilled"] <= limits[arch], row
        # Products run on tensor cores. Triton's bug 11047: with more than 4 warps a barrier
        # between those that share a wgmma is missing.
        is_product = kernel not in ("head", "reduce", "adamw")
        assert (row["mma"] + row["wgmma"] > 0) == is_product, row
        assert row["wgmma"] == 0 or row["warps"] <= 4, row


# --- the process that compiles ---

launches = []  # (arch, kernel, arguments, constants); forked processes have it too


class Driver:
    """What Triton asks of a GPU in order to compile for it."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0


def record_launches():
    """Fill `launches` with what a step of one image would launch on each GPU; nothing runs."""
    # Imported here: in the process of the tests kernels may be interpreted.
    import torch

    from data import load_shapes
    from kernels.functions import Target
    from kernels.step import FusedStep
    from recipes import RECIPES
    from runtime import Runtime
    from train import Trainer

    seen = set()

    def record(kernel, *args, grid, warmup, **constants):
        arch = step.target.arch
        # Attention is compiled for all queries, and for that of the CLS token alone.
        key = (arch, kernel.__name__, constants.get("Q"))
        if key not in seen:
            seen.add(key)
            launches.append((arch, kernel, args, constants))

    recipe = replace(RECIPES["default"], batch_size=1)
    trainer = Trainer(recipe, load_shapes(1, 1), Runtime("cpu", "fp32", "torch"), 1)
    run = triton.JITFunction.run
    triton.JITFunction.run = record
    for arch in SHARED_LIMITS:
        step = FusedStep(trainer, Target(torch.bfloat16, arch))
        step.gradient(1)
        step.update_weights()
    triton.JITFunction.run = run


def compile_launch(i):
    """Return what the kernel of a launch takes of its GPU."""
    arch, kernel, args, constants = launches[i]
    triton.runtime.driver.set_active(Driver(arch))
    compiled = kernel.run(*args, grid=(1,), warmup=True, **constants)
    with tempfile.NamedTemporaryFile() as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [tool, "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout + done.stderr))
    return {
        "arch": arch,
        "kernel": kernel.__name__.removesuffix("_kernel"),
        "queries": constants.get("Q"),
        "warps": compiled.metadata.num_warps,
        "registers": int(usage["REG"]),
        "spilled": int(usage["STACK"]) + int(usage["LOCAL"]),
        "shared": compiled.metadata.shared,
        "mma": compiled.asm["ptx"].count("mma.sync"),
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
    }


def main():
    sys.path.insert(0, str(ROOT))  # the modules lie above this script
    record_launches()
    # The last launch, Muon, takes longest.
    order = reversed(range(len(launches)))
    with multiprocessing.get_context("fork").Pool() as pool:
        for row in pool.imap(compile_launch, order):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
