"""The use cases of keys: which there are, and new ones in their place while the service runs.

The rule: nothing is sealed under a key before that is on stable storage, and nothing is in the database that the
service does not open. So a new store key is learned first, then recorded, and used after that; whoever asked for it
may be gone meanwhile. A new root key is where its source keeps it before the keyring is sealed under it.

What is under older keys follows in the background, some rows at a time: MACs of rights and keys of scopes the newest
store key, values the newest key of their scope. How far that went, the rows say themselves, so a service that was
killed goes on where it was; then the older key of a scope is destroyed.

A key that is old, or was used very often, is renewed without being asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from secrets_service import names, places, rotation_store, store
from secrets_service.cipher import Damaged
from secrets_service.errors import RootKeyWrong, ScopeNotFound
from secrets_service.foundation import Foundation
from secrets_service.keyring import Keyring
from secrets_service.memory import RememberingDatabase
from secrets_service.model import KeyStatus, Scope, SealedSigningKey
from secrets_service.rootkey import RootKey
from servicekit import audit
from servicekit.errors import ServiceError, StartError
from servicekit.storage import Connection, StorageError

log = logging.getLogger(__name__)

PAUSE_SECONDS = 0.005
"""Between two parts of the work in the background, for those who wait to write."""

RETRY_SECONDS = 30.0
"""After which the work in the background is tried again when it failed, such as on a full disk."""

CHECK_SECONDS = 3600.0
"""How often it is looked whether a key is due for renewal."""

MOST_USES = 2**32
"""How often one key seals before it is renewed. Of a scope's key its puts are counted, of a store key what it has
sealed; that is written down every `CHECK_SECONDS` and at the end, so a process that is killed takes its last count
along."""

_DAY_MS = 24 * 3600 * 1000


@dataclass(frozen=True, kw_only=True)
class KeyAges:
    """After how many days keys are renewed without being asked for; 0: never."""

    store: int
    scope: int


class KeyRotation:
    """The keys of a service that runs. `now` tells Unix seconds."""

    def __init__(
        self,
        base: Foundation,
        database: RememberingDatabase,
        ages: KeyAges,
        now: Callable[[], float],
        *,
        renewed: Callable[[], None],
    ) -> None:
        """`renewed` is told of each new store key, once it is in use."""
        self._base = base
        self._database = database
        self._ages = ages
        self._now = now
        self._renewed = renewed
        self._counted_before: dict[int, int] = {}
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
        """Makes a new store key; what store keys protect follows in the background."""
        await self._to_its_end(self._rotate_store())
        return await self.status()

    async def rotate_scopes(self, scopes: Sequence[str]) -> KeyStatus:
        """Gives scopes, or all of them, new keys, and has their values sealed anew."""
        for scope in scopes:
            names.scope_name(scope)

        def rotate(connection: Connection) -> int:
            chosen = store.scopes(connection)
            if scopes:
                known = {names.folded(each.name): each for each in chosen}
                for scope in scopes:
                    if names.folded(scope) not in known:
                        raise ScopeNotFound(scope)
                chosen = [known[each] for each in sorted({names.folded(scope) for scope in scopes})]
            for each in chosen:
                rotation_store.add_scope_key(connection, self._base.keyring, each, created_ms=self._now_ms())
                audit.changed(scope=each.name, now="new key")
            return len(chosen)

        count = await self._database.write(rotate)
        log.info("scope keys rotated", extra={"scopes": count})
        self._has_work.set()
        return await self.status()

    async def close(self) -> None:
        """Records what was counted, when nothing is sealed any more."""
        with contextlib.suppress(StorageError):
            await self._count_uses()

    async def run(self) -> None:
        """Renews keys that are due, and brings everything under the newest ones, until cancelled."""
        while True:
            try:
                await self._renew_due()
                if self._has_work.is_set():
                    self._has_work.clear()
                    await self._follow()
            except (StorageError, ServiceError) as error:
                cause = error.message if isinstance(error, ServiceError) else "the database failed"
                log.warning("not everything is under the newest keys yet", extra={"cause": cause})
                await asyncio.sleep(RETRY_SECONDS)
                self._has_work.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECK_SECONDS):  # `wait_for` loses a cancellation of the same moment
                    await self._has_work.wait()

    # --- one transaction each ---

    def _status(self, connection: Connection) -> KeyStatus:
        sealed = store.find_keyring(connection)
        assert sealed is not None  # the service does not run without
        return KeyStatus(
            root_key_id=sealed.root_key_id,
            root_key_source=self._base.root.name,
            store_keys=rotation_store.store_key_uses(connection, self._base.keyring),
            scopes=store.count_scopes(connection),
            oldest_scope_key_ms=rotation_store.oldest_scope_key(connection),
            values_behind=rotation_store.count_behind(connection),
        )

    async def _rotate_root(self) -> None:
        await self._root_in_use()
        fresh = await self._base.root.stage()
        try:
            await self._database.write(
                lambda connection: store.replace_keyring(connection, self._base.keyring.sealed(fresh))
            )
        except ServiceError as error:
            # After a failure of the storage, what a later start reads may be what was to be written.
            if not isinstance(error, StorageError):
                await self._drop_unless_in_use(fresh)
            raise
        await self._base.root.finish()
        log.warning(
            "root key rotated: keep a safe copy of the new one; without it every stored value is lost",
            extra={"root_key": self._base.root.name, "root_key_id": fresh.id},
        )

    async def _drop_unless_in_use(self, staged: RootKey) -> None:
        sealed = await self._database.read(store.find_keyring)
        if sealed is not None and sealed.root_key_id != staged.id:
            await self._base.root.drop()

    async def _rotate_store(self) -> None:
        root = await self._root_in_use()
        keyring = self._base.keyring.with_new_store_key(self._now_ms())
        self._base.keyring.learn(keyring)
        self._base.integrity.learn(keyring.rights_keys())
        await self._database.write(_recorded, root=root, keyring=keyring)
        self._base.keyring.use(keyring)
        self._base.integrity.use(keyring.rights_keys())
        self._base.token_macs.use(keyring.token_mac_keys())
        self._renewed()
        log.info("store key rotated", extra={"version": keyring.current})
        self._has_work.set()

    async def _root_in_use(self) -> RootKey:
        """The root key that the keyring is sealed under, from its source."""
        sealed = await self._database.read(store.find_keyring)
        assert sealed is not None  # the service does not run without
        try:
            root = await self._base.root.key_of(sealed)
        except StartError as error:
            raise RootKeyWrong(str(error)) from None
        if root is None or root.id != sealed.root_key_id:
            has = "none" if root is None else root.id
            raise RootKeyWrong(f"The root key of {self._base.root.name} is {has}; {sealed.root_key_id} is in use.")
        return root

    async def _to_its_end(self, rotation: Coroutine[Any, Any, None]) -> None:
        async def alone() -> None:
            async with self._one_at_a_time:
                await rotation

        await asyncio.shield(asyncio.ensure_future(alone()))

    # --- in the background ---

    async def _count_uses(self) -> int:
        """Records how often the store key in use has sealed: the number, over all processes."""
        keyring = self._base.keyring
        version = keyring.current
        if version not in self._counted_before:
            before = await self._database.read(rotation_store.counted_uses, version)
            self._counted_before = {version: before}
        uses = self._counted_before[version] + keyring.uses
        if keyring.uses:
            await self._database.write(rotation_store.count_uses, version, uses)
        return uses

    async def _renew_due(self) -> None:
        made_ms = max(self._base.keyring.store_keys().values())
        is_old = 0 < self._ages.store * _DAY_MS <= self._now_ms() - made_ms
        if await self._count_uses() >= MOST_USES or is_old:
            await self._to_its_end(self._rotate_store())
        made_before_ms = self._now_ms() - self._ages.scope * _DAY_MS if self._ages.scope else -1

        def renew(connection: Connection) -> int:
            due = rotation_store.due_scopes(connection, made_before_ms=made_before_ms, uses=MOST_USES)
            for scope in due:
                rotation_store.add_scope_key(connection, self._base.keyring, scope, created_ms=self._now_ms())
            return len(due)

        if await self._database.read(rotation_store.due_scopes, made_before_ms=made_before_ms, uses=MOST_USES):
            while count := await self._database.write(renew):
                log.info("scope keys renewed", extra={"scopes": count})
                self._has_work.set()
                await asyncio.sleep(PAUSE_SECONDS)

    async def _follow(self) -> None:
        await self._follow_store_key()
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

    async def _follow_store_key(self) -> None:
        keyring = self._base.keyring
        is_any = await self._in_parts(partial(rotation_store.rewrap_scope_keys, keyring=keyring))
        for kind in rotation_store.KINDS:
            renew = partial(rotation_store.renew_macs, kind=kind, version=keyring.current)
            is_any = await self._in_parts(renew) or is_any
        if is_any:
            # The older records are still in the database's log.
            await self._database.destroy(lambda connection: (None, 1))
            log.info("everything that store keys protect is under the newest one", extra={"version": keyring.current})

    async def _in_parts(self, step: Callable[..., rotation_store.Place | None]) -> bool:
        """Does something some rows at a time, to its end; whether there were any."""
        place, is_any = rotation_store.BEGINNING, False
        while True:
            following = await self._database.write(partial(step, after=place))
            if following is None:
                return is_any
            place, is_any = following, True
            await asyncio.sleep(PAUSE_SECONDS)

    def _now_ms(self) -> int:
        return int(self._now() * 1000)


def _dropped(connection: Connection, scope: Scope) -> tuple[int, int]:
    count = rotation_store.drop_scope_keys(connection, scope)
    return count, count


def _recorded(connection: Connection, root: RootKey, keyring: Keyring) -> None:
    """Records a keyring that has a new key in use, with the signing keys under that one."""
    for signing_key in store.signing_keys(connection):
        place = places.signing_key(signing_key.key_id)
        try:
            record = keyring.seal(keyring.open(signing_key.record, place), place)
        except Damaged:
            continue
        store.replace_signing_key(connection, SealedSigningKey(signing_key.key_id, record))
    store.replace_keyring(connection, keyring.sealed(root))
