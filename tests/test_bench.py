"""bench.py: its table, and that every variant trains."""

import dataclasses

import pytest
import torch

import bench
import data
from cli import read_csv
from recipes import RECIPES


@pytest.fixture
def tiny(monkeypatch):
    """Recipe default trains one epoch in batches of 4; a whole dataset has 20 images."""
    recipe = dataclasses.replace(RECIPES["default"], epochs=1, batch_size=4)
    monkeypatch.setitem(RECIPES, "default", recipe)
    load_shapes = data.load_shapes

    def smaller(num_train, num_test):
        return load_shapes(min(num_train, 20), min(num_test, 10))

    monkeypatch.setattr(data, "load_shapes", smaller)


def test_a_row_compares_the_times_of_each_round():
    auto = [1.0, 2.0, 4.0]  # seconds
    row = bench.make_row("eager", [2.0, 6.0, 4.0], auto, batch_size=50, steps=100)
    assert row == {
        "variant": "eager",
        "ms_per_step": "40",
        "images_per_s": "1250",
        "time_over_auto": "2.00",
        "range": "1.00 to 3.00",
    }
    assert bench.make_row("eager", [2.0], None, batch_size=50, steps=100)["range"] == ""


def test_every_variant_trains(tiny, monkeypatch, tmp_path, succeeds):
    compiled = []

    def compile(function, mode):  # the real one takes half a minute
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    csv = tmp_path / "bench.csv"
    args = ["--device", "cpu", "--rounds", 2, "--steps", 2, "--csv", csv]
    out = succeeds(bench, args)
    rows = read_csv(csv)
    assert [row["variant"] for row in rows] == ["eager", "compile", "auto"]
    assert len(compiled) == 1
    for row in rows:
        assert float(row["ms_per_step"]) > 0
        assert row["recipe"] == "default"
        assert f"| {row['variant']} | {row['ms_per_step']} |" in out
    assert rows[2]["time_over_auto"] == "1.00"
