"""What the compiled kernels take of GPUs that are not here: shared memory, registers, hazards."""

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
    (["sm_90"], ["backward", "muon", "mlp forward", "stem forward"], ["half"]),
    (["sm_100"], ["muon"], ["half"]),  # whose tf32x3 products become a trap there
    (["gfx942"], ["mlp backward"], ["half"]),
]
SCRIPT = """
import json, sys
import kernel_resources
for args in json.loads(sys.argv[1]):
    for row in kernel_resources.rows(*args):
        print(json.dumps(row), flush=True)
print(json.dumps(kernel_resources.COLUMNS))
"""


@pytest.fixture(scope="module")
def found():
    """Rows of kernel_resources, from a process in which kernels compile."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(COMPILED)]
    done = subprocess.run(
        command, cwd=ROOT / "results", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *rows, columns = map(json.loads, done.stdout.splitlines())
    assert all(sorted(row) == sorted(columns) for row in rows)
    return rows


def test_what_is_compiled(found):
    kernels = {(row["target"], row["dtype"], row["kernel"]) for row in found}
    assert ("sm_75", "fp32", "attention backward cls") in kernels
    assert ("sm_90", "bf16", "muon muon") in kernels
    assert all(row["registers"] > 0 and row["instructions"] > 50 for row in found)


def test_every_kernel_fits(found):
    for row in found:
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
        is_product = row["kernel"] in ("mlp backward", "stem backward", "attention backward")
        if is_product:
            has_them = row["dtype"] == "bf16" or row["target"].startswith("gfx")
            assert (row["matrix_instructions"] > 0) == has_them, row


def test_traffic_is_counted():
    """Bytes of what a mask lets through, activations as bf16; two operations a multiplication."""
    script = """
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
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command, options = [sys.executable, "-c", script], {"capture_output": True, "text": True}
    done = subprocess.run(command, cwd=ROOT / "results", env=environment, **options)
    expected = {"loaded": 2 * 200, "operations": 2 * 2 * 16**3, "stored": 2 * 1024}
    assert done.stdout == f"{expected}\n", done.stderr
