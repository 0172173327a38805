"""The first step of a training by the Triton kernels, compared with PyTorch in float64.

A training on a GPU makes it before it trusts the kernels there; so do the tests.
"""

import copy

import torch
import torch.nn.functional as F

from augment import augment, epoch_plan
from optim import build_optimizers, set_lr_momentum

LR = 0.05
MOMENTUM = 0.8


def self_test(step):
    """Return None, or a line that says which result of a FusedStep is wrong on this device.

    Weights, averages and totals are as before afterwards. Every rank tests its own share of the
    first batch; nothing waits for another rank.
    """
    # Rounding makes gradients wrong by 1e-6 of their norm in fp32, and by 1e-2 in bf16 (default,
    # 128 images); a wrong kernel, or a TF32 product in place of an fp32 one, by far more than the
    # bounds. Muon makes much of small singular values: with the way in which tensor cores add, its
    # three TF32 products are off by up to 1.1e-2, and a single one by over 2e2.
    gradient_bound = 1e-4 if step.target.dtype == torch.float32 else 5e-2
    bounds = {"loss": gradient_bound, "gradient": gradient_bound, "adamw": 1e-4, "muon": 5e-2}
    buffers = [step.param, step.exp_avg, step.exp_avg_sq, step.totals]
    saved = [buffer.clone() for buffer in buffers]
    try:
        results = train_and_compare(step, [torch.float64])
    finally:
        for buffer, value in zip(buffers, saved):
            buffer.copy_(value)
    for kind, name, actual, exact in results:
        error = relative_error(actual, exact)
        if not error <= bounds[kind]:  # NaN is not
            return f"{kind} {name}: off by {error:.1e} on this device, more than {bounds[kind]:.0e}"
    return None


def train_and_compare(step, dtypes):
    """Make the first step of this rank; return its results beside PyTorch's.

    A list of (kind, name, result, the same by PyTorch in each of `dtypes`). A result is the "loss"
    of the batch, the "gradient" of a parameter, or the change of a parameter by "muon" or "adamw".
    """
    # The step: gradient and update, without the all_reduce between them.
    before = copy.deepcopy(step.model)
    images, labels = first_batch(step)
    size = min(step.recipe.batch_size, len(step.dataset.train_images))
    step.counter.fill_(0)
    step.run(step.gradient, size)
    loss = step.grad[-2].clone()
    grads = step.named(step.grad.clone())
    step.run(step.update_weights)
    actual = {("loss", "of the batch"): loss}
    for name, grad in grads.items():
        actual["gradient", name] = grad
    for name, change in changes(step.model, before).items():
        actual[update_kind(step, name), name] = change

    # The same by PyTorch. The updates are those of the step's own gradient.
    l1 = step.recipe.l1 if step.ranks.rank == 0 else 0.0
    references = []
    for dtype in dtypes:
        loss, expected = reference_gradient(before, images, labels, size, l1, dtype)
        reference = {("loss", "of the batch"): loss}
        for name, gradient in expected.items():
            reference["gradient", name] = gradient
        for name, change in reference_update(step.recipe, before, grads, dtype).items():
            reference[update_kind(step, name), name] = change
        references.append(reference)
    results = []
    for key, result in actual.items():
        expected = [reference[key] for reference in references]
        results.append((*key, result, *expected))
    return results


def first_batch(step):
    """Begin an epoch; return images and labels of this rank's share of its first batch."""
    images = step.dataset.train_images
    plan = epoch_plan(step.recipe, len(images), images.shape[-1], 0, 0, step.device)
    lrs = [LR] * step.steps_per_epoch
    momenta = [MOMENTUM] * step.steps_per_epoch
    step.begin_epoch(0, plan, lrs, momenta)
    rows = plan.at(step.rows[: step.batch_size])
    images = augment(images[rows.indices], rows, step.recipe, step.normalize)
    return images, step.dataset.train_labels[rows.indices]


def reference_gradient(before, images, labels, batch_size, l1, dtype):
    """Return the sum of losses, and {name: gradient} of their mean over the batch plus L1."""
    model = copy.deepcopy(before).to(dtype)
    logits = model(images.to(dtype))
    loss = F.cross_entropy(logits, labels, reduction="sum")
    norm = sum(p.abs().sum() for p in model.parameters())
    names = [name for name, _ in model.named_parameters()]
    grads = torch.autograd.grad(loss / batch_size + l1 * norm, list(model.parameters()))
    return loss.detach(), dict(zip(names, grads))


def reference_update(recipe, before, grads, dtype):
    """Return {name: change} of every parameter in the first step of the optimizers.

    Weights are float32 whatever the working dtype.
    """
    model = copy.deepcopy(before).to(torch.promote_types(dtype, torch.float32))
    for name, p in model.named_parameters():
        p.grad = grads[name].to(p.dtype)
    optimizers = build_optimizers(recipe, model)
    set_lr_momentum(optimizers, LR, MOMENTUM, recipe.adamw_lr_scale)
    for optimizer in optimizers:
        optimizer.step()
    return changes(model, before)


def update_kind(step, name):
    """Return the optimizer of a parameter, "muon" or "adamw"."""
    return "muon" if name in step.muon_names else "adamw"


def changes(model, before):
    """Return {name: difference} of the parameters of two models."""
    found = {}
    for (name, p), q in zip(model.named_parameters(), before.parameters()):
        found[name] = p.detach() - q.detach()
    return found


def relative_error(actual, expected):
    """Return |actual - expected| / |expected|, Frobenius norms; NaN where one is not finite."""
    actual = actual.double()
    expected = expected.double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-300)).item()
