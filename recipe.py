"""Recipes: everything that a training run chooses, in one place, and the model, schedule and optimizer that follow from it."""

import difflib
import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F

from augment import Augmentation
from cli import UsageError
from optimizers import AdamW, Muon, MuonAndAdamW
from schedule import ANNEALS, OneCycle
from vit import ViT


@dataclass(frozen=True)
class Recipe:
    """An optimizer under OneCycle, which moves rate and momentum (beta1 for AdamW), a start and an augmentation.

    "adamw" is Loshchilov & Hutter 2017, arXiv:1711.05101, for all parameters; "muon" (optimizers.py) for all matrices and
    convolutions but the head, with AdamW for the rest at `adamw_share` of Muon's rate.
    """

    epochs: int
    batch_size: int
    max_lr: float
    pct_start: float  # share of the run before the peak
    div_factor: float
    final_div_factor: float
    anneal: str
    weight_decay: float  # of matrices and convolution kernels (but the head beside Muon); biases, norms and embeddings have none
    l1: float  # times the sum of all parameters' magnitudes, added to the loss
    embedding_std: float  # of the CLS token and the position embedding at the start
    augmentation: Augmentation
    base_momentum: float = 0.85
    max_momentum: float = 0.95
    beta2: float = 0.999
    eps: float = 1e-8
    optimizer: str = "adamw"  # or "muon"
    adamw_share: float = 1.0
    label_smoothing: float = 0.0  # of the training loss alone
    averaged_share: float = 0.0  # evaluated is a running mean of the weights over this share of the steps so far; 0: the last weights
    pooled_start: bool = False  # the stem's projection starts as an average over cells


RECIPES = {
    # The run to reproduce, to the letter.
    "original": Recipe(
        epochs=24,
        batch_size=512,
        max_lr=0.03,
        pct_start=5 / 24,
        div_factor=10,
        final_div_factor=10,
        anneal="linear",
        weight_decay=0.0,
        l1=2.5e-5,
        embedding_std=1.0,
        augmentation=Augmentation(
            crop_padding=4, crop_border="wrap", flip="random", flip_p=0.45,
            warp_p=0.5, warp_shift=0.07, warp_scale=0.2, warp_degrees=15.0, cutout_p=0.65, cutout_size=8,
        ),
    ),
    # Muon, from a start that knows where things are. Settings were chosen on held-out pictures, and not one by one, so each is
    # good and none is the best there is; results/cifar10-jpeg/trials.csv has what was tried.
    "default": Recipe(
        epochs=24,
        batch_size=128,
        max_lr=0.013,
        pct_start=5 / 24,
        div_factor=10,
        final_div_factor=10,
        anneal="linear",
        weight_decay=0.05,
        l1=0.0,
        embedding_std=0.2,
        beta2=0.99,
        optimizer="muon",
        adamw_share=0.75,
        pooled_start=True,
        augmentation=Augmentation(crop_padding=4, crop_border="reflect", calm_share=0.2, flip_p=0.5),
    ),
}  # fmt: skip
# In 200 epochs the same network would over-fit, so it is shown more kinds of pictures; and the last weights, which over-fit most,
# are averaged with those before: 80.2 % instead of 79.7 of held-out pictures (JPEG copy) after 60 epochs, one run of a form that
# smoothed labels.
RECIPES["long"] = replace(
    RECIPES["default"],
    epochs=200,
    averaged_share=0.06,
    augmentation=replace(
        RECIPES["default"].augmentation,
        warp_p=0.5, warp_shift=0.05, warp_scale=0.15, warp_degrees=10.0, cutout_p=0.5, cutout_size=8,
    ),
)  # fmt: skip


CHOICES = {
    "anneal": tuple(ANNEALS),
    "optimizer": ("adamw", "muon"),
    "crop_border": ("reflect", "wrap"),
    "flip": ("random", "alternating"),
}
POSITIVE = "epochs", "batch_size", "max_lr", "div_factor", "final_div_factor"
HIGHEST = {  # of those settings that have a highest value; the lowest is 0
    **dict.fromkeys(("pct_start", "flip_p", "warp_p", "cutout_p", "calm_share"), 1),
    **dict.fromkeys(("base_momentum", "max_momentum", "beta2", "warp_scale", "averaged_share", "label_smoothing"), 0.9999),
    **dict.fromkeys(("crop_padding", "cutout_size"), 31),
}


def changed(recipe, assignments):
    """The recipe with settings changed by texts NAME=VALUE, of its own fields or its augmentation's.

    Raises UsageError for a name that is none of them, for a value that makes no sense and for settings that do nothing.
    """
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: NAME=VALUE is wanted")
        for owner in (recipe, recipe.augmentation):
            kinds = {field.name: field.type for field in fields(owner) if field.type is not Augmentation}
            if name in kinds:
                owner = replace(owner, **{name: parsed(text, name, value, kinds[name])})
                recipe = owner if isinstance(owner, Recipe) else replace(recipe, augmentation=owner)
                break
        else:
            near = difflib.get_close_matches(name, [field.name for owner in (recipe, recipe.augmentation) for field in fields(owner)], 1)
            hint = f"is it {near[0]}?" if near else "recipe.py and augment.py name them all"
            raise UsageError(f"--set {text}: there is no setting {name!r}; {hint}")
    plan = recipe.augmentation
    if plan.warp_p and not (plan.warp_shift or plan.warp_scale or plan.warp_degrees):
        raise UsageError(f"--set warp_p={plan.warp_p:g}: does nothing while warp_shift, warp_scale and warp_degrees are 0")
    if plan.cutout_p and not plan.cutout_size:
        raise UsageError(f"--set cutout_p={plan.cutout_p:g}: does nothing while cutout_size is 0")
    return recipe


def parsed(text, name, value, kind):
    """`value` as a setting's kind (int, float, bool or str) has it."""
    if name in CHOICES or kind is bool:
        choices = CHOICES.get(name, ("True", "False"))
        if value not in choices:
            raise UsageError(f"--set {text}: {name} is one of {', '.join(choices)}")
        return value == "True" if kind is bool else value
    least, most = ("above" if name in POSITIVE else "of at least"), HIGHEST.get(name, math.inf)
    expected = f"--set {text}: {name} is a {'whole ' * (kind is int)}number {least} 0" + (f" and at most {most}" if name in HIGHEST else "")
    try:
        number = kind(value)
    except ValueError:
        raise UsageError(expected) from None
    if not 0 <= number <= most or number == math.inf or (number == 0 and name in POSITIVE):
        raise UsageError(expected)
    return number


def build_vit(num_classes, seed):
    """A fresh ViT as PyTorch starts it; the same seed gives the same weights, and the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViT(num_classes=num_classes)


@torch.no_grad()
def build_model(recipe, num_classes, seed, device):
    """A fresh ViT as the recipe starts it; the same seed gives the same weights."""
    model = build_vit(num_classes, seed)
    model.cls_token.mul_(recipe.embedding_std)
    model.pos_embedding.mul_(recipe.embedding_std)
    if recipe.pooled_start:
        start_pooled(model.stem.project.weight)
    return model.to(device)


def start_pooled(weight):
    """Make `weight` (C, S S) average each of the C = c c cells of an S x S map, its norm as it was."""
    cells, side = math.isqrt(len(weight)), math.isqrt(weight.shape[1])
    pixels = torch.eye(side * side).view(-1, side, side)  # (SS, S, S), a map for each place
    pooled = F.adaptive_avg_pool2d(pixels, cells).flatten(1).T  # (SS, S, S) -> (SS, c, c) -> (C, SS)
    weight.copy_(pooled * (weight.norm() / pooled.norm()))


def build_schedule(recipe, steps_per_epoch):
    """The recipe's OneCycle over a whole run."""
    return OneCycle(
        recipe.max_lr, recipe.epochs * steps_per_epoch, recipe.pct_start, recipe.div_factor, recipe.final_div_factor,
        recipe.base_momentum, recipe.max_momentum, recipe.anneal,
    )  # fmt: skip


def build_optimizer(recipe, model, triton=False):
    """The recipe's optimizer for a model: AdamW, or Muon with AdamW beside it; as Triton kernels if `triton`."""
    if triton:
        from kernels.adamw import AdamW as adamw  # Triton is not on every platform
        from kernels.muon import Muon as muon
    else:
        adamw, muon = AdamW, Muon
    embeddings = {id(p) for p in model.parameters(recurse=False)}
    matrices = [p for p in model.parameters() if p.dim() > 1 and id(p) not in embeddings]
    others = [p for p in model.parameters() if p.dim() <= 1 or id(p) in embeddings]
    if recipe.optimizer == "adamw":
        return adamw(matrices, others, recipe.weight_decay, recipe.beta2, recipe.eps)
    hidden = [p for p in matrices if p is not model.head.weight]
    beside = adamw([], [*others, model.head.weight], 0.0, recipe.beta2, recipe.eps)
    qkv = {id(block.attention.qkv.weight) for block in model.blocks}
    return MuonAndAdamW(muon(hidden, [3 if id(p) in qkv else 1 for p in hidden], recipe.weight_decay), beside, recipe.adamw_share)
