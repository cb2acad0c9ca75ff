"""What the first start makes, and every later start must find: keys, store id, signing key, admins, first admin.

The rule: whether a start is the first is decided by the database alone. One that was founded opens with its own root
key or not at all; one that was not holds nothing, so a crash before the founding transaction merely starts over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secrets_service import admin, directory_store, first_format, integrity, names, places, rootsource, store
from secrets_service.audit_servicer import SECRETS
from secrets_service.authority import SigningKeys
from secrets_service.cipher import Damaged
from secrets_service.directory import FIRST_ENTITLEMENTS
from secrets_service.errors import KeySourceWrong, RightsDamaged
from secrets_service.integrity import Integrity
from secrets_service.keyring import Keyring
from secrets_service.model import USERS, Email, Platform, Profile, SealedKeyring, SealedSigningKey, SecretBytes
from secrets_service.rootkey import RootKey
from secrets_service.rootsource import RootSource
from secrets_service.settings import SecretsSettings
from secrets_service.tokens import TokenMacs
from servicekit.context import ADMINS
from servicekit.errors import StartError
from servicekit.storage import Connection, Storage

log = logging.getLogger(__name__)

ADMIN = "admin"
"""User name of the first admin."""


@dataclass(frozen=True, slots=True)
class Foundation:
    """What the parts of the service are built on."""

    root: RootSource
    platform: Platform
    keyring: Keyring
    integrity: Integrity
    token_macs: TokenMacs
    signing_keys: SigningKeys


async def opened(
    settings: SecretsSettings, root: RootSource, database: Storage, now: Callable[[], float]
) -> Foundation:
    """Founds a new store, or opens one that was founded before.

    Raises StartError when its key is not at hand, and KeySourceDown when it may be after a while.
    """
    try:
        return await _opened(settings, root, database, now)
    except KeySourceWrong as error:
        raise StartError(f"{error.message} Nothing was changed.") from None


async def _opened(
    settings: SecretsSettings, root: RootSource, database: Storage, now: Callable[[], float]
) -> Foundation:
    platform = await database.read(store.stated_platform)
    if platform is None:
        if await database.read(store.holds_data):
            raise StartError(
                f"{settings.database} holds data, but not what a store begins with. Restore it from a backup."
            )
        return await _founded(settings, root, database, now)
    keyring, authenticated = await _opened_keyring(settings, root, database, platform, now)
    try:
        platform = await database.read(store.find_platform)
        keys = {
            sealed.key_id: Ed25519PrivateKey.from_private_bytes(
                keyring.open(sealed.record, places.signing_key(sealed.key_id)).reveal()
            )
            for sealed in await database.read(store.signing_keys)
        }
    except Damaged:
        raise StartError(f"A signing key in {settings.database} is damaged. Restore it from a backup.") from None
    except RightsDamaged:
        raise StartError(
            f"What the first start wrote to {settings.database} was changed since. Restore it from a backup."
        ) from None
    if not keys:
        raise StartError(f"{settings.database} has lost its signing keys. Restore it from a backup.")
    return Foundation(root, platform, keyring, authenticated, TokenMacs(keyring.token_mac_keys()), SigningKeys(keys))


async def _opened_keyring(
    settings: SecretsSettings, source: RootSource, database: Storage, platform: Platform, now: Callable[[], float]
) -> tuple[Keyring, Integrity]:
    sealed = await database.read(store.find_keyring)
    if sealed is None:
        root = await _root_key_of_first_format(settings, source)
        keyring = await _migrated(settings, database, platform, root, now)
    else:
        before, root = await _root_keys(settings, source, sealed)
        keyring = _unsealed(settings, platform, sealed, before)
        if before != root:
            await database.write(store.replace_keyring, keyring.sealed(root))
            log.warning("store sealed under another root key", extra={"before": before.id, "root_key_id": root.id})
    authenticated = await _equip(database, keyring)
    if not keyring.rights_are_authenticated:
        keyring = await database.write(first_format.authenticate, root, keyring)
    return keyring, authenticated


async def _root_key_of_first_format(settings: SecretsSettings, source: RootSource) -> RootKey:
    root = await source.key_of(SealedKeyring(root_key_id="", record=b""))
    if root is None:
        raise StartError(
            f"{settings.database} is of an older version, which had its root key in a file. Start it once with that"
            " file (TESSERA_ROOT_KEY_SOURCE=file); then it can move to another source."
        )
    return root


async def _equip(database: Storage, keyring: Keyring) -> Integrity:
    authenticated = Integrity(keyring.rights_keys())
    await database.equip(lambda connection: integrity.equip(connection, authenticated))
    return authenticated


async def _root_keys(settings: SecretsSettings, source: RootSource, sealed: SealedKeyring) -> tuple[RootKey, RootKey]:
    """The root key that a keyring is sealed under, and the one that it is to be: the same, unless both are at hand."""
    root = await source.key_of(sealed)
    if root is not None and root.id == sealed.root_key_id:
        return root, root
    previous = rootsource.previous(settings)
    before = None if previous is None else await previous.key_of(sealed)
    if before is not None and before.id == sealed.root_key_id:
        return before, root or await source.first()
    has = "none for this store" if root is None else root.id
    raise StartError(
        f"The root key of {source.name} is {has}, but {settings.database} was sealed under {sealed.root_key_id}. Put"
        " that one in its place, or name its file in TESSERA_PREVIOUS_ROOT_KEY_FILE (or where else it is, in"
        " TESSERA_PREVIOUS_ROOT_KEY_SOURCE) to have the store sealed anew; nothing was changed."
    )


def _unsealed(settings: SecretsSettings, platform: Platform, sealed: SealedKeyring, root: RootKey) -> Keyring:
    try:
        return Keyring.opened(sealed, root, platform.store_id)
    except Damaged:
        raise StartError(
            f"The root key {root.id} does not open the keyring of {settings.database}, which is damaged."
            " Restore it from a backup; nothing was changed."
        ) from None


async def _migrated(
    settings: SecretsSettings, database: Storage, platform: Platform, root: RootKey, now: Callable[[], float]
) -> Keyring:
    key_check = await database.read(store.first_format_check)
    if key_check is None:
        raise StartError(f"{settings.database} has lost its keyring. Restore it from a backup; nothing was changed.")
    if not first_format.is_key_of(root, platform, key_check):
        raise StartError(
            f"The root key {settings.root_key} is not the one that {settings.database} was sealed under."
            " Put the right one in its place; nothing was changed."
        )
    try:
        keyring = await database.write(first_format.migrate, root, platform, now_ms=int(now() * 1000))
    except Damaged:
        raise StartError(f"A signing key in {settings.database} is damaged. Restore it from a backup.") from None
    await database.erase()
    return keyring


async def _founded(
    settings: SecretsSettings, source: RootSource, database: Storage, now: Callable[[], float]
) -> Foundation:
    await asyncio.to_thread(_require_that_none_is_missing, settings)
    store_id = os.urandom(16)
    root = await source.first()
    keyring = Keyring.made(store_id, int(now() * 1000))
    macs = TokenMacs(keyring.token_mac_keys())
    key_id, key = secrets.token_hex(8), Ed25519PrivateKey.generate()
    sealed = SealedSigningKey(key_id, keyring.seal(SecretBytes(key.private_bytes_raw()), places.signing_key(key_id)))
    authenticated = await _equip(database, keyring)
    token, info = admin.write(settings.admin_token, now())

    def found(connection: Connection) -> Platform:
        for group in (ADMINS, USERS):
            directory_store.insert_group(connection, group, folded=names.folded_principal(group))
        profile = Profile(
            name=ADMIN,
            display_name=ADMIN,
            emails=(Email("work", ADMIN, is_primary=True),),
            entitlements=FIRST_ENTITLEMENTS,
        )
        user = directory_store.insert_account(connection, profile, folded=ADMIN, groups=[ADMINS, USERS])
        store.insert_token(connection, info, owner_id=user.id, creator_id=user.id, mac=macs.of(token))
        store.insert_signing_key(connection, sealed)
        store.insert_keyring(connection, keyring.sealed(root))
        # Sixteen digits: clients read it as a signed 64-bit number.
        workspace_id = str(10**15 + secrets.randbelow(9 * 10**15))
        platform = Platform(store_id, workspace_id, user.id, token.id)
        store.insert_platform(connection, platform)
        store.older_endpoints_are_known(connection)  # there are none
        return platform

    platform = await database.write(found)
    log.warning(
        "first start: keep a safe copy of the root key; without it every stored value is lost",
        extra={"root_key": source.name, "admin_token": str(settings.admin_token)},
    )
    return Foundation(source, platform, keyring, authenticated, macs, SigningKeys({key_id: key}))


def _require_that_none_is_missing(settings: SecretsSettings) -> None:
    """Raises StartError where audit records say that there was a store: whoever lost its database wants no new one."""
    files = [path for path in settings.audit_sink(SECRETS).files() if path.stat().st_size]
    if files:
        others = f" and {len(files) - 1} more" if files[1:] else ""
        raise StartError(
            f"{settings.database} is missing or empty, but a store was here before: there are audit files of it"
            f" ({files[0]}{others}). Restore a backup (tessera restore), or move these files away to begin anew; no new"
            " store was made."
        )
