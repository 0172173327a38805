"""Two ranks of gloo against one process and against each other, a killed rank, and devices."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PROCESSES, ROOT, FakeRank, make_trainer, only_run, write_images

import data
import runtime
import train
from checkpoint import load_checkpoint
from cli import RunError, UsageError, read_csv, sha256
from recipes import RECIPES
from runtime import Ranks, Runtime, tune_process
from train import Trainer


def train_steps(distributed):
    """Gradients of the first step, then the loss of an epoch, weights and logits.

    The last batch has 7 images. Ranks are given another seed than rank 0.
    """
    dataset = data.load_shapes(2 * 32 + 7, 40)
    recipe = dataclasses.replace(RECIPES["original"], batch_size=32, max_lr=1e-4)
    runtime = Runtime("cpu", "fp32", distributed=distributed)
    trainer = Trainer(recipe, dataset, runtime, seed=1 + runtime.ranks.rank)
    trainer.seed = 1
    trainer.begin_epoch(0)
    trainer.step(0)
    grads = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    trainer.step(1)
    trainer.step(2)
    loss, _ = trainer.end_epoch()
    logits = runtime.predict(trainer.model, trainer.normalize, dataset.test_images)
    weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
    return {"grads": grads, "loss": loss, "weights": weights, "logits": logits}


def rank_process(rank, port, path):
    """One of two ranks, as torchrun starts it."""
    os.environ["RANK"] = str(rank)
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = "2"
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = str(port)
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    torch.save(train_steps(distributed=True), path / f"{rank}.pt")
    Ranks().leave()
    assert not torch.distributed.is_initialized()


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
    first = torch.load(tmp_path / "0.pt")
    second = torch.load(tmp_path / "1.pt")
    assert sha256(first) == sha256(second)
    assert (first["grads"] - alone["grads"]).norm() < 1e-4 * alone["grads"].norm()
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-3)


@pytest.mark.parametrize("count, world_size", [(10, 3), (2, 3), (8, 2)])
def test_uneven_shards_sum_to_the_whole_batch(small, count, world_size):
    """Also where a rank has no image: one all_reduce a step, of gradients, loss and correct."""
    recipe = dataclasses.replace(RECIPES["original"], batch_size=count, l1=0.0)

    def train_step(ranks):
        trainer = make_trainer(small, recipe, precision="fp32")
        trainer.runtime.ranks = ranks
        trainer.begin_epoch(0, [0.0] * 300, [0.9] * 300)
        trainer.step(0)
        grads = [p.grad.flatten() for p in trainer.model.parameters()]
        return torch.cat([*grads, trainer.totals])

    whole = train_step(Ranks())
    ranks = [FakeRank(i, world_size) for i in range(world_size)]
    for rank in ranks:
        train_step(rank)
    reduced = [tensor for rank in ranks for tensor in rank.recorded]
    assert len(reduced) == world_size
    assert len(reduced[0]) == 74_346 + 2
    assert torch.allclose(sum(reduced), whole, rtol=1e-3, atol=1e-4)


def test_ranks_evaluate_disjoint_batches_of_the_test_set(small, monkeypatch):
    monkeypatch.setattr("runtime.EVAL_BATCH_SIZE", 30)
    trainer = make_trainer(small, RECIPES["default"])
    args = (trainer.model, trainer.normalize, small.test_images)
    alone = trainer.runtime.predict(*args)
    parts = []
    for rank in range(3):
        trainer.runtime.ranks = FakeRank(rank, 3)
        parts.append(trainer.runtime.predict(*args))
    assert torch.equal(sum(parts), alone)
    for i in range(len(alone)):
        assert sum(int(part[i].any()) for part in parts) == 1


# --- torchrun ---


def test_an_error_of_rank_0_reaches_the_others(tmp_path):
    """They wait for the images that it loads: each rank has a line, none a traceback of gloo."""
    sent = []
    ranks = SimpleNamespace(rank=0, broadcast_object=sent.append)
    runtime = SimpleNamespace(ranks=ranks, device="cpu")
    args = (RECIPES["default"], tmp_path / "nothing", tmp_path, None, runtime)
    with pytest.raises(UsageError, match="nothing: not a folder"):
        train.load_dataset(*args)
    assert sent == [None]
    ranks.rank = 1
    with pytest.raises(RunError, match="rank 0 could not load the images"):
        train.load_dataset(*args)


def kill_rank(agent, rank, out):
    """Send SIGKILL to a rank of this torchrun when last.pt is there: the path of it."""
    wanted = f"RANK={rank}".encode()
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for last in out.glob("runs/*/last.pt"):
            for pid in children.read_text().split():
                if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    os.kill(int(pid), signal.SIGKILL)
                    return last
        time.sleep(0.02)
    raise AssertionError("no epoch within two minutes")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a rank through /proc")
def test_a_lost_rank_ends_the_job_and_one_process_resumes_it(tmp_path, invoke):
    images = write_images(tmp_path / "images", 200, 20)
    args = ["--data", images, "--data-dir", tmp_path / "data", "--recipe", "original"]
    args += ["--max-lr", 1e-4, "--epochs", 500, "--batch-size", 40]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["train.py", *args, "--device", "cpu", "--out", tmp_path]
    with subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as agent:
        last = kill_rank(agent, 1, tmp_path)
        out, _ = agent.communicate(timeout=60)
    assert agent.returncode != 0
    assert out.count("device   cpu") == 1  # rank 0 alone prints
    assert "2 ranks" in out

    # The rest of the run would take minutes: it is told that it has one epoch left.
    ckpt = torch.load(last, weights_only=True)
    ckpt["config"]["settings"]["epochs"] = ckpt["epoch"] + 1
    ckpt["sha256"] = sha256({key: value for key, value in ckpt.items() if key != "sha256"})
    torch.save(ckpt, last)
    status, _, err = invoke(train, ["--resume", last])
    assert status == 0
    assert "warning: the bits may differ: runs_on was " in err
    history = read_csv(only_run(tmp_path) / "history.csv")
    assert len(history) == ckpt["epoch"] + 1
    assert load_checkpoint(last, "cpu")[1]["epoch"] == len(history)


# --- devices ---


def test_without_bf16_glibc_or_triton_runs_work(monkeypatch, capsys):
    monkeypatch.setattr(runtime, "supports_bf16_matmul", lambda device: False)
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    monkeypatch.setitem(sys.modules, "triton", None)
    tune_process(torch.device("cpu"))
    assert Runtime("cpu").precision == "fp32"
    assert Runtime("cpu", "bf16").precision == "bf16"
    assert not Runtime("cpu").finds_triton()
    assert Runtime("cpu").uses_matmul_stem
    assert not Runtime("cpu", kernels="torch").uses_matmul_stem
    assert capsys.readouterr().err == ""


def test_evaluation_is_in_eval_mode_and_leaves_the_mode_as_it_was(small):
    trainer = make_trainer(small, RECIPES["default"])
    modes = []
    trainer.model.register_forward_hook(lambda module, *_: modes.append(module.training))
    trainer.model.train()
    trainer.runtime.predict(trainer.model, trainer.normalize, small.test_images)
    assert modes == [False]
    assert trainer.model.training
