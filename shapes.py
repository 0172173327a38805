"""The dataset `shapes`: images of ten kinds of objects, generated from a seed, with their masks.

It stands in for CIFAR-10 where there is no network. Position, size, rotation and colors of an
object are independent of its class, so only its outline and texture tell the class.
"""

import math

import torch
from torch import hypot, maximum, minimum

SHAPE_NAMES = (
    "checkered", "crescent", "cross", "disc", "frame",
    "ring", "square", "star", "striped", "triangle",
)  # fmt: skip


def generate_shapes(count, image_size, seed):
    """Return images uint8 (N, 3, S, S), labels int64 (N,) and masks bool (N, S, S).

    N is `count`, S is `image_size`. A mask marks the object. Classes have equal numbers up to one.
    The same arguments give the same images on the same kind of processor: others round a few values
    the other way.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(SHAPE_NAMES)
    labels = labels[torch.randperm(count, generator=generator)]
    images = torch.empty(count, 3, image_size, image_size, dtype=torch.uint8)
    masks = torch.empty(count, image_size, image_size, dtype=torch.bool)
    for label, name in enumerate(SHAPE_NAMES):
        indices = (labels == label).nonzero()[:, 0]
        for part in indices.split(1000):  # so many fit into a processor's cache
            images[part], masks[part] = draw_class(name, len(part), image_size, generator)
    return images, labels, masks


def draw_class(name, count, image_size, generator):
    """Return `count` images of one class and their masks."""

    def uniform(low, high, *shape):
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    # Place each object: (u, v) are coordinates right and down in its own frame, in which its
    # radius is 1.
    grid = torch.arange(image_size) - (image_size - 1) / 2
    radius = uniform(6, 13, 1, 1)
    max_offset = (image_size / 2 - radius).clamp(min=0) + 1  # of the center
    down = grid.view(1, -1, 1) - uniform(-1, 1, 1, 1) * max_offset  # (N, S, 1)
    right = grid.view(1, 1, -1) - uniform(-1, 1, 1, 1) * max_offset  # (N, 1, S)
    angle = uniform(0, 2 * math.pi, 1, 1)
    u = (angle.cos() * right + angle.sin() * down) / radius  # (N, S, S)
    v = (angle.cos() * down - angle.sin() * right) / radius
    coverage = (distance_to_outline(name, u, v) * radius + 0.5).clamp(0, 1)  # of each pixel

    # Draw three colors. Steps of 0.3 to 0.35 around the circle [0, 1) keep any two of them apart.
    background = uniform(0, 1, 3, 1, 1)
    signs = torch.randint(0, 2, (count, 3, 1, 1), generator=generator) * 2 - 1
    lengths = torch.rand(2, count, 3, 1, 1, generator=generator) * 0.05 + 0.3
    first_color = torch.remainder(background + signs * lengths[0], 1)
    second_color = torch.remainder(first_color + signs * lengths[1], 1)

    # Mix two of them inside the object: as a texture, or as shading, so that two colors alone
    # do not tell a texture.
    if name in ("striped", "checkered"):
        frequency = uniform(3, 5, 1, 1) * math.pi / 2
        wave = (frequency * u).sin()
        if name == "checkered":
            wave = wave * (frequency * v).sin()
        blend = (wave * 4 + 0.5).clamp(0, 1).unsqueeze(1)  # (N, 1, S, S)
    else:
        blend = uniform(0, 0.35, 1, 1, 1) * (u.unsqueeze(1).clamp(-1, 1) + 1) / 2
    inside = torch.lerp(first_color, second_color, blend)  # (N, 3, S, S)

    # Lay soft waves of any direction over the background.
    direction = uniform(0, 2 * math.pi, 1, 1)
    across = direction.cos() * grid.view(1, -1, 1) + direction.sin() * grid.view(1, 1, -1)
    waves = (across * uniform(0.05, 0.9, 1, 1) + uniform(0, 2 * math.pi, 1, 1)).sin()
    outside = background + uniform(0, 0.2, 3, 1, 1) * waves.unsqueeze(1)

    # Put the object on it, and noise over both.
    images = torch.lerp(outside, inside, coverage.unsqueeze(1))
    images += torch.randn(images.shape, generator=generator) * uniform(0.02, 0.14, 1, 1, 1)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), coverage > 0.5


def distance_to_outline(name, u, v):
    """Return about the distance of points to the outline in units of the radius, positive inside.

    u and v are the coordinates of the points, in the object's own frame.
    """
    from_center = hypot(u, v)
    disc = 1 - from_center
    square = 0.85 - maximum(u.abs(), v.abs())
    if name in ("disc", "striped"):
        return disc
    if name in ("square", "checkered"):
        return square
    if name == "ring":
        return minimum(disc, from_center - 0.6)
    if name == "frame":
        return minimum(square, 0.35 - square)
    if name == "crescent":
        return minimum(disc, hypot(u - 0.55, v) - 0.8)
    if name == "cross":
        return minimum(0.35 - minimum(u.abs(), v.abs()), 1 - maximum(u.abs(), v.abs()))
    if name == "triangle":
        return minimum(v + 0.5, (1 - v - math.sqrt(3) * u.abs()) / 2)
    # A star: five points, radius 1, with notches at about 0.4 between them.
    sector = 2 * math.pi / 5
    angle = torch.remainder(torch.atan2(u, v) + sector / 2, sector) - sector / 2
    along = from_center * angle.cos()
    across = (from_center * angle.sin()).abs()
    return (1 - along - across * 2.3) * 0.4
