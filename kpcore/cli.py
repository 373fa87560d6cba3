"""The command `kpcore`: its options, and the subcommands train, test, predict, segment, erf, features and convert."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
import warnings
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

import kpcore as kp
from kpcore import _openmp
from kpcore.config import config_rows, free_memory, require
from kpcore.console import (
    Progress,
    Refused,
    classes_in_mean,
    counted,
    detail,
    duration,
    make_folder,
    plain,
    print_line,
    printing,
    say,
)
from kpcore.files import check_writable, expanded, replacing
from kpcore.nn.blocks import MOST_CHANNELS, MOST_LEVELS
from kpcore.nn.published_arrays import CLIENTS
from kpcore.pipeline.settings import FLAGS, LENGTHS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from kpcore.io.scans import Scan
    from kpcore.pipeline.data import PartClouds
    from kpcore.pipeline.model import Model
    from kpcore.pipeline.segmentation import Segmented
    from kpcore.pipeline.settings import Settings
    from kpcore.pipeline.tiled import Survey
    from kpcore.pipeline.voting import Scores


CONFUSION = "confusion.csv"
QUIET, VERBOSE = "quiet", "verbose"
MOST_FILES_LISTED = 20  # of a survey, without -v
BYTES_OF_POINT = 300  # of a LAS that is labelled whole: coordinates, fields, probabilities
BYTES_IN_FILE = 60  # of a point in a text or a PCD, where nothing says how many there are
FORMATS = ("laz", "las", "ply", "npz", "pcd", "csv")  # that --format names
DONE, FAULT, REFUSED, FAILED, NOT_TRUSTED, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 4, 130, 143
EXIT_CODES = {
    DONE: "done",
    FAULT: "an error in kpcore itself, please report it",
    REFUSED: "the options or the input were refused, or could not be read or written; nothing is done, or what is done "
    "is kept for --resume, which a line says then",
    FAILED: "some files failed and are listed, the others are done",
    NOT_TRUSTED: "done, but with --strict: there were warnings that the result may not be trusted",
    INTERRUPTED: "interrupted by Ctrl-C (143: by SIGTERM)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code, one of EXIT_CODES.

    Raises BrokenPipeError if the reader of standard output has closed it.
    """
    words = [*(sys.argv[1:] if argv is None else argv)]
    try:
        args = parser().parse_args(words)
    except _WrongOptions as error:
        _print_error(f"{error} (--help describes the command)")
        if "--json" in words:
            print(json.dumps({"command": None, "exit_code": REFUSED, "error": str(error), "warnings": []}))
        return REFUSED
    args.warned, args.resumable = _Warned(), None
    with (
        printing(args.amount == QUIET, args.amount == VERBOSE),
        args.warned.shown(),
        _threads(args.threads),
        _nothing_on_stdout(args.json),
    ):
        code, results = _run(args, words)
    if args.json:
        command = {"command": args.command, "exit_code": code}
        print(json.dumps(plain(command | results | {"warnings": args.warned.lines})))
    return code


def _run(args: argparse.Namespace, words: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """(exit code, results) of a command; the reason is printed on standard error unless it is done."""
    try:
        results = args.run(args) or {}
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as error:
        if args.resumable and args.resumable():
            _print_error(f"interrupted; resume with: {_resuming(words)}")
        elif args.command in ("train", "segment"):
            _print_error("interrupted; there is nothing to resume")
        code = TERMINATED if isinstance(error, _Terminated) else INTERRUPTED
        return code, {"error": "interrupted"}
    except Exception as error:
        reason = _reason(error)
        if isinstance(error, MemoryError):
            reason = f"not enough memory for {' '.join(words)}{f': {error}' if str(error) else ''}"
        _print_error(reason)
        if args.command == "segment" and not isinstance(error, ValueError) and args.resumable and args.resumable():
            _print_error(f"what is done is kept; resume with: {_resuming(words)}")
        return REFUSED if isinstance(error, _refusals()) else FAULT, {"error": reason}
    failed = results.get("failed", [])
    for one in failed:
        _print_error(_about(one["file"], one["error"]))
    if failed:
        total = len(failed) + len(results["files"]) + len(results.get("skipped", []))
        if total > 1:
            _print_error(f"{len(failed)} of {total} files failed")
        return FAILED if len(failed) < total else REFUSED, results
    return NOT_TRUSTED if getattr(args, "strict", False) and args.warned.is_not_trusted else DONE, results


def _resuming(words: Sequence[str]) -> str:
    """The command that resumes the one with these words."""
    return shlex.join(["kpcore", *words, *([] if "--resume" in words else ["--resume"])])


def _refusals() -> tuple[type[Exception], ...]:
    """Types of the exceptions that are no error in kpcore, which raises a ValueError for any invalid input."""
    from kpcore.pipeline.training import NotFinite

    return ValueError, NotFinite, ImportError, OSError, MemoryError, Warning  # a warning where Python is told so by -W


def _reason(error: BaseException) -> str:
    """What an exception says, for one line."""
    if isinstance(error, ConnectionError) and error.errno is None:  # to a scheduler: it says all
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'standard output'}: {error.strerror or error}"
    if isinstance(error, MemoryError):
        return f"not enough memory{f': {error}' if str(error) else ''}"
    if isinstance(error, _refusals()):
        return str(error)
    calls = [call for call in traceback.extract_tb(error.__traceback__) if f"{os.sep}kpcore{os.sep}" in call.filename]
    where = ", ".join(f"{Path(call.filename).name} line {call.lineno} in {call.name}" for call in calls[:-4:-1])
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    return f"this is an error in kpcore, please report it: {what} ({where})"


def _about(file: object, message: str) -> str:
    """A message that names a file."""
    return message if str(file) in message else f"{file}: {message}"


def _print_error(message: object) -> None:
    """Print a message on stderr in one line, even if a name in it has line breaks."""
    print_line(f"kpcore: {'; '.join(str(message).splitlines())}", sys.stderr)


@dataclasses.dataclass
class _Warned:
    """The warnings of a command, each printed once as one line on stderr."""

    lines: list[str] = dataclasses.field(default_factory=list)
    is_not_trusted: bool = False  #: whether one says that the result may not be trusted
    file: Path | None = None  #: the one of several files that they are about

    @contextmanager
    def shown(self) -> Iterator[None]:
        def show(message, category, *_):
            self.is_not_trusted |= issubclass(category, kp.KpcoreWarning)
            line = str(message) if self.file is None else _about(self.file, str(message))
            if line not in self.lines:
                self.lines.append(line)
                _print_error(line)

        with warnings.catch_warnings():
            warnings.simplefilter("always", kp.KpcoreWarning)  # otherwise once for several files
            warnings.showwarning = show
            yield


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = kp.get_num_threads()
    if number is not None:
        kp.set_num_threads(number)
    try:
        yield
    finally:
        if number is not None:
            kp.set_num_threads(before)


@contextmanager
def _nothing_on_stdout(is_json: bool) -> Iterator[None]:
    """With --json, leave out all that the block prints on standard output."""
    if not is_json:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does."""

    def end(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---- options


class _Help(argparse.HelpFormatter):
    """Help with texts of several paragraphs; lines that begin with spaces are printed as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        return "\n".join(
            line if line.startswith(" ") or not line else super(_Help, self)._fill_text(line, width, indent)
            for line in lines
        )


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty one")
    return expanded(text)


def _name(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a name, got an empty one")
    return text


def _names(text: str) -> list[str]:
    if not text.split():
        raise argparse.ArgumentTypeError('expected names such as "x y z intensity", got none')
    return text.split()


def _length(text: str) -> float:
    value, (smallest, largest) = _number(text), LENGTHS
    if not smallest <= value <= largest:
        raise argparse.ArgumentTypeError(f"expected a length from {smallest:g} to {largest:g}, got {text}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def _fraction(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a probability above 0, at most 1, got {text}")
    return value


def _up_to(largest: int, smallest: int = 1) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {smallest} to {largest}, got {text!r}") from None
        if not smallest <= value <= largest:
            raise argparse.ArgumentTypeError(f"expected {smallest} to {largest}, got {text}")
        return value

    return number


def _labels(text: str) -> tuple[int, ...]:
    """Labels such as 7,9,18."""
    try:
        return tuple(int(one) for one in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected labels such as 7,9,18, got {text!r}") from None


def _ignored(text: str) -> tuple[int | str, ...]:
    """Labels and flags such as 7,18,withheld."""
    try:
        return tuple(one if one in FLAGS else int(one) for one in text.split(","))
    except ValueError:
        expected = f"labels, and flags of {', '.join(FLAGS)}, such as 7,18,withheld"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None


def _bytes(text: str) -> int:
    """A size such as 8GB, 500MB or 1.5GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]i?)?[bB]?", text.strip())
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"expected a size such as 8GB or 500MB, got {text!r}")
    unit = (match[2] or "").lower()
    power = " kmgt".index(unit[0]) if unit else 0
    return int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** power)


def _factors(text: str) -> str | tuple[float, float]:
    """The factors of x and y, and of z, or auto."""
    if text == "auto":
        return text
    values = [_length(one) for one in text.split(",")]
    if len(values) > 2:
        raise argparse.ArgumentTypeError(f"expected one factor, or two such as 0.3048,1, or auto, got {text!r}")
    return values[0], values[-1]


class _WrongOptions(ValueError):
    """Options that the parser refuses."""


class _Parser(argparse.ArgumentParser):
    """A parser that raises an error of one line, which --json needs too, where argparse prints and exits."""

    def error(self, message: str) -> NoReturn:
        raise _WrongOptions(message)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; docs/commands.py writes the page of the commands from it."""
    common = argparse.ArgumentParser(add_help=False)
    shared = common.add_argument_group("options of every command")
    shared.add_argument(
        "--threads", type=_up_to(_openmp.MOST_THREADS), metavar="N",
        help="threads to compute with (default: all cores this process may use); no result depends on their number",
    )  # fmt: skip
    for name, amount, what in (
        ("quiet", QUIET, "print no progress and nothing but results, warnings and errors"),
        ("verbose", VERBOSE, "print more about what is done"),
    ):
        shared.add_argument(f"-{name[0]}", f"--{name}", dest="amount", action="store_const", const=amount, help=what)
    shared.add_argument(
        "--json", action="store_true",
        help="print one JSON object with the results on standard output, and nothing else there",
    )  # fmt: skip
    top = _Parser(
        prog="kpcore", formatter_class=_Help,
        description="Train networks of point convolutions on labelled scans, and label others with them.",
        epilog="kpcore COMMAND --help describes a command, with examples and its exit codes.",
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"kpcore {kp.__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True, dest="command")

    def command(name: str, run: Callable[[argparse.Namespace], dict[str, Any] | None], summary: str, description: str,
                examples: str, *more_codes: int) -> argparse.ArgumentParser:  # fmt: skip
        codes = sorted({DONE, FAULT, REFUSED, INTERRUPTED, *more_codes})
        epilog = "\n".join([
            "examples:", *(f"  {line}" for line in examples.splitlines()), "",
            "exit codes:", *(f"  {code:<4} {EXIT_CODES[code]}" for code in codes),
        ])  # fmt: skip
        text = f"{summary[0].upper()}{summary[1:]}. {description}".rstrip()
        one = commands.add_parser(
            name, parents=[common], help=summary, description=text, epilog=epilog, formatter_class=_Help
        )
        one.set_defaults(run=run)
        return one

    def method(one: argparse.ArgumentParser) -> None:
        one.add_argument(
            "--method", choices=("blocks", "potentials"),
            help="label in square blocks, or by votes of overlapping spheres (default: blocks; potentials if there are "
            "votes, or if the network has the feature local)",
        )  # fmt: skip

    def strict(one: argparse.ArgumentParser) -> None:
        one.add_argument(
            "--strict", action="store_true",
            help="exit with 4 if a warning says that the result may not be trusted; it is written nevertheless",
        )  # fmt: skip

    def with_theme(one: argparse.ArgumentParser) -> None:
        one.add_argument("--theme", choices=("dark", "light"), default="dark", help="of pictures (default: dark)")

    trained = {"type": _path, "metavar": "MODEL", "help": "a best.safetensors that kpcore train wrote"}
    demo = command(
        "demo", _demo, "train a network and label a scene with it; or subsample, search and convolve a scan",
        "Without a file: trains a small KP-FCNN on five furnished flats for some two minutes, labels "
        "another one, prints the IoU of each class and writes a picture. With --objects: trains a small KP-CNN on "
        "generated objects, classifies others and writes a picture. With a scan: level by level subsamples it, "
        "searches neighbours and runs a KPConv forward and backward; prints a table and writes a picture.",
        "kpcore demo\nkpcore demo --objects\nkpcore demo scan.laz --voxel 0.1 --levels 4",
    )  # fmt: skip
    demo.add_argument("file", nargs="?", type=_path, metavar="FILE", help="PLY, PCD, LAS, LAZ, NPY, NPZ, TXT, CSV, BIN")
    demo.add_argument("--voxel", type=_length, help="with FILE: voxel size of level 0 in its unit (default 0.04)")
    demo.add_argument(
        "--levels", type=_up_to(12), help="with FILE: number of levels, each with twice the voxel size (default 5)"
    )
    demo.add_argument("--channels", type=_up_to(1024), help="with FILE: channels in and out (default 64)")
    demo.add_argument(
        "--columns", type=_names, metavar="NAMES", help='with FILE: names for columns that have none, "x y z label"'
    )
    demo.add_argument("--objects", action="store_true", help="train on generated objects, and classify others")
    demo.add_argument(
        "--out", type=_path, default=Path(), metavar="DIR", help="folder for the picture (default: the current one)"
    )
    with_theme(demo)

    init = command(
        "init", _init, "write settings for a training, from what labelled files hold",
        "Reads labelled scans, or a folder of objects with a sub-folder for each class, and prints a settings file for "
        "kpcore train: classes with their numbers of points, features, lengths that fit the density, and a part to "
        "test on, with what was seen as comments. File names are relative to the current folder, or to that of --out.",
        "kpcore init scans/*.laz > my.toml\n"
        "kpcore init room.npy --columns \"x y z red green blue label\" --out my.toml",
    )  # fmt: skip
    init.add_argument(
        "files", type=_path, nargs="+", metavar="FILE",
        help="PLY, PCD, LAS, LAZ, NPY, NPZ, TXT, CSV, BIN; a pattern; a folder of these and its sub-folders; or a "
        "folder of objects",
    )  # fmt: skip
    init.add_argument("--label", metavar="NAME", help="field of the labels (default: the first usual name)")
    init.add_argument(
        "--columns", type=_names, metavar="NAMES", help='names for columns that have none, "x y z intensity label"'
    )
    init.add_argument(
        "--out", type=_path, metavar="TOML", help="the file to write, which must not exist (default: standard output)"
    )

    train = command(
        "train", _train, "train a network on labelled clouds with the settings of a TOML file",
        "The files of [data] train, validation and test are relative to --data. Each may be a folder (\"tiles/\": the "
        "PLY, PCD, LAS, LAZ and NPZ files in it) or a pattern (\"tiles/*.laz\"), which stand for files in the order of "
        "their names. A run that was stopped is resumed with the same command and --resume, and gives the same "
        "network to the bit. With --resume the TOML file may also have more epochs than before, and another validate "
        "or workers; no other setting may have changed.",
        "kpcore train scans.toml --data /data/scans --out runs/scans\n"
        "kpcore train scans.toml --data /data/scans --out runs/scans --resume\n"
        "kpcore train city.toml --init runs/scans/best.safetensors --out runs/city",
    )  # fmt: skip
    train.add_argument("settings", type=_path, metavar="TOML", help="the settings, see docs/settings.md")
    train.add_argument(
        "--out", type=_path, required=True, metavar="DIR",
        help="folder for checkpoints, the log and curves, with a folder in it for each fold",
    )  # fmt: skip
    train.add_argument("--data", type=_path, metavar="DIR", help="folder of the data files (default: that of the TOML)")
    train.add_argument("--seed", type=_up_to(2**31 - 1, 0), default=0, help="seed of all random numbers (default 0)")
    train.add_argument(
        "--resume", action="store_true", help="resume the run in the folder --out from its last checkpoint"
    )
    train.add_argument(
        "--init", type=_path, metavar="MODEL",
        help="begin with the weights of this trained model, which has the same features and network; the layer for the "
        "classes is new unless they are the same in the same order, and features are scaled as in the model",
    )  # fmt: skip
    train.add_argument("--fold", metavar="NAME", help="train this fold only (default: all, one after the other)")

    test = command(
        "test", _test, "compute the IoU of a trained network on the test files of its settings", "",
        "kpcore test runs/scans/best.safetensors --data /data/scans\n"
        "kpcore test runs/scans/best.safetensors --data /data/scans --out tested --strict",
        NOT_TRUSTED,
    )  # fmt: skip
    test.add_argument(
        "model", type=_path, metavar="MODEL",
        help="a best.safetensors that kpcore train wrote, or the folder of all folds, each of which is tested",
    )  # fmt: skip
    test.add_argument(
        "--data", type=_path, default=Path(), metavar="DIR", help="folder of the test files (default: the current one)"
    )
    method(test)
    test.add_argument(
        "--votes", type=_up_to(1000), help="votes for each place, or for each object (default: as in the settings)"
    )
    test.add_argument(
        "--out", type=_path, metavar="DIR",
        help="folder for the confusion matrix as CSV and picture, and for a picture of objects with a wrong class",
    )  # fmt: skip
    with_theme(test)
    strict(test)

    predict = command(
        "predict", _predict, "print the classes of objects by a trained network", "",
        "kpcore predict runs/objects/best.safetensors chair.off table.ply",
        FAILED, NOT_TRUSTED,
    )  # fmt: skip
    predict.add_argument("model", **trained)
    predict.add_argument(
        "files",
        type=_path,
        nargs="+",
        metavar="FILE",
        help="meshes in OFF or PLY, or clouds in any format that is read",
    )
    predict.add_argument("--votes", type=_up_to(1000), help="votes for each object (default: as in the settings)")
    strict(predict)

    segment = command(
        "segment", _segment, "label scans with a trained network",
        "Writes a copy of each scan with labels; everything else in it stays the same. If a scan has labels already, "
        "the scores and the confusion matrix against them are printed. Files that cannot be labelled are listed at the "
        "end, the others are done nevertheless. LAS, LAZ and COPC files of one survey are labelled as if they were one "
        "cloud, which need not fit into memory; the first line says whether they are one.",
        "kpcore segment best.safetensors scan.laz --out labelled.laz\n"
        "kpcore segment best.safetensors tiles/ --out labelled --keep 7,9,18 --confidence\n"
        "kpcore segment best.safetensors tiles/ --out labelled --resume\n"
        "kpcore segment best.safetensors 'tiles/**/*.ply' --out labelled --format laz\n"
        "kpcore segment best.safetensors feet.laz --out labelled.laz --scale 0.3048 --strict\n"
        "kpcore segment best.safetensors survey/ --out labelled --memory 8GB --workers 4 --scratch /fast/disk\n"
        "kpcore segment best.safetensors survey/ --out labelled --dask tcp://scheduler:8786 --resume",
        FAILED, NOT_TRUSTED,
    )  # fmt: skip
    segment.add_argument("model", **trained)
    segment.add_argument(
        "files", type=_path, nargs="+", metavar="FILE",
        help="scans; folders, which stand for the PLY, PCD, LAS, LAZ and NPZ files in them; or patterns in quotes, "
        "where ** stands for folders within folders",
    )  # fmt: skip
    segment.add_argument(
        "--out", type=_path, required=True, metavar="FILE|DIR",
        help="labelled copy of one FILE, if this name has an extension; otherwise a folder, which is made, for copies "
        "with the names of the scans. Files in it that have these names are replaced",
    )  # fmt: skip
    segment.add_argument(
        "--format", choices=FORMATS, help="format of the copies in a folder (default: that of each scan)"
    )
    segment.add_argument(
        "--resume", action="store_true",
        help="go on after an interruption: of a survey, with the same model and options; of separate scans, skip those "
        "that have a copy in the folder already, the options and model of which are not compared",
    )  # fmt: skip
    one_or_each = segment.add_mutually_exclusive_group()
    one_or_each.add_argument(
        "--together", action="store_true", default=None,
        help="label LAS, LAZ and COPC files as one survey (default: if they have one reference system and lie side by "
        "side)",
    )  # fmt: skip
    one_or_each.add_argument(
        "--separate", dest="together", action="store_false", help="label each file by itself, without its neighbours"
    )
    segment.add_argument(
        "--around", type=_path, nargs="+", metavar="FILE",
        help="further files, folders or patterns of the survey, which the network sees beside FILE and which are not "
        "labelled",
    )  # fmt: skip
    segment.add_argument(
        "--memory", type=_bytes, metavar="SIZE",
        help="memory for this process and its workers, such as 8GB (default: half of what is free); files that need "
        "more are labelled in parts, with the same result",
    )  # fmt: skip
    segment.add_argument(
        "--scratch", type=_path, metavar="DIR",
        help="folder for points and results until the end, which all workers reach (default: that of --out)",
    )  # fmt: skip
    engine = segment.add_mutually_exclusive_group()
    engine.add_argument("--workers", type=_up_to(1024), metavar="N", help="label in N processes (default: in this one)")
    engine.add_argument(
        "--dask", metavar="ADDRESS",
        help="label on the workers of a scheduler of Dask, such as tcp://host:8786, which reach the same folders; "
        "local:4 starts four here",
    )  # fmt: skip
    segment.add_argument(
        "--probabilities", action="store_true",
        help="write the probabilities of all classes of a survey to probabilities.zarr in the folder --out",
    )  # fmt: skip
    method(segment)
    segment.add_argument("--votes", type=_up_to(1000), help="votes for each place (default: as in the settings)")
    segment.add_argument("--category", metavar="NAME", help="category of the object, for a network of parts")
    segment.add_argument(
        "--keep", type=_labels, default=(), metavar="LABELS",
        help="points that have one of these labels keep it, such as 7,9,18: noise, water and high noise",
    )  # fmt: skip
    segment.add_argument(
        "--into", type=_name, metavar="NAME", help="write the labels to this field instead of the usual one"
    )
    segment.add_argument(
        "--confidence", action="store_true", help="add a field confidence, the probability of the label in percent"
    )
    segment.add_argument(
        "--unclassified", type=_fraction, metavar="P",
        help="label points as unclassified, 1 in LAS and LAZ and 0 in other formats, if their class has a smaller "
        "probability than this",
    )  # fmt: skip
    segment.add_argument(
        "--ignore", type=_ignored, default=(), metavar="LABELS",
        help="leave points with these labels or flags out of the input of the network, such as 7,18,withheld,overlap; "
        "they keep the label that they have",
    )  # fmt: skip
    segment.add_argument(
        "--scale", type=_factors, metavar="FACTOR",
        help="multiply coordinates by this before the network sees them: 0.3048 for a scan in feet where training was "
        "in metres; 0.3048,1 if only x and y are in feet; auto for the units that the file names",
    )  # fmt: skip
    segment.add_argument(
        "--picture", type=_path, metavar="PNG",
        help="picture of the labels of one scan; that of a survey is overview.png in the folder --out",
    )  # fmt: skip
    with_theme(segment)
    strict(segment)

    erf = command(
        "erf", _erf, "draw effective receptive fields of a trained network in a scan", "",
        "kpcore erf best.safetensors scan.laz --out fields\n"
        "kpcore erf best.safetensors scan.laz --at 12.5 3 1.2 --level 3 --out fields",
    )  # fmt: skip
    erf.add_argument("model", **trained)
    erf.add_argument("file", type=_path, metavar="FILE", help="PLY, PCD, LAS, LAZ, NPY, NPZ, TXT, CSV, BIN")
    erf.add_argument(
        "--at", type=float, nargs=3, action="append", metavar=("X", "Y", "Z"),
        help="position of an output, in the coordinates of the file; may be repeated (default: the middle of the scan)",
    )  # fmt: skip
    erf.add_argument(
        "--level", type=_up_to(MOST_LEVELS - 1, 0), metavar="N",
        help="of the features of the encoder on this level; 0 is the finest (default: of the logit of the class)",
    )  # fmt: skip
    erf.add_argument("--out", type=_path, default=Path(), metavar="DIR", help="folder for the pictures")
    with_theme(erf)

    features = command(
        "features", _features, "draw the inputs that maximise features of a trained network", "",
        "kpcore features best.safetensors a.laz b.laz --level 2 --out features",
    )  # fmt: skip
    features.add_argument("model", **trained)
    features.add_argument(
        "files",
        type=_path,
        nargs="+",
        metavar="FILE",
        help="scans, objects, or images of digits (idx), as the network has",
    )
    features.add_argument(
        "--level", type=_up_to(MOST_LEVELS - 1, 0), action="append", metavar="N",
        help="level of the encoder, may be repeated; 0 is the finest (default: 0 and 2)",
    )  # fmt: skip
    features.add_argument(
        "--channels", type=_up_to(MOST_CHANNELS - 1, 0), nargs="+", metavar="N",
        help="channels of the features (default: the four most selective)",
    )  # fmt: skip
    features.add_argument("--out", type=_path, default=Path(), metavar="DIR", help="folder for the picture")
    with_theme(features)

    report = command(
        "report", _report, "write one HTML page about a training: scores, curves, data, settings, times",
        "The page loads nothing, can be mailed and printed, and is dark or light as its reader's system is.",
        "kpcore report runs/scans\nkpcore report runs/scans --data scans --out report.html",
    )  # fmt: skip
    report.add_argument("folder", type=_path, metavar="RUN", help="the folder that kpcore train wrote")
    report.add_argument("--out", type=_path, metavar="HTML", help="the page (default: report.html in that folder)")
    report.add_argument(
        "--data", type=_path, metavar="DIR",
        help="folder of the data files, for pictures of test scenes and their features beside those of the training",
    )  # fmt: skip

    convert = command(
        "convert", _convert, "convert a checkpoint of published PyTorch code",
        "The result is a file that kpcore.nn.load reads; and kpcore segment or "
        "kpcore predict, if the network labels points or classifies objects and its settings say how its input is "
        "made. No code in the checkpoint is executed.",
        "kpcore convert chkp_0500.tar --from kpconv-pytorch --out s3dis.safetensors",
    )  # fmt: skip
    convert.add_argument("checkpoint", type=_path, metavar="CHECKPOINT", help="a file that torch.save wrote")
    convert.add_argument(
        "--from", dest="client", choices=[*CLIENTS], required=True, metavar="CODE",
        help=f"the code that it is of: {', '.join(CLIENTS)}",
    )  # fmt: skip
    convert.add_argument(
        "--config", type=_path, action="append", default=[], metavar="FILE",
        help="settings: parameters.txt, the yml of Open3D-ML, or TOML or JSON with the names of that code; may be "
        "repeated, later files add to earlier ones (default: parameters.txt, parameters.json or config.json beside the "
        "checkpoint or one folder above)",
    )  # fmt: skip
    convert.add_argument("--out", type=_path, required=True, metavar="FILE", help="the safetensors file to write")

    info = command(
        "info", _info, "print what a trained model is and was trained on",
        "Prints the blocks of the network, classes with their labels, features with the ranges that they had in "
        "training, the spacing and unit of the points, scores, and the licence that the settings state.",
        "kpcore info best.safetensors",
    )  # fmt: skip
    info.add_argument("model", type=_path, metavar="MODEL", help="a best.safetensors that kpcore train wrote")

    command("config", _config, "print version, instruction set, threads and GPU, for bug reports", "", "kpcore config")
    return top


# ---- commands: each returns its results, for --json


def _config(args: argparse.Namespace) -> dict[str, Any]:
    kp.show_config()
    return {"config": config_rows()}


def _info(args: argparse.Namespace) -> dict[str, Any]:
    model = _model(args.model)
    print(f"{args.model}: {args.model.stat().st_size:,} bytes")
    print(model.summary())
    return {"model": args.model, "bytes": args.model.stat().st_size, "parameters": kp.nn.count(model.params),
            **model.about(), **model.history}  # fmt: skip


def _demo(args: argparse.Namespace) -> dict[str, Any]:
    from kpcore import demo

    options = {name: getattr(args, name) for name in demo.SCAN if getattr(args, name) is not None}
    if args.file and args.objects:
        raise Refused(f"--objects: only valid without FILE, got {args.file}")
    if args.file:
        return demo.scan(args.file, args.out, **demo.SCAN | options, theme=args.theme)
    if options:
        raise Refused(f"--{', --'.join(options)}: only valid together with FILE")
    return (demo.objects if args.objects else demo.train)(args.out, args.theme)


def _init(args: argparse.Namespace) -> dict[str, Any]:
    from kpcore.pipeline import starting

    if args.out and args.out.exists():
        raise Refused(f"--out {args.out}: expected a new file, got one that exists, which is never overwritten")
    if args.out:
        check_writable(args.out)
    folder = args.out.parent if args.out else Path()
    text = starting.draft(args.files, folder, label=args.label, columns=args.columns)
    if args.out:
        with replacing(args.out) as part:
            part.write_text(text, encoding="utf-8")
        say(f"{args.out}: read it, change what you like, then: kpcore train {args.out} --out runs/first")
        return {"out": args.out, "settings": text}
    try:
        print(text, end="")
    except UnicodeEncodeError as error:
        got = f"{error.encoding}, which has no {error.object[error.start]!a}"
        raise Refused(f"standard output: expected UTF-8, got {got}; write the file with --out") from None
    return {"settings": text}


def _train(args: argparse.Namespace) -> dict[str, Any]:
    from kpcore.pipeline import filenames
    from kpcore.pipeline.settings import read_settings
    from kpcore.pipeline.training import LAST

    require("tqdm", "io")
    require("safetensors", "io")
    require("matplotlib.figure", "plot")  # checked before hours of training
    settings = read_settings(args.settings)
    if settings.data.folds:
        settings = filenames.expand(settings, args.data or args.settings.parent)
    folds = settings.by_fold()
    if args.fold is not None and args.fold not in folds:
        expected = f"one of {', '.join(folds)}" if folds else "settings with folds in [data]"
        raise Refused(f"--fold: expected {expected}, got {args.fold}")
    chosen = [name for name in folds if args.fold in (None, name)]
    outs = [args.out / name for name in chosen] or [args.out]
    _check_runs(args.out, outs, args.resume)
    for out in outs:
        make_folder(out)
        check_writable(out / LAST)
    args.resumable = lambda: any((out / LAST).is_file() for out in outs)
    with _ended_by_sigterm():
        if folds:
            return _train_folds(args, folds, chosen)
        return _train_run(args, settings, args.out, resume=args.resume)


def _check_runs(out: Path, runs: Sequence[Path], resume: bool) -> None:
    """Raise an error if a folder of the runs has one that was not to be resumed, or if there is none to resume."""
    from kpcore.pipeline.training import LAST, has_run

    started = [run for run in runs if has_run(run)]
    without_checkpoint = [run for run in runs if not (run / LAST).is_file()]
    if started and not resume:
        raise Refused(f"--out: {started[0]} has a run already; resume it with --resume or choose another folder")
    if not resume:
        return
    lost = [run for run in started if run in without_checkpoint]
    if lost or len(without_checkpoint) == len(runs):
        where, advice = (lost[0], "with another --out") if lost else (out, "without --resume")
        raise Refused(f"--resume: expected a checkpoint {LAST} in {where}, got none; start a new run {advice}")


def _train_folds(args: argparse.Namespace, settings: dict[str, Settings], chosen: Sequence[str]) -> dict[str, Any]:
    """Train the chosen folds, each in a folder below --out; print the table when all folds are complete."""
    from kpcore.pipeline import folds
    from kpcore.pipeline.curves import CURVES
    from kpcore.pipeline.training import LAST

    def confusions() -> dict[str, np.ndarray]:
        last = {name: folds.last_confusion(args.out / name, fold, args.seed) for name, fold in settings.items()}
        return {name: confusion for name, confusion in last.items() if confusion is not None}

    check_writable(args.out / folds.FOLDS)
    complete, read_parts, trained = confusions(), {}, {}
    for name in chosen:
        out, data = args.out / name, settings[name].data
        say(f"fold {name}: {len(data.train)} scenes to train on, {len(data.test)} to test")
        if name in complete and (out / CURVES).is_file():  # the last file that a run writes
            say(f"done already: {out}")
        else:
            trained[name] = _train_run(
                args, settings[name], out, resume=args.resume and (out / LAST).is_file(), read_parts=read_parts
            )
    complete = confusions()
    if missing := [name for name in settings if name not in complete]:
        say(f"{len(complete)} of {len(settings)} folds are done; to be trained: {', '.join(missing)}")
        return {"folds": trained, "missing": missing}
    names = settings[chosen[0]].names
    folds.write(args.out / folds.FOLDS, names, complete)
    say("after the last epoch of each fold; all folds: of the sum of their confusion matrices")
    say(*folds.table(names, complete))
    say(f"table: {args.out / folds.FOLDS}")
    return {"folds": trained, "missing": [], "table": args.out / folds.FOLDS} | _scores_of_folds(names, complete)


def _train_run(args: argparse.Namespace, settings: Settings, out: Path, *, resume: bool,
               read_parts: PartClouds | None = None) -> dict[str, Any]:  # fmt: skip
    from kpcore.pipeline import class_table
    from kpcore.pipeline.training import BEST, Training

    begin = time.perf_counter()
    training = Training(settings, out, args.data or args.settings.parent, seed=args.seed, resume=resume,
                        read_parts=read_parts, init=args.init, say=say)  # fmt: skip
    net, epochs, steps = training.model.net, settings.training.epochs, settings.training.steps
    parameters, points = kp.nn.count(training.model.params), sum(len(scene.points) for scene in training.scenes)
    sizes = f"{parameters:,} parameters, {net.num_levels} levels, {len(settings.names)} classes"
    say(f"{sizes}; {points:,} points to train on")
    say(*class_table.lines(training.classes, "objects" if settings.classifies else "points"))
    if not (training.test_scenes or training.validation_scenes):
        say("without test or validation in [data] the last network is kept, and nothing says how good it is")
    elif not training.validation_scenes:
        say("the best network is chosen by the test data, so its score there is too good: see validation in [data]")
    for name, files in training.files.items():
        detail(f"{name}: {', '.join(files) or 'none'}")
    detail(f"data read and network made in {time.perf_counter() - begin:.1f} s; {kp.get_num_threads()} threads")
    tested: dict[str, Any] = {}
    with Progress("training", epochs * steps, training.epoch * steps + training.step, rate=True) as progress:

        def watch(entry: dict[str, Any]) -> None:
            for kind in ("validation", "test"):
                if kind in entry:
                    when = f"after epoch {entry['epoch']}"
                    if "best" in entry:
                        when = f"of the best network, that after epoch {entry['best']}"
                    print_line(_scores(f"{kind} {when}", entry[kind], settings.classifies))
                    detail(f"{kind} took {entry['seconds']:.1f} s")
                    tested[kind] = entry[kind]
                    return
            progress.step(f"epoch {entry['epoch'] + 1} of {epochs}", f"loss {entry['loss']:.3f}",
                          f"step {entry['step'] + 1} of {steps}")  # fmt: skip

        begin = time.perf_counter()
        training.run(watch)
    seconds = time.perf_counter() - begin
    say(f"done in {seconds:.0f} s: {out}")
    return {
        "out": out, "model": out / BEST, "epochs": epochs, "seconds": seconds, "parameters": parameters,
        "points": points, "classes": settings.names, "loss": training.loss, "results": training.results,
        **tested,
    }  # fmt: skip


def _scores_of_folds(names: Sequence[str], confusions: dict[str, np.ndarray]) -> dict[str, Any]:
    """The scores and the confusion matrix of each fold and of their sum."""
    from kpcore.pipeline import folds, voting

    total = folds.total_confusion(confusions)
    scores = {name: voting.scores(one, names) | {"confusion": one} for name, one in confusions.items()}
    return {"classes": names, "scores": voting.scores(total, names), "confusion": total, "scores_of_folds": scores}


def _scores(when: str, scores: Scores, classifies: bool) -> str:
    by_class = scores["class_accuracy" if classifies else "iou"]
    parts = [f"{name} {'-' if value is None else f'{value:.3f}'}" for name, value in by_class.items()]
    if classifies:
        means = f"accuracy {scores['accuracy']:.4f}, mean class accuracy {scores['mean_class_accuracy']:.4f}"
        return f"{when}: {means} | accuracy {', '.join(parts)}"
    means = f"mIoU {scores['miou']:.4f}{classes_in_mean(scores)}, accuracy {scores['accuracy']:.4f}"
    if "class_miou" in scores:
        means = f"instance mIoU {scores['miou']:.4f}, class mIoU {scores['class_miou']:.4f}"
    return f"{when}: {means} | IoU {', '.join(parts)}"


def _model(path: Path) -> Model:
    from kpcore.pipeline.model import Model

    return Model.load(path)


def _test(args: argparse.Namespace) -> dict[str, Any]:
    from kpcore.pipeline import classification, labelling, voting
    from kpcore.pipeline.data import load

    if args.model.is_dir():
        return _test_folds(args)
    model = _model(args.model)
    if not model.settings.data.test:
        raise Refused(f"{args.model}: expected test files in its settings ([data] test), got none")
    settings, classifies = model.settings, model.settings.classifies
    _check_out_of_test(args.out)
    detail("reading the test data")
    loaded = load(settings, settings.data.test, args.data, model.columns)[0]
    if classifies:
        with Progress("testing") as progress:
            classified = classification.classify(model, loaded, args.votes, progress.to)
        confusion = classified.confusion()
        scores = voting.scores(confusion, settings.names)
    else:
        with Progress("testing") as progress:
            watch = progress.to if settings.heads else _of_each(progress, len(loaded))
            confusion, scores = labelling.evaluate_scores(
                model, loaded, args.votes, watch, mode=args.method, compare=True
            )
    scored = _scores(f"{confusion.sum():,} labelled", scores, classifies)
    print(scored)
    if settings.heads:
        objects = np.bincount([scene.category for scene in loaded], minlength=len(settings.heads))
        print(f"{'category':>16} {'objects':>8} {'mIoU':>8}")
        for (name, value), number in zip(scores["iou"].items(), objects, strict=True):
            print(f"{name:>16} {number:>8,} {'-' if value is None else f'{value:.4f}':>8}")
    _show_confusion(args, scored, settings.names, confusion)
    if args.out and classifies and len(classified.errors):
        classification.draw_errors(args.out / "errors.png", model, classified, args.theme)
        say(f"picture: {args.out / 'errors.png'}")
    return {"classes": settings.names, "scores": scores, "confusion": confusion}


def _of_each(progress: Progress, number: int) -> Callable[[float], None]:
    """A function that takes the fractions that are done of each of several scenes, one after the other."""
    at = [0, 0.0]

    def watch(done: float) -> None:
        at[:] = at[0] + (done < at[1]), done
        progress.to((at[0] + done) / number)

    return watch


def _check_out_of_test(out: Path | None) -> None:
    if out:
        require("matplotlib.figure", "plot")
        make_folder(out)
        check_writable(out / CONFUSION)


def _confusion_lines(names: Sequence[str], confusion: np.ndarray) -> list[str]:
    rows = zip(names, confusion, strict=True)
    return [
        "confusion, a row for each true class:",
        *(f"{name:>16} " + " ".join(f"{value:>10,}" for value in row) for name, row in rows),
    ]


def _show_confusion(args: argparse.Namespace, scored: str, names: Sequence[str], confusion: np.ndarray) -> None:
    """Print a confusion matrix; write it to the folder --out, if any, as CSV and as picture."""
    from kpcore import picture
    from kpcore.pipeline import classification

    out: Path | None = args.out
    print(*_confusion_lines(names, confusion), sep="\n")
    if not out:
        return
    classification.write_confusion(out / CONFUSION, names, confusion)
    say(f"table: {out / CONFUSION}")
    with replacing(out / "confusion.png") as part:
        subtitle = f"{scored.partition(' | ')[0]}; rows: true class"
        picture.draw_confusion(part, "Confusion", subtitle, names, confusion, theme=args.theme)
    say(f"picture: {out / 'confusion.png'}")


def _test_folds(args: argparse.Namespace) -> dict[str, Any]:
    """Test the network of each fold after its last epoch on the scenes of the fold."""
    from kpcore.pipeline import folds, labelling, voting
    from kpcore.pipeline.data import load
    from kpcore.pipeline.training import LAST

    if not (args.model / folds.FOLDS).is_file():
        raise Refused(f"{args.model}: expected a model, or a folder of folds that are all trained, with {folds.FOLDS}")
    models = {name: _model(args.model / name / LAST) for name in folds.names_of_folds(args.model / folds.FOLDS)}
    names = next(iter(models.values())).settings.names
    if other := [name for name, model in models.items() if model.settings.names != names]:
        raise Refused(f"{args.model / other[0] / LAST}: expected the classes of the other folds, {', '.join(names)}")
    _check_out_of_test(args.out)
    confusions = {}
    for name, model in models.items():
        loaded = load(model.settings, model.settings.data.test, args.data, model.columns)[0]
        with Progress(f"testing {name}") as progress:
            watch = _of_each(progress, len(loaded))
            confusions[name] = labelling.evaluate(model, loaded, args.votes, watch, mode=args.method, compare=True)
        scores = voting.scores(confusions[name], names)
        print(_scores(f"fold {name}, {scores['points']:,} labelled", scores, classifies=False))
    total = folds.total_confusion(confusions)
    scored = _scores(f"{total.sum():,} labelled", voting.scores(total, names), classifies=False)
    print(*folds.table(names, confusions), sep="\n")
    _show_confusion(args, scored, names, total)
    return _scores_of_folds(names, confusions)


def _predict(args: argparse.Namespace) -> dict[str, Any]:
    from kpcore.pipeline import classification

    model = _model(args.model)
    if model.settings.data.kind != "objects":
        raise Refused(f"{args.model}: expected a network of objects, got one of {model.settings.data.kind}")
    objects, failed, files = [], [], []
    for path in args.files:
        try:
            objects += [(path, scene) for scene in classification.objects_of_files(model, [path])]
        except (ValueError, OSError, ImportError) as error:  # the others have a class nevertheless
            failed.append({"file": path, "error": _reason(error)})
    if objects:
        paths, scenes = zip(*objects, strict=True)
        with Progress("classifying") as progress:
            classified = classification.classify(model, [*scenes], args.votes, progress.to)
        for path, number, row in zip(paths, classified.classes, classified.probabilities, strict=True):
            print(f"{path}: {model.settings.names[number]} {row[number]:.4f}")
            probabilities = dict(zip(model.settings.names, row, strict=True))
            files.append({"file": path, "class": model.settings.names[number], "probabilities": probabilities})
    return {"files": files, "failed": failed}


def _segment(args: argparse.Namespace) -> dict[str, Any]:
    from kpcore.pipeline import segmentation

    model = _model(args.model)
    if not model.net.segments:
        raise Refused(f"{args.model}: expected a network that labels points, got one that classifies whole clouds")
    try:
        segmentation.check_category(model, args.category)
    except ValueError as error:
        raise Refused(f"--{error}") from None
    copies = _copies(args)
    if (survey := _survey(args, model, copies)) is not None:
        return survey
    names = ("method", "votes", "category", "keep", "into", "confidence", "unclassified", "ignore", "scale")
    options = {name: getattr(args, name) for name in names}
    if copies is None:
        with Progress("labelling") as progress:
            one, segmented = _segment_one(args, model, args.files[0], args.out, options, progress.to)
        _show_one(one, model, is_alone=True)
        if args.picture:
            with replacing(args.picture) as part:
                segmentation.draw(part, args.files[0].name, segmented, model.settings, theme=args.theme)
            say(f"picture: {args.picture}")
        return {"files": [one], "classes": model.settings.names}
    make_folder(args.out)
    args.resumable = lambda: True
    with _ended_by_sigterm():
        return _segment_all(args, model, copies, options)


def _survey(args: argparse.Namespace, model: Model, copies: dict[Path, Path] | None) -> dict[str, Any] | None:
    """Label LAS, LAZ and COPC files as one survey; None if each is to be labelled by itself."""
    from kpcore.io import ReadError, scans
    from kpcore.pipeline import filenames, surveys

    sources = args.files if copies is None else [*copies]
    for_surveys = [
        f"--{name}" for name in ("around", "together", "workers", "dask", "probabilities", "scratch")
        if getattr(args, name) not in (None, False)
    ]  # fmt: skip
    labelled = {os.path.realpath(source) for source in sources}
    around = [Path(name) for pattern in args.around or () for name in filenames.matching(pattern)]
    args.around = [other for other in around if os.path.realpath(other) not in labelled]  # a folder has both
    for other in args.around:
        if not other.exists():
            raise Refused(f"--around: {other}: no such file or folder")
    if why_not := _why_no_survey(args, model, sources):
        if for_surveys:
            raise Refused(f"{for_surveys[0]}: only valid for a survey, or a scan that is labelled in parts: {why_not}")
        if len(sources) > 1:
            say(f"each of the {len(sources):,} files is labelled by itself: {why_not}")
        return None
    headers = []
    for source in (*sources, *args.around):
        try:
            scan = scans.opened(source)
            headers.append(scan if scan.low or scan.layout else scans.measured(scan))
        except ReadError as error:  # told at the end
            if len(sources) == 1 and source in sources:
                raise
            detail(error)
    if not headers:  # each is told with its reason
        return None
    decision = surveys.decide(headers, args.together)
    if len(headers) > 1:
        say(decision.reason)
    if not decision.together:
        if for_surveys:
            raise Refused(f"{for_surveys[0]}: only valid for a survey: {decision.reason}")
        return None
    if (copies is None or headers[0].layout) and not for_surveys and not _is_large(args, headers[0]):
        return None
    with Progress("reading", width=12) as progress:
        return _segment_survey(args, model, sources, args.out, progress)


def _why_no_survey(args: argparse.Namespace, model: Model, sources: Sequence[Path]) -> str | None:
    """Why files cannot be labelled piece by piece, if so."""
    from kpcore.io import scans
    from kpcore.io.formats import why_no_pieces
    from kpcore.pipeline import labelling

    if args.category is not None:
        return "a network of parts labels single objects"
    method, notes = labelling.chosen_method(model, args.method, args.votes)
    if method != "blocks":
        return notes[0] if notes else "potentials need a whole cloud"
    if len(sources) == 1:
        return why_no_pieces(sources[0], _copy(args, sources[0]))
    if args.format and f".{args.format}" not in scans.EXTENSIONS:
        return f"{args.format.upper()} files are not written piece by piece"
    others = [source for source in sources if source.suffix.lower() not in scans.EXTENSIONS]
    return f"{others[0].name} is no LAS, LAZ or COPC file" if others else None


def _copy(args: argparse.Namespace, source: Path) -> Path:
    """The name of the copy of a scan."""
    from kpcore.pipeline import filenames

    is_name = args.out.suffix and not args.out.is_dir()
    return args.out if is_name else args.out / filenames.copy_name(source, args.format)


def _check_fits(args: argparse.Namespace, source: Path, copy: Path) -> None:
    """Refuse a scan that needs more memory than there is and cannot be labelled in parts because of its format."""
    from kpcore.io import scans
    from kpcore.io.formats import why_no_pieces

    if not source.is_file() or (reason := why_no_pieces(source, copy)) is None:
        return
    suffix, points = source.suffix.lower(), source.stat().st_size / BYTES_IN_FILE
    if suffix in scans.LAYOUTS or suffix in scans.EXTENSIONS:
        points = scans.opened(source).num_points
    needed, limit = points * BYTES_OF_POINT, args.memory or free_memory()
    if needed > limit:
        raise Refused(f"{source}: needs some {needed / 2**30:.2g} GiB of memory, got {limit / 2**30:.2g} GiB: {reason}")


def _is_large(args: argparse.Namespace, scan: Scan) -> bool:
    """Whether a file needs more memory than it may take if it is read whole."""
    return scan.num_points * BYTES_OF_POINT > (args.memory or free_memory() / 2)


def _segment_survey(args: argparse.Namespace, model: Model, sources: Sequence[Path], out: Path,
                    progress: Progress) -> dict[str, Any]:  # fmt: skip
    """Label a survey; what --json prints of it."""
    from kpcore.picture import in_one_line
    from kpcore.pipeline import tiled, voting

    args.resumable = lambda: tiled.is_under_way(out)
    copies = {os.path.abspath(one): copy for one, copy in tiled.copies_of(sources, out, args.format).items()}

    def watch(what: str, done: float, note: str) -> None:
        if what == "worker":
            detail(in_one_line(note))
        else:
            progress.to(done, what, note)

    names = ("around", "memory", "scratch", "resume", "dask", "format", "keep", "into", "confidence", "unclassified",
             "probabilities", "ignore", "scale", "theme")  # fmt: skip
    options = {name: getattr(args, name) for name in names}
    try:
        with _ended_by_sigterm():
            survey = tiled.segment_tiles(
                args.model, sources, out, workers=args.workers or 0, report=lambda line: say(in_one_line(line)),
                watch=watch, **options,
            )  # fmt: skip
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        name = "dask" if name == "cluster" else name
        if colon and name in (*names, "out", "workers"):
            raise Refused(f"--{name}:{rest}") from None
        raise
    files = []
    for one in survey.files:
        scores = None if one.confusion is None else voting.scores(one.confusion, model.settings.names)
        files.append({"file": one.source, "out": one.out, "points": one.points, "counts": one.counts, "scores": scores,
                      "confusion": one.confusion, "notes": one.notes, "warnings": []})  # fmt: skip
        (detail if len(survey.files) > MOST_FILES_LISTED else say)(
            f"{in_one_line(str(copies[one.source]))}: {counted(one.points, 'point')} labelled"
        )
        for note in one.notes:
            detail(f"{one.source}: {note}")
    seconds = survey.seconds["all"]
    if files:
        lines = [f"{counted(len(files), 'file')}: {counted(sum(one.points for one in survey.files), 'point')}"
                 f"{_cost(survey, args.resume)}", *_lines(survey.counts), *survey.notes]  # fmt: skip
        if survey.scores is not None:
            lines += _comparison(model, survey.scores, survey.confusion, sum(one.points for one in survey.files))
            lines += _confusion_lines(model.settings.names, survey.confusion)
        for line in lines:
            print_line(line)
    failed = [{"file": file, "error": error} for file, error in survey.failed.items()]
    return {
        "files": files, "failed": failed, "skipped": [], "classes": model.settings.names, "counts": survey.counts,
        "scores": survey.scores, "confusion": survey.confusion, "seconds": survey.seconds, "points": survey.points,
        "points_per_second": survey.points / max(seconds, 1e-9), "peak_memory": survey.peak_memory,
        "groups": survey.groups, "close": survey.close, "notes": survey.notes,
    }  # fmt: skip


def _comparison(model: Model, scores: Scores, confusion: np.ndarray, points: int) -> list[str]:
    """The scores against the labels in files, and at how many of their points there are such labels."""
    compared = int(confusion.sum())
    lines = [_scores("compared with the labels in the files", scores, model.settings.classifies)]
    if compared < points:
        lines.append(
            f"compared at {compared:,} of {counted(points, 'point')}; the labels of the others are of no class"
        )
    return lines


def _cost(survey: Survey, is_resumed: bool) -> str:
    """Text after the number of points of a survey: what this run has labelled of them, time and memory."""
    if not survey.points:
        return ", all of which an earlier run has labelled"
    part = ""
    if is_resumed and survey.points < sum(one.points for one in survey.files):
        part = f", {survey.points:,} of them in this run,"
    seconds = survey.seconds["all"]
    return (f"{part} in {duration(seconds)}, {survey.points / max(seconds, 1e-9):,.0f} points/s, at most "
            f"{survey.peak_memory / 2**30:.2g} GiB of memory")  # fmt: skip


def _copies(args: argparse.Namespace) -> dict[Path, Path] | None:
    """The copy of each scan in the folder --out; None if --out is the copy of a single file."""
    from kpcore.pipeline import filenames, segmentation

    sources = []
    for file in args.files:
        names = filenames.matching(file)
        if names == [str(file)] and not file.exists():
            raise Refused(f"{file}: no such file or folder")
        sources += map(Path, names)
        if names != [str(file)]:
            detail(f"{file}: {len(names)} scans")
    if len(args.files) == 1 and sources == args.files and args.out.suffix and not args.out.is_dir():
        for name, value in (("format", args.format), ("resume", args.resume)):
            if value:
                raise Refused(f"--{name}: only valid where --out is a folder, got {args.out}, which has an extension")
        segmentation.check_out(sources[0], args.out)
        if args.picture:
            require("matplotlib", "plot")
            check_writable(args.picture)
        return None
    if args.picture:
        raise Refused("--picture: only valid for one FILE and the name of its copy as --out")
    if args.out.exists() and not args.out.is_dir():
        raise Refused(f"--out {args.out}: expected a folder for {len(sources)} scans, got a file")
    if args.out.suffix.lower()[1:] in FORMATS and not args.out.is_dir():
        raise Refused(f"--out {args.out}: expected the name of a folder for {len(sources)} scans, got that of a file")
    copies = {}
    for source in sources:
        if source in copies:
            raise Refused(f"{source}: expected each scan once, got it twice")
        copies[source] = args.out / filenames.copy_name(source, args.format)
    filenames.check_copies(copies)
    return copies


def _segment_all(args: argparse.Namespace, model: Model, copies: dict[Path, Path],
                 options: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    """Label several scans; those that fail are in the results, and do not keep the others from being labelled."""
    from kpcore.io import scans
    from kpcore.pipeline import voting

    skipped = [source for source, copy in copies.items() if args.resume and copy.exists()]
    if skipped:
        say(f"{len(skipped)} of {len(copies)} scans have a copy in {args.out} already and are skipped")
    files, failed = [], []
    with Progress("labelling") as progress:
        left = [(source, copy) for source, copy in copies.items() if source not in skipped]
        for number, (source, copy) in enumerate(left):
            args.warned.file = source

            def watch(done: float, number: int = number, source: Path = source) -> None:
                progress.to((number + done) / len(left), f"{number + 1} of {len(left)}", source.name)

            try:
                if not _why_no_survey(args, model, [source]) and _is_large(args, scans.opened(source)):
                    one = _segment_large(args, model, source, copy, progress)
                else:
                    one, _ = _segment_one(args, model, source, copy, options, watch)
            except Exception as error:
                failed.append({"file": source, "error": _reason(error)})
                say(f"{source}: failed")
            else:
                files.append(one)
                _show_one(one, model)
    args.warned.file = None
    results = {"files": files, "failed": failed, "skipped": skipped, "classes": model.settings.names}
    if len(files) > 1:
        counts = {name: sum(one["counts"][name] for one in files) for name in model.settings.names}
        say(f"{len(files)} scans: {sum(counts.values()):,} points labelled", *_lines(counts))
        results["counts"] = counts
    if len(files) > 1 and (matrices := [one["confusion"] for one in files if one["confusion"] is not None]):
        total, heads = np.sum(matrices, axis=0), model.settings.heads
        if heads:
            scores = voting.part_scores(matrices, [[*heads].index(args.category)] * len(matrices), heads)
        else:
            scores = voting.scores(total, model.settings.names)
        say(_scores(f"compared with the labels of {len(matrices)} scans", scores, model.settings.classifies))
        say(*_confusion_lines(model.settings.names, total))
        results |= {"scores": scores, "confusion": total}
    return results


def _segment_large(args: argparse.Namespace, model: Model, source: Path, copy: Path,
                   progress: Progress) -> dict[str, Any]:  # fmt: skip
    """Label a scan that does not fit into memory; what --json prints of it."""
    results = _segment_survey(args, model, [source], copy, progress)
    for failed in results["failed"]:
        raise Refused(failed["error"])
    return results["files"][0] | {"seconds": results["seconds"]["all"], "notes": results["notes"]}


def _segment_one(args: argparse.Namespace, model: Model, source: Path, copy: Path, options: dict[str, Any],
                 watch: Callable[[float], object]) -> tuple[dict[str, Any], Segmented]:  # fmt: skip
    """Label a scan; returns what --json prints of it, and all of it."""
    from kpcore.pipeline import segmentation, voting

    begin, before = time.perf_counter(), len(args.warned.lines)
    _check_fits(args, source, copy)
    segmented = segmentation.segment(model, source, copy, watch=watch, report=say, **options)
    matrix, names = None, model.settings.names
    if segmented.scores is not None:
        matrix = voting.confusion(segmented.true, segmented.classes, len(names))
    return {
        "file": source, "out": copy, "points": len(segmented.classes),
        "counts": dict(zip(names, segmented.counts.tolist(), strict=True)), "scores": segmented.scores,
        "confusion": matrix, "seconds": time.perf_counter() - begin,
        "notes": segmented.labelled.notes if segmented.labelled else [], "warnings": args.warned.lines[before:],
    }, segmented  # fmt: skip


def _show_one(one: dict[str, Any], model: Model, is_alone: bool = False) -> None:
    lines = [
        f"{one['out']}: {one['points']:,} points labelled",
        *(_lines(one["counts"]) if is_alone else []),
        *one["notes"],
    ]
    if one["scores"] is not None:
        lines.append(_scores("compared with the labels in the file", one["scores"], model.settings.classifies))
        lines += _confusion_lines(model.settings.names, one["confusion"]) if is_alone else []
    for line in lines:
        print_line(line)
    detail(f"{one['file']}: {one['seconds']:.1f} s")


def _lines(counts: dict[str, int]) -> list[str]:
    return [f"{name:>16} {number:>12,}" for name, number in counts.items()]


def _check_levels(model: Model, path: Path, levels: Sequence[int]) -> None:
    if max(levels) >= model.net.num_levels:
        raise Refused(f"--level {max(levels)}: expected a level below {model.net.num_levels}, as {path} has")


def _check_no_parts(model: Model, path: Path) -> None:
    if model.settings.heads:
        raise Refused(f"{path}: expected a network of scenes, objects or digits, got one of parts")


def _erf(args: argparse.Namespace) -> dict[str, Any]:
    from kpcore.pipeline import inspection

    model = _model(args.model)
    if not model.net.segments:
        raise Refused(f"{args.model}: expected a network that labels points, got one that classifies whole clouds")
    _check_no_parts(model, args.model)
    _check_levels(model, args.model, [args.level or 0])
    require("matplotlib", "plot")
    pictures = args.out / f"kpcore-erf-{args.file.stem}.png"
    scene = inspection.scene_of_file(model, args.file)
    centers = [] if args.at else [inspection.middle_point(scene)]
    for position in args.at or ():
        try:
            centers.append(inspection.nearest_point(model, scene, position - scene.cloud.shift))
        except ValueError as error:
            raise Refused(f"--at {' '.join(f'{value:.12g}' for value in position)}: {error}") from None
    make_folder(args.out)
    check_writable(pictures)
    fields = [inspection.field_at(model, scene, center, args.level) for center in centers]
    what = f"features of level {args.level}"
    if args.level is None:
        what = f"logit of the class, theoretical radius {model.net.reach or math.inf:.4g}"
    print(f"effective receptive fields of the {what}; in spheres of radius {model.settings.training.radius:g}")
    print(f"{'position':>33} {'class':>12} {'voxels':>8} {'radius':>8} {'deviations':>24}")
    for field in fields:
        place = "".join(f"{value:>11.2f}" for value in field.center + scene.cloud.shift)
        deviations = "".join(f"{value:>8.3f}" for value in field.deviations)
        name = model.settings.names[field.predicted]
        print(f"{place} {name:>12} {field.size:>8.1f} {field.radius:>8.3f} {deviations}")
    print("voxels: root of the number above 4.55 % of the largest value; radius: with 95 % of the mass")
    subtitle = f"effective receptive fields, {'logits' if args.level is None else f'level {args.level}'}, {args.model}"
    paths = [*inspection.draw_fields(pictures, args.file.name, subtitle, model, scene, fields, args.theme)]
    say(*(f"picture: {path}" for path in paths))
    return {"pictures": paths, "fields": [
        {
            "position": field.center + scene.cloud.shift, "class": model.settings.names[field.predicted],
            "voxels": field.size, "radius": field.radius, "deviations": field.deviations,
        }
        for field in fields
    ]}  # fmt: skip


def _features(args: argparse.Namespace) -> dict[str, Any]:
    from kpcore.pipeline import inspection

    model = _model(args.model)
    _check_no_parts(model, args.model)
    levels = args.level or [level for level in (0, 2) if level < model.net.num_levels]
    _check_levels(model, args.model, levels)
    require("matplotlib", "plot")
    picture = args.out / "kpcore-features.png"
    scenes, names = inspection.scenes_of_files(model, args.files)
    make_folder(args.out)
    check_writable(picture)
    with Progress("evaluating") as progress:
        chosen = inspection.maximizing_inputs(model, scenes, names, levels, channels=args.channels, watch=progress.to)
    for (level, channel), inputs in chosen.items():
        for one in inputs:
            print(f"level {level}, channel {channel:>4}: {one.activation.max():>9.3f} in {one.name}")
    with replacing(picture) as part:
        inspection.draw_features(part, f"Features of {args.model}", model, chosen, args.theme)
    say(f"picture: {picture}")
    return {"picture": picture, "features": [
        {"level": level, "channel": channel, "inputs": {one.name: one.activation.max() for one in inputs}}
        for (level, channel), inputs in chosen.items()
    ]}  # fmt: skip


def _report(args: argparse.Namespace) -> dict[str, Any]:
    from kpcore.pipeline import report

    require("matplotlib", "plot")
    path = report.write(args.folder, args.out, data=args.data)
    say(f"report: {path}")
    return {"report": path}


def _convert(args: argparse.Namespace) -> dict[str, Any]:
    from kpcore.pipeline import conversion

    try:
        converted = conversion.convert(args.checkpoint, args.client, args.out, args.config)
    except ValueError as error:
        first, *lines = str(error).splitlines()
        for line in lines:  # of all arrays that do not fit
            print_line(line, sys.stderr)
        raise Refused(f"{first}; nothing is written" if lines else first) from None
    net, title = converted.net, CLIENTS[args.client].title
    say(f"{args.out}: {type(net).__name__} of {title}, {kp.nn.count(converted.params):,} parameters, "
          f"{net.num_levels} levels, voxel size {net.voxel_size:g}, {net.num_features} input features")  # fmt: skip
    if names := converted.about.get("names"):
        say(f"{net.num_classes} classes: {', '.join(names)}")
    else:
        say(f"{net.num_classes} channels for each point of level {net.output_level}")
    say(f"settings: {', '.join(map(str, converted.configs)) or 'none'}")
    if converted.unused:
        say(f"not converted: {', '.join(conversion.summary(converted.unused))}")
    command = "segment" if net.segments else "predict"
    say(f"kpcore {command}: {'cannot use it: ' + converted.missing if converted.missing else 'can use it'}")
    return {
        "out": args.out, "network": type(net).__name__, "parameters": kp.nn.count(converted.params),
        "classes": converted.about.get("names"), "command": None if converted.missing else command,
        "missing": converted.missing, "not_converted": converted.unused,
    }  # fmt: skip
