"""The channel-token Vision Transformer: 72,170 parameters in its layer table, 74,346 in all.

Tokens are channels, not patches: the stem turns an image into 32 maps of 16x16, and each map,
flattened to 256 values and projected to 64, is one token. A CLS token in front makes 33.

    python vit.py                   # parameters and multiply-accumulates of every layer
    python vit.py --classes 100

Shapes: B batch, T tokens (33), C width (64), H heads (4), D head width (16).
CLS token and pre-norm blocks: Dosovitskiy et al. 2020, arXiv:2010.11929.
"""

import math

from cli import Parser, positive_int, run_script

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Conv1x1(nn.Linear):
    """A 1x1 convolution over the token axis, (B, T, in) -> (B, T, out)."""

    def forward(self, x, rows=None):
        """`rows`, a slice of the weight (out, in), selects channels of a layer without bias."""
        return F.linear(x, self.weight if rows is None else self.weight[rows], self.bias)


class Stem(nn.Module):
    """Images to channel tokens, (B, in_channels, S, S) -> (B, channels, dim)."""

    def __init__(self, image_size, patch_size, in_channels, channels, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1)
        self.gelu1 = nn.GELU()
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=patch_size, stride=patch_size)
        self.gelu2 = nn.GELU()
        self.proj = Conv1x1((image_size // patch_size) ** 2, dim)

    def forward(self, images, as_matmul=False):
        if as_matmul:
            maps = convs_as_matmul(self, images)
        else:
            maps = self.gelu1(self.conv1(images))  # (B, 3, 32, 32) -> (B, 32, 32, 32)
            maps = self.gelu2(self.conv2(maps))  # (B, 32, 32, 32) -> (B, 32, 16, 16)
        return self.proj(maps.flatten(2))  # (B, 32, 16, 16) -> (B, 32, 256) -> (B, 32, 64)


def convs_as_matmul(stem, images):
    """gelu2(conv2(gelu1(conv1(images)))) as two matrix products, faster on a CPU.

    A 2x2 patch of conv2 sees 4x4 pixels. With these 48 values in a row, conv1 at the 4 pixels of
    the patch is one (48, 128) matrix, and conv2 a (128, 32) matrix. Only 27 of the 48 weights in a
    column are nonzero: a dense product is still cheaper than a convolution of 3 channels.
    """
    B, c, S, _ = images.shape
    p = stem.conv2.stride[0]
    window, side = p + 2, S // p  # pixels that a patch sees, and patches, along one axis
    padded = F.pad(images, (1, 1, 1, 1)).permute(0, 2, 3, 1)  # (B, 34, 34, 3)
    padded = padded.reshape(B, S + 2, (S + 2) * c)  # rows of pixels are contiguous
    patches = padded.unfold(1, window, p).unfold(2, window * c, p * c)  # (B, 16, 16, 4, 12)
    patches = patches.reshape(B, side, side, window * window * c).permute(0, 3, 1, 2)

    pixels = [(y, x) for y in range(p) for x in range(p)]
    weight = stem.conv1.weight  # (32, 3, 3, 3)
    weight = torch.cat([F.pad(weight, (x, p - 1 - x, y, p - 1 - y)) for y, x in pixels])
    weight = weight.permute(0, 2, 3, 1).flatten(1)[:, :, None, None]  # (128, 48, 1, 1)
    maps = F.conv2d(patches, weight, stem.conv1.bias.repeat(p * p))  # (B, 48 -> 128, 16, 16)
    # Elementwise operations are fastest when the order of dimensions is the order in memory.
    maps = F.gelu(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    weight = stem.conv2.weight.permute(0, 2, 3, 1).flatten(1)[:, :, None, None]  # (32, 128, 1, 1)
    maps = F.conv2d(maps, weight, stem.conv2.bias)  # (B, 128 -> 32, 16, 16)
    return F.gelu(maps.contiguous())


class ScaledDotProductAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v for q (B H, T or 1, D), k and v (B H, T, D)."""

    def forward(self, q, k, v):
        weights = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2)).softmax(dim=-1)
        return torch.bmm(weights, v)  # (B H, T or 1, T) x (B H, T, D) -> (B H, T or 1, D)


class Attention(nn.Module):
    """The attention half of a block with its residual, (B, T, C) -> (B, T, C).

    With cls_only the CLS token alone is computed, (B, T, C) -> (B, 1, C).
    """

    def __init__(self, dim, heads, dim_head):
        super().__init__()
        self.heads, self.inner_dim = heads, heads * dim_head
        self.norm = nn.LayerNorm(dim)
        self.qkv = Conv1x1(dim, 3 * self.inner_dim, bias=False)  # q, k, v, each (H, D)
        self.attend = ScaledDotProductAttention()
        self.out = Conv1x1(self.inner_dim, dim, bias=False)

    def split_heads(self, x):
        """(B, T, n H D) -> n tensors (B H, T, D), each contiguous as bmm wants it."""
        B, T, width = x.shape
        n, H, D = width // self.inner_dim, self.heads, self.inner_dim // self.heads
        x = x.view(B, T, n, H, D).permute(2, 0, 3, 1, 4)  # (n, B, H, T, D)
        return x.reshape(n, B * H, T, D).unbind(0)

    def forward(self, x, cls_only=False):
        y = self.norm(x)
        if cls_only:
            x = x[:, :1]
            (q,) = self.split_heads(self.qkv(y[:, :1], rows=slice(self.inner_dim)))
            k, v = self.split_heads(self.qkv(y, rows=slice(self.inner_dim, None)))
        else:
            q, k, v = self.split_heads(self.qkv(y))
        values = self.attend(q, k, v)  # (B H, T, D)
        B, T, _ = x.shape
        values = values.view(B, self.heads, T, v.shape[-1]).transpose(1, 2)  # (B, T, H, D)
        return x + self.out(values.reshape(B, T, self.inner_dim))


class MLP(nn.Module):
    """The feed-forward half of a block with its residual, (B, T, C) -> (B, T, C)."""

    def __init__(self, dim, mlp_dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, mlp_dim)
        self.gelu = nn.GELU()
        self.linear2 = nn.Linear(mlp_dim, dim)

    def forward(self, x):
        return x + self.linear2(self.gelu(self.linear1(self.norm(x))))


class Block(nn.Module):
    """A transformer block, (B, T, C) -> (B, T, C), or (B, 1, C) with cls_only."""

    def __init__(self, dim, heads, dim_head, mlp_dim):
        super().__init__()
        self.attention = Attention(dim, heads, dim_head)
        self.mlp = MLP(dim, mlp_dim)

    def forward(self, x, cls_only=False):
        return self.mlp(self.attention(x, cls_only))


class ViT(nn.Module):
    """Normalized float images (B, in_channels, image_size, image_size) to logits (B, num_classes).

    The head reads the CLS token only, so the last block computes nothing else, unless a second loss
    asks for the mean of the other tokens: the same logits and gradients for less work. Raises
    ValueError for sizes that do not fit together.
    """

    def __init__(
        self, num_classes=10, image_size=32, patch_size=2, in_channels=3, channels=32, dim=64,
        depth=2, heads=4, dim_head=16, mlp_dim=64,
    ):  # fmt: skip
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        for name, value in self.config.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, not a whole number of at least 1")
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} does not divide by patch_size {patch_size}")
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, channels + 1, dim))
        self.stem = Stem(image_size, patch_size, in_channels, channels, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, dim_head, mlp_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = Conv1x1(dim, num_classes)

    def forward(self, images, stem_as_matmul=False, mean_token=False):
        """With `mean_token`, logits (B, 2, num_classes): the head's of the CLS token, and of the
        mean of all others. Raises ValueError for images of another shape.
        """
        c, S = self.config["in_channels"], self.config["image_size"]
        if images.dim() != 4 or images.shape[1:] != (c, S, S):
            raise ValueError(f"images are {tuple(images.shape)}, not (B, {c}, {S}, {S})")
        tokens = self.stem(images, stem_as_matmul)  # (B, 3, 32, 32) -> (B, 32, 64)
        cls_token = self.cls_token.expand(images.shape[0], -1, -1)  # (1, 1, 64) -> (B, 1, 64)
        x = torch.cat([cls_token, tokens], dim=1) + self.pos_embedding  # (B, 33, 64)
        *blocks, last_block = self.blocks
        for block in blocks:
            x = block(x)
        x = self.norm(last_block(x, cls_only=not mean_token))  # (B, 33, 64) -> (B, 1 or 33, 64)
        if mean_token:
            return self.head(torch.stack([x[:, 0], x[:, 1:].mean(1)], dim=1))  # (B, 2, 64)
        return self.head(x[:, 0])  # (B, 64) -> (B, num_classes)


@torch.no_grad()
def build_model(recipe, num_classes, seed, device):
    """A ViT with the recipe's initialization; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViT(num_classes=num_classes)
    model.cls_token.mul_(recipe.embed_init_std)
    model.pos_embedding.mul_(recipe.embed_init_std)
    if recipe.avg_pool_init:
        weight = model.stem.proj.weight  # (C, S S): C cells of an S x S map
        cells, side = math.isqrt(len(weight)), math.isqrt(weight.shape[1])
        maps = torch.eye(side * side).view(-1, side, side)  # (S S, S, S), one per pixel
        pool = F.adaptive_avg_pool2d(maps, cells).flatten(1).T  # (S S, c, c) -> (C, S S)
        weight.copy_(pool * (weight.norm() / pool.norm()))
    return model.to(device)


def summary(model):
    """Layer table of `model` as text: output shape, parameters, multiply-accumulates of an image.

    A layer that is called twice (qkv of the last block: q of the CLS token, then k, v) has the
    shape of the second output and the MACs of both.
    """
    shapes, counter = {}, FlopCounterMode(display=False)
    leaves = {name: m for name, m in model.named_modules() if not list(m.children())}
    save = lambda module, args, output: shapes.update({module: output.shape[1:]})
    handles = [module.register_forward_hook(save) for module in leaves.values()]
    c, S = model.config["in_channels"], model.config["image_size"]
    with torch.no_grad(), counter:
        model(torch.zeros(1, c, S, S, device=model.cls_token.device))
    for handle in handles:
        handle.remove()
    count = lambda module: sum(p.numel() for p in module.parameters())
    flops = lambda name: sum(counter.get_flop_counts().get(f"ViT{name}", {}).values())
    lines = [("name", "layer", "output", "parameters", "MACs")]
    for name, m in leaves.items():
        size, macs = f"{count(m):,}", f"{flops(f'.{name}') // 2:,}"
        lines.append((name, type(m).__name__, ", ".join(map(str, shapes[m])), size, macs))
    size = sum(map(count, leaves.values()))
    lines.append(("all layers", "", "", f"{size:,}", f"{flops('') // 2:,}"))
    lines.append(("and the embeddings", "", "", f"{count(model):,}", ""))
    return "\n".join("{:<25} {:<25} {:>10} {:>10} {:>9}".format(*line) for line in lines)


def main():
    parser = Parser(description="Print the layer table: shapes, parameters and MACs of an image.")
    parser.add_argument("--classes", type=positive_int, default=10, help="number of classes")
    print(summary(ViT(num_classes=parser.parse_args().classes)))


if __name__ == "__main__":
    run_script(main)
