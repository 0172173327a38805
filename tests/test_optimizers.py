"""Muon against singular values in float64 and against torch's own, and what its recipes start from."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from augment import Augmentation
from conftest import make_trainer
from optimizers import COEFFICIENTS, Muon, MuonAndAdamW, orthogonalize, step_size
from recipe import RECIPES, build_model, build_vit

SHAPES = [(64, 64), (192, 64), (64, 256), (32, 27), (32, 128)]  # of the network's own
SPECTRA = {
    "even": lambda n: torch.linspace(1, 0.1, n),
    "steep": lambda n: torch.logspace(0, -2, n),
    "rank 3": lambda n: (torch.arange(n) < 3).float(),
}


def with_singular_values(shape, values, generator):
    """A float64 matrix (rows, columns) and its factors U, V."""
    u, _ = torch.linalg.qr(torch.randn(shape[0], len(values), dtype=torch.float64, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(shape[1], len(values), dtype=torch.float64, generator=generator))
    return u * values @ v.T, u, v


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_singular_values_end_near_1(spectrum):
    """Of five shapes in one call: those above a thousandth of the norm end in [0.7, 1.2], and directions stay."""
    generator, given = torch.Generator().manual_seed(0), []
    for shape in SHAPES:
        values = SPECTRA[spectrum](min(shape)).double()
        given.append((values, *with_singular_values(shape, values, generator)))
    for (values, matrix, u, v), result in zip(given, orthogonalize([matrix.float() for _, matrix, _, _ in given])):
        assert result.dtype == torch.float32 and result.shape == matrix.shape
        found = u.T @ result.double() @ v  # diagonal, if the directions stay
        large = values / values.norm() >= 1e-3
        assert found.diagonal()[large].min() > 0.7 and found.diagonal().max() < 1.2
        expected = values / values.norm()
        for a, b, c in COEFFICIENTS:
            expected = a * expected + b * expected**3 + c * expected**5
        assert torch.allclose(found, expected.diag(), rtol=0, atol=1e-3)


def test_every_singular_value_that_counts_is_brought_near_1():
    values = torch.logspace(-3, 0, 100_000, dtype=torch.float64)
    for a, b, c in COEFFICIENTS:
        values = a * values + b * values**3 + c * values**5
    assert 0.876 < values.min() and values.max() < 1.124


def test_a_gradient_of_zeros_moves_nothing():
    assert torch.equal(orthogonalize([torch.zeros(4, 6)])[0], torch.zeros(4, 6))


def test_muon_is_torchs_muon_on_matrices():
    """Five steps of wide, tall and square matrices, to what is left between two ways of the same polynomial in bf16 and fp32."""
    torch.manual_seed(0)
    ours = [torch.randn(shape).requires_grad_() for shape in [(8, 20), (20, 8), (16, 16)]]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    for i in range(5):
        lr, momentum = 0.1 / (i + 1), 0.95 - 0.02 * i
        gradients = [torch.randn_like(p) for p in ours]
        if i == 0:
            optimizer = Muon(ours, [1, 1, 1], 0.1)
            reference = torch.optim.Muon(theirs, weight_decay=0.1, nesterov=True)
        for p, q, gradient in zip(ours, theirs, gradients):
            p.grad, q.grad = gradient, gradient.clone()
        optimizer.prepare(lr, momentum)
        for group in reference.param_groups:
            group["lr"], group["momentum"] = lr, momentum
        before = [p.detach().clone() for p in ours]
        optimizer.step()
        reference.step()
        for p, q, old in zip(ours, theirs, before):
            moved, theirs_moved = (p - old).detach().flatten(), (q - old).detach().flatten()
            assert F.cosine_similarity(moved, theirs_moved, dim=0) > 0.97
            assert (moved.norm() / theirs_moved.norm()).item() == pytest.approx(1, abs=0.2)
        with torch.no_grad():
            for p, q in zip(ours, theirs):
                q.copy_(p)


def test_a_convolution_moves_as_its_matrix():
    torch.manual_seed(0)
    kernel, gradient = torch.randn(32, 3, 3, 3), torch.randn(32, 3, 3, 3)
    moved = []
    for shape in ((32, 3, 3, 3), (32, 27)):
        p = kernel.view(shape).clone().requires_grad_()
        p.grad = gradient.view(shape)
        optimizer = Muon([p], [1], 0.0)
        optimizer.prepare(0.1, 0.9)
        optimizer.step()
        moved.append(p.detach().view(-1))
    assert torch.equal(*moved) and not torch.equal(moved[0], kernel.view(-1))


def test_a_tall_matrix_moves_further():
    assert step_size(torch.zeros(192, 64)) == 3**0.5 and step_size(torch.zeros(64, 256)) == 1


def test_stacked_matrices_move_as_each_alone():
    torch.manual_seed(0)
    whole, gradient, moved = torch.randn(12, 6), torch.randn(12, 6), []
    for parameters, stacked in (([whole], [3]), (whole.chunk(3), [1, 1, 1])):
        parameters = [p.clone().requires_grad_() for p in parameters]
        for p, part in zip(parameters, gradient.chunk(len(parameters))):
            p.grad = part
        optimizer = Muon(parameters, stacked, 0.1)
        optimizer.prepare(0.1, 0.9)
        optimizer.step()
        moved.append(torch.cat([p.detach() for p in parameters]))
    assert torch.equal(*moved) and not torch.equal(moved[0], whole)


def muon_recipe(**changes):
    plain = dict(optimizer="muon", adamw_share=0.15, batch_size=100, epochs=2, max_lr=0.02, augmentation=Augmentation())
    return dataclasses.replace(RECIPES["original"], l1=0.0, **{**plain, **changes})


def test_muon_has_the_trunk_and_stem_and_adamw_the_rest(small):
    """Decay is Muon's alone, and q, k and v are matrices of their own."""
    trainer = make_trainer(small, muon_recipe(weight_decay=0.1))
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    assert isinstance(trainer.optimizer, MuonAndAdamW)
    (group,) = trainer.optimizer.muon.param_groups
    ours = {names[id(p)] for p in group["params"]}
    rest = {names[id(p)] for group in trainer.optimizer.adamw.param_groups for p in group["params"]}
    assert ours | rest == set(names.values()) and not ours & rest
    assert group["weight_decay"] == 0.1 and not any(g["weight_decay"] for g in trainer.optimizer.adamw.param_groups if g["params"])
    stacked = {names[id(p)]: count for p, count in zip(group["params"], trainer.optimizer.muon.stacked)}
    assert stacked == {name: 3 if name.endswith("qkv.weight") else 1 for name in ours}
    assert {name for name in rest if trainer.model.get_parameter(name).dim() > 1} == {"cls_token", "pos_embedding", "head.weight"}


def test_every_group_follows_the_schedule(small):
    trainer = make_trainer(small, muon_recipe())
    for step in range(trainer.schedule.total_steps):
        lr, momentum = trainer.schedule(step)
        trainer.step(torch.arange(10), 0, lr, momentum)
        (matrices,), others = trainer.optimizer.muon.param_groups, trainer.optimizer.adamw.param_groups
        assert (matrices["lr"], matrices["momentum"]) == (lr, momentum)
        assert {(group["lr"], group["betas"][0]) for group in others} == {(0.15 * lr, momentum)}


def test_a_pooled_start_averages_cells(small):
    plain, pooled = (build_model(muon_recipe(pooled_start=on), small.num_classes, 1, "cpu") for on in (False, True))
    maps = torch.randn(2, 32, 16, 16)
    weight = pooled.stem.project.weight
    cells = F.avg_pool2d(maps, 2).flatten(2)  # (2, 32, 16, 16) -> (2, 32, 8, 8) -> (2, 32, 64)
    projected = maps.flatten(2) @ weight.detach().T
    assert torch.allclose(projected, cells * (projected.norm() / cells.norm()), atol=1e-5)
    assert weight.norm().item() == pytest.approx(plain.stem.project.weight.norm().item(), rel=1e-5)
    for (name, p), q in zip(pooled.named_parameters(), plain.parameters()):
        assert torch.equal(p, q) == (name != "stem.project.weight")


def test_original_starts_as_pytorch_does(small):
    ours, plain = build_model(RECIPES["original"], small.num_classes, 1, "cpu"), build_vit(10, 1)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), plain.parameters()))
