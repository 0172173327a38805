"""How a script meets its user: the flags that several scripts share, and mistakes told in one line.

Exit status 2 is a mistake in what was asked for, 1 a run that failed, 128 and the signal's number one that was stopped;
none shows a traceback.
"""

import argparse
import math
import os
import shutil
import signal
import sys
import time


class UsageError(Exception):
    """What was asked for cannot be done: exit status 2."""

    status = 2


class RunError(Exception):
    """What was begun could not be finished: exit status 1."""

    status = 1


class Stopped(Exception):
    """A signal ended what can be gone on with: exit status 128 and its number, as a shell counts."""

    def __init__(self, number, message):
        super().__init__(f"stopped by {signal.Signals(number).name}; {message}")
        self.status = 128 + number


class Stop:
    """While the block lasts, a SIGINT or SIGTERM is noted in `number`, to be met at a good moment; a second acts at once."""

    def __enter__(self):
        self.number = None
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        self.number = number
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds "(default: ...)" to the help of a flag that takes a value, unless it says in words what happens without the flag."""

    def _get_help_string(self, action):
        return action.help if action.nargs == 0 or "(default: " in action.help else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that states defaults in its help and reports a mistake in one line."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def run(main):
    """Call `main()` and end the process as the module docstring says."""
    name = os.path.basename(sys.argv[0])
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone (`| head`): nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UsageError, RunError, OSError) as error:
        sys.exit(_say(f"{name}: error: {one_line(error)}", getattr(error, "status", 1)))
    except Stopped as stopped:
        sys.exit(_say(f"{name}: {stopped}", stopped.status))
    except KeyboardInterrupt:
        sys.exit(_say(f"\n{name}: stopped", 130))


def _say(line, status):
    print(line, file=sys.stderr)
    return status


def one_line(error):
    """A message whole, whatever it quotes."""
    return " ".join(str(error).splitlines())


def first_line(error):
    """What an exception, or a text of several lines, says in one."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def positive_int(text):
    """An argparse type: a whole number of at least 1."""
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def positive_float(text):
    """An argparse type: a finite number above 0."""
    return _number(text, float, lambda value: 0 < value < math.inf, "a finite number above 0")


def seed_int(text):
    """An argparse type: a whole number that a torch.Generator takes as its seed."""
    return _number(text, int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")


def _number(text, kind, fits, told):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"{text} is not {told}")
    return value


def output_folder(path, flag="--out"):
    """Make the folder that a flag names, before work that would be lost without it; raises UsageError if it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise UsageError(f"{flag} {path}: not writable")
    return path


def output_file(path, flag="--out"):
    """The same for a file, and the folder that it goes to."""
    if path.is_dir():
        raise UsageError(f"{flag} {path}: a folder, where a file is to be written")
    output_folder(path.parent, flag)
    return path


def add_data_arguments(parser, default="auto"):
    """Add --data and --data-dir, which `data.load` takes."""
    parser.add_argument(
        "--data",
        default=default,
        metavar="SOURCE",
        help="cifar10, cifar100, shapes, auto (cifar10 if present or downloadable, else shapes), "
        "or a folder with train/<class>/* and test/<class>/* pictures" + ("" if default else " (default: the checkpoint's)"),
    )
    parser.add_argument(
        "--data-dir",
        default=default and "./data",
        metavar="DIR",
        help="where archives and decoded folders are kept" + ("" if default else " (default: where the checkpoint's run had them)"),
    )


def add_device_arguments(parser):
    """Add --device, --precision and --kernels, which `engine.Runtime` takes."""
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto takes the first of cuda, mps, cpu there is")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="auto is bf16 where the device multiplies bf16 matrices natively, else fp32")
    parser.add_argument("--kernels", default="auto", choices=["auto", "triton", "torch"], help="auto is the fastest spelling of the network for the device, checked at the start; torch the plain one of vit.py")


class Progress:
    """A bar on one line of the terminal, `label [=====     ] 12/98 text`; silent where stdout is a file or a pipe."""

    def __init__(self, label, total):
        self.label, self.total, self.live, self.drawn = label, total, sys.stdout.isatty(), -math.inf

    def update(self, done, text=""):
        """Show `done` of `total`, at most ten times a second."""
        if self.live and (done == self.total or time.monotonic() - self.drawn > 0.1):
            self.drawn = time.monotonic()
            bar = "=" * (30 * done // self.total)
            line = f"{self.label} [{bar:<30}] {done:,}/{self.total:,} {text}"
            width = shutil.get_terminal_size().columns - 1  # a longer line would leave its head behind when it is wiped
            sys.stdout.write(f"\r\033[K{line[:width]}")
            sys.stdout.flush()

    def clear(self):
        """Wipe the line, for the next one to stand in its place."""
        if self.live:
            sys.stdout.write("\r\033[K")
            sys.stdout.flush()
