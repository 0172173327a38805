"""OneCycle and Muon against PyTorch, and which parameters which optimizer updates."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_trainer, small_recipe

from cli import read_csv
from optim import (
    COEFFICIENTS,
    AdamW,
    Muon,
    OneCycle,
    build_schedule,
    orthogonalize,
    set_lr_momentum,
)
from recipes import RECIPES

# --- OneCycle ---


def test_original_recipe_has_the_logged_lrs():
    log = read_csv(ROOT / "results" / "original_log.csv")
    schedule = build_schedule(RECIPES["original"], steps_per_epoch=98)
    lrs = [schedule(98 * epoch)[0] for epoch in range(24)]
    assert lrs == pytest.approx([float(row["lr_at_epoch_start"]) for row in log], rel=0, abs=1e-12)


SPANS = [(2352, 5 / 24), (100, 0.3), (10, 0.05), (7, 0.0), (7, 1.0), (3, 0.4), (1, 0.3)]


@pytest.mark.parametrize("total_steps, pct_start", SPANS)
def test_onecycle_equals_pytorch_at_every_step(total_steps, pct_start):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], betas=(0.9, 0.999))
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        0.03,
        total_steps=total_steps,
        pct_start=pct_start,
        div_factor=10,
        final_div_factor=20,
        anneal_strategy="linear",
    )
    schedule = OneCycle(0.03, total_steps, pct_start, 10, 20)
    (group,) = optimizer.param_groups
    for step in range(total_steps):
        lr, momentum = schedule(step)
        assert lr == pytest.approx(group["lr"], rel=0, abs=1e-12)
        assert momentum == pytest.approx(group["betas"][0], rel=0, abs=1e-12)
        optimizer.step()
        if step + 1 < total_steps:
            reference.step()


def test_invalid_arguments_and_steps_are_refused():
    valid = dict(max_lr=0.1, total_steps=10, pct_start=0.3, div_factor=10, final_div_factor=10)
    for name, value in (("total_steps", 0), ("pct_start", 1.5), ("div_factor", 0)):
        with pytest.raises(ValueError, match=name):
            OneCycle(**{**valid, name: value})
    for step in (-1, 10):
        with pytest.raises(ValueError, match=r"outside \[0, 10\)"):
            OneCycle(**valid)(step)


# --- Muon ---

SHAPES = [(64, 64), (192, 64), (64, 256), (32, 27), (32, 128)]  # of the network
ZERO = torch.zeros(4, 6)
SPECTRA = {
    "even": lambda n: torch.linspace(1, 0.1, n),
    "steep": lambda n: torch.logspace(0, -2, n),
    "rank 3": lambda n: (torch.arange(n) < 3).float(),
}


def polynomial(values):
    for a, b, c in COEFFICIENTS:
        values = a * values + b * values**3 + c * values**5
    return values


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_orthogonalize_maps_singular_values_and_keeps_vectors(spectrum):
    """Every U S V^T becomes U polynomial(S / |S|) V^T."""
    generator = torch.Generator().manual_seed(0)
    factors = []
    matrices = []
    for rows, columns in SHAPES:
        s = SPECTRA[spectrum](min(rows, columns)).double()
        u, _ = torch.linalg.qr(torch.randn(rows, len(s), generator=generator).double())
        v, _ = torch.linalg.qr(torch.randn(columns, len(s), generator=generator).double())
        factors.append((u, s, v))
        matrices.append((u * s @ v.T).float())
    *results, zero = orthogonalize([*matrices, ZERO])
    for (u, s, v), result in zip(factors, results):
        found = u.T @ result.double() @ v
        expected = polynomial(s / s.norm()).diag()
        assert torch.allclose(found, expected, rtol=0, atol=1e-3)
    assert torch.equal(zero, ZERO)


def test_singular_values_above_a_thousandth_end_near_1():
    values = polynomial(torch.logspace(-3, 0, 100_000, dtype=torch.float64))
    assert values.min() > 0.876
    assert values.max() < 1.124


def muon_step(params, grads, num_chunks=1, weight_decay=0.1, lr=0.1, momentum=0.9):
    """The parameters after one step from zero state, concatenated."""
    params = [p.clone().requires_grad_() for p in params]
    for p, grad in zip(params, grads):
        p.grad = grad.clone()
    optimizer = Muon(params, lr, momentum, weight_decay, num_chunks)
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in params])


def test_muon_agrees_with_torch_optim_on_matrices():
    """Five steps from the same weights, up to the difference between two polynomials."""
    torch.manual_seed(0)
    ours = [torch.randn(shape).requires_grad_() for shape in [(8, 20), (20, 8), (16, 16)]]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    groups = [{"params": ours[:1]}, {"params": ours[1:]}]  # which share a batch of products
    optimizer = Muon(groups, lr=0.0, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, weight_decay=0.1, nesterov=True)
    for i in range(5):
        lr = 0.1 / (i + 1)
        momentum = 0.95 - 0.02 * i
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        set_lr_momentum([optimizer], lr, momentum)
        reference.param_groups[0].update(lr=lr, momentum=momentum)
        before = [p.detach().clone() for p in ours]
        optimizer.step()
        reference.step()
        for p, q, old in zip(ours, theirs, before):
            a = (p - old).detach().flatten()
            b = (q - old).detach().flatten()
            # Theirs iterates in bf16, and its singular values end between 0.7 and 1.2.
            assert F.cosine_similarity(a, b, dim=0) > 0.9
            assert 0.6 < (a.norm() / b.norm()).item() < 1.6
            q.data.copy_(p.data)


def test_convolutions_and_stacked_matrices_move_as_their_matrices():
    torch.manual_seed(0)
    conv, grad = torch.randn(2, 32, 3, 3, 3)
    as_matrix = muon_step([conv.view(32, 27)], [grad.view(32, 27)])
    assert torch.allclose(muon_step([conv], [grad]), as_matrix, atol=1e-5)
    whole, grad = torch.randn(2, 12, 6)
    apart = muon_step(whole.chunk(3), grad.chunk(3))
    assert torch.allclose(muon_step([whole], [grad], num_chunks=3), apart, atol=1e-5)
    assert not torch.allclose(muon_step([whole], [grad]), apart, atol=1e-3)
    # A tall matrix moves sqrt(rows / columns) times as far.
    zeros = torch.zeros(12, 6)
    tall = muon_step([zeros], [grad])
    wide = muon_step([zeros.T], [grad.T])
    assert tall.norm() / wide.norm() == pytest.approx(2**0.5, rel=1e-3)


def test_muon_has_the_interface_of_torch_optim():
    """A scheduler takes it, it calls a closure with gradients, and refuses a vector."""
    p = torch.ones(3, 2, requires_grad=True)
    unused = torch.ones(2, 2, requires_grad=True)
    optimizer = Muon([p, unused], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert p.sum() < 6
    assert torch.equal(unused, torch.ones(2, 2))
    optimizer.zero_grad()
    optimizer.step()  # nothing has a gradient
    with pytest.raises(TypeError, match="lr"):
        Muon([p])
    with pytest.raises(ValueError, match=r"a parameter \(3,\) is no matrix"):
        Muon([torch.zeros(3, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match=r"\(8, 2\) is not 5 stacked matrices"):
        Muon([torch.zeros(8, 2, requires_grad=True)], lr=0.1, num_chunks=5)


def test_groups_of_muon_have_their_own_lr_and_decay():
    first = torch.ones(2, 2, requires_grad=True)
    second = torch.ones(2, 2, requires_grad=True)
    for p in (first, second):
        p.grad = torch.eye(2)
    groups = [{"params": [first], "lr": 0.1}, {"params": [second], "weight_decay": 1.0}]
    Muon(groups, lr=0.2).step()
    update = (1 - first) / 0.1
    assert update.norm() > 1
    assert torch.allclose((1 - 0.2 - second) / 0.2, update, atol=1e-5)


def test_adamw_has_the_bits_of_torch_optim():
    torch.manual_seed(0)
    ours = [torch.randn(shape).requires_grad_() for shape in [(8, 20), (5,)]]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    optimizer = AdamW(ours, lr=0.1, weight_decay=0.1, beta2=0.99, eps=1e-7)
    reference = torch.optim.AdamW(theirs, weight_decay=0.1, eps=1e-7, fused=True)
    for i in range(5):
        lr = 0.1 / (i + 1)
        momentum = 0.95 - 0.02 * i
        set_lr_momentum([optimizer], lr, momentum)
        reference.param_groups[0].update(lr=lr, betas=(momentum, 0.99))
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    for p, q in zip(ours, theirs):
        assert torch.equal(p, q)


def test_muon_has_the_hidden_weights_and_adamw_the_rest(small):
    changes = dict(optimizer="muon", adamw_lr_scale=0.15, weight_decay=0.1, l1=0.0, batch_size=100)
    trainer = make_trainer(small, small_recipe(**changes))
    names = {p: name for name, p in trainer.model.named_parameters()}
    muon, adamw = trainer.optimizers
    hidden, stacked = muon.param_groups
    decayed, rest = adamw.param_groups
    hidden_names = [names[p] for p in hidden["params"] + stacked["params"]]
    other_names = [names[p] for p in rest["params"]]
    assert not decayed["params"]
    assert sorted(hidden_names + other_names) == sorted(names.values())
    matrices = [n for n in other_names if trainer.model.get_parameter(n).dim() > 1]
    assert matrices == ["cls_token", "pos_embedding", "head.weight"]
    assert all(names[p].endswith("qkv.weight") for p in stacked["params"])
    assert len(stacked["params"]) == len(trainer.model.blocks)
    assert (hidden["num_chunks"], stacked["num_chunks"]) == (1, 3)
    for group in (hidden, stacked):
        assert group["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0.0

    trainer.begin_epoch(0)
    trainer.step(0)
    trainer.step(1)
    lr, momentum = trainer.schedule(1)
    assert (hidden["lr"], hidden["momentum"]) == (lr, momentum)
    assert (rest["lr"], rest["momentum"]) == (0.15 * lr, momentum)


def test_weight_matrices_alone_decay_under_adamw(small):
    trainer = make_trainer(small, small_recipe(weight_decay=0.1))
    names = {p: name for name, p in trainer.model.named_parameters()}
    (adamw,) = trainer.optimizers
    decayed, rest = adamw.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert all(names[p].endswith("weight") and p.dim() > 1 for p in decayed["params"])
    for p in rest["params"]:
        assert p.dim() == 1 or names[p] in ("cls_token", "pos_embedding")
