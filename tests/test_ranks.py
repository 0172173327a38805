"""One run on two ranks of gloo, against one process and against each other, and with a rank killed.

`torchrun tests/test_ranks.py FOLDER` is what each rank does for the first of them.
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
from conftest import ROOT, make_trainer, run_folder, write_pictures

import augment
import checkpoint
import data
import train
from engine import Runtime, Trainer, predict
from files import read_csv
from ranks import Ranks
from recipe import RECIPES, build_model

STEPS = 50
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def fifty_steps(torchrun):
    """Each step's loss, then logits and weights, of recipe `original` at a tenth of its rate; the last batch has 7 pictures.

    Ranks start from weights of their own, which are to become rank 0's.

    Where the loss itself is steady: at the recipe's own rate and batches as small as these, a rounding's difference grows
    tenfold every few steps, whatever made it.
    """
    dataset = data.load_shapes(train=4 * 64 + 7, test=1200)
    recipe = dataclasses.replace(RECIPES["original"], batch_size=64, max_lr=0.003)
    runtime = Runtime("cpu", "fp32", torchrun=torchrun)
    with mock.patch("engine.build_model", lambda recipe, num_classes, seed, device: build_model(recipe, num_classes, seed + runtime.ranks.rank, device)):
        trainer, losses = Trainer(recipe, dataset, runtime, 1), []
    step = trainer.step

    def noted(indices, *arguments):
        loss, correct = step(indices, *arguments)
        losses.append(loss.item() / len(indices))
        return loss, correct

    trainer.step = noted
    for epoch in range(STEPS // trainer.steps_per_epoch):
        trainer.epoch(epoch, trainer.steps_per_epoch)
    logits = predict(runtime, trainer.model, trainer.normalize, dataset.test_images)
    return {"losses": losses, "logits": logits, "weights": trainer.model.state_dict(), "generator": trainer.generator.get_state()}


def torchrun_environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


def test_two_ranks_train_as_one_process_and_as_each_other(tmp_path):
    done = subprocess.run([*TORCHRUN, __file__, tmp_path], env=torchrun_environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert checkpoint.sha256(first) == checkpoint.sha256(second)
    alone = fifty_steps(torchrun=False)
    assert len(alone["losses"]) == STEPS and torch.equal(alone["generator"], first["generator"])
    difference = max(abs(a - b) for a, b in zip(alone["losses"], first["losses"]))
    print(f"largest difference of {STEPS} losses: {difference:.1e}")
    assert difference < 1e-5


def test_a_rank_draws_for_its_part_what_one_process_draws(small):
    """Every augmentation there is, on 10 pictures in 3 uneven parts."""
    plan = dataclasses.replace(RECIPES["original"].augmentation, crop_border="reflect")
    for plan in (plan, RECIPES["default"].augmentation):
        whole, *parts = (augment.Augmenter(plan, augment.Normalize(small.mean, small.std, "cpu"), 300, torch.Generator().manual_seed(5), 1) for _ in range(4))
        indices = torch.arange(40, 50)
        wanted = whole(small.train_images[indices], indices, 1)
        for augmenter, part in zip(parts, (slice(0, 3), slice(3, 6), slice(6, 10))):
            draws = augmenter.draw(indices, 1, 32).of(part)
            assert torch.equal(augmenter.apply(small.train_images[indices[part]], draws), wanted[part])
            assert torch.equal(augmenter.generator.get_state(), whole.generator.get_state())


class Together(Ranks):
    """Rank `rank` of `world`, which notes what it would add up."""

    def __init__(self, rank, world):
        super().__init__()
        self.rank, self.world, self.noted = rank, world, []

    def add_up(self, tensor):
        self.noted.append(tensor.clone())
        return tensor


@pytest.mark.parametrize("count, world", [(10, 3), (2, 3), (1, 4), (8, 2)])
def test_uneven_parts_add_up_to_the_whole_batch(small, count, world):
    """Also where a rank has no picture at all: sums of losses and of correct pictures, and the mean's gradient."""
    recipe = dataclasses.replace(RECIPES["default"], batch_size=10)
    indices, alone = torch.arange(count), Together(0, 1)
    flats = []
    for rank in range(world):
        trainer = make_trainer(small, recipe, precision="fp32")
        trainer.runtime.ranks = Together(rank, world)
        trainer.step(indices, 0, 0.0, 0.9)
        flats += trainer.runtime.ranks.noted
    assert len(flats) == world  # one all-reduce a step
    trainer = make_trainer(small, recipe, precision="fp32")
    loss, correct = trainer.update(indices, 0)
    whole = torch.cat([*(p.grad.flatten() for p in trainer.model.parameters()), loss.view(1), correct.view(1)])
    assert len(whole) == 74_346 + 2 and alone.world == 1
    assert torch.allclose(sum(flats), whole, rtol=1e-4, atol=1e-5)


def test_ranks_evaluate_disjoint_parts_of_exactly_the_test_set(small, monkeypatch):
    monkeypatch.setattr("engine.EVALUATION_BATCH", 30)
    trainer = make_trainer(small, RECIPES["default"])
    alone = predict(trainer.runtime, trainer.model, trainer.normalize, small.test_images)
    parts = []
    for rank in range(3):
        trainer.runtime.ranks = Together(rank, 3)
        parts.append(predict(trainer.runtime, trainer.model, trainer.normalize, small.test_images))
    assert torch.equal(sum(parts), alone)
    assert all(sum(int(part[i].any()) for part in parts) == 1 for i in range(len(alone)))


# --- torchrun train.py, with a rank that dies ---


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid):
    environment = dict(entry.split(b"=", 1) for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if b"=" in entry)
    return int(environment.get(b"RANK", -1))


def kill_a_rank(agent, rank, out):
    """Send SIGKILL to a rank of this torchrun in the second epoch; the path of the run's last.pt."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for last in (out / "runs").glob("*/last.pt"):
            if checkpoint.load(last, "cpu")[1]["epoch"] >= 1:
                (victim,) = (pid for pid in children(agent.pid) if rank_of(pid) == rank)
                os.kill(victim, signal.SIGKILL)
                return last
        time.sleep(0.05)
    raise AssertionError("no second epoch")


def ending(agent, seconds):
    """What torchrun has printed by its end, which is to come in time."""
    try:
        return agent.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        agent.terminate()
        raise


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The arguments of a run on a folder of pictures, at a rate at which rounding does not grow, whose ranks can be found."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("finds a rank's process through /proc")
    place = tmp_path_factory.mktemp("ranks")
    pictures = write_pictures(place / "pictures", 120, 40)
    return list(map(str, ["--data", pictures, "--data-dir", place / "data", "--epochs", 12, "--batch-size", 30, "--max-lr", 0.003, "--device", "cpu", "--precision", "fp32"]))


def test_a_rank_that_dies_ends_the_run_with_a_line_and_a_whole_checkpoint(two_ranks, tmp_path):
    command = [*TORCHRUN, "train.py", *two_ranks, "--out", tmp_path]
    with subprocess.Popen(command, cwd=ROOT, env=torchrun_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as agent:
        last = kill_a_rank(agent, 1, tmp_path)
        started = time.monotonic()
        _, told = ending(agent, 60)
    print(f"ended {time.monotonic() - started:.1f} s after the kill")
    assert agent.returncode == 1
    (line,) = (line for line in told.splitlines() if line.startswith("train.py: "))
    assert line.startswith(("train.py: error: rank 0 of 2 has lost another: ", "train.py: stopped by SIGTERM; step "))
    assert line.endswith(f"torchrun --nproc-per-node=2 train.py --resume {last.parent}")
    assert checkpoint.load(last, "cpu")[1]["epoch"] >= 1


def test_torchrun_goes_on_by_itself_after_a_rank_has_died(two_ranks, tmp_path, invoke):
    command = [*TORCHRUN, "--max-restarts=1", "train.py", *two_ranks, "--out", tmp_path, "--save-every", "2"]
    with subprocess.Popen(command, cwd=ROOT, env=torchrun_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as agent:
        kill_a_rank(agent, 0, tmp_path)
        out, told = ending(agent, 100)
    assert agent.returncode == 0, told
    assert ", on from step " in out and out.count("last epoch: ") == 1  # rank 0 alone prints
    folder = run_folder(tmp_path)  # there is no other
    rows = read_csv(folder / "history.csv")
    assert [int(row["epoch"]) for row in rows] == list(range(1, 13))
    assert invoke(train, [*two_ranks, "--out", tmp_path / "alone"])[0] == 0
    alone = read_csv(run_folder(tmp_path / "alone") / "history.csv")
    assert [float(row["train_loss"]) for row in rows] == pytest.approx([float(row["train_loss"]) for row in alone], abs=1e-4)
    assert checkpoint.load(folder / "best.pt", "cpu") and checkpoint.load(folder / "last.pt", "cpu")[1]["epoch"] == 12


if __name__ == "__main__":
    torch.save(fifty_steps(torchrun=True), Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
