"""The channel-token Vision Transformer: 72,170 parameters in its layer table, 74,346 in all.

Tokens are channels, not patches: the stem turns a picture into 32 maps of 16x16, and each map, flattened to 256
numbers and projected to 64, is one token. A CLS token in front makes 33.

    python vit.py                   # what every operation of the network costs
    python vit.py --classes 100

Letters in the shape comments: B batch, T tokens (33), C width (64), H heads (4), D head width (16).
The class token and the pre-norm blocks are those of Dosovitskiy et al. 2020, arXiv:2010.11929.
"""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cli import Parser, positive_int, run


class Conv1x1(nn.Linear):
    """A 1x1 convolution along the token axis, (B, T, in) -> (B, T, out): one matrix for every token, as nn.Linear."""


class Stem(nn.Module):
    """Pictures to channel tokens, (B, in_channels, S, S) -> (B, channels, dim)."""

    def __init__(self, image_size, patch_size, in_channels, channels, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1)
        self.gelu1 = nn.GELU()
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=patch_size, stride=patch_size)
        self.gelu2 = nn.GELU()
        self.project = Conv1x1((image_size // patch_size) ** 2, dim)

    def forward(self, images):
        maps = self.gelu1(self.conv1(images))  # (B, 3, 32, 32) -> (B, 32, 32, 32)
        maps = self.gelu2(self.conv2(maps))  # (B, 32, 32, 32) -> (B, 32, 16, 16)
        B, channels, height, width = maps.shape
        tokens = maps.reshape(B, channels, height * width)  # (B, 32, 16, 16) -> (B, 32, 256)
        return self.project(tokens)  # (B, 32, 256) -> (B, 32, 64)


class SoftmaxAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v for every head, (B, T, 3 H D) -> (B, T, H D); q, k, v are chunks of H D channels."""

    def __init__(self, heads, dim_head):
        super().__init__()
        self.heads, self.dim_head = heads, dim_head

    def weigh(self, qkv):
        """How much each token looks at each other, (B, H, T, T), rows of sum 1; and v, (B, H, T, D)."""
        B, T, _ = qkv.shape
        H, D = self.heads, self.dim_head
        q, k, v = qkv.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)  # (B, T, 3HD) -> 3 x (B, H, T, D)
        scores = (q * D**-0.5) @ k.transpose(2, 3)  # (B, H, T, D) x (B, H, D, T) -> (B, H, T, T)
        return scores.softmax(dim=-1), v

    def forward(self, qkv):
        weights, v = self.weigh(qkv)
        values = (weights @ v).transpose(1, 2)  # (B, H, T, T) x (B, H, T, D) -> (B, H, T, D) -> (B, T, H, D)
        return values.flatten(2)  # (B, T, H, D) -> (B, T, HD)


class Attention(nn.Module):
    """The attention half of a block, (B, T, C) -> (B, T, C), residual included."""

    def __init__(self, dim, heads, dim_head):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv = Conv1x1(dim, 3 * heads * dim_head, bias=False)
        self.attend = SoftmaxAttention(heads, dim_head)
        self.out = Conv1x1(heads * dim_head, dim, bias=False)

    def forward(self, x):
        return x + self.out(self.attend(self.qkv(self.norm(x))))


class FeedForward(nn.Module):
    """The feed-forward half of a block, (B, T, C) -> (B, T, C), residual included."""

    def __init__(self, dim, mlp_dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, mlp_dim)
        self.gelu = nn.GELU()
        self.linear2 = nn.Linear(mlp_dim, dim)

    def forward(self, x):
        return x + self.linear2(self.gelu(self.linear1(self.norm(x))))


class Block(nn.Module):
    """One transformer block, (B, T, C) -> (B, T, C)."""

    def __init__(self, dim, heads, dim_head, mlp_dim):
        super().__init__()
        self.attention = Attention(dim, heads, dim_head)
        self.feed_forward = FeedForward(dim, mlp_dim)

    def forward(self, x):
        return self.feed_forward(self.attention(x))


class ViT(nn.Module):
    """Float pictures (B, in_channels, image_size, image_size) to logits (B, num_classes).

    Raises ValueError, saying which and why, for sizes that do not fit together and for pictures of another shape.
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
        sizes = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}: it counts something, so it must be a whole number of at least 1")
        if image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} does not divide into patches of patch_size {patch_size}: "
                f"{image_size % patch_size} pixels are left over"
            )
        self.sizes = sizes  # what a checkpoint needs to build this network again
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, channels + 1, dim))
        self.stem = Stem(image_size, patch_size, in_channels, channels, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, dim_head, mlp_dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = Conv1x1(dim, num_classes)

    def embed(self, images):
        """Pictures (B, in_channels, image_size, image_size) to the first block's input, (B, T, C)."""
        channels, side = self.sizes["in_channels"], self.sizes["image_size"]
        if images.dim() != 4 or images.shape[1:] != (channels, side, side):
            raise ValueError(f"pictures have shape {tuple(images.shape)}; this network takes (B, {channels}, {side}, {side})")
        tokens = self.stem(images)  # (B, 3, 32, 32) -> (B, 32, 64)
        cls_token = self.cls_token.expand(len(images), -1, -1)  # (1, 1, 64) -> (B, 1, 64)
        return torch.cat([cls_token, tokens], dim=1) + self.pos_embedding  # (B, 33, 64)

    def forward(self, images):
        x = self.blocks(self.embed(images))  # (B, 3, 32, 32) -> (B, 33, 64) -> (B, 33, 64)
        return self.head(self.norm(x[:, 0]))  # (B, 33, 64) -> (B, 64) -> (B, num_classes)


def cost(model):
    """What every operation of `model` costs for one picture, measured by hooks while one picture passes.

    Returns a list of dicts with `name`, `op`, `shape` (batch left out), `parameters` and `macs` (multiply-accumulates,
    half of what torch.utils.flop_counter counts), in the order of execution. The embeddings, which belong to no
    operation's module, are the row `cls_token, pos_embedding`.
    """
    rows, hooks, started = [], [], {}
    counter = FlopCounterMode(display=False)

    def start(module, _):
        started[module] = counter.get_total_flops()

    def finish(name, module, output):
        rows.append(
            {
                "name": name,
                "op": type(module).__name__,
                "shape": tuple(output.shape[1:]),
                "parameters": sum(p.numel() for p in module.parameters()),
                "macs": (counter.get_total_flops() - started[module]) // 2,
            }
        )

    def embedded(_, inputs):
        own = dict(model.named_parameters(recurse=False))
        shape = tuple(inputs[0].shape[1:])
        parameters = sum(p.numel() for p in own.values())
        rows.append({"name": ", ".join(own), "op": "concatenate, add", "shape": shape, "parameters": parameters, "macs": 0})

    hooks.append(model.blocks.register_forward_pre_hook(embedded))
    for name, module in model.named_modules():
        if not list(module.children()):
            hooks.append(module.register_forward_pre_hook(start))
            hooks.append(module.register_forward_hook(lambda m, _, output, name=name: finish(name, m, output)))
    device = model.cls_token.device
    images = torch.zeros(1, model.sizes["in_channels"], model.sizes["image_size"], model.sizes["image_size"], device=device)
    try:
        with torch.no_grad(), counter:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return rows


def cost_table(model):
    """`cost(model)` as text: a row an operation, then totals of parameters, MACs and memory (fp32, one picture)."""
    rows = cost(model)
    line = "{:<29} {:<16} {:>10} {:>10} {:>9}".format
    lines = [line("name", "operation", "output", "parameters", "MACs")]
    lines += [
        line(row["name"], row["op"], ", ".join(map(str, row["shape"])), f"{row['parameters']:,}", f"{row['macs']:,}")
        for row in rows
    ]
    total = sum(row["parameters"] for row in rows)
    embeddings = sum(p.numel() for p in model.parameters(recurse=False))
    activations = sum(torch.Size(row["shape"]).numel() for row in rows)
    lines += [
        "",
        f"parameters, layer table     {total - embeddings:>12,}",
        f"parameters, embeddings too  {total:>12,}  = {total * 4 / 1e6:.3f} MB in fp32",
        f"multiply-accumulates        {sum(row['macs'] for row in rows):>12,}  a picture, forward",
        f"activations                 {activations:>12,}  = {activations * 4 / 1e6:.3f} MB in fp32 a picture",
    ]
    return "\n".join(lines)


def main():
    parser = Parser(description="Print what every operation of the network costs for one picture.")
    parser.add_argument("--classes", type=positive_int, default=10, help="number of classes")
    print(cost_table(ViT(num_classes=parser.parse_args().classes)))


if __name__ == "__main__":
    run(main)
