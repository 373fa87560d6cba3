"""The command `kpcore`."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kpcore as kp
from kpcore.config import require
from kpcore.console import BAR, PLAIN, Refused, make_folder, of_classes
from kpcore.files import check_writable, expanded, whole
from kpcore.pipeline.settings import LENGTHS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kpcore.pipeline.training import Model
    from kpcore.pipeline.voting import Scores


def main(argv: Sequence[str] | None = None) -> int:
    """The command: returns 0, 2 for input that cannot be used, 130 after Ctrl-C. Who reads no more of what is printed
    is a BrokenPipeError."""
    from kpcore.pipeline.training import NotFinite

    args = _parser().parse_args(argv)
    try:
        with _warnings_in_lines():
            args.run(args)
    except BrokenPipeError:
        raise
    except (ValueError, NotFinite, ImportError) as error:  # all that kpcore says of its input is a ValueError
        return _refused(error)
    except OSError as error:
        return _refused(f"{error.filename or 'standard output'}: {error.strerror or error}")
    except MemoryError as error:
        words = " ".join(sys.argv[1:] if argv is None else argv)
        return _refused(f"not enough memory for {words}{f': {error}' if str(error) else ''}")
    except KeyboardInterrupt:
        return 130
    return 0


def _refused(reason: object) -> int:
    _say(reason)
    return 2


def _say(what: object) -> None:
    print(f"kpcore: {'; '.join(str(what).splitlines())}", file=sys.stderr)  # one line, whatever a name in it holds


@contextmanager
def _warnings_in_lines() -> Iterator[None]:
    """Each warning is one line on stderr, once."""
    said = set()

    def show(message, *where):
        if str(message) not in said:
            said.add(str(message))
            _say(message)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _parser() -> argparse.ArgumentParser:
    def path(text: str) -> Path:
        if not text:
            raise argparse.ArgumentTypeError("expected a path, got an empty one")
        return expanded(text)

    def names(text: str) -> list[str]:
        if not text.split():
            raise argparse.ArgumentTypeError('expected names such as "x y z intensity", got none')
        return text.split()

    def length(text: str) -> float:
        value, (least, most) = float(text), LENGTHS
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected a length from {least:g} to {most:g}, got {text}")
        return value

    def up_to(most: int, least: int = 1) -> Callable[[str], int]:
        def number(text: str) -> int:
            value = int(text)
            if not least <= value <= most:
                raise argparse.ArgumentTypeError(f"expected {least} to {most}, got {text}")
            return value

        return number

    parser = argparse.ArgumentParser(prog="kpcore", description="The numerical core of point convolutions.")
    parser.add_argument("--version", action="version", version=f"kpcore {kp.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    shown = commands.add_parser(
        "demo",
        help="train a network and label a scene with it; or subsample, search and convolve a scan",
        description="Without a file: trains a small KP-FCNN on five furnished flats for some two minutes, labels "
        "another one, prints the IoU of each class and writes a picture. With a scan: level by level subsamples it, "
        "searches neighbours and runs a KPConv forward and backward; prints a table and writes a picture.",
    )
    shown.add_argument("file", nargs="?", type=path, metavar="FILE", help="PLY, PCD, LAS, LAZ, NPY, NPZ, TXT, CSV, BIN")
    shown.add_argument("--voxel", type=length, help="of a FILE: voxel of level 0 in its unit (default 0.04)")
    shown.add_argument("--levels", type=up_to(12), help="of a FILE: each of twice the voxel (default 5)")
    shown.add_argument("--channels", type=up_to(1024), help="of a FILE: channels in and out (default 64)")
    shown.add_argument("--columns", type=names, metavar="NAMES", help='of a table without names: "x y z label"')
    shown.add_argument("--out", type=path, default=Path(), metavar="DIR", help="where the picture goes (default here)")
    shown.set_defaults(run=_demo)

    trained = commands.add_parser("train", help="train a network on labelled clouds, as a TOML file says")
    trained.add_argument("settings", type=path, metavar="TOML")
    trained.add_argument("--out", type=path, required=True, metavar="DIR", help="for checkpoints, the log and curves")
    trained.add_argument("--data", type=path, metavar="DIR", help="where its files are (default: where the TOML is)")
    trained.add_argument("--seed", type=up_to(2**31 - 1, 0), default=0, help="of all that is drawn (default 0)")
    trained.add_argument("--resume", action="store_true", help="go on from DIR's last checkpoint")
    trained.set_defaults(run=_train)

    tested = commands.add_parser("test", help="IoU of a trained network on the test files of its settings")
    tested.add_argument("model", type=path, metavar="MODEL", help="best.safetensors of a training")
    tested.add_argument("--data", type=path, default=Path(), metavar="DIR", help="where the files are (default here)")
    tested.add_argument("--votes", type=up_to(1000), help="each place's (default: the settings')")
    tested.set_defaults(run=_test)

    segmented = commands.add_parser("segment", help="label a scan with a trained network")
    segmented.add_argument("model", type=path, metavar="MODEL", help="best.safetensors of a training")
    segmented.add_argument("file", type=path, metavar="FILE", help="PLY, LAS, LAZ or NPZ")
    segmented.add_argument("--out", type=path, required=True, metavar="FILE", help="the same kind of file, labelled")
    segmented.add_argument("--votes", type=up_to(1000), help="each place's (default: the settings')")
    segmented.add_argument("--picture", type=path, metavar="PNG")
    segmented.set_defaults(run=_segment)
    commands.add_parser("config", help="version, instruction set, threads").set_defaults(run=lambda _: kp.show_config())
    return parser


def _demo(args: argparse.Namespace) -> None:
    from kpcore import demo

    options = {name: getattr(args, name) for name in demo.SCAN if getattr(args, name) is not None}
    if args.file:
        demo.scan(args.file, args.out, **demo.SCAN | options)
    elif options:
        raise Refused(f"--{', --'.join(options)}: only valid together with FILE")
    else:
        demo.train(args.out)


def _train(args: argparse.Namespace) -> None:
    from kpcore.pipeline.settings import read_settings
    from kpcore.pipeline.training import LAST, LOG, Training

    tqdm = require("tqdm", "io").tqdm
    require("safetensors", "io")
    require("matplotlib.figure", "plot")  # before hours of training, not after
    settings = read_settings(args.settings)
    begun = (args.out / LOG).is_file() and (args.out / LOG).stat().st_size > 0
    if args.resume and not (args.out / LAST).is_file():
        advice = "another --out begins a new run" if begun else "without --resume it begins"
        raise Refused(f"--resume: {args.out} has no {LAST} to go on from; {advice}")
    if begun and not args.resume:
        raise Refused(f"--out {args.out}: has a run already; --resume goes on with it")
    make_folder(args.out)
    check_writable(args.out / LAST)
    training = Training(settings, args.out, args.data or args.settings.parent, seed=args.seed, resume=args.resume)
    net, how = training.model.net, settings.training
    print(f"{kp.nn.count(training.model.params):,} parameters, {net.num_levels} levels, {len(settings.names)} classes; "
          f"{sum(len(scene.points) for scene in training.scenes):,} points to train on")  # fmt: skip
    done = training.epoch * how.steps + training.step
    with tqdm(total=how.epochs * how.steps, initial=done, desc="training", **BAR) as bar:

        def watch(entry: dict[str, Any]) -> None:
            if "test" in entry:
                bar.write(_scores(f"after epoch {entry['epoch']}", entry["test"]))
                return
            bar.set_description_str(f"epoch {entry['epoch'] + 1} of {how.epochs}")
            bar.set_postfix_str(f"  loss {entry['loss']:.3f}", refresh=False)
            bar.update()

        begin = time.perf_counter()
        training.run(watch)
    print(f"done in {time.perf_counter() - begin:.0f} s: {args.out}")


def _scores(when: str, scores: Scores) -> str:
    parts = [f"{name} {'-' if value is None else f'{value:.3f}'}" for name, value in scores["iou"].items()]
    means = f"mIoU {scores['miou']:.4f}{of_classes(scores)}, accuracy {scores['accuracy']:.4f}"
    return f"{when}: {means} | IoU {', '.join(parts)}"


def _model(path: Path) -> Model:
    from kpcore.pipeline.training import Model

    require("safetensors", "io")
    return Model.load(path)


def _test(args: argparse.Namespace) -> None:
    from kpcore.pipeline import voting
    from kpcore.pipeline.data import load

    model = _model(args.model)
    if not model.settings.data.test:
        raise Refused(f"{args.model}: its settings name no test files")
    if args.votes and not model.net.segments:
        raise Refused(f"--votes: {args.model} classifies whole clouds, which have no places to vote on")
    loaded = load(model.settings, model.settings.data.test, args.data, model.columns)[0]
    confusion = voting.evaluate(model, loaded, args.votes)
    print(_scores(f"{confusion.sum():,} labelled", voting.scores(confusion, model.settings.names)))
    print("confusion, a row for each true class:")
    for name, row in zip(model.settings.names, confusion, strict=True):
        print(f"{name:>16} " + " ".join(f"{value:>10,}" for value in row))


def _segment(args: argparse.Namespace) -> None:
    from kpcore.pipeline import segmentation

    tqdm, model = require("tqdm", "io").tqdm, _model(args.model)
    if not model.net.segments:
        raise Refused(f"{args.model}: classifies whole clouds, and labels no points")
    segmentation.check_out(args.file, args.out)
    if args.picture:
        require("matplotlib", "plot")
        check_writable(args.picture)
    with tqdm(total=1.0, desc="labelling", **BAR | {"bar_format": PLAIN}) as bar:

        def watch(done: float) -> None:
            bar.update(done - bar.n)

        segmented = segmentation.segment(model, args.file, args.out, votes=args.votes, watch=watch)
    print(f"{args.out}: {len(segmented.classes):,} points labelled")
    for name, number in zip(model.settings.names, segmented.counts, strict=True):
        print(f"{name:>16} {number:>12,}")
    if segmented.scores:
        print(_scores("against the labels that were there", segmented.scores))
    if args.picture:
        with whole(args.picture) as part:
            segmentation.draw(part, args.file.name, segmented, model.settings.names)
        print(f"picture: {args.picture}")
