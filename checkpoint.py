"""Checkpoints: files with weights and all that a script needs to use them."""

import io
import os
import zipfile

import torch

from cli import (
    RunError,
    UsageError,
    atomic_write,
    check_regular,
    is_out_of_memory,
    printable,
    sha256,
)
from vit import ViT


def save_checkpoint(path, model, dataset, config, epoch, test_accuracy, train_state=None):
    """Write the weights of a ViT and what scripts need to use them.

    `config` has what is known of the run, plain values by name. last.pt has a `train_state` too,
    from which the run resumes: the history, and dicts of tensors by name. All tensors of the file
    are on the CPU, so that torch.load reads it on a machine without the device of the training.
    """
    ckpt = {
        "model": on_cpu(model.state_dict()),
        "model_config": model.config,
        "class_names": list(dataset.class_names),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "config": config,
        "epoch": epoch,
        "test_accuracy": test_accuracy,
    }
    if train_state is not None:
        ckpt["train_state"] = {}
        for name, value in train_state.items():
            if isinstance(value, dict):
                value = on_cpu(value)
            ckpt["train_state"][name] = value
    ckpt["sha256"] = sha256(ckpt)
    buffer = io.BytesIO()  # torch.save reports a full disk as a RuntimeError
    torch.save(ckpt, buffer)
    with atomic_write(path) as temporary:
        # No view of the buffer: one in a traceback crashes the garbage collector of Python 3.12.1.
        temporary.write_bytes(buffer.getvalue())


def on_cpu(tensors):
    """Return tensors by name on the CPU."""
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def load_checkpoint(path, device):
    """Return (model in eval mode on `device`, checkpoint dict); runs no code from the file.

    Raises UsageError for a file that is missing, damaged or not a checkpoint of this project.
    """
    check_regular(path)
    try:
        size = os.path.getsize(path)
        with zipfile.ZipFile(path) as file:
            unpacked = sum(member.file_size for member in file.infolist())
        if unpacked > size:
            raise ValueError("compressed")  # and so perhaps larger than any memory
        # weights_only allows tensors and plain containers, and refuses whatever would run code.
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UsageError(f"{path}: {error.strerror}; `python train.py` writes best.pt") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # pickle, zip and torch raise anything for another file
        if is_out_of_memory(error):
            raise
        raise UsageError(f"{path} is not a checkpoint, or a damaged one") from None
    reason = why_not_plain(ckpt, size) or why_invalid(ckpt)
    if reason:
        raise UsageError(f"{path} is not a valid checkpoint of this project: {reason}")
    ckpt["class_names"] = [printable(name) for name in ckpt["class_names"]]
    ckpt["config"]["recipe"] = printable(ckpt["config"].get("recipe"))
    model = ViT(**ckpt["model_config"])
    model.load_state_dict(ckpt["model"])
    return model.to(device).eval(), ckpt


def why_not_plain(ckpt, size):
    """Return a line about what is no plain data in the content of a file of `size` bytes, or None.

    Plain are numbers, text and dense tensors, in lists, tuples and dicts. A small file may hold
    lists that contain each other, or an expanded tensor, and stand for more than any memory has. So
    what it holds is counted, each time it occurs, before anything is computed from it.
    """
    left = 2 * size  # weights that are not averaged are in a file once, and occur twice
    stack = [(ckpt, 0)]  # values to look at, and their depth
    while stack:
        value, depth = stack.pop()
        left -= 1
        if type(value) is dict:
            stack += [(item, depth + 1) for item in value.items()]
        elif type(value) in (list, tuple):
            stack += [(item, depth + 1) for item in value]
        elif type(value) is str:
            left -= len(value)
        elif torch.is_tensor(value):
            if not is_plain_tensor(value):
                return f"it holds a tensor that is {value.dtype}, {value.layout}, {value.device}"
            left -= value.nbytes
        elif type(value) is int and value.bit_length() > 64:
            return "it holds a number of more than 64 bits"
        elif type(value) not in (int, float, bool, type(None)):
            return f"it holds a {type(value).__name__}"
        if depth > 10:
            return "it holds values too deep within each other"
        if left < 0:
            return "it holds more than its file"
    return None


def is_plain_tensor(tensor):
    """Return whether numpy, and so the sha256, can have the bits of a tensor as they are."""
    is_dense = tensor.layout is torch.strided and tensor.device.type == "cpu"
    return is_dense and tensor.dtype in (torch.float32, torch.float64) and not tensor.is_neg()


TYPES = {
    "model": dict,
    "model_config": dict,
    "class_names": list,
    "mean": list,
    "std": list,
    "config": dict,
    "epoch": int,
    "sha256": str,
}


def why_invalid(ckpt):
    """Return a line about what a loaded object lacks for a checkpoint, or None."""
    if type(ckpt) is not dict:
        return "it holds no dict"
    for key, type_ in TYPES.items():
        if type(ckpt.get(key)) is not type_:
            return f"{key} is missing, or no {type_.__name__}"
    config = ckpt["config"]
    if type(config.get("data")) is not str or type(config.get("data_dir", "")) is not str:
        return "its config does not name the data"
    names = ckpt["class_names"]
    if not all(type(name) is str for name in names):
        return "a class name is no text"
    for key in ("mean", "std"):
        values = ckpt[key]
        if len(values) != 3 or not all(type(x) is float and 0 <= x <= 1 for x in values):
            return f"{key} does not have three numbers from 0 to 1"
    if 0.0 in ckpt["std"]:
        return "std is 0"
    reason = why_weights_do_not_fit(ckpt["model_config"], ckpt["model"])
    if reason:
        return reason
    if len(names) != ckpt["model_config"]["num_classes"]:
        return "it does not have a name for each class"
    content = {key: value for key, value in ckpt.items() if key != "sha256"}
    if sha256(content) != ckpt["sha256"]:
        return "its sha256 does not match its content"
    return None


def why_weights_do_not_fit(sizes, weights):
    """Return a line about why a ViT of these sizes does not have these weights, or None."""
    if sizes.keys() != ViT().config.keys():
        return "the sizes of the network are not those of vit.ViT"
    for name, value in sizes.items():
        if type(value) is not int or not 1 <= value <= 65_536:
            return f"{name} is {value!r}"
    if sizes["image_size"] != 32 or sizes["in_channels"] != 3 or sizes["patch_size"] > 32:
        return "images are not 3 x 32 x 32"
    if sizes["depth"] > len(weights) or 32 % sizes["patch_size"]:
        return "the sizes of the network do not fit its weights"
    with torch.device("meta"):  # sizes are held to the weights before any memory is taken
        expected = ViT(**sizes).state_dict()
    reason = why_tensors_differ(weights, expected)
    if reason:
        return reason
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            return f"{name} is not finite"
    return None


def why_tensors_differ(found, expected):
    """Return a line about a difference of two {name: tensor} in name, shape or dtype, or None."""
    if type(found) is not dict or found.keys() != expected.keys():
        return "the names of its tensors are others"
    for name, tensor in expected.items():
        value = found[name]
        if not torch.is_tensor(value) or value.shape != tensor.shape or value.dtype != tensor.dtype:
            return f"{name} is not a tensor {tuple(tensor.shape)} of {tensor.dtype}"
    return None
