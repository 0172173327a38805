"""The README's tables of measurements and docs/curves.png, written from the measured files under results/.

    python report.py            # write both again
    python report.py --check    # or only say whether the tables are what results/ gives

A table stands in the README between `<!-- NAME -->` and `<!-- end of NAME -->`, NAME being a key of TABLES.
"""

import ast
import statistics
import textwrap
from pathlib import Path

import plots
from cli import Parser, RunError, run
from files import markdown, read_csv, replacing

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PICTURES = RESULTS / "cifar10-jpeg"
README = HERE / "README.md"
CURVES = HERE / "docs" / "curves.png"


def column(rows, name):
    return [float(row[name]) for row in rows]


def mean_std(values, digits=2):
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def histories(recipe, precision="bf16"):
    """Rows of each kept run of a recipe on the JPEG copy, by seed."""
    paths = PICTURES.glob(f"{recipe}-{precision}-seed*.csv")
    return {int(path.stem.rsplit("seed", 1)[1]): read_csv(path) for path in sorted(paths)}


def headline():
    """The last epoch of the run to reproduce and of every recipe, and how long those took that had the machine to themselves."""
    theirs = int(read_csv(RESULTS / "original_log.csv")[-1]["test_correct_of_10000"]) / 100
    took = [sum(column(rows, "seconds")) for rows in histories("original").values()]
    alone = sum(column(read_csv(PICTURES / "default-bf16-2threads.csv"), "seconds"))
    recipes = {
        "original": (f"{min(took):.0f} to {max(took):.0f} s", ""),
        "default": (f"{alone:.0f} s", ", [what each part is worth](#recipes)"),
        "long": ("not measured", ""),
    }
    rows = [["the run to reproduce, 24 epochs, official files", f"{theirs:.2f} %", "", "[its log](results/original_log.csv)"]]
    for recipe, (seconds, evidence) in recipes.items():
        kept = list(histories(recipe).values())
        told = f"`python train.py --recipe {recipe}`, {len(kept[0])} epochs, JPEG copy"
        accuracy = mean_std([column(rows, "test_accuracy")[-1] for rows in kept])
        rows.append([told, f"**{accuracy} %**", seconds, f"n = {len(kept)}, [results](#results){evidence}"])
    return markdown(["72,170 parameters", "test accuracy, last epoch", "time, 2 CPU cores", "evidence"], rows)


def accuracy():
    """Accuracy of every recipe: the last epoch is the result, the best and flip-TTA are for comparison."""
    runs = read_csv(PICTURES / "runs.csv")
    rows = []
    for command in dict.fromkeys(row["command"] for row in runs):
        of_command = [row for row in runs if row["command"] == command]
        kept = [histories(row["recipe"], row["precision"])[int(row["seed"])] for row in of_command]
        last, best = [column(k, "test_accuracy")[-1] for k in kept], [max(column(k, "test_accuracy")) for k in kept]
        seconds = [sum(column(k, "seconds")) for k in kept]
        alone = of_command[0]["alone"] == "yes"  # on the machine; the seconds of others say nothing
        tta = [float(row["tta"]) for row in of_command if row["tta"]]
        rows.append(
            [
                f"`{command}`", len(kept[0]), len(kept), f"**{mean_std(last)}**", ", ".join(f"{value:.2f}" for value in last),
                mean_std(best), mean_std(tta) if tta else "", f"{min(seconds):.0f} to {max(seconds):.0f}" if alone else "", of_command[0]["threads"],
            ]
        )  # fmt: skip
    return markdown(["command", "epochs", "n", "last epoch", "each", "best epoch", "flip-TTA", "seconds a run", "threads"], rows)


def log():
    """Seed 1 of recipe original beside the log of the run that it reproduces."""
    ours, theirs = histories("original")[1], read_csv(RESULTS / "original_log.csv")
    rows = []
    for a, b in zip(ours, theirs):
        losses = [f"{float(a[name]):.4f}" for name in ("train_loss", "test_loss")]
        rows.append(
            [
                a["epoch"], f"{float(a['lr']):.6f}", losses[0], f"{float(a['train_accuracy']):.2f}", losses[1],
                f"{float(a['test_accuracy']):.2f}", b["train_accuracy_percent"], f"{int(b['test_correct_of_10000']) / 100:.2f}",
            ]
        )  # fmt: skip
    return markdown(["epoch", "lr at its start", "train loss", "train acc %", "test loss", "test acc %", "its train acc %", "its test acc %"], rows)


def ablation():
    """What accuracy on held-out pictures becomes when one part of recipe default is taken away."""
    rows = read_csv(PICTURES / "ablation.csv")
    parts = {part: [row for row in rows if row["part"] == part] for part in dict.fromkeys(row["part"] for row in rows)}
    whole = statistics.mean(column(next(iter(parts.values())), "accuracy"))
    lines = []
    for part, of_part in parts.items():
        values = column(of_part, "accuracy")
        flags = f"`{of_part[0]['flags']}`" if of_part[0]["flags"] else ""
        lines.append([part, flags, len(values), mean_std(values), f"{statistics.mean(values) - whole:+.2f}"])
    return markdown(["taken away", "flags", "n", "mean ± std", "difference"], lines)


def rates():
    """What every suggestion of the range test trains recipe original to, and at the end rates that nothing suggested."""
    rows = [row for row in read_csv(PICTURES / "lr_study.csv") if row["recipe"] == "original"]
    suggested = [[row["sweep"], row["suggestion"], row["max_lr"], row["accuracy"]] for row in rows if row["sweep"]]
    others = [["", "none", row["max_lr"], row["accuracy"]] for row in rows if not row["sweep"]]
    return markdown(["sweep", "suggestion", "--max-lr", "accuracy"], suggested + others)


def speed():
    """A training step on a CPU, every way."""
    rows = []
    for row in read_csv(RESULTS / "bench_cpu.csv"):
        ratio = [f"{row[name]} ({row[name + '_range']})" for name in ("times_plain", "times_per_picture")]
        rows.append([row["way"], row["ms_per_step"], f"{int(row['pictures_per_second']):,}", *ratio, row["first_step_ms"]])
    return markdown(["way", "ms a step", "pictures/s", "times as fast as eager fp32", "times as fast as per-picture", "first step, ms"], rows)


def resources():
    """What each kernel takes of sm_90, and what it spills elsewhere."""
    by_kernel = {}
    for row in read_csv(RESULTS / "kernel_resources.csv"):
        by_kernel.setdefault(f"{row['kernel']}, {row['dtype']}", {})[row["target"]] = row
    rows = []
    for kernel, on in by_kernel.items():
        own, spilled = on["sm_90"], [f"{int(on[target]['spilled_bytes']):,}" for target in ("sm_80", "gfx942")]
        numbers = [f"{int(own[name]):,}" for name in ("spilled_bytes", "shared_bytes", "matrix_instructions", "instructions")]
        rows.append([kernel, own["registers"], *numbers, *spilled])
    head = ["kernel", "registers", "spilled bytes", "shared memory, bytes", "matrix instructions", "instructions", "spilled bytes, sm_80", "spilled bytes, gfx942"]
    return markdown(head, rows)


def heat():
    """How far each map of gradcam.py may be believed, the best of each column in bold."""
    photographs, shapes = ({row["map"]: row for row in read_csv(RESULTS / "gradcam" / f"{name}.csv")} for name in ("cifar10-jpeg", "shapes"))
    columns = [(photographs, "insertion", max), (photographs, "deletion", min)]
    columns += [(shapes, "insertion", max), (shapes, "deletion", min), (shapes, "pointing", max), (shapes, "inside", max)]
    rows = []
    for name in photographs:
        cells = []
        for of, measure, better in columns:
            text = f"{float(of[name][measure]):.3f} ± {float(of[name][measure + '_se']):.3f}"
            best = better(float(row[measure]) for row in of.values()) == float(of[name][measure])
            cells.append(f"**{text}**" if best else text)
        drawn = name if name in ("random pixels", "random grid", "centre", "edges") else f"`{name}`"
        rows.append([drawn, *cells])
    photos, drawings = "JPEG copy", "shapes"
    head = ["map", f"insertion ↑, {photos}", f"deletion ↓, {photos}", f"insertion ↑, {drawings}", f"deletion ↓, {drawings}"]
    return markdown([*head, f"pointing game ↑, {drawings}", f"heat inside ↑, {drawings}"], rows)


def imported():
    """Name -> names of our own modules that it imports, read off the source, wherever in it they are imported."""
    paths = [*HERE.glob("*.py"), *HERE.glob("kernels/*.py")]
    sources = {".".join(path.relative_to(HERE).with_suffix("").parts).removesuffix(".__init__"): path.read_text() for path in paths}
    found = {}
    for name, source in sources.items():
        named = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & sources.keys()
                named |= inner or {node.module}
        found[name] = named & sources.keys()
    return found


def import_graph():
    """The modules in rows: each imports from rows below its own alone; raises RunError for a circle."""
    graph, rows = imported(), []
    while graph:
        free = sorted(name for name, needed in graph.items() if not needed & graph.keys())
        if not free:
            raise RunError(f"these import each other in a circle, or from one: {', '.join(sorted(graph))}")
        rows.insert(0, free)
        graph = {name: needed for name, needed in graph.items() if name not in free}
    return "```\n" + "\n".join(textwrap.fill("  ".join(row), 100) for row in rows) + "\n```"


TABLES = {"headline": headline, "accuracy": accuracy, "log": log, "ablation": ablation, "rates": rates, "heat": heat, "speed": speed, "resources": resources, "imports": import_graph}


def written(text):
    """`text`, a README, with every table as results/ has it; raises RunError where its place is missing."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise RunError(f"README.md has no place, or several, for the table {name!r}: {begin.strip()} and {end.strip()}")
        before, rest = text.split(begin)
        text = before + begin + table() + end + rest.split(end)[1]
    return text


def main():
    parser = Parser(description="Write the README's tables and docs/curves.png from the measured files under results/.")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if the README is not what results/ gives")
    arguments = parser.parse_args()
    text = README.read_text()
    if arguments.check:
        if written(text) != text:
            raise RunError("README.md is not what results/ gives: python report.py writes it again")
        return print("README.md is what results/ gives")
    with replacing(README) as temporary:
        temporary.write_text(written(text))
    runs = {recipe: [column(rows, "test_accuracy") for rows in histories(recipe).values()] for recipe in ("original", "default")}
    plots.save(plots.comparison(runs, "24 epochs on the JPEG copy of CIFAR-10, every seed"), CURVES)
    print(f"wrote {README.name} and {CURVES.name}")


if __name__ == "__main__":
    run(main)
