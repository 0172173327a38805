"""Write the tables of README.md and docs/results.md, and docs/curves.png, from results/.

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

import plots  # noqa: E402
from cli import Parser, RunError, atomic_write, markdown_table, read_csv, run_script  # noqa: E402

JPEG_COPY = RESULTS / "cifar10-jpeg"
RECIPES = ("original", "default", "long")
HEADLINE = (  # shown in README.md
    ("original", "fp32"),
    ("default", "fp32"),
    ("default", "bf16"),
    ("long", "bf16"),
)


def histories(recipe, precision):
    """Return the histories of a recipe on the JPEG copy, one a seed: lists of dicts of strings."""
    paths = list(JPEG_COPY.glob(f"{recipe}-{precision}-seed*.csv"))
    paths.sort(key=lambda path: int(path.stem.rpartition("seed")[2]))
    return [read_csv(path) for path in paths]


def column(rows, name):
    return [float(row[name]) for row in rows]


def last_accuracies(runs):
    return [float(run[-1]["test_accuracy"]) for run in runs]


def mean_std(values):
    mean = f"{statistics.mean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.2f}"


def seconds(runs):
    """Return "245 to 267 s", the range of the sums over epochs."""
    totals = [sum(column(run, "seconds")) for run in runs]
    low = f"{min(totals):.0f}"
    high = f"{max(totals):.0f}"
    if low == high:
        return f"{low} s"
    return f"{low} to {high} s"


def time_alone(recipe, precision, group):
    """Return the time of runs that had the machine for themselves, as text; "" without any."""
    runs = []
    for history, row in zip(histories(recipe, precision), group):
        if row["idle_machine"] == "yes":
            runs.append(history)
    if runs:
        return seconds(runs)
    one_more = JPEG_COPY / f"{recipe}-{precision}-2threads.csv"  # seed 1 again, alone
    if one_more.exists():
        return f"{seconds([read_csv(one_more)])}, one more run, 2 threads"
    return ""


def runs_by_recipe():
    """Return {(recipe, precision): rows of runs.csv} of the recipes that there are.

    Raises RunError for runs that have no history, or the other way around.
    """
    groups = {}
    named = set()
    for run in read_csv(JPEG_COPY / "runs.csv"):
        recipe = run["recipe"]
        precision = run["precision"]
        if recipe in RECIPES:
            groups.setdefault((recipe, precision), []).append(run)
            named.add(f"{recipe}-{precision}-seed{run['seed']}.csv")
    for group in groups.values():
        group.sort(key=lambda run: int(run["seed"]))  # the order of histories

    found = set()
    for recipe in RECIPES:
        for precision in ("fp32", "bf16"):
            found |= {path.name for path in JPEG_COPY.glob(f"{recipe}-{precision}-seed*.csv")}
    if named != found:
        names = ", ".join(sorted(named ^ found))
        raise RunError(f"not both in runs.csv and in {JPEG_COPY.name}/: {names}")
    return groups


def original_log():
    return read_csv(RESULTS / "original_log.csv")


def logged_accuracy(row):
    return f"{int(row['test_correct_of_10000']) / 100:.2f}"


def table(rows):
    """Return dicts of the same keys as a Markdown table."""
    return markdown_table(list(rows[0]), [row.values() for row in rows])


# --- the tables ---


def headline():
    """Test accuracy of the run to reproduce, and of every recipe."""
    log = original_log()
    row = {
        "run": "the run of EVA8, official files",
        "machine": "one A100",
        "threads": "",
        "epochs": len(log),
        "n": 1,
        "test accuracy": f"{logged_accuracy(log[-1])} %",
        "time of a run": "",
    }
    rows = [row]
    groups = runs_by_recipe()
    for recipe, precision in HEADLINE:
        runs = histories(recipe, precision)
        group = groups[recipe, precision]
        command = group[0]["command"].replace("train.py", "train.py --data cifar10-jpeg")
        _, _, machine = group[0]["measured"].partition(", ")
        row = {
            "run": f"`{command}`",
            "machine": f"{machine}, {precision}",
            "threads": group[0]["threads"],
            "epochs": len(runs[0]),
            "n": len(runs),
            "test accuracy": f"**{mean_std(last_accuracies(runs))} %**",
            "time of a run": time_alone(recipe, precision, group),
        }
        rows.append(row)
    return table(rows)


def accuracy():
    """The runs of each recipe and precision; the accuracy of the last epoch is the result."""
    rows = []
    for (recipe, precision), group in runs_by_recipe().items():
        runs = histories(recipe, precision)
        last = last_accuracies(runs)
        best = [max(column(run, "test_accuracy")) for run in runs]
        flip_tta = ""
        if group[0]["flip_tta"]:
            flip_tta = mean_std(column(group, "flip_tta"))
        row = {
            "command": f"`{group[0]['command']}`",
            "epochs": len(runs[0]),
            "n": len(runs),
            "last epoch": f"**{mean_std(last)}**",
            "each": ", ".join(f"{value:.2f}" for value in last),
            "best epoch": mean_std(best),
            "flip-TTA": flip_tta,
            "threads": group[0]["threads"],
            "time of a run": time_alone(recipe, precision, group),
            "commit": "; ".join(dict.fromkeys(run["commit"] for run in group)),
            "measured": "; ".join(dict.fromkeys(run["measured"] for run in group)),
        }
        rows.append(row)
    return table(rows)


def ablation():
    """Accuracy on held-out images when one component of recipe default is removed."""
    groups = {}
    for run in read_csv(JPEG_COPY / "ablation.csv"):
        key = (run["epochs"], run["removed"], run["flags"])
        groups.setdefault(key, []).append(float(run["val_accuracy"]))
    rows = []
    whole = {}  # epochs -> accuracy of the recipe as it is, which comes first
    for (epochs, removed, flags), values in groups.items():
        mean = statistics.mean(values)
        if removed == "nothing":
            whole[epochs] = mean
        row = {
            "removed": removed,
            "flags": flags and f"`{flags}`",
            "epochs": epochs,
            "n": len(values),
            "mean ± std": mean_std(values),
            "difference": f"{mean - whole[epochs]:+.2f}",
        }
        rows.append(row)
    return table(rows)


def log():
    """Seed 1 of recipe original, beside the log of the run that it reproduces."""
    rows = []
    for run, logged in zip(histories("original", "fp32")[0], original_log(), strict=True):
        row = {
            "epoch": run["epoch"],
            "lr": f"{float(run['lr']):.6f}",
            "train accuracy": f"{float(run['train_accuracy']):.2f}",
            "test accuracy": f"{float(run['test_accuracy']):.2f}",
            "train accuracy, log": logged["train_accuracy_percent"],
            "test accuracy, log": logged_accuracy(logged),
        }
        rows.append(row)
    return table(rows)


TABLES = {"headline": headline, "accuracy": accuracy, "ablation": ablation, "log": log}


def render(texts):
    """Return {path: text} with every table replaced; raises RunError if one has no single place."""
    texts = dict(texts)
    for name, function in TABLES.items():
        begin = f"<!-- {name} -->"
        end = f"<!-- end of {name} -->"
        paths = [path for path, text in texts.items() if end in text.partition(begin)[2]]
        if len(paths) != 1:
            raise RunError(f"README.md and docs/ need one {begin} with {end}")
        before, _, rest = texts[paths[0]].partition(begin)
        _, _, after = rest.partition(end)
        texts[paths[0]] = f"{before}{begin}\n{function()}\n{end}{after}"
    return texts


@plots.styled
def accuracy_curves():
    """Figure of the test accuracy by epoch of original and default, every seed."""
    fig, ax = plots.new_figure(8, 4.5, "24 epochs on the JPEG copy of CIFAR-10, fp32, every seed")
    for recipe, color, style in (
        ("original", plots.BLACK, "--"),
        ("default", plots.VERMILION, "-"),
    ):
        runs = histories(recipe, "fp32")
        mean = statistics.mean(last_accuracies(runs))
        label = f"{recipe}: {mean:.2f} % at the end, n = {len(runs)}"
        for run in runs:
            epochs = range(1, len(run) + 1)
            ax.plot(epochs, column(run, "test_accuracy"), style, color=color, label=label)
            label = None  # one entry of the legend for all seeds
    ax.set(xlabel="epoch", ylabel=f"test {plots.ACCURACY_LABEL}")
    ax.locator_params(axis="x", integer=True)
    ax.grid()
    ax.legend(loc="lower right")
    return fig


def main():
    parser = Parser(description="Write the tables of README.md and docs/ from results/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    args = parser.parse_args()

    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    rendered = render(texts)
    changed = [path for path in paths if rendered[path] != texts[path]]
    names = ", ".join(path.name for path in changed) or "nothing"
    if args.check:
        if changed:
            raise RunError(f"out of date: {names}; `python results/report.py` writes the tables")
        print("all tables are up to date")
        return

    for path in changed:
        with atomic_write(path) as temporary:
            temporary.write_text(rendered[path], encoding="utf-8")
    plots.save_figure(accuracy_curves(), ROOT / "docs" / "curves.png")
    print(f"changed: {names}")


if __name__ == "__main__":
    run_script(main)
