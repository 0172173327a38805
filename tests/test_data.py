"""Datasets: the CIFAR-10 archive, folders of images, shapes, statistics, splits, the script."""

import contextlib
import hashlib
import io
import os
import pickle
import pickletools
import shutil
import socket
import struct
import sys
import tarfile
import threading
import time
import unicodedata
import warnings
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import Malicious, write_images
from PIL import Image

import data
from augment import Normalize, augment, epoch_plan
from cli import RunError, UsageError
from recipes import RECIPES
from shapes import generate_shapes

# --- the CIFAR-10 archive ---


def batch(seed):
    """Return the content of a file of the archive: 20 images and their labels."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (20, 3072), np.uint8)
    return {b"data": images, b"labels": (rng.permutation(20) % 10).tolist()}


def small_files():
    """Return {name: content} of an archive with 20 images a file."""
    names = [*data.TRAIN_FILES, data.TEST_FILE]
    files = {name: batch(seed) for seed, name in enumerate(names)}
    files[data.NAMES_FILE] = {b"label_names": [b"%d" % i for i in range(10)]}
    return files


def python2_pickle(content):
    """Return a pickle as in the official archive, which Python 2 wrote: its strings are bytes."""
    result = bytearray(pickle.dumps(content, protocol=3).replace(b"numpy._core", b"numpy.core"))
    old_opcodes = {"BINBYTES": b"T", "SHORT_BINBYTES": b"U", "BINUNICODE": b"T"}
    for opcode, _, position in list(pickletools.genops(bytes(result))):
        if opcode.name in old_opcodes:
            result[position : position + 1] = old_opcodes[opcode.name]
    return bytes(result)


def archive_of(files):
    """Return an archive, bytes, of {name: bytes, or an object to pickle}."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, dict):
                content = python2_pickle(content)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive.getvalue()


@pytest.fixture
def official(tmp_path, monkeypatch):
    """Make a small archive the official one; returns its path, which is the only mirror."""
    content = archive_of(small_files())
    path = tmp_path / "mirror.tar.gz"
    path.write_bytes(content)
    monkeypatch.setattr(data, "ARCHIVE_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(data, "ARCHIVE_BYTES", len(content))
    monkeypatch.setattr(data, "NUM_IMAGES", 120)
    monkeypatch.setattr(data, "MIRRORS", (path.as_uri(),))
    monkeypatch.delenv("CIFAR10_URL", raising=False)
    return path


def test_the_archive_is_downloaded_once_and_read(official, tmp_path, capsys):
    data_dir = tmp_path / "new" / "data"
    cifar10 = data.load("cifar10", data_dir)
    train = [batch(seed) for seed in range(5)]
    images = np.concatenate([file[b"data"] for file in train])
    assert cifar10.train_images.dtype == torch.uint8
    assert cifar10.train_images.shape == (100, 3, 32, 32)
    assert np.array_equal(cifar10.train_images.flatten(1), images)
    assert cifar10.train_labels.tolist() == sum([file[b"labels"] for file in train], [])
    assert np.array_equal(cifar10.test_images.flatten(1), batch(5)[b"data"])
    assert cifar10.test_labels.tolist() == batch(5)[b"labels"]
    assert cifar10.class_names == tuple("0123456789")
    assert (cifar10.name, cifar10.spec, cifar10.num_classes) == ("cifar10", "cifar10", 10)
    assert (cifar10.mean, cifar10.std) == (data.CIFAR10_MEAN, data.CIFAR10_STD)
    official.unlink()
    again = data.load("cifar10", data_dir)
    assert again.fingerprint() == cifar10.fingerprint()
    out, err = capsys.readouterr()
    assert (out, err) == ("decoding 120 images, once\n", f"downloading {official.as_uri()}\n")
    assert sorted(os.listdir(data_dir)) == [data.ARCHIVE, "cifar10.npz"]

    # A path that is written otherwise has the same cache, another archive has not.
    data.load("cifar10", os.path.relpath(data_dir))
    assert capsys.readouterr().out == ""
    (data_dir / data.ARCHIVE).write_bytes(b"no archive")
    with pytest.raises(RunError, match="not the official archive"):
        data.load("cifar10", data_dir)


def test_jpeg_copies_are_those_of_a_folder_of_jpeg_files(official, tmp_path):
    """Pixels, mean and std; a folder has another order."""
    cifar10 = data.load("cifar10", tmp_path / "data")
    copies = data.load("cifar10-jpeg", tmp_path / "data")
    for split in ("train", "test"):
        images = getattr(cifar10, f"{split}_images").permute(0, 2, 3, 1).numpy()
        for i, label in enumerate(getattr(cifar10, f"{split}_labels").tolist()):
            path = tmp_path / "folder" / split / str(label) / f"{i:03}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(path, quality=75)
    folder = data.load(str(tmp_path / "folder"), tmp_path / "data")
    assert torch.equal(copies.train_labels, cifar10.train_labels)
    for split in ("train", "test"):
        order = getattr(copies, f"{split}_labels").argsort(stable=True)
        ordered = getattr(copies, f"{split}_images")[order]
        assert torch.equal(ordered, getattr(folder, f"{split}_images"))
    assert not torch.equal(copies.train_images, cifar10.train_images)
    assert (copies.mean, copies.std) == (folder.mean, folder.std)
    assert (copies.name, copies.spec) == ("cifar10-jpeg", "cifar10-jpeg")


def answer_slowly(server):
    """Answer each request with 20 bytes, one in a tenth of a second."""
    while True:
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):  # the reader has gone
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
            for _ in range(20):
                connection.sendall(b"x")
                time.sleep(0.1)


def test_mirrors_are_tried_in_turn(official, tmp_path, monkeypatch, capsys):
    silent = socket.create_server(("127.0.0.1", 0))  # accepts and never answers
    slow = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=answer_slowly, args=(slow,), daemon=True).start()
    wrong = tmp_path / "wrong.tar.gz"
    wrong.write_bytes(b"\n <!DOCTYPE html>")
    short = tmp_path / "short.tar.gz"
    short.write_bytes(official.read_bytes()[:1234])
    reasons = {
        "file:///no/such/file": "No such file",
        "http://127.0.0.1:9/x": "refused",
        "nonsense": "unknown url type",
        "http://a b/": "control characters",
        f"http://127.0.0.1:{silent.getsockname()[1]}/": "timed out",
        f"http://127.0.0.1:{slow.getsockname()[1]}/": "timed out after 0.5 s, with ",
        wrong.as_uri(): "this is HTML, not the archive",
        short.as_uri(): f"1,234 of {data.ARCHIVE_BYTES:,} bytes: not the official archive, or not",
        "file:///dev/zero": "these 1,048,576 bytes are not",  # without an end
    }
    first, *others = reasons
    monkeypatch.setenv("CIFAR10_URL", first)
    monkeypatch.setattr(data, "MIRRORS", (*others, official.as_uri()))
    monkeypatch.setattr(data, "TIMEOUT", 0.2)
    monkeypatch.setattr(data, "TOTAL_TIMEOUT", 0.5)
    monkeypatch.setenv("no_proxy", "*")
    assert len(data.load("cifar10", tmp_path / "data").train_images) == 100
    tried = [f"downloading {url}" for url in (*reasons, official.as_uri())]
    assert capsys.readouterr().err.splitlines() == tried

    official.unlink()
    with pytest.raises(RunError, match="place it there or set CIFAR10_URL") as error:
        data.load("cifar10", tmp_path / "other")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'other' / data.ARCHIVE}: ") and "\n" not in message
    *parts, last = message.split("; ")
    for url, reason, part in zip(reasons, reasons.values(), parts[1:]):
        assert f"{url}: " in part and reason in part
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_archive_is_refused_and_not_replaced(damage, official, tmp_path, capsys):
    content = bytearray(official.read_bytes())
    if damage == "truncated":
        del content[-100:]
    else:
        content[-100] ^= 1
    path = tmp_path / data.ARCHIVE
    path.write_bytes(content)
    with pytest.raises(RunError, match=f"{data.ARCHIVE}: .* not the official archive"):
        data.load("cifar10", tmp_path)
    assert path.read_bytes() == content and capsys.readouterr().err == ""


def test_an_archive_that_is_not_the_official_one_runs_no_code(official, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {**small_files(), data.TEST_FILE: pickle.dumps(Malicious())}
    (tmp_path / data.ARCHIVE).write_bytes(archive_of(files))
    with pytest.raises(RunError, match="not the official archive"):
        data.load("cifar10", tmp_path)
    assert not os.path.exists("executed")
    with pytest.raises(TypeError):
        data.read_archive(archive_of(files))
    assert os.path.exists("executed")  # it would have run


def test_a_folder_that_cannot_be_written_is_told_before_the_download(official, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--data-dir"):
        data.load("cifar10", tmp_path / "file")
    assert capsys.readouterr().err == ""


def test_an_unpacked_archive_is_not_read(official, tmp_path, monkeypatch, capsys):
    """As torchvision leaves it; the archive is wanted beside it, here downloaded."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / data.ARCHIVE_FOLDER
    folder.mkdir()
    for name in (*data.TRAIN_FILES, data.TEST_FILE, data.NAMES_FILE):
        (tmp_path / name).write_bytes(pickle.dumps(Malicious()))
    line = f"{folder} is not read, since pickles may run code; {data.ARCHIVE} is wanted beside it"
    assert len(data.load("cifar10", tmp_path).train_images) == 100
    assert capsys.readouterr().err == f"{line}\ndownloading {official.as_uri()}\n"
    assert len(data.load("cifar10", tmp_path).train_images) == 100
    assert capsys.readouterr().err == "" and not os.path.exists("executed")


def test_a_device_in_the_place_of_a_file_is_refused(official, folder, tmp_path):
    """So is a FIFO, but without the check reading one would hang."""
    data_dir = tmp_path / "data"
    data.load(str(folder), data_dir)
    cache = next(data_dir.iterdir())
    image = tmp_path / "image.png"
    for path, load in (
        (data_dir / data.ARCHIVE, lambda: data.load("cifar10", data_dir)),
        (cache, lambda: data.load(str(folder), data_dir)),
        (image, lambda: data.load_image(image)),
    ):
        path.unlink(missing_ok=True)
        path.symlink_to(os.devnull)
        with pytest.raises(UsageError, match=f"{path.name}: not a regular file"):
            load()
        assert path.is_symlink()


@pytest.mark.parametrize("closed", ["at the start", "later"])
def test_a_closed_stderr_is_no_reason_for_shapes(closed, official, tmp_path, monkeypatch):
    """Python has no sys.stderr where it is closed at the start; writing fails where it is later."""
    if closed == "at the start":
        monkeypatch.setattr(sys, "stderr", None)
        assert data.load("auto", tmp_path).name == "cifar10"
    else:
        monkeypatch.setattr(sys, "stderr", Mock(write=Mock(side_effect=[OSError("closed"), 0, 0])))
        with pytest.raises(OSError, match="closed"):
            data.load("auto", tmp_path)


def test_auto_without_cifar10_warns_and_continues_with_shapes(small_shapes, monkeypatch, capsys):
    def fail(data_dir, as_jpeg):
        raise RunError("no network")

    monkeypatch.setattr(data, "load_cifar10", fail)
    assert data.load("auto", "nowhere").name == "shapes"
    err = capsys.readouterr().err
    assert err.startswith("no network\n") and "THIS IS NOT CIFAR-10" in err
    with pytest.raises(RunError, match="no network"):
        data.load("cifar10", "nowhere")


# --- folders of images ---


@pytest.fixture
def folder(tmp_path):
    """A folder of two classes, of 3 training images each and 3 and 2 for test, and other files."""
    root = write_images(tmp_path / "images", 6, 4)
    Image.open(root / "test/cat/0.png").resize((50, 40)).save(root / "test/cat/2.bmp")
    (root / "train/__MACOSX").mkdir()
    for path in ("x", ".hidden", "train/__MACOSX/x", "train/dog/.hidden", "train/dog/Thumbs.db"):
        (root / path).write_bytes(b"no image")
    (root / "train/dog/folder").mkdir()
    return root


def test_a_folder_is_decoded_in_order(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = data.load("images", "data")
    assert capsys.readouterr().out == "decoding 11 images, once\n"
    assert (images.name, images.spec) == ("folder images", str(folder))
    assert images.class_names == ("cat", "dog")
    assert images.train_images.shape == (6, 3, 32, 32)
    assert images.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.test_labels.tolist() == [0, 0, 0, 1, 1]
    for image, path in (
        (images.train_images[4], "train/dog/1.png"),
        (images.test_images[2], "test/cat/2.bmp"),
    ):
        expected = Image.open(folder / path).resize((32, 32), Image.Resampling.BILINEAR)
        assert np.array_equal(image.permute(1, 2, 0), expected)
        assert torch.equal(image, data.load_image(folder / path))
    again = data.load(images.spec, "elsewhere")
    assert again.fingerprint() == images.fingerprint()


def swap(a, b):
    """Exchange the names of two files."""
    other = a.with_name("other")
    a.rename(other)
    b.rename(a)
    other.rename(b)


def overwrite(path, content):
    """Write bytes to a file and give it its mtime back."""
    time.sleep(0.05)  # more than the resolution of the ctime
    stat = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_folder_is_decoded_again_when_it_changes(folder, tmp_path, monkeypatch, capsys):
    cat = folder / "train/cat/0.png"
    dog = folder / "train/dog/0.png"
    bmp = folder / "test/cat/2.bmp"
    for path in (cat, dog):  # of one size and one mtime, as an archive leaves them
        path.write_bytes(path.read_bytes().ljust(5000, b"\0"))
        os.utime(path, ns=(0, 0))
    data.load(str(folder), tmp_path / "data")
    cache = next((tmp_path / "data").iterdir())
    capsys.readouterr()
    changes = [
        lambda: Image.new("RGB", (32, 32), "red").save(folder / "train/cat/1.png"),
        lambda: os.utime(folder / "train/cat/1.png", ns=(0, 0)),
        lambda: swap(cat, dog),
        lambda: overwrite(bmp, bmp.read_bytes()[:-1] + b"\x07"),
        lambda: (folder / "test/dog/1.png").rename(folder / "test/dog/0a.png"),
        lambda: (folder / "train/dog/2.png").unlink(),
        lambda: monkeypatch.setattr(data, "CACHE_VERSION", 0),
        lambda: cache.write_bytes(b"PK damaged"),
    ]
    for change in changes:
        change()
        decoded = data.load(str(folder), tmp_path / "data")
        assert capsys.readouterr().out.startswith("decoding")
        train = [data.load_image(path) for path in sorted(folder.glob("train/*/*.png"))]
        assert torch.equal(decoded.train_images, torch.stack(train))
        assert torch.equal(decoded.test_images[2], data.load_image(bmp))
        cached = data.load(str(folder), tmp_path / "data")
        assert capsys.readouterr().out == ""
        assert cached.fingerprint() == decoded.fingerprint()


@pytest.mark.parametrize("count, dtype", [(10, np.uint8), (11, np.float32)])
def test_a_cache_that_does_not_fit_is_decoded_again(count, dtype, folder, tmp_path):
    images = data.load(str(folder), tmp_path / "data")
    cache = next((tmp_path / "data").iterdir())
    with np.load(cache) as saved:
        fingerprint = saved["fingerprint"]
    np.savez(cache, fingerprint=fingerprint, images=np.zeros((count, 3, 32, 32), dtype))
    again = data.load(str(folder), tmp_path / "data")
    assert again.fingerprint() == images.fingerprint()


def test_without_a_cache_images_are_decoded_every_time(folder, capsys):
    for _ in range(2):
        data.load(str(folder), folder / "x")  # a file, in which no cache can be
        output = capsys.readouterr()
        assert output.out.startswith("decoding")
        assert output.err.startswith("warning: no cache of the decoded images")


def test_folders_within_a_class_are_read_and_other_files_named(folder, tmp_path, capsys):
    """In the order of torchvision's ImageFolder, which sorts whole paths of folders."""
    dog = folder / "train/dog"
    expected = data.load(str(folder), tmp_path / "data").train_images
    (dog / "a/b").mkdir(parents=True)
    (dog / "a-b").mkdir()
    (dog / "0.png").rename(dog / "a/b/x.PNG")
    (dog / "1.png").rename(dog / "a-b/y.png")
    (dog / "2.png").rename(dog / "z.png")
    capsys.readouterr()
    images = data.load(str(folder), tmp_path / "data")
    order = [0, 1, 2, 5, 4, 3]  # dog/z.png, dog/a-b/y.png, dog/a/b/x.PNG
    assert torch.equal(images.train_images, expected[order])
    assert capsys.readouterr().err == ""

    (dog / "9.png").symlink_to("nowhere")
    (dog / "a/labels.csv").write_text("no image")
    (folder / "test/beside.png").write_text("no image")
    os.mkfifo(dog / "pipe.png")
    again = data.load(str(folder), tmp_path / "data")
    assert again.fingerprint() == images.fingerprint()
    line = "warning: files left out, no images, links to nothing, or in no class folder"
    assert capsys.readouterr().err == f"{line}: 4, the first is {dog / '9.png'}\n"


def test_a_link_in_a_circle_is_an_error(folder, tmp_path):
    (folder / "train/dog/loop").symlink_to(folder / "train/dog")
    with pytest.raises(OSError, match="symbolic links"):
        data.load(str(folder), tmp_path / "data")


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_val_is_in_the_place_of_test(name, folder, tmp_path, capsys):
    expected = data.load(str(folder), tmp_path / "data").fingerprint()
    (folder / "test").rename(folder / name)
    assert data.load(str(folder), tmp_path / "data").fingerprint() == expected
    assert "held out" not in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["train/ alone", "classes"])
def test_without_a_test_folder_a_tenth_is_held_out(layout, tmp_path, capsys):
    root = write_images(tmp_path / "images", 40, 2)
    whole = data.load(str(root), tmp_path / "data")
    shutil.rmtree(root / "test")
    if layout == "classes":
        root = (root / "train").rename(tmp_path / "classes")
    capsys.readouterr()
    images = data.load(str(root), tmp_path / "data")
    held_out = "4 of its 40 images are held out, and not trained on\n"
    assert capsys.readouterr().out.endswith(f"{root} has no test/: {held_out}")
    expected = data.train_val_split(whole, 4)
    assert torch.equal(images.train_images, expected.train_images)
    assert torch.equal(images.test_images, expected.test_images)
    assert torch.equal(images.test_labels, expected.test_labels)
    assert images.class_names == ("cat", "dog") and images.name == f"folder {root.name}-val4"


def test_the_forms_of_a_name_in_unicode_are_one_class(folder, tmp_path):
    expected = data.load(str(folder), tmp_path / "data")
    for split, form in (("train", "NFD"), ("test", "NFC")):
        (folder / split / "cat").rename(folder / split / unicodedata.normalize(form, "caf\u00e9"))
    images = data.load(str(folder), tmp_path / "data")
    assert images.class_names == ("caf\u00e9", "dog")
    assert torch.equal(images.test_images, expected.test_images)
    assert torch.equal(images.test_labels, expected.test_labels)


def test_another_layout_is_a_usage_error(folder, tmp_path):
    def check(message):
        with pytest.raises(UsageError, match=message):
            data.load(str(folder), tmp_path / "data")

    (folder / "train/owl").mkdir()
    (folder / "train/owl/x").touch()
    check("train/owl/ has no files with the extension of an image")
    (folder / "train/owl/x").rename(folder / "train/owl/x.png")
    check("images: class 'owl' is in train/ and not in test/")
    (folder / "train/owl").rename(folder / "test/owl")
    check("images: class 'owl' is in test/ and not in train/")
    (folder / "train").rename(folder / "Training")
    check("images has no folder train/<class>/, nor <class>/, with images")
    (folder / "test").rename(folder / "Testing")  # these are no classes
    check("images has no folder train/, and no images directly in Testing/")


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_names_are_escaped(folder, tmp_path):
    name = os.fsdecode(b"\xff\x1b[31m")
    for split in ("train", "test"):
        (folder / split / "cat").rename(folder / split / name)
    folder = folder.rename(tmp_path / name)
    images = data.load(str(folder), tmp_path / "data")
    assert images.class_names == ("dog", r"\udcff\x1b[31m")
    assert (images.name, images.spec) == (r"folder \udcff\x1b[31m", str(folder))
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_a_constant_channel_is_divided_by_one(folder, tmp_path):
    for path in folder.glob("t*/*/*.png"):
        red, green, _ = Image.open(path).split()
        Image.merge("RGB", (red, green, Image.new("L", red.size, 77))).save(path)
    images = data.load(str(folder), tmp_path / "data")
    assert data.channel_mean_std(images.train_images)[1][2] == 0
    assert images.std[2] == 1 and images.mean[2] == 77 / 255
    normalized = Normalize(images.mean, images.std, "cpu")(images.train_images)
    assert normalized.isfinite().all() and normalized[:, 2].abs().max() < 1e-4


# --- image files ---


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def filled(mode, color, format, **options):
    return encoded(Image.new(mode, (40, 20), color), format, **options)


def gif_of_size(width, height):
    return b"GIF89a" + struct.pack("<HH", width, height) + filled("L", 0, "GIF")[10:]


HALVES = Image.fromarray(np.repeat(np.uint8([[0, 255]]), 20, axis=1).repeat(20, axis=0))
GRAY_16 = Image.fromarray(np.uint16([[0x1234, 0xFFFF]]))
EXIF = Image.Exif()
EXIF[0x0112] = 6  # to be turned clockwise
BAD_EXIF = b"Exif\0\0II*\0\x08\0\0\0\xff\0"
RED, PINK, WHITE, BLACK = (255, 0, 0), (255, 204, 204), (255, 255, 255), (0, 0, 0)
READABLE = {  # content, the colors of the top left and of the bottom right pixel
    "CMYK": (filled("CMYK", (0, 255, 255, 0), "TIFF"), RED, RED),
    "translucent": (filled("RGBA", (255, 0, 0, 51), "PNG"), PINK, PINK),
    "clear palette": (filled("P", 0, "GIF", transparency=0), WHITE, WHITE),
    "rotated JPEG": (encoded(HALVES, "JPEG", quality=100, exif=EXIF), BLACK, WHITE),
    "rotated TIFF": (encoded(HALVES, "TIFF", exif=EXIF), BLACK, WHITE),
    "truncated EXIF": (filled("L", 5, "PNG", exif=BAD_EXIF), (5, 5, 5), (5, 5, 5)),
}


@pytest.mark.parametrize("name", READABLE)
def test_an_image_of_any_mode_becomes_rgb(name, tmp_path, recwarn):
    content, top_left, bottom_right = READABLE[name]
    (tmp_path / "image").write_bytes(content)
    image = data.load_image(tmp_path / "image").int()
    assert image.shape == (3, 32, 32) and not recwarn.list
    # The halves of the rotated ones lie above each other.
    for pixel, color in (
        (image[:, 0, 0], top_left),
        (image[:, 0, -1], top_left),
        (image[:, -1, 0], bottom_right),
        (image[:, -1, -1], bottom_right),
    ):
        assert (pixel - torch.tensor(color)).abs().max() <= 1


UNREADABLE = [  # content and reason
    (gif_of_size(50_000, 50_000), "exceeds limit"),
    (gif_of_size(8193, 8192), "exceeds limit"),
    (encoded(HALVES, "PNG")[:50].ljust(84, b"\xff"), "broken data stream"),
    (b"Pf\n2 1\n-1.0\n" + np.float32([0, 1]).tobytes(), "mode F, gray"),
    (encoded(GRAY_16, "PNG"), "mode I;16, gray of more than 8 bits"),
    (encoded(GRAY_16, "TIFF", tiffinfo={339: 2}), "mode I, gray"),  # signed
    (b"P5 2 1 65535\n\x12\x34\xff\xff", "mode I, gray"),
]


@pytest.mark.parametrize("content, reason", UNREADABLE, ids=lambda value: str(value)[-20:])
def test_an_unreadable_image_is_named(content, reason, folder, tmp_path, recwarn):
    (folder / "train/dog/1.png").write_bytes(content)
    (folder / "train/dog/2.png").write_bytes(b"")
    filters = list(warnings.filters)
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(RunError, match=f"dog/1.png cannot be read as an image .*{reason}") as error:
        data.load(str(folder), tmp_path / "data")
    assert "\n" not in str(error.value) and not (tmp_path / "data").exists()
    assert warnings.filters == filters and not recwarn.list
    assert limit == Image.MAX_IMAGE_PIXELS


# --- shapes ---


def test_shapes_follow_from_the_seed():
    images, labels, masks = generate_shapes(500, 32, seed=3)
    assert images.shape == (500, 3, 32, 32) and labels.bincount().tolist() == [50] * 10
    again = generate_shapes(500, 32, seed=3)
    assert all(map(torch.equal, (images, labels, masks), again))
    assert labels[:8].tolist() == [6, 8, 3, 7, 0, 0, 6, 0]  # as in all results so far
    means = images[:2].double().mean((2, 3)).flatten().tolist()
    assert means == pytest.approx([87.2, 89.6, 74.2, 110.3, 135.9, 107.1], abs=0.5)


def test_masks_mark_the_objects(small):
    masks = small.test_masks
    area = masks.double().mean((1, 2))
    assert area.min() > 0.01 and area.max() < 0.8
    inside = (small.test_images * masks[:, None]).sum((2, 3)) / masks.sum((1, 2))[:, None]
    outside = (small.test_images * ~masks[:, None]).sum((2, 3)) / (~masks).sum((1, 2))[:, None]
    differs = (inside - outside).abs().amax(1) > 25  # in the mean of some channel
    assert differs.double().mean() > 0.9


# --- statistics and splits ---


def test_channel_mean_std_are_those_of_all_pixels(small):
    values = small.train_images.double().div(255).transpose(0, 1).flatten(1)
    assert small.mean == pytest.approx(values.mean(1).tolist(), rel=1e-12)
    assert small.std == pytest.approx(values.std(1, correction=0).tolist(), rel=1e-12)


def test_held_out_images_are_training_images_no_longer_trained_on(small):
    def rows(images, labels):
        return {(label, image.numpy().tobytes()) for image, label in zip(images, labels.tolist())}

    split = data.train_val_split(small, 60)
    assert (len(split.train_images), len(split.test_images)) == (240, 60)
    train = rows(split.train_images, split.train_labels)
    val = rows(split.test_images, split.test_labels)
    assert not train & val
    assert train | val == rows(small.train_images, small.train_labels)
    assert split.name == "shapes-val60" and split.mean == small.mean
    assert split.test_masks is None  # those of `small` are of its test images
    fewer = data.train_val_split(small, 30)
    assert torch.equal(split.test_images[:30], fewer.test_images)
    with pytest.raises(UsageError, match="--val-split 300: shapes has 300 training images"):
        data.train_val_split(small, 300)


def test_class_balanced_indices_take_classes_in_turn():
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 1])
    mask = torch.tensor([True, True, True, False, True, True, True])
    nothing = torch.zeros(7, dtype=torch.bool)
    assert data.class_balanced_indices(labels, mask, 5).tolist() == [0, 6, 4, 1, 5]
    assert data.class_balanced_indices(labels, mask, 100).tolist() == [0, 6, 4, 1, 5, 2]
    assert data.class_balanced_indices(labels, nothing, 3).tolist() == []


def test_a_checkpoint_has_its_dataset(small, small_shapes, capsys):
    config = {"data": "shapes", "data_sha256": small.fingerprint()}
    ckpt = {"class_names": list(small.class_names), "config": config}
    assert data.load_for_checkpoint(ckpt, None, "nowhere", "cpu").name == "shapes"
    assert data.load_for_checkpoint(ckpt, "shapes", "nowhere", "cpu").name == "shapes"
    assert capsys.readouterr().err == ""
    config["data_sha256"] = "another"
    data.load_for_checkpoint(ckpt, None, "nowhere", "cpu")
    assert capsys.readouterr().err.startswith("warning: these are not the images")
    ckpt["class_names"] = ["checkered", "dog"]
    with pytest.raises(UsageError, match="has 2 classes, shapes has 10; .* dog there and crescent"):
        data.load_for_checkpoint(ckpt, None, "nowhere", "cpu")


# --- the script ---


def test_samples_are_what_a_run_trains_on(small_shapes, small, monkeypatch, tmp_path, succeeds):
    """The first row is as stored, the others as the plans of the first epochs augment it."""
    spy = Mock(wraps=data.plots.sample_grid)
    monkeypatch.setattr(data.plots, "sample_grid", spy)
    args = ["--data", "shapes", "--recipe", "original", "--n", 2, "--out", tmp_path, "--seed", 3]
    out = succeeds(data, args)
    assert "checkered" in out and "red    mean" in out
    assert (tmp_path / "data.png").read_bytes().startswith(b"\x89PNG")
    recipe = RECIPES["original"]
    normalize = Normalize(small.mean, small.std, "cpu")
    plan = epoch_plan(recipe, 300, 32, 3, 0, "cpu")
    batch = augment(small.train_images[plan.indices], plan, recipe, normalize)
    grid = spy.call_args.args[0]
    assert len(grid) == 6
    assert torch.equal(grid[0], small.train_images[plan.indices[:2]])
    assert torch.equal(grid[1], normalize.invert(batch)[:2])
