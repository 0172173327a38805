"""The network as a CPU runs it fastest: the stem as matrix products, the last block for the CLS token alone.

Same function of the same weights as vit.py, in plain PyTorch, differentiated by autograd; nothing is compiled, so
there is no start-up cost. Three things make it fast:

- The stem is two matrix products over pixels-by-channels rows and no convolution. A patch of conv2 (2x2) sees 4x4
  pixels of the picture; those 4x4x3 numbers times one (48, 128) matrix, which holds conv1's kernel at four positions,
  are conv1's output at the patch's four pixels, already laid out as conv2's input row. A fourth channel of ones makes
  conv1's bias a weight: with it the product needs no separate pass for the bias, nor its gradient for the sum, and
  K = 64 fills whole registers. It computes zeros too (27 of 48 weights count); that is cheaper than rows of 27.
- The head reads the CLS token alone, so the last block computes keys and values for every token but queries, output
  projection and feed-forward for one. The other 32 tokens' values never reach the logits, nor do they have gradients.
- Freed memory is kept (`keep_freed_memory`): glibc hands large blocks back to the system at once, and every step
  would fault tens of megabytes in again, page by page, which costs more than the arithmetic.

Letters: B batch, T tokens (33), C width (64), H heads (4), D head width (16), p patch size (2), P patches (256).
"""

import ctypes
import platform

import torch
import torch.nn.functional as F


def keep_freed_memory():
    """Tell glibc to keep freed memory for the next allocation, for the rest of the process; False without glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # From mallopt(3): M_MMAP_MAX = -4, blocks served by mmap (0: none); M_TRIM_THRESHOLD = -1, bytes free at the
    # top of the heap beyond which they go back; M_TOP_PAD = -2, bytes asked for at a time. Each returns 1 if done.
    return all([mallopt(-4, 0), mallopt(-1, 2**31 - 1), mallopt(-2, 64 << 20)])


def forward(model, weights, images):
    """Logits (B, num_classes) of a `vit.ViT` run with `weights`, tensors by parameter name, all of images' dtype."""
    x = stem(model, weights, images)
    x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x], dim=1) + weights["pos_embedding"]  # (B, T, C)
    last = len(model.blocks) - 1
    for i, block in enumerate(model.blocks):
        x = attention(block.attention, weights, f"blocks.{i}.attention.", x, cls_only=i == last)
        x = feed_forward(weights, f"blocks.{i}.feed_forward.", x)
    x = layer_norm(weights, "norm.", x[:, 0])  # (B, C)
    return F.linear(x, weights["head.weight"], weights["head.bias"])


def stem(model, weights, images):
    """Pictures (B, c, S, S) to channel tokens (B, channels, dim)."""
    B, c, S, _ = images.shape
    p = model.sizes["patch_size"]
    side, window, depth = S // p, p + 2, c + 1  # patches on a side, pixels that a patch sees, channels and the ones
    padded = images.new_zeros(B, S + 2, S + 2, depth)
    padded[:, 1:-1, 1:-1, :c] = images.permute(0, 2, 3, 1)  # (B, c, S, S) -> (B, S, S, c)
    padded[..., c] = 1
    lines = padded.view(B, S + 2, (S + 2) * depth)
    patches = images.new_empty(B, side, side, window, window * depth)
    for row in range(window):  # a line of a patch is contiguous in the picture: window * depth numbers
        patches[:, :, :, row] = lines[:, row : row + S - p + 1 : p].unfold(2, window * depth, p * depth)
    patches = patches.view(B * side * side, window * window * depth)  # (BP, 64)

    maps = F.gelu(patches @ conv1_matrix(weights, p).t())  # (BP, 64) -> (BP, pp * channels)
    matrix = weights["stem.conv2.weight"].permute(0, 2, 3, 1).flatten(1)  # (out, in, p, p) -> (out, pp * in)
    maps = F.gelu(F.linear(maps, matrix, weights["stem.conv2.bias"]))  # (BP, pp * channels) -> (BP, channels)
    tokens = maps.view(B, side * side, -1).transpose(1, 2)  # (BP, channels) -> (B, channels, P)
    return F.linear(tokens, weights["stem.project.weight"], weights["stem.project.bias"])


def conv1_matrix(weights, p):
    """conv1's kernel, bias in the centre of the channel of ones, at every pixel of a patch: (pp * out, window^2 * c)."""
    bias = F.pad(weights["stem.conv1.bias"].view(-1, 1, 1, 1), (1, 1, 1, 1))  # (out,) -> (out, 1, 3, 3)
    kernel = torch.cat([weights["stem.conv1.weight"], bias], dim=1)  # (out, c + 1, 3, 3)
    shifted = [F.pad(kernel, (x, p - 1 - x, y, p - 1 - y)) for y in range(p) for x in range(p)]
    return torch.stack(shifted).permute(0, 1, 3, 4, 2).flatten(2).flatten(0, 1)  # (pp, out, rows, columns, c + 1)


def attention(module, weights, name, x, cls_only):
    """vit.Attention with weights called `name` + ...: (B, T, C) -> (B, T, C), or (B, 1, C) if `cls_only`."""
    B, T, C = x.shape
    H, D = module.attend.heads, module.attend.dim_head
    y = layer_norm(weights, name + "norm.", x)
    qkv = weights[name + "qkv.weight"]  # (3HD, C)
    if cls_only:
        x, T = x[:, :1], 1
        q = F.linear(y[:, :1], qkv[: H * D]).view(B * H, 1, D)
        k, v = split_heads(F.linear(y, qkv[H * D :]), 2, H, D)
    else:
        q, k, v = split_heads(F.linear(y, qkv), 3, H, D)
    scores = torch.bmm(q * D**-0.5, k.transpose(1, 2))  # (BH, T or 1, D) x (BH, D, T) -> (BH, T or 1, T)
    values = torch.bmm(scores.softmax(dim=-1), v)  # (BH, T or 1, T) x (BH, T, D) -> (BH, T or 1, D)
    values = values.view(B, H, T, D).transpose(1, 2).reshape(B, T, H * D)
    return x + F.linear(values, weights[name + "out.weight"])


def split_heads(x, parts, H, D):
    """(B, T, parts * H * D) -> `parts` tensors (BH, T, D), each contiguous, as a batched product wants them."""
    B, T, _ = x.shape
    return x.view(B, T, parts, H, D).permute(2, 0, 3, 1, 4).reshape(parts, B * H, T, D).unbind(0)


def feed_forward(weights, name, x):
    """vit.FeedForward with weights called `name` + ..."""
    y = layer_norm(weights, name + "norm.", x)
    y = F.gelu(F.linear(y, weights[name + "linear1.weight"], weights[name + "linear1.bias"]))
    return x + F.linear(y, weights[name + "linear2.weight"], weights[name + "linear2.bias"])


def layer_norm(weights, name, x):
    return F.layer_norm(x, x.shape[-1:], weights[name + "weight"], weights[name + "bias"])
