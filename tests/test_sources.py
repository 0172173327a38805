"""CIFAR archives, image folders, image files and shapes; damaged and hostile ones too."""

import hashlib
import io
import os
import pickle
import pickletools
import socket
import struct
import sys
import tarfile
import warnings

import numpy as np
import pytest
import torch
from conftest import Malicious, corrupted, write_images
from PIL import Image

import sources
from cli import RunError, UsageError

ARCHIVE, *_, MEMBERS = sources.ARCHIVES["cifar10"]


def batch(count, seed, prefix=b""):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 100 if prefix else 10, count).tolist()
    return {b"data": rng.integers(0, 256, (count, 3072), np.uint8), prefix + b"labels": labels}


def small_files(name="cifar10"):
    """The files of an archive, of 20 images each: name -> content."""
    prefix, (*batches, meta) = b"fine_" * (name == "cifar100"), sources.ARCHIVES[name][3]
    names = {prefix + b"label_names": [b"%d" % i for i in range(100)]}
    return {file: batch(20, seed, prefix) for seed, file in enumerate(batches)} | {meta: names}


def python2_pickle(content):
    """Bytes as in the official archives, which Python 2 wrote: its strings are our bytes."""
    result = bytearray(pickle.dumps(content, protocol=3).replace(b"numpy._core", b"numpy.core"))
    old_opcodes = {"BINBYTES": b"T", "SHORT_BINBYTES": b"U", "BINUNICODE": b"T"}
    for opcode, _, pos in list(pickletools.genops(bytes(result))):
        result[pos : pos + 1] = old_opcodes.get(opcode.name, result[pos : pos + 1])
    return bytes(result)


def publish(monkeypatch, path, files, name="cifar10", mirrors=()):
    """Write an official archive of name -> bytes, object, or type and target of a link."""
    with tarfile.open(path, "w:gz") as tar:
        for file, content in files.items():
            member = tarfile.TarInfo(file)
            if isinstance(content, tuple):
                (member.type, member.linkname), content = content, b""
            content = python2_pickle(content) if isinstance(content, dict) else content
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    file, _, _, members = sources.ARCHIVES[name]
    digest, mirrors = hashlib.sha256(path.read_bytes()).hexdigest(), (*mirrors, path.as_uri())
    monkeypatch.setitem(sources.ARCHIVES, name, (file, digest, mirrors, members))
    monkeypatch.delenv("CIFAR10_URL", raising=False)
    return path


def load_error(data_dir):
    """The one line that load_cifar raises."""
    with pytest.raises(RunError, match=r"\A.+\Z") as error:
        sources.load_cifar("cifar10", data_dir)
    return str(error.value)


@pytest.mark.parametrize("name", sources.ARCHIVES)
def test_an_archive_is_downloaded_once_and_read(name, tmp_path, monkeypatch, capsys):
    def slow_download(*args, download=torch.hub.download_url_to_file):
        monkeypatch.setattr(torch.hub, "download_url_to_file", download)
        sources.load_cifar(name, data_dir)  # another process is faster
        download(*args)

    monkeypatch.setattr(torch.hub, "download_url_to_file", slow_download)
    mirror = publish(monkeypatch, tmp_path / "mirror.tar.gz", small_files(name), name)
    data_dir, (*batches, _) = tmp_path / "new" / "data", small_files(name).values()
    *tensors, names = sources.load_cifar(name, data_dir)
    images, labels = torch.cat(tensors[::2]), torch.cat(tensors[1::2])
    assert images.dtype == torch.uint8 and images.shape[1:] == (3, 32, 32)
    assert np.array_equal(images.flatten(1), np.concatenate([list(b.values())[0] for b in batches]))
    assert labels.tolist() == sum([list(b.values())[1] for b in batches], [])
    assert len(tensors[2]) == len(tensors[3]) == 20 and names == tuple(map(str, range(100)))
    mirror.unlink()
    assert torch.equal(sources.load_cifar(name, data_dir)[2], tensors[2])
    assert capsys.readouterr().err == f"downloading {mirror.as_uri()}\n" * 2
    assert os.listdir(data_dir) == [sources.ARCHIVES[name][0]]


def test_mirrors_are_tried_in_turn(tmp_path, monkeypatch, capsys):
    silent = socket.create_server(("127.0.0.1", 0))  # accepts and never answers
    silent_url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
    wrong = publish(monkeypatch, tmp_path / "wrong.tar.gz", {})
    urls = "http://127.0.0.1:9/x", "nonsense", "http://a b/", silent_url, wrong.as_uri()
    mirror = publish(monkeypatch, tmp_path / "mirror.tar.gz", small_files(), mirrors=urls)
    monkeypatch.setenv("CIFAR10_URL", "file:///no/such\nfile")
    monkeypatch.setattr(sources, "TIMEOUT", 0.2)
    assert len(sources.load_cifar("cifar10", tmp_path / "data")[0]) == 100
    tried = ["file:///no/such file", *urls, mirror.as_uri()]
    assert capsys.readouterr().err.splitlines() == [f"downloading {url}" for url in tried]
    mirror.unlink()
    message = load_error(tmp_path / "other")
    assert str(tmp_path / "other" / ARCHIVE) in message and "CIFAR10_URL" in message
    assert all(f" {url}: " in message for url in tried)
    assert "refused" in message and "invalid hash value" in message and "timed out" in message
    assert socket.getdefaulttimeout() is None and not os.listdir(tmp_path / "other")


def test_no_corrupted_archive_is_accepted_or_replaced(tmp_path, monkeypatch, capsys):
    path = publish(monkeypatch, tmp_path / ARCHIVE, small_files())
    content = path.read_bytes()
    for number in range(200):
        corrupt = corrupted(content, number)
        path.write_bytes(corrupt)
        assert f"{ARCHIVE}: not the official archive" in load_error(tmp_path), number
        assert path.read_bytes() == corrupt
    assert capsys.readouterr().err == ""


HOSTILE_FILES = [  # in the place of a batch
    (tarfile.SYMTYPE, "test_batch"),
    (tarfile.LNKTYPE, MEMBERS[5]),
    (tarfile.FIFOTYPE, ""),
    batch(200, 0),  # larger than MAX_BYTES
    pickle.dumps(Malicious()),
    pickle.dumps(batch(20, 0) | {b"x": Malicious()}),
    b'cbuiltins\neval\n(S\'open("executed", "w")\'\ntR.',
]


@pytest.mark.parametrize("content", HOSTILE_FILES)
def test_a_hostile_archive_runs_and_writes_nothing(content, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    monkeypatch.setattr(sources, "MAX_BYTES", 500_000)
    files = {"../escaped": b"x", MEMBERS[5]: b"", **small_files(), MEMBERS[2]: content}
    path = publish(monkeypatch, tmp_path / "in" / ARCHIVE, files)
    assert load_error(tmp_path / "in").startswith(f"{path}: ")
    assert os.listdir(tmp_path) == ["in"] and os.listdir() == [ARCHIVE]


@pytest.fixture
def folder(tmp_path):
    """Two classes, of 3 training images each and 3 and 2 for test, and files of other kinds."""
    root = write_images(tmp_path / "images", 6, 4)
    Image.open(root / "test/cat/0.png").resize((50, 40)).save(root / "test/cat/2.bmp")
    for path in ("x", ".hidden", "train/note.txt", "train/dog/.hidden", "train/dog/Thumbs.db"):
        (root / path).write_bytes(b"no image")
    (root / "train/dog/folder").mkdir()
    return root


def test_a_folder_is_decoded_in_order(folder, tmp_path, capsys):
    *tensors, names = sources.load_image_folder(folder, tmp_path / "data")
    assert names == ("cat", "dog") and tensors[0].shape == (6, 3, 32, 32)
    assert tensors[1].tolist() == [0, 0, 0, 1, 1, 1] and tensors[3].tolist() == [0, 0, 0, 1, 1]
    for image, path in ((tensors[0][4], "train/dog/1.png"), (tensors[2][2], "test/cat/2.bmp")):
        expected = Image.open(folder / path).resize((32, 32), Image.Resampling.BILINEAR)
        assert np.array_equal(image.permute(1, 2, 0), expected)
        assert torch.equal(image, sources.load_image(folder / path))
    assert capsys.readouterr().out == "decoding 11 images, once\n"


def test_a_folder_is_decoded_again_when_it_changes(folder, tmp_path, monkeypatch, capsys):
    def load(data_dir=tmp_path / "data"):
        return *sources.load_image_folder(folder, data_dir)[:4], capsys.readouterr()

    load()
    cat, dog = folder / "train/cat/1.png", folder / "test/dog"
    for change, num_test in (
        (lambda: Image.new("RGB", (32, 32), "red").save(cat), 5),
        (lambda: os.utime(cat, ns=(0, 0)), 5),
        (lambda: (dog / "1.png").rename(dog / "0a.png"), 5),
        (lambda: (dog / "0.png").unlink(), 4),
        (lambda: monkeypatch.setattr(sources, "DECODER_VERSION", 0), 4),
        (lambda: next((tmp_path / "data").iterdir()).write_bytes(b"PK damaged"), 4),
    ):
        change()
        *decoded, output = load()
        assert output.out.startswith("decoding") and len(decoded[2]) == len(decoded[3]) == num_test
        *cached, output = load()
        assert output == ("", "") and all(map(torch.equal, decoded, cached))
    assert cached[0][1].float().mean((1, 2)).tolist() == [255, 0, 0]
    *decoded, output = load(folder / "x")  # a file, in which no cache can be
    assert output.err.startswith("warning: no cache") and all(map(torch.equal, decoded, cached))


def test_another_layout_is_a_usage_error(folder, tmp_path):
    for message, change in (  # each change is made to what the last one left
        ("images has no folder train/owl/ with images", (folder / "train/owl").mkdir),
        ("class 'owl' is not in both", (folder / "train/owl/x").touch),
        ("images has no folder test/<class>/ with", lambda: (folder / "test").rename(folder / "y")),
    ):
        change()
        with pytest.raises(UsageError, match=message):
            sources.load_image_folder(folder, tmp_path / "data")


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_class_names_are_escaped(folder, tmp_path, capsys):
    for split in ("train", "test"):
        (folder / split / "cat").rename(folder / split / os.fsdecode(b"\xff\x1b[31m"))
    *_, names = sources.load_image_folder(folder, tmp_path / "data")
    assert names == ("dog", r"\udcff\x1b[31m") and len(list((tmp_path / "data").iterdir())) == 1


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


filled = lambda mode, color, *args, **kw: encoded(Image.new(mode, (40, 20), color), *args, **kw)
gif_of_size = lambda *size: b"GIF89a" + struct.pack("<HH", *size) + filled("L", 0, "GIF")[10:]
HALVES = Image.fromarray(np.repeat(np.uint8([[0, 255]]), 20, axis=1).repeat(20, axis=0))
GRAY_16 = Image.fromarray(np.uint16([[0x1234, 0xFFFF]]))
EXIF = Image.Exif()
EXIF[0x0112] = 6  # to be turned clockwise
READABLE = {  # content, the colors of its first and its last pixel
    "CMYK": (filled("CMYK", (0, 255, 255, 0), "TIFF"), (255, 0, 0), (255, 0, 0)),
    "translucent": (filled("RGBA", (255, 0, 0, 51), "PNG"), (255, 204, 204), (255, 204, 204)),
    "clear palette": (filled("P", 0, "GIF", transparency=0), 255, 255),
    "rotated JPEG": (encoded(HALVES, "JPEG", quality=100, exif=EXIF), 0, 255),
    "rotated TIFF": (encoded(HALVES, "TIFF", exif=EXIF), 0, 255),
    "truncated EXIF": (filled("L", 5, "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\0"), 5, 5),
    "large": (encoded(Image.new("L", (8192, 8192), 77), "PNG", compress_level=1), 77, 77),
}


@pytest.mark.parametrize("name", READABLE)
def test_an_image_of_any_mode_becomes_rgb(name, tmp_path, recwarn):
    content, first, last = READABLE[name]
    (tmp_path / "image").write_bytes(content)
    image = sources.load_image(tmp_path / "image")
    assert image.shape == (3, 32, 32) and not recwarn.list
    beside = image[:, 0, -1] if name.startswith("rotated") else image[:, -1, 0]
    for pixel, color in zip((image[:, 0, 0], beside, image[:, -1, -1]), (first, first, last)):
        assert (pixel.long() - torch.tensor(color)).abs().max() <= 1


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
def test_an_unreadable_image_is_named(content, reason, folder, tmp_path, recwarn, capsys):
    (folder / "train/dog/1.png").write_bytes(content)
    (folder / "train/dog/2.png").write_bytes(b"")
    filters = list(warnings.filters)
    with pytest.raises(RunError, match=f"dog/1.png cannot be read as an image .*{reason}") as error:
        sources.load_image_folder(folder, tmp_path / "data")
    assert "\n" not in str(error.value) and not (tmp_path / "data").exists()
    assert warnings.filters == filters and not recwarn.list


def test_shapes_follow_from_the_seed():
    images, labels, masks = sources.generate_shapes(500, seed=3)
    assert images.shape == (500, 3, 32, 32) and labels.bincount().tolist() == [50] * 10
    assert all(map(torch.equal, (images, labels, masks), sources.generate_shapes(500, 3)))
    assert labels[:8].tolist() == [6, 8, 3, 7, 0, 0, 6, 0]  # as in all results so far
    means = images[:2].double().mean((2, 3)).flatten().tolist()
    assert means == pytest.approx([87.2, 89.6, 74.2, 110.3, 135.9, 107.1], abs=0.5)
    area, masks = masks.double().mean((1, 2)), masks[:, None]  # they mark the object
    assert area.min() > 0.02 and area.max() < 0.7
    inside, outside = ((images * m).sum((2, 3)) / m.sum((2, 3)) for m in (masks, ~masks))
    assert ((inside - outside).abs().amax(1) > 25).double().mean() > 0.95
