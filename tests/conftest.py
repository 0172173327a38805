"""What several test files share: small data, a trainer on it, and a script run inside the test's process."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

# Tests are many small operations: with threads they gain little alone, and beside other work lose minutes to waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # settled before a kernel is imported

import data
from augment import Augmentation, Normalize
from cli import run
from engine import Runtime, Trainer
from recipe import RECIPES, build_model

# A folder of real CIFAR-10 pictures, train/<class>/* and test/<class>/*; tests that need one skip where there is none.
CIFAR_COPY = Path(os.environ.get("CIFAR10_FOLDER", Path(__file__).parent.parent / "data" / "cifar10-folder"))


@pytest.fixture
def small():
    """300 training and 100 test pictures."""
    return data.load_shapes(train=300, test=100)


@pytest.fixture
def small_shapes(monkeypatch, small):
    """`--data shapes` is `small`."""
    monkeypatch.setattr(data, "load_shapes", lambda: small)


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
    """A fresh Trainer on `device`, where the dataset's tensors are, and its Normalize."""
    normalize = Normalize(dataset.mean, dataset.std, device)
    model = build_model(recipe, dataset.num_classes, seed, device)
    return Trainer(model, dataset, recipe, Runtime(device, **runtime), normalize, seed), normalize
