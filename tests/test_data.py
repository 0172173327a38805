"""Datasets by their spec, their statistics and splits, and the script's samples."""

import os
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, write_images

import data
import sources
from augment import Normalize, augment, epoch_plan
from cli import RunError
from schedule import RECIPES

CIFAR_FOLDER = Path(os.environ.get("CIFAR10_FOLDER", ROOT / "data" / "cifar10-folder"))


def test_auto_without_cifar10_warns_and_continues_with_shapes(small_shapes, monkeypatch, capsys):
    def fail(*args):
        raise RunError("no network")

    monkeypatch.setattr(sources, "load_cifar", fail)
    assert data.load("auto", "nowhere").name == "shapes"
    err = capsys.readouterr().err
    assert err.startswith("no network\n") and "THIS IS NOT CIFAR-10" in err
    with pytest.raises(RunError, match="no network"):
        data.load("cifar10", "nowhere")


def test_cifar10_has_the_mean_and_std_of_the_run_to_reproduce(small, monkeypatch):
    tensors = small.train_images, small.train_labels, small.test_images, small.test_labels
    monkeypatch.setattr(sources, "load_cifar", lambda *args: (*tensors, ("a",) * 10))
    cifar10, cifar100 = (data.load(spec, "nowhere") for spec in ("cifar10", "cifar100"))
    assert (cifar10.mean, cifar10.std) == (data.CIFAR10_MEAN, data.CIFAR10_STD)
    values = small.train_images.double().div(255).transpose(0, 1).flatten(1)
    assert cifar100.mean == pytest.approx(values.mean(1).tolist(), rel=1e-12)
    assert cifar100.std == pytest.approx(values.std(1, correction=0).tolist(), rel=1e-12)
    assert (cifar10.name, cifar10.spec, cifar10.num_classes) == ("cifar10", "cifar10", 10)


def test_a_folder_is_known_by_its_absolute_path(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "images", 6, 4)
    monkeypatch.chdir(tmp_path)
    dataset = data.load("images", "data")
    assert (dataset.name, dataset.spec) == ("images", str(tmp_path / "images"))
    assert dataset.train_images.shape == (6, 3, 32, 32) and dataset.class_names == ("cat", "dog")
    assert dataset.fingerprint() == data.load(dataset.spec, "elsewhere").fingerprint()


@pytest.mark.skipif(not CIFAR_FOLDER.is_dir(), reason="no folder of CIFAR-10 images")
def test_real_images_have_the_statistics_of_cifar10(tmp_path, capsys):
    dataset = data.load(str(CIFAR_FOLDER), tmp_path)
    counts = dataset.train_labels.bincount(), dataset.test_labels.bincount()
    assert [split.tolist() for split in counts] == [[5000] * 10, [1000] * 10]
    assert dataset.mean == pytest.approx(data.CIFAR10_MEAN, abs=0.003)
    assert dataset.std == pytest.approx(data.CIFAR10_STD, abs=0.003)


def test_held_out_images_are_training_images_no_longer_trained_on(small):
    def rows(*tensors):
        return {tuple(torch.cat([x.flatten() for x in row]).tolist()) for row in zip(*tensors)}

    split = data.train_val_split(small, 60)
    assert (len(split.train_images), len(split.test_images)) == (240, 60)
    train = rows(split.train_images, split.train_labels[:, None])
    val = rows(split.test_images, split.test_labels[:, None])
    assert not train & val
    assert train | val == rows(small.train_images, small.train_labels[:, None])
    assert split.test_masks is None  # those of `small` are of its test images
    again, fewer = (data.train_val_split(small, count) for count in (60, 30))
    assert torch.equal(split.test_images, again.test_images) and split.mean == small.mean
    assert torch.equal(split.test_images[:30], fewer.test_images) and split.name == "shapes-val60"


def test_class_balanced_indices_take_classes_in_turn():
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 1])
    mask = torch.tensor([True, True, True, False, True, True, True])
    indices = data.class_balanced_indices(labels, mask, 5)
    assert indices.tolist() == [0, 6, 4, 1, 5]
    assert data.class_balanced_indices(labels, mask, 100).tolist() == [0, 6, 4, 1, 5, 2]
    assert data.class_balanced_indices(labels, torch.zeros(7, dtype=torch.bool), 3).tolist() == []


def test_samples_are_what_a_run_trains_on(small_shapes, small, monkeypatch, tmp_path, succeeds):
    """The first row as stored, then as the plans of the first epochs augment these images."""
    spy = Mock(wraps=data.plots.sample_grid)
    monkeypatch.setattr(data.plots, "sample_grid", spy)
    args = ["--data", "shapes", "--recipe", "original", "--n", 5, "--out", tmp_path, "--seed", 3]
    out = succeeds(data, args)
    assert "checkered" in out and "red    mean" in out
    assert (tmp_path / "data.png").read_bytes().startswith(b"\x89PNG")
    recipe, normalize = RECIPES["original"], Normalize(small.mean, small.std, "cpu")
    plan = epoch_plan(recipe, 300, 32, 3, 0, "cpu")
    batch = augment(small.train_images[plan.indices], plan, recipe, normalize)
    grid = spy.call_args.args[0]
    assert torch.equal(grid[0], small.train_images[plan.indices[:5]])
    assert torch.equal(grid[1], normalize.invert(batch)[:5]) and len(grid) == 6
