"""A training step as a CUDA graph: what is replayed, and what happens where nothing can be recorded."""

import dataclasses

import pytest
import torch
from conftest import DEVICE, make_trainer

from engine import StepGraphs
from recipe import RECIPES


@pytest.mark.parametrize("size", [5, 3])
def test_a_graph_that_cannot_be_recorded_is_done_without(size, monkeypatch, capsys):
    updates = []

    def update(indices, epoch):
        updates.append((len(indices), epoch))
        return len(updates), None

    def record(self, indices):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(StepGraphs, "record", record)
    graphs = StepGraphs(update, None)
    results = [graphs(torch.arange(size), epoch)[0] for epoch in range(6)]
    assert results == [1, 2, 3, 4, 5, 6] and updates == [(size, epoch) for epoch in range(6)]
    assert capsys.readouterr().err == (
        "CUDA graph: not recorded (operation not permitted when stream is capturing); every kernel is launched by itself\n"
    )


def test_a_replay_reads_the_pictures_and_the_epoch_of_its_step(monkeypatch):
    """With a recording that, for want of a GPU, calls the function again on the tensors that it was recorded with."""

    def update(indices, epoch):
        return indices.sum() + 100 * epoch, indices.max() + epoch

    class Recording:
        def __init__(self, inputs, results):
            self.inputs, self.results = inputs, results

        def replay(self):
            for result, value in zip(self.results, update(*self.inputs)):
                result.copy_(value)

    def record(self, indices):
        inputs, results = (torch.zeros_like(indices), torch.zeros((), dtype=torch.int64)), (torch.zeros(()), torch.zeros(()))
        return Recording(inputs, results), inputs, results

    monkeypatch.setattr(StepGraphs, "record", record)
    graphs = StepGraphs(update, None)
    for i in range(12):
        indices = torch.arange(i, i + 4 + i % 2)  # two batch sizes, in turn
        assert [int(value) for value in graphs(indices, i)] == [int(value) for value in update(indices, i)]
    assert set(graphs.recorded) == {4, 5}


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", ["original", "default"])
def test_a_graph_trains_as_no_graph_does(small_there, recipe, capsys):
    """Two epochs, augmentation and a partial batch included, end with the same weights, bit for bit."""
    trained = []
    for graphs in (True, False):
        plan = dataclasses.replace(RECIPES[recipe], epochs=4, batch_size=128)
        trainer = make_trainer(small_there, plan, device=DEVICE, precision="bf16", kernels_name="triton")
        if not graphs:
            trainer.graphs = None
        losses = [trainer.epoch(epoch, trainer.steps_per_epoch) for epoch in range(4)]
        trained.append((losses, [p.detach().clone() for p in trainer.model.parameters()]))
        if graphs:
            assert set(trainer.graphs.recorded) == {128, 300 - 2 * 128}
    assert capsys.readouterr().err == ""
    assert trained[0][0] == trained[1][0]
    assert all(torch.equal(a, b) for a, b in zip(trained[0][1], trained[1][1]))
