"""What several test files share: small data, a trainer on it, and a script run inside the test's process."""

import copy
import dataclasses
import hashlib
import io
import os
import pickle
import pickletools
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

# Tests are many small operations: with threads they gain little alone, and beside other work lose minutes to waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from PIL import Image

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # settled before a kernel is imported

import checkpoint
import cifar
import data
import files
import plots
from augment import Augmentation
from cli import run
from engine import Runtime, Trainer
from recipe import RECIPES, build_model

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where kernels run
# A folder of real CIFAR-10 pictures, train/<class>/* and test/<class>/*; tests that need one skip where there is none.
CIFAR_COPY = Path(os.environ.get("CIFAR10_FOLDER", ROOT / "data" / "cifar10-folder"))


@pytest.fixture
def small():
    """300 training and 100 test pictures."""
    return data.load_shapes(train=300, test=100)


@pytest.fixture
def small_there(small):
    """`small` on DEVICE."""
    return dataclasses.replace(small, train_images=small.train_images.to(DEVICE), train_labels=small.train_labels.to(DEVICE))


@pytest.fixture
def small_shapes(monkeypatch, small):
    """`--data shapes` is `small`."""
    monkeypatch.setattr(data, "load_shapes", lambda: small)


@pytest.fixture
def tiny_shapes(monkeypatch):
    """`--data shapes` is 20 training and 10 test pictures, and figures are drawn at once."""
    tiny = data.load_shapes(20, 10)
    monkeypatch.setattr(data, "load_shapes", lambda: tiny)

    def save(made, path):
        with files.replacing(path) as temporary:
            temporary.write_text("figure")

    monkeypatch.setattr(plots, "save", save)


@pytest.fixture
def invoke(monkeypatch, capsys):
    """invoke(module, arguments): a script's main in this process -> exit status, standard output, standard error."""

    def invoked(module, arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        try:
            run(module.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return invoked


def small_recipe(**changes):
    """The original recipe for `small`, without augmentation."""
    return dataclasses.replace(RECIPES["original"], epochs=2, batch_size=128, augmentation=Augmentation(), **changes)


def make_trainer(dataset, recipe, seed=1, device="cpu", **runtime):
    """A fresh Trainer on `device`, where the dataset's tensors are."""
    return Trainer(recipe, dataset, Runtime(device, **runtime), seed)


def make_model(seed=1):
    """PyTorch's start, with small embeddings: behind a pooled start, LayerNorm takes away what a whole map is raised by."""
    return build_model(dataclasses.replace(RECIPES["original"], embedding_std=0.02), 10, seed, "cpu").eval()


def run_folder(out):
    """The only run under `out`."""
    (folder,) = (out / "runs").iterdir()
    return folder


def write_pictures(root, train_count, test_count):
    """A folder of noise pictures of two classes, as many of each."""
    noise = np.random.default_rng(0)
    for part, count in (("train", train_count), ("test", test_count)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(count // 2):
                picture = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8) // 2 + (60 if name == "dog" else 0)
                Image.fromarray(picture.astype(np.uint8)).save(root / part / name / f"{i}.png")
    return root


def tampered(content, *path, value=None):
    """A copy with the value at `path` replaced, or without it, and the digest made to fit."""
    content = copy.deepcopy({name: part for name, part in content.items() if name != "sha256"})
    inner = content
    for name in path[:-1]:
        inner = inner[name]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return {**content, "sha256": checkpoint.sha256(content)}


class Malicious:
    """Unpickled, it leaves a file `executed` behind."""

    def __reduce__(self):
        return os.system, ("touch executed",)


# --- small CIFAR archives ---


def batch(n, seed, classes=10):
    random = np.random.default_rng(seed)
    return {b"data": random.integers(0, 256, (n, 3072), dtype=np.uint8), b"labels": random.integers(0, classes, n).tolist()}


def python2_pickle(content):
    """Bytes as the official archives hold them, written by Python 2: old module names, and strings where we have bytes."""
    written = bytearray(pickle.dumps(content, protocol=3).replace(b"numpy._core", b"numpy.core"))
    older = {"BINBYTES": b"T", "SHORT_BINBYTES": b"U", "BINUNICODE": b"T"}  # opcodes of the same layout
    for opcode, _, place in list(pickletools.genops(bytes(written))):
        written[place : place + 1] = older.get(opcode.name, written[place : place + 1])
    written[1] = 2  # the protocol
    return bytes(written)


def members():
    """The files of a small CIFAR-10 archive: name -> bytes."""
    files = {f"data_batch_{i}": batch(20, i) for i in range(1, 6)} | {"test_batch": batch(30, 9)}
    files["batches.meta"] = {b"label_names": [f"class{i}".encode() for i in range(10)]}
    return {name: python2_pickle(content) for name, content in files.items()}


def write_archive(path, files, folder="cifar-10-batches-py"):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def make_official(monkeypatch, path):
    """Let this archive be the official one, on the only mirror."""
    hashes = {name: hashlib.new(name, path.read_bytes()).hexdigest() for name in ("md5", "sha256")}
    monkeypatch.setitem(cifar.ARCHIVES, "cifar10", dataclasses.replace(cifar.ARCHIVES["cifar10"], hashes=hashes, mirrors=(path.as_uri(),)))
    monkeypatch.delenv("CIFAR10_URL", raising=False)
