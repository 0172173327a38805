"""The network as vit.py says it: the reference that every other spelling is checked against."""

import torch


def weights(module, dtype):
    """The parameters of `module` by name, in `dtype`; their gradients flow back to the parameters as they are."""
    return {name: weight.to(dtype) for name, weight in module.named_parameters()}


def call(module, x):
    """`module(x)` in the dtype of x."""
    return torch.func.functional_call(module, weights(module, x.dtype), (x,))


def forward(model, images):
    """Logits (B, num_classes) of a `vit.ViT`, in the dtype of images."""
    return call(model, images)
