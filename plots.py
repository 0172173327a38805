"""Every figure that the scripts save. Figures are matplotlib objects of their own: no global state, no display."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from files import replacing

TRAIN, TEST, NEUTRAL = "#1f77b4", "#d62728", "#444444"


def figure(width, height):
    """A white figure of width x height inches that can be saved."""
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def save(made, path):
    """Write a figure as PNG, whole."""
    with replacing(path) as temporary:
        made.savefig(temporary, dpi=120, format="png")


def literal(text):
    """A name that a user has chosen, for matplotlib to draw as it stands: between two dollar signs it would read TeX."""
    return text.replace("$", r"\$")


def show_picture(axes, image):
    """One uint8 (3, S, S) picture without ticks."""
    axes.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def sample_rows(rows, names, sides, title):
    """A grid: each of `rows` is uint8 (n, 3, S, S) with its name in `sides` at the left; `names` head the n columns."""
    made = figure(1 + len(names), 0.6 + 1.05 * len(rows))
    made.suptitle(literal(title))
    grid = made.subplots(len(rows), len(names), squeeze=False)
    for i, (images, side) in enumerate(zip(rows, sides)):
        for j, (image, name) in enumerate(zip(images, names)):
            show_picture(grid[i, j], image)
            if i == 0:
                grid[i, j].set_title(literal(name), fontsize=9)
        grid[i, 0].set_ylabel(literal(side), fontsize=9)
    return made


def curves(history, schedule, steps_per_epoch, title):
    """Loss, accuracy, learning rate and momentum of a run: `history` is a list of rows, `schedule` a function of the step."""
    epochs = [row["epoch"] for row in history]
    made = figure(10, 6.5)
    made.suptitle(literal(title))
    (loss, accuracy), (rate, momentum) = made.subplots(2, 2)
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        for part, colour in (("train", TRAIN), ("test", TEST)):
            values = [row[f"{part}_{name}"] for row in history]
            axes.plot(epochs, values, color=colour, marker=".", label=f"{part}: {values[-1]:.4g} at the end")
        axes.legend(frameon=False)
    loss.set_ylabel("mean cross entropy")
    accuracy.set_ylabel("accuracy, %")
    steps = range(schedule.total_steps)
    for axes, values, name in zip((rate, momentum), zip(*map(schedule, steps)), ("learning rate", "momentum")):
        axes.plot([step / steps_per_epoch for step in steps], values, color=NEUTRAL)
        axes.set_ylabel(name)
    for axes in (loss, accuracy, rate, momentum):
        axes.set(xlabel="epochs passed", xlim=(0, schedule.total_steps / steps_per_epoch))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
    return made


def comparison(runs, title):
    """Test accuracy by epoch: `runs` is name -> list of runs, each a list of percents, one an epoch; a colour a name."""
    made = figure(8, 4.5)
    axes = made.subplots()
    for (name, of_name), colour in zip(runs.items(), (NEUTRAL, TEST, TRAIN)):
        last = [values[-1] for values in of_name]
        for i, values in enumerate(of_name):
            label = f"{literal(name)}: {sum(last) / len(last):.2f} % at the end, n = {len(last)}" if i == 0 else None
            axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=1, alpha=0.8, label=label)
    axes.set(title=literal(title), xlabel="epochs passed", ylabel="test accuracy, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    return made


def confusion(matrix, class_names, title):
    """A confusion matrix (K, K; rows actual, columns predicted), coloured by the share of the actual class."""
    K = len(class_names)
    side = max(6.5, 0.26 * K)
    made = figure(side + 1, side)
    axes = made.subplots()
    share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    drawn = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    made.colorbar(drawn, label="share of the actual class", shrink=0.8)
    small = {"fontsize": 9 if K <= 20 else 5}
    class_names = list(map(literal, class_names))
    axes.set_xticks(range(K), class_names, rotation=45 if K <= 20 else 90, ha="right" if K <= 20 else "center", **small)
    axes.set_yticks(range(K), class_names, **small)
    axes.set(title=literal(title), xlabel="predicted", ylabel="actual")
    if K <= 20:
        for i in range(K):
            for j in range(K):
                colour = "white" if share[i, j] > 0.5 else "black"
                axes.text(j, i, f"{matrix[i, j]:,}", ha="center", va="center", fontsize=8, color=colour)
    return made


def misclassified(images, captions, title):
    """A grid of uint8 pictures (n, 3, S, S), each under its caption."""
    columns = 5
    rows = -(-len(captions) // columns)
    made = figure(2.1 * columns, 0.5 + 2.35 * rows)
    made.suptitle(literal(title))
    for axes in made.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image, caption in zip(made.axes, images, captions):
        show_picture(axes, image)
        axes.set_title(literal(caption), fontsize=9)
    return made


def heat_maps(images, titles, maps, captions, roles, title):
    """Pictures uint8 (n, 3, S, S), each with its M heat maps (n, M, S, S; [0, 1]) laid over it, two pictures a row if they fit.

    `titles` names the n pictures, `roles` the M kinds of map, `captions` (n lists of M) each map.
    """
    n, M = maps.shape[:2]
    across = 2 if M < 3 and n > 1 else 1
    down = -(-n // across)
    width = 7.5
    made = figure(width, 0.6 + down * (width / (across * (1 + M)) + 0.3))
    made.suptitle(literal(title), fontsize=10)
    for i, part in enumerate(made.subfigures(down, across, squeeze=False, wspace=0.06).flat):
        if i == n:
            break
        for j, axes in enumerate(part.subplots(1, 1 + M)):
            if j == 0:
                show_picture(axes, images[i])
                axes.set_title(literal(titles[i]), fontsize=9)
                continue
            show_picture(axes, images[i].float().mean(0, keepdim=True).expand(3, -1, -1).byte())  # grey, as colour is heat
            heat = maps[i, j - 1].cpu().numpy()
            axes.imshow(heat, cmap="plasma", vmin=0, vmax=1, alpha=0.9 * heat, interpolation="bilinear")
            axes.set_title(literal(f"{roles[j - 1]}\n{captions[i][j - 1]}"), fontsize=9)
    return made


def lr_range(history, suggestions, mode, title):
    """Loss, raw and smoothed, and accuracy over the rates of a range test, with the suggestions marked."""
    rates = [row["rate"] for row in history]
    made = figure(9, 7)
    made.suptitle(literal(title))
    loss, accuracy = made.subplots(2, 1, sharex=True)
    loss.plot(rates, [row["loss"] for row in history], color=TRAIN, alpha=0.3, linewidth=1, label="loss, mean at each rate")
    loss.plot(rates, [row["smoothed"] for row in history], color=TRAIN, linewidth=2, label="loss, smoothed")
    start, low = history[0]["loss"], min(row["loss"] for row in history)
    loss.set_ylim(low - 0.1 * (start - low), start + 0.6 * (start - low) if start > low else None)  # divergence runs off the top
    accuracy.plot(rates, [row["train_accuracy"] for row in history], color=TRAIN, alpha=0.6, linewidth=1, label="train")
    if "test_accuracy" in history[0]:
        accuracy.plot(rates, [row["test_accuracy"] for row in history], color=TEST, alpha=0.8, linewidth=1, label="test")
    for (name, pick), colour in zip(suggestions.items(), ("#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")):
        for axes in (loss, accuracy) if pick.rate is not None else ():
            axes.axvline(pick.rate, color=colour, linestyle="--", linewidth=1.2, label=f"{name}: {pick.rate:.4g}" if axes is loss else None)
    if mode == "exp":
        loss.set_xscale("log")
    loss.set_ylabel("mean cross entropy")
    accuracy.set(ylabel="accuracy, %", xlabel=f"learning rate, {'logarithmic' if mode == 'exp' else 'linear'} axis")
    for axes in (loss, accuracy):
        axes.legend(frameon=False, fontsize=9)
        axes.grid(alpha=0.25)
    return made
