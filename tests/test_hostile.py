"""Files that were made to harm, and files that came to harm: refused in a line, run nothing, and never taken for good ones."""

import dataclasses
import io
import os
import pickle
import random
import struct
import tarfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from conftest import Malicious, make_official, make_trainer, members, small_recipe, tampered, write_archive, write_pictures
from PIL import Image

import checkpoint
import cifar
import data
import evaluate
import lr_range
import pictures
import plots
import train
from cli import RunError, UsageError
from schedule import OneCycle

CORRUPTIONS = 200


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint as train.py writes it, with weights that training has moved."""
    dataset = data.load_shapes(300, 100)
    trainer = make_trainer(dataset, small_recipe())
    trainer.epoch(0, 3)
    path = tmp_path_factory.mktemp("good") / "best.pt"
    config = {"data": "shapes", "recipe": "original", "settings": dataclasses.asdict(trainer.recipe), "seed": 1}
    checkpoint.save(path, trainer.model, dataset, config, 1, 10.0)
    return path


def corrupt(content, number):
    """`content` truncated, with bits flipped, or with a piece of it written over another place; another way for each number."""
    chance, size = random.Random(number), len(content)
    if number % 3 == 0:
        return content[: chance.randrange(size)]
    content = bytearray(content)
    if number % 3 == 1:
        for _ in range(chance.choice((1, 1, 1, 5, 50))):
            content[chance.randrange(size)] ^= 1 << chance.randrange(8)
        return bytes(content)
    length, source, target = chance.randrange(1, size // 4), chance.randrange(size), chance.randrange(size)
    piece = content[source : source + length]
    if chance.random() < 0.5:
        return bytes(content[:target] + piece + content[target:])
    content[target : target + len(piece)] = piece
    return bytes(content)


def test_no_corrupted_checkpoint_is_taken_for_another(good, tmp_path):
    content, (_, wanted) = good.read_bytes(), checkpoint.load(good, "cpu")
    path, refused, slowest = tmp_path / "corrupt.pt", 0, 0.0
    for number in range(CORRUPTIONS):
        path.write_bytes(corrupt(content, number))
        started = time.monotonic()
        try:
            model, got = checkpoint.load(path, "cpu")
        except UsageError as error:
            refused += 1
            assert "\n" not in str(error) and "is not a checkpoint" in str(error)
        else:
            assert checkpoint.sha256(got) == checkpoint.sha256(wanted), number
            assert checkpoint.sha256(dict(model.state_dict())) == checkpoint.sha256(wanted["model"]), number
        slowest = max(slowest, time.monotonic() - started)
    print(f"{refused} of {CORRUPTIONS} refused, the others gave what was saved; the slowest took {slowest:.2f} s")
    assert refused > 0.7 * CORRUPTIONS and slowest < 10


def rewritten(path, change):
    """The checkpoint's zip archive written anew, with good checksums, its members' bytes changed by `change(name, bytes)`."""
    written = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(written, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, bytearray(old.read(name))))
    return written.getvalue()


def test_a_flipped_bit_that_the_zip_does_not_notice_is_refused(good, tmp_path):
    def flip(name, content):
        if name.endswith("data/7"):
            content[5] ^= 4
        return bytes(content)

    path = tmp_path / "flipped.pt"
    path.write_bytes(rewritten(good, lambda name, content: bytes(content)))
    checkpoint.load(path, "cpu")
    path.write_bytes(rewritten(good, flip))
    assert torch.load(path, weights_only=True)  # torch sees nothing wrong
    with pytest.raises(UsageError, match="is not a checkpoint of this project, or a damaged one: its sha256 is not that of its content"):
        checkpoint.load(path, "cpu")


def test_a_checkpoint_that_carries_code_does_not_run_it(good, tmp_path, monkeypatch, invoke):
    monkeypatch.chdir(tmp_path)
    content = torch.load(good, weights_only=True)
    torch.save({**content, "config": Malicious()}, "zip.pt")
    torch.save({**content, "extra": [Malicious()]}, "extra.pt")
    torch.save({**content, "config": Malicious()}, "old.pt", _use_new_zipfile_serialization=False)
    Path("plain.pt").write_bytes(pickle.dumps(Malicious()))
    for name in ("zip.pt", "extra.pt", "old.pt", "plain.pt"):
        for module, flag in ((evaluate, "--ckpt"), (train, "--resume")):
            status, _, err = invoke(module, [flag, name])
            assert status == 2 and err == f"{module.__name__}.py: error: {name} is not a checkpoint, or a damaged one\n"
    assert not Path("executed").exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load("zip.pt", weights_only=True)
    torch.load("zip.pt", weights_only=False)
    assert Path("executed").exists()  # what was kept from running does run


@pytest.mark.parametrize(
    "path, value",
    [
        (("config",), []), (("config",), {}), (("config", "data"), 5), (("config", "data"), None), (("class_names",), ["a"] * 10 + ["b"]),
        (("class_names",), list(range(10))), (("class_names",), 7), (("mean",), [0.5]), (("std",), [float("nan")] * 3), (("std",), ["a"] * 3),
        (("sizes", "depth"), 10**9), (("sizes", "dim"), 10**7), (("sizes", "depth"), None), (("sizes", "num_classes"), 11), (("sizes",), 3),
        (("sizes",), {"depth": 3}), (("epoch",), None), (("model", "cls_token"), torch.zeros(2)), (("model", "cls_token"), None), (("model", "cls_token"), torch.zeros(1, 1, 64, dtype=torch.float64)), (("model", "cls_token"), "x"),
        (("model",), []), (("model", "cls_token"), torch.zeros(1, 1, 64).to_sparse()), (("model", "cls_token"), torch.zeros(1, 1, 64, device="meta")),
    ],
)  # fmt: skip
def test_a_tampered_checkpoint_with_a_digest_that_fits_is_a_line(good, tmp_path, invoke, path, value):
    try:
        content = tampered(torch.load(good, weights_only=True), *path, value=value)
    except (TypeError, RuntimeError):  # no digest fits it
        content = torch.load(good, weights_only=True)
        content["model"]["cls_token"] = value
    torch.save(content, tmp_path / "tampered.pt")
    started = time.monotonic()
    status, _, err = invoke(evaluate, ["--ckpt", tmp_path / "tampered.pt", "--out", tmp_path])
    assert status == 2 and "tampered.pt is not a checkpoint" in err and err.count("\n") == 1
    assert time.monotonic() - started < 5  # sizes are held against the weights before anything of those sizes is made


def test_without_a_recipe_a_checkpoint_is_evaluated_all_the_same(good, tiny_shapes, tmp_path, invoke):
    torch.save(tampered(torch.load(good, weights_only=True), "config", "recipe"), tmp_path / "x.pt")
    assert invoke(evaluate, ["--ckpt", tmp_path / "x.pt", "--out", tmp_path])[0] == 0


# --- the archive ---


def test_no_corrupted_archive_is_taken_for_the_official_one(tmp_path, monkeypatch, capsys):
    """None passes the digest; and one that did would still end in a line."""
    archive = write_archive(tmp_path / "cifar-10-python.tar.gz", members())
    make_official(monkeypatch, archive)
    content, official = archive.read_bytes(), cifar.ARCHIVES["cifar10"]
    failed, slowest = 0, 0.0
    for number in range(CORRUPTIONS):
        archive.write_bytes(corrupt(content, number))
        assert archive.read_bytes() == content or cifar.wrong_hash(archive, official)
        monkeypatch.setattr(cifar, "wrong_hash", lambda path, archive: None)
        started = time.monotonic()
        try:
            data.load("cifar10", tmp_path / str(number))
        except RunError as error:
            failed += 1
            assert "\n" not in str(error)
        slowest = max(slowest, time.monotonic() - started)
        monkeypatch.undo()
        make_official(monkeypatch, archive)
    print(f"{failed} of {CORRUPTIONS} could not be unpacked or read; the slowest took {slowest:.2f} s")
    assert failed > 0.5 * CORRUPTIONS and slowest < 10
    archive.write_bytes(corrupt(content, 1))
    monkeypatch.setitem(cifar.ARCHIVES, "cifar10", official)
    with pytest.raises(RunError, match="not the official archive"):
        data.load("cifar10", tmp_path / "last")


def member(name, **fields):
    made = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(made, field, value)
    return made


@pytest.mark.parametrize(
    "hostile",
    [
        member("../escaped"),
        member("cifar-10-batches-py/../../escaped"),
        member("/tmp/../{place}/escaped"),
        member("cifar-10-batches-py/data_batch_1", type=tarfile.SYMTYPE, linkname="../../secret"),
        member("cifar-10-batches-py/data_batch_1", type=tarfile.SYMTYPE, linkname="{place}/secret"),
        member("cifar-10-batches-py/data_batch_1", type=tarfile.LNKTYPE, linkname="../secret"),
        member("cifar-10-batches-py/data_batch_1", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("cifar-10-batches-py/data_batch_1", type=tarfile.FIFOTYPE),
    ],
    ids=lambda value: f"{value.name} {value.linkname}",
)
def test_an_archive_reaches_nothing_outside_its_folder(tmp_path, monkeypatch, hostile, capsys):
    (tmp_path / "secret").write_text("secret")
    for field in ("name", "linkname"):
        setattr(hostile, field, getattr(hostile, field).format(place=tmp_path))
    archive = tmp_path / "mirror.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(hostile, io.BytesIO(b"") if hostile.isreg() else None)
    make_official(monkeypatch, archive)
    with pytest.raises(RunError, match="could not be put under|could not be had|is damaged"):
        data.load("cifar10", tmp_path / "data" / "inner")
    assert sorted(os.listdir(tmp_path)) == ["data", "mirror.tar.gz", "secret"] and (tmp_path / "secret").read_text() == "secret"
    assert [path for path in (tmp_path / "data").rglob("*") if path.name != "inner"] == []


def test_two_processes_may_fetch_at_once(tmp_path, monkeypatch, capsys):
    archive = write_archive(tmp_path / "mirror.tar.gz", members())
    make_official(monkeypatch, archive)

    def slow(url, path, download=cifar.try_download):
        monkeypatch.setattr(cifar, "try_download", download)
        data.load("cifar10", tmp_path / "data")  # the other one is faster
        return download(url, path)

    monkeypatch.setattr(cifar, "try_download", slow)
    assert len(data.load("cifar10", tmp_path / "data").train_images) == 100
    assert os.listdir(tmp_path / "data") == ["cifar-10-batches-py"]


# --- pictures and names ---


def png(width, height):
    """A PNG file that claims this size and holds nothing."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width, height", [(50_000, 50_000), (10_000, 10_000), (8193, 8192), (2**31 - 1, 2**31 - 1)])
def test_a_picture_bomb_is_refused_by_name(tmp_path, capsys, width, height):
    folder = write_pictures(tmp_path / "pictures", 6, 4)
    (folder / "train" / "dog" / "2.png").write_bytes(png(width, height))
    with warnings.catch_warnings(record=True) as warned:
        with pytest.raises(RunError, match=r"train/dog/2\.png cannot be read as a picture \(.*(exceeds limit|claims|could be).*") as refusal:
            data.load(str(folder), tmp_path / "data")
    assert "\n" not in str(refusal.value) and warned == []


def test_the_largest_picture_is_not_a_bomb(tmp_path):
    Image.new("L", (8192, 8192), 77).save(tmp_path / "large.png")
    assert pictures.decode_one(tmp_path / "large.png").tolist() == [[[77] * 32] * 32] * 3


def test_names_with_broken_tex_are_drawn_as_they_stand(tmp_path):
    names, images = ["$x_$", r"$\frac$", "a$b", "$$"], torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    matrix = torch.eye(4, dtype=torch.int64)
    row = {"epoch": 1, "train_loss": 1.0, "test_loss": 1.0, "train_accuracy": 1.0, "test_accuracy": 1.0}
    sweep = [{"rate": 10.0**-k, "loss": 2.0 - k / 9, "smoothed": 2.0 - k / 9, "train_accuracy": 1.0} for k in range(9, 0, -1)]
    drawn = {
        "confusion": plots.confusion(matrix, names, "$x_$"),
        "misclassified": plots.misclassified(images, [f"{name}\nas {name} 90 %" for name in names], "$x_$"),
        "samples": plots.sample_rows([images], names, ["as it is"], "$x_$"),
        "curves": plots.curves([row], OneCycle(0.1, 3, 0.3, 10, 10), 3, "$x_$"),
        "lr_range": plots.lr_range(sweep, lr_range.suggest(sweep, "exp"), "exp", "$x_$"),
    }
    for name, made in drawn.items():
        plots.save(made, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
