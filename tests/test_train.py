"""The training step against a plain one, and runs from the command line to the last file."""

import copy
import dataclasses
import json
import math
import os
import resource

import pytest
import torch
import torch.nn.functional as F
from conftest import RUN_FILES, make_trainer, only_run, save_small_checkpoint, small_recipe
from conftest import train_epoch

import data
import evaluate
import train
from checkpoint import load_checkpoint
from cli import RunError, atomic_write, read_csv, sha256
from optim import OneCycle
from recipes import RECIPES
from vit import build_model

# --- the step ---


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_steps_equal_the_plain_ones(small, kernels):
    """With autograd's L1 term, torch's own scheduler and the module called as it is.

    Every step is compared from the same weights, so an error is that of one step.
    """
    recipe = small_recipe(max_lr=0.003)
    trainer = make_trainer(small, recipe, precision="fp32", kernels=kernels)
    plain = build_model(recipe, small.num_classes, seed=1, device="cpu")
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1.0, betas=(0.9, 0.999), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        0.003,
        total_steps=6,
        pct_start=5 / 24,
        div_factor=10,
        final_div_factor=10,
        anneal_strategy="linear",
    )
    trainer.begin_epoch(0)
    total = 0.0
    correct = 0
    for i, indices in enumerate(trainer.plan.indices.split(128)):
        plain.load_state_dict(trainer.model.state_dict())
        logits = plain(trainer.normalize(small.train_images[indices]))
        labels = small.train_labels[indices]
        loss = F.cross_entropy(logits, labels)
        l1 = 2.5e-5 * sum(p.abs().sum() for p in plain.parameters())
        optimizer.zero_grad()
        (loss + l1).backward()
        optimizer.step()
        scheduler.step()
        trainer.step(i)
        total += loss.item() * len(indices)
        correct += (logits.argmax(1) == labels).sum().item()
        # AdamW divides by the root of the mean square, so it hides the scale of gradients, and the
        # rounding of one near 0 may be as large as an update: both are compared, by their norm.
        grads = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
        expected = torch.cat([p.grad.flatten() for p in plain.parameters()])
        assert (grads - expected).norm() < 1e-4 * expected.norm()
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        expected = torch.cat([p.detach().flatten() for p in plain.parameters()])
        assert (weights - expected).norm() < 1e-4 * expected.norm()
    mean_loss, accuracy = trainer.end_epoch()
    assert mean_loss == pytest.approx(total / 300, rel=1e-4)
    assert accuracy == pytest.approx(100 * correct / 300, abs=1.1)  # three images


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_seed_same_bits_and_another_seed_others(small, precision):
    recipe = dataclasses.replace(RECIPES["original"], epochs=1, batch_size=32)

    def train_two_steps(seed):
        trainer = make_trainer(small, recipe, seed, precision=precision)
        trainer.begin_epoch(0)
        trainer.step(0)
        trainer.step(1)
        return sha256(dict(trainer.model.state_dict()))

    assert train_two_steps(1) == train_two_steps(1) != train_two_steps(2)


def test_default_recipe_learns(small):
    changes = {"epochs": 8, "batch_size": 50, "flip_p": 0.0, "crop_padding": 0}
    recipe = dataclasses.replace(RECIPES["default"], **changes)
    trainer = make_trainer(small, recipe)
    losses = [train_epoch(trainer, epoch)[0] for epoch in range(8)]
    assert losses[-1] < 0.8 * losses[0]


def test_averaged_weights_are_a_running_mean(small):
    """Over a fraction of the steps so far."""
    trainer = make_trainer(small, small_recipe(weight_avg_frac=0.4, batch_size=50))
    mean = [torch.zeros_like(p) for p in trainer.model.parameters()]
    trainer.begin_epoch(0)
    for i in range(6):
        trainer.step(i)
        weight = min(1, 1 / (0.4 * (i + 1)))
        params = [p.detach() for p in trainer.model.parameters()]
        mean = [m + weight * (p - m) for m, p in zip(mean, params)]
    for averaged, m, p in zip(trainer.averaged_model.parameters(), mean, params):
        assert torch.allclose(averaged, m, rtol=0, atol=1e-6)
        assert not torch.allclose(averaged, p, rtol=0, atol=1e-4)
    plain = make_trainer(small, small_recipe())
    assert plain.averaged_model is plain.model


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
@pytest.mark.parametrize("recipe", ["original", "default"])
def test_a_state_continues_with_the_same_bits(small_shapes, recipe, device):
    """Put into a trainer of another initialization."""
    dataset = data.load("shapes", "", device)
    recipe = dataclasses.replace(RECIPES[recipe], epochs=2, batch_size=150)
    unbroken = make_trainer(dataset, recipe, device=device)
    train_epoch(unbroken, 0)
    state = copy.deepcopy(unbroken.state_dict())
    result = train_epoch(unbroken, 1)

    resumed = make_trainer(dataset, recipe, seed=2, device=device)
    resumed.seed = 1
    resumed.load_state_dict(state, steps_done=2)
    assert train_epoch(resumed, 1) == result
    assert sha256(resumed.state_dict()) == sha256(unbroken.state_dict())
    assert len(state["weights"]) == len(state["exp_avg"]) == 32


def test_a_batch_larger_than_the_dataset_has_all_of_it(small):
    weights = []
    for batch_size in (300, 512):
        trainer = make_trainer(small, small_recipe(batch_size=batch_size))
        assert trainer.steps_per_epoch == 1
        train_epoch(trainer, 0)
        weights.append(sha256(trainer.state_dict()))
    assert weights[0] == weights[1]


def test_a_batch_larger_than_the_dataset_is_named(tiny_shapes, tmp_path, succeeds):
    out = succeeds(train, ["--data", "shapes", "--out", tmp_path, "--epochs", 1])
    assert "warning: batch_size 128, but a batch has all 20 images" in out


# --- not finite ---


def test_a_loss_that_is_not_finite_ends_the_step_on_a_cpu(small):
    trainer = make_trainer(small, small_recipe())
    trainer.begin_epoch(1)
    trainer.step(0)
    trainer.model.cls_token.data.fill_(math.nan)
    lr, _ = trainer.schedule(4)
    message = f"^epoch 2, step 2, lr {lr:.4g}: the loss is not finite; is the lr too high"
    with pytest.raises(RunError, match=message):
        trainer.step(1)


def test_a_weight_that_is_not_finite_ends_the_epoch(small):
    trainer = make_trainer(small, small_recipe())
    trainer.begin_epoch(0)
    trainer.step(0)
    trainer.model.stem.conv2.bias.data[3] = math.inf
    with pytest.raises(RunError, match="^epoch 1, step 3, .*: stem.conv2.bias is not finite"):
        trainer.end_epoch()


def test_a_run_that_is_not_finite_keeps_its_last_good_epoch(
    tiny_shapes, tmp_path, monkeypatch, fails
):
    call = OneCycle.__call__

    def poisoned(schedule, step):
        lr, momentum = call(schedule, step)
        return (math.inf if step == 5 else lr), momentum

    monkeypatch.setattr(OneCycle, "__call__", poisoned)
    args = ["--data", "shapes", "--out", tmp_path, "--epochs", 3, "--batch-size", 8]
    err = fails(train, args, status=1)
    assert "error: epoch 2, step 3, lr inf: " in err
    assert err.endswith(" is not finite; is the lr too high?\n")
    _, ckpt = load_checkpoint(only_run(tmp_path) / "last.pt", "cpu")
    assert ckpt["epoch"] == 1


# --- runs ---


def test_from_the_command_line_to_an_evaluated_checkpoint(small_shapes, tmp_path, succeeds):
    """What is evaluated and kept is the averaged model; evaluate.py prints the same figures."""
    out = tmp_path / "out"
    args = ["--data", "shapes", "--out", out, "--epochs", 1, "--batch-size", 128]
    stdout = succeeds(train, [*args, "--set", "weight_avg_frac=0.5"])
    assert "\r" not in stdout
    header = stdout.split("\nseed 1, ")[0]
    assert "avg_pool_init=True" in header
    assert max(len(line) for line in header.splitlines()) < 100
    run_dir = only_run(out)
    assert run_dir.name.endswith("-default-shapes-seed1")
    assert sorted(os.listdir(run_dir)) == RUN_FILES
    assert sorted(os.listdir(out)) == ["best.pt", "runs"]
    assert (out / "best.pt").read_bytes() == (run_dir / "best.pt").read_bytes()
    (row,) = read_csv(run_dir / "history.csv")
    last = torch.load(run_dir / "last.pt", weights_only=True)
    assert last["test_accuracy"] == float(row["test_accuracy"])
    assert last["config"] == json.loads((run_dir / "config.json").read_text())
    trained = last["train_state"]["weights"]
    assert not any(torch.equal(w, trained[name]) for name, w in last["model"].items())

    stdout = succeeds(evaluate, ["--ckpt", out / "best.pt"])
    accuracy = float(row["test_accuracy"])
    loss = float(row["test_loss"])
    assert f"accuracy {accuracy:.2f} %, cross entropy {loss:.4f} nats" in stdout


def test_best_pt_is_that_of_the_best_epoch(tiny_shapes, tmp_path, monkeypatch, succeeds):
    """The first of several; last.pt is that of the last epoch."""
    accuracies = iter([20.0, 40.0, 40.0, 30.0])
    monkeypatch.setattr(train, "loss_and_accuracy", lambda logits, labels: (1.0, next(accuracies)))
    args = ["--data", "shapes", "--out", tmp_path, "--epochs", 4, "--batch-size", 20]
    out = succeeds(train, args)
    assert "accuracy 20.00, saving best.pt" in out
    assert "accuracy improved from 20.00 to 40.00, saving best.pt" in out
    assert "last epoch: 30.00 %" in out
    assert "best epoch: 40.00 % (epoch 2," in out
    _, best = load_checkpoint(tmp_path / "best.pt", "cpu")
    assert (best["epoch"], best["test_accuracy"]) == (2, 40.0)
    _, last = load_checkpoint(only_run(tmp_path) / "last.pt", "cpu")
    assert (last["epoch"], last["test_accuracy"]) == (4, 30.0)


def test_a_run_begins_with_the_weights_of_another(small, small_shapes, tmp_path, invoke, succeeds):
    """Of any recipe, but of the same classes."""
    first = save_small_checkpoint(tmp_path / "first.pt", small)
    args = ["--data", "shapes", "--out", tmp_path, "--epochs", 1, "--max-lr", 1e-30]
    succeeds(train, [*args, "--batch-size", 100, "--init", first])
    before = load_checkpoint(first, "cpu")[0].state_dict()
    after = load_checkpoint(tmp_path / "best.pt", "cpu")[0].state_dict()
    for name, weight in before.items():
        assert torch.allclose(after[name], weight, atol=1e-20)

    names = ("other", *small.class_names[1:])
    save_small_checkpoint(first, dataclasses.replace(small, class_names=names))
    status, _, err = invoke(train, [*args, "--init", first])
    assert status == 2 and "its classes are not those of shapes" in err


def test_held_out_images_are_evaluated(small, monkeypatch, text_figures, tmp_path, succeeds):
    """No test image is looked at."""
    blind = {"test_images": small.test_images[:0], "test_labels": small.test_labels[:0]}
    monkeypatch.setattr(data, "load_shapes", lambda: dataclasses.replace(small, **blind))
    args = ["--data", "shapes", "--out", tmp_path, "--val-split", 50, "--set", "max_lr=0.01"]
    out = succeeds(train, [*args, "--batch-size", 250, "--epochs", 1])
    assert "shapes-val50: 250 train, 50 held-out" in out
    assert "val loss" in out
    run_dir = only_run(tmp_path)
    config = json.loads((run_dir / "config.json").read_text())
    assert (config["val_split"], config["settings"]["max_lr"]) == (50, 0.01)
    assert "val_accuracy" in read_csv(run_dir / "history.csv")[0]
    out = succeeds(train, ["--resume", run_dir])
    assert "is finished" in out
    assert "on held-out images" in out


def test_runs_have_folders_of_their_own_and_a_summary(
    small_shapes, text_figures, tmp_path, succeeds
):
    args = ["--data", "shapes", "--out", tmp_path, "--epochs", 1, "--batch-size", 100]
    out = succeeds(train, [*args, "--runs", 2, "--seed", 3])
    folders = sorted((tmp_path / "runs").iterdir())
    assert [folder.name.split("-")[-1] for folder in folders] == ["seed3", "seed4"]
    a, b = (float(read_csv(f / "history.csv")[-1]["test_accuracy"]) for f in folders)
    mean = (a + b) / 2
    std = abs(a - b) / 2**0.5
    assert f"last epoch: mean {mean:.2f}, std {std:.2f} ({a:.2f}, {b:.2f})" in out
    assert out.count(" saving best.pt") == 2
    assert (tmp_path / "best.pt").read_bytes() == (folders[1] / "best.pt").read_bytes()
    kept = {path: path.read_bytes() for folder in folders for path in folder.iterdir()}
    succeeds(train, [*args, "--seed", 3])  # again: another folder
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_a_full_disk_is_one_line_and_leaves_whole_files(tiny_shapes, tmp_path, succeeds, fails):
    """A limit on file size fails a write as a full disk does."""
    args = ["--data", "shapes", "--out", tmp_path, "--epochs", 1, "--batch-size", 8]
    succeeds(train, args)
    before = (tmp_path / "best.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        err = fails(train, args, status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    second = sorted((tmp_path / "runs").iterdir())[1]
    assert err.endswith(f"error: {second / 'best.pt'} could not be written: File too large\n")
    assert (tmp_path / "best.pt").read_bytes() == before
    assert os.listdir(second) == ["config.json"]


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half of the ne")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_two_writers_of_a_file_do_not_mix(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_text("one")
        second.write_text("two")
    assert path.read_text() == "one"  # which was renamed last
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_run_is_one_line_and_exit_status_1(tmp_path, monkeypatch, fails):
    def fail():
        raise RunError("no images \x1b[31mtoday")

    monkeypatch.setattr(data, "load_shapes", fail)
    err = fails(train, ["--data", "shapes", "--out", tmp_path], status=1)
    assert err == "train.py: error: no images \\x1b[31mtoday\n"


def test_a_terminal_shows_loss_accuracy_and_the_time_left(
    tiny_shapes, tmp_path, succeeds, monkeypatch
):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    args = ["--data", "shapes", "--epochs", 2, "--batch-size", 20, "--out", tmp_path]
    out = succeeds(train, args)
    row = read_csv(only_run(tmp_path) / "history.csv")[0]  # whose epoch is one step
    loss = float(row["train_loss"])
    accuracy = float(row["train_accuracy"])
    assert f"epoch 1/2 1/1, 0:00 left, loss {loss:.3f}, {accuracy:.1f} %, run 0 min left" in out
    assert "evaluating 10/10, 0:00 left" in out
