"""Every source of pictures, and everything that may be wrong with one."""

import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CIFAR_COPY, Malicious, batch, make_official, members, python2_pickle, write_archive
from PIL import Image

import data
import pictures
import shapes
from augment import Augmenter
from cli import RunError, UsageError


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A good archive on a mirror of its own, known by its hashes; the mirrors of the project are out of reach."""
    path = write_archive(tmp_path / "mirror.tar.gz", members())
    make_official(monkeypatch, path)
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder of pictures: two classes, 3 train and 2 test pictures each, of several sizes and formats."""
    random = np.random.default_rng(0)
    root = tmp_path / "pictures"
    for part, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                side = (32, 32) if i else (50, 40)
                picture = Image.fromarray(random.integers(0, 256, (side[1], side[0], 3), dtype=np.uint8))
                picture.save(root / part / name / f"{i}.{'png' if i else 'bmp'}")
    return root


# --- CIFAR ---


def test_cifar_is_fetched_checked_and_read(mirror, tmp_path, capsys):
    dataset = data.load("cifar10", tmp_path / "data")
    first = batch(20, 1)
    assert dataset.train_images.shape == (100, 3, 32, 32) and dataset.train_images.dtype == torch.uint8
    assert dataset.train_images[3, 1, 2, 5] == first[b"data"][3, 1024 + 2 * 32 + 5]  # channel by channel, row by row
    assert dataset.train_labels[:20].tolist() == first[b"labels"] and dataset.train_labels.dtype == torch.int64
    assert dataset.test_images.shape == (30, 3, 32, 32)
    assert dataset.class_names == tuple(f"class{i}" for i in range(10))
    assert os.listdir(tmp_path / "data") == ["cifar-10-batches-py"]  # no archive, no temporary folder
    mirror.unlink()
    assert torch.equal(data.load("cifar10", tmp_path / "data").test_images, dataset.test_images)  # and not fetched again


def test_a_wrong_archive_is_refused_and_the_next_mirror_tried(mirror, tmp_path, monkeypatch, capsys):
    wrong = write_archive(tmp_path / "wrong.tar.gz", {**members(), "test_batch": b"something else"})
    monkeypatch.setenv("CIFAR10_URL", wrong.as_uri())
    assert data.load("cifar10", tmp_path / "data").name == "cifar10"
    tried = [line for line in capsys.readouterr().err.splitlines() if line.startswith("downloading")]
    assert tried == [f"downloading {wrong.as_uri()}", f"downloading {mirror.as_uri()}"]


def test_no_good_mirror_leaves_nothing_and_names_each(mirror, tmp_path, monkeypatch):
    mirror.write_bytes(mirror.read_bytes()[:-10])  # as if the connection had broken
    monkeypatch.setenv("CIFAR10_URL", "http://127.0.0.1:9/x")
    with pytest.raises(RunError, match=r"127\.0\.0\.1:9.*; file:.*not the official archive \(md5"):
        data.load("cifar10", tmp_path / "data")
    assert os.listdir(tmp_path / "data") == []


def test_an_interrupted_unpacking_leaves_nothing(mirror, tmp_path, monkeypatch):
    def interrupted(self, path, **_):
        (Path(path) / "cifar-10-batches-py").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(tarfile.TarFile, "extractall", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load("cifar10", tmp_path / "data")
    assert os.listdir(tmp_path / "data") == []


def test_an_archive_already_in_the_data_folder_is_used_and_kept(mirror, tmp_path):
    (tmp_path / "data").mkdir()
    mirror.rename(tmp_path / "data" / "cifar-10-python.tar.gz")
    assert data.load("cifar10", tmp_path / "data").name == "cifar10"
    assert (tmp_path / "data" / "cifar-10-python.tar.gz").exists()


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Malicious()),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 0], b"x": Malicious()}),
        pickle.dumps({b"data": np.zeros((2, 100), np.uint8), b"labels": [0, 0]}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]}),
        pickle.dumps([1, 2]),
        pickle.dumps({}),
        b"not a pickle",
        b"",
    ],
)
def test_a_damaged_or_hostile_batch_is_one_line_and_runs_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data" / "cifar-10-batches-py"
    root.mkdir(parents=True)
    for name, good in members().items():
        (root / name).write_bytes(content if name == "data_batch_3" else good)
    with pytest.raises(RunError, match="is damaged"):
        data.load("cifar10", tmp_path / "data")
    assert not (tmp_path / "executed").exists()


def test_cifar100_has_its_own_layout(tmp_path):
    root = tmp_path / "cifar-100-python"
    root.mkdir()
    for name, count in (("train", 50), ("test", 20)):
        content = batch(count, count, classes=100)
        (root / name).write_bytes(python2_pickle({b"data": content[b"data"], b"fine_labels": content[b"labels"]}))
    (root / "meta").write_bytes(python2_pickle({b"fine_label_names": [f"class{i}".encode() for i in range(100)]}))
    dataset = data.load("cifar100", tmp_path)
    assert dataset.num_classes == 100 and dataset.train_labels.max() > 9
    assert dataset.mean == pytest.approx((dataset.train_images.double() / 255).mean((0, 2, 3)).tolist())


def test_auto_without_cifar_warns_and_draws_shapes(mirror, small_shapes, tmp_path, capsys):
    mirror.unlink()
    dataset = data.load("auto", tmp_path / "data")
    assert dataset.name == dataset.source == "shapes"
    assert "WARNING: THIS IS NOT CIFAR-10" in capsys.readouterr().err


# --- a folder of pictures ---


def test_folder_is_decoded_and_resized(folder, tmp_path, capsys):
    dataset = data.load(str(folder), tmp_path / "data")
    assert (dataset.name, dataset.class_names) == ("pictures", ("cat", "dog"))
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1] and dataset.test_labels.tolist() == [0, 0, 1, 1]
    exact = np.asarray(Image.open(folder / "train" / "dog" / "1.png")).transpose(2, 0, 1)
    resized = np.asarray(Image.open(folder / "test" / "cat" / "0.bmp").resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(dataset.train_images[4].numpy(), exact)
    assert np.array_equal(dataset.test_images[0].numpy(), resized)
    assert dataset.std == pytest.approx((dataset.train_images.double() / 255).transpose(0, 1).flatten(1).std(1, correction=0).tolist())


def test_folder_is_decoded_once_and_again_when_it_changes(folder, tmp_path, monkeypatch, capsys):
    before = data.load(str(folder), tmp_path / "data")
    decodings = []
    monkeypatch.setattr(pictures, "decode", lambda paths, decode=pictures.decode: decodings.append(paths) or decode(paths))
    assert torch.equal(data.load(str(folder), tmp_path / "data").train_images, before.train_images)
    assert not decodings
    Image.new("RGB", (32, 32), "red").save(folder / "train" / "cat" / "1.png")
    assert data.load(str(folder), tmp_path / "data").train_images[1, 0].min() == 255
    (folder / "test" / "dog" / "1.png").unlink()
    assert len(data.load(str(folder), tmp_path / "data").test_images) == 3
    assert len(decodings) == 2
    (cache,) = (tmp_path / "data").iterdir()
    cache.write_bytes(cache.read_bytes()[:1000])
    assert len(data.load(str(folder), tmp_path / "data").test_images) == 3


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_a_picture_of_another_mode_is_converted_or_refused_as_asked(tmp_path, mode):
    Image.new("RGB", (40, 20), "white").convert(mode).save(tmp_path / "picture.tif")
    assert (pictures.decode_one(tmp_path / "picture.tif") == 255).all()
    with pytest.raises(RunError, match=f"picture.tif cannot be read as a picture .its mode is {mode}, not RGB"):
        pictures.decode_one(tmp_path / "picture.tif", convert=False)


def test_what_a_file_manager_leaves_is_no_picture(folder, tmp_path, capsys):
    (folder / "train" / "dog" / "Thumbs.db").write_bytes(b"something else")
    assert len(data.load(str(folder), tmp_path / "data").train_images) == 6


def test_a_checkpoints_pictures_are_where_its_run_had_them(folder, tmp_path, capsys):
    data.load_for({"config": {"data": str(folder), "data_dir": str(tmp_path / "kept")}, "class_names": ["cat", "dog"]}, None, None, "cpu")
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_unreadable_picture_is_named(folder, tmp_path, capsys):
    (folder / "train" / "dog" / "2.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(RunError, match="dog/2.png cannot be read as a picture"):
        data.load(str(folder), tmp_path / "data")


def remove(path):
    for entry in path.iterdir():
        remove(entry) if entry.is_dir() else entry.unlink()
    path.rmdir()


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda root: remove(root / "test"), "has no folder test/"),
        (lambda root: remove(root / "train" / "cat"), "class 'cat' is in test/ alone"),
        (lambda root: [remove(path) for path in (root / "train").iterdir()], "train has no class folders"),
        (lambda root: [path.unlink() for path in (root / "test" / "dog").iterdir()], "dog is empty"),
        (lambda root: remove(root), "neither a folder that exists nor one of"),
    ],
)
def test_another_layout_is_told(folder, tmp_path, spoil, told):
    spoil(folder)
    with pytest.raises(UsageError, match=told):
        data.load(str(folder), tmp_path / "data")


@pytest.mark.skipif(not CIFAR_COPY.is_dir(), reason="no folder of real CIFAR-10 pictures under data/cifar10-folder or $CIFAR10_FOLDER")
def test_real_pictures_have_cifar10s_statistics(tmp_path, capsys):
    dataset = data.load(str(CIFAR_COPY), tmp_path)
    assert dataset.train_labels.bincount().tolist() == [5000] * 10 and dataset.test_labels.bincount().tolist() == [1000] * 10
    assert dataset.class_names == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert dataset.mean == pytest.approx(data.CIFAR10_MEAN, abs=0.003) and dataset.std == pytest.approx(data.CIFAR10_STD, abs=0.003)


# --- shapes ---


def test_shapes_are_the_same_for_the_same_seed_and_balanced():
    images, labels, masks = shapes.draw(200, seed=3)
    again = shapes.draw(200, seed=3)
    assert all(torch.equal(a, b) for a, b in zip((images, labels, masks), again))
    assert not torch.equal(images, shapes.draw(200, seed=4)[0])
    assert labels.bincount().tolist() == [20] * 10
    assert images.shape == (200, 3, 32, 32) and masks.shape == (200, 32, 32)


def test_masks_cover_the_object():
    """Inside and outside differ in colour, and a mask is neither nothing nor everything."""
    images, _, masks = shapes.draw(500, seed=0)
    share = masks.double().mean((1, 2))
    assert share.min() > 0.02 and share.max() < 0.7
    inside = (images * masks[:, None]).sum((2, 3)) / masks.sum((1, 2))[:, None]
    outside = (images * ~masks[:, None]).sum((2, 3)) / (~masks).sum((1, 2))[:, None]
    assert ((inside - outside).abs().max(1).values > 25).double().mean() > 0.95


def test_colour_tells_nothing_of_the_class():
    images, labels, _ = shapes.draw(4000, seed=0)
    colour = images.double().div(255).mean((2, 3))  # (4000, 3), deviation 0.27 over pictures, so 0.013 over a class of 400
    for label in range(10):
        assert (colour[labels == label].mean(0) - colour.mean(0)).abs().max() < 0.06, shapes.CLASS_NAMES[label]


def test_a_linear_classifier_cannot_tell_shapes():
    images, labels, _ = shapes.draw(12_000, seed=0)
    x = torch.cat([images.flatten(1).float() / 255 - 0.5, torch.ones(len(images), 1)], 1)
    y = torch.nn.functional.one_hot(labels).float()
    gram = x[:10_000].T @ x[:10_000] + 10 * torch.eye(x.shape[1])
    predictions = (x[10_000:] @ torch.linalg.solve(gram, x[:10_000].T @ y[:10_000])).argmax(1)
    assert (predictions == labels[10_000:]).double().mean() < 0.15


def test_statistics_are_exact():
    images = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = data.statistics(images)
    exact = images.double().div(255).transpose(0, 1).flatten(1)
    assert mean == pytest.approx(exact.mean(1).tolist(), rel=1e-12) and std == pytest.approx(exact.std(1, correction=0).tolist(), rel=1e-12)


def test_held_out_pictures_are_train_pictures_that_are_trained_on_no_more(small):
    held = data.hold_out(small, 60)
    assert (len(held.train_images), len(held.test_images), held.name) == (240, 60, "shapes-val60")
    rows = lambda images, labels, masks: {(*image.flatten().tolist(), label.item(), *mask.flatten().tolist()) for image, label, mask in zip(images, labels, masks)}
    train, val = (rows(*(getattr(held, f"{part}_{kind}") for kind in ("images", "labels", "masks"))) for part in ("train", "test"))
    assert not train & val and train | val == rows(small.train_images, small.train_labels, small.train_masks)
    assert torch.equal(held.test_images, data.hold_out(small, 60).test_images) and (held.mean, held.std) == (small.mean, small.std)
    assert set(map(tuple, data.hold_out(small, 30).test_images.flatten(1).tolist())) <= set(map(tuple, held.test_images.flatten(1).tolist()))


def test_script_describes_and_draws_samples_of_the_first_epochs_of_a_run(small_shapes, monkeypatch, tmp_path, invoke):
    """Of a recipe whose crops are calm at the end, the five epochs that are shown are not."""
    made = []
    monkeypatch.setattr(data, "Augmenter", lambda *arguments: made.append(Augmenter(*arguments)) or made[0])
    status, out, _ = invoke(data, ["--data", "shapes", "--recipe", "default", "--out", tmp_path / "data.png"])
    assert status == 0 and "checkered" in out and "red        mean" in out
    assert (tmp_path / "data.png").read_bytes().startswith(b"\x89PNG")
    assert made[0].augmentation.calm_share and made[0].calm_from > 5
