"""A training step's kernels against PyTorch: its buffers, in the order of launches.

step.self_test holds them to float64, the tests to the error that PyTorch makes in the same dtype.
"""

import copy
import functools

import torch
import torch.nn.functional as F

from augment import augment, epoch_plan
from schedule import build_optimizers, set_lr_momentum


def relative_error(actual, expected):
    """|actual - expected| / |expected|, Frobenius norms; NaN where either is not finite."""
    actual, expected = actual.double().flatten(), expected.double().flatten()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def checks(step, lr=0.05, momentum=0.8):
    """Train two steps of a FusedStep: (name, actual, reference) for buffers of the second, and for
    the change of parameters by both; reference(dtype) is what PyTorch computes in that dtype.
    """
    recipe, trainer, size = step.recipe, step.trainer, step.recipe.batch_size
    plan = epoch_plan(recipe, len(step.images), step.images.shape[-1], 0, 0, step.device)
    step.begin_epoch(plan, *([value] * trainer.steps_per_epoch for value in (lr, momentum)))
    start, average = copy.deepcopy(step.model), copy.deepcopy(trainer.averaged_model)
    step.step(0)
    before, grads = copy.deepcopy(step.model), [step.grad.clone()]
    step.step(1)
    grads.append(step.grad)

    rows = plan.at(slice(size, 2 * size))
    images = augment(step.images[rows.indices], rows, recipe, step.normalize)
    labels, count = step.labels[rows.indices], len(rows.indices)
    yield "augment", step.pixels[:count, :, 1:-1, 1:-1], lambda dtype: images.to(dtype)
    network = functools.cache(
        lambda dtype: network_results(before, images, labels, recipe.l1, dtype)
    )
    for name, value in step_results(step, before, count).items():
        yield name, value, lambda dtype, name=name: network(dtype)[name]
    moved = functools.cache(
        lambda dtype: update_results(step, start, average, grads, lr, momentum, dtype)
    )
    models = [step.model, trainer.averaged_model][: 1 + step.averaging]
    for i, (first, now) in enumerate(zip((start, average), models)):
        for j, ((name, p), q) in enumerate(zip(first.named_parameters(), now.parameters())):
            optimizer = "muon" if step.is_muon[j] else "adamw"

            def change(dtype, i=i, j=j, p=p):
                return moved(dtype)[i][j] - p.detach()

            yield f"{optimizer}, {'average of ' * i}{name}", q.detach() - p.detach(), change


def step_results(step, model, count):
    """The buffers of a step of `count` images, by the names of network_results."""
    depth = len(step.z)
    names = ["stem", *(f"{half} {i}" for i in range(depth) for half in ("attention", "mlp"))]
    forward = [step.x[0], *(t for i in range(depth) for t in (step.z[i], step.x[i + 1]))]
    backward = [step.dx[0], *(t for i in range(depth) for t in (step.dz[i], step.dx[i + 1]))]
    results = {f"{name} forward": t[:count] for name, t in zip(names, forward)}
    results["head, loss"] = step.grad[-2]
    pairs = reversed(list(zip([*names[1:], "head"], backward)))
    results |= {f"{name} backward": t[:count] for name, t in pairs}
    sizes = [p.numel() for p in model.parameters()]
    grads = zip(model.named_parameters(), step.grad[:-2].split(sizes))
    return results | {f"gradient of {name}": grad for (name, _), grad in grads}


def network_results(model, images, labels, l1, dtype):
    """Activations, loss and gradients of the sum of losses; of parameters, the step's gradient."""
    model = copy.deepcopy(model).to(dtype)
    cls_token = model.cls_token.expand(len(images), -1, -1)
    x = torch.cat([cls_token, model.stem(images.to(dtype))], dim=1) + model.pos_embedding
    found = {"stem": x}
    for i, block in enumerate(model.blocks):
        found[f"attention {i}"] = z = block.attention(x)
        found[f"mlp {i}"] = x = block.mlp(z)
    loss = F.cross_entropy(model.head(model.norm(x[:, 0])), labels, reduction="sum")
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, [*found.values(), *named.values()])
    results = {f"{name} forward": value.detach() for name, value in found.items()}
    results["head, loss"] = loss.detach()
    backward = [*list(found)[1:], "head"]  # the kernel that writes a gradient of an activation
    results |= {f"{name} backward": grad for name, grad in zip(backward, grads)}
    for (name, p), grad in zip(named.items(), grads[len(found) :]):
        results[f"gradient of {name}"] = grad / len(images) + l1 * p.detach().sign()
    return results


def update_results(step, model, average, grads, lr, momentum, dtype):
    """Parameters, and their average, after steps of the recipe's optimizers; fp32 or float64."""
    dtype, recipe = torch.promote_types(dtype, torch.float32), step.recipe
    model, average = (copy.deepcopy(m).to(dtype) for m in (model, average))
    optimizers, params = build_optimizers(recipe, model), list(model.parameters())
    for n, grad in enumerate(grads, 1):
        for p, g in zip(params, grad[:-2].split([p.numel() for p in params])):
            p.grad = g.view(p.shape).to(dtype)
        set_lr_momentum(optimizers, lr, momentum, recipe.adamw_lr_scale)
        for optimizer in optimizers:
            optimizer.step()
        weight = min(1.0, 1 / (recipe.weight_avg_frac * n)) if step.averaging else 0.0
        for mean, p in zip(average.parameters(), params):
            mean.data.lerp_(p.data, weight)
    return [[p.detach() for p in m.parameters()] for m in (model, average)]
