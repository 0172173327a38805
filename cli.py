"""What the scripts share: errors and their exit status, flags, a progress bar, atomic files."""

import argparse
import contextlib
import csv
import hashlib
import math
import os
import secrets
import shutil
import signal
import sys
import time
from pathlib import Path

# --- errors ---


class UsageError(Exception):
    """Raised for a command that cannot be carried out as given: exit status 2."""

    status = 2


class RunError(Exception):
    """Raised for a run that failed: exit status 1."""

    status = 1


def run_script(main):
    """Call main(); what the user can do something about ends in one line and an exit status.

    A UsageError has status 2; a RunError, an error of the operating system and a lack of memory 1;
    Ctrl-C 130, with the message of the KeyboardInterrupt if it has one. Any other exception is a
    bug: a traceback.
    """
    name = os.path.basename(sys.argv[0])
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # by parse_before_imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed
            stream.reconfigure(errors="backslashreplace")  # what its encoding lacks
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout is gone, as in `python train.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UsageError, RunError, OSError) as error:
        print(f"{name}: error: {printable(error)}", file=sys.stderr)
        sys.exit(getattr(error, "status", 1))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"{name}: error: out of memory; a smaller batch takes less", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        message = printable(interrupt)
        print(f"\n{name}: stopped" + (f"; {message}" if message else ""), file=sys.stderr)
        sys.exit(130)


def is_out_of_memory(error):
    """Return whether a MemoryError, or torch's RuntimeError of a CPU or GPU, is about memory."""
    message = str(error)
    if "out of memory" in message or "allocate memory" in message:
        return True
    return isinstance(error, MemoryError)


def printable(text):
    """Return text as one line of printable characters: others become escapes such as \\x1b.

    Names of folders and checkpoints go through it where they enter, before they reach a terminal.
    """
    line = " ".join(str(text).splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def first_line(error):
    """Return the first line of an exception's message, or the name of its type."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


# --- flags ---


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of a flag that has one."""

    def _get_help_string(self, action):
        if action.default in (None, False):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help states defaults and whose errors are one line."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        # argparse drops a value of two dashes, and leaves the flag with an empty list.
        for arg in sys.argv[1:] if args is None else args:
            if arg.startswith("--") and arg.endswith("=--"):
                self.error(f"{arg[:-3]} has no value")
        return super().parse_args(args, namespace)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")


def parse_before_imports(parse_args):
    """Check the flags before the slow imports, and print "importing torch" on rank 0.

    Until run_script, Ctrl-C ends the process at once, without a traceback of the imports.
    """

    def parse_and_print():
        parse_args()
        if os.environ.get("RANK", "0") == "0":
            print("importing torch", flush=True)

    run_script(parse_and_print)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def number(convert, is_valid, description):
    """Return an argparse type: convert(text) where is_valid(value), else an error."""

    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text} is not {description}")
        return value

    return parse


positive_int = number(int, lambda n: 1 <= n <= 10**6, "a whole number from 1 to 1,000,000")
num_shown = number(int, lambda n: 1 <= n <= 1000, "a whole number from 1 to 1,000")
# Below 1e-30 float32 arithmetic on parameters rounds to nothing.
positive_float = number(float, lambda x: 1e-30 <= x < math.inf, "a number of at least 1e-30")
seed_int = number(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")


def add_data_arguments(parser):
    """Add --data and --data-dir, the arguments of data.load."""
    data_help = "cifar10, cifar10-jpeg (saved as JPEG and read again), shapes (generated), auto"
    data_help += " (cifar10 if it can be had, else shapes), or a folder with images in"
    data_help += " train/<class>/ and test/<class>/"
    dir_help = "where the archive and decoded folders are kept"
    parser.add_argument("--data", default="auto", metavar="SPEC", help=data_help)
    parser.add_argument("--data-dir", default="./data", metavar="DIR", help=dir_help)


def add_run_data_arguments(parser):
    """Add --data and --data-dir, whose default None means those of the checkpoint's run."""
    help = "other images than those of the checkpoint's run; see train.py --help"
    parser.add_argument("--data", metavar="SPEC", help=help)
    help = "where the archive and decoded folders are kept (default: where the run kept them)"
    parser.add_argument("--data-dir", metavar="DIR", help=help)


def add_device_argument(parser):
    """Add --device, an argument of runtime.Runtime."""
    help = "auto is the first of cuda, mps, cpu that is there"
    choices = ["auto", "cpu", "cuda", "mps"]
    parser.add_argument("--device", default="auto", choices=choices, help=help)


def add_precision_argument(parser):
    """Add --precision, an argument of runtime.Runtime."""
    help = "auto is bf16 where the device multiplies it in hardware, else fp32"
    choices = ["auto", "fp32", "bf16"]
    parser.add_argument("--precision", default="auto", choices=choices, help=help)


def add_runtime_arguments(parser):
    """Add --device, --precision and --kernels, the arguments of runtime.Runtime."""
    add_device_argument(parser)
    add_precision_argument(parser)
    help = "auto is the fastest implementation, torch the plain modules"
    choices = ["auto", "triton", "torch"]
    parser.add_argument("--kernels", default="auto", choices=choices, help=help)


def writable_dir(path, flag="--out"):
    """Make the directory of a flag and return it; raises UsageError if it cannot be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "a link to nothing" if path.is_symlink() else error.strerror
        raise UsageError(f"{flag} {path}: {reason}") from None
    if not os.access(path, os.W_OK):
        raise UsageError(f"{flag} {path}: not writable")
    return path


def writable_file(path, flag="--out"):
    """Make the directory of a flag's file and return the file's path; raises UsageError too."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UsageError(f"{flag} {path}: not a file, where one is to be written")
    writable_dir(path.parent, flag)
    return path


# --- progress ---


class ProgressBar:
    """Shows how far a loop is, with the time it has left: `with ProgressBar(...) as progress`.

    A terminal has one line that is drawn again, `epoch 1/24 12/98, 0:07 left, text [====    ]`.
    A file or a pipe gets such a line, without the bar, every half minute.
    """

    def __init__(self, label, total):
        self.label = label
        self.total = total
        self.is_tty = sys.stdout is not None and sys.stdout.isatty()
        self.started = time.monotonic()
        self.shown = -math.inf if self.is_tty else self.started  # when the line was last shown

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Remove the line from a terminal, however the loop ends."""
        if self.is_tty:
            sys.stdout.write("\r\033[K")
            sys.stdout.flush()

    def update(self, done, text=""):
        """Show `done` of `total`, and text or text(), unless the last line is too young."""
        now = time.monotonic()
        pause = 0.1 if self.is_tty else 30.0  # seconds
        if now - self.shown < pause:
            return
        self.shown = now
        left = int((now - self.started) / max(done, 1) * (self.total - done))
        line = f"{self.label} {done:,}/{self.total:,}, {left // 60}:{left % 60:02d} left"
        if callable(text):
            text = text()
        if text:
            line += f", {text}"
        if self.is_tty:
            self.draw(line, done)
        else:
            print(line, flush=True)

    def draw(self, line, done):
        """Write the line over the last one; a bar takes what it leaves of the terminal's width."""
        columns = shutil.get_terminal_size().columns - 1
        width = min(columns - len(line) - 3, 30)
        if width >= 5:
            bar = "=" * (width * done // self.total)
            line += f" [{bar:<{width}}]"
        sys.stdout.write(f"\r\033[K{line[:columns]}")
        sys.stdout.flush()


# --- files ---


def check_regular(path):
    """Raise UsageError for a FIFO or a device, which may be waited for, or read, without end."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UsageError(f"{path}: not a regular file")


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`, renamed to it at the end, removed on an error.

    Whoever reads `path` finds the old file or the new one, whole, whenever the process is killed.
    Raises RunError if it cannot be written, for example on a full disk.
    """
    path = Path(path)
    check_regular(path)
    # A random name keeps writers apart, in containers too, where each may be process 1.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())  # content reaches the disk before the name does
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path} could not be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # it is mostly renamed by now
            temporary.unlink()


def write_csv(path, rows):
    """Write dicts of the same keys as a table with a header."""
    with (
        atomic_write(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path):
    """Return the rows of a table with a header, as dicts of strings."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown_table(head, rows):
    """Return a table in Markdown; `head` and each of `rows` are lists of cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def sha256(value):
    """Return the hex digest of every bit of tensors and plain values in dicts, lists, tuples."""
    digest = hashlib.sha256()

    def add(value):
        if hasattr(value, "numpy"):  # a tensor
            digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            digest.update(f"dict {len(value)} ".encode())
            for item in value.items():
                add(item)
        elif isinstance(value, list | tuple):
            digest.update(f"{type(value).__name__} {len(value)} ".encode())
            for item in value:
                add(item)
        else:
            digest.update(f"{value!r} ".encode())

    add(value)
    return digest.hexdigest()
