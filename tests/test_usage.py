"""Wrong command lines, of every script: exit status 2, one line, nothing written."""

import os
import signal
import subprocess
import sys
import threading

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
    (train, ["two\nlines \x1b[31m\udcff é"], r"two lines \x1b[31m\udcff é"),
    (train, ["--epoch", 3], "--epoch"),  # flags cannot be abbreviated
    (train, ["--epochs", "ten"], "--epochs: ten is not a whole number from 1"),
    (train, ["--epochs", 0], "--epochs: 0 is not"),
    (train, ["--recipe", "other"], "--recipe: invalid choice"),
    (train, ["--precision", "fp16"], "--precision: invalid choice"),
    (train, ["--epochs", 2**31 - 1], "--epochs: 2147483647 is not a whole number from 1 to 1,0"),
    (train, ["--seed=--"], "--seed has no value"),
    (train, ["--set", "no_such=1"], "--set no_such=1: no setting 'no_such'"),
    (lr_range, ["--set", "max_lr=0"], "setting max_lr must be float from 1e-30"),
    (train, ["--data", "shapes", "--val-split", 300], "shapes has 300 training images"),
    (train, ["--max-lr", "inf"], "--max-lr"),
    (train, ["--seed", -1], "--seed"),
    (train, ["--device", "mps"], "--device mps: not available here"),
    (train, ["--data", "no/such/folder"], "no/such/folder"),
    (train, ["--data", HERE], "not a folder that exists, nor one of"),
    (train, ["--data", "cifar100"], "not a folder that exists, nor one of"),
    (train, ["--data", "x" * 5000], "xxx"),
    (train, ["--data", "empty"], "empty has no folder train/"),
    (train, ["--out", "/dev/null/x"], "--out /dev/null/x"),
    (train, ["--out", HERE], "--out"),
    (train, ["--out", "dangling"], "--out dangling"),
    (train, ["--out", "taken"], "--out taken/best.pt: not a file"),
    (train, ["--resume", "empty"], "--resume empty: no last.pt there"),
    (data, ["--data", "shapes", "--out", "/dev/null/x"], "--out /dev/null"),
    (data, ["--n", 0], "--n: 0 is not"),
    (data, ["--n", 2**31 - 1], "--n: 2147483647 is not a whole number from 1 to 1,000"),
    (gradcam, ["--ckpt", "missing.pt"], "missing.pt: No such file"),
    (gradcam, ["--method", "other"], "--method: invalid choice"),
    (evaluate, ["--ckpt", "empty"], "empty: Is a directory"),
    (evaluate, [], "best.pt: No such file"),
    (evaluate, ["--tta", "other"], "--tta: invalid choice"),
    (lr_range, ["--epochs", 100_001], "--epochs: 100001 is not a whole number from 1 to 100,000"),
    (lr_range, ["--end-lr", 1e-38], "--end-lr: 1e-38 is not from 1e-30"),
    (lr_range, ["--start-lr", 1, "--end-lr", 0.1], "--start-lr"),
    (bench, ["--csv", "/dev/null/x.csv"], "--csv /dev/null"),
    (vit, ["--classes", 0], "--classes: 0 is not"),
    (vit, ["--classes", 2**31 - 1], "--classes: 2147483647 is not"),
]
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


@pytest.mark.parametrize("module", [train, lr_range, gradcam, evaluate])
def test_flags_are_parsed_before_torch_is_imported(module, tmp_path):
    """A wrong one does not wait for it; a right one is followed by a line that says so."""
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    script = ROOT / f"{module.__name__}.py"
    for args, status, out in (["--bogus"], 2, ""), ([], 7, "importing torch\n"):
        command = [sys.executable, script, *args]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (status, out)


NO_MEMORY = [
    MemoryError(),
    RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
]


@pytest.mark.parametrize("error", NO_MEMORY)
def test_no_memory_is_one_line(error, tmp_path, monkeypatch, fails):
    def load(*args):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", load)
    assert "out of memory; a smaller batch" in fails(train, ["--data", "shapes"], status=1)


@pytest.mark.parametrize("rank, size", [("abc", "2"), ("0", "-1"), ("0", None)])
def test_a_broken_environment_of_torchrun_is_one_line(rank, size, monkeypatch, fails):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", rank)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    line = fails(train, ["--data", "shapes", "--device", "cpu"])
    assert "RANK, WORLD_SIZE and the like are not as torchrun sets them" in line


def receive_ctrl_c():
    """A process that was started in the background ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_while_torch_is_imported_is_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    result = subprocess.run(
        [sys.executable, ROOT / "train.py"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=receive_ctrl_c,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")


IMPORTS = """
import os, signal, sys
before = sys.excepthook, sys.stdout, sys.stderr, signal.getsignal(signal.SIGINT), dict(os.environ)
import bench, checkpoint, data, evaluate, gradcam, lr_range, train, vit
after = sys.excepthook, sys.stdout, sys.stderr, signal.getsignal(signal.SIGINT), dict(os.environ)
assert before == after
"""


def test_an_import_changes_nothing_of_the_process():
    result = subprocess.run(
        [sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_training_runs_in_a_thread(tiny_shapes, tmp_path, monkeypatch):
    args = ["--data", "shapes", "--epochs", "1", "--batch-size", "20", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    thread = threading.Thread(target=train.main)
    thread.start()
    thread.join()
    assert (tmp_path / "best.pt").exists()


def test_a_progress_bar_fits_the_terminal(monkeypatch, capsys):
    """The numbers come first; the bar takes what is left."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for columns, text, bar in ((60, "loss 1.2", "[========"), (40, "a text of many words", "")):
        monkeypatch.setenv("COLUMNS", str(columns))
        with cli.ProgressBar("epoch", 3) as progress:
            progress.update(3, text)
        drawn, wiped = capsys.readouterr().out.split("\r\033[K")[1:]
        assert drawn.startswith("epoch 3/3, 0:00 left, " + text[:15])
        assert bar in drawn
        assert len(drawn) < columns
        assert wiped == ""


def test_a_file_gets_a_line_now_and_then(monkeypatch, capsys):
    times = iter([0.0, 1.0, 40.0, 50.0, 71.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    with cli.ProgressBar("step", 4) as progress:
        for done in range(1, 5):
            progress.update(done, lambda: "loss 2")
    assert capsys.readouterr().out == "step 2/4, 0:40 left, loss 2\nstep 4/4, 0:00 left, loss 2\n"


def test_a_closed_stdout_before_the_imports_is_no_traceback():
    command = f"{sys.executable} train.py --epochs 1 --data shapes | true"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert result.stderr == ""


def test_what_the_encoding_of_stdout_lacks_is_escaped():
    script = "import cli; cli.run_script(lambda: print('\u732b'))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("\\u732b\n", "")


@pytest.mark.parametrize("redirect", ["| head -1", ">&-"])
def test_a_closed_stdout_is_no_error(redirect):
    script = "import cli; cli.run_script(lambda: print(*range(100_000), sep=chr(10)))"
    command = f'{sys.executable} -c "{script}" {redirect}'
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert result.stderr == ""
