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
    (["sm_90"], ["backward", "muon", "stem forward"], ["half"]),
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


@pytest.fixture(scope="module")
def found():
    columns, rows = json.loads(run(RESOURCES, "0", json.dumps(COMPILED)))
    assert all(sorted(row) == sorted(columns) for row in rows)
    return rows


def test_every_kernel_fits(found):
    kernels = {(row["target"], row["dtype"], row["kernel"]) for row in found}
    assert ("sm_75", "fp32", "attention backward cls") in kernels
    assert ("sm_90", "bf16", "muon muon") in kernels
    for row in found:
        assert row["registers"] > 0 and row["instructions"] > 50, row
        assert 0 <= row["shared_bytes"] <= row["shared_limit"], row


def test_no_wgmma_with_more_than_four_warps(found):
    """Triton's bug 11047 leaves out a barrier between warp groups."""
    used = [row for row in found if row["wgmma"]]
    assert used and all(row["target"] == "sm_90" and row["warps"] <= 4 for row in used)


def test_no_spills_in_bf16_on_hopper(found):
    """But for Muon, whose products are of fp32 accuracy."""
    for row in found:
        if row["target"] == "sm_90" and row["dtype"] == "bf16":
            assert row["spilled_bytes"] <= (64 if row["kernel"] == "muon muon" else 0), row


def test_tensor_cores(found):
    """Half precision products run on them where Triton has them: not before sm_80."""
    for row in found:
        if row["kernel"] in ("mlp backward", "stem backward", "attention backward"):
            has_them = row["dtype"] == "bf16" or row["target"].startswith("gfx")
            assert (row["matrix_instructions"] > 0) == has_them, row


def test_traffic_is_counted():
    """Bytes of what a mask lets through, activations as bf16; two operations a multiplication."""
    expected = {"loaded": 2 * 200, "operations": 2 * 2 * 16**3, "stored": 2 * 1024}
    assert run(TRAFFIC, "1") == f"{expected}\n"
