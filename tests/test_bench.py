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
    return Namespace(recipe="default", steps=2, device="cpu", only=["step"], **only)


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
    (sample,), failure = bench.time_variant(tiny, "step", variant)
    assert failure is None and sample["part"] == "step"
    assert float(sample["error"]) < (0.05 if "bf16" in variant else 1e-5)
    assert sample["images_per_second"] == pytest.approx(4000 / sample["ms"])
    assert sample["percent_of_peak"] > 0 and float(sample["first_ms"]) > 0


@pytest.mark.parametrize("mode", ["eager", "sdpa", "auto"])
def test_half_blocks_agree_with_float64(monkeypatch, mode):
    """The half-blocks of a GPU, on a CPU; the fused one in Triton's interpreter."""
    testing = pytest.importorskip("triton.testing")
    results = []
    fake = lambda call, return_mode: results.append(call()) or [1.0]
    monkeypatch.setattr(testing, "do_bench_cudagraph", fake)
    dtype = torch.float32 if mode == "auto" else torch.bfloat16
    forward, backward = bench.time_attention(mode, dtype, 2, torch.device("cpu"))
    assert (forward[0], backward[0]) == ("attention forward", "attention with backward")
    assert backward[2] == 3 * forward[2] > 0  # operations
    assert float(backward[4]["error"]) < (1e-5 if mode == "auto" else 0.05)
    assert not any(tensor.requires_grad for tensor in (results[0], *results[1]))


def test_a_failure_costs_its_own_row(tiny, tmp_path):
    """Relative times are round by round; what a failing variant measured before is kept."""
    tiny.csv, ms = tmp_path / "bench.csv", iter([20.0, 10.0, 60.0, 20.0])

    def works():
        text = {"images_per_second": 1.0, "percent_of_peak": 50.0, "error": "1e-3", "first_ms": "9"}
        return [{"part": "step", "ms": next(ms), **text}], None

    calls = {("step", "slow"): works, ("step", "auto"): works}
    slow, _ = bench.measure(calls, tiny, "auto", {"cpu": "x"})
    assert (slow["ms"], slow["relative_time"], slow["range"]) == ("40", "2.50", "2.00 to 3.00")
    calls["step", "broken"] = lambda: ([], "no compiler")
    calls["attention", "half"] = lambda: ([works()[0][0] | {"part": "forward"}], "no backward")
    tiny.rounds, ms = 1, iter([20.0, 10.0, 7.0])
    bench.measure(calls, tiny, "auto", {"cpu": "x"})
    slow, auto, half, broken, failed = read_csv(tiny.csv)
    assert (slow["ms"], slow["relative_time"], auto["relative_time"]) == ("20", "2.00", "1.00")
    assert (half["part"], half["ms"], half["relative_time"]) == ("forward", "7", "nan")
    assert (broken["ms"], broken["note"]) == ("nan", "failed: no compiler")
    assert (failed["part"], failed["note"]) == ("attention", "failed: no backward")


def test_what_was_measured_before_a_failure_is_kept(tiny, monkeypatch):
    def time_attention(*args):
        yield "attention forward", 4, 1.0, [2.0], {}
        raise RuntimeError("no capture\nand more")

    monkeypatch.setattr(bench, "time_attention", time_attention)
    (sample,), failure = bench.time_variant(tiny, "attention", "eager-fp32")
    assert (sample["ms"], failure) == (2.0, "no capture")


def test_every_variant_runs_in_its_own_process(tiny, tmp_path, monkeypatch, invoke):
    monkeypatch.setitem(bench.MODES, "cpu", ["eager"])
    monkeypatch.setattr(bench, "supports_bf16_matmul", lambda device: False)
    parts = "--only", "step", "--only", "attention"  # a CPU has no CUDA graphs: it fails
    args = [*parts, "--rounds", 1, "--steps", 1, "--csv", tmp_path / "bench.csv"]
    status, out, err = invoke(bench, args)
    assert (status, err) == (0, "") and "no rows in bf16" in out
    step, attention = read_csv(tmp_path / "bench.csv")
    assert step["variant"] == "eager-fp32" and float(step["ms"]) > 0 and step["recipe"] == "default"
    assert step["note"] == "" and attention["note"].startswith("failed: ")
    assert f"| step | eager-fp32 | {step['ms']} |" in out
    monkeypatch.setattr(bench, "TIMEOUT", 0.1)
    assert bench.in_process(tiny, "step", "auto-fp32") == ([], "TimeoutError")
