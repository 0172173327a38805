"""Checkpoints: what is saved comes back; damaged, hostile and wrong files are refused in a line."""

import math
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import Malicious, make_model, save_small_checkpoint, tampered

import evaluate
import train
from checkpoint import load_checkpoint
from cli import UsageError, sha256


@pytest.fixture(scope="module")
def good(small, tmp_path_factory):
    return save_small_checkpoint(tmp_path_factory.mktemp("good") / "best.pt", small)


def test_a_checkpoint_has_what_a_script_needs(good, small):
    model, ckpt = load_checkpoint(good, "cpu")
    assert sha256(dict(model.state_dict())) == sha256(dict(make_model().state_dict()))
    assert not model.training
    assert ckpt["class_names"] == list(small.class_names)
    assert (ckpt["mean"], ckpt["std"]) == (list(small.mean), list(small.std))
    assert (ckpt["epoch"], ckpt["test_accuracy"]) == (1, 10.0)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_file_is_refused(good, tmp_path, damage):
    content = bytearray(good.read_bytes())
    middle = len(content) // 2
    if damage == "truncated":
        content = content[:middle]
    elif damage == "flipped":
        content[middle] ^= 16
    else:
        content = b""
    path = tmp_path / "damaged.pt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="checkpoint"):
        load_checkpoint(path, "cpu")


def test_a_flipped_bit_with_a_valid_zip_is_refused(good, tmp_path):
    ckpt = torch.load(good, weights_only=True)
    ckpt["model"]["cls_token"].view(torch.int32)[0, 0, 5] ^= 4
    torch.save(ckpt, tmp_path / "flipped.pt")  # torch sees nothing wrong
    with pytest.raises(UsageError, match="its sha256 does not match its content"):
        load_checkpoint(tmp_path / "flipped.pt", "cpu")


def test_a_checkpoint_with_code_does_not_run_it(good, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    ckpt = torch.load(good, weights_only=True)
    torch.save({**ckpt, "config": Malicious()}, "zip.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Malicious()))
    for name in ("zip.pt", "plain.pt"):
        for module, flag in ((evaluate, "--ckpt"), (train, "--resume")):
            line = f"error: {name} is not a checkpoint, or a damaged one\n"
            assert fails(module, [flag, name]).endswith(line)
    assert not Path("executed").exists()
    torch.load("zip.pt", weights_only=False)
    assert Path("executed").exists()  # it would have run


def contained(value, times, depth):
    """A list of `times` the same list, and so on, around a value."""
    for _ in range(depth):
        value = [value] * times
    return value


CIRCLE = []
CIRCLE.append(CIRCLE)
HOSTILE = {  # a value of a config, and a part of the line
    "nested": (contained(1, 2, 20), "too deep within each other"),
    "circle": (CIRCLE, "too deep within each other"),
    "shared": (contained(1, 100, 3), "more than its file"),
    "long text": (contained("x" * 1000, 1000, 1), "more than its file"),
    "expanded": (torch.zeros(1).expand(10**6), "more than its file"),
    "many views": (contained(torch.zeros(1000), 1000, 1), "more than its file"),
    "sparse": (torch.eye(3).to_sparse(), "torch.sparse_coo"),
    "bf16": (torch.zeros(1, dtype=torch.bfloat16), "torch.bfloat16"),
    "meta": (torch.zeros(10**9, device="meta"), "meta"),
    "negated": (torch.tensor([1j]).conj().imag, "a tensor that is"),
    "set": ({1, 2}, "it holds a set"),
    "number": (2**100, "more than 64 bits"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_stands_for_more_than_it_has_is_refused(name, good, tmp_path):
    """It is before its sha256, which would take its time and memory, is compared."""
    value, message = HOSTILE[name]
    ckpt = torch.load(good, weights_only=True)
    ckpt["config"]["x"] = value
    torch.save(ckpt, tmp_path / "hostile.pt")
    with pytest.raises(UsageError, match=f"is not a valid checkpoint .*{message}") as error:
        load_checkpoint(tmp_path / "hostile.pt", "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["compressed", "legacy"])
def test_a_file_whose_content_is_larger_is_not_loaded(kind, good, tmp_path):
    """torch.load would unpack a compressed one, and believe the sizes in a legacy one."""
    path = tmp_path / "other.pt"
    if kind == "legacy":
        ckpt = torch.load(good, weights_only=True)
        torch.save(ckpt, path, _use_new_zipfile_serialization=False)
    else:
        with zipfile.ZipFile(good) as file, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as to:
            for name in file.namelist():
                to.writestr(name, file.read(name))
    torch.load(path, weights_only=True)
    with pytest.raises(UsageError, match="is not a checkpoint, or a damaged one"):
        load_checkpoint(path, "cpu")


def test_a_device_is_no_checkpoint(tmp_path):
    """Nor is a FIFO, but without the check reading one would hang."""
    (tmp_path / "best.pt").symlink_to(os.devnull)
    with pytest.raises(UsageError, match="best.pt: not a regular file"):
        load_checkpoint(tmp_path / "best.pt", "cpu")


INVALID = [  # path and value; None deletes it
    (("config",), None),
    (("config",), []),
    (("config", "data"), 5),
    (("config", "data"), None),
    (("config", "data_dir"), 5),
    (("class_names",), ["a"] * 11),
    (("class_names",), list(range(10))),
    (("class_names",), 7),
    (("mean",), [0.5]),
    (("std",), [math.nan] * 3),
    (("std",), [0.0] * 3),
    (("std",), ["a"] * 3),
    (("epoch",), None),
    (("model_config", "depth"), 10**9),  # too large for memory
    (("model_config", "dim"), 10**7),
    (("model_config", "depth"), None),
    (("model_config", "num_classes"), 11),
    (("model_config", "image_size"), 16),
    (("model_config",), 3),
    (("model_config",), {"depth": 3}),
    (("model",), []),
    (("model", "cls_token"), torch.zeros(2)),
    (("model", "cls_token"), None),
    (("model", "cls_token"), torch.zeros(1, 1, 64, dtype=torch.float64)),
    (("model", "cls_token"), "x"),
    (("model", "cls_token"), torch.full((1, 1, 64), math.nan)),
]


def test_an_invalid_checkpoint_with_a_fitting_sha256_is_one_line(good, tmp_path, fails):
    ckpt = torch.load(good, weights_only=True)
    for path, value in INVALID:
        torch.save(tampered(ckpt, *path, value=value), tmp_path / "tampered.pt")
        err = fails(evaluate, ["--ckpt", tmp_path / "tampered.pt"])
        assert "is not a valid checkpoint" in err, (path, value)
