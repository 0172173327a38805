"""Two ranks of gloo against one process and against each other, a killed rank, and devices.

`torchrun tests/test_runtime.py FOLDER` is what each rank runs for the first of these tests.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT, make_trainer, only_run, write_images

import data
import runtime
import train
import trainer as trainer_module
from cli import UsageError, read_csv, sha256
from runtime import Distributed, Runtime, tune_malloc
from schedule import RECIPES
from trainer import Trainer, build_model, load_checkpoint, predict

STEPS = 20
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def train_steps(distributed):
    """The losses of recipe original at a tenth of its lr, then logits and weights.

    The last batch of an epoch has 7 images; ranks start from other weights than rank 0. At the full
    lr training is unstable with such small batches, and rounding grows tenfold every few steps.
    """
    dataset = data.load_shapes(4 * 64 + 7, 1200)
    recipe = dataclasses.replace(RECIPES["original"], batch_size=64, max_lr=0.003)
    runtime = Runtime("cpu", "fp32", distributed=distributed)

    def other_init(recipe, num_classes, seed, device):
        return build_model(recipe, num_classes, seed + runtime.dist.rank, device)

    with mock.patch("trainer.build_model", other_init):
        trainer, losses = Trainer(recipe, dataset, runtime, 1), []

    def after_step():
        losses.append(trainer.totals[0].item())

    for _ in range(STEPS // trainer.steps_per_epoch):
        trainer.train_epoch(trainer.steps_per_epoch, after_step)
    logits = predict(runtime, trainer.model, trainer.normalize, dataset.test_images)
    return {"losses": losses, "logits": logits, "weights": trainer.model.state_dict()}


def torchrun_env():
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def test_two_ranks_train_like_one_process_and_like_each_other(tmp_path):
    command = [*TORCHRUN, __file__, tmp_path]
    result = subprocess.run(command, env=torchrun_env(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert sha256(first) == sha256(second)
    alone = train_steps(distributed=False)
    assert len(alone["losses"]) == STEPS
    for a, b in zip(alone["losses"], first["losses"]):
        assert a == pytest.approx(b, rel=1e-5)


class FakeRank(Distributed):
    """Rank `rank` of `world_size`, which records what it would reduce."""

    def __init__(self, rank, world_size):
        super().__init__()
        self.rank, self.world_size, self.recorded = rank, world_size, []

    def all_reduce_sum(self, tensor):
        self.recorded.append(tensor.clone())
        return tensor


@pytest.mark.parametrize("count, world_size", [(10, 3), (2, 3), (8, 2)])
def test_uneven_shards_sum_to_the_whole_batch(small, count, world_size):
    """Also where a rank has no image: one all_reduce a step, of gradients, loss and correct."""
    recipe = dataclasses.replace(RECIPES["original"], batch_size=count, l1=0.0)
    reduced = []
    for rank in range(world_size):
        trainer = make_trainer(small, recipe, precision="fp32")
        trainer.runtime.dist = FakeRank(rank, world_size)
        trainer.begin_epoch(0, [0.0] * 300, [0.9] * 300)
        trainer.step(0)
        reduced += trainer.runtime.dist.recorded
    assert len(reduced) == world_size and len(reduced[0]) == 74_346 + 2
    trainer = make_trainer(small, recipe, precision="fp32")
    trainer.begin_epoch(0, [0.0] * 300, [0.9] * 300)
    trainer.step(0)
    whole = [p.grad.flatten() for p in trainer.model.parameters()] + [trainer.totals]
    assert torch.allclose(sum(reduced), torch.cat(whole), rtol=1e-4, atol=1e-5)


def test_ranks_evaluate_disjoint_batches_of_the_test_set(small, monkeypatch):
    monkeypatch.setattr(trainer_module, "EVAL_BATCH_SIZE", 30)
    trainer = make_trainer(small, RECIPES["default"])
    args = trainer.runtime, trainer.model, trainer.normalize, small.test_images
    alone, parts = predict(*args), []
    for rank in range(3):
        trainer.runtime.dist = FakeRank(rank, 3)
        parts.append(predict(*args))
    assert torch.equal(sum(parts), alone)
    assert all(sum(int(part[i].any()) for part in parts) == 1 for i in range(len(alone)))


# --- torchrun train.py with a rank that dies ---


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_rank(agent, rank, out):
    """Send SIGKILL to a rank of this torchrun in the second epoch; the path of last.pt."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for last in out.glob("runs/*/last.pt"):
            if load_checkpoint(last, "cpu")[1]["epoch"] >= 1:
                for pid in children(agent.pid):
                    environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    if f"RANK={rank}".encode() in environ:
                        os.kill(pid, signal.SIGKILL)
                        return last
        time.sleep(0.02)
    raise AssertionError("no epoch within a minute")


def start_torchrun(*args):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [str(arg) for arg in [*TORCHRUN, *args]]
    return subprocess.Popen(command, cwd=ROOT, env=torchrun_env(), **pipes)


@pytest.fixture(scope="module")
def run_args(tmp_path_factory):
    """Arguments of a run on an image folder, at an lr at which rounding does not grow."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("finds the process of a rank through /proc")
    path = tmp_path_factory.mktemp("ranks")
    images = write_images(path / "images", 200, 100)
    args = ["--data", images, "--data-dir", path / "data", "--recipe", "original"]
    args += ["--epochs", 8, "--batch-size", 20, "--max-lr", 0.003, "--device", "cpu"]
    return [str(arg) for arg in args]


def test_a_dead_rank_ends_the_run_with_one_line_and_a_whole_checkpoint(run_args, tmp_path):
    with start_torchrun("train.py", *run_args, "--out", tmp_path) as agent:
        last = kill_rank(agent, 1, tmp_path)
        _, err = agent.communicate(timeout=60)
    assert agent.returncode == 1
    (line,) = (line for line in err.splitlines() if line.startswith("train.py: "))
    assert line.startswith(("train.py: error: rank 0 of 2 lost another: ", "train.py: stopped by "))
    assert ".cpp" not in line and ".cc" not in line
    assert line.endswith(f"torchrun --nproc-per-node=2 train.py --resume {last.parent}")
    assert load_checkpoint(last, "cpu")[1]["epoch"] >= 1


def test_torchrun_restarts_after_a_rank_has_died(run_args, tmp_path, invoke):
    args = [*run_args, "--save-every", "2"]
    with start_torchrun("--max-restarts=1", "train.py", *args, "--out", tmp_path) as agent:
        kill_rank(agent, 0, tmp_path)
        out, err = agent.communicate(timeout=100)
    assert agent.returncode == 0, err
    assert "resumed at step " in out and out.count("last epoch: ") == 1  # rank 0 prints
    run_dir = only_run(tmp_path)
    losses = [float(row["train_loss"]) for row in read_csv(run_dir / "history.csv")]
    assert invoke(train, [*run_args, "--out", tmp_path / "alone"])[0] == 0
    alone = read_csv(only_run(tmp_path / "alone") / "history.csv")
    assert losses == pytest.approx([float(row["train_loss"]) for row in alone], abs=1e-4)
    assert load_checkpoint(run_dir / "last.pt", "cpu")[1]["epoch"] == 8


# --- devices ---


def test_without_bf16_or_glibc_runs_work(monkeypatch):
    monkeypatch.setattr(runtime, "supports_bf16_matmul", lambda device: False)
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert not tune_malloc()
    assert Runtime("cpu").precision == "fp32" and Runtime("cpu", "bf16").precision == "bf16"


def test_fp16_needs_kernels_that_scale_the_loss():
    with pytest.raises(UsageError, match="--precision fp16 needs the Triton kernels"):
        Runtime("cpu", "fp16")


@pytest.mark.parametrize("kernels, lines", [("auto", 0), ("torch", 0)])
def test_a_cpu_runs_without_triton(monkeypatch, capsys, kernels, lines):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not Runtime("cpu", kernels=kernels).fused
    assert capsys.readouterr().err.count("\n") == lines


if __name__ == "__main__":
    torch.save(train_steps(distributed=True), Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
