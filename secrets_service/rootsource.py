"""Where the root key comes from: a file, something that the service was started with, or a plugin of a key service.

The rule: which source it is, a setting says, and a source never makes a key for a store that is sealed under another
one. A store moves from one source to the next by a start with both (`TESSERA_PREVIOUS_ROOT_KEY_SOURCE`), which seals
the keyring anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from secrets_service import rootkey
from secrets_service.errors import RootKeyGiven, RootKeyNotReplaced, RootKeyWrong
from secrets_service.kms import KmsPlugin
from secrets_service.model import SealedKeyring
from secrets_service.rootkey import LENGTH, RootKey
from secrets_service.settings import SecretsSettings
from servicekit import private_file
from servicekit.errors import StartError

DESCRIPTOR_SECONDS = 3.0
"""How long whoever started the service may take to write the key into a pipe and close it."""


class RootSource(Protocol):
    """A place that root keys come from. What fails because of it raises StartError; a plugin has errors of its own."""

    @property
    def name(self) -> str:
        """What it is called in messages, such as `file /var/lib/tessera/root.key`."""

    async def key_of(self, sealed: SealedKeyring) -> RootKey | None:
        """The key that it has for a keyring; None for none. Its id tells whether the keyring was sealed under it."""

    async def first(self) -> RootKey:
        """The key for a store that is not sealed under one of this source yet."""

    async def stage(self) -> RootKey:
        """A new key to put in the place of the one that `key_of` found.

        Raises RootKeyNotReplaced, RootKeyWrong or RootKeyGiven.
        """

    async def drop(self) -> None:
        """Nothing is sealed under the key that was staged last, nor will be."""

    async def finish(self) -> None:
        """The keyring is sealed under the key that was staged last."""


class FileSource:
    """A file of our own, which is made for a new store (rootkey.py)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_in = path
        self._found = ""

    @property
    def name(self) -> str:
        """As `RootSource.name`; tells also that the key could not be moved into its place."""
        aside = "" if self._is_in == self._path else f" (keep it: it could not be moved to {self._path})"
        return f"file {self._is_in}{aside}"

    async def key_of(self, sealed: SealedKeyring) -> RootKey | None:
        """As `RootSource.key_of`."""
        try:
            root, self._is_in = await asyncio.to_thread(rootkey.load_wanted, self._path, sealed.root_key_id)
        except OSError as error:
            raise StartError(f"The root key {self._path} cannot be read: {error.strerror}.") from None
        self._found = root.id
        return root

    async def first(self) -> RootKey:
        """As `RootSource.first`."""
        try:
            return await asyncio.to_thread(rootkey.load_or_make, self._path)
        except OSError as error:
            raise StartError(f"The root key {self._path} cannot be read or made: {error.strerror}.") from None

    async def stage(self) -> RootKey:
        """As `RootSource.stage`."""
        try:
            return await asyncio.to_thread(rootkey.stage_rotation, self._path, self._found)
        except StartError as error:
            raise RootKeyWrong(str(error)) from None
        except OSError as error:
            cause = "it is mounted by itself" if error.errno == errno.EXDEV else error.strerror
            raise RootKeyNotReplaced(str(self._path), cause or "") from None

    async def drop(self) -> None:
        """As `RootSource.drop`."""
        await asyncio.to_thread(rootkey.drop_staged, self._path)

    async def finish(self) -> None:
        """As `RootSource.finish`."""
        self._is_in = await asyncio.to_thread(rootkey.finish_rotation, self._path)


class GivenSource:
    """A key that the service was given and cannot replace; it is read once and then kept in memory."""

    def __init__(self, name: str, read: Callable[[], bytes]) -> None:
        self.name = name
        self._read = read
        self._key: RootKey | None = None

    async def key_of(self, sealed: SealedKeyring) -> RootKey | None:
        """As `RootSource.key_of`."""
        return await self.first()

    async def first(self) -> RootKey:
        """As `RootSource.first`."""
        if self._key is None:
            key = await asyncio.to_thread(self._read)
            if len(key) != LENGTH:
                raise StartError(f"The root key of {self.name} must be exactly {LENGTH} bytes.")
            self._key = RootKey.of(key)
        return self._key

    async def stage(self) -> RootKey:
        """As `RootSource.stage`."""
        raise RootKeyGiven(self.name)

    async def drop(self) -> None:
        """As `RootSource.drop`; nothing was staged."""

    async def finish(self) -> None:
        """As `RootSource.finish`; nothing was staged."""


def chosen(settings: SecretsSettings) -> RootSource:
    """The source of the root key in use."""
    if settings.root_key_source == "file":
        return FileSource(settings.root_key)
    return _of(settings.root_key_source, settings)


def previous(settings: SecretsSettings) -> RootSource | None:
    """The source of the root key before the one in use, where settings name one."""
    if settings.previous_root_key_file is not None:
        return FileSource(settings.previous_root_key_file)
    return _of(settings.previous_root_key_source, settings) if settings.previous_root_key_source else None


def _of(source: str, settings: SecretsSettings) -> RootSource:
    kind, _, where = source.partition(":")
    if kind == "kms":
        return KmsPlugin(Path(where))
    if kind == "fd":
        return GivenSource(f"descriptor {where}", lambda: _from_descriptor(int(where)))
    assert settings.credentials_directory is not None  # settings have seen to it
    path = settings.credentials_directory / where
    return GivenSource(f"credential {where}", lambda: _from_credential(path))


def _from_descriptor(number: int) -> bytes:
    """All that is in an inherited descriptor, which is closed then; a byte too many is enough to be refused."""
    content = b""
    deadline = time.monotonic() + DESCRIPTOR_SECONDS
    try:
        while len(content) <= LENGTH:
            ready, _, _ = select.select([number], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise StartError(
                    f"The root key did not come from descriptor {number} in {DESCRIPTOR_SECONDS:.0f} s."
                    " Write its bytes and close the other end."
                )
            if not (piece := os.read(number, LENGTH + 1 - len(content))):
                break
            content += piece
    except (OSError, ValueError) as error:
        raise StartError(f"The root key cannot be read from descriptor {number}: {error}.") from None
    finally:
        with contextlib.suppress(OSError):
            os.close(number)
    return content


def _from_credential(path: Path) -> bytes:
    try:
        return private_file.read(path, what="The root key", longest=LENGTH + 1, may_be_link=False, may_be_given=True)
    except FileNotFoundError:
        raise StartError(
            f"The root key {path} is missing: the service was started without that credential. Give it the one that it"
            " had; a new key would not open what is stored."
        ) from None
