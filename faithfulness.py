"""Measures of how far a saliency map can be believed, whatever method made it.

Insertion and deletion: Petsiuk et al. 2018, arXiv:1806.07421, with two replacements, since the
replacement can pick the winner, arXiv:2512.11433. ROAD: Rong et al. 2022, arXiv:2202.00449.
Pointing game: Zhang et al. 2016, arXiv:1608.00507. Energy-based pointing game: Wang et al. 2020,
arXiv:1910.01279. Randomization (MPRT): Adebayo et al. 2018, arXiv:1810.03292; sMPRT and eMPRT:
Hedstrom et al. 2024, arXiv:2401.06465.
"""

import copy

import torch
import torch.nn.functional as F

from cli import markdown_table

STEPS = 16  # of insertion and deletion: 64 pixels a step
BLUR_STD = 4.0  # pixels, of the Gaussian blur that replaces pixels
ROAD_FRACTIONS = (0.1, 0.2, 0.3, 0.4)  # of the pixels, removed
ROAD_NOISE = 0.01  # std, in units of normalized images
SMPRT_NOISE, SMPRT_SAMPLES = 0.2, 2  # std in units of normalized images, noisy copies
ENTROPY_BINS = 64
MIN_ENTROPY = 1.0  # nats, that a rise is relative to: the entropy of few salient pixels is near 0
NUM_SCORES = 4 * (STEPS + 1) + len(ROAD_FRACTIONS)  # calls of `score` by `evaluate`
LOW_IS_GOOD = ("deletion", "deletion_blur", "road", "mprt", "smprt")


def blur(images, std):
    """Gaussian blur of (..., H, W) by `std` pixels; nothing comes from outside the image."""
    kernels = []
    for size in images.shape[-2:]:
        index = torch.arange(size, device=images.device)
        kernels.append((-((index[:, None] - index) ** 2) / (2 * std**2)).softmax(1))
    return kernels[0] @ images @ kernels[1].T


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
    sobel = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]]).to(images)
    gray = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    slopes = F.conv2d(gray, torch.stack([sobel, sobel.T])[:, None])  # (B, 2, S, S)
    cells = torch.rand(B, 1, S // 2, S // 2, generator=generator).to(images.device)
    return {
        "random pixels": torch.rand(B, S, S, generator=generator).to(images.device),
        "random grid": normalize_map(F.interpolate(cells, (S, S), mode="bilinear")[:, 0]),
        "center": normalize_map((bell[:, None] * bell).expand(B, S, S)),
        "edges": normalize_map(slopes.norm(dim=1)),
    }


def evaluate(saliency, images, masks, score, generator):
    """{measure: (B,)} of maps (B, S, S) of normalized images (B, 3, S, S).

    `score` maps such images to the probability (B,) of the class that the maps explain. Insertion
    and deletion are its mean while pixels are put into the blurred image or the mean of the data
    (0), or replaced by them, in the order of saliency. `masks`, bool (B, S, S) or None, mark the
    object; it is off center where it covers none of the central pixels, at which a blob points.
    """
    blurred, mean = blur(images, BLUR_STD), torch.zeros_like(images)
    replaced = {"insertion": (blurred, images), "insertion_mean": (mean, images)}
    replaced |= {"deletion": (images, mean), "deletion_blur": (images, blurred)}
    results = {}
    for name, ends in replaced.items():
        results[name] = auc(perturbation_curve(score, *ends, saliency, generator))
    results["road"] = road(score, images, saliency, generator)
    if masks is not None:
        results["pointing"] = pointing_game(saliency, masks)
        results["inside"] = energy_pointing_game(saliency, masks)
        middle = slice((images.shape[-1] - 1) // 2, images.shape[-1] // 2 + 1)
        off_center = ~masks[:, middle, middle].any((1, 2))
        results |= {f"{k}_off_center": results[k][off_center] for k in ("pointing", "inside")}
    return results


def pixel_ranks(saliency, generator):
    """Rank of each pixel (B, 1, S, S), 0 for the most salient; ties are in random order."""
    B, S, _ = saliency.shape
    shuffle = torch.rand(B, S * S, generator=generator).argsort(1).to(saliency.device)
    ranking = saliency.flatten(1).gather(1, shuffle).argsort(dim=1, descending=True, stable=True)
    order = shuffle.gather(1, ranking)  # (B, S S), pixels by descending saliency
    return order.argsort(1).view(B, 1, S, S)  # the inverse permutation


def perturbation_curve(score, start, end, saliency, generator):
    """`score` while pixels of `start` are replaced by those of `end`: (B, STEPS + 1).

    start and end are (B, 3, S, S). The most salient pixels are first.
    """
    rank, pixels = pixel_ranks(saliency, generator), saliency[0].numel()
    cuts = [pixels * step // STEPS for step in range(STEPS + 1)]
    return torch.stack([score(torch.where(rank < cut, end, start)) for cut in cuts], dim=1)


def auc(curves):
    """Area under curves (B, n) over [0, 1] by the trapezoidal rule: (B,)."""
    return (curves[:, 1:] + curves[:, :-1]).mean(1) / 2


def road(score, images, saliency, generator):
    """Mean `score` (B,) while the most salient pixels are imputed from those around them.

    A pixel alone is restored from its neighbors, a region is not: ROAD favors blurred maps.
    """
    rank, scores = pixel_ranks(saliency, generator), []
    for fraction in ROAD_FRACTIONS:
        removed = rank < int(fraction * saliency[0].numel())
        parts = [impute(*part) for part in zip(images.split(100), removed.split(100))]  # memory
        noise = ROAD_NOISE * torch.randn(images.shape, generator=generator).to(images.device)
        scores.append(score(torch.where(removed, torch.cat(parts) + noise, images)))
    return torch.stack(scores).mean(0)


def impute(images, removed):
    """Images (B, 3, S, S) whose removed pixels are means of their eight neighbors.

    `removed`, bool (B, 1, S, S), has as many pixels in every image. Neighbors may be removed too,
    hence the linear system. Those on a diagonal have half the weight of the others.
    """
    B, C, S, _ = images.shape
    index = torch.arange(S, device=images.device)
    near = ((index[:, None] - index).abs() <= 1) * (1 - 0.5 * (index[:, None] != index))  # (S, S)
    weights = torch.kron(near, near)  # (S S, S S)
    laplacian = weights.sum(1).diag() - weights
    index = removed.flatten(1).nonzero()[:, 1].view(B, -1)  # (B, k)
    known = torch.where(removed, 0, images).flatten(2).transpose(1, 2)  # (B, S S, C)
    right = (weights @ known).gather(1, index[:, :, None].expand(-1, -1, C))  # (B, k, C)
    left = laplacian[index[:, :, None], index[:, None, :]]  # (B, k, k)
    values = torch.cholesky_solve(right, torch.linalg.cholesky(left))
    flat = images.flatten(2).scatter(2, index[:, None].expand(-1, C, -1), values.transpose(1, 2))
    return flat.view_as(images)


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


def randomization(explain, model, images, generator):
    """{measure: (B,)} of how the maps `explain(model, images)` (B, S, S) depend on the weights.

    The values of every parameter are permuted. mprt is the rank correlation of maps before and
    after, smprt that of maps averaged over noisy images, emprt the relative rise of the entropy of
    a map's histogram: a network that has learned nothing has nothing to point at.
    """
    permuted = copy.deepcopy(model)
    for p in permuted.parameters():
        p.data = p.data.flatten()[torch.randperm(p.numel(), generator=generator)].view_as(p)
    noise = SMPRT_NOISE * torch.randn(SMPRT_SAMPLES, *images.shape, generator=generator)
    maps = [explain(m, images) for m in (model, permuted)]
    smooth = [sum(explain(m, x) for x in images + noise.to(images)) for m in (model, permuted)]
    rise = (entropy(maps[1]) - entropy(maps[0])) / entropy(maps[0]).clamp(min=MIN_ENTROPY)
    return {"mprt": rank_correlation(*maps), "smprt": rank_correlation(*smooth), "emprt": rise}


def rank_correlation(a, b):
    """Spearman's correlation (B,) of maps (B, S, S); 0 for a constant one."""
    centered = []
    for values in (a.flatten(1).contiguous(), b.flatten(1).contiguous()):
        ordered = values.sort(1).values
        low, high = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
        rank = (low + high).double()  # twice the mean rank of ties
        centered.append(rank - rank.mean(1, keepdim=True))
    return torch.cosine_similarity(*centered)


def entropy(maps):
    """Entropy (B,) in nats of the histogram of each map's values."""
    bins = (normalize_map(maps).flatten(1) * (ENTROPY_BINS - 1)).round().long()
    share = F.one_hot(bins, ENTROPY_BINS).double().mean(1)  # (B, bins)
    return -torch.xlogy(share, share).sum(1)


def summarize(results, **metadata):
    """A dict for each map of {map: {measure: (N,)}}: metadata, then means and standard errors."""
    rows = [{**metadata, "map": name} for name in results]
    names = list(dict.fromkeys(name for measures in results.values() for name in measures))
    for row, measures in zip(rows, results.values()):
        for name in names:
            values = measures.get(name, torch.tensor([])).double()
            row[name] = values.mean().item() if name in measures else ""
            row[f"{name}_se"] = values.std().item() / len(values) ** 0.5 if len(values) > 1 else ""
    return rows


def table(rows):
    """Rows of `summarize` as a Markdown table, mean +- standard error; + marks high as good."""
    names = [name[:-3] for name in rows[0] if name.endswith("_se")]
    labels = [f"{name.replace('_', ' ')} {'-' if name in LOW_IS_GOOD else '+'}" for name in names]
    cell = lambda row, k: "" if row[k] == "" else f"{row[k]:.3f} +- {row[f'{k}_se'] or 0:.3f}"
    lines = [[row["map"], *(cell(row, k) for k in names)] for row in rows]
    return markdown_table(["map", *labels], lines)
