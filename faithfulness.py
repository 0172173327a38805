"""How far to believe a heat map: measures that know nothing of how it was made.

Insertion and deletion are Petsiuk et al. 2018, arXiv:1806.07421; the pointing game is Zhang et al. 2016, arXiv:1608.00507.
"""

import torch

from files import markdown

STEPS = 32  # of insertion and deletion: 32 pixels a step
BLUR = 4.0  # pixels, the deviation of the Gaussian where insertion starts
MEASURES = {"insertion": "insertion AUC ↑", "deletion": "deletion AUC ↓", "pointing": "pointing game ↑", "inside": "heat inside the object ↑"}


def measure(heat, images, masks, score, generator):
    """{measure: (B,)} of maps (B, S, S) of normalised pictures (B, 3, S, S); of masks (B, S, S; bool) or None.

    `score` gives pictures' probability (B,) of the class that the maps are of: its mean is taken while pixels are put
    into the blurred picture, or replaced by the data's mean (0), hottest first. Masks say where the object is.
    """
    blur = gaussian(images.shape[-1], BLUR).to(images.device)
    measured = {
        "insertion": area(replace_in_order(score, blur @ images @ blur.T, images, heat, generator)),
        "deletion": area(replace_in_order(score, images, torch.zeros_like(images), heat, generator)),
    }
    return measured if masks is None else {**measured, "pointing": pointing(heat, masks), "inside": heat_inside(heat, masks)}


def replace_in_order(score, start, end, heat, generator):
    """`score` while the pixels of `start` are replaced by those of `end`, hottest first: (B, STEPS + 1).

    start and end are (B, 3, S, S), heat is (B, S, S); `score` takes such pictures and gives (B,). Equally hot pixels
    come in random order.
    """
    B, S, _ = heat.shape
    shuffled = torch.rand(B, S * S, generator=generator).argsort(1).to(heat.device)
    order = shuffled.gather(1, heat.flatten(1).gather(1, shuffled).argsort(dim=1, descending=True, stable=True))
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(S * S, device=heat.device).expand(B, -1)).view(B, 1, S, S)
    return torch.stack([score(torch.where(rank < S * S * step // STEPS, end, start)) for step in range(STEPS + 1)], dim=1)


def area(curves):
    """Area under curves (B, n) over [0, 1], by trapezoids: (B,)."""
    return (curves[:, 1:] + curves[:, :-1]).mean(1) / 2


def pointing(heat, masks):
    """Whether the hottest pixel of each map (B, S, S) lies in the object's mask (B, S, S; bool); of equals, the share that does.

    Without the tolerance of the paper's pointing game. A map of zeros points everywhere.
    """
    hottest = heat == heat.amax((1, 2), keepdim=True)
    return (hottest & masks).sum((1, 2)) / hottest.sum((1, 2))


def heat_inside(heat, masks):
    """Share of each map's heat that lies in the mask, (B,); a map of zeros is everywhere equally warm."""
    heat = torch.where(heat.amax((1, 2), keepdim=True) > 0, heat, 1)
    return (heat * masks).sum((1, 2)) / heat.sum((1, 2))


def gaussian(size, deviation):
    """A bell around the diagonal, float32 (size, size), rows of sum 1."""
    place = torch.arange(size)
    return (-((place[:, None] - place) ** 2) / (2 * deviation**2)).softmax(1)  # divides by the row's sum


def summarise(found, **about):
    """A row for each map that `measure` found: `about`, then every measure's mean and standard error."""
    rows = []
    for name, values in found.items():
        row = {**about, "map": name}
        for measure, value in values.items():
            row |= {measure: value.double().mean().item(), f"{measure}_se": value.double().std().item() / len(value) ** 0.5}
        rows.append(row)
    return rows


def table(rows):
    """Rows of `summarise` as text, mean ± standard error."""
    measures = [name for name in MEASURES if name in rows[0]]
    cells = [[row["map"], *(f"{row[name]:.3f} ± {row[name + '_se']:.3f}" for name in measures)] for row in rows]
    return markdown(["map", *(MEASURES[name] for name in measures)], cells)
