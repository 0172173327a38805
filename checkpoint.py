"""Checkpoints: the weights, and everything that a later script needs to use them without a flag.

`best.pt` is that alone; `last.pt` also holds, as `progress`, what its run needs to go on.
"""

import hashlib
import io
import warnings

import torch

from cli import UsageError, first_line
from files import replacing
from vit import ViT

FIELDS = {"model", "sizes", "class_names", "mean", "std", "config", "epoch", "test_accuracy", "sha256"}


def save(path, model, dataset, config, epoch, test_accuracy, progress=None):
    """Write `path` whole. `config` holds the run's arguments and versions, of plain types.

    `epoch` counts whole epochs; `test_accuracy` is None for weights that were not evaluated. `progress` is of plain
    types and tensors.
    """
    content = {
        "model": {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()},
        "sizes": model.sizes,
        "class_names": list(dataset.class_names),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "config": config,
        "epoch": epoch,
        "test_accuracy": test_accuracy,
    }
    if progress is not None:
        content["progress"] = progress
    content["sha256"] = sha256(content)
    buffer = io.BytesIO()  # torch.save would report a full disk as a RuntimeError of its own
    torch.save(content, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(path, device):
    """The model, on `device` and in evaluation mode, and the checkpoint's content; nothing in the file is executed.

    Raises UsageError for a file that is missing, damaged or no checkpoint of this project.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's guesses at what a foreign file is; ours follows
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; `python train.py` writes best.pt") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder; a checkpoint is a file, such as best.pt in it") from None
    except Exception:  # a foreign file may fail in any way that pickle, zip or torch know, with advice of theirs
        raise UsageError(f"{path} is not a checkpoint, or a damaged one") from None
    missing = FIELDS - (content.keys() if isinstance(content, dict) else set())
    if missing:
        raise UsageError(f"{path} is not a checkpoint of this project: it lacks {', '.join(sorted(missing))}")
    try:
        model = restore(content)
    except Exception as error:  # any value may stand in any place
        raise UsageError(f"{path} is not a checkpoint of this project, or a damaged one: {first_line(error)}") from None
    return model.to(device).eval(), content


def restore(content):
    """The model of a checkpoint's content; raises an exception of any type where one thing does not fit another."""
    if sha256({name: value for name, value in content.items() if name != "sha256"}) != content["sha256"]:
        raise ValueError("its sha256 is not that of its content")
    weights, sizes, config = content["model"], content["sizes"], content["config"]
    if sizes["depth"] > len(weights) or any(tensor.dtype != torch.float32 for tensor in weights.values()):
        raise ValueError("its weights are not those of its sizes")
    if not (len(content["mean"]) == len(content["std"]) == 3 and all(0 <= value < 1 for value in (*content["mean"], *content["std"]))):
        raise ValueError("its mean and std are not three numbers each in [0, 1)")
    if len(content["class_names"]) != sizes["num_classes"] or not all(isinstance(text, str) for text in (*content["class_names"], config["data"])):
        raise ValueError("its class names or its data set are no names")
    with torch.device("meta"):  # sizes that no memory holds are told from the weights before any is taken
        model = ViT(**sizes)
    model.load_state_dict(weights, assign=True)
    return model


def sha256(value):
    """Hexadecimal digest of tensors and plain values in dicts, lists and tuples: of every bit that counts."""
    digest = hashlib.sha256()

    def add(value):
        if torch.is_tensor(value):
            digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, (dict, list, tuple)):
            digest.update(f"{type(value).__name__} {len(value)} ".encode())
            for part in value.items() if isinstance(value, dict) else value:
                add(part)
        else:
            digest.update(f"{value!r} ".encode())

    add(value)
    return digest.hexdigest()
