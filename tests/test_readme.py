"""What the README says of the commands and the tests is so: what it names exists, and every flag that there is stands in it."""

import re

import pytest

import bench
import data
import evaluate
import gradcam
import lr_range
import report
import train
import vit

SCRIPTS = {module.__name__: module for module in (bench, data, evaluate, gradcam, lr_range, report, train, vit)}
TORCHRUN = {"--nproc-per-node", "--max-restarts", "--rdzv-id"}
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
README = (report.HERE / "README.md").read_text()


@pytest.fixture
def flags(invoke):
    """Each script's flags, as its --help names them."""
    return {name: set(FLAG.findall(invoke(module, ["--help"])[1])) - {"--help"} for name, module in SCRIPTS.items()}


def test_every_command_in_the_readme_has_only_flags_that_exist(flags):
    commands = re.findall(r"(?:python|torchrun[^\n`]*?) (\w+)\.py([^\n`#]*)", README)
    assert len(commands) > 20 and {name for name, _ in commands} >= SCRIPTS.keys()
    for name, rest in commands:
        assert set(FLAG.findall(rest)) <= flags[name], (name, rest)


def test_every_flag_in_the_readme_exists(flags):
    assert set(FLAG.findall(README)) - {"--help"} - TORCHRUN <= set().union(*flags.values())


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_every_flag_is_in_the_readme_and_its_help_states_its_default(flags, invoke, name):
    assert not flags[name] - set(FLAG.findall(README))
    _, *helps = invoke(SCRIPTS[name], ["--help"])[1].split("options:")[1].split("\n  --")  # before the first is --help itself
    for text in helps:
        takes_a_value = re.match(r"\S+ [A-Z{\[]", text) is not None
        assert " ".join(text.split()).count("(default: ") == takes_a_value and "(default: None)" not in text, text


def test_every_test_in_the_readme_exists():
    named, file = [], None
    for of, test in re.findall(r"`(test_\w+\.py)?::(test_\w+)`", README):
        file = of or file
        named.append((file, test))
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (report.HERE / "tests" / file).read_text(), (file, test)
