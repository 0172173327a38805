"""What README.md, CONTRIBUTING.md and docs/ say of commands, flags and files is there."""

import ast
import dataclasses
import graphlib
import importlib
import re

import pytest
from conftest import ROOT

from recipes import Recipe

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
SCRIPTS = ["bench", "data", "evaluate", "gradcam", "lr_range", "results.report", "train", "vit"]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
TORCHRUN_FLAGS = {"--nproc-per-node"}


@pytest.fixture
def flags(invoke):
    """{script: the flags in its --help}."""
    found = {}
    for name in SCRIPTS:
        status, text, _ = invoke(importlib.import_module(name), ["--help"])
        assert status == 0
        found[name] = set(FLAG.findall(text))
    return found


def test_commands_and_flags_exist(flags):
    # `python train.py --seed 2` and `torchrun --nproc-per-node=8 train.py`, to the end of the code
    commands = re.findall(r"(?:python|torchrun[^\n`]*?) ([\w/]+)\.py([^\n`#]*)", TEXT)
    assert len(commands) > 20
    for path, arguments in commands:
        name = path.replace("/", ".")
        assert name in SCRIPTS, path
        assert set(FLAG.findall(arguments)) <= flags[name], (path, arguments)

    # flags named in a sentence
    everything = set().union(TORCHRUN_FLAGS, *flags.values())
    assert set(FLAG.findall(TEXT)) <= everything

    settings = set(re.findall(r"--set ([a-z]\w*)=", TEXT))
    assert settings <= {field.name for field in dataclasses.fields(Recipe)}


def test_links_exist():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page.name, link)


def test_imports_go_one_way():
    graph = {}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("results/*.py")]:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                imported |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[name] = imported
    graph = {name: imported & graph.keys() for name, imported in graph.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
