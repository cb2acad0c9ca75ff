"""The use cases of keys: which there are, and new ones in their place while the service runs.

The rule: nothing is sealed under a key before that is on stable storage, and nothing is in the database that the
service does not open. So a new store key is learned first, then recorded with all that it protects in one
transaction, and used after that; whoever asked for it may be gone meanwhile. A new root key is in a file before the
keyring is sealed under it.

Values follow the newest key of their scope in the background, some at a time. How far that went, the rows say
themselves, so a service that was killed goes on where it was; then the older key is destroyed.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from secrets_service import directory_store, grant_store, integrity, names, places, rootkey, rotation_store, store
from secrets_service.cipher import Damaged
from secrets_service.errors import RootKeyNotReplaced, RootKeyWrong, ScopeNotFound
from secrets_service.foundation import Foundation
from secrets_service.integrity import Integrity
from secrets_service.keyring import Keyring
from secrets_service.memory import RememberingDatabase
from secrets_service.model import KeyStatus, Scope, SealedSigningKey
from secrets_service.rootkey import RootKey
from servicekit.errors import StartError

log = logging.getLogger(__name__)

PAUSE_SECONDS = 0.005
"""Between two parts of the work in the background, for those who wait to write."""

RETRY_SECONDS = 30.0
"""After which the work in the background is tried again when it failed, such as on a full disk."""


class KeyRotation:
    """The keys of a service that runs. `now` tells Unix seconds."""

    def __init__(
        self, root_key: Path, base: Foundation, database: RememberingDatabase, now: Callable[[], float]
    ) -> None:
        self._path = root_key
        self._base = base
        self._database = database
        self._now = now
        self._one_at_a_time = asyncio.Lock()
        self._has_work = asyncio.Event()
        self._has_work.set()  # that a process before this one may have left

    async def status(self) -> KeyStatus:
        """Which keys there are, and how much is not under the newest ones."""
        return await self._database.read(self._status)

    async def rotate_root(self) -> KeyStatus:
        """Puts a new root key in the place of the one in use, which stays beside it."""
        await self._to_its_end(self._rotate_root())
        return await self.status()

    async def rotate_store(self) -> KeyStatus:
        """Makes a new store key, and brings under it what store keys protect."""
        await self._to_its_end(self._rotate_store())
        return await self.status()

    async def rotate_scopes(self, scopes: Sequence[str]) -> KeyStatus:
        """Gives scopes, or all of them, new keys, and has their values sealed anew."""
        for scope in scopes:
            names.scope_name(scope)

        def rotate(connection: sqlite3.Connection) -> int:
            chosen = store.scopes(connection)
            if scopes:
                known = {names.folded(each.name): each for each in chosen}
                for scope in scopes:
                    if names.folded(scope) not in known:
                        raise ScopeNotFound(scope)
                chosen = [known[each] for each in sorted({names.folded(scope) for scope in scopes})]
            for each in chosen:
                rotation_store.add_scope_key(connection, self._base.keyring, each, created_ms=self._now_ms())
            return len(chosen)

        count = await self._database.write(rotate)
        log.info("scope keys rotated", extra={"scopes": count})
        self._has_work.set()
        return await self.status()

    async def run(self) -> None:
        """Seals values under the newest keys of their scopes whenever some are not, until cancelled."""
        while True:
            await self._has_work.wait()
            self._has_work.clear()
            try:
                await self._follow()
            except sqlite3.Error:
                log.warning("values are not under the newest keys of their scopes yet")
                await asyncio.sleep(RETRY_SECONDS)
                self._has_work.set()

    # --- one transaction each ---

    def _status(self, connection: sqlite3.Connection) -> KeyStatus:
        sealed = store.find_keyring(connection)
        assert sealed is not None  # the service does not run without
        return KeyStatus(
            root_key_id=sealed.root_key_id,
            store_keys=rotation_store.store_key_uses(connection, self._base.keyring),
            scopes=store.count_scopes(connection),
            oldest_scope_key_ms=rotation_store.oldest_scope_key(connection),
            values_behind=rotation_store.count_behind(connection),
        )

    async def _rotate_root(self) -> None:
        await self._root_in_use()
        try:
            fresh = await asyncio.to_thread(rootkey.stage_rotation, self._path)
        except OSError as error:
            raise RootKeyNotReplaced(str(self._path), error.strerror or "") from None
        await self._database.write(
            lambda connection: store.replace_keyring(connection, self._base.keyring.sealed(fresh))
        )
        await asyncio.to_thread(rootkey.finish_rotation, self._path)
        log.warning(
            "root key rotated: keep a safe copy of the new one; without it every stored value is lost",
            extra={"root_key": str(self._path), "root_key_id": fresh.id},
        )

    async def _rotate_store(self) -> None:
        root = await self._root_in_use()
        keyring = self._base.keyring.with_new_store_key(self._now_ms())
        self._base.keyring.learn(keyring)
        self._base.integrity.learn(keyring.rights_keys())
        await self._database.destroy(partial(_brought_under, root=root, keyring=keyring))
        self._base.keyring.use(keyring)
        self._base.integrity.use(keyring.rights_keys())
        self._base.token_macs.use(keyring.token_mac_keys())
        log.info("store key rotated", extra={"version": keyring.current})

    async def _root_in_use(self) -> RootKey:
        """The root key that the keyring is sealed under, from its file."""
        sealed = await self._database.read(store.find_keyring)
        assert sealed is not None  # the service does not run without
        try:
            root = await asyncio.to_thread(rootkey.load_wanted, self._path, sealed.root_key_id)
        except StartError as error:
            raise RootKeyWrong(str(error)) from None
        if root.id != sealed.root_key_id:
            raise RootKeyWrong(f"The root key {self._path} is {root.id}; {sealed.root_key_id} is in use.")
        return root

    async def _to_its_end(self, rotation: Coroutine[Any, Any, None]) -> None:
        async def alone() -> None:
            async with self._one_at_a_time:
                await rotation

        await asyncio.shield(asyncio.ensure_future(alone()))

    # --- in the background ---

    async def _follow(self) -> None:
        for scope in await self._database.read(rotation_store.scopes_with_older_keys):
            at: int | None = 0
            sealed = 0
            while at is not None:
                at, changed = await self._database.write(rotation_store.reseal_values, self._base.keyring, scope, at)
                sealed += changed
                await asyncio.sleep(PAUSE_SECONDS)
            dropped = await self._database.destroy(partial(_dropped, scope=scope))
            log.info(
                "values sealed under the newest key of their scope",
                extra={"scope": scope.name, "values": sealed, "keys_destroyed": dropped},
            )

    def _now_ms(self) -> int:
        return int(self._now() * 1000)


def _dropped(connection: sqlite3.Connection, scope: Scope) -> tuple[int, int]:
    count = rotation_store.drop_scope_keys(connection, scope)
    return count, count


def _brought_under(connection: sqlite3.Connection, root: RootKey, keyring: Keyring) -> tuple[None, int]:
    """Brings all that store keys protect under the newest one of a keyring, which is recorded, too.

    What was sealed under the one before is destroyed with it.
    """
    before = integrity.of(connection)
    integrity.equip(connection, Integrity(keyring.rights_keys()))
    try:
        for part in (store, directory_store, grant_store):
            part.authenticate_all(connection, believed=False)
    finally:  # whether this is committed is not known here
        integrity.equip(connection, before)
    rotation_store.rewrap_scope_keys(connection, keyring)
    for signing_key in store.signing_keys(connection):
        place = places.signing_key(signing_key.key_id)
        try:
            record = keyring.seal(keyring.open(signing_key.record, place), place)
        except Damaged:
            continue
        store.replace_signing_key(connection, SealedSigningKey(signing_key.key_id, record))
    store.replace_keyring(connection, keyring.sealed(root))
    return None, 1
