"""What kernels take of GPUs that are not here, and what they load and multiply."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")  # not on every platform

from conftest import ROOT

# What takes most, for the least shared memory, for wgmma and for AMD: compiling takes seconds each.
COMPILED = [
    (["sm_75"], ["attention backward"], ["fp32"]),
    (["sm_86"], ["stem backward"], ["fp32"]),
    (["sm_90"], ["backward", "head", "muon", "stem forward"], ["half"]),
    (["sm_100"], ["muon"], ["half"]),  # whose tf32x3 products become a trap there
    (["gfx942"], ["mlp backward"], ["half"]),
]
RESOURCES = """
import json, sys
from kernel_resources import COLUMNS, rows
found = [row for args in json.loads(sys.argv[1]) for row in rows(*args)]
print(json.dumps([COLUMNS, found]))
"""
TRAFFIC = """
import torch, triton, triton.language as tl
from kernel_traffic import count_all, counts, half

@triton.jit
def kernel(x_ptr, y_ptr):
    i = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + i, mask=i < 100, other=0.0)
    tl.store(y_ptr + i, tl.dot(x, x))

count_all()
x, y = torch.zeros(2, 256)
half.append(range(x.data_ptr(), x.data_ptr() + 1024))
kernel[(2,)](x, y)
print(dict(counts))
"""


def run(script, interpret, *args):
    """stdout of a script beside the results, in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    command, options = [sys.executable, "-c", script, *args], {"capture_output": True, "text": True}
    done = subprocess.run(command, cwd=ROOT / "results", env=environment, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_kernel_fits():
    """In bf16 on Hopper none spills but Muon, of fp32 accuracy, and, by Triton 3.6, the stem."""
    columns, rows = json.loads(run(RESOURCES, "0", json.dumps(COMPILED)))
    names = {(row["target"], row["dtype"], row["kernel"]) for row in rows}
    assert ("sm_75", "fp32", "attention backward cls") in names and any(r["wgmma"] for r in rows)
    for row in rows:
        kernel, target, is_half = row["kernel"], row["target"], row["dtype"] == "bf16"
        assert sorted(row) == sorted(columns)
        assert row["registers"] > 0 and row["instructions"] > 50, row
        assert 0 <= row["shared_bytes"] <= row["shared_limit"], row
        # Triton's bug 11047 leaves out a barrier between warp groups.
        assert not row["wgmma"] or (target == "sm_90" and row["warps"] <= 4), row
        if target == "sm_90" and is_half:
            assert row["spilled_bytes"] <= {"muon muon": 64, "stem backward": 8}.get(kernel, 0), row
        if kernel in ("mlp backward", "stem backward", "attention backward"):
            # Half precision products run on tensor cores where Triton has them, from sm_80 on.
            has_them = is_half or target.startswith("gfx")
            assert (row["matrix_instructions"] > 0) == has_them, row


def test_traffic_is_counted():
    """Bytes of what a mask lets through, activations as bf16; two operations a multiplication."""
    expected = {"loaded": 2 * 200, "operations": 2 * 2 * 16**3, "stored": 2 * 1024}
    assert run(TRAFFIC, "1") == f"{expected}\n"
