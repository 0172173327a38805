"""Two ranks of gloo against one process and against each other, killed ranks, and devices."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import PROCESSES, ROOT, FakeRank, make_trainer, only_run, write_images

import data
import runtime
import train
from cli import read_csv, sha256
from runtime import Distributed, Runtime, tune_malloc
from schedule import RECIPES
from trainer import Trainer, build_model, load_checkpoint


def train_steps(distributed):
    """The losses of recipe original at a tenth of its lr, then logits and weights.

    The last batch of an epoch has 7 images; ranks start from other weights than rank 0. At the full
    lr training is unstable with such small batches, and rounding grows tenfold every few steps.
    """
    dataset, losses = data.load_shapes(4 * 64 + 7, 1200), []
    recipe = dataclasses.replace(RECIPES["original"], batch_size=64, max_lr=0.003)
    runtime = Runtime("cpu", "fp32", distributed=distributed)
    other_init = lambda *args: build_model(*args[:2], 1 + runtime.dist.rank, "cpu")
    with mock.patch("trainer.build_model", other_init):
        trainer = Trainer(recipe, dataset, runtime, 1)
    for _ in range(4):
        trainer.train_epoch(5, lambda: losses.append(trainer.totals[0].item()))
    logits = runtime.predict(trainer.model, trainer.normalize, dataset.test_images)
    return {"losses": losses, "logits": logits, "weights": trainer.model.state_dict()}


def rank_process(rank, port, path):
    """One of two ranks, as torchrun starts it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}
    torch.save(train_steps(distributed=True), path / f"{rank}.pt")


def test_two_ranks_train_like_one_process_and_like_each_other(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = [PROCESSES.Process(target=rank_process, args=(i, port, tmp_path)) for i in range(2)]
    for rank in ranks:
        rank.start()
    alone = train_steps(distributed=False)
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert sha256(first) == sha256(second) and len(alone["losses"]) == 20
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)


@pytest.mark.parametrize("count, world_size", [(10, 3), (2, 3), (8, 2)])
def test_uneven_shards_sum_to_the_whole_batch(small, count, world_size):
    """Also where a rank has no image: one all_reduce a step, of gradients, loss and correct."""
    recipe = dataclasses.replace(RECIPES["original"], batch_size=count, l1=0.0)

    def train_step(dist):
        trainer = make_trainer(small, recipe, precision="fp32")
        trainer.runtime.dist = dist
        trainer.begin_epoch(0, [0.0] * 300, [0.9] * 300)
        trainer.step(0)
        return [p.grad.flatten() for p in trainer.model.parameters()] + [trainer.totals]

    whole, ranks = train_step(Distributed()), [FakeRank(i, world_size) for i in range(world_size)]
    for rank in ranks:
        train_step(rank)
    reduced = [tensor for rank in ranks for tensor in rank.recorded]
    assert len(reduced) == world_size and len(reduced[0]) == 74_346 + 2
    assert torch.allclose(sum(reduced), torch.cat(whole), rtol=1e-4, atol=1e-5)


def test_ranks_evaluate_disjoint_batches_of_the_test_set(small, monkeypatch):
    monkeypatch.setattr("runtime.EVAL_BATCH_SIZE", 30)
    trainer = make_trainer(small, RECIPES["default"])
    args = trainer.model, trainer.normalize, small.test_images
    alone, parts = trainer.runtime.predict(*args), []
    for rank in range(3):
        trainer.runtime.dist = FakeRank(rank, 3)
        parts.append(trainer.runtime.predict(*args))
    assert torch.equal(sum(parts), alone)
    assert all(sum(int(part[i].any()) for part in parts) == 1 for i in range(len(alone)))


# --- torchrun train.py with ranks that die ---


def kill_rank(agent, rank, restart, out, min_epoch):
    """Send SIGKILL to a rank of this torchrun when last.pt has so many epochs: the path of it."""
    wanted = {f"RANK={rank}".encode(), f"TORCHELASTIC_RESTART_COUNT={restart}".encode()}
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for last in out.glob("runs/*/last.pt"):
            if load_checkpoint(last, "cpu")[1]["epoch"] >= min_epoch:
                for pid in children.read_text().split():
                    if wanted <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                        os.kill(int(pid), signal.SIGKILL)
                        return last
        time.sleep(0.02)
    raise AssertionError(f"not {min_epoch} epochs within a minute")


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """A run whose rank 0 is killed and whose rank 1 is killed after the restart.

    Arguments of the run, at an lr at which rounding does not grow, last.pt, stderr, exit status.
    """
    if not Path("/proc/self/environ").exists():
        pytest.skip("finds the process of a rank through /proc")
    out = tmp_path_factory.mktemp("ranks")
    args = ["--data", write_images(out / "images", 200, 100), "--data-dir", out / "data"]
    args += ["--recipe", "original", "--max-lr", 0.003, "--epochs", 10, "--batch-size", 20]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "--max-restarts=1", "train.py", *args, "--device", "cpu"]
    command = [*map(str, command), "--save-every", "2", "--out", str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as agent:
        last = kill_rank(agent, 0, 0, out, min_epoch=1)
        epoch = load_checkpoint(last, "cpu")[1]["epoch"]
        assert any("resumed at step " in line for line in agent.stdout)
        kill_rank(agent, 1, 1, out, min_epoch=epoch + 1)
        _, err = agent.communicate(timeout=60)
    return args, last, err, agent.returncode


def test_a_dead_rank_ends_the_run_with_one_line_and_a_whole_checkpoint(torchrun):
    _, last, err, status = torchrun
    *restarted, line = (line for line in err.splitlines() if line.startswith("train.py: "))
    assert status == 1 and len(restarted) <= 1  # a line for each start
    assert line.startswith(("train.py: error: rank 0 of 2 lost another: ", "train.py: stopped by "))
    assert ".cpp" not in line and ".cc" not in line
    assert line.endswith(f"torchrun --nproc-per-node=2 train.py --resume {last.parent}")
    assert load_checkpoint(last, "cpu")[1]["epoch"] >= 2


def test_torchrun_restarts_after_a_rank_has_died(torchrun, tmp_path, invoke):
    """It resumed its run, which one process finishes with the losses of an unbroken run."""
    args, last, _, _ = torchrun
    status, _, err = invoke(train, ["--resume", last])
    assert status == 0 and err.startswith("warning: the bits may differ: device was ")
    assert invoke(train, [*args, "--out", tmp_path])[0] == 0
    histories = (read_csv(only_run(out) / "history.csv") for out in (last.parents[2], tmp_path))
    losses, alone = ([float(row["train_loss"]) for row in history] for history in histories)
    assert len(losses) == 10 and losses == pytest.approx(alone, abs=1e-4)


# --- devices ---


def test_without_bf16_glibc_or_triton_runs_work(monkeypatch, capsys):
    monkeypatch.setattr(runtime, "supports_bf16_matmul", lambda device: False)
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not tune_malloc()
    assert Runtime("cpu").precision == "fp32" and Runtime("cpu", "bf16").precision == "bf16"
    assert not Runtime("cpu").fused and not Runtime("cpu", kernels="torch").fused
    assert capsys.readouterr().err == ""
