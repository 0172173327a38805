"""The network as a CPU runs it fastest: the stem as two 1x1 convolutions, the last block for the CLS token alone.

Same function of the same weights as vit.py, in plain PyTorch, differentiated by autograd; nothing is compiled, so
there is no start-up cost. Three things make it fast:

- A patch of conv2 (2x2) sees 4x4 pixels of the picture. With those 48 numbers side by side, conv1 is one matrix (48, 128)
  that holds its kernel at each of the patch's four pixels, and conv2 one matrix (128, 32) applied to the result: 1x1
  convolutions of wide rows, with nothing moved between them. Almost half of the first matrix is zero (27 of 48 weights
  count); a dense product with zeros is cheaper than a thin one without.
- The head reads the CLS token alone, so the last block computes keys and values for every token but queries, output
  projection and feed-forward for one. What it would make of the other 32 reaches no logit, so it has no gradient either.
- Freed memory is kept (`keep_freed_memory`): glibc hands large blocks back to the system at once, and every step
  would fault tens of megabytes in again, page by page, which costs more than the arithmetic.

Letters: B batch, T tokens (33), C width (64), H heads (4), D head width (16), p patch size (2).
"""

import ctypes
import platform

import torch
import torch.nn.functional as F

from kernels import plain

HUGE_PAGE = 2 << 20
TOP_PAD = 1 << 30


def keep_freed_memory():
    """Tell glibc to keep freed memory for the next allocation, for the rest of the process; False without glibc.

    TOP_PAD bytes of address space are reserved at once, in pages of 2 MB where Linux grants them; they take no
    memory before they are used.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # From mallopt(3): M_MMAP_MAX = -4, how many blocks may be mapped apart; M_TRIM_THRESHOLD = -1, the free bytes at
    # the heap's top above which they go back; M_TOP_PAD = -2, by how much the heap grows. Each call returns 1 if done.
    if not all([libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1), libc.mallopt(-2, TOP_PAD)]):
        return False
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.sbrk(0)
    libc.free(libc.malloc(TOP_PAD // 2))  # more than the heap has free, so that it grows now
    start, end = -(-start // HUGE_PAGE) * HUGE_PAGE, libc.sbrk(0)
    if end > start:
        libc.madvise(start, end - start, 14)  # MADV_HUGEPAGE; a kernel without huge pages says no, and nothing is lost
    return True


def forward(model, images):
    """Logits (B, num_classes) of a `vit.ViT`, computed in the dtype of images."""
    weights = plain.weights(model, images.dtype)
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
    window, side = p + 2, S // p  # pixels that a patch sees, patches, on a side
    padded = F.pad(images, (1, 1, 1, 1)).permute(0, 2, 3, 1).reshape(B, S + 2, (S + 2) * c)  # a line of pixels is contiguous
    patches = padded.unfold(1, window, p).unfold(2, window * c, p * c)  # (B, 16, 16, 4, 4c), overlapping views
    patches = patches.reshape(B, side, side, window * window * c).permute(0, 3, 1, 2)  # (B, 16c, 16, 16), channels last
    kernel = conv1_at_every_pixel(weights["stem.conv1.weight"], p).permute(0, 2, 3, 1).flatten(1)  # (pp * 32, 16c)
    maps = F.conv2d(patches, kernel[:, :, None, None], weights["stem.conv1.bias"].repeat(p * p))  # (B, pp * 32, 16, 16)
    # An elementwise operation is at its fastest where the order of dimensions is that of memory.
    maps = F.gelu(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    kernel = weights["stem.conv2.weight"].permute(0, 2, 3, 1).flatten(1)  # (out, in, p, p) -> (out, pp * in)
    maps = F.conv2d(maps, kernel[:, :, None, None], weights["stem.conv2.bias"])  # (B, pp * 32, 16, 16) -> (B, 32, 16, 16)
    tokens = F.gelu(maps.flatten(2).contiguous())  # (B, 32, 16, 16) -> (B, 32, 256)
    return F.linear(tokens, weights["stem.project.weight"], weights["stem.project.bias"])


def conv1_at_every_pixel(kernel, p):
    """A 3x3 kernel (out, in, 3, 3) at each pixel of a p x p patch: (pp * out, in, p + 2, p + 2), rows first."""
    return torch.cat([F.pad(kernel, (x, p - 1 - x, y, p - 1 - y)) for y in range(p) for x in range(p)])


def attention(module, weights, name, x, cls_only):
    """vit.Attention with weights called `name` + ...: (B, T, C) -> (B, T, C), or (B, 1, C) if `cls_only`."""
    B, T, C = x.shape
    H, D = module.attend.heads, module.attend.dim_head
    y = layer_norm(weights, name + "norm.", x)
    matrix = weights[name + "qkv.weight"]  # (3HD, C)
    matrix = torch.cat([matrix[: H * D] * D**-0.5, matrix[H * D :]])  # scale a few weights, not every query
    if cls_only:
        x, T = x[:, :1], 1
        q = F.linear(y[:, :1], matrix[: H * D]).view(B * H, 1, D)
        k, v = split_heads(F.linear(y, matrix[H * D :]), 2, H, D)
    else:
        q, k, v = split_heads(F.linear(y, matrix), 3, H, D)
    scores = torch.bmm(q, k.transpose(1, 2))  # (BH, T or 1, D) x (BH, D, T) -> (BH, T or 1, T)
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
