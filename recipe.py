"""Recipes: everything that a training run chooses, in one place, and the model and optimizer that follow from it."""

from dataclasses import dataclass

import torch

from augment import Augmentation
from vit import ViT


@dataclass(frozen=True)
class Recipe:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) under OneCycle; momentum, cycled, is AdamW's beta1."""

    epochs: int
    batch_size: int
    max_lr: float
    pct_start: float  # share of the run before the peak
    div_factor: float
    final_div_factor: float
    anneal: str
    weight_decay: float  # of matrices and convolution kernels; biases, norms and embeddings have none
    l1: float  # times the sum of all parameters' magnitudes, added to the loss
    embedding_std: float  # of the CLS token and the position embedding at the start
    augmentation: Augmentation
    base_momentum: float = 0.85
    max_momentum: float = 0.95
    beta2: float = 0.999
    eps: float = 1e-8


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
    # A plain recipe of the field: small embeddings, a lower peak and milder augmentation, as the network under-fits.
    "default": Recipe(
        epochs=24,
        batch_size=512,
        max_lr=0.008,
        pct_start=5 / 24,
        div_factor=10,
        final_div_factor=10,
        anneal="linear",
        weight_decay=0.05,
        l1=0.0,
        embedding_std=0.02,
        augmentation=Augmentation(crop_padding=4, crop_border="reflect", flip="alternating"),
    ),
}  # fmt: skip


def build_model(recipe, num_classes, seed, device):
    """A fresh ViT; the same seed gives the same weights, and the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViT(num_classes=num_classes)
    with torch.no_grad():
        model.cls_token.mul_(recipe.embedding_std)
        model.pos_embedding.mul_(recipe.embedding_std)
    return model.to(device)


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW in one fused kernel, told each step's rate and beta1 as kernels.adamw.AdamW is."""

    def prepare(self, lr, momentum):
        for group in self.param_groups:
            group["lr"], group["betas"] = lr, (momentum, group["betas"][1])


def build_optimizer(recipe, model, triton=False):
    """AdamW with decay on matrices and convolution kernels alone; as a Triton kernel if `triton`."""
    embeddings = {id(p) for p in model.parameters(recurse=False)}
    decayed = [p for p in model.parameters() if p.dim() > 1 and id(p) not in embeddings]
    others = [p for p in model.parameters() if p.dim() <= 1 or id(p) in embeddings]
    if triton:
        from kernels import adamw  # Triton is not on every platform

        return adamw.AdamW(decayed, others, recipe.weight_decay, recipe.beta2, recipe.eps)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW(groups, lr=recipe.max_lr, betas=(recipe.max_momentum, recipe.beta2), eps=recipe.eps, fused=True)
