"""Files are written whole: under a temporary name, then renamed, so that no reader ever meets half of one; and tables."""

import contextlib
import csv
import os
import tempfile
from pathlib import Path


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; it takes `path`'s name when the block ends and goes when the block fails.

    The temporary name keeps `path`'s suffix, by which some writers choose a format. Folders above are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; these are as public as any other
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # the content before the name, should the machine fail
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder):
    """Remove what processes killed within `replacing` left in a folder that nobody writes to."""
    for left in Path(folder).glob(".*-????????.*"):
        left.unlink(missing_ok=True)


def write_csv(path, rows):
    """Write dicts with the same keys as a table with a head."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path):
    """Rows of a table with a head, as dicts of text."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def markdown(head, rows):
    """A table as text."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
