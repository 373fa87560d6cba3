"""Files that are written whole or not at all."""

import errno
import os
import secrets
import stat

import pytest

from kpcore.files import check_writable, replacing


def test_a_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old" and part.suffix == ".txt" and part.parent == tmp_path
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]
    before = os.umask(0o027)
    try:
        with replacing(path):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), OSError(errno.ENOSPC, "full")])
def test_an_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)) as raised, replacing(path) as part:
        part.write_text("ne")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    if isinstance(error, OSError):
        assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(path))


def test_the_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, replacing(tmp_path / "a.txt"):
        (tmp_path / "source").read_text()
    assert raised.value.filename == str(tmp_path / "source")


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with replacing(path) as one:
        one.write_text("one")
        with replacing(path) as other:
            other.write_text("other")
        assert path.read_text() == "other" and one.read_text() == "one"
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_what_lies_where_the_part_would_is_not_written_to(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(secrets, "token_hex", lambda size: "0")
    target, planted = tmp_path / "target", tmp_path / ".a.0.part.txt"
    if kind != "dangling link":
        target.write_text("precious")
    (planted.symlink_to if kind != "file" else planted.hardlink_to)(target)
    with pytest.raises(FileExistsError) as raised, replacing(tmp_path / "a.txt") as part:
        part.write_text("new")
    assert raised.value.filename == str(tmp_path / "a.txt")
    assert not (tmp_path / "a.txt").exists() and planted.is_symlink() == (kind != "file")
    assert target.exists() == (kind != "dangling link") and (not target.exists() or target.read_text() == "precious")


def test_the_longest_names_can_be_written(tmp_path):
    for name in ("a" * 251 + ".txt", "木" * 83 + ".txt"):
        with replacing(tmp_path / name) as part:
            part.write_text("x")
        assert (tmp_path / name).read_text() == "x"


def test_what_cannot_be_written_is_said_before(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, said in (
        ("folder", "is a folder"),
        ("pipe", "is not a regular file"),
        ("none/a", "there is no folder"),
        ("file/a", "there is no folder"),
        ("n" * 256, "File name too long"),
    ):
        with pytest.raises(OSError, match=said) as raised:
            check_writable(tmp_path / name)
        assert raised.value.filename == str(tmp_path / name)
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "pipe"]


def test_a_file_is_flushed_through_a_descriptor_that_may_write(tmp_path, monkeypatch):
    """Windows flushes no other."""
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.write(file, b"")))  # an OSError if it may not
    with replacing(tmp_path / "a.txt"):
        pass
    assert flushed == [0]
