"""Picture files as tensors: one, or a folder of them, decoded once and kept."""

import contextlib
import hashlib
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from cifar import SIDE
from cli import Progress, RunError, UsageError, first_line
from files import replacing

LITTER = "thumbs.db", "desktop.ini"  # that file managers leave in folders
MAX_PIXELS = 2**26  # of a picture file, 8192 x 8192: a larger one is a mistake or a bomb


def read_folder(folder, data_dir):
    """train/<class>/* and test/<class>/* pictures of any size, resized to 32x32 and kept in data_dir.

    Returns pictures uint8 (N, 3, 32, 32), labels int64 (N,), which pictures are of train, bool (N,), and the class names.
    """
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
    labels = torch.tensor([label for _, label, _ in listing])
    is_train = torch.tensor([part == "train" for part, _, _ in listing])
    return torch.from_numpy(images), labels, is_train, class_names


def list_pictures(folder):
    """[(part, label, path)] and the class names, both sorted; raises UsageError where the layout is another."""

    def visible(path):
        return sorted(entry for entry in path.iterdir() if not entry.name.startswith(".") and entry.name.lower() not in LITTER)

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
        raise UsageError(f"{folder}: class {odd!r} is in {'train' if odd in names['train'] else 'test'}/ alone")
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
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, contextlib.closing(pool.map(decode_one, paths)) as decoded:
            for i, image in enumerate(decoded):
                images[i] = image
                progress.update(i + 1)
    finally:
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
                raise ValueError(f"its mode is {image.mode}, not RGB; convert it first")
            image = image.convert("RGB")
            if image.size != (SIDE, SIDE):
                image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            return np.asarray(image).transpose(2, 0, 1)  # (32, 32, 3) -> (3, 32, 32)
    except Exception as error:  # a decoder may raise anything on a broken file
        raise RunError(f"{path} cannot be read as a picture ({first_line(error)})") from None
