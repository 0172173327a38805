"""OneCycle and Muon against PyTorch, and overrides of a recipe."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_trainer, small_recipe

from cli import UsageError, read_csv
from schedule import COEFFICIENTS, RECIPES, Muon, OneCycle, Recipe, orthogonalize
from schedule import set_lr_momentum, with_overrides

# --- OneCycle ---


def test_original_recipe_has_the_logged_lrs():
    log = read_csv(ROOT / "results" / "original_log.csv")
    schedule = RECIPES["original"].schedule(98)
    lrs = [schedule(98 * epoch)[0] for epoch in range(24)]
    assert lrs == pytest.approx([float(row["lr_at_epoch_start"]) for row in log], rel=0, abs=1e-12)


SPANS = [(2352, 5 / 24), (100, 0.3), (10, 0.05), (7, 0.0), (7, 1.0), (3, 0.4), (1, 0.3)]


@pytest.mark.parametrize("total_steps, pct_start", SPANS)
def test_onecycle_equals_pytorch_at_every_step(total_steps, pct_start):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], betas=(0.9, 0.999))
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.03, total_steps=total_steps, pct_start=pct_start, div_factor=10,
        final_div_factor=20, anneal_strategy="linear",
    )  # fmt: skip
    schedule = OneCycle(0.03, total_steps, pct_start, 10, 20)
    for step in range(total_steps):
        (group,) = optimizer.param_groups
        expected = group["lr"], group["betas"][0]
        assert schedule(step) == pytest.approx(expected, rel=0, abs=1e-12)
        optimizer.step()
        if step + 1 < total_steps:
            reference.step()


def test_invalid_arguments_and_steps_are_refused():
    valid = dict(max_lr=0.1, total_steps=10, pct_start=0.3, div_factor=10, final_div_factor=10)
    invalid = ("total_steps", 0), ("total_steps", 2.5), ("pct_start", 1.5), ("div_factor", 0)
    for name, value in invalid:
        with pytest.raises(ValueError, match=name):
            OneCycle(**{**valid, name: value})
    for step in (-1, 10):
        with pytest.raises(ValueError, match=r"outside \[0, 10\)"):
            OneCycle(**valid)(step)


# --- recipes ---


def test_original_recipe_is_to_the_letter():
    assert RECIPES["original"] == Recipe(
        epochs=24, batch_size=512, max_lr=0.03, pct_start=5 / 24, div_factor=10.0,
        final_div_factor=10.0, base_momentum=0.85, max_momentum=0.95, optimizer="adamw",
        beta2=0.999, eps=1e-8, weight_decay=0.0, l1=2.5e-5, embed_init_std=1.0,
        avg_pool_init=False, weight_avg_frac=0.0, crop_padding=4, padding_mode="wrap",
        crop_decay_frac=0.0, flip_p=0.45, affine_p=0.5, translate=0.07, scale=0.2, degrees=15.0,
        cutout_p=0.65, cutout_size=8,
    )  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_can_be_overridden(name):
    values = dataclasses.asdict(RECIPES[name])
    assignments = [f"{field}={value}" for field, value in values.items()]
    assert with_overrides(RECIPES["default"], assignments) == RECIPES[name]


INVALID = {  # message: overrides of recipe default
    "no setting 'no_such'": ["no_such=1"],
    r"is it batch_size\?": ["batchsize=64"],
    "expected NAME=VALUE": ["crop_padding"],
    "crop_padding is int from 0 to 31": ["crop_padding=", "crop_padding=2.5", "crop_padding=32"],
    "epochs is int": ["epochs=True"],
    "weight_decay is float from 0": ["weight_decay=-1", "weight_decay=inf"],
    "max_lr is float from 1e-30": ["max_lr=nan", "max_lr=1e-320", "max_lr=" + "9" * 400],
    "max_lr is float": ["max_lr=__import__('os')"],
    "beta2 is float from 0 to 0.9999": ["beta2=1"],
    "avg_pool_init is one of True, False": ["avg_pool_init=1"],
    "optimizer is one of adamw, muon, sgd": ["optimizer=adam"],
    "affine_p has no effect": ["affine_p=0.5"],
    "cutout_p has no effect": ["cutout_p=0.5"],
}


def test_an_invalid_override_is_named():
    for message, texts in INVALID.items():
        for text in texts:
            with pytest.raises(UsageError, match="--set .*" + message):
                with_overrides(RECIPES["default"], [text])


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
    generator, factors = torch.Generator().manual_seed(0), []
    for shape in SHAPES:
        s = SPECTRA[spectrum](min(shape)).double()
        random = (torch.randn(n, len(s), generator=generator, dtype=s.dtype) for n in shape)
        u, v = (torch.linalg.qr(matrix)[0] for matrix in random)
        factors.append((u, s, v))
    *results, zero = orthogonalize([*((u * s @ v.T).float() for u, s, v in factors), ZERO])
    for (u, s, v), result in zip(factors, results):
        found = u.T @ result.double() @ v
        assert torch.allclose(found, polynomial(s / s.norm()).diag(), rtol=0, atol=1e-3)
    assert torch.equal(zero, ZERO)


def test_singular_values_above_a_thousandth_end_near_1():
    values = polynomial(torch.logspace(-3, 0, 100_000, dtype=torch.float64))
    assert values.min() > 0.876 and values.max() < 1.124


def muon_step(params, grads, num_chunks, weight_decay=0.1, lr=0.1, momentum=0.9):
    """The parameters after one step from zero state, concatenated."""
    params = [p.clone().requires_grad_() for p in params]
    for p, grad in zip(params, grads):
        p.grad = grad.clone()
    optimizer = Muon(params, num_chunks, weight_decay)
    set_lr_momentum([optimizer], lr, momentum)
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in params])


def test_muon_agrees_with_torch_optim_on_matrices():
    """Five steps, up to the difference between two polynomials, one of them in bf16."""
    torch.manual_seed(0)
    ours = [torch.randn(shape).requires_grad_() for shape in [(8, 20), (20, 8), (16, 16)]]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    optimizer = Muon(ours, [1, 1, 1], 0.1)
    reference = torch.optim.Muon(theirs, weight_decay=0.1, nesterov=True)
    for i in range(5):
        lr, momentum = 0.1 / (i + 1), 0.95 - 0.02 * i
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        set_lr_momentum([optimizer, reference], lr, momentum)
        before = [p.detach().clone() for p in ours]
        optimizer.step()
        reference.step()
        for p, q, old in zip(ours, theirs, before):
            a, b = (p - old).detach().flatten(), (q - old).detach().flatten()
            assert F.cosine_similarity(a, b, dim=0) > 0.97
            assert (a.norm() / b.norm()).item() == pytest.approx(1, abs=0.2)
            q.data.copy_(p.data)


def test_convolutions_and_stacked_matrices_move_as_their_matrices():
    torch.manual_seed(0)
    conv, grad = torch.randn(2, 32, 3, 3, 3)
    as_matrix = muon_step([conv.view(32, 27)], [grad.view(32, 27)], [1])
    assert torch.equal(muon_step([conv], [grad], [1]), as_matrix)
    whole, grad = torch.randn(2, 12, 6)
    apart = muon_step(whole.chunk(3), grad.chunk(3), [1, 1, 1])
    assert torch.equal(muon_step([whole], [grad], [3]), apart)
    assert not torch.equal(apart, muon_step([whole], [grad], [1]))
    zeros = torch.zeros(12, 6)
    tall, wide = muon_step([zeros], [grad], [1]), muon_step([zeros.T], [grad.T], [1])
    assert tall.norm() / wide.norm() == pytest.approx(2**0.5, rel=1e-4)  # sqrt(rows / columns)


def test_muon_has_the_hidden_weights_and_adamw_the_rest(small):
    changes = dict(optimizer="muon", adamw_lr_scale=0.15, weight_decay=0.1, l1=0.0, batch_size=100)
    trainer = make_trainer(small, small_recipe(**changes))
    names = {p: name for name, p in trainer.model.named_parameters()}
    muon, adamw = trainer.optimizers
    (hidden,), (_, rest) = muon.param_groups, adamw.param_groups
    num_chunks = dict(zip((names[p] for p in hidden["params"]), muon.num_chunks))
    assert num_chunks == {name: 3 if name.endswith("qkv.weight") else 1 for name in num_chunks}
    others = {names[p] for p in rest["params"]}
    assert num_chunks.keys() ^ others == set(names.values())
    matrices = {name for name in others if trainer.model.get_parameter(name).dim() > 1}
    assert matrices == {"cls_token", "pos_embedding", "head.weight"}
    assert (hidden["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    trainer.train_epoch(2)
    lr, momentum = trainer.schedule(1)
    assert (hidden["lr"], hidden["momentum"]) == (lr, momentum)
    assert (rest["lr"], rest["betas"][0]) == (0.15 * lr, momentum)


def test_sgd_has_nesterov_momentum_and_decays_matrices_alone(small):
    """Two steps against m = momentum m + g, w -= lr (g + momentum m), g with its weight decay."""
    recipe = small_recipe(optimizer="sgd", weight_decay=0.1, l1=0.0, batch_size=300)
    trainer = make_trainer(small, recipe)
    weights = [trainer.model.head.weight, trainer.model.head.bias]
    expected, buffers = [w.detach().clone() for w in weights], [0, 0]
    for lr, momentum in ((0.1, 0.9), (0.2, 0.8)):
        trainer.begin_epoch(0, [lr], [momentum])
        trainer.step(0)
        for i, decay in enumerate((0.1, 0.0)):
            grad = weights[i].grad + decay * expected[i]
            buffers[i] = momentum * buffers[i] + grad
            expected[i] -= lr * (grad + momentum * buffers[i])
            assert torch.allclose(weights[i], expected[i], rtol=0, atol=1e-6)
