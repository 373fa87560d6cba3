"""Writing files so that they appear complete or not at all."""

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

_ENDING_SIGNALS = ("SIGTERM", "SIGHUP")  # without a handler they end the process, and no exception is raised


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, with the same extension, for the block to write.

    After the block the file is renamed to `path`; after an exception it is removed. It is also removed when a signal
    ends the process while the block runs in the main thread, the only one in which Python handles signals. An OSError
    names `path`.
    """
    path = Path(path)
    part, is_created = _part_of(path), True
    with _errors_name(path, part), _removed_by_signals(part):
        try:
            try:
                _create(part)
            except FileExistsError:
                is_created = False
                raise
            yield part
            to_disk(part)
            os.replace(part, path)
        finally:
            if is_created:
                _remove(part)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise an OSError that names `path` if no file can be written there; for a check before long work."""
    path = Path(path)
    part = _part_of(path)
    with _errors_name(path, part):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "is not a regular file")  # renaming would replace a device by a file
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, f"there is no folder {path.parent}")
        _create(part)
        _remove(part)


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with ~ replaced by the home folder, which the shell leaves alone in --out=~/x, as does TOML."""
    return Path(os.path.expanduser(path))


def _part_of(path: Path) -> Path:
    """A random name in the same folder, cut so that it has at most 255 bytes."""
    return path.with_name(f".{path.stem[:40]}.{secrets.token_hex(8)}.part{path.suffix}")


def _create(part: Path) -> None:
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # O_EXCL: an error if a file or link exists


def to_disk(part: Path) -> None:
    """Write the bytes to disk: some file systems report a full disk only here, or lose the bytes in a crash."""
    file = os.open(part, os.O_RDWR)  # Windows flushes no file that is open for reading only
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _remove(part: Path) -> None:
    with suppress(OSError):  # it may not exist
        part.unlink()


@contextmanager
def _errors_name(path: Path, part: Path) -> Iterator[None]:
    """Let an OSError of the block name `path` instead of the temporary file."""
    try:
        yield
    except OSError as error:
        name = path if error.filename in (None, str(part)) else error.filename
        raise OSError(error.errno, error.strerror or str(error), str(name)) from error


@contextmanager
def _removed_by_signals(part: Path) -> Iterator[None]:
    """Remove the temporary file if a signal without a handler ends the process."""

    def remove_and_end(number: int, frame: FrameType | None) -> None:
        _remove(part)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    numbers = []
    if threading.current_thread() is threading.main_thread():
        available = [getattr(signal, name) for name in _ENDING_SIGNALS if hasattr(signal, name)]
        numbers = [number for number in available if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, remove_and_end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
