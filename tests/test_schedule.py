"""OneCycle equals PyTorch's at every step, and the rates of the run to reproduce."""

import pytest
import torch
from conftest import ROOT

from files import read_csv
from recipe import RECIPES, build_schedule
from schedule import OneCycle


def test_original_recipe_has_the_logged_rates():
    logged = [float(row["lr_at_epoch_start"]) for row in read_csv(ROOT / "results" / "original_log.csv")]
    schedule = build_schedule(RECIPES["original"], 98)
    assert len(logged) == 24 and [schedule(98 * epoch)[0] for epoch in range(24)] == pytest.approx(logged, rel=0, abs=1e-12)


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
