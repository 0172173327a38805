"""Write the tables of README.md and docs/, and docs/curves.png, from the files under results/.

    python results/report.py            # write them
    python results/report.py --check    # write nothing; exit status 1 if a table is out of date

A table stands between `<!-- NAME -->` and `<!-- end of NAME -->`, NAME being a key of TABLES.
"""

import statistics
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
sys.path.insert(0, str(ROOT))  # its modules lie above this script

import numpy as np  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

import plots  # noqa: E402
from cli import Parser, RunError, atomic_write, markdown_table, read_csv, run_script  # noqa: E402
from faithfulness import LOW_IS_GOOD  # noqa: E402
from lr_range import recommend  # noqa: E402

READING_LIST = ("vit.py", "augment.py", "schedule.py", "trainer.py")


def jpeg(name):
    """Rows of a file of measurements on the JPEG copy of CIFAR-10."""
    return read_csv(RESULTS / "cifar10-jpeg" / f"{name}.csv")


def histories(recipe):
    """The bf16 runs of a recipe, in the order of their seeds."""
    paths = (RESULTS / "cifar10-jpeg").glob(f"{recipe}-bf16-seed*.csv")
    return [jpeg(path.stem) for path in sorted(paths)]


def column(rows, name):
    return [float(row[name]) for row in rows]


def unique(rows, name):
    return list(dict.fromkeys(row[name] for row in rows))


def mean_std(values, digits=2):
    std = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{std}"


def seconds(runs):
    totals = [sum(column(run, "seconds")) for run in runs]
    return " to ".join(dict.fromkeys(f"{t:.0f}" for t in (min(totals), max(totals))))


def table(rows):
    """Dicts of the same keys as Markdown; whole numbers get thousands separators."""
    lines = [[f"{int(v):,}" if str(v).isdigit() else v for v in row.values()] for row in rows]
    return markdown_table([key.replace("_", " ") for key in rows[0]], lines)


def headline():
    """Accuracy at the last epoch: the run to reproduce, and every recipe."""
    log = read_csv(RESULTS / "original_log.csv")
    keys = "run", "test accuracy, last epoch", "time on 2 CPU cores", "evidence"
    theirs = f"{int(log[-1]['test_correct_of_10000']) / 100:.2f} %"
    name = f"the run to reproduce, {len(log)} epochs, official files"
    rows = [(name, theirs, "", "[log](results/original_log.csv)")]
    timed = {"original": histories("original"), "default": [jpeg("default-bf16-2threads")]}
    flags = {name: f"--recipe {name}" for name in ("original", "default", "long")}
    flags |= {"distilled": "--teacher teacher.npz"}
    for recipe in flags:
        runs = histories(recipe)
        last = mean_std([column(run, "test_accuracy")[-1] for run in runs])
        name = f"`python train.py {flags[recipe]}`, {len(runs[0])} epochs, JPEG copy"
        time = f"{seconds(timed[recipe])} s" if recipe in timed else "not measured"
        rows.append((name, f"**{last} %**", time, f"n = {len(runs)}, [results](docs/results.md)"))
    return table([dict(zip(keys, row)) for row in rows])


def reading():
    """Files in reading order, with their lengths and the first lines of their docstrings."""
    texts = [(ROOT / name).read_text().splitlines() for name in READING_LIST]
    names = [f"[`{name}`]({name})" for name in READING_LIST]
    rows = [(name, len(text), text[0].strip('"')) for name, text in zip(names, texts)]
    rows.append(("", sum(map(len, texts)), "together"))
    return table([dict(zip(("file", "lines", "what it is"), row)) for row in rows])


def accuracy():
    """The last epoch is the result; the best one and flip-TTA are for comparison."""
    rows, all_runs = [], jpeg("runs")
    for command in unique(all_runs, "command"):
        group = [run for run in all_runs if run["command"] == command]
        runs = [jpeg("{recipe}-{precision}-seed{seed}".format(**run)) for run in group]
        last = [column(run, "test_accuracy")[-1] for run in runs]
        tta = column([run for run in group if run["flip_tta"]], "flip_tta")
        row = {"command": f"`{command}`", "epochs": len(runs[0]), "n": len(runs)}
        row |= {"last epoch": f"**{mean_std(last)}**", "each": ", ".join(f"{x:.2f}" for x in last)}
        row["best epoch"] = mean_std([max(column(run, "test_accuracy")) for run in runs])
        row |= {"flip-TTA": mean_std(tta) if tta else "", "threads": group[0]["threads"]}
        row["seconds a run"] = seconds(runs) if group[0]["idle_machine"] == "yes" else ""
        rows.append({**row, **{k: "; ".join(unique(group, k)) for k in ("commit", "measured")}})
    return table(rows)


def log():
    """Seed 1 of recipe original beside the log of the run that it reproduces."""
    rows, names = [], ("lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
    for run, original in zip(jpeg("original-bf16-seed1"), read_csv(RESULTS / "original_log.csv")):
        row = {"epoch": run["epoch"], **{name: f"{float(run[name]):#.4g}" for name in names}}
        row["train accuracy, log"] = original["train_accuracy_percent"]
        row["test accuracy, log"] = f"{int(original['test_correct_of_10000']) / 100:.2f}"
        rows.append(row)
    return table(rows)


def ablation():
    """Accuracy on held-out images when one component of recipe default is removed."""
    rows, groups, whole = [], {}, {}
    for run in jpeg("ablation"):
        key = run["epochs"], run["removed"], run["flags"]
        groups.setdefault(key, []).append(float(run["val_accuracy"]))
    for (epochs, removed, flags), values in groups.items():
        mean = statistics.mean(values)
        whole.setdefault(epochs, mean)  # the first of a length has nothing removed
        row = {"removed": removed, "flags": flags and f"`{flags}`", "epochs": epochs}
        row |= {"n": len(values), "mean ± std": mean_std(values)}
        rows.append(row | {"difference": f"{mean - whole[epochs]:+.2f}"})
    return table(rows)


def trials():
    """The trials after those that chose the first recipes, in full."""
    keys = ("other_changes", "epochs", "seed", "train_accuracy", "val_accuracy", "val_loss")
    return table([{k: row[k] for k in keys} for row in jpeg("trials") if int(row["trial"]) > 108])


def lr_study():
    """Accuracy of recipe original at every suggested lr, and at lrs of a grid."""
    keys = ("mode", "suggestion", "max_lr", "accuracy")
    rows = [row for row in jpeg("lr_study") if row["recipe"] == "original"]
    return table([{k: row[k] for k in keys} for row in rows])


def lr_regret():
    """Accuracy at the recommended lr, of a grid, linear in log lr, against the best of the grid."""
    rows, runs, keys = [], read_csv(RESULTS / "lr_grid.csv"), ("data", "name", "seed")
    for data, name, seed in dict.fromkeys(tuple(run[k] for k in keys) for run in runs):
        group = [run for run in runs if tuple(run[k] for k in keys) == (data, name, seed)]
        grid = dict(sorted(zip(column(group, "max_lr"), column(group, "val_accuracy"))))
        short = read_csv(RESULTS / data / f"lr_runs-{name}.csv")
        short = [{k: float(v) for k, v in row.items()} for row in short]
        lr = recommend(short, int(group[0]["epochs"]))[0].lr
        there = np.interp(np.log(lr), np.log([*grid]), [*grid.values()])
        best = max(grid, key=grid.get)
        row = {"data": data, "recipe": f"`{name}`", "seed": seed}
        row["accuracy at each lr"] = ", ".join(f"{lr:.3g}: {v:.2f}" for lr, v in grid.items())
        row["best"] = f"{grid[best]:.2f} at {best:.3g}"
        row["recommended"] = f"{there:.2f} at {lr:.3g}"
        rows.append({**row, "regret": f"{grid[best] - there:.2f}"})
    return table(rows)


def saliency():
    """Measures of every saliency map, mean ± std over networks; the best of each is bold."""
    tables = []
    for data in ("cifar10-jpeg", "shapes"):
        paths = sorted((RESULTS / "gradcam").glob(f"{data}-*.csv"))
        networks = [row for path in paths for row in read_csv(path)]
        rows = [{"map": name} for name in unique(networks, "map")]
        for name in (key[:-3] for key in networks[0] if key.endswith("_se")):
            low = name in LOW_IS_GOOD
            groups = [[r for r in networks if r["map"] == row["map"] and r[name]] for row in rows]
            values = [column(group, name) for group in groups]  # none where it is not defined
            means = [statistics.mean(found) for found in values if found]
            top = min(means, key=abs) if low else max(means)  # a correlation is best near 0
            for row, found in zip(rows, values):
                bold = "**" * (found != [] and statistics.mean(found) == top)
                key = f"{name.replace('_', ' ')} {'↓' if low else '↑'}"
                row[key] = f"{bold}{mean_std(found, 3)}{bold}" if found else ""
        tables.append(f"`{data}`, n = {networks[0]['n']}, {len(paths)} networks\n\n{table(rows)}")
    return "\n\n".join(tables)


def speed():
    """The files of bench.py; what is the same in all rows of one is said above its table."""
    parts = []
    for path in sorted(RESULTS.glob("bench_*.csv")):
        rows = read_csv(path)
        varies = [k for k in rows[0] if len(unique(rows, k)) > 1]
        same = [f"{k} {v}" for k, v in rows[0].items() if v and k not in varies]
        parts.append(f"`{path.name}`: {', '.join(same)}.")
        parts.append(table([{k: row[k] for k in varies} for row in rows]))
    return "\n\n".join(parts)


def resources():
    """What each kernel takes on sm_90, or the first target, and what it spills on others."""
    found, rows = {}, []
    for row in read_csv(RESULTS / "kernel_resources.csv"):
        found.setdefault((row["kernel"], row["dtype"]), {})[row["target"]] = row
    for targets in found.values():
        row = targets.pop("sm_90" if "sm_90" in targets else next(iter(targets)))
        spilled = {k: v["spilled_bytes"] for k, v in targets.items() if v["spilled_bytes"] != "0"}
        others = ", ".join(f"{k} {v}" for k, v in spilled.items())
        rows.append({**row, "spilled bytes elsewhere": others})
    return table(rows)


def traffic():
    """What each launch of a step loads, stores and multiplies, and the sum."""
    rows = read_csv(RESULTS / "kernel_traffic.csv")
    for recipe in unique(rows, "recipe"):
        same = [row for row in rows if row["recipe"] == recipe]
        sums = {k: f"{sum(column(same, k)):.1f}" for k in list(rows[0])[3:]}
        rows.append({**same[0], "kernel": f"all {len(same)} launches", **sums})
    return table(rows)


FUNCTIONS = headline, reading, accuracy, trials, log, ablation, lr_study, lr_regret, saliency
FUNCTIONS = *FUNCTIONS, speed, resources, traffic
TABLES = {function.__name__: function for function in FUNCTIONS}


def render(texts):
    """{path: text} with every table replaced; RunError if a table has no place, or several."""
    texts = dict(texts)
    for name, function in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        paths = [path for path, text in texts.items() for _ in range(text.count(begin))]
        if len(paths) != 1 or texts[paths[0]].count(end) != 1:
            raise RunError(f"README.md and docs/ need one {begin.strip()} with {end.strip()}")
        before, rest = texts[paths[0]].split(begin)
        texts[paths[0]] = before + begin + function() + end + rest.split(end)[1]
    return texts


@plots.styled
def accuracy_comparison(runs, title):
    """Test accuracy by epoch: name -> list of runs, each a list of percents, one an epoch."""
    fig, ax = plots.new_figure(8, 4.5, title)
    for (name, curves), color, style in zip(runs.items(), plots.COLORS, plots.LINE_STYLES):
        final = [curve[-1] for curve in curves]
        label = f"{name}: {sum(final) / len(final):.2f} % at the end, n = {len(final)}"
        for i, curve in enumerate(curves):
            epochs, label = range(1, len(curve) + 1), None if i else label
            ax.plot(epochs, curve, color=color, linestyle=style, label=label)
    ax.set(xlabel="epoch", ylabel=f"test {plots.ACCURACY_LABEL}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid()
    ax.legend(loc="lower right")
    return fig


def main():
    parser = Parser(description="Write the tables of README.md and docs/ from results/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    args = parser.parse_args()
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = {path: path.read_text() for path in paths}
    changed = {path: text for path, text in render(texts).items() if text != texts[path]}
    names = ", ".join(path.name for path in changed) or "nothing"
    if args.check and changed:
        raise RunError(f"out of date: {names}; `python results/report.py` writes the tables")
    if not args.check:
        for path, text in changed.items():
            with atomic_write(path) as temporary:
                temporary.write_text(text)
        runs = {recipe: histories(recipe) for recipe in ("original", "default")}
        curves = {k: [column(run, "test_accuracy") for run in v] for k, v in runs.items()}
        title = "24 epochs on the JPEG copy of CIFAR-10, every seed"
        figure = accuracy_comparison(curves, title)
        plots.save_figure(figure, ROOT / "docs" / "curves.png")
    print(f"tables are up to date; changed: {names}")


if __name__ == "__main__":
    run_script(main)
