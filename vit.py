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


class Conv1x1(nn.Linear):
    """A 1x1 convolution over the token axis, (B, T, in) -> (B, T, out).

    On tokens it is a linear layer; the name is that of the run to reproduce.
    """

    def forward(self, x, rows=None):
        """Apply the layer, or only the output channels `rows`, a slice, of one without bias."""
        if rows is None:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight[rows])


class Stem(nn.Module):
    """Images to channel tokens, (B, in_channels, S, S) -> (B, channels, dim)."""

    def __init__(self, image_size, patch_size, in_channels, channels, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1)
        self.gelu1 = nn.GELU()
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=patch_size, stride=patch_size)
        self.gelu2 = nn.GELU()
        self.proj = Conv1x1((image_size // patch_size) ** 2, dim)

    def forward(self, images):
        maps = self.gelu1(self.conv1(images))  # (B, 3, 32, 32) -> (B, 32, 32, 32)
        maps = self.gelu2(self.conv2(maps))  # (B, 32, 32, 32) -> (B, 32, 16, 16)
        return self.proj(maps.flatten(2))  # (B, 32, 16, 16) -> (B, 32, 256) -> (B, 32, 64)


class ScaledDotProductAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v for q (B H, T or 1, D), k and v (B H, T, D)."""

    def forward(self, q, k, v):
        scale = q.shape[-1] ** -0.5
        scores = torch.bmm(q * scale, k.transpose(1, 2))  # (B H, T or 1, T)
        return torch.bmm(scores.softmax(dim=-1), v)  # (B H, T or 1, D)


class Attention(nn.Module):
    """The attention half of a block with its residual, (B, T, C) -> (B, T, C).

    With cls_only the CLS token alone is computed, (B, T, C) -> (B, 1, C).
    """

    def __init__(self, dim, heads, dim_head):
        super().__init__()
        self.heads = heads
        self.dim_head = dim_head
        self.norm = nn.LayerNorm(dim)
        self.qkv = Conv1x1(dim, 3 * heads * dim_head, bias=False)  # q, k, v, each (H, D)
        self.attend = ScaledDotProductAttention()
        self.out = Conv1x1(heads * dim_head, dim, bias=False)

    def split_heads(self, x):
        """Return the n tensors (B H, T, D) in x (B, T, n H D), each contiguous as bmm wants it."""
        B, T, width = x.shape
        H = self.heads
        D = self.dim_head
        n = width // (H * D)
        x = x.view(B, T, n, H, D).permute(2, 0, 3, 1, 4)  # (n, B, H, T, D)
        return x.reshape(n, B * H, T, D).unbind(0)

    def forward(self, x, cls_only=False):
        y = self.norm(x)
        if cls_only:
            # The CLS token asks, all tokens answer: q of the first, k and v of all.
            x = x[:, :1]
            inner_dim = self.heads * self.dim_head
            (q,) = self.split_heads(self.qkv(y[:, :1], rows=slice(0, inner_dim)))
            k, v = self.split_heads(self.qkv(y, rows=slice(inner_dim, None)))
        else:
            q, k, v = self.split_heads(self.qkv(y))
        values = self.attend(q, k, v)  # (B H, T, D)
        B, T, _ = x.shape
        values = values.view(B, self.heads, T, self.dim_head).transpose(1, 2)  # (B, T, H, D)
        return x + self.out(values.reshape(B, T, self.heads * self.dim_head))


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

    The head reads the CLS token only, so the last block computes nothing else: the same logits and
    gradients for less work. Raises ValueError for sizes that do not fit together.
    """

    def __init__(
        self,
        num_classes=10,
        image_size=32,
        patch_size=2,
        in_channels=3,
        channels=32,
        dim=64,
        depth=2,
        heads=4,
        dim_head=16,
        mlp_dim=64,
    ):
        super().__init__()
        self.config = {
            "num_classes": num_classes,
            "image_size": image_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "channels": channels,
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "dim_head": dim_head,
            "mlp_dim": mlp_dim,
        }
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

    def forward(self, images):
        """Return logits (B, num_classes); raises ValueError for images of another shape."""
        c = self.config["in_channels"]
        S = self.config["image_size"]
        if images.dim() != 4 or images.shape[1:] != (c, S, S):
            raise ValueError(f"images are {tuple(images.shape)}, not (B, {c}, {S}, {S})")
        tokens = self.stem(images)  # (B, 3, 32, 32) -> (B, 32, 64)
        cls_token = self.cls_token.expand(images.shape[0], -1, -1)  # (1, 1, 64) -> (B, 1, 64)
        x = torch.cat([cls_token, tokens], dim=1) + self.pos_embedding  # (B, 33, 64)
        for block in self.blocks[:-1]:
            x = block(x)  # (B, 33, 64) -> (B, 33, 64)
        x = self.blocks[-1](x, cls_only=True)  # (B, 33, 64) -> (B, 1, 64)
        return self.head(self.norm(x)[:, 0])  # (B, 1, 64) -> (B, 64) -> (B, num_classes)


@torch.no_grad()
def build_model(recipe, num_classes, seed, device):
    """Return a ViT with the recipe's initialization; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViT(num_classes=num_classes)
    model.cls_token.mul_(recipe.embed_init_std)
    model.pos_embedding.mul_(recipe.embed_init_std)
    if recipe.avg_pool_init:
        pool_maps(model.stem.proj.weight)
    return model.to(device)


def pool_maps(weight):
    """Make a projection of S x S maps, (cells, S S), an average over cells, of the same norm."""
    num_cells, num_pixels = weight.shape  # 64, 256
    cells_side = math.isqrt(num_cells)
    side = math.isqrt(num_pixels)
    pixels = torch.eye(num_pixels).view(-1, side, side)  # (S S, S, S): a map for each pixel
    pool = F.adaptive_avg_pool2d(pixels, cells_side).flatten(1).T  # (S S, c, c) -> (cells, S S)
    weight.copy_(pool * (weight.norm() / pool.norm()))


@torch.no_grad()
def summary(model):
    """Return the layer table as text: output shape, parameters, multiply-accumulates of an image.

    The qkv layer of the last block is called twice, for q of the CLS token, then for k and v: its
    MACs are those of both calls, its shape is that of the second.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton: half a second

    # Run one image with a hook on every layer that saves the shape of its output.
    layers = {name: m for name, m in model.named_modules() if not list(m.children())}
    shapes = {}

    def save_shape(module, args, output):
        shapes[module] = output.shape[1:]

    handles = [module.register_forward_hook(save_shape) for module in layers.values()]
    c = model.config["in_channels"]
    S = model.config["image_size"]
    images = torch.zeros(1, c, S, S, device=model.cls_token.device)
    with FlopCounterMode(display=False) as counter:
        model(images)
    for handle in handles:
        handle.remove()

    lines = [("name", "layer", "output", "parameters", "MACs")]
    flops = counter.get_flop_counts()
    for name, module in layers.items():
        shape = ", ".join(str(n) for n in shapes[module])
        macs = sum(flops.get(f"ViT.{name}", {}).values()) // 2
        size = count_parameters(module)
        lines.append((name, type(module).__name__, shape, f"{size:,}", f"{macs:,}"))
    size = sum(count_parameters(module) for module in layers.values())
    lines.append(("all layers", "", "", f"{size:,}", f"{counter.get_total_flops() // 2:,}"))
    lines.append(("and the embeddings", "", "", f"{count_parameters(model):,}", ""))
    return "\n".join("{:<25} {:<25} {:>10} {:>10} {:>9}".format(*line) for line in lines)


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


def main():
    parser = Parser(description="Print the layer table: shapes, parameters and MACs of an image.")
    parser.add_argument("--classes", type=positive_int, default=10, help="number of classes")
    args = parser.parse_args()
    print(summary(ViT(num_classes=args.classes)))


if __name__ == "__main__":
    run_script(main)
