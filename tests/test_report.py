"""The README's tables are what the measured files say."""

import shutil

import pytest

import report
from cli import RunError


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of results/ and the README, which report.py takes for its own."""
    shutil.copytree(report.RESULTS, tmp_path / "results")
    shutil.copy(report.README, tmp_path)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "CURVES", tmp_path / "curves.png")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "PICTURES", tmp_path / "results" / "cifar10-jpeg")
    return tmp_path


def test_the_readme_is_what_the_results_give(invoke):
    assert invoke(report, ["--check"])[0] == 0


@pytest.mark.parametrize("name", sorted(report.TABLES))
def test_a_table_that_was_changed_by_hand_is_found_and_written_again(copied, invoke, name):
    readme = copied / "README.md"
    text = readme.read_text()
    begin, end = text.index(f"<!-- {name} -->"), text.index(f"<!-- end of {name} -->")
    place = next(i for i in range(end, begin, -1) if text[i].isalnum())
    readme.write_text(text[:place] + ("1" if text[place] != "1" else "2") + text[place + 1 :])
    status, out, err = invoke(report, ["--check"])
    assert (status, err) == (1, "report.py: error: README.md is not what results/ gives: python report.py writes it again\n")
    assert invoke(report, [])[0] == 0 and readme.read_text() == text and (copied / "curves.png").stat().st_size > 10_000


def test_a_result_that_changes_changes_the_readme(copied):
    before = report.accuracy()
    path = sorted(report.PICTURES.glob("default-bf16-seed1.csv"))[0]
    lines = path.read_text().splitlines()
    head = lines[0].split(",")
    cells = lines[-1].split(",")
    cells[head.index("test_accuracy")] = "12.34"
    path.write_text("\n".join([*lines[:-1], ",".join(cells)]) + "\n")
    assert "12.34" in report.accuracy() and "12.34" not in before


def test_a_readme_without_a_tables_place_is_refused():
    with pytest.raises(RunError, match="no place, or several, for the table 'headline'"):
        report.written("nothing")
