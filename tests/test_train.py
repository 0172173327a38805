"""Training from the command line to the last file, against plain PyTorch, twice the same, and after every mistake."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CIFAR_COPY, ROOT, make_trainer, run_folder, small_recipe

import checkpoint
import data
import engine
import evaluate
import train
from augment import Augmentation, Normalize
from cli import RunError
from engine import Runtime
from files import read_csv, replacing
from kernels import cpu
from recipe import RECIPES, Recipe, build_model, changed


def shell(*command, **kwargs):
    """A script as a user runs it, from the project's folder."""
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, **kwargs)


def weights(path):
    return torch.load(path, weights_only=True)["model"]


# --- the whole way ---


@pytest.mark.parametrize(
    "source", ["shapes", pytest.param(CIFAR_COPY, marks=pytest.mark.skipif(not CIFAR_COPY.is_dir(), reason="no folder of real CIFAR-10 pictures"))]
)
def test_from_the_command_line_to_an_evaluated_checkpoint(tmp_path, source):
    out, name = tmp_path / "out", Path(source).name
    done = shell("train.py", "--data", source, "--data-dir", tmp_path / "data", "--out", out, "--max-steps", 4, "--batch-size", 256)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"data set  {name}: 50,000 train, 10,000 test, 10 classes" in done.stdout
    assert "\r" not in done.stdout and "ended by --max-steps after 4 of " in done.stdout  # and no progress bar in a file
    settings = done.stdout[done.stdout.index("recipe ") : done.stdout.index("\nseed 1, ")]
    assert "pooled_start=True" in settings and max(map(len, settings.splitlines())) < 80
    (folder,) = (out / "runs").iterdir()
    assert folder.name.endswith(f"-default-{name}-seed1")
    assert sorted(os.listdir(folder)) == ["best.pt", "config.json", "curves.png", "history.csv", "last.pt"]
    assert sorted(os.listdir(out)) == ["best.pt", "runs"]
    assert (out / "best.pt").read_bytes() == (folder / "best.pt").read_bytes()
    (row,) = read_csv(folder / "history.csv")
    content = torch.load(out / "best.pt", weights_only=True)
    assert content["test_accuracy"] == float(row["test_accuracy"]) and content["config"] == json.loads((folder / "config.json").read_text())

    done = shell("evaluate.py", "--ckpt", out / "best.pt", "--tta", "flip")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"accuracy {float(row['test_accuracy']):.2f} %, mean loss {float(row['test_loss']):.4f}" in done.stdout
    assert "with mirrored pictures averaged in" in done.stdout and "weighted avg" in done.stdout
    for picture in ("confusion.png", "misclassified.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


# --- what a step does ---


def test_training_is_the_plain_loop(small):
    """Two epochs against torch's own scheduler, autograd's L1 term and the module called as it stands."""
    recipe = small_recipe(max_lr=0.003)
    trainer = make_trainer(small, recipe, precision="fp32", kernels_name="torch")
    plain = build_model(recipe, small.num_classes, 1, "cpu")
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.003, total_steps=6, pct_start=5 / 24, div_factor=10, final_div_factor=10, anneal_strategy="linear"
    )
    generator = torch.Generator().manual_seed(1)
    for epoch in range(2):
        order = torch.randperm(300, generator=generator)
        losses = []
        for indices in (order[:128], order[128:256], order[256:]):
            cross_entropy = F.cross_entropy(plain(trainer.normalize(small.train_images[indices])), small.train_labels[indices])
            optimizer.zero_grad()
            (cross_entropy + 2.5e-5 * sum(p.abs().sum() for p in plain.parameters())).backward()
            optimizer.step()
            scheduler.step() if scheduler.last_epoch < 5 else None
            losses.append(cross_entropy.item() * len(indices))
        loss, _ = trainer.epoch(epoch, 3)
        assert loss == pytest.approx(sum(losses) / 300, rel=1e-4)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), plain.parameters()):
        assert torch.allclose(ours, theirs, rtol=0, atol=2e-4), name


def test_cpu_spelling_trains_as_the_plain_one(small):
    recipe = small_recipe(max_lr=0.003)
    losses = []
    for kernels_name in ("auto", "torch"):
        trainer = make_trainer(small, recipe, precision="fp32", kernels_name=kernels_name)
        losses.append([trainer.epoch(epoch, 3)[0] for epoch in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_seed_same_bits_and_another_seed_others(small, precision):
    def run_once(seed):
        trainer = make_trainer(small, dataclasses.replace(RECIPES["original"], epochs=1, batch_size=128), seed, precision=precision)
        told = trainer.epoch(0, 3)
        return told, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    (told, bits), (told_again, bits_again), (_, other) = run_once(1), run_once(1), run_once(2)
    assert told == told_again and torch.equal(bits, bits_again) and not torch.equal(bits, other)


def test_building_a_model_leaves_the_global_random_state(small):
    before = torch.random.get_rng_state()
    build_model(RECIPES["default"], small.num_classes, 5, "cpu")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_default_recipe_learns(small):
    recipe = dataclasses.replace(RECIPES["default"], epochs=40, batch_size=100, augmentation=Augmentation())
    trainer = make_trainer(small, recipe)
    first = trainer.epoch(0, 3)[0]
    for epoch in range(1, 40):
        last, accuracy = trainer.epoch(epoch, 3)
    assert last < first / 2 and accuracy > 60


def test_averaged_weights_are_a_running_mean_over_a_share_of_the_steps_so_far(small):
    """What is trained is not touched by it."""
    recipe = small_recipe(averaged_share=0.4)
    trainer = make_trainer(small, recipe, precision="fp32")
    plain = make_trainer(small, dataclasses.replace(recipe, averaged_share=0.0), precision="fp32")
    assert plain.averaged is plain.model
    mean = [torch.zeros_like(p) for p in plain.model.parameters()]
    for step, indices in enumerate(torch.arange(300).split(50), 1):
        trainer.step(indices, 0, 0.003, 0.9)
        plain.step(indices, 0, 0.003, 0.9)
        for m, p, q, averaged in zip(mean, plain.model.parameters(), trainer.model.parameters(), trainer.averaged.parameters()):
            m += min(1, 1 / (0.4 * step)) * (p.detach() - m)
            assert torch.equal(p, q) and torch.allclose(averaged, m, rtol=0, atol=1e-6)
    assert not torch.allclose(averaged, p, rtol=0, atol=1e-4)


def test_labels_are_smoothed(small):
    trainer = make_trainer(small, small_recipe(label_smoothing=0.3), precision="fp32", kernels_name="torch")
    images, labels = trainer.normalize(small.train_images[:50]), small.train_labels[:50]
    logits = trainer.model(images).detach()
    expected = F.cross_entropy(logits, 0.7 * F.one_hot(labels, 10) + 0.03)
    assert trainer.step(torch.arange(50), 0, 0.003, 0.9)[0].item() == pytest.approx(50 * expected.item(), rel=1e-4)


def test_crops_are_calm_in_the_last_epochs_of_a_run(small):
    plan = dataclasses.replace(small_recipe(), epochs=5, augmentation=Augmentation(crop_padding=4, calm_share=0.4))
    trainer = make_trainer(small, plan)
    reach = [trainer.augment.draw(torch.arange(300), epoch, 32).offsets.max() for epoch in range(5)]
    assert reach == [4, 4, 4, 2, 2]


def test_original_recipe_is_to_the_letter():
    assert RECIPES["original"] == Recipe(
        epochs=24, batch_size=512, max_lr=0.03, pct_start=5 / 24, div_factor=10, final_div_factor=10, anneal="linear",
        weight_decay=0.0, l1=2.5e-5, embedding_std=1.0, base_momentum=0.85, max_momentum=0.95, beta2=0.999, eps=1e-8,
        augmentation=Augmentation(4, "wrap", "random", 0.45, 0.5, 0.07, 0.2, 15.0, 0.65, 8),
    )  # fmt: skip


def test_a_recipe_may_be_changed_field_by_field():
    """Every field of either class, whatever its kind; what is not named stays, and so does the recipe itself."""
    before = RECIPES["original"]
    recipe = changed(before, ["max_lr=1e-2", "epochs=3", "pooled_start=True", "optimizer=muon", "flip=alternating", "crop_padding=2"])
    augmentation = dataclasses.replace(before.augmentation, flip="alternating", crop_padding=2)
    expected = dict(max_lr=0.01, epochs=3, pooled_start=True, optimizer="muon", augmentation=augmentation)
    assert recipe == dataclasses.replace(before, **expected) and type(recipe.epochs) is int and before == RECIPES["original"]
    for recipe in RECIPES.values():
        settings = dataclasses.asdict(recipe)
        settings |= settings.pop("augmentation")
        assert changed(recipe, [f"{name}={value}" for name, value in settings.items()]) == recipe


# --- runs and their files ---


def test_a_run_on_held_out_pictures_never_sees_the_test_pictures(small, monkeypatch, tmp_path, invoke):
    blind = dataclasses.replace(small, test_images=small.test_images[:0], test_labels=small.test_labels[:0])
    monkeypatch.setattr(data, "load_shapes", lambda: blind)
    arguments = ["--data", "shapes", "--out", tmp_path, "--epochs", 1, "--batch-size", 100, "--val-split", 50, "--set", "max_lr=0.01"]
    status, out, err = invoke(train, arguments)
    assert (status, err) == (0, "") and "shapes-val50: 250 train, 50 held-out" in out and "max_lr=0.01" in out
    folder = run_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert (config["val_split"], config["set"], config["settings"]["max_lr"]) == (50, ["max_lr=0.01"], 0.01)
    status, out, err = invoke(train, ["--resume", folder])
    assert (status, err) == (0, "") and "is finished" in out and "shapes-val50" in out
    status, out, _ = invoke(train, [*arguments, "--runs", 2, "--max-steps", 1])
    assert status == 0 and "2 runs on shapes-val50, accuracy on the held-out pictures in %" in out


def test_what_is_evaluated_and_kept_is_the_averaged_network(small_shapes, small, tmp_path, invoke):
    arguments = ["--data", "shapes", "--out", tmp_path, "--epochs", 2, "--batch-size", 50, "--set", "averaged_share=0.5"]
    assert invoke(train, arguments)[0] == 0
    folder = run_folder(tmp_path)
    for name in ("best.pt", "last.pt"):
        model, content = checkpoint.load(folder / name, "cpu")
        row = read_csv(folder / "history.csv")[content["epoch"] - 1]
        logits = engine.predict(Runtime("cpu"), model, Normalize(small.mean, small.std, "cpu"), small.test_images)
        assert [str(value) for value in engine.score(logits, small.test_labels)] == [row["test_loss"], row["test_accuracy"]]
    trained = content["progress"]["trainer"]["model"]
    assert not any(torch.equal(weight, trained[name]) for name, weight in content["model"].items())


def test_runs_are_kept_apart_and_summed_up(small_shapes, tmp_path, invoke):
    arguments = ["--data", "shapes", "--out", tmp_path, "--epochs", 2, "--batch-size", 100, "--runs", 2, "--seed", 3]
    status, out, err = invoke(train, arguments)
    assert (status, err) == (0, "")
    folders = sorted((tmp_path / "runs").iterdir())
    assert [folder.name.split("-")[-1] for folder in folders] == ["seed3", "seed4"]
    last = [float(read_csv(folder / "history.csv")[-1]["test_accuracy"]) for folder in folders]
    assert f"last epoch: mean {sum(last) / 2:.2f}, std {abs(last[0] - last[1]) / 2**0.5:.2f} ({last[0]:.2f}, {last[1]:.2f})" in out
    assert out.count("accuracy improved from 0.00 to ") == 2
    assert (tmp_path / "best.pt").read_bytes() == (folders[1] / "best.pt").read_bytes()

    kept = {path: path.read_bytes() for folder in folders for path in folder.iterdir()}
    assert invoke(train, arguments)[0] == 0  # the same command again
    assert len(list((tmp_path / "runs").iterdir())) == 4
    assert all(path.read_bytes() == content for path, content in kept.items())
    first, again = (weights(folder / "last.pt") for folder in (tmp_path / "runs").glob("*seed3*"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_two_runs_of_one_second_have_two_folders(tmp_path):
    assert len({train.new_folder(tmp_path, "x") for _ in range(5)}) == 5


def test_number_of_classes_follows_the_data(tmp_path, small, monkeypatch, invoke):
    two = dataclasses.replace(
        small, train_labels=small.train_labels % 2, test_labels=small.test_labels % 2, class_names=("even", "odd"), name="two"
    )
    monkeypatch.setattr(data, "load_shapes", lambda: two)
    assert invoke(train, ["--data", "shapes", "--out", tmp_path, "--epochs", 1, "--batch-size", 100])[0] == 0
    assert weights(tmp_path / "best.pt")["head.weight"].shape == (2, 64)
    status, out, _ = invoke(evaluate, ["--ckpt", tmp_path / "best.pt"])
    assert status == 0 and "odd" in out
    monkeypatch.setattr(data, "load_shapes", lambda: small)
    status, _, err = invoke(evaluate, ["--ckpt", tmp_path / "best.pt"])
    assert status == 2 and "knows 2 classes" in err


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        with replacing(path) as temporary:
            temporary.write_text("half of the ne")
            raise RuntimeError("the disk is full")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


# --- mistakes ---


def test_a_failed_run_is_one_line_and_exit_status_1(tmp_path, monkeypatch, invoke):
    monkeypatch.setattr(data, "load_shapes", lambda: (_ for _ in ()).throw(RunError("no pictures today")))
    status, _, err = invoke(train, ["--data", "shapes", "--out", tmp_path])
    assert (status, err) == (1, "train.py: error: no pictures today\n")


def test_without_bf16_or_glibc_the_run_goes_on(small, monkeypatch):
    monkeypatch.setattr(engine, "has_bf16_matrices", lambda device: False)
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert not cpu.keep_freed_memory()
    assert Runtime("cpu").precision == "fp32" and Runtime("cpu", "bf16").precision == "bf16"


def test_flip_tta_averages_the_mirrored_logits(small):
    runtime, normalize = Runtime("cpu", "fp32"), Normalize(small.mean, small.std, "cpu")
    model = build_model(RECIPES["default"], small.num_classes, 1, "cpu")
    plain, mirrored = (engine.predict(runtime, model, normalize, images) for images in (small.test_images, small.test_images.flip(3)))
    both = engine.predict(runtime, model, normalize, small.test_images, tta=True)
    assert torch.allclose(both, (plain + mirrored) / 2, rtol=0, atol=1e-6) and not torch.allclose(both, plain, rtol=0, atol=1e-3)
