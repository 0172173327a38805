"""The host's code on a GPU that is not there: CPU tensors that are taken for tensors on cuda."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch
from conftest import FakeRank, only_run, small_recipe, train_epoch
from PIL import Image
from torch.overrides import TorchFunctionMode
from triton.runtime.interpreter import GridExecutor

import data
import evaluate
import gradcam
import lr_range
import train
from checkpoint import load_checkpoint
from cli import RunError
from kernels import step
from runtime import Runtime, tune_process
from train import Trainer, environment

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
# What reads a property of a tensor, or makes a view of it, and touches no element.
HARMLESS = ("__get__", "numel", "dim", "size", "stride", "view", "data_ptr", "untyped_storage")
HARMLESS += ("storage_offset", "element_size", "__len__", "is_contiguous", "__set__")
HARMLESS += ("_has_compatible_shallow_copy_type",)
COPIES = ("to", "cpu", "copy_")  # from one device to another


class FakeGPU(TorchFunctionMode):
    """Knows on which device every storage would be, and refuses what a GPU would refuse.

    That is an operation on tensors of two devices, and any operation while a graph is captured. A
    storage of which nothing is known, made in the middle of an operation, is where it is used.
    """

    def __init__(self):
        super().__init__()
        self.devices = {}  # address of a storage -> its device
        self.storages = []  # kept, so that no address is used again
        self.launches = None  # those of the graph that is captured

    def device_of(self, tensor):
        return self.devices.get(tensor.untyped_storage()._cdata)

    def place(self, tensors, device):
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.devices.setdefault(storage._cdata, device)
            self.storages.append(storage)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.__name__
        # In here the mode is off: the device of a tensor is the real one, the CPU or meta.
        tensors = tensors_in((args, kwargs))
        # A number, a tensor without dimensions, may be on the CPU, but for the fused optimizers.
        mixing = [t for t in tensors if t.dim() > 0 or name.startswith("_fused")]
        devices = {self.device_of(t) for t in mixing if t.device == CPU} - {None}
        if func == torch.Tensor.device.__get__ and self.device_of(args[0]) == CUDA:
            return CUDA
        if self.launches is not None and CUDA in devices and name not in HARMLESS:
            raise RuntimeError(f"{name} in a graph that is captured")
        if name == "__set__":
            return func(*args, **kwargs)
        if len(devices) == 2 and name not in COPIES + HARMLESS:
            raise RuntimeError(f"{name} of tensors on two devices")
        if name == "numpy" and CUDA in devices:
            raise RuntimeError("numpy of a tensor on cuda")

        # The device that is asked for, if one is. In its place the CPU makes the tensor.
        asked = kwargs.get("device")
        if name == "cpu":
            asked = CPU
        if name == "to":
            for argument in args:
                if isinstance(argument, str | torch.device):
                    asked = argument
        if asked is not None:
            asked = torch.device(asked)
        if asked is not None and asked.type == "cuda":
            asked = CUDA
            args = [CPU if isinstance(a, str | torch.device) else a for a in args]
            if "device" in kwargs:
                kwargs["device"] = CPU

        # The result is there, or else where the tensors are, or without any on the CPU.
        result = func(*args, **kwargs)
        where = asked
        if asked is None and len(devices) == 1:
            (where,) = devices
        if asked is None and not tensors:
            where = CPU
        if name in ("to", "cpu") and devices and where not in devices:
            result = result.clone()  # on the CPU they would be one tensor
        if where is not None and where.type != "meta":
            self.place(tensors_in(result), where)
            if name not in COPIES:
                self.place([t for t in tensors if t.dim() > 0], where)
        return result


def tensors_in(value):
    """The tensors in a nest of tuples, lists and dicts."""
    if torch.is_tensor(value):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]


class FakeGraph:
    """Replays the launches that were made while it was captured."""

    def __init__(self, gpu):
        self.gpu = gpu
        self.launches = []

    @contextlib.contextmanager
    def capture(self):
        self.gpu.launches = self.launches
        try:
            yield
        finally:
            self.gpu.launches = None

    def replay(self):
        for executor, args, kwargs in self.launches:
            executor(*args, **kwargs)


class GeneratorOfAnyDevice(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls)


@pytest.fixture
def gpu(monkeypatch):
    """In the test, a FakeGPU of compute capability 9.0 is there."""
    gpu = FakeGPU()
    launch = GridExecutor.__call__

    def launch_or_record(executor, *args, **kwargs):
        if gpu.launches is not None:
            gpu.launches.append((executor, args, kwargs))
            return
        for tensor in tensors_in((args, kwargs)):
            assert gpu.device_of(tensor) == CUDA
        with torch._C.DisableTorchFunction():
            launch(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launch_or_record)
    monkeypatch.setattr(step, "INTERPRETED", False)
    monkeypatch.setattr(torch, "Generator", GeneratorOfAnyDevice)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "no GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(gpu))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: graph.capture())
    with gpu:
        yield gpu


def test_the_fake_is_strict(gpu):
    a = torch.ones(2, device="cuda")
    b = torch.ones(2)
    assert a.device == (a + 1).device == (a * torch.tensor(2.0)).device == CUDA
    assert b.device == (b + 1).device == a.cpu().device == CPU
    assert b.to("cuda").device == CUDA
    with pytest.raises(RuntimeError, match="two devices"):
        a + b
    with pytest.raises(RuntimeError, match="numpy"):
        a.numpy()
    with pytest.raises(RuntimeError, match="captured"), FakeGraph(gpu).capture():
        a.sum().item()


@pytest.fixture
def few_shapes(monkeypatch, text_figures):
    """`--data shapes` is 3 training and 10 test images: the interpreter takes a second an image."""
    few = data.load_shapes(3, 10)
    monkeypatch.setattr(data, "load_shapes", lambda: few)


def test_scripts_run_on_a_gpu(gpu, tiny_shapes, tmp_path, monkeypatch, succeeds):
    """In PyTorch, with all that a recipe may have."""
    monkeypatch.setattr(lr_range, "MIN_STEPS", 3)
    monkeypatch.setattr(lr_range, "NUM_LRS", (2, 2))
    args = ["--data", "shapes", "--device", "cuda", "--out", tmp_path, "--kernels", "torch"]
    recipe = ["--recipe", "original", "--set", "weight_avg_frac=0.4"]
    succeeds(train, [*args, *recipe, "--batch-size", 8, "--epochs", 2])
    ckpt = ["--ckpt", tmp_path / "best.pt", "--device", "cuda", "--out", tmp_path]
    succeeds(evaluate, [*ckpt, "--tta", "shift"])
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    succeeds(evaluate, [*ckpt, "--images", tmp_path / "a.png"])
    succeeds(gradcam, [*ckpt, "--n", 2])
    succeeds(gradcam, [*ckpt, "--metrics", 4])
    succeeds(lr_range, [*args, *recipe, "--set", "batch_size=8", "--epochs", 10])


def test_a_training_by_captured_kernels(gpu, few_shapes, tmp_path, monkeypatch, succeeds):
    """Its bits are those of kernels that are launched one by one; config.json says what runs.

    Files hold no tensor of the GPU.
    """

    def save(ckpt, file):
        for tensor in tensors_in([ckpt]):
            assert gpu.device_of(tensor) == CPU
        torch_save(ckpt, file)

    torch_save = torch.save
    monkeypatch.setattr(torch, "save", save)
    args = ["--data", "shapes", "--epochs", 2, "--batch-size", 2, "--kernels", "triton"]
    captured = ["--device", "cuda", "--precision", "fp32", "--out", tmp_path / "captured"]
    printed = succeeds(train, [*args, *captured])
    assert printed.count("compiling and checking") == 1
    config = json.loads((only_run(tmp_path / "captured") / "config.json").read_text())
    assert config["runs_on"] == "cuda (no GPU), fp32, Triton kernels"

    monkeypatch.setattr(step, "INTERPRETED", True)
    single = ["--device", "cuda", "--precision", "fp32", "--out", tmp_path / "single"]
    succeeds(train, [*args, *single])
    _, expected = load_checkpoint(tmp_path / "single" / "best.pt", "cpu")
    _, actual = load_checkpoint(tmp_path / "captured" / "best.pt", "cpu")
    for name, weight in expected["model"].items():
        assert torch.equal(actual["model"][name], weight)


@pytest.fixture
def make_with(gpu, small, monkeypatch):
    """make_with(self_test): a Trainer on the fake GPU, always of the same Runtime."""
    dataset = small.to("cuda")
    runtime = Runtime("cuda", "fp32")

    def make(self_test, batch_size=100):
        monkeypatch.setattr(step, "self_test", self_test)
        return Trainer(small_recipe(batch_size=batch_size), dataset, runtime, seed=1)

    return make


def test_one_test_serves_all_trainings_of_a_process(make_with, capsys):
    tested = []
    first = make_with(tested.append)
    second = make_with(tested.append)
    assert first.fused_step is not second.fused_step
    assert tested == [first.fused_step]
    assert capsys.readouterr().out.count("compiling") == 1
    third = make_with(tested.append, batch_size=50)
    assert tested == [first.fused_step, third.fused_step]  # other kernels


@pytest.mark.parametrize(
    "error, advice",
    [
        (subprocess.CalledProcessError(1, ["gcc", "cuda_utils.c"]), "apt install gcc python3-dev"),
        (AssertionError("libcuda.so cannot found!"), "libcuda.so cannot found!; the network runs"),
        (ImportError("cuda_utils.so: failed to map segment"), "failed to map segment; the network"),
    ],
)
def test_without_a_compiler_pytorch_trains(error, advice, make_with, capsys):
    """The line says what to install, and what runs is recorded."""

    def self_test(fused):
        raise error

    trainer = make_with(self_test)
    assert advice in capsys.readouterr().err
    assert environment(trainer)["runs_on"].endswith("PyTorch")
    assert not trainer.runtime.finds_triton()  # the next training does not try again
    train_epoch(trainer, 0)


def test_without_triton_pytorch_trains(gpu, monkeypatch, capsys):
    """One line says so, however many trainings there are."""
    monkeypatch.setitem(sys.modules, "triton", None)
    runtime = Runtime("cuda", "fp32")
    assert not runtime.finds_triton()
    assert not runtime.finds_triton()
    assert capsys.readouterr().err.count("Triton is missing") == 1


def test_convolutions_of_the_scripts_are_exact_and_repeatable(monkeypatch):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    monkeypatch.setattr(cudnn, "deterministic", False)
    tune_process(torch.device("cuda"))
    assert cudnn.deterministic and not cudnn.allow_tf32


def test_ranks_evaluate_on_their_gpus(make_with, monkeypatch):
    trainer = make_with(lambda fused: None)
    monkeypatch.setattr(trainer.runtime, "ranks", FakeRank(1, 2))
    monkeypatch.setattr("runtime.EVAL_BATCH_SIZE", 60)
    images = trainer.dataset.test_images
    logits = trainer.runtime.predict(trainer.model, trainer.normalize, images)
    assert logits.device == CUDA
    assert not logits[:60].any() and logits[60:].any()


def test_without_memory_for_the_kernels_pytorch_trains(make_with, capsys):
    """It needs less: the kernels hold the augmented images of a whole epoch."""

    def self_test(fused):
        raise torch.OutOfMemoryError("CUDA out of memory")

    train_epoch(make_with(self_test), 0)
    assert "CUDA out of memory; the network runs in plain PyTorch" in capsys.readouterr().err


def test_an_illegal_access_ends_the_run(make_with, monkeypatch):
    """No later operation of the process would work."""

    def fail(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(RunError, match="illegal memory access .*; try --kernels torch"):
        make_with(fail)
