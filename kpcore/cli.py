"""The command `kpcore`: its options, and the subcommands train, test, predict, segment, erf, features, report and
convert."""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import kpcore as kp
from kpcore.config import require
from kpcore.console import BAR, BAR_WITHOUT_RATE, Refused, classes_in_mean, make_folder
from kpcore.files import check_writable, expanded, replacing
from kpcore.nn.blocks import MOST_CHANNELS, MOST_LEVELS
from kpcore.nn.published_arrays import CLIENTS
from kpcore.pipeline.settings import LENGTHS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kpcore.pipeline.data import PartClouds
    from kpcore.pipeline.settings import Settings
    from kpcore.pipeline.training import Model
    from kpcore.pipeline.voting import Scores


CONFUSION = "confusion.csv"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, 2 for invalid options or input, 130 after Ctrl-C.

    Raises BrokenPipeError if the reader of standard output has closed it.
    """
    from kpcore.pipeline.training import NotFinite

    args = _parser().parse_args(argv)
    try:
        with _warnings_in_lines():
            args.run(args)
    except BrokenPipeError:
        raise
    except (ValueError, NotFinite, ImportError) as error:  # kpcore raises a ValueError for any invalid input
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
    _print_line(reason)
    return 2


def _print_line(message: object) -> None:
    """Print a message on stderr in one line, even if a name in it has line breaks."""
    print(f"kpcore: {'; '.join(str(message).splitlines())}", file=sys.stderr)


@contextmanager
def _warnings_in_lines() -> Iterator[None]:
    """Print each warning once, as one line on stderr."""
    shown = set()

    def show(message, *_):
        if str(message) not in shown:
            shown.add(str(message))
            _print_line(message)

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
        value, (smallest, largest) = float(text), LENGTHS
        if not smallest <= value <= largest:
            raise argparse.ArgumentTypeError(f"expected a length from {smallest:g} to {largest:g}, got {text}")
        return value

    def up_to(largest: int, smallest: int = 1) -> Callable[[str], int]:
        def number(text: str) -> int:
            value = int(text)
            if not smallest <= value <= largest:
                raise argparse.ArgumentTypeError(f"expected {smallest} to {largest}, got {text}")
            return value

        return number

    def with_theme(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
        command.add_argument("--theme", choices=["dark", "light"], default="dark", help="of pictures (default: dark)")
        return command

    parser = argparse.ArgumentParser(prog="kpcore", description="The numerical core of point convolutions.")
    parser.add_argument("--version", action="version", version=f"kpcore {kp.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="train a network and label a scene with it; or subsample, search and convolve a scan",
        description="Without a file: trains a small KP-FCNN on five furnished flats for some two minutes, labels "
        "another one, prints the IoU of each class and writes a picture. With --objects: trains a small KP-CNN on "
        "generated objects, classifies others and writes a picture. With a scan: level by level subsamples it, "
        "searches neighbours and runs a KPConv forward and backward; prints a table and writes a picture.",
    )
    demo.add_argument("file", nargs="?", type=path, metavar="FILE", help="PLY, PCD, LAS, LAZ, NPY, NPZ, TXT, CSV, BIN")
    demo.add_argument("--voxel", type=length, help="with FILE: voxel size of level 0 in its unit (default 0.04)")
    demo.add_argument(
        "--levels", type=up_to(12), help="with FILE: number of levels, each with twice the voxel size (default 5)"
    )
    demo.add_argument("--channels", type=up_to(1024), help="with FILE: channels in and out (default 64)")
    demo.add_argument(
        "--columns", type=names, metavar="NAMES", help='with FILE: names for columns that have none, "x y z label"'
    )
    demo.add_argument("--objects", action="store_true", help="train on generated objects, and classify others")
    demo.add_argument(
        "--out", type=path, default=Path(), metavar="DIR", help="folder for the picture (default: the current one)"
    )
    with_theme(demo).set_defaults(run=_demo)

    train = commands.add_parser("train", help="train a network on labelled clouds with the settings of a TOML file")
    train.add_argument("settings", type=path, metavar="TOML")
    train.add_argument(
        "--out", type=path, required=True, metavar="DIR",
        help="folder for checkpoints, the log and curves, with a folder in it for each fold",
    )  # fmt: skip
    train.add_argument("--data", type=path, metavar="DIR", help="folder of the data files (default: that of the TOML)")
    train.add_argument("--seed", type=up_to(2**31 - 1, 0), default=0, help="seed of all random numbers (default 0)")
    train.add_argument(
        "--resume", action="store_true", help="resume the run in the folder --out from its last checkpoint"
    )
    train.add_argument("--fold", metavar="NAME", help="train this fold only (default: all, one after the other)")
    train.set_defaults(run=_train)

    test = commands.add_parser("test", help="IoU of a trained network on the test files of its settings")
    test.add_argument(
        "model", type=path, metavar="MODEL",
        help="a best.safetensors that kpcore train wrote, or the folder of all folds, each of which is tested",
    )  # fmt: skip
    test.add_argument(
        "--data", type=path, default=Path(), metavar="DIR", help="folder of the test files (default: the current one)"
    )
    test.add_argument(
        "--votes", type=up_to(1000), help="votes for each place, or for each object (default: as in the settings)"
    )
    test.add_argument(
        "--out", type=path, metavar="DIR",
        help="folder for the confusion matrix as CSV and picture, and for a picture of objects with a wrong class",
    )  # fmt: skip
    with_theme(test).set_defaults(run=_test)

    predict = commands.add_parser("predict", help="classes of objects by a trained network")
    predict.add_argument("model", type=path, metavar="MODEL", help="a best.safetensors that kpcore train wrote")
    predict.add_argument(
        "files", type=path, nargs="+", metavar="FILE", help="meshes in OFF or PLY, or clouds in any format that is read"
    )
    predict.add_argument("--votes", type=up_to(1000), help="votes for each object (default: as in the settings)")
    predict.set_defaults(run=_predict)

    segment = commands.add_parser("segment", help="label a scan with a trained network")
    segment.add_argument("model", type=path, metavar="MODEL", help="a best.safetensors that kpcore train wrote")
    segment.add_argument("file", type=path, metavar="FILE", help="PLY, LAS, LAZ or NPZ")
    segment.add_argument("--out", type=path, required=True, metavar="FILE", help="labelled copy, in the same format")
    segment.add_argument("--votes", type=up_to(1000), help="votes for each place (default: as in the settings)")
    segment.add_argument("--category", metavar="NAME", help="category of the object, for a network of parts")
    segment.add_argument("--picture", type=path, metavar="PNG", help="picture of the labels")
    with_theme(segment).set_defaults(run=_segment)

    erf = commands.add_parser("erf", help="effective receptive fields of a trained network in a scan")
    erf.add_argument("model", type=path, metavar="MODEL", help="a best.safetensors that kpcore train wrote")
    erf.add_argument("file", type=path, metavar="FILE", help="PLY, PCD, LAS, LAZ, NPY, NPZ, TXT, CSV, BIN")
    erf.add_argument(
        "--at", type=float, nargs=3, action="append", metavar=("X", "Y", "Z"),
        help="position of an output, in the coordinates of the file; may be repeated (default: the middle of the scan)",
    )  # fmt: skip
    erf.add_argument(
        "--level", type=up_to(MOST_LEVELS - 1, 0), metavar="N",
        help="of the features of the encoder on this level; 0 is the finest (default: of the logit of the class)",
    )  # fmt: skip
    erf.add_argument("--out", type=path, default=Path(), metavar="DIR", help="folder for the pictures")
    with_theme(erf).set_defaults(run=_erf)

    features = commands.add_parser("features", help="inputs that maximise features of a trained network")
    features.add_argument("model", type=path, metavar="MODEL", help="a best.safetensors that kpcore train wrote")
    features.add_argument(
        "files",
        type=path,
        nargs="+",
        metavar="FILE",
        help="scans, objects, or images of digits (idx), as the network has",
    )
    features.add_argument(
        "--level", type=up_to(MOST_LEVELS - 1, 0), action="append", metavar="N",
        help="level of the encoder, may be repeated; 0 is the finest (default: 0 and 2)",
    )  # fmt: skip
    features.add_argument(
        "--channels", type=up_to(MOST_CHANNELS - 1, 0), nargs="+", metavar="N",
        help="channels of the features (default: the four most selective)",
    )  # fmt: skip
    features.add_argument("--out", type=path, default=Path(), metavar="DIR", help="folder for the picture")
    with_theme(features).set_defaults(run=_features)
    report = commands.add_parser("report", help="one HTML page about a training: scores, curves, data, settings, times")
    report.add_argument("folder", type=path, metavar="RUN", help="the folder that kpcore train wrote")
    report.add_argument("--out", type=path, metavar="HTML", help="the page (default: report.html in that folder)")
    report.add_argument(
        "--data", type=path, metavar="DIR", help="folder of the data files, for pictures of test scenes"
    )
    report.set_defaults(run=_report)
    convert = commands.add_parser(
        "convert",
        help="convert a checkpoint of published PyTorch code",
        description="Convert a checkpoint of other code to a file that kpcore.nn.load reads; and kpcore segment or "
        "kpcore predict, if the network labels points or classifies objects and its settings say how its input is "
        "made. No code in the checkpoint is executed.",
    )
    convert.add_argument("checkpoint", type=path, metavar="CHECKPOINT", help="a file that torch.save wrote")
    convert.add_argument(
        "--from", dest="client", choices=[*CLIENTS], required=True, metavar="CODE",
        help=f"the code that it is of: {', '.join(CLIENTS)}",
    )  # fmt: skip
    convert.add_argument(
        "--config", type=path, action="append", default=[], metavar="FILE",
        help="settings: parameters.txt, the yml of Open3D-ML, or TOML or JSON with the names of that code; may be "
        "repeated, later files add to earlier ones (default: parameters.txt, parameters.json or config.json beside the "
        "checkpoint or one folder above)",
    )  # fmt: skip
    convert.add_argument("--out", type=path, required=True, metavar="FILE", help="the safetensors file to write")
    convert.set_defaults(run=_convert)
    commands.add_parser("config", help="print version, instruction set, threads").set_defaults(
        run=lambda _: kp.show_config()
    )
    return parser


def _demo(args: argparse.Namespace) -> None:
    from kpcore import demo

    options = {name: getattr(args, name) for name in demo.SCAN if getattr(args, name) is not None}
    if args.file and args.objects:
        raise Refused(f"--objects: only valid without FILE, got {args.file}")
    if args.file:
        demo.scan(args.file, args.out, **demo.SCAN | options, theme=args.theme)
    elif options:
        raise Refused(f"--{', --'.join(options)}: only valid together with FILE")
    else:
        (demo.objects if args.objects else demo.train)(args.out, args.theme)


def _train(args: argparse.Namespace) -> None:
    from kpcore.pipeline.settings import read_settings
    from kpcore.pipeline.training import LAST

    require("tqdm", "io")
    require("safetensors", "io")
    require("matplotlib.figure", "plot")  # checked before hours of training
    settings = read_settings(args.settings)
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
    if folds:
        _train_folds(args, folds, chosen)
    else:
        _train_run(args, settings, args.out, resume=args.resume)


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


def _train_folds(args: argparse.Namespace, settings: dict[str, Settings], chosen: Sequence[str]) -> None:
    """Train the chosen folds, each in a folder below --out; print the table when all folds are complete."""
    from kpcore.pipeline import folds
    from kpcore.pipeline.curves import CURVES
    from kpcore.pipeline.training import LAST

    def confusions() -> dict[str, np.ndarray]:
        last = {name: folds.last_confusion(args.out / name, fold, args.seed) for name, fold in settings.items()}
        return {name: confusion for name, confusion in last.items() if confusion is not None}

    check_writable(args.out / folds.FOLDS)
    complete, read_parts = confusions(), {}
    for name in chosen:
        out, data = args.out / name, settings[name].data
        print(f"fold {name}: {len(data.train)} scenes to train on, {len(data.test)} to test")
        if name in complete and (out / CURVES).is_file():  # the last file that a run writes
            print(f"done already: {out}")
        else:
            _train_run(args, settings[name], out, resume=args.resume and (out / LAST).is_file(), read_parts=read_parts)
    complete = confusions()
    if missing := [name for name in settings if name not in complete]:
        print(f"{len(complete)} of {len(settings)} folds are done; to be trained: {', '.join(missing)}")
        return
    names = settings[chosen[0]].names
    folds.write(args.out / folds.FOLDS, names, complete)
    print("after the last epoch of each fold; all folds: of the sum of their confusion matrices")
    print(*folds.table(names, complete), sep="\n")
    print(f"table: {args.out / folds.FOLDS}")


def _train_run(args: argparse.Namespace, settings: Settings, out: Path, *, resume: bool,
               read_parts: PartClouds | None = None) -> None:  # fmt: skip
    from kpcore.pipeline.training import Training

    tqdm = require("tqdm", "io").tqdm
    folder = args.data or args.settings.parent
    training = Training(settings, out, folder, seed=args.seed, resume=resume, read_parts=read_parts)
    net, epochs, steps = training.model.net, settings.training.epochs, settings.training.steps
    print(f"{kp.nn.count(training.model.params):,} parameters, {net.num_levels} levels, {len(settings.names)} classes; "
          f"{sum(len(scene.points) for scene in training.scenes):,} points to train on")  # fmt: skip
    done = training.epoch * steps + training.step
    with tqdm(total=epochs * steps, initial=done, desc="training", **BAR) as bar:

        def watch(entry: dict[str, Any]) -> None:
            if "test" in entry:
                bar.write(_scores(f"after epoch {entry['epoch']}", entry["test"], settings.classifies))
                return
            bar.set_description_str(f"epoch {entry['epoch'] + 1} of {epochs}")
            bar.set_postfix_str(f"  loss {entry['loss']:.3f}", refresh=False)
            bar.update()

        begin = time.perf_counter()
        training.run(watch)
    print(f"done in {time.perf_counter() - begin:.0f} s: {out}")


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
    from kpcore.pipeline.training import Model

    require("safetensors", "io")
    return Model.load(path)


def _test(args: argparse.Namespace) -> None:
    from kpcore.pipeline import classification, voting
    from kpcore.pipeline.data import load

    if args.model.is_dir():
        _test_folds(args)
        return
    model = _model(args.model)
    if not model.settings.data.test:
        raise Refused(f"{args.model}: expected test files in its settings ([data] test), got none")
    settings, classifies = model.settings, model.settings.classifies
    _check_out_of_test(args.out)
    loaded = load(settings, settings.data.test, args.data, model.columns)[0]
    if classifies:
        classified = classification.classify(model, loaded, args.votes)
        confusion = classified.confusion()
        scores = voting.scores(confusion, settings.names)
    else:
        confusion, scores = voting.evaluate_scores(model, loaded, args.votes)
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
        print(f"picture: {args.out / 'errors.png'}")


def _check_out_of_test(out: Path | None) -> None:
    if out:
        require("matplotlib.figure", "plot")
        make_folder(out)
        check_writable(out / CONFUSION)


def _show_confusion(args: argparse.Namespace, scored: str, names: Sequence[str], confusion: np.ndarray) -> None:
    """Print a confusion matrix; write it to the folder --out, if any, as CSV and as picture."""
    from kpcore import picture
    from kpcore.pipeline import classification

    out: Path | None = args.out
    print("confusion, a row for each true class:")
    for name, row in zip(names, confusion, strict=True):
        print(f"{name:>16} " + " ".join(f"{value:>10,}" for value in row))
    if not out:
        return
    classification.write_confusion(out / CONFUSION, names, confusion)
    print(f"table: {out / CONFUSION}")
    with replacing(out / "confusion.png") as part:
        subtitle = f"{scored.partition(' | ')[0]}; rows: true class"
        picture.draw_confusion(part, "Confusion", subtitle, names, confusion, theme=args.theme)
    print(f"picture: {out / 'confusion.png'}")


def _test_folds(args: argparse.Namespace) -> None:
    """Test the network of each fold after its last epoch on the scenes of the fold."""
    from kpcore.pipeline import folds, voting
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
        confusions[name] = voting.evaluate(model, loaded, args.votes)
        scores = voting.scores(confusions[name], names)
        print(_scores(f"fold {name}, {scores['points']:,} labelled", scores, classifies=False))
    total = folds.total_confusion(confusions)
    scored = _scores(f"{total.sum():,} labelled", voting.scores(total, names), classifies=False)
    print(*folds.table(names, confusions), sep="\n")
    _show_confusion(args, scored, names, total)


def _predict(args: argparse.Namespace) -> None:
    from kpcore.pipeline import classification

    model = _model(args.model)
    if model.settings.data.kind != "objects":
        raise Refused(f"{args.model}: expected a network of objects, got one of {model.settings.data.kind}")
    objects, refused = [], []
    for path in args.files:
        try:
            objects += [(path, scene) for scene in classification.objects_of_files(model, [path])]
        except (ValueError, OSError) as error:  # the others have a class nevertheless
            refused.append(f"{path}: {error.strerror}" if isinstance(error, OSError) else str(error))
    if objects:
        paths, scenes = zip(*objects, strict=True)
        classified = classification.classify(model, [*scenes], args.votes)
        for path, number, row in zip(paths, classified.classes, classified.probabilities, strict=True):
            print(f"{path}: {model.settings.names[number]} {row[number]:.4f}")
    if refused:
        raise Refused(f"{len(refused)} of {len(args.files)} files have no class: {'; '.join(refused)}")


def _segment(args: argparse.Namespace) -> None:
    from kpcore.pipeline import segmentation

    tqdm, model = require("tqdm", "io").tqdm, _model(args.model)
    if not model.net.segments:
        raise Refused(f"{args.model}: expected a network that labels points, got one that classifies whole clouds")
    try:
        segmentation.check_category(model, args.category)
    except ValueError as error:
        raise Refused(f"--{error}") from None
    segmentation.check_out(args.file, args.out)
    if args.picture:
        require("matplotlib", "plot")
        check_writable(args.picture)
    with tqdm(total=1.0, desc="labelling", **BAR | {"bar_format": BAR_WITHOUT_RATE}) as bar:

        def watch(done: float) -> None:
            bar.update(done - bar.n)

        segmented = segmentation.segment(
            model, args.file, args.out, votes=args.votes, category=args.category, watch=watch
        )
    print(f"{args.out}: {len(segmented.classes):,} points labelled")
    for name, number in zip(model.settings.names, segmented.counts, strict=True):
        print(f"{name:>16} {number:>12,}")
    if segmented.scores:
        print(_scores("compared with the labels in the file", segmented.scores, model.settings.classifies))
    if args.picture:
        with replacing(args.picture) as part:
            segmentation.draw(part, args.file.name, segmented, model.settings, theme=args.theme)
        print(f"picture: {args.picture}")


def _check_levels(model: Model, path: Path, levels: Sequence[int]) -> None:
    if max(levels) >= model.net.num_levels:
        raise Refused(f"--level {max(levels)}: expected a level below {model.net.num_levels}, as {path} has")


def _check_no_parts(model: Model, path: Path) -> None:
    if model.settings.heads:
        raise Refused(f"{path}: expected a network of scenes, objects or digits, got one of parts")


def _erf(args: argparse.Namespace) -> None:
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
    for path in inspection.draw_fields(pictures, args.file.name, subtitle, model, scene, fields, args.theme):
        print(f"picture: {path}")


def _features(args: argparse.Namespace) -> None:
    from kpcore.pipeline import inspection

    tqdm, model = require("tqdm", "io").tqdm, _model(args.model)
    _check_no_parts(model, args.model)
    levels = args.level or [level for level in (0, 2) if level < model.net.num_levels]
    _check_levels(model, args.model, levels)
    require("matplotlib", "plot")
    picture = args.out / "kpcore-features.png"
    scenes, names = inspection.scenes_of_files(model, args.files)
    make_folder(args.out)
    check_writable(picture)
    with tqdm(total=1.0, desc="evaluating", **BAR | {"bar_format": BAR_WITHOUT_RATE}) as bar:

        def watch(done: float) -> None:
            bar.update(done - bar.n)

        chosen = inspection.maximizing_inputs(model, scenes, names, levels, channels=args.channels, watch=watch)
    for (level, channel), inputs in chosen.items():
        for one in inputs:
            print(f"level {level}, channel {channel:>4}: {one.activation.max():>9.3f} in {one.name}")
    with replacing(picture) as part:
        inspection.draw_features(part, f"Features of {args.model}", model, chosen, args.theme)
    print(f"picture: {picture}")


def _report(args: argparse.Namespace) -> None:
    from kpcore.pipeline import report

    require("safetensors", "io")
    require("matplotlib", "plot")
    print(f"report: {report.write(args.folder, args.out, data=args.data)}")


def _convert(args: argparse.Namespace) -> None:
    from kpcore.pipeline import conversion

    try:
        converted = conversion.convert(args.checkpoint, args.client, args.out, args.config)
    except ValueError as error:
        first, *lines = str(error).splitlines()
        for line in lines:  # of all arrays that do not fit
            print(line, file=sys.stderr)
        raise Refused(f"{first}; nothing is written" if lines else first) from None
    net, title = converted.net, CLIENTS[args.client].title
    print(f"{args.out}: {type(net).__name__} of {title}, {kp.nn.count(converted.params):,} parameters, "
          f"{net.num_levels} levels, voxel size {net.voxel_size:g}, {net.num_features} input features")  # fmt: skip
    if names := converted.about.get("names"):
        print(f"{net.num_classes} classes: {', '.join(names)}")
    else:
        print(f"{net.num_classes} channels for each point of level {net.output_level}")
    print(f"settings: {', '.join(map(str, converted.configs)) or 'none'}")
    if converted.unused:
        print(f"not converted: {', '.join(conversion.summary(converted.unused))}")
    command = "segment" if net.segments else "predict"
    print(f"kpcore {command}: {'cannot use it: ' + converted.missing if converted.missing else 'can use it'}")
