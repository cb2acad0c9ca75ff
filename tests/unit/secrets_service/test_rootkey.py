"""The root key file: made once, private, and refused rather than repaired. (What harms it: tests/service.)"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from secrets_service import files, rootkey
from secrets_service.rootsource import FileSource
from servicekit.errors import StartError


def test_key_is_made_private_and_random(tmp_path: Path) -> None:
    first = rootkey.load_or_make(tmp_path / "a" / "root.key")
    second = rootkey.load_or_make(tmp_path / "b" / "root.key")
    assert len(first.key) == 32
    assert first.key.reveal() != second.key.reveal()
    assert first.id != second.id
    assert (tmp_path / "a" / "root.key").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["root.key"]


def test_existing_key_is_used_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "root.key"
    path.write_bytes(b"x" * 32)
    path.chmod(0o400)
    assert rootkey.load_or_make(path).key.reveal() == b"x" * 32


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33])
def test_existing_file_that_is_no_key_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "root.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(StartError, match="exactly 32 bytes"):
        rootkey.load_or_make(path)
    assert path.read_bytes() == content


def test_dangling_link_is_refused_and_nothing_is_made_behind_it(tmp_path: Path) -> None:
    (tmp_path / "root.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StartError, match="symbolic link"):
        rootkey.load_or_make(tmp_path / "root.key")
    assert not (tmp_path / "elsewhere").exists()


def test_pipe_does_not_hang_the_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "root.key", 0o600)
    with pytest.raises(StartError, match="not a regular file"):
        rootkey.load(tmp_path / "root.key")


def test_key_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rootkey.load_or_make(tmp_path / "root.key")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(
        StartError, match=f"belongs to another user .number {os.getuid()}; .* Run as that user; or, .* chown"
    ):
        rootkey.load(tmp_path / "root.key")


def test_key_that_the_disk_does_not_give_is_named_with_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "root.key"
    rootkey.load_or_make(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "read", broken)
        with pytest.raises(StartError, match=rf"{path} cannot be read \(Input/output error\)"):
            rootkey.load(path)


async def test_key_that_cannot_be_made_is_named_with_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(files, "write_private", read_only)
    with pytest.raises(StartError, match=rf"{tmp_path}/root.key cannot be read or made: Read-only"):
        await FileSource(tmp_path / "root.key").first()


def test_private_file_is_replaced_whole_or_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_private(path, b"old", replace=True)
    with pytest.raises(FileExistsError):
        files.write_private(path, b"new", replace=False)
    assert path.read_bytes() == b"old"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_private(path, b"new", replace=True)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"kept")
    (tmp_path / "file").symlink_to("target")
    files.write_private(tmp_path / "file", b"new", replace=True)
    assert (tmp_path / "target").read_bytes() == b"kept"
    assert not (tmp_path / "file").is_symlink()
