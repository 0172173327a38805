"""The stem as two matrix products, which are faster on a CPU than its convolutions.

A 2x2 patch of conv2 sees 4x4 pixels of the image. With these 48 values in a row, conv1 at the four
pixels of the patch is one (48, 128) matrix, and conv2 is a (128, 32) matrix. Only 27 of the 48
weights in a column of the first are nonzero: a dense product is still cheaper than a convolution
of 3 channels. It needs no Triton.
"""

import torch
import torch.nn.functional as F
from torch import nn


class MatmulStem(nn.Module):
    """A vit.Stem computed as matrix products, (B, 3, 32, 32) -> (B, 32, 64).

    It shares the parameters of `stem`, under the same names and in the same order. Results differ
    from the stem's by rounding alone.
    """

    def __init__(self, stem):
        super().__init__()
        self.conv1 = stem.conv1
        self.conv2 = stem.conv2
        self.gelu2 = stem.gelu2
        self.proj = stem.proj

    def forward(self, images):
        # What every patch sees, as the channels of a 16x16 map.
        patches = self.gather_patches(images)  # (B, 3, 32, 32) -> (B, 48, 16, 16)

        # conv1 and its GELU. Elementwise operations are fastest when the order of dimensions is
        # the order in memory, which has the channels last here.
        weight, bias = self.conv1_matrix()
        maps = F.conv2d(patches, weight, bias)  # (B, 48, 16, 16) -> (B, 128, 16, 16)
        maps = F.gelu(maps.permute(0, 2, 3, 1))
        maps = maps.permute(0, 3, 1, 2)

        # conv2 and its GELU.
        weight = self.conv2.weight.permute(0, 2, 3, 1)  # (32, 2, 2, 32)
        weight = weight.flatten(1)[:, :, None, None]  # (32, 128, 1, 1)
        maps = F.conv2d(maps, weight, self.conv2.bias)  # (B, 128, 16, 16) -> (B, 32, 16, 16)
        maps = self.gelu2(maps.contiguous())
        return self.proj(maps.flatten(2))  # (B, 32, 256) -> (B, 32, 64)

    def gather_patches(self, images):
        """Return the pixels that each patch sees, (B, 3, 32, 32) -> (B, 48, 16, 16)."""
        B, c, S, _ = images.shape
        p = self.conv2.stride[0]
        window = p + 2  # pixels that a patch sees along one axis
        side = S // p  # patches along one axis
        padded = F.pad(images, (1, 1, 1, 1))
        padded = padded.permute(0, 2, 3, 1)  # (B, 34, 34, 3)
        padded = padded.reshape(B, S + 2, (S + 2) * c)  # rows of pixels are contiguous
        patches = padded.unfold(1, window, p)
        patches = patches.unfold(2, window * c, p * c)  # (B, 16, 16, 4, 12)
        patches = patches.reshape(B, side, side, window * window * c)
        return patches.permute(0, 3, 1, 2)

    def conv1_matrix(self):
        """Return conv1 at the four pixels of a patch: weight (128, 48, 1, 1) and bias (128,)."""
        p = self.conv2.stride[0]
        weight = self.conv1.weight  # (32, 3, 3, 3)
        copies = []  # at each pixel of the patch, the 3x3 window lies elsewhere in the 4x4 pixels
        for y in range(p):
            for x in range(p):
                copies.append(F.pad(weight, (x, p - 1 - x, y, p - 1 - y)))
        weight = torch.cat(copies)  # (128, 3, 4, 4)
        weight = weight.permute(0, 2, 3, 1)
        weight = weight.flatten(1)[:, :, None, None]
        return weight, self.conv1.bias.repeat(p * p)
