"""The tables of README.md and docs/ are what the files under results/ say."""

import shutil

import pytest
from conftest import ROOT

from cli import RunError
from results import report


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of all that report.py reads and writes, which it takes for the original."""
    for name in ("results", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("README.md", *report.READING_LIST):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    return tmp_path


def test_all_tables_are_up_to_date(succeeds):
    assert "changed: nothing" in succeeds(report, ["--check"])


def test_a_changed_table_is_found_and_written_again(copied, succeeds, fails):
    pages = {path: path.read_text() for path in copied.rglob("*.md")}
    for name in report.TABLES:
        (path,) = (path for path, text in pages.items() if f"<!-- {name} -->" in text)
        end = f"\n<!-- end of {name} -->"
        path.write_text(pages[path].replace(end, f"0{end}"))
        assert f"out of date: {path.name};" in fails(report, ["--check"], status=1), name
        path.write_text(pages[path])
    path.write_text(pages[path].replace("| 0 |", "| 1 |"))
    succeeds(report, [])
    assert path.read_text() == pages[path]
    assert (copied / "docs" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_changed_result_changes_the_tables(copied):
    tables = report.headline, report.accuracy, report.log
    path = copied / "results" / "cifar10-jpeg" / "original-bf16-seed1.csv"
    before, text = [table() for table in tables], path.read_text()
    path.write_text(text.replace(text.splitlines()[-1].split(",")[6], "12.34"))  # test_accuracy
    assert all(table() != old for table, old in zip(tables, before))


def test_a_table_without_a_place_is_refused():
    for texts in ({}, {"README.md": "<!-- headline -->\n"}):
        with pytest.raises(RunError, match="need one <!-- headline -->"):
            report.render(texts)
