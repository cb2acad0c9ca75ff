"""Sockets lie in a short directory that nobody else may enter."""

from __future__ import annotations

import os
import socket
import stat
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servicekit import settings
from servicekit.errors import StartError
from servicekit.sockets import socket_address, socket_directory
from tests.support.sockets import short_directory

NAMES = st.text(string.ascii_letters + "é ", min_size=1, max_size=60).filter(str.strip)


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@given(names=st.lists(NAMES, min_size=1, max_size=5))
def test_every_socket_path_is_shorter_than_the_kernel_takes(names: list[str]) -> None:
    with short_directory() as root:
        found = socket_directory(root.joinpath(*names))
        try:
            longest = found / "replicas" / ("r" * 32) / "control.sock"
            assert len(os.fsencode(longest)) < 100
            internal = socket_address(found, callee="secrets", caller="operator").removeprefix("unix:")
            assert len(os.fsencode(internal)) < 100
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(internal)
                Path(internal).unlink()
        finally:
            if not found.is_relative_to(root):
                found.rmdir()


def test_each_data_directory_has_its_own_sockets_and_always_finds_them_again(directory: Path) -> None:
    data_dirs = [directory / "a" / ("long" * 20), directory / "b" / ("long" * 20), directory / "short"]
    found = [socket_directory(data_dir) for data_dir in data_dirs]
    try:
        assert len(set(found)) == 3
        assert found == [socket_directory(data_dir) for data_dir in data_dirs]
        assert found[2] == directory / "short" / "run" / "sockets"
    finally:
        for path in found[:2]:
            path.rmdir()


def test_long_temporary_folder_is_not_used(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(directory / ("long" * 20)))
    found = socket_directory(directory / ("long" * 20))
    try:
        assert found.parent == Path("/tmp")
    finally:
        found.rmdir()


def test_directory_is_for_us_alone_whatever_the_umask(directory: Path) -> None:
    before = os.umask(0)
    try:
        assert mode_of(socket_directory(directory)) == 0o700
    finally:
        os.umask(before)


def test_directory_that_was_open_to_others_is_closed(directory: Path) -> None:
    (directory / "open").mkdir()
    (directory / "open").chmod(0o777)
    assert mode_of(socket_directory(directory, directory / "open")) == 0o700


def test_directory_of_somebody_else_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    socket_directory(directory)
    stranger = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: stranger)
    with pytest.raises(StartError, match="is not a directory of ours; remove it, or set TESSERA_SOCKET_DIR"):
        socket_directory(directory)


def test_symbolic_link_is_refused_even_to_a_directory_of_ours(directory: Path) -> None:
    (directory / "real").mkdir()
    (directory / "link").symlink_to(directory / "real")
    with pytest.raises(StartError, match="is not a directory of ours"):
        socket_directory(directory, directory / "link")


@pytest.mark.parametrize("what", ["file", "dangling link"])
def test_what_is_no_directory_is_refused_by_name(directory: Path, what: str) -> None:
    place = directory / "place"
    if what == "file":
        place.write_text("")
    else:
        place.symlink_to(directory / "nowhere")
    with pytest.raises(StartError, match=f"{place} cannot be made: .* Set TESSERA_SOCKET_DIR"):
        socket_directory(directory, place)


def test_chosen_directory_is_used_and_refused_when_too_long(directory: Path) -> None:
    assert socket_directory(directory, directory / "chosen") == directory / "chosen"
    with pytest.raises(StartError, match="TESSERA_SOCKET_DIR is too long"):
        socket_directory(directory, directory / ("long" * 20))


def test_settings_know_the_directory(directory: Path) -> None:
    environ = {"TESSERA_DATA_DIR": str(directory / "data"), "TESSERA_SOCKET_DIR": str(directory / "chosen")}
    assert settings.load(settings.ServiceSettings, environ).sockets == directory / "chosen"
    del environ["TESSERA_SOCKET_DIR"]
    assert settings.load(settings.ServiceSettings, environ).sockets == directory / "data" / "run" / "sockets"


def test_address_names_who_serves_whom() -> None:
    assert socket_address(Path("/s"), callee="secrets", caller="gateway") == "unix:/s/secrets-for-gateway.sock"
