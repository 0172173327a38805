"""Checkpoints: the weights, and everything that a later script needs to use them without a flag."""

import io
import warnings

import torch

from cli import UsageError, first_line
from files import replacing
from vit import ViT

FIELDS = {"model", "sizes", "class_names", "mean", "std", "config", "epoch", "test_accuracy"}


def save(path, model, dataset, config, epoch, test_accuracy):
    """Write `path` whole. `config` holds the run's arguments and versions, of plain types; `epoch` counts from 1."""
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
    buffer = io.BytesIO()  # torch.save would report a full disk as a RuntimeError of its own
    torch.save(content, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(path, device):
    """The model, on `device` and in evaluation mode, and the checkpoint's content; nothing in the file is executed.

    Raises UsageError for a file that is missing or no checkpoint of this project.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's guesses at what a foreign file is; ours follows
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; `python train.py` writes best.pt") from None
    except Exception:  # a foreign file may fail in any way that pickle, zip or torch know, with advice of theirs
        raise UsageError(f"{path} is not a checkpoint, or a damaged one") from None
    if not isinstance(content, dict) or not FIELDS <= content.keys():
        raise UsageError(f"{path} is not a checkpoint of this project: it lacks {lacking(content)}")
    try:
        model = ViT(**content["sizes"])
        model.load_state_dict(content["model"])
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UsageError(f"{path} is not a checkpoint of this project: {first_line(error)}") from None
    return model.to(device).eval(), content


def lacking(content):
    return ", ".join(sorted(FIELDS - (content.keys() if isinstance(content, dict) else set())))
