"""The fused step against PyTorch: before a training trusts it on a device, and in tests."""

import copy
import sys

import torch

from augment import augment, epoch_plan
from cli import UsageError, first_line
from kernels import functions as fn
from kernels.step import FusedStep
from schedule import build_optimizers, set_lr_momentum

LR, MOMENTUM = 0.05, 0.8


def checked_step(trainer):
    """The FusedStep of a Trainer, or None and a line on stderr where it cannot be trusted.

    Raises UsageError instead where the user asks for the kernels, or for fp16, which needs them.
    """
    runtime, classes, step = trainer.runtime, trainer.dataset.num_classes, None
    if trainer.recipe.optimizer == "sgd":
        reason = "no kernel makes the update of SGD"
    elif classes > 256:  # the kernel of the head keeps its whole matrix on chip
        reason = f"{classes} classes are more than 256"
    else:
        step = FusedStep(trainer)  # Triton's interpreter has no hardware to test
        reason = self_test(step) if runtime.device.type == "cuda" else None
    if reason is None:
        return step
    if runtime.kernels == "triton" or runtime.precision == "fp16":
        flag = "--kernels triton" if runtime.kernels == "triton" else "--precision fp16"
        raise UsageError(f"{flag}: {reason}")
    print(f"kernels: {reason}; the network runs in plain PyTorch", file=sys.stderr)
    return None


def self_test(step):
    """None, or a line that says which result is wrong on this device, or which kernel fails.

    Makes the first step of the training, with and without a second loss, and takes it back.
    """
    print("kernels  compiling and checking them, the first time for a minute", flush=True)
    for aux_weight in {step.recipe.aux_weight, 0.0}:
        step.trainer.aux_weight = aux_weight
        if reason := check_first_step(step):
            return reason
    return None


def check_first_step(step):
    """What self_test returns, for a step with trainer.aux_weight.

    An error of 1e-4 (fp32) or 5e-2 of a result's norm tells a wrong kernel, or a TF32 product, from
    rounding; Muon, which makes much of small singular values, has 1e-2.
    """
    is_fp32, bounds = step.target.dtype == torch.float32, {"muon": 1e-2, "adamw": 1e-4}
    buffers = step.param, step.average, step.exp_avg, step.exp_avg_sq
    buffers = *buffers, step.totals, step.finite_counts
    saved = [buffer.clone() for buffer in buffers]
    try:
        for name, actual, exact in train_and_compare(step, [torch.float64]):
            bound = bounds.get(name.partition(",")[0], 1e-4 if is_fp32 else 5e-2)
            error = relative_error(actual, exact)
            if not error <= bound:
                return f"{name}: off by {error:.1e} on this device, more than {bound:.0e}"
    except Exception as error:  # errors of compilers and drivers have no common type
        return f"{kernel_name(fn.last_launched)} does not run here: {first_line(error)}"
    finally:
        for buffer, value in zip(buffers, saved):
            buffer.copy_(value)
    return None


def train_and_compare(step, dtypes):
    """Train the first step: (name, result, the same by PyTorch in each of dtypes) of the loss, of
    the gradient of every parameter, and of its change.
    """
    trainer, before = step.trainer, copy.deepcopy(step.model)
    images = trainer.dataset.train_images
    plan = epoch_plan(step.recipe, len(images), images.shape[-1], 0, 0, step.device)
    step.begin_epoch(plan, *([value] * trainer.steps_per_epoch for value in (LR, MOMENTUM)))
    step.step(0)
    rows = plan.at(slice(step.recipe.batch_size))
    images = augment(images[rows.indices], rows, step.recipe, trainer.normalize)
    sizes = [p.numel() for p in before.parameters()]
    grads = [g.view_as(p) for g, p in zip(step.grad[:-2].split(sizes), before.parameters())]
    batch = images, trainer.targets[rows.indices]
    expected = [reference(trainer, before, *batch, grads, dtype) for dtype in dtypes]
    names = [name for name, _ in before.named_parameters()]
    updates = [f"{'muon' if is_muon else 'adamw'}, {n}" for is_muon, n in zip(step.is_muon, names)]
    names = ["the loss", *(f"the gradient of {name}" for name in names), *updates]
    results = step.grad[-2], *grads, *changes(step.model, before)
    return list(zip(names, results, *expected, strict=True))


def reference(trainer, before, images, targets, step_grads, dtype):
    """The results of `train_and_compare` as PyTorch computes them in a dtype."""
    model, recipe = copy.deepcopy(before).to(dtype), trainer.recipe
    targets = targets.to(dtype) if targets.is_floating_point() else targets
    logits = model(images.to(dtype), mean_token=trainer.aux_weight > 0)
    _, loss, total = trainer.losses(logits, targets)
    params = list(model.parameters())
    grads = torch.autograd.grad(total, params)
    grads = [g / len(images) + recipe.l1 * p.detach().sign() for g, p in zip(grads, params)]
    # The update is that of the step's own gradient, of which Muon makes much; fp32 or float64.
    model = copy.deepcopy(before).to(torch.promote_types(dtype, torch.float32))
    for p, grad in zip(model.parameters(), step_grads):
        p.grad = grad.to(p.dtype)
    optimizers = build_optimizers(recipe, model)
    set_lr_momentum(optimizers, LR, MOMENTUM, recipe.adamw_lr_scale)
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach(), *grads, *changes(model, before)


def changes(model, before):
    return [q.detach() - p.detach() for p, q in zip(before.parameters(), model.parameters())]


def relative_error(actual, expected):
    """|actual - expected| / |expected|, Frobenius norms; NaN where either is not finite."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def record_launches(step, size, aux):
    """(kernel, programs, args, constants) of every launch of a FusedStep; nothing runs."""
    fn.recorded = []
    try:
        step.launch((size, aux))
        return fn.recorded
    finally:
        fn.recorded = None


def kernel_name(kernel):
    return f"{kernel.fn.__module__.rpartition('.')[2]} {kernel.fn.__name__.replace('_kernel', '')}"
