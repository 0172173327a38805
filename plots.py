"""The figures that the scripts save as PNG. Nothing here needs a display or pyplot.

matplotlib is imported by the first figure: that takes half a second, and most scripts begin with
minutes of work.
"""

import functools
import math
import os
import warnings

from cli import atomic_write

# Distinct for the color-blind, with line styles; Okabe & Ito 2008, "Color universal design".
BLACK = "black"
VERMILION = "#D55E00"
BLUE = "#0072B2"
GREEN = "#009E73"
PURPLE = "#CC79A7"
LOSS_LABEL = "cross entropy (nats)"
ACCURACY_LABEL = "accuracy (%)"
STYLE = {
    "text.parse_math": False,  # a dollar sign in the name of a class is no formula
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "legend.frameon": False,
    "grid.alpha": 0.25,
}


def styled(draw):
    """Decorate a function that draws: it finds matplotlib imported, and STYLE set."""

    @functools.wraps(draw)
    def draw_styled(*args, **kwargs):
        matplotlib = import_matplotlib()
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return draw_styled


def import_matplotlib():
    """Import matplotlib with its own defaults, whatever the environment says, and return it.

    A notebook exports a backend of its own, which is an error in an environment that lacks it, and
    so is a damaged file of settings; some settings would turn images upside down.
    """
    settings = {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    import matplotlib

    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    return matplotlib


def truncate(text, width):
    """Return text with its lines cut to at most `width` characters, with an ellipsis."""
    lines = []
    for line in text.split("\n"):
        if len(line) > width:
            line = line[: width - 1] + "…"
        lines.append(line)
    return "\n".join(lines)


def empty_figure(width, height):
    """Return a figure of width x height inches, drawn by Agg, which needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height))
    FigureCanvasAgg(fig)
    return fig


def new_figure(width, height, title, *args, **kwargs):
    """Return a figure of width x height inches, and its subplots(*args, **kwargs)."""
    fig = empty_figure(width, height)
    fig.set_layout_engine("constrained")
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
    """Draw one uint8 (3, S, S) image without ticks."""
    ax.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    set_title(ax, title)


def set_title(ax, title):
    """Set a title, cut to the width of the axes."""
    inches = ax.get_position().width * ax.figure.get_size_inches()[0]
    ax.set_title(truncate(title, int(19 * inches)))


@styled
def sample_grid(rows, names, row_labels, title):
    """Draw a grid of images: each of `rows` is uint8 (n, 3, S, S), `names` head the n columns."""
    height = 0.6 + 1.05 * len(rows)
    width = 1 + len(names)
    fig, axes = new_figure(width, height, title, len(rows), len(names), squeeze=False)
    for row_axes, images, label in zip(axes, rows, row_labels):
        row_axes[0].set_ylabel(truncate(label, 12))
        for ax, image in zip(row_axes, images):
            show_image(ax, image)
    for ax, name in zip(axes[0], names):
        set_title(ax, name)
    return fig


@styled
def training_curves(history, schedule, steps_per_epoch, title, split="test"):
    """Draw loss, accuracy, lr and momentum of a run.

    `history` has a dict an epoch with epoch, train_loss, train_accuracy and, for split "test" or
    "val", {split}_loss and {split}_accuracy; `schedule` is a OneCycle.
    """
    fig, axes = new_figure(10, 6.5, title, 2, 2)
    num_epochs = schedule.total_steps / steps_per_epoch
    epochs = [row["epoch"] for row in history]
    evaluated = "test" if split == "test" else "held-out"

    # Above, what was measured at the end of each epoch.
    for ax, key in zip(axes[0], ("loss", "accuracy")):
        train = [row[f"train_{key}"] for row in history]
        test = [row[f"{split}_{key}"] for row in history]
        ax.plot(epochs, train, "o--", color=BLUE, label=f"train: {train[-1]:.4g} at the end")
        label = f"{evaluated}: {test[-1]:.4g} at the end"
        ax.plot(epochs, test, "o-", color=VERMILION, label=label)
        ax.legend()

    # Below, the schedule at each step.
    steps = range(schedule.total_steps)
    x = [step / steps_per_epoch for step in steps]
    axes[1, 0].plot(x, [schedule(step)[0] for step in steps], color=BLACK)
    axes[1, 1].plot(x, [schedule(step)[1] for step in steps], color=BLACK)

    for ax, label in zip(axes.flat, (LOSS_LABEL, ACCURACY_LABEL, "lr", "momentum")):
        # A margin, so that dots of the first and last epoch are not clipped.
        ax.set(xlabel="epoch", ylabel=label, xlim=(-0.03 * num_epochs, 1.03 * num_epochs))
        ax.locator_params(axis="x", integer=True)
        ax.grid()
    return fig


@styled
def confusion_matrix(matrix, class_names, title):
    """Draw a confusion matrix (K, K; rows actual, columns predicted), colored by fraction of row.

    Up to 20 classes show their counts; above 100, some ticks are left out.
    """
    K = len(class_names)
    is_small = K <= 20
    side = min(max(6.5, 0.26 * K), 20)
    fig, ax = new_figure(side + 1, side, title)
    fraction = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    image = ax.imshow(fraction.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    fig.colorbar(image, label="fraction of the actual class", shrink=0.8)

    ticks = range(0, K, math.ceil(K / 100))
    names = [truncate(class_names[i], 20) for i in ticks]
    ax.set_yticks(ticks, names)
    if is_small:
        ax.set_xticks(ticks, names, rotation=45, ha="right")
        ax.tick_params(labelsize=9)
    else:
        ax.set_xticks(ticks, names, rotation=90, ha="center")
        ax.tick_params(labelsize=6)
    ax.set(xlabel="predicted", ylabel="actual")

    if is_small:
        for i in range(K):
            for j in range(K):
                color = "white" if fraction[i, j] > 0.5 else "black"
                count = f"{matrix[i, j]}"
                ax.text(j, i, count, ha="center", va="center", fontsize=8, color=color)
    return fig


@styled
def image_grid(images, captions, title):
    """Draw uint8 images (n, 3, S, S), five a row, each under its caption."""
    num_rows = math.ceil(len(captions) / 5)
    fig, axes = new_figure(7.5, 0.5 + 1.9 * num_rows, title, num_rows, 5, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, image, caption in zip(axes.flat, images, captions):
        show_image(ax, image, caption)
    return fig


@styled
def heat_maps(images, names, maps, captions, title):
    """Draw images uint8 (n, 3, S, S), one a row, each beside its saliency maps laid over it.

    `maps` holds, by the name of a method, M maps of each image, (n, M, S, S) in [0, 1], transparent
    where they are 0. `names` are those of the n images, `captions` are n lists of M.
    """
    n = len(names)
    M = len(captions[0])
    # Inches. All cells are squares of one size.
    side = 1.35
    gap = 0.07
    row_height = side + 0.41  # with two lines of caption
    head = 0.7  # for the title and the methods
    foot = 0.75  # for the color bar
    method_width = M * (side + gap) + gap
    width = gap + side + len(maps) * method_width + gap
    height = head + n * row_height + foot
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    fig = empty_figure(width, height)

    def add_axes(left, bottom, w, h):
        return fig.add_axes((left / width, bottom / height, w / width, h / height))

    def add_cell(left, i, caption):
        """Draw image i at `left`, in row i."""
        ax = add_axes(left, height - head - (i + 1) * row_height, side, side)
        show_image(ax, images[i], truncate(caption, 20))
        return ax

    def add_text(x, y, text, **style):
        fig.text(x / width, y / height, text, ha="center", va="center", **style)

    # From blue to red, the more opaque the more salient.
    colors = colormaps["turbo"](range(256))
    colors[:, 3] = [0.8 * k / 255 for k in range(256)]
    colormap = ListedColormap(colors)

    add_text(width / 2, height - 0.2, truncate(title, int(13 * width)), fontsize=10)
    for i in range(n):
        add_cell(gap, i, names[i])
    # Beside the images, the maps: those of a method stand together under its name.
    for k, (method, values) in enumerate(maps.items()):
        left = gap + side + k * method_width + 2 * gap
        middle = left + (M * (side + gap) - gap) / 2
        add_text(middle, height - head + 0.12, method, fontsize=9, fontweight="bold")
        for i in range(n):
            for j in range(M):
                ax = add_cell(left + j * (side + gap), i, captions[i][j])
                ax.imshow(values[i, j].cpu().numpy(), cmap=colormap, vmin=0, vmax=1)

    ax = add_axes(width / 2 - 1.5, 0.47, 3, 0.12)
    ax.imshow([range(256)], cmap=colormap, extent=(0, 1, 0, 1), aspect="auto")
    label = "evidence for the class, relative to the maximum of both maps"
    ax.set(xticks=[0, 0.5, 1], yticks=[], xlabel=label)
    return fig


@styled
def lr_range(history, marks, title, runs=(), recommended=None):
    """Draw the loss over the lrs of a sweep and, below, the held-out losses of short runs.

    `history` has a dict an lr with lr, loss and smoothed_loss; `marks` maps names to lrs read off
    it. `runs` have lr, epochs, loss, loss_error and diverged; `recommended` is (name, lr).
    """
    if runs:
        fig, axes = new_figure(9, 7, title, 2)
        short_runs(axes[1], runs)
    else:
        fig, ax = new_figure(9, 4, title)
        axes = [ax]
    top = axes[0]
    lrs = [row["lr"] for row in history]
    losses = [row["loss"] for row in history]
    smoothed = [row["smoothed_loss"] for row in history]
    light_blue = "#9CC9E5"
    top.plot(lrs, losses, color=light_blue, label="loss at each lr of the sweep")
    top.plot(lrs, smoothed, color=BLUE, label="smoothed loss")
    top.set_ylabel(f"train {LOSS_LABEL}")
    # A loss that diverges leaves the figure.
    low = min(losses)
    span = losses[0] - low
    if span > 0:
        top.set_ylim(low - 0.1 * span, low + 1.6 * span)

    # Every lr found is a line through both; the upper legend names them.
    found = []
    for (name, lr), color, style in zip(marks.items(), (PURPLE, GREEN), ("--", "-.")):
        found.append(lr)
        for ax in axes:
            label = f"{name}: {lr:.4g}" if ax is top else None
            ax.axvline(lr, color=color, linestyle=style, label=label)
    if recommended:
        name, lr = recommended
        found.append(lr)
        for ax in axes:
            label = f"{name}: {lr:.4g}" if ax is top else None
            ax.axvline(lr, color=BLACK, linewidth=2, label=label, zorder=1)

    # One logarithmic axis for both. The first lr of a linear sweep may be decades below the second,
    # so the axis begins with that.
    shown = [*lrs[1:], *found, *(run.lr for run in runs)] or lrs
    for ax in axes:
        ax.set_xscale("log")
        ax.set_xlim(min(shown) / 1.5, max(shown) * 1.5)
        ax.xaxis.set_major_formatter("{x:g}")  # the default is a formula
        ax.xaxis.set_minor_formatter("")
        ax.set_xlabel("lr (log scale)")
        ax.grid()
        ax.legend(frameon=True, edgecolor="none", framealpha=0.9)
    return fig


def short_runs(ax, runs):
    """Draw the held-out loss over the lr of runs of each length, with its standard error."""
    lengths = sorted({run.epochs for run in runs})
    for epochs, color, marker in zip(lengths, (BLUE, VERMILION), ("s", "o")):
        shown = [run for run in runs if run.epochs == epochs and not run.diverged]
        shown.sort(key=lambda run: run.lr)
        plural = "s" if epochs > 1 else ""
        ax.errorbar(
            [run.lr for run in shown],
            [run.loss for run in shown],
            yerr=[run.loss_error for run in shown],
            color=color,
            marker=marker,
            capsize=3,
            label=f"short runs of {epochs} epoch{plural}, with standard error",
        )

    # A run that diverged has no loss: it is a cross at the upper edge.
    diverged = [run.lr for run in runs if run.diverged]
    if diverged:
        heights = [0.96] * len(diverged)  # 1 is the height of the axes
        ax.plot(diverged, heights, "kx", transform=ax.get_xaxis_transform(), label="diverged")

    # One that learned nothing leaves the figure.
    losses = sorted(run.loss for run in runs if not run.diverged)
    if losses:
        low = losses[0]
        span = losses[len(losses) // 2] - low
        if losses[-1] > low + 4 * span > low:
            ax.set_ylim(low - 0.3 * span, low + 4 * span)
    ax.set_ylabel(f"held-out {LOSS_LABEL}")
