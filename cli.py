"""What every script shares: flags, one-line errors, signals, a progress bar, atomic file writes.

Exit status 2 is a usage error, 1 a failed run, 128 plus the signal number an interrupted one.
"""

import argparse
import ast
import contextlib
import csv
import dataclasses
import difflib
import hashlib
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path


class UsageError(Exception):
    """The command cannot be carried out as given: exit status 2."""

    status = 2


class RunError(Exception):
    """The run failed: exit status 1."""

    status = 1


class Interrupted(Exception):
    """A signal ended a run that can be resumed: exit status 128 + signum."""

    def __init__(self, signum, message):
        super().__init__(f"stopped by {signal.Signals(signum).name}; {message}")
        self.status = 128 + signum


class SignalHandler:
    """In the block the first SIGINT or SIGTERM only sets `signum`; a second one acts at once."""

    def __enter__(self):
        self.signum = None
        signals = (signal.SIGINT, signal.SIGTERM)
        self.previous = {signum: signal.signal(signum, self.handle) for signum in signals}
        return self

    def handle(self, signum, frame):
        self.signum = signum
        self.__exit__()

    def __exit__(self, *_):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)


def excepthook(kind, error, traceback):
    """A line in place of a traceback for Ctrl-C during imports, which take seconds."""
    if kind is KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = excepthook  # scripts import this module first


def run_script(main):
    """Call main() and end the process with the exit status of the module docstring."""
    name = os.path.basename(sys.argv[0])
    message, status = None, 0
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not, a closed one is None
            stream.reconfigure(errors="backslashreplace")  # for names that its encoding lacks
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout is gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (UsageError, RunError, OSError) as error:
        message, status = f"{name}: error: {printable(error)}", getattr(error, "status", 1)
    except Interrupted as error:
        message, status = f"{name}: {printable(error)}", error.status
    except KeyboardInterrupt:
        message, status = f"\n{name}: stopped", 130
    if message:
        print(message, file=sys.stderr)
    if status:
        sys.exit(status)


def printable(text):
    """One line of printable characters: line breaks become spaces, control characters escapes.

    Names of folders and checkpoints go through it before they reach a terminal or a figure.
    """
    line = " ".join(str(text).splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def first_line(error):
    """The first line of an exception's message, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- flags ---


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Leaves "(default: None)" out."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help states defaults and whose errors are one line."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")


def number(convert, is_valid, description):
    """An argparse type: convert(text), held to is_valid."""

    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text} is not {description}")
        return value

    return parse


positive_int = number(int, lambda n: 1 <= n < 2**31, "a whole number of at least 1")
# Below 1e-30 float32 arithmetic on parameters rounds to nothing.
positive_float = number(float, lambda x: 1e-30 <= x < math.inf, "a finite number above 0")
seed_int = number(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")


def writable_dir(path, flag="--out"):
    """Make the directory of a flag; raises UsageError if it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "a link to nothing" if path.is_symlink() else error.strerror
        raise UsageError(f"{flag} {path}: {reason}") from None
    if not os.access(path, os.W_OK):
        raise UsageError(f"{flag} {path}: not writable")
    return path


def writable_file(path, flag="--out"):
    """The same for a file and its directory."""
    if path.is_dir():
        raise UsageError(f"{flag} {path}: a directory, where a file is to be written")
    writable_dir(path.parent, flag)
    return path


def add_data_arguments(parser, default="auto"):
    """Add --data and --data-dir, the arguments of data.load."""
    help = "cifar10, cifar100, shapes, auto (cifar10 if it can be had, else shapes), or a folder"
    help += " with train/<class>/* and test/<class>/* images" + "; that of the run" * (not default)
    parser.add_argument("--data", default=default, metavar="SPEC", help=help)
    help = "for archives and decoded folders"
    parser.add_argument("--data-dir", default="./data", metavar="DIR", help=help)


def add_device_arguments(parser):
    """Add --device, --precision and --kernels, the arguments of runtime.Runtime."""
    for flag, choices, help in (
        ("--device", "cpu cuda mps", "auto is the first of cuda, mps, cpu that is there"),
        ("--precision", "fp32 bf16 fp16", "auto is bf16 where the device multiplies it, else fp32"),
        ("--kernels", "triton torch", "auto is the fastest implementation, torch plain modules"),
    ):
        choices = ["auto", *choices.split()]
        parser.add_argument(flag, default="auto", choices=choices, help=help)


def override_fields(settings, assignments, bounds):
    """A dataclass with int, float, bool and str fields replaced by strings NAME=VALUE.

    `bounds` holds a field's least and greatest value, or its choices if it is a str. Raises
    UsageError that names the setting for an unknown one or an invalid value.
    """
    types = {field.name: field.type for field in dataclasses.fields(settings)}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or name not in types:
            near = difflib.get_close_matches(name, types, 1)
            hint = f"is it {near[0]}?" if near else f"there are {', '.join(types)}"
            reason = f"no setting {name!r}; {hint}" if equals else "expected NAME=VALUE"
            raise UsageError(f"--set {text}: {reason}")
        type_, bound = types[name], bounds.get(name, (0, 1e30))
        choices = {str: bound, bool: (True, False)}.get(type_)
        try:
            parsed = value if type_ is str else ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            parsed = None
        if type_ is float and type(parsed) is int:
            parsed = float(value)
        valid = type(parsed) is type_
        if not valid or not (parsed in choices if choices else bound[0] <= parsed <= bound[1]):
            numbers = f"{type_.__name__} from {bound[0]} to {bound[1]}"
            expected = f"one of {', '.join(map(str, choices))}" if choices else numbers
            raise UsageError(f"--set {text}: {name} is {expected}")
        settings = dataclasses.replace(settings, **{name: parsed})
    return settings


class ProgressBar:
    """`label [=====     ] 12/98, 0:07 left, text` on a terminal; silent where stdout is a file."""

    def __init__(self, label, total):
        self.label, self.total, self.drawn = printable(label), total, -math.inf
        self.started = time.monotonic()
        self.is_tty = sys.stdout is not None and sys.stdout.isatty()

    def update(self, done, text=""):
        """Show `done` of `total` and text or text(), at most ten times a second."""
        if self.is_tty and (done == self.total or time.monotonic() - self.drawn > 0.1):
            self.drawn = time.monotonic()
            bar = "=" * (30 * done // self.total)
            left = int((self.drawn - self.started) / max(done, 1) * (self.total - done))
            text = text() if callable(text) else text
            left = f"{left // 60}:{left % 60:02d} left" + f", {text}" * bool(text)
            line = f"{self.label} [{bar:<30}] {done:,}/{self.total:,}, {left}"
            width = shutil.get_terminal_size().columns - 1
            sys.stdout.write(f"\r\033[K{line[:width]}")
            sys.stdout.flush()

    def clear(self):
        if self.is_tty:
            sys.stdout.write("\r\033[K")
            sys.stdout.flush()


# --- files ---


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`, renamed to it at the end, removed on an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # content reaches the disk before the name does
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path} could not be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def remove_stale_temp_files(folder):
    """Remove what processes killed within atomic_write left in a folder nobody writes to."""
    for path in Path(folder).glob(".*-????????.*"):
        path.unlink(missing_ok=True)


def write_csv(path, rows):
    """Write dicts of the same keys as a table with a header."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path):
    """The rows of a table with a header, as dicts of strings."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def markdown_table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def sha256(value):
    """Hex digest of tensors and plain values in dicts, lists and tuples: of every bit of them."""
    digest = hashlib.sha256()

    def add(value):
        if hasattr(value, "numpy"):  # a tensor
            digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, dict | list | tuple):
            digest.update(f"{type(value).__name__} {len(value)} ".encode())
            for item in value.items() if isinstance(value, dict) else value:
                add(item)
        else:
            digest.update(f"{value!r} ".encode())

    add(value)
    return digest.hexdigest()
