"""Ten classes of coloured shapes and textures, drawn from a seed in seconds: data for a machine without a network.

Every picture has one object of random place, size, rotation and colour on a varied background with noise, and a mask
that says which pixels are the object's. Colour and place tell nothing about the class.
"""

import math

import torch

from cifar import SIDE

CHUNK = 1000  # pictures drawn at a time: few enough to stay in a processor's cache


def disc(u, v):
    return 1 - torch.hypot(u, v)


def square(u, v):
    return 0.85 - torch.maximum(u.abs(), v.abs())


def triangle(u, v):
    return torch.minimum(v + 0.5, (1 - v - math.sqrt(3) * u.abs()) / 2)


def cross(u, v):
    u, v = u.abs(), v.abs()
    return torch.minimum(0.35 - torch.minimum(u, v), 1 - torch.maximum(u, v))


def star(u, v):
    """Five points, radius 1, with notches at about 0.4 between them."""
    sector = 2 * math.pi / 5
    angle = torch.remainder(torch.atan2(u, v) + sector / 2, sector) - sector / 2  # from the nearest point's axis
    radius = torch.hypot(u, v)
    along, across = radius * angle.cos(), (radius * angle.sin()).abs()
    return (1 - along - across * 2.3) * 0.4


def crescent(u, v):
    return torch.minimum(disc(u, v), torch.hypot(u - 0.55, v) - 0.8)


# Inside of the outline, in units of the object's radius, as a signed distance (positive inside, to a factor near 1).
OUTLINES = {
    "checkered": square,
    "crescent": crescent,
    "cross": cross,
    "disc": disc,
    "frame": lambda u, v: torch.minimum(square(u, v), -(square(u, v) - 0.35)),
    "ring": lambda u, v: torch.minimum(disc(u, v), torch.hypot(u, v) - 0.6),
    "square": square,
    "star": star,
    "striped": disc,
    "triangle": triangle,
}
CLASS_NAMES = tuple(OUTLINES)


def draw(count, seed):
    """`count` pictures: uint8 (count, 3, 32, 32), int64 labels (count,), bool masks (count, 32, 32), on the CPU.

    Classes are `CLASS_NAMES`, equally often up to one, in random order. The same seed gives the same pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(CLASS_NAMES)
    labels = labels[torch.randperm(count, generator=generator)]
    images = torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8)
    masks = torch.empty(count, SIDE, SIDE, dtype=torch.bool)
    for label, name in enumerate(CLASS_NAMES):
        for places in (labels == label).nonzero()[:, 0].split(CHUNK):
            images[places], masks[places] = draw_class(name, len(places), generator)
    return images, labels, masks


def draw_class(name, count, generator):
    """`count` pictures of one class and their masks."""

    def uniform(low, high, *shape):
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    grid = torch.arange(SIDE) - (SIDE - 1) / 2
    radius = uniform(6, 13, 1, 1)
    room = (SIDE / 2 - radius).clamp(min=0) + 1  # how far the centre may lie from the picture's
    down = grid.view(1, SIDE, 1) - uniform(-1, 1, 1, 1) * room
    right = grid.view(1, 1, SIDE) - uniform(-1, 1, 1, 1) * room
    angle = uniform(0, 2 * math.pi, 1, 1)
    u = (angle.cos() * right + angle.sin() * down) / radius  # (count, S, S)
    v = (angle.cos() * down - angle.sin() * right) / radius
    cover = (OUTLINES[name](u, v) * radius + 0.5).clamp(0, 1)  # share of the pixel that is the object's

    background, ink, second = colours(count, generator)
    if name in ("striped", "checkered"):
        frequency = uniform(3, 5, 1, 1) * math.pi / 2
        wave = (frequency * u).sin() * ((frequency * v).sin() if name == "checkered" else 1)
        blend = (wave * 4 + 0.5).clamp(0, 1).unsqueeze(1)
    else:  # plain objects are shaded from one colour towards another, so that shading alone is no mark of a texture
        blend = uniform(0, 0.35, 1, 1, 1) * (u.unsqueeze(1).clamp(-1, 1) + 1) / 2
    inside = torch.lerp(ink, second, blend)

    turn = uniform(0, 2 * math.pi, 1, 1)
    across = turn.cos() * grid.view(1, SIDE, 1) + turn.sin() * grid.view(1, 1, SIDE)
    waves = (across * uniform(0.05, 0.9, 1, 1) + uniform(0, 2 * math.pi, 1, 1)).sin()
    outside = background + (uniform(0, 0.2, 3, 1, 1) * waves.unsqueeze(1))

    pictures = torch.lerp(outside, inside, cover.unsqueeze(1))
    pictures += torch.randn(pictures.shape, generator=generator) * uniform(0.02, 0.14, 1, 1, 1)
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8), cover > 0.5


def colours(count, generator):
    """Three colours a picture, each (count, 3, 1, 1) in [0, 1]: background, and two that differ from it and each other."""
    background = torch.rand(count, 3, 1, 1, generator=generator)
    # Steps of 0.3 to 0.5 around the circle [0, 1) on every channel, down or up alike, keep any two of the three apart.
    direction = torch.randint(0, 2, (count, 3, 1, 1), generator=generator) * 2 - 1
    step = torch.rand(2, count, 3, 1, 1, generator=generator) * 0.05 + 0.3
    ink = torch.remainder(background + direction * step[0], 1)
    second = torch.remainder(ink + direction * step[1], 1)
    return background, ink, second
