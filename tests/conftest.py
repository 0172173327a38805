"""What the test files share: small datasets, trainers on them, scripts run in the test process."""

import copy
import dataclasses
import multiprocessing
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

# Tests are many small operations: threads gain little, and lose minutes beside other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from PIL import Image

# Read when a kernel is imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import cli
import data
from checkpoint import save_checkpoint
from recipes import RECIPES
from runtime import Ranks, Runtime
from train import Trainer
from vit import build_model

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the kernels
RUN_FILES = ["best.pt", "config.json", "curves.png", "history.csv", "last.pt"]
# Processes are forked from one that has imported torch once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train"])


def pytest_addoption(parser):
    parser.addoption("--order", help="run tests in another order: reversed, or a seed to shuffle")


def pytest_collection_modifyitems(config, items):
    order = config.getoption("--order")
    if order == "reversed":
        items.reverse()
    elif order is not None:
        random.Random(order).shuffle(items)


@pytest.fixture(autouse=True)
def exact_convolutions():
    """PyTorch, which the kernels are compared with, has no TF32 in convolutions."""
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def small():
    """300 training and 100 test images."""
    return data.load_shapes(300, 100)


@pytest.fixture
def small_shapes(monkeypatch, small):
    """`--data shapes` is `small`."""
    monkeypatch.setattr(data, "load_shapes", lambda: small)


@pytest.fixture
def text_figures(monkeypatch):
    """Figures are saved as text, which is faster."""

    def savefig(figure, path, **options):
        path.write_text("figure")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)


@pytest.fixture
def tiny_shapes(monkeypatch, text_figures):
    """`--data shapes` is 20 training and 10 test images."""
    tiny = data.load_shapes(20, 10)
    monkeypatch.setattr(data, "load_shapes", lambda: tiny)


@pytest.fixture
def invoke(monkeypatch, capsys):
    """invoke(module, args) runs a script's main here: (exit status, stdout, stderr)."""

    def invoked(module, args):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        status = 0
        try:
            cli.run_script(module.main)
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return invoked


@pytest.fixture
def succeeds(invoke):
    """succeeds(module, args): stdout of a script that exits with status 0 and without a warning."""

    def check(module, args):
        status, out, err = invoke(module, args)
        assert (status, err) == (0, "")
        return out

    return check


@pytest.fixture
def fails(invoke):
    """fails(module, args, status=2): the line on stderr of a script that exits with status."""

    def check(module, args, status=2):
        actual, _, err = invoke(module, args)
        assert (actual, err.count("\n")) == (status, 1), err
        assert err.startswith(f"{module.__name__}.py: error: ")
        return err

    return check


def small_recipe(**changes):
    """Recipe original for `small`, without augmentation."""
    plain = dict(epochs=2, batch_size=128, crop_padding=0, flip_p=0.0, affine_p=0.0, cutout_p=0.0)
    return dataclasses.replace(RECIPES["original"], **{**plain, **changes})


def make_trainer(dataset, recipe, seed=1, device="cpu", **runtime):
    """A fresh Trainer on `device`, where the dataset is."""
    return Trainer(recipe, dataset, Runtime(device, **runtime), seed)


def train_epoch(trainer, epoch):
    """Train for a whole epoch: (mean loss, accuracy in percent)."""
    trainer.begin_epoch(epoch)
    for i in range(trainer.steps_per_epoch):
        trainer.step(i)
    return trainer.end_epoch()


def make_model():
    """A fresh network in which embeddings are small enough not to hide the image."""
    recipe = dataclasses.replace(RECIPES["original"], embed_init_std=0.02)
    return build_model(recipe, 10, 1, "cpu").eval()


class FakeRank(Ranks):
    """A rank which records what it reduces, and adds what `others` have recorded."""

    def __init__(self, rank, world_size, others=()):
        super().__init__(rank, world_size)
        self.others = others
        self.recorded = []

    def all_reduce_sum(self, tensor):
        self.recorded.append(tensor.clone())
        for other in self.others:
            tensor += other.recorded[-1]
        return tensor


def only_run(out):
    """The folder of the only run under `out`."""
    (folder,) = (out / "runs").iterdir()
    return folder


def save_small_checkpoint(path, dataset, **config):
    """A best.pt of `dataset`, of a fresh network."""
    config = {"data": dataset.spec, "recipe": "original", "val_split": None, **config}
    save_checkpoint(path, make_model(), dataset, config, 1, 10.0)
    return path


def write_images(root, num_train, num_test):
    """A folder of noise images of two classes, as many of each."""
    noise = np.random.default_rng(0)
    for split, count in (("train", num_train), ("test", num_test)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count // 2):
                image = noise.integers(0, 256, (32, 32, 3)) // 2 + (60 if name == "dog" else 0)
                Image.fromarray(image.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def tampered(ckpt, *path, value=None):
    """A copy with the value at `path` replaced, or deleted, and a sha256 that fits."""
    ckpt = copy.deepcopy({k: v for k, v in ckpt.items() if k != "sha256"})
    inner = ckpt
    for name in path[:-1]:
        inner = inner[name]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return {**ckpt, "sha256": cli.sha256(ckpt)}


class Malicious:
    """Unpickled, it leaves a file `executed` behind."""

    def __reduce__(self):
        return os.system, ("touch executed",)
