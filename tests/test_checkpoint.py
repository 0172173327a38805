"""Checkpoints: what is saved comes back; damaged, hostile and wrong files are refused in a line."""

import math
import pickle
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


INVALID = [  # path and value; None deletes it
    (("config",), None),
    (("config",), []),
    (("config", "data"), 5),
    (("config", "data"), None),
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
