"""The root key file: 32 random bytes under which the keyring is sealed, and through it everything else.

The rule: a key is made only when there is nothing yet that it should open, or by a rotation, and then the one before
stays beside it. A rotation writes the new key to `<file>.next`, has the keyring sealed under it, and only then moves
it into its place and the one before to `<file>.previous`. Which of them is right the database says, by the key's id:
a start that finds the key of `.next` wanted finishes what a crash interrupted, and one that does not leaves it alone.
Where that one cannot be moved it is used from there, and nothing is written over it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from secrets_service import files
from secrets_service.model import SecretBytes
from servicekit import private_file
from servicekit.errors import StartError

log = logging.getLogger(__name__)

LENGTH = 32

_ID = b"id of a root key"
_ID_BYTES = 8


@dataclass(frozen=True, slots=True)
class RootKey:
    """A root key, and what it is called where no key may stand; the id does not lead back to the key."""

    id: str
    key: SecretBytes = field(repr=False)
    wrapped: bytes | None = field(default=None, repr=False)
    """What its source needs to have it again, stored beside what it seals; None for a source that keeps it itself."""

    @classmethod
    def of(cls, key: bytes, wrapped: bytes | None = None) -> RootKey:
        """The root key of these 32 bytes."""
        return cls(hmac.digest(key, _ID, hashlib.sha256)[:_ID_BYTES].hex(), SecretBytes(key), wrapped)


def load(path: Path) -> RootKey:
    """The key in a file; raises StartError when there is none, or when the file is not exactly as it should be."""
    try:
        key = private_file.read(path, what="The root key", longest=LENGTH + 1, may_be_link=False)
    except FileNotFoundError:
        raise StartError(
            f"The root key {path} is missing, and there is data that only it opens. Put it back from your safe copy;"
            " a new key would not open anything."
        ) from None
    if len(key) != LENGTH:
        raise StartError(f"The root key {path} must hold exactly {LENGTH} bytes. Put it back from your safe copy.")
    return RootKey.of(key)


def load_wanted(path: Path, wanted: str) -> tuple[RootKey, Path]:
    """As `load`, after a rotation that was interrupted once the store was sealed under the key of that id.

    Tells also which file the key is in.
    """
    staged = _beside(path, "next")
    current = load(path) if os.path.lexists(path) or not os.path.lexists(staged) else None
    if (current is None or current.id != wanted) and os.path.lexists(staged):
        fresh = load(staged)
        if fresh.id == wanted:
            return fresh, finish_rotation(path)
    return load(path), path


def stage_rotation(path: Path, in_use: str) -> RootKey:
    """Writes a new key beside the one in use, of that id, which stays in its place.

    Raises OSError when that one could not be replaced later, and StartError when it is not in its place: then it is
    where the new one would be written.
    """
    staged = _beside(path, "next")
    if not os.path.lexists(path) or load(path).id != in_use:
        raise StartError(f"The root key in use is in {staged}. Move it to {path} first.")
    files.refuse_unmovable(path)
    key = os.urandom(LENGTH)
    files.write_private(staged, key, replace=True)
    return RootKey.of(key)


def drop_staged(path: Path) -> None:
    """Takes a new key away that nothing is sealed under."""
    with contextlib.suppress(OSError):
        _beside(path, "next").unlink()


def finish_rotation(path: Path) -> Path:
    """Moves the new key into its place, and the one before beside it; after a crash in between, the rest of it.

    The store is sealed under it already, so where it cannot be moved it stays where it is, and the log says so. Returns
    where it is then.
    """
    staged = _beside(path, "next")
    try:
        if os.path.lexists(path):
            files.rename(path, _beside(path, "previous"))
        files.rename(staged, path)
    except OSError as error:
        log.warning(
            "the root key in use could not be moved into its place: keep the file that it is in",
            extra={"file": str(staged), "place": str(path), "cause": error.strerror},
        )
    return staged if os.path.lexists(staged) else path


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def load_or_make(path: Path) -> RootKey:
    """The key in a file, which is made when it is not there. Only for a store that holds nothing yet."""
    if not os.path.lexists(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            files.write_private(path, os.urandom(LENGTH), replace=False)
    return load(path)
