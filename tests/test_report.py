"""The tables of README.md and docs/ are what the files under results/ say."""

import shutil

import pytest
from conftest import ROOT

from cli import RunError
from results import report


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of all that report.py reads and writes, which it takes for the original."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "JPEG_COPY", tmp_path / "results" / "cifar10-jpeg")
    return tmp_path


def test_all_tables_are_up_to_date(succeeds):
    assert "up to date" in succeeds(report, ["--check"])


def test_a_changed_result_changes_its_tables(copied, text_figures, succeeds, fails):
    path = copied / "results" / "cifar10-jpeg" / "original-fp32-seed1.csv"
    text = path.read_text()
    assert text.count(",63.61,") == 1  # the accuracy of the last epoch
    path.write_text(text.replace(",63.61,", ",12.34,"))
    assert "out of date: README.md, results.md" in fails(report, ["--check"], status=1)

    assert "changed: README.md, results.md" in succeeds(report, [])
    assert "12.34" in (copied / "docs" / "results.md").read_text()
    assert (copied / "docs" / "curves.png").read_text() == "figure"
    succeeds(report, ["--check"])

    path.write_text(text)
    succeeds(report, [])
    assert (copied / "README.md").read_text() == (ROOT / "README.md").read_text()

    path.unlink()
    message = "not both in runs.csv and in cifar10-jpeg/: original-fp32-seed1.csv"
    assert message in fails(report, [], status=1)


def test_a_table_without_a_place_is_refused():
    for text in ("", "<!-- headline -->\n", "<!-- end of headline -->\n<!-- headline -->"):
        with pytest.raises(RunError, match="need one <!-- headline -->"):
            report.render({"README.md": text})
