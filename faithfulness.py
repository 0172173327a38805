"""Measures of how far a saliency map can be believed, whatever method made it.

Insertion and deletion: Petsiuk et al. 2018, arXiv:1806.07421, with two replacements, since the
replacement can pick the winner, arXiv:2512.11433. ROAD: Rong et al. 2022, arXiv:2202.00449.
Pointing game: Zhang et al. 2016, arXiv:1608.00507. Energy-based pointing game: Wang et al. 2020,
arXiv:1910.01279. Randomization (MPRT): Adebayo et al. 2018, arXiv:1810.03292; sMPRT and eMPRT:
Hedstrom et al. 2024, arXiv:2401.06465.
"""

import copy
import itertools

import torch
import torch.nn.functional as F

from cli import markdown_table

STEPS = 12  # of insertion and deletion, 85 pixels each
BLUR_STD = 4.0  # pixels, of the Gaussian blur that replaces pixels
ROAD_FRACTIONS = (0.1, 0.2, 0.3, 0.4)  # of the pixels, removed
ROAD_NOISE = 0.01  # std, in units of normalized images
ROAD_TOLERANCE = 1e-3  # of the residual: pixels differ by less than 0.005 from the solution
SMPRT_NOISE, SMPRT_SAMPLES = 0.2, 2  # std in units of normalized images, noisy copies
MIN_ENTROPY = 1.0  # nats, that a rise is relative to: the entropy of few salient pixels is near 0
LOW_IS_GOOD = ("deletion", "deletion_blur", "road", "mprt", "smprt")


def blur(images, std):
    """Gaussian blur of (..., S, S) by `std` pixels; nothing comes from outside the image."""
    index = torch.arange(images.shape[-1], device=images.device)
    kernel = (-((index[:, None] - index) ** 2) / (2 * std**2)).softmax(1)
    return kernel @ images @ kernel.T


def normalize_map(maps):
    """Maps (..., S, S) stretched to [0, 1], each by itself; a constant one becomes 0."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    varies = high - low > 1e-5 * torch.maximum(high.abs(), low.abs())  # more than rounding
    return torch.where(varies, (maps - low) / torch.where(varies, high - low, 1), 0)


def baselines(images, generator):
    """{name: maps (B, S, S)} for images (B, 3, S, S) by methods that do not know the network."""
    B, _, S, _ = images.shape
    index = torch.arange(S, device=images.device) - (S - 1) / 2
    bell = (-((index / (S / 4)) ** 2) / 2).exp()
    cells = torch.rand(B, 1, S // 2, S // 2, generator=generator).to(images.device)
    return {
        "random pixels": torch.rand(B, S, S, generator=generator).to(images.device),
        "random grid": normalize_map(F.interpolate(cells, (S, S), mode="bilinear")[:, 0]),
        "center": normalize_map((bell[:, None] * bell).expand(B, S, S)),
        "edges": normalize_map(torch.hypot(*torch.gradient(images.mean(1), dim=(1, 2)))),
    }


def evaluate(saliency, images, masks, score, generator):
    """{measure: (B,)} of maps (B, S, S) of normalized images (B, 3, S, S).

    `score` maps such images to the probability (B,) of the class explained. Insertion and deletion
    are the area under its curve (midpoint rule) while pixels are put into the blurred image or the
    mean of the data (0), or replaced by them, most salient first; ROAD is its mean while they are
    imputed. `masks`, bool (B, S, S) or None, mark objects; off center, they cover no central pixel.
    """
    rank, pixels = pixel_ranks(saliency, generator), saliency[0].numel()
    blurred, mean = blur(images, BLUR_STD), torch.zeros_like(images)
    replaced = {"insertion": (blurred, images), "insertion_mean": (mean, images)}
    replaced |= {"deletion": (images, mean), "deletion_blur": (images, blurred)}
    cuts = [pixels * (2 * step + 1) // (2 * STEPS) for step in range(STEPS)]
    results = {}
    for name, (start, end) in replaced.items():
        scores = [score(torch.where(rank < cut, end, start)) for cut in cuts]
        results[name] = torch.stack(scores).mean(0)
    scores = []
    for fraction in ROAD_FRACTIONS:
        removed = rank < int(fraction * pixels)
        noise = ROAD_NOISE * torch.randn(images.shape, generator=generator).to(images.device)
        scores.append(score(torch.where(removed, impute(images, removed) + noise, images)))
    results["road"] = torch.stack(scores).mean(0)
    if masks is not None:
        results["pointing"], results["inside"] = pointing_games(saliency, masks)
        middle = slice((images.shape[-1] - 1) // 2, images.shape[-1] // 2 + 1)
        off_center = ~masks[:, middle, middle].any((1, 2))
        results |= {f"{k}_off_center": results[k][off_center] for k in ("pointing", "inside")}
    return results


def pixel_ranks(saliency, generator):
    """Rank of each pixel (B, 1, S, S), 0 for the most salient; ties are in random order."""
    B, S, _ = saliency.shape
    shuffle = torch.rand(B, S * S, generator=generator).argsort(1).to(saliency.device)
    ranking = saliency.flatten(1).gather(1, shuffle).argsort(dim=1, descending=True, stable=True)
    return shuffle.gather(1, ranking).argsort(1).view(B, 1, S, S)  # the inverse permutation


def impute(images, removed):
    """Images (B, C, S, S) whose pixels in `removed`, bool (B, 1, S, S), are means of their eight.

    Those on a diagonal have half the weight. Neighbors may be removed too, hence a linear system,
    solved by conjugate gradients. A region is not restored as a pixel is: ROAD favors blurred maps.
    """
    index = torch.arange(images.shape[-1], device=images.device)
    near = (1 - (index[:, None] - index).abs() / 2).relu()  # (S, S): 1 for itself, then 0.5, 0
    degree = near.sum(1)[:, None] * near.sum(1)  # near @ x @ near sums neighbors, and the pixel
    values, dot = torch.zeros_like(images), lambda a, b: (a * b).sum((2, 3), keepdim=True)
    residual = direction = removed * (near @ (images * ~removed) @ near)
    while residual.abs().max() > ROAD_TOLERANCE:
        square = dot(residual, residual)
        product = removed * (degree * direction - near @ direction @ near)
        step = square / dot(direction, product).clamp(min=1e-20)
        values, residual = values + step * direction, residual - step * product
        direction = residual + dot(residual, residual) / square.clamp(min=1e-20) * direction
    return torch.where(removed, values, images)


def pointing_games(saliency, masks):
    """Fraction of the maxima of each map, mostly 1, and of its sum that lie in its mask: two (B,).

    The tolerance of the paper is left out. A map of zeros is uniform.
    """
    top = saliency.amax((1, 2), keepdim=True)
    pair = saliency == top, torch.where(top > 0, saliency, 1)
    return [(values * masks).sum((1, 2)) / values.sum((1, 2)) for values in pair]


def randomization(explain, model, images, generator):
    """{map: {measure: (B,)}} of how {map: (B, S, S)} of explain(model, images) depend on weights.

    The values of every parameter are permuted. mprt is the rank correlation of maps before and
    after, smprt that of maps averaged over noisy images, emprt the relative rise of the entropy of
    a map's histogram: a network that has learned nothing has nothing to point at.
    """
    permuted = copy.deepcopy(model)
    for p in permuted.parameters():
        p.data = p.data.flatten()[torch.randperm(p.numel(), generator=generator)].view_as(p)
    noise = SMPRT_NOISE * torch.randn(SMPRT_SAMPLES, *images.shape, generator=generator)
    copies = [images, *(images + noise.to(images))]
    pair, results = [[explain(m, x) for x in copies] for m in (model, permuted)], {}
    for name in pair[0][0]:
        (a, *noisy_a), (b, *noisy_b) = ([maps[name] for maps in found] for found in pair)
        results[name] = {"mprt": rank_correlation(a, b)}
        results[name]["smprt"] = rank_correlation(sum(noisy_a), sum(noisy_b))
        results[name]["emprt"] = (entropy(b) - entropy(a)) / entropy(a).clamp(min=MIN_ENTROPY)
    return results


def rank_correlation(a, b):
    """Spearman's correlation (B,) of maps (B, S, S); 0 for a constant one."""
    maps = torch.stack([a, b]).flatten(2)  # (2, B, S S)
    low, high = (torch.searchsorted(maps.sort(2).values, maps, right=r) for r in (False, True))
    ranks = (low + high).double()  # twice the mean rank of ties
    return torch.cosine_similarity(*(ranks - ranks.mean(2, keepdim=True)))


def entropy(maps, bins=64):
    """Entropy (B,) in nats of the histogram of each map's values."""
    index = (normalize_map(maps).flatten(1) * (bins - 1)).round().long()
    share = F.one_hot(index, bins).double().mean(1)  # (B, bins)
    return -torch.xlogy(share, share).sum(1)


def summarize(batches, **metadata):
    """A dict for each map of [{map: {measure: (B,)}}, ...]: metadata, means, standard errors."""
    rows = [{**metadata, "map": name} for name in batches[0]]
    names = dict.fromkeys(k for measures in batches[0].values() for k in measures)
    for row, k in itertools.product(rows, names):
        found = [batch[row["map"]].get(k, torch.tensor([])) for batch in batches]
        values = torch.cat(found).double()
        row[k] = values.mean().item() if len(values) else ""
        row[f"{k}_se"] = values.std().item() / len(values) ** 0.5 if len(values) > 1 else ""
    return rows


def table(rows):
    """Rows of `summarize` as a Markdown table, mean +- standard error; + marks high as good."""
    names = [name[:-3] for name in rows[0] if name.endswith("_se")]
    labels = [f"{name.replace('_', ' ')} {'-' if name in LOW_IS_GOOD else '+'}" for name in names]
    cell = lambda row, k: "" if row[k] == "" else f"{row[k]:.3f} +- {row[f'{k}_se'] or 0:.3f}"
    lines = [[row["map"], *(cell(row, k) for k in names)] for row in rows]
    return markdown_table(["map", *labels], lines)
