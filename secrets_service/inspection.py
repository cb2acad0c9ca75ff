"""A look at a copied database without a service: whether a root key opens it, and whether all of it is whole.

Nothing is changed, and no value leaves: each is opened and dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secrets_service import directory_store, grant_store, integrity, places, rotation_store, store
from secrets_service.cipher import Damaged
from secrets_service.errors import KeySourceDown, KeySourceWrong
from secrets_service.integrity import Integrity
from secrets_service.keyring import Keyring
from secrets_service.rootsource import RootSource
from servicekit import database
from servicekit.errors import StartError
from servicekit.storage import Connection


async def keyring(path: Path, source: RootSource) -> Keyring:
    """The keyring of a copy, opened with the root key that a source has; raises StartError when it has another one."""
    with database.looked_at(path) as connection:
        sealed, platform = store.find_keyring(connection), store.stated_platform(connection)
    if sealed is None or platform is None:
        raise StartError(f"{path} holds no keyring.")
    try:
        root = await source.key_of(sealed)
    except (KeySourceWrong, KeySourceDown) as error:
        raise StartError(error.message) from None
    if root is None or root.id != sealed.root_key_id:
        has = "none for it" if root is None else root.id
        raise StartError(
            f"The root key of {source.name} is {has}, but {path} was sealed under {sealed.root_key_id}. Take that one"
            " from your safe copies: if the root key was rotated since, it is an older one."
        )
    try:
        return Keyring.opened(sealed, root, platform.store_id)
    except Damaged:
        raise StartError(f"The root key {root.id} does not open the keyring of {path}, which is damaged.") from None


def faults(path: Path, opened: Keyring) -> list[str]:
    """What the service would refuse to use of a copy, one line each: rights that were changed, values that do not open.

    Raises StorageError for a database that cannot be read.
    """
    with _equipped(path, opened) as connection:
        rights = [each for part in (store, directory_store, grant_store) for each in part.damaged_rights(connection)]
        values = rotation_store.damaged_values(connection, opened)
        signing = [
            each.key_id for each in store.signing_keys(connection) if not _opens(opened, each.record, each.key_id)
        ]
    return [
        *(f"the stored rights of {kind} {name} were changed" for kind, name in rights),
        *(f"the value of {scope}/{key} does not open" for scope, key in values),
        *(f"the signing key {key_id} does not open" for key_id in signing),
    ]


@contextmanager
def _equipped(path: Path, opened: Keyring) -> Iterator[Connection]:
    with database.looked_at(path) as connection:
        integrity.equip(connection, Integrity(opened.rights_keys()))
        yield connection


def _opens(opened: Keyring, record: bytes, key_id: str) -> bool:
    try:
        opened.open(record, places.signing_key(key_id))
    except Damaged:
        return False
    return True
