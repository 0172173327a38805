"""Faster spellings of what vit.py says in plain PyTorch, and the one place where a spelling is chosen."""

import torch

from kernels import cpu


def plain_forward(model, weights, images):
    """The reference: `model` itself, run with `weights` (a dict by parameter name) in place of its own."""
    return torch.func.functional_call(model, weights, (images,))


def choose(kernels, device):
    """The forward function (model, weights, images) -> logits for `--kernels` auto or torch on a torch.device."""
    if kernels == "auto" and device.type == "cpu":
        cpu.keep_freed_memory()
        return cpu.forward
    return plain_forward
