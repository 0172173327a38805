"""What README.md, CONTRIBUTING.md and docs/ say of flags, tests and files; the project's limits."""

import ast
import dataclasses
import graphlib
import importlib
import re

from conftest import ROOT

from results import report
from schedule import Recipe

SCRIPTS = "bench", "evaluate", "gradcam", "lr_range", "teacher", "train"  # never imported
SCRIPTS = *SCRIPTS, "results.report", "results.kernel_resources", "results.kernel_traffic"
TORCHRUN = {"--nproc-per-node", "--max-restarts", "--rdzv-id"}
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(path.read_text() for path in PAGES)
FOLDERS = [ROOT / name for name in ("", "kernels", "tests", "results")]
SOURCES = {path: path.read_text() for folder in FOLDERS for path in sorted(folder.glob("*.py"))}


def test_every_flag_is_explained_and_every_explained_flag_exists(invoke):
    flags = {}
    for name in (*SCRIPTS, "data", "vit"):
        text = invoke(importlib.import_module(name), ["--help"])[1]
        flags[name] = set(FLAG.findall(text)) - {"--help"}
        assert "(default: None)" not in text
        source = SOURCES[ROOT / f"{name.replace('.', '/')}.py"]
        assert source.endswith('\n\nif __name__ == "__main__":\n    run_script(main)\n')
    everything = set().union(*flags.values())
    assert everything ^ set(FLAG.findall(TEXT)) == TORCHRUN | {"--help"}
    commands = re.findall(r"(?:python|torchrun[^\n`]*?) ([\w/]+)\.py([^\n`#|]*)", TEXT)
    assert {name.replace("/", ".") for name, _ in commands} == flags.keys()
    for name, rest in commands:
        assert set(FLAG.findall(rest)) <= flags[name.replace("/", ".")], (name, rest)
    settings = set(re.findall(r"--set ([a-z]\w*)=", TEXT))
    assert settings and settings <= {field.name for field in dataclasses.fields(Recipe)}


def test_tests_files_and_links_exist():
    file = None
    for of, test in re.findall(r"`(test_\w+\.py)?::(test_\w+)`", TEXT):
        file = of or file
        assert f"def {test}(" in SOURCES[ROOT / "tests" / file], (file, test)
    assert TEXT.count("::test_") > 20
    for path in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / link).exists(), (path.name, link)
    names = re.findall(r"`((?:\w+/)?\w+\.(?:py|csv))`", TEXT)
    for name in set(names) - {"history.csv", "lr_range.csv", "lr_runs.csv"}:
        assert list(ROOT.glob(f"**/{name}")), name
    tree = (ROOT / "README.md").read_text().split("## Files")[1]
    for path in SOURCES:
        assert path.parent != ROOT or path.name in tree, path.name


def test_sizes_are_within_the_limits():
    lines = {path: text.splitlines() for path, text in SOURCES.items()}
    readme = (ROOT / "README.md").read_text()
    sizes = {
        "files at the top level": (sum(path.parent == ROOT for path in SOURCES), 16),
        "files to read": (len(report.READING_LIST), 5),
        "lines to read": (sum(len(lines[ROOT / name]) for name in report.READING_LIST), 1100),
        "lines of README": (len(readme.splitlines()), 150),
        "words of README": (len(readme.split()), 1500),
    }
    for folder, limit in zip(FOLDERS, (3910, 1360, 3490, 535)):
        total = sum(len(lines[path]) for path in SOURCES if path.parent == folder)
        sizes[f"lines in {folder.name}/"] = total, limit
    for path, text in SOURCES.items():
        sizes[f"lines of {path.name}"] = len(lines[path]), 350
        for number, line in enumerate(lines[path], 1):
            sizes[f"columns of {path.name}:{number}"] = len(line), 100
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                limit = 65 if node.name.endswith("_kernel") else 50  # pointers have their lines
                sizes[f"lines of {path.name}:{node.name}"] = length, limit
    assert {name: size for name, size in sizes.items() if size[0] > size[1]} == {}


def test_imports_go_one_way_and_none_is_of_a_script():
    paths = {path: path.relative_to(ROOT) for path in SOURCES if path.parent.name != "tests"}
    names = {path: str(name)[:-3].replace("/", ".") for path, name in paths.items()}
    graph = {name: set() for name in names.values()}
    for path, name in names.items():
        for node in ast.walk(ast.parse(SOURCES[path])):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None)
                inner = [f"{module}.{x.name}" if module else x.name for x in node.names]
                graph[name] |= {x for x in [module, *inner] if x in graph}
        assert not graph[name] & set(SCRIPTS) or name == "results.report", name
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
