"""Every mistake that a command line can hold, over all scripts: exit status 2, one line, no traceback, nothing written."""

import pytest

import bench
import cli
import data
import evaluate
import gradcam
import lr_range
import train
import vit

HERE = __file__  # a file where a folder, a checkpoint or a table belongs
WRONG_COMMANDS = [
    (train, ["--no-such-flag"], "--no-such-flag"),
    (train, ["nonsense"], "nonsense"),
    (train, ["two\nlines"], "two lines"),
    (train, ["--epoch", 3], "--epoch"),  # no flag may be cut short
    (train, ["--epochs"], "--epochs"),
    (train, ["--epochs", 0], "--epochs: 0 is not a whole number of at least 1"),
    (train, ["--epochs", "ten"], "--epochs: ten is not a whole number of at least 1"),
    (train, ["--batch-size", 0], "--batch-size"),
    (train, ["--data", "shapes", "--batch-size", 301], "batches of 301 are larger than the 300 training pictures of shapes; --set batch_size=300 would fit"),
    (train, ["--data", "shapes", "--recipe", "original"], "batches of 512 are larger than the 300 training pictures"),
    (train, ["--set", "no_such=1"], "--set no_such=1: there is no setting 'no_such'; recipe.py and augment.py name them all"),
    (train, ["--set", "batchsize=64"], "is it batch_size?"),
    (train, ["--set", "warp_p=0.5"], "does nothing while warp_shift, warp_scale and warp_degrees are 0"),
    (train, ["--set", "cutout_p=0.5"], "does nothing while cutout_size is 0"),
    (lr_range, ["--set", "max_lr=0"], "--set max_lr=0: max_lr is a number above 0"),
    (train, ["--set", "augmentation=1"], "there is no setting 'augmentation'"),
    (train, ["--set", "crop_padding"], "NAME=VALUE is wanted"),
    (train, ["--set", "crop_padding="], "crop_padding is a whole number of at least 0 and at most 31"),
    (train, ["--set", "crop_padding=2.5"], "crop_padding is a whole number"),
    (train, ["--set", "crop_padding=32"], "at most 31"),
    (train, ["--set", "weight_decay=-1"], "weight_decay is a number of at least 0"),
    (train, ["--set", "weight_decay=inf"], "weight_decay is a number"),
    (train, ["--set", "max_lr=0"], "max_lr is a number above 0"),
    (train, ["--set", "max_lr=nan"], "max_lr is a number above 0"),
    (train, ["--set", "beta2=1"], "beta2 is a number of at least 0 and at most 0.9999"),
    (train, ["--set", "pooled_start=1"], "pooled_start is one of True, False"),
    (train, ["--set", "optimizer=sgd"], "optimizer is one of adamw, muon"),
    (train, ["--val-split", 0], "--val-split"),
    (train, ["--data", "shapes", "--val-split", 300], "--val-split 300: shapes has 300 training pictures"),
    (train, ["--data", "shapes", "--val-split", 290], "are larger than the 10 training pictures of shapes-val290"),
    (train, ["--max-lr", 0], "--max-lr"),
    (train, ["--max-lr", "nan"], "--max-lr"),
    (train, ["--max-lr", "inf"], "--max-lr"),
    (train, ["--runs", 0], "--runs"),
    (train, ["--seed", -1], "--seed"),
    (train, ["--seed", 2**64], "--seed"),
    (train, ["--max-steps", 0], "--max-steps"),
    (train, ["--save-every", 0], "--save-every"),
    (train, ["--recipe", "best"], "--recipe"),
    (train, ["--device", "tpu"], "--device"),
    (train, ["--device", "mps"], "--device mps: this machine, or this build of torch, has none"),
    (train, ["--precision", "fp8"], "--precision"),
    (train, ["--kernels", "fast"], "--kernels"),
    (train, ["--data", "no/such/folder"], "no/such/folder"),
    (train, ["--data", ""], "neither a folder that exists nor one of"),
    (train, ["--data", HERE], "neither a folder that exists nor one of"),
    (train, ["--data", "x" * 5000], "xxx"),
    (train, ["--data", "empty"], "empty has no folder train/"),
    (train, ["--out", "/dev/null/x"], "--out /dev/null/x"),
    (train, ["--out", HERE], "--out"),
    (train, ["--resume", "nowhere"], "--resume nowhere: no run is kept there"),
    (train, ["--resume", "empty"], "--resume empty: no run is kept there"),
    (train, ["--resume", HERE], "is not a checkpoint"),
    (data, ["--n", 0], "--n"),
    (data, ["--recipe", "none"], "--recipe"),
    (data, ["--data", "shapes", "--out", "/dev/null/x.png"], "--out /dev/null"),
    (data, ["--data", "shapes", "--out", "empty"], "--out empty"),
    (gradcam, ["--ckpt", "missing.pt"], "missing.pt does not exist"),
    (gradcam, ["--method", "saliency"], "--method"),
    (gradcam, ["--n", 0], "--n"),
    (gradcam, ["--metrics", 0], "--metrics"),
    (gradcam, ["--metrics", 10, "--correct"], "--metrics is about test pictures of all kinds"),
    (gradcam, ["--metrics", 10, "--class", "cat"], "--metrics is about test pictures of all kinds"),
    (gradcam, ["--image"], "--image"),
    (gradcam, ["--image", HERE, "--correct"], "--image is about pictures of yours"),
    (evaluate, ["--ckpt", "missing.pt"], "missing.pt does not exist"),
    (evaluate, ["--ckpt", HERE], "is not a checkpoint"),
    (evaluate, ["--ckpt", "empty"], "empty is a folder; a checkpoint is a file"),
    (evaluate, [], "best.pt does not exist"),
    (evaluate, ["--tta", "rotate"], "--tta"),
    (evaluate, ["--n", 0], "--n"),
    (lr_range, ["--epochs", 0], "--epochs"),
    (lr_range, ["--start-lr", 1, "--end-lr", 0.1], "--start-lr 1 is not below --end-lr 0.1"),
    (lr_range, ["--start-lr", 1], "--start-lr 1 is not below --end-lr 1"),
    (lr_range, ["--mode", "exp", "--start-lr", 0], "above 0 with --mode exp"),
    (lr_range, ["--start-lr", -1], "--start-lr -1"),
    (lr_range, ["--start-lr", "nan"], "--start-lr nan"),
    (lr_range, ["--start-lr", "low"], "--start-lr"),
    (lr_range, ["--end-lr", 0], "--end-lr"),
    (lr_range, ["--mode", "log"], "--mode"),
    (lr_range, ["--diverge", 0], "--diverge"),
    (lr_range, ["--steps-per-epoch", 0], "--steps-per-epoch"),
    (lr_range, ["--val", "yes"], "yes"),
    (lr_range, ["--data", "shapes", "--recipe", "original"], "batches of 512 are larger than the 300"),
    (bench, ["--rounds", 0], "--rounds"),
    (bench, ["--steps", -3], "--steps"),
    (bench, ["--way", "fastest"], "--way"),
    (bench, ["--csv"], "--csv"),
    (bench, ["--csv", "/dev/null/x.csv"], "--csv /dev/null"),
    (bench, ["--scaling", "--resources"], "--resources"),
    (bench, ["--speed"], "--speed"),
    (vit, ["--classes", 0], "--classes"),
    (vit, ["--depth", 3], "--depth"),
]


@pytest.mark.parametrize("module, arguments, told", WRONG_COMMANDS, ids=lambda value: value.__name__ if hasattr(value, "__name__") else None)
def test_a_mistake_is_one_line_and_exit_status_2(module, arguments, told, tmp_path, small_shapes, monkeypatch, invoke):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    status, _, err = invoke(module, arguments)
    assert status == 2 and told in err and err.startswith(f"{module.__name__}.py: error: ") and err.count("\n") == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_progress_bar_fits_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    progress = cli.Progress("measuring", 3)
    progress.update(3, "a text that is longer than what is left of the line")
    progress.clear()
    drawn, wiped = capsys.readouterr().out.split("\r\033[K")[1:]
    assert drawn.startswith("measuring [=====") and len(drawn) == 59 and wiped == ""
