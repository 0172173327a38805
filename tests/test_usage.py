"""Wrong command lines, of every script: exit status 2, one line, nothing written."""

import os
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

HERE = __file__  # a file in the place of a folder or a checkpoint
WRONG_COMMANDS = [
    (train, ["--no-such-flag"], "--no-such-flag"),
    (train, ["nonsense"], "nonsense"),
    (train, ["two\nlines \x1b[31m"], r"two lines \x1b[31m"),
    (train, ["--epoch", 3], "--epoch"),  # flags cannot be abbreviated
    (train, ["--epochs"], "--epochs"),
    (train, ["--epochs", 0], "--epochs: 0 is not a whole number of at least 1"),
    (train, ["--epochs", "ten"], "--epochs: ten is not a whole number of at least 1"),
    (train, ["--epochs", "9" * 20], "--epochs"),
    (train, ["--batch-size", 0], "--batch-size"),
    (train, ["--data", "shapes", "--batch-size", 301], "301 is more than the 300 images"),
    (train, ["--data", "shapes", "--recipe", "original"], "more than the 300 images"),
    (train, ["--set", "no_such=1"], "--set no_such=1: no setting 'no_such'"),
    (train, ["--set", "affine_p=0.5"], "affine_p has no effect"),
    (lr_range, ["--set", "max_lr=0"], "--set max_lr=0: max_lr is float from 1e-30"),
    (train, ["--val-split", 0], "--val-split"),
    (train, ["--data", "shapes", "--val-split", 300], "shapes has 300 training images"),
    (train, ["--data", "shapes", "--val-split", 290], "more than the 10 images"),
    (train, ["--max-lr", 0], "--max-lr"),
    (train, ["--max-lr", "nan"], "--max-lr"),
    (train, ["--max-lr", "inf"], "--max-lr"),
    (train, ["--max-lr", "1e-320"], "--max-lr"),
    (train, ["--runs", 0], "--runs"),
    (train, ["--seed", -1], "--seed"),
    (train, ["--seed", 2**64], "--seed"),
    (train, ["--max-steps", 0], "--max-steps"),
    (train, ["--save-every", 0], "--save-every"),
    (train, ["--recipe", "best"], "--recipe"),
    (train, ["--device", "tpu"], "--device"),
    (train, ["--device", "mps"], "--device mps: not available here"),
    (train, ["--precision", "fp8"], "--precision"),
    (train, ["--kernels", "fast"], "--kernels"),
    (train, ["--data", "no/such/folder"], "no/such/folder"),
    (train, ["--data", ""], "not a folder that exists, nor one of"),
    (train, ["--data", HERE], "not a folder that exists, nor one of"),
    (train, ["--data", "x" * 5000], "xxx"),
    (train, ["--data", "empty"], "empty has no folder train/"),
    (train, ["--out", "/dev/null/x"], "--out /dev/null/x"),
    (train, ["--out", HERE], "--out"),
    (train, ["--out", "dangling"], "--out dangling"),
    (train, ["--resume", "nowhere"], "--resume nowhere: no last.pt there"),
    (train, ["--resume", "empty"], "--resume empty: no last.pt there"),
    (train, ["--resume", HERE], "is not a checkpoint"),
    (data, ["--n", 0], "--n"),
    (data, ["--recipe", "none"], "--recipe"),
    (data, ["--data", "shapes", "--out", "/dev/null/x"], "--out /dev/null"),
    (gradcam, ["--ckpt", "missing.pt"], "missing.pt: No such file"),
    (gradcam, ["--method", "saliency"], "--method"),
    (gradcam, ["--n", 0], "--n"),
    (gradcam, ["--metrics", 0], "--metrics"),
    (gradcam, ["--metrics", 10, "--correct"], "--metrics"),
    (gradcam, ["--metrics", 10, "--class", "cat"], "--metrics"),
    (gradcam, ["--image"], "--image"),
    (gradcam, ["--image", HERE, "--correct"], "--image"),
    (evaluate, ["--ckpt", "missing.pt"], "missing.pt: No such file"),
    (evaluate, ["--ckpt", HERE], "is not a checkpoint"),
    (evaluate, ["--ckpt", "empty"], "empty: Is a directory"),
    (evaluate, [], "best.pt: No such file"),
    (evaluate, ["--tta", "rotate"], "--tta"),
    (evaluate, ["--n", 0], "--n"),
    (lr_range, ["--epochs", 0], "--epochs"),
    (lr_range, ["--epochs", "9" * 20], "--epochs"),
    (lr_range, ["--start-lr", 1, "--end-lr", 0.1], "--start-lr"),
    (lr_range, ["--start-lr", 1], "--start-lr"),
    (lr_range, ["--mode", "exp", "--start-lr", 0], "--start-lr"),
    (lr_range, ["--start-lr", -1], "--start-lr"),
    (lr_range, ["--start-lr", "nan"], "--start-lr"),
    (lr_range, ["--end-lr", 0], "--end-lr"),
    (lr_range, ["--mode", "log"], "--mode"),
    (lr_range, ["--data", "shapes", "--recipe", "original"], "batch_size 512 is more"),
    (bench, ["--rounds", 0], "--rounds"),
    (bench, ["--steps", -3], "--steps"),
    (bench, ["--variant", "fastest"], "--variant"),
    (bench, ["--csv"], "--csv"),
    (bench, ["--csv", "/dev/null/x.csv"], "--csv /dev/null"),
    (bench, ["--scaling", "--resources"], "--resources"),
    (vit, ["--classes", 0], "--classes"),
    (vit, ["--depth", 3], "--depth"),
]
NAMES = [f"{module.__name__} {' '.join(map(str, args))[:40]}" for module, args, _ in WRONG_COMMANDS]


@pytest.mark.parametrize("module, args, message", WRONG_COMMANDS, ids=NAMES)
def test_a_wrong_command_is_one_line(
    module, args, message, tmp_path, small_shapes, monkeypatch, invoke
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    status, _, err = invoke(module, args)
    assert status == 2 and message in err, err
    assert err.startswith(f"{module.__name__}.py: error: ") and err.count("\n") == 1
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
def test_a_closed_stdout_shows_no_traceback(redirect):
    command = f"{sys.executable} vit.py {redirect}"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in result.stderr and result.stderr.count("\n") <= 1


def test_what_is_not_printable_is_escaped():
    assert cli.printable("a\x1b[31m\nb\udcff é") == r"a\x1b[31m b\udcff é"
    assert os.fsdecode(b"\xff") != cli.printable(os.fsdecode(b"\xff"))
