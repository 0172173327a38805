"""The figures that the scripts save as PNG. Nothing here needs a display or pyplot."""

import math
import warnings

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cli import atomic_write, printable

# Distinct for the color-blind, with line styles; Okabe & Ito 2008, "Color universal design".
COLORS = BLACK, VERMILION, BLUE, GREEN, PURPLE = "black", "#D55E00", "#0072B2", "#009E73", "#CC79A7"
LINE_STYLES = ("--", "-", ":", "-.", (0, (8, 3)))
LOSS_LABEL, ACCURACY_LABEL = "cross entropy (nats)", "accuracy (%)"
SPLITS = {"train": "train", "test": "test", "val": "held-out"}
# A decorator. Class names may hold dollar signs, which are no formulas.
styled = rc_context({
    "text.parse_math": False, "font.size": 9, "axes.titlesize": 9, "figure.titlesize": 10,
    "lines.linewidth": 1.2, "lines.markersize": 4, "legend.frameon": False, "grid.alpha": 0.25,
})  # fmt: skip


def truncate(text, width):
    """Printable text in lines of at most `width` characters, longer ones with an ellipsis."""
    lines = [printable(line) for line in text.split("\n")]
    return "\n".join(line if len(line) <= width else line[: width - 1] + "…" for line in lines)


def new_figure(width, height, title, *args, **kwargs):
    """A figure of width x height inches, and its subplots(*args, **kwargs)."""
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    fig.suptitle(truncate(title, int(10 * width)))
    return fig, fig.subplots(*args, **kwargs)


@styled
def save_figure(fig, path):
    """Write a figure as PNG; raises RunError for a file that cannot be written."""
    dpi = min(120, 65_000 / max(fig.get_size_inches()))  # Agg draws at most 2^16 pixels a side
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that the font lacks are drawn as boxes
        fig.savefig(temporary, dpi=dpi, format="png")


def show_image(ax, image, title=""):
    """One uint8 (3, S, S) image without ticks; `title` is cut to its width."""
    ax.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    inches = ax.get_position().width * ax.figure.get_size_inches()[0]
    ax.set_title(truncate(title, int(19 * inches)))


@styled
def sample_grid(rows, names, row_labels, title):
    """A grid of images: each of `rows` is uint8 (n, 3, S, S), `names` head the n columns."""
    n, N = len(rows), len(names)
    fig, axes = new_figure(1 + N, 0.6 + 1.05 * n, title, n, N, squeeze=False)
    for i, (images, label) in enumerate(zip(rows, row_labels)):
        axes[i, 0].set_ylabel(truncate(label, 12))
        for ax, image, name in zip(axes[i], images, names):
            show_image(ax, image, "" if i else name)
    return fig


@styled
def training_curves(history, schedule, steps_per_epoch, title, split="test"):
    """Loss, accuracy, lr and momentum of a run.

    `history` has a dict an epoch with epoch, train_loss, train_accuracy and, for split "test" or
    "val", {split}_loss and {split}_accuracy; `schedule` is a OneCycle.
    """
    fig, axes = new_figure(10, 6.5, title, 2, 2)
    epochs = [row["epoch"] for row in history]
    for ax, key in zip(axes[0], ("loss", "accuracy")):
        for name, color, style in (("train", BLUE, "o--"), (split, VERMILION, "o-")):
            values = [row[f"{name}_{key}"] for row in history]
            label = f"{SPLITS[name]}: {values[-1]:.4g} at the end"
            ax.plot(epochs, values, style, color=color, label=label)
        ax.legend()
    steps, length = range(schedule.total_steps), schedule.total_steps / steps_per_epoch
    for ax, values in zip(axes[1], zip(*map(schedule, steps))):
        ax.plot([step / steps_per_epoch for step in steps], values, color=BLACK)
    for ax, label in zip(axes.flat, (LOSS_LABEL, ACCURACY_LABEL, "lr", "momentum")):
        ax.set(xlabel="epoch", ylabel=label, xlim=(-0.03 * length, 1.03 * length))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid()
    return fig


@styled
def confusion_matrix(matrix, class_names, title):
    """A confusion matrix (K, K; rows actual, columns predicted), colored by fraction of the row.

    Up to 20 classes show their counts; above 100, some ticks are left out.
    """
    K, small = len(class_names), len(class_names) <= 20
    side = min(max(6.5, 0.26 * K), 20)
    fig, ax = new_figure(side + 1, side, title)
    fraction = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    image = ax.imshow(fraction.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    fig.colorbar(image, label="fraction of the actual class", shrink=0.8)
    ticks = range(0, K, -(-K // 100))
    names = [truncate(class_names[i], 20) for i in ticks]
    ax.set_xticks(ticks, names, rotation=45 if small else 90, ha="right" if small else "center")
    ax.set_yticks(ticks, names)
    ax.tick_params(labelsize=9 if small else 6)
    ax.set(xlabel="predicted", ylabel="actual")
    for i, j in ((i, j) for i in range(K * small) for j in range(K)):
        color = "white" if fraction[i, j] > 0.5 else "black"
        ax.text(j, i, f"{matrix[i, j]}", ha="center", va="center", fontsize=8, color=color)
    return fig


@styled
def image_grid(images, captions, title):
    """uint8 images (n, 3, S, S), five a row, each under its caption."""
    rows = -(-len(captions) // 5)
    fig, axes = new_figure(7.5, 0.5 + 1.9 * rows, title, rows, 5, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, image, caption in zip(axes.flat, images, captions):
        show_image(ax, image, caption)
    return fig


@styled
@rc_context({"axes.titlesize": 10, "font.size": 10})  # to be read where the figure is a column wide
def heat_maps(images, titles, maps, captions, target_names, title):
    """Images uint8 (n, 3, S, S), each beside M saliency maps (n, M, S, S; [0, 1]) laid over it.

    The maps of an image have one scale: the larger value is the stronger evidence.

    `titles` name the n images, `target_names` the M maps, `captions` are n lists of M.
    """
    n, M = maps.shape[:2]
    across = 2 if M < 3 and n > 1 else 1  # images a row
    ratios = (([1] * (1 + M) + [0.1]) * across)[:-1]  # a narrow empty column between two images
    width, rows = 7.5, -(-n // across)
    height, grid = 1.1 + rows * (width / sum(ratios) + 0.45), (rows, len(ratios))
    fig, axes = new_figure(width, height, title, *grid, squeeze=False, width_ratios=ratios)
    for ax in axes.flat:
        ax.set_axis_off()
    # Of even lightness steps, also for the color-blind; cividis is as gray as the images.
    options = {"cmap": "viridis", "vmin": 0, "vmax": 1, "interpolation": "bilinear"}
    for i in range(n):
        ax, *map_axes = axes[i // across, i % across * (2 + M) :][: 1 + M]
        show_image(ax, images[i], titles[i])
        gray = images[i].float().mean(0, keepdim=True).expand(3, -1, -1).byte()
        for ax, saliency, name, caption in zip(map_axes, maps[i], target_names, captions[i]):
            show_image(ax, gray, f"{name}\n{caption}")
            saliency = saliency.cpu().numpy()  # where it is 0 the image is seen
            ax.imshow(saliency, alpha=0.9 * saliency**0.5, **options)
    fig.colorbar(
        ScalarMappable(cmap="viridis"), ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.02,
        ticks=[0, 0.5, 1], label="saliency, relative to the maximum of an image's maps",
    )  # fmt: skip
    return fig


@styled
def lr_range(history, suggestions, mode, title, runs=(), fits=None, found=None):
    """Loss over the lrs of a sweep with its suggestions; below, the short runs or the accuracy.

    `history` has a dict an lr with lr, loss, smoothed_loss and train_accuracy;
    `suggestions` maps names to (lr or None, reason). `runs` has a dict a run with lr, epochs and
    val_loss, `fits` maps epochs to their Minimum, and `found` is the Minimum recommended.
    """
    fig, (top, bottom) = new_figure(9, 7, title, 2, 1)
    curves = [(top, "loss", "loss at each lr"), (top, "smoothed_loss", "smoothed loss")]
    curves += [(bottom, "train_accuracy", "train")] * (not runs)
    for (ax, key, label), color in zip(curves, ("#9CC9E5", BLUE, BLUE)):
        lrs, values = zip(*((row["lr"], row[key]) for row in history))
        ax.plot(lrs, values, color=color, label=label)
    losses = [row["loss"] for row in history]
    low, span = min(losses), losses[0] - min(losses)
    if span > 0:  # a diverging loss leaves the figure
        top.set_ylim(low - 0.1 * span, low + 1.6 * span)
    for (name, suggestion), color, style in zip(
        suggestions.items(), COLORS[1:], LINE_STYLES[:1] + LINE_STYLES[2:]
    ):
        if suggestion.lr is not None:
            label = f"{name}: {suggestion.lr:.4g}"
            top.axvline(suggestion.lr, label=label, color=color, ls=style)
    if runs:
        short_runs(bottom, runs, fits or {})
    for ax in (top, bottom) if found else ():
        label = f"recommended: {found.lr:.4g} ({found.low:.2g} to {found.high:.2g})"
        ax.axvline(found.lr, label=label, color=BLACK, linewidth=2.5)
        ax.axvspan(found.low, min(found.high, 10 * found.lr), color=BLACK, alpha=0.1, linewidth=0)
    for ax, is_log in ((top, mode == "exp"), (bottom, runs or mode == "exp")):
        if is_log:
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter("{x:g}")  # the default is a formula
            ax.xaxis.set_minor_formatter("")
        ax.set(xlabel=f"lr, {'logarithmic' if is_log else 'linear'}", ylabel=LOSS_LABEL)
        ax.legend()
        ax.grid()
    bottom.set_ylabel(f"held-out {LOSS_LABEL}" if runs else ACCURACY_LABEL)
    return fig


def short_runs(ax, runs, fits):
    """Held-out loss over lr of runs of each length, with the parabola and minimum of each."""
    finite = [run["val_loss"] for run in runs if math.isfinite(run["val_loss"])]
    for length, color in zip(sorted({run["epochs"] for run in runs}), (BLUE, VERMILION)):
        points = sorted((run["lr"], run["val_loss"]) for run in runs if run["epochs"] == length)
        fit = fits.get(length)
        label = f"{length} epoch{'s' * (length > 1)}" + (f": minimum {fit.lr:.4g}" if fit else "")
        ax.plot(*zip(*points), "o", color=color, label=label)
        if fit and fit.parabola:
            lrs = [fit.lr * 2 ** (k / 20) for k in range(-40, 41)]
            a, b, c = fit.parabola
            losses = [(a * x + b) * x + c for x in map(math.log2, lrs)]
            ax.plot(lrs, losses, color=color)
            ax.plot(fit.lr, min(losses), "x", color=color, markersize=9)
    if finite:  # a run that learned nothing leaves the figure
        low, span = min(finite), sorted(finite)[len(finite) // 2] - min(finite)
        ax.set_ylim(low - 0.3 * span, low + 4 * span)
