"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import signal
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_ENDING = ("SIGTERM", "SIGHUP")  # that end a process without an exception, where nobody handles them


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The path of a file to write, beside `path` and of its kind; it takes its place after the block, or is removed.

    Also by a signal that ends the process, in the main thread: Python hears of signals only there. An OSError names
    `path`.
    """
    path = Path(path)
    part, is_ours = _part_of(path), True
    with _named(path, part), _removed_by_signals(part):
        try:
            try:
                _create(part)
            except FileExistsError:
                is_ours = False
                raise
            yield part
            _to_disk(part)
            os.replace(part, path)
        finally:
            if is_ours:
                _remove(part)


def check_writable(path: str | os.PathLike[str]) -> None:
    """An OSError that names the path, unless a file can be written there. To be asked before the work."""
    path = Path(path)
    part = _part_of(path)
    with _named(path, part):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "is not a regular file")  # a device would be replaced by one
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, f"there is no folder {path.parent}")
        _create(part)
        _remove(part)


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path of a text, in which ~ is the home folder also where no shell has seen it: --out=~/x, or in a TOML."""
    return Path(os.path.expanduser(path))


def _part_of(path: Path) -> Path:
    """A name that nobody else writes to. Names have at most 255 bytes, some 60 characters of any kind."""
    return path.with_name(f".{path.stem[:40]}.{secrets.token_hex(8)}.part{path.suffix}")


def _create(part: Path) -> None:
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # an error where there is a file or a link


def _to_disk(part: Path) -> None:
    """Some file systems report a full disk only here, and after a crash would have the new name without the bytes."""
    file = os.open(part, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _remove(part: Path) -> None:
    with suppress(OSError):  # where nothing can be written it was never made
        part.unlink()


@contextmanager
def _named(path: Path, part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = path if error.filename in (None, str(part)) else error.filename
        raise OSError(error.errno, error.strerror or str(error), str(name)) from error


@contextmanager
def _removed_by_signals(part: Path) -> Iterator[None]:
    def remove_and_end(number: int, frame: FrameType | None) -> None:
        _remove(part)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    numbers = []
    if threading.current_thread() is threading.main_thread():
        there = [getattr(signal, name) for name in _ENDING if hasattr(signal, name)]
        numbers = [number for number in there if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, remove_and_end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
