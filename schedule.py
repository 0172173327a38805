"""OneCycle, hand-rolled: learning rate and momentum as one pure function of the step.

The rate rises from max_lr / div_factor to max_lr over the first part of the run, then falls to
max_lr / (div_factor * final_div_factor); momentum runs against it. Smith & Topin 2017, arXiv:1708.07120; equal to
torch.optim.lr_scheduler.OneCycleLR in its two-phase form at every step.
"""

import math


def linear(start, end, fraction):
    return start + (end - start) * fraction


def cos(start, end, fraction):
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))


ANNEALS = {"linear": linear, "cos": cos}


class OneCycle:
    """`OneCycle(...)(step) -> (lr, momentum)`, floats, for step in [0, total_steps).

    pct_start is the share of the run, in [0, 1], after which the rate peaks; anneal is the shape of both phases.
    Raises ValueError for a step outside the run and for settings that make no schedule.
    """

    def __init__(self, max_lr, total_steps, pct_start, div_factor, final_div_factor, base_momentum=0.85, max_momentum=0.95, anneal="linear"):
        if not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps is {total_steps!r}; it must be a whole number of at least 1")
        if not 0 <= pct_start <= 1:
            raise ValueError(f"pct_start is {pct_start!r}; it is a share of the run, between 0 and 1")
        if anneal not in ANNEALS:
            raise ValueError(f"anneal is {anneal!r}; it must be one of {', '.join(ANNEALS)}")
        if div_factor <= 0 or final_div_factor <= 0:
            raise ValueError(f"div_factor {div_factor!r} and final_div_factor {final_div_factor!r} must both be above 0")
        self.total_steps = total_steps
        self.anneal = ANNEALS[anneal]
        self.start_lr, self.max_lr = max_lr / div_factor, max_lr
        self.end_lr = self.start_lr / final_div_factor
        self.base_momentum, self.max_momentum = base_momentum, max_momentum
        # The steps at which the rate is max_lr and end_lr. PyTorch counts both from zero, and so do we; a run too
        # short for a phase (peak <= 0 or end <= peak) has its other phase alone.
        self.peak = pct_start * total_steps - 1
        self.end = total_steps - 1

    def __call__(self, step):
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} lies outside this schedule of {self.total_steps} steps, 0 to {self.total_steps - 1}")
        if step <= self.peak and self.peak > 0:
            fraction = step / self.peak
            return self.anneal(self.start_lr, self.max_lr, fraction), self.anneal(self.max_momentum, self.base_momentum, fraction)
        fraction = (step - self.peak) / (self.end - self.peak) if self.end > self.peak else 1.0
        return self.anneal(self.max_lr, self.end_lr, fraction), self.anneal(self.base_momentum, self.max_momentum, fraction)
