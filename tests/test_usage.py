"""Wrong command lines, of every script: exit status 2, one line, nothing written."""

import io
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

import bench
import cli
import data
import evaluate
import gradcam
import lr_range
import train
import vit

NUMBERS = {  # flags that do not take 0
    train: "--epochs --batch-size --max-lr --val-split --runs --max-steps --save-every",
    data: "--n", gradcam: "--n --metrics", evaluate: "--n",
    lr_range: "--epochs --end-lr --steps-per-epoch", bench: "--rounds --steps",
    vit: "--classes",
}  # fmt: skip
CHOICES = {
    train: "--recipe --device --precision --kernels", data: "--recipe", gradcam: "--method",
    evaluate: "--tta", lr_range: "--mode --recipe", bench: "--only",
}  # fmt: skip
HERE = __file__  # a file in the place of a folder or a checkpoint
WRONG_COMMANDS = [
    (train, ["--no-such-flag"], "--no-such-flag"),
    (train, ["two\nlines \x1b[31m\udcff é"], r"two lines \x1b[31m\udcff é"),
    (train, ["--epoch", 3], "--epoch"),  # flags cannot be abbreviated
    (train, ["--epochs", "ten"], "--epochs: ten is not a whole number of at least 1"),
    (train, ["--data", "shapes", "--batch-size", 301], "301 is more than the 300 images"),
    (train, ["--set", "no_such=1"], "--set no_such=1: no setting 'no_such'"),
    (train, ["--set", "aux_frac=1.5"], "--set aux_frac=1.5: aux_frac is float from 0 to 1"),
    (lr_range, ["--set", "max_lr=0"], "--set max_lr=0: max_lr is float from 1e-30"),
    (train, ["--data", "shapes", "--val-split", 300], "shapes has 300 training images"),
    (train, ["--data", "shapes", "--val-split", 290], "more than the 10 images"),
    (train, ["--max-lr", "inf"], "--max-lr"),
    (train, ["--seed", -1], "--seed"),
    (train, ["--seed", 2**64], "--seed"),
    (train, ["--device", "mps"], "--device mps: not available here"),
    (train, ["--data", "shapes", "--device", "cpu", "--precision", "fp16"], "needs the Triton"),
    (train, ["--data", "no/such/folder"], "no/such/folder"),
    (train, ["--data", HERE], "not a folder that exists, nor one of"),
    (train, ["--data", "x" * 5000], "xxx"),
    (train, ["--data", "empty"], "empty has no folder train/"),
    (train, ["--out", "/dev/null/x"], "--out /dev/null/x"),
    (train, ["--out", HERE], "--out"),
    (train, ["--out", "dangling"], "--out dangling"),
    (train, ["--out", "taken"], "--out taken/best.pt: a directory"),
    (train, ["--resume", "empty"], "--resume empty: no last.pt there"),
    (data, ["--data", "shapes", "--out", "/dev/null/x"], "--out /dev/null"),
    (gradcam, ["--ckpt", "missing.pt"], "missing.pt: No such file"),
    (evaluate, ["--ckpt", "empty"], "empty: Is a directory"),
    (evaluate, [], "best.pt: No such file"),
    (lr_range, ["--epochs", 100_001], "--epochs: 100001 is not from 1 to 100000"),
    (lr_range, ["--end-lr", 1e-38], "--end-lr: 1e-38 is not from 1e-30"),
    (lr_range, ["--start-lr", 1, "--end-lr", 0.1], "--start-lr"),
    (lr_range, ["--data", "shapes", "--recipe", "original"], "batch_size 512 is more"),
    (bench, ["--csv", "/dev/null/x.csv"], "--csv /dev/null"),
]
for flags, value, message in ((NUMBERS, 0, "0 is not"), (CHOICES, "other", "invalid choice")):
    for module, names in flags.items():
        WRONG_COMMANDS += [(module, [x, value], f"argument {x}: {message}") for x in names.split()]
NAMES = [f"{module.__name__} {' '.join(map(str, args))[:40]}" for module, args, _ in WRONG_COMMANDS]


@pytest.mark.parametrize("command", WRONG_COMMANDS, ids=NAMES)
def test_a_wrong_command_is_one_line(command, tmp_path, small_shapes, monkeypatch, fails):
    module, args, message = command
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "taken" / "best.pt").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert message in fails(module, args)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_progress_bar_fits_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    progress = cli.ProgressBar("measuring", 3)
    progress.update(3, "a text that is longer than what is left of the line")
    progress.clear()
    drawn, wiped = capsys.readouterr().out.split("\r\033[K")[1:]
    assert drawn.startswith("measuring [=====") and len(drawn) == 59 and wiped == ""


@pytest.mark.parametrize("redirect", ["| head -1", ">&-"])
def test_a_closed_stdout_is_no_error(redirect):
    script = "import cli; cli.run_script(lambda: print(*range(100_000), sep=chr(10)))"
    command = f'{sys.executable} -c "{script}" {redirect}'
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert result.stderr == ""


@pytest.mark.parametrize(
    "script", ["bench", "data", "evaluate", "gradcam", "lr_range", "train", "vit"]
)
def test_ctrl_c_during_imports_shows_no_traceback(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.append('.'); import {script}"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "stopped\n")


def test_streams_without_unicode_or_methods(monkeypatch):
    """An ASCII terminal gets escapes; a notebook's stdout is no text file."""
    terminal, notebook = io.TextIOWrapper(io.BytesIO(), "ascii"), io.StringIO()
    for stream in (terminal, notebook):
        monkeypatch.setattr(sys, "stdout", stream)
        cli.run_script(lambda: print("é"))
    assert terminal.buffer.getvalue() == b"\\xe9\n" and notebook.getvalue() == "é\n"
