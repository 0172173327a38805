"""OneCycle equals PyTorch's at every step, and the rates of the run to reproduce."""

import pytest
import torch

from recipe import RECIPES
from schedule import OneCycle

# The learning rate at the start of each of the 24 epochs, as the original run logged it.
ORIGINAL = [
    0.003, 0.008411042944785275, 0.01382208588957055, 0.019233128834355826, 0.024644171779141102, 0.02998404940923738,
    0.028420891514500536, 0.026857733619763693, 0.02529457572502685, 0.02373141783030011, 0.022168259935553165,
    0.020605102040816326, 0.019041944146079483, 0.017478786251342644, 0.0159156283566058, 0.014352470461868959,
    0.01278931256713212, 0.011226154672395273, 0.00966299677765843, 0.008099838882921592, 0.006536680988184749,
    0.004973523093447906, 0.0034103651987110635, 0.0018472073039742243,
]  # fmt: skip


def schedule_of(recipe, steps_per_epoch):
    return OneCycle(
        recipe.max_lr, recipe.epochs * steps_per_epoch, recipe.pct_start, recipe.div_factor, recipe.final_div_factor,
        recipe.base_momentum, recipe.max_momentum, recipe.anneal,
    )  # fmt: skip


def test_original_recipe_has_the_logged_rates():
    schedule = schedule_of(RECIPES["original"], 98)
    assert [schedule(98 * epoch)[0] for epoch in range(24)] == pytest.approx(ORIGINAL, rel=0, abs=1e-12)


@pytest.mark.parametrize("anneal", ["linear", "cos"])
@pytest.mark.parametrize("total_steps, pct_start", [(2352, 5 / 24), (100, 0.3), (10, 0.05), (7, 0.0), (7, 1.0), (3, 0.4), (1, 0.3)])
def test_equals_pytorch_at_every_step(total_steps, pct_start, anneal):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], betas=(0.9, 0.999))
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.03, total_steps=total_steps, pct_start=pct_start, div_factor=10, final_div_factor=20, anneal_strategy=anneal
    )
    ours = OneCycle(0.03, total_steps, pct_start, 10, 20, anneal=anneal)
    for step in range(total_steps):
        group = optimizer.param_groups[0]
        assert ours(step) == pytest.approx((group["lr"], group["betas"][0]), rel=0, abs=1e-12)
        optimizer.step()
        if step + 1 < total_steps:
            theirs.step()


@pytest.mark.parametrize("step", [-1, 10, 11])
def test_a_step_outside_the_run_is_refused(step):
    with pytest.raises(ValueError, match="outside this schedule of 10 steps"):
        OneCycle(0.1, 10, 0.3, 10, 10)(step)


@pytest.mark.parametrize("wrong", [{"total_steps": 0}, {"total_steps": 2.5}, {"pct_start": 1.5}, {"anneal": "step"}, {"div_factor": 0}])
def test_settings_that_make_no_schedule_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OneCycle(**{"max_lr": 0.1, "total_steps": 10, "pct_start": 0.3, "div_factor": 10, "final_div_factor": 10, **wrong})
