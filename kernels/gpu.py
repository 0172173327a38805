"""The network as a GPU runs it fastest: a Triton kernel for the stem and one for each half of each block.

Same function of the same weights as vit.py. Parameters go to the kernels as they are, in float32, and are rounded to the
working dtype on chip, so no copy of them is made. The head reads the CLS token alone, so the last feed-forward runs for
that token alone; what it would make of the others reaches no logit. Norm and head, 778 weights, are PyTorch's in fp32.
"""

import copy

import torch

from kernels import plain
from kernels.attention import FusedAttention
from kernels.mlp import FusedFeedForward
from kernels.stem import FusedStem


def forward(model, images):
    """Logits (B, num_classes), float32, of a `vit.ViT`, given images in the working dtype, float32 or bfloat16.

    A module that somebody watches through a hook runs in PyTorch, and so does a network of sizes that no kernel fits.
    """
    sizes = model.sizes
    expected = sizes["in_channels"], sizes["image_size"], sizes["image_size"]
    watched = any(hooks(module) for module in (model, model.blocks, *model.blocks))
    if watched or not fits(sizes) or images.shape[1:] != expected:
        return plain.forward(model, images).float()
    x = stem(model, images)
    for block in model.blocks:
        x = attention(block.attention, x)
        if block is model.blocks[-1]:
            x = x[:, :1]  # (B, T, C) -> (B, 1, C)
        x = feed_forward(block.feed_forward, x)
    return model.head(model.norm(x[:, 0].float()))  # (B, C) -> (B, num_classes)


def fits(sizes):
    """Whether the kernels take a network of these `vit.ViT.sizes`."""
    patches = (sizes["image_size"] // sizes["patch_size"]) ** 2
    powers = all(is_power(size, 16, 256) for size in (sizes["dim"], sizes["channels"], sizes["mlp_dim"], patches))
    return powers and sizes["dim"] <= 64 and sizes["channels"] < 64 and sizes["mlp_dim"] <= 128 and sizes["dim_head"] <= 64


def is_power(size, low, high):
    return low <= size <= high and size & (size - 1) == 0


def hooks(module):
    """Whether somebody watches `module` itself, not one inside it."""
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(module, kind) for kind in kinds)


def watched(module):
    return any(hooks(part) for part in module.modules())


def stem(model, images):
    """`model.embed(images)`: (B, 3, S, S) -> (B, T, C)."""
    part = model.stem
    if watched(part) or images.requires_grad:
        cls_token = model.cls_token.to(images.dtype).expand(len(images), -1, -1)
        return torch.cat([cls_token, plain.call(part, images)], dim=1) + model.pos_embedding.to(images.dtype)
    convolutions = part.conv1.weight, part.conv1.bias, part.conv2.weight, part.conv2.bias
    return FusedStem.apply(images, *convolutions, part.project.weight, part.project.bias, model.cls_token, model.pos_embedding)


def attention(module, x):
    """`vit.Attention`: (B, T, C) -> (B, T, C)."""
    if watched(module):
        return plain.call(module, x)
    norm = module.norm
    return FusedAttention.apply(x, norm.weight, norm.bias, module.qkv.weight, module.out.weight, module.attend.heads, norm.eps)


def feed_forward(module, x):
    """`vit.FeedForward`: (..., C) -> (..., C)."""
    if watched(module):
        return plain.call(module, x)
    norm, first, second = module.norm, module.linear1, module.linear2
    return FusedFeedForward.apply(x, norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias, norm.eps)


def check(model, dtype, batch=3):
    """Try every kernel, forward and backward, on random numbers: None, or a line that says what is wrong.

    The reference is the same modules of `model` in float64. The bounds are those of the working dtype: an error of 1e-4
    (fp32) or 3e-2 (bf16) of the result's norm tells a wrong kernel, or a TF32 product, from rounding.
    """
    exact = copy.deepcopy(model).double()
    device, sizes, bound = model.cls_token.device, model.sizes, {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    random = torch.Generator(device).manual_seed(0)
    images = torch.randn(batch, sizes["in_channels"], sizes["image_size"], sizes["image_size"], generator=random, device=device)
    tokens = torch.randn(batch, sizes["channels"] + 1, sizes["dim"], generator=random, device=device)
    block, exact_block = model.blocks[0], exact.blocks[0]
    for name, kernel, reference, x in (
        ("stem", lambda x: stem(model, x), exact.embed, images),
        ("attention", lambda x: attention(block.attention, x), exact_block.attention, tokens),
        ("feed-forward", lambda x: feed_forward(block.feed_forward, x), exact_block.feed_forward, tokens),
    ):
        x = x.to(dtype).requires_grad_(x is tokens)
        try:
            results = value_and_gradients(kernel, x, model, random)
            wanted = value_and_gradients(reference, x.detach().double().requires_grad_(x.requires_grad), exact, random)
        except Exception as error:  # a compiler's or a driver's failure has no type of its own
            return f"the {name} kernel does not run here: {error or type(error).__name__}"
        for result, value in zip(results, wanted):
            error = ((result - value).norm() / value.norm()).item()
            if not error <= bound:
                return f"the {name} kernel is off by {error:.1e} on this device, more than {bound:.0e}"
    return None


def value_and_gradients(function, x, model, random):
    """`function(x)`, and the gradients of a random projection of it in x and in those of model's parameters that it reads."""
    y = function(x)
    state = random.get_state()
    upstream = torch.randn(y.shape, generator=random, device=y.device)
    random.set_state(state)  # the next call draws the same
    inputs = [x] * x.requires_grad + list(model.parameters())
    gradients = torch.autograd.grad(y, inputs, upstream.to(y.dtype), allow_unused=True)
    return [y.detach()] + [gradient for gradient in gradients if gradient is not None]
