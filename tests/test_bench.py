"""Every kernel compiled for three GPUs, in a process of its own, as the tests' own runs the interpreter; and bench_gpu's rows."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import bench as bench_script
import bench_gpu
import files
from cli import RunError

triton = pytest.importorskip("triton")  # not on every platform


def bench(*arguments, **environment):
    environment = {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **environment}
    return subprocess.run([sys.executable, "bench.py", *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("resources") / "resources.csv"
    done = bench("--resources", "--csv", file)
    assert done.returncode == 0, done.stderr
    rows = {(row["kernel"], row["dtype"], row["target"]): row for row in files.read_csv(file)}
    assert all(f"| {row['registers']} | {row['spilled_bytes']} |" in done.stdout for row in rows.values())
    return rows


KERNELS = [f"{part} {way}" for part in ("attention", "mlp", "stem") for way in ("forward", "backward")]


def test_every_kernel_compiles_for_every_target(rows):
    expected = {(kernel, dtype, target) for kernel in KERNELS for dtype in ("bf16", "fp32") for target in ("sm_80", "sm_90", "gfx942")}
    assert rows.keys() >= expected
    assert {kernel for kernel, _, _ in rows.keys() - expected} == {"adamw", "muon", "augment default", "augment original"}


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel != "stem backward"])
def test_no_registers_spill_in_bf16_on_sm_90(rows, kernel):
    assert rows[kernel, "bf16", "sm_90"]["spilled_bytes"] == "0"


@pytest.mark.skipif(not triton.__version__.startswith(("3.6.", "3.7.")), reason="other compilers need a few registers more")
@pytest.mark.parametrize("kernel, dtype", [(kernel, "fp32") for kernel in KERNELS[:-1]] + [("stem backward", "bf16")])
def test_nor_do_these_with_the_compilers_that_were_tried(rows, kernel, dtype):
    assert rows[kernel, dtype, "sm_90"]["spilled_bytes"] == "0"


def test_spills_are_seen_where_there_are_some(rows):
    assert int(rows["stem backward", "fp32", "sm_90"]["spilled_bytes"]) > 0  # known, and what a spill looks like


@pytest.mark.parametrize("kernel", KERNELS)
def test_bf16_products_run_on_tensor_cores(rows, kernel):
    assert all(int(rows[kernel, "bf16", target]["matrix_instructions"]) > 0 for target in ("sm_80", "sm_90", "gfx942"))
    assert int(rows[kernel, "fp32", "sm_90"]["matrix_instructions"]) == 0  # IEEE fp32, not TF32


def test_attention_forward_leaves_shared_memory_for_four_programs(rows):
    assert int(rows["attention forward", "bf16", "sm_90"]["shared_bytes"]) <= 48 * 1024
    assert int(rows["attention forward", "fp32", "sm_90"]["shared_bytes"]) <= 48 * 1024


def test_resources_are_not_read_in_the_interpreter():
    done = bench("--resources", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr == "bench.py: error: --resources compiles the kernels; unset TRITON_INTERPRET\n"


def test_half_blocks_of_pytorch_are_timed_without_a_gpu(monkeypatch):
    monkeypatch.setattr(bench_gpu, "BATCH", 2)
    rows = bench_gpu.measure(None, torch.device("cpu"))
    parts = ["attention half-block, forward", "attention half-block, forward and backward"]
    assert [(row["what"], row["way"]) for row in rows] == [(what, way) for way in ("eager", "scaled_dot_product_attention") for what in parts]
    assert all(float(row["us"]) > 0 and float(row["error"]) < bench_gpu.ALLOWED_ERROR and row["gpu"] == "none" for row in rows)
    assert all(row["bandwidth_percent"] == row["matrix_percent"] == "" for row in rows)  # no ceiling was measured


def test_a_way_that_is_wrong_or_fails_gives_no_figure(monkeypatch):
    monkeypatch.setattr(bench_gpu, "BATCH", 2)
    ways, module = bench_gpu.half_block_ways(torch.device("cpu"))
    working = ways["eager"][1]
    broken = {"wrong": (lambda x: working(x) * 1.1, working), "failing": (lambda x: x @ x, working)}
    monkeypatch.setattr(bench_gpu, "half_block_ways", lambda device: (broken, module))
    wrong, failing = bench_gpu.measure(None, torch.device("cpu"))
    assert wrong["us"] == failing["us"] == "" and wrong["range"].startswith("failed: off by 1.0e-01 from float64")
    assert failing["range"].startswith("failed: ")


def test_shares_are_of_the_measured_ceilings():
    row = bench_gpu.timed("what", (100.0, 90.0, 120.0), 1e-3, 43e6, 7.9e9, (4.3e12, 790e12))
    assert (row["us"], row["range"], row["bandwidth_percent"], row["matrix_percent"]) == ("100.0", "90.0 to 120.0", "10.0", "10.0")
    with pytest.raises(RunError, match="off by"):
        bench_gpu.timed("what", (100.0, 90.0, 120.0), float("nan"), 43e6, 7.9e9, (None, None))


def test_scaling_compares_round_by_round(tmp_path, monkeypatch, invoke):
    told = {1: [20.0, 40.0], 2: [10.0, 25.0]}
    monkeypatch.setattr(bench_script, "measure", lambda commands, rounds, **_: {ranks: [{"steps": [ms], "all_reduce": 0.5} for ms in told[ranks]] for ranks in commands})
    status, out, _ = invoke(bench_script, ["--scaling", "--rounds", 2, "--csv", tmp_path / "scaling.csv"])
    one, two = files.read_csv(tmp_path / "scaling.csv")
    assert status == 0 and "| 2 | 17.5 | 1.80 | 1.60 to 2.00 | 0.50 |" in out
    assert (one["times_one_rank_range"], one["all_reduce_ms"], two["ranks"]) == ("1.00 to 1.00", "", "2")
