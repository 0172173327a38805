"""The network as a GPU runs it fastest: a Triton kernel for the stem and one for each half of each block.

Same function of the same weights as vit.py. Parameters go to the kernels as they are, in float32, and are rounded to the
working dtype on chip, so no copy of them is made. The head reads the CLS token alone, so the last feed-forward runs for
that token alone; what it would make of the others reaches no logit. Norm and head, 778 weights, are PyTorch's in fp32.
"""

import copy

import torch

import optimizers
from augment import Augmentation, Augmenter, Normalize
from kernels import plain
from kernels.adamw import AdamW
from kernels.attention import FusedAttention
from kernels.augment import augment
from kernels.mlp import FusedFeedForward
from kernels.muon import Muon
from kernels.stem import FusedStem
from vit import ViT

# Each thing that is done to a picture, to be checked.
EVERYTHING = Augmentation(
    crop_padding=4, crop_border="wrap", flip_p=0.5, warp_p=0.5, warp_shift=0.1, warp_scale=0.2, warp_degrees=15.0, cutout_p=0.5, cutout_size=8
)


def forward(model, images):
    """Logits (B, num_classes), float32, of a `vit.ViT`, given images in the working dtype, float32 or bfloat16.

    A module that somebody watches through a hook runs in PyTorch, and so does a network of sizes that no kernel fits.
    """
    sizes = model.sizes
    expected = sizes["in_channels"], sizes["image_size"], sizes["image_size"]
    around = any(hooks(module) for module in (model, model.blocks, *model.blocks))
    if around or not fits(sizes) or images.shape[1:] != expected:
        return plain.forward(model, images).float()
    x = stem(model, images)
    for block in model.blocks:
        x = attention(block.attention, x)
        if block is model.blocks[-1] and not watched(block.feed_forward):
            x = x[:, :1]  # (B, T, C) -> (B, 1, C)
        x = feed_forward(block.feed_forward, x)
    return model.head(model.norm(x[:, 0].float()))  # (B, C) -> (B, num_classes)


def fits(sizes):
    """Whether the kernels take a network of these `vit.ViT.sizes`."""
    patches = (sizes["image_size"] // sizes["patch_size"]) ** 2
    largest = ((sizes["dim"], 64), (sizes["channels"], 32), (sizes["mlp_dim"], 128), (patches, 256))
    powers = all(16 <= size <= limit and size & (size - 1) == 0 for size, limit in largest)
    return powers and sizes["dim_head"] <= 64


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


def check(device, dtype):
    """Try every kernel on random numbers, forward and backward: None, or words that say what is wrong.

    The reference is PyTorch, the network in float64. An error of 1e-4 (fp32) or 3e-2 (bf16) of a result's norm tells a wrong
    kernel, or a TF32 product, from rounding.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViT().to(device)
    random = torch.Generator(device).manual_seed(0)
    augmenter = Augmenter(EVERYTHING, Normalize((0.5,) * 3, (0.25,) * 3, device), 3, random, epochs=1)
    sizes, block, bound = model.sizes, model.blocks[0], {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    images = torch.randn(3, sizes["in_channels"], sizes["image_size"], sizes["image_size"], generator=random, device=device).to(dtype)
    tokens = torch.randn(3, sizes["channels"] + 1, sizes["dim"], generator=random, device=device).to(dtype).requires_grad_()
    checks = {
        "stem": lambda: compare_module(stem, model, "embed", images, random),
        "attention": lambda: compare_module(attention, block.attention, "forward", tokens, random),
        "feed-forward": lambda: compare_module(feed_forward, block.feed_forward, "forward", tokens, random),
        "augmentation": lambda: compare_augmentation(augmenter, images, dtype),
        "AdamW": lambda: compare_optimizers((AdamW, optimizers.AdamW), ([], 0.1, 0.99, 1e-8), tokens),
        "Muon": lambda: compare_optimizers((Muon, optimizers.Muon), ([3], 0.1), tokens.transpose(0, 1)),
    }
    for name, compared in checks.items():
        try:
            for got, wanted in compared():
                error = ((got - wanted).norm() / wanted.norm()).item()
                if not error <= bound:
                    return f"the {name} kernel is off by {error:.1e} on this device, more than {bound:.0e}"
        except Exception as error:  # a compiler's or a driver's failure has no type of its own
            return f"the {name} kernel does not run here: {error or type(error).__name__}"
    return None


def compare_module(kernel, module, method, x, random):
    """(got, wanted) for kernel(module, x) against the module's method in float64, and for every gradient of a random projection."""
    exact = copy.deepcopy(module).double()
    exact_x = x.detach().double().requires_grad_(x.requires_grad)
    y, exact_y = kernel(module, x), getattr(exact, method)(exact_x)
    upstream = torch.randn(y.shape, generator=random, device=y.device).to(y.dtype)
    yield y.detach(), exact_y.detach()
    inputs, exact_inputs = ([at] * at.requires_grad + list(of.parameters()) for at, of in ((x, module), (exact_x, exact)))
    gradients = torch.autograd.grad(y, inputs, upstream, allow_unused=True)
    exact_gradients = torch.autograd.grad(exact_y, exact_inputs, upstream.double(), allow_unused=True)
    yield from (pair for pair in zip(gradients, exact_gradients) if pair[1] is not None)


def compare_augmentation(augmenter, images, dtype):
    """(got, wanted) for two pictures of three."""
    pictures = (images.float() * 60 + 128).clamp(0, 255).to(torch.uint8)
    indices = torch.tensor([2, 0], device=images.device)
    draws = augmenter.draw(indices, 0, images.shape[-1])
    yield augment(augmenter, pictures, indices, draws, dtype), augmenter.apply(pictures[indices], draws)


def compare_optimizers(kinds, settings, tokens):
    """(got, wanted): how far two steps of two optimizers move a parameter that starts as `tokens`."""
    values, moved = tokens.detach().float().contiguous(), []
    for kind in kinds:
        parameter = values.clone().requires_grad_()
        optimizer = kind([parameter], *settings)
        for power in (1, 3):
            parameter.grad = values**power
            optimizer.prepare(0.1, 0.9)
            optimizer.step()
        moved.append(parameter.detach() - values)
    yield moved
