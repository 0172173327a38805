"""Measures of how far a saliency map can be believed, whatever method made it.

Insertion and deletion: Petsiuk et al. 2018, arXiv:1806.07421. Pointing game: Zhang et al. 2016,
arXiv:1608.00507. Energy-based pointing game: Wang et al. 2020, arXiv:1910.01279.
"""

import torch

from cli import markdown_table

STEPS = 32  # of insertion and deletion: 32 pixels a step
BLUR_STD = 4.0  # pixels, of the Gaussian blur that insertion starts from
MEASURES = {
    "insertion": "insertion AUC (high is good)",
    "deletion": "deletion AUC (low is good)",
    "pointing": "pointing game (high is good)",
    "inside": "energy inside the object (high is good)",
}


def evaluate(saliency, images, masks, score, generator):
    """{measure: (B,)} of maps (B, S, S) of normalized images (B, 3, S, S).

    `score` maps such images to the probability (B,) of the class that the maps explain. Insertion
    and deletion are its mean while pixels are put into the blurred image, or replaced by the mean
    of the data (0), in the order of saliency. `masks`, bool (B, S, S) or None, mark the object.
    """
    index = torch.arange(images.shape[-1], device=images.device)
    blur = (-((index[:, None] - index) ** 2) / (2 * BLUR_STD**2)).softmax(1)  # rows of sum 1
    blurred, mean = blur @ images @ blur.T, torch.zeros_like(images)
    results = {}
    for name, start, end in (("insertion", blurred, images), ("deletion", images, mean)):
        results[name] = auc(perturbation_curve(score, start, end, saliency, generator))
    if masks is not None:
        results["pointing"] = pointing_game(saliency, masks)
        results["inside"] = energy_pointing_game(saliency, masks)
    return results


def perturbation_curve(score, start, end, saliency, generator):
    """`score` while pixels of `start` are replaced by those of `end`: (B, STEPS + 1).

    start and end are (B, 3, S, S). The most salient pixels are first; ties are in random order.
    """
    B, S, _ = saliency.shape
    shuffle = torch.rand(B, S * S, generator=generator).argsort(1).to(saliency.device)
    ranking = saliency.flatten(1).gather(1, shuffle).argsort(dim=1, descending=True, stable=True)
    order = shuffle.gather(1, ranking)  # (B, S S), pixels by descending saliency
    rank = order.argsort(1).view(B, 1, S, S)  # the inverse permutation
    cuts = [S * S * step // STEPS for step in range(STEPS + 1)]
    return torch.stack([score(torch.where(rank < cut, end, start)) for cut in cuts], dim=1)


def auc(curves):
    """Area under curves (B, n) over [0, 1] by the trapezoidal rule: (B,)."""
    return (curves[:, 1:] + curves[:, :-1]).mean(1) / 2


def pointing_game(saliency, masks):
    """Whether the maximum of each map lies in its mask, (B,); of several maxima, the fraction.

    The tolerance of the paper is left out. A map of zeros points everywhere.
    """
    maxima = saliency == saliency.amax((1, 2), keepdim=True)
    return (maxima & masks).sum((1, 2)) / maxima.sum((1, 2))


def energy_pointing_game(saliency, masks):
    """Fraction of the sum of each map that lies in its mask, (B,); a map of zeros is uniform."""
    saliency = torch.where(saliency.amax((1, 2), keepdim=True) > 0, saliency, 1)
    return (saliency * masks).sum((1, 2)) / saliency.sum((1, 2))


def summarize(results, **metadata):
    """A dict for each map of {map: {measure: (N,)}}: metadata, then means and standard errors."""
    rows = [{**metadata, "map": name} for name in results]
    for row, measures in zip(rows, results.values()):
        for name, values in measures.items():
            row[name] = values.double().mean().item()
            row[f"{name}_se"] = values.double().std().item() / len(values) ** 0.5
    return rows


def table(rows):
    """Rows of `summarize` as a Markdown table, mean +- standard error."""
    names = [name for name in MEASURES if name in rows[0]]
    cells = lambda row: (f"{row[k]:.3f} +- {row[f'{k}_se']:.3f}" for k in names)
    lines = [[row["map"], *cells(row)] for row in rows]
    return markdown_table(["map", *(MEASURES[name] for name in names)], lines)
