"""bench.py: what its variants compute, its table, and that a failure costs one row."""

import dataclasses
from argparse import Namespace

import pytest
import torch

import bench
from augment import augment, epoch_plan
from cli import read_csv
from schedule import RECIPES


@pytest.fixture
def tiny(monkeypatch):
    """A recipe with batches of 4; bench's matrix product is small."""
    recipe = dataclasses.replace(RECIPES["default"], batch_size=4)
    monkeypatch.setitem(RECIPES, "default", recipe)
    monkeypatch.setitem(bench.SIDE, "cpu", 16)
    only = {"csv": None, "rounds": 2}
    return Namespace(recipe="default", steps=2, device=torch.device("cpu"), only=["step"], **only)


def test_per_image_augmentation(small):
    """What augment makes of the batch, but for normalization."""
    images, labels, recipe = small.train_images[:6], small.train_labels[:6], RECIPES["original"]
    plan = epoch_plan(recipe, 6, 32, 0, 0, "cpu")
    batch, found = bench.augment_one_by_one(images, labels, plan, recipe, [5, 1])
    rows = plan.at([5, 1])
    expected = augment(images[[5, 1]], rows, recipe, torch.Tensor.float).byte()
    assert torch.equal(batch, expected) and found.tolist() == labels[[5, 1]].tolist()


@pytest.mark.parametrize("variant", ["per-image-fp32", "eager-bf16", "auto-fp32"])
def test_a_variant_trains_and_is_measured(tiny, variant):
    sample = bench.time_variant(tiny, "step", variant)
    assert sample["images_per_second"] == pytest.approx(4000 / sample["ms"])
    assert sample["percent_of_peak"] > 0 and float(sample["first_ms"]) > 0
    assert bench.time_variant(tiny, "step", "eager-fp64") == "'fp64'"


@pytest.mark.parametrize("mode", ["eager", "sdpa", "auto"])
def test_half_blocks_agree_with_float64(monkeypatch, mode):
    """The half-blocks of a GPU, on a CPU; the fused one in Triton's interpreter."""
    testing = pytest.importorskip("triton.testing")
    results = []
    fake = lambda call, return_mode: results.append(call()) or [1.0]
    monkeypatch.setattr(testing, "do_bench_cudagraph", fake)
    args = mode, torch.float32 if mode == "auto" else torch.bfloat16, 2, torch.device("cpu")
    forward, backward = (bench.time_attention(part, *args) for part in ("forward", "backward"))
    assert backward[1] == 3 * forward[1] > 0  # operations
    assert float(backward[3]["error"]) < (1e-5 if mode == "auto" else 0.05)
    assert not any(tensor.requires_grad for tensor in (results[0], *results[1]))


def test_a_failure_costs_its_own_row(tiny, tmp_path):
    """Relative times are round by round; what a failing variant measured before is kept."""
    tiny.csv = tmp_path / "bench.csv"

    def variant(*results):
        found = iter(results)
        text = {"images_per_second": 1.0, "percent_of_peak": 50.0, "first_ms": "9"}
        return lambda: r if isinstance(r := next(found), str) else {"ms": r, **text}

    slow, auto, broken = variant(20.0, 60.0), variant(10.0, 20.0), variant(7.0, "no compiler")
    calls = {("step", "slow"): slow, ("step", "auto"): auto, ("step", "broken"): broken}
    bench.measure(calls, tiny, "auto", {"cpu": "x"})
    slow, auto, broken = read_csv(tiny.csv)
    assert (slow["ms"], slow["relative_time"], slow["range"]) == ("40", "2.50", "2.00 to 3.00")
    assert (auto["ms"], auto["relative_time"], auto["cpu"], auto["note"]) == ("15", "1.00", "x", "")
    assert (broken["ms"], broken["note"]) == ("7", "failed: no compiler")


def test_every_variant_runs_in_its_own_process(tiny, tmp_path, monkeypatch, invoke):
    monkeypatch.setitem(bench.MODES, "cpu", ["eager"])
    monkeypatch.setattr(bench, "supports_bf16_matmul", lambda device: False)
    parts = "--only", "step", "--only", "forward"  # a CPU has no CUDA graphs: it fails
    args = [*parts, "--rounds", 1, "--steps", 1, "--csv", tmp_path / "bench.csv"]
    status, out, err = invoke(bench, args)
    assert (status, err) == (0, "") and "no rows in bf16" in out
    step, forward = read_csv(tmp_path / "bench.csv")
    assert step["variant"] == "eager-fp32" and float(step["ms"]) > 0 and step["recipe"] == "default"
    assert step["note"] == "" and forward["note"].startswith("failed: ")
    assert f"| step | eager-fp32 | {step['ms']} |" in out
    monkeypatch.setattr(bench, "TIMEOUT", 0.1)
    assert bench.in_process(tiny, "step", "auto-fp32") == "TimeoutError"
