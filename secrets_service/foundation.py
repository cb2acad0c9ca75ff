"""What the first start makes, and every later start must find: keys, store id, signing key, admins, first admin.

The rule: whether a start is the first is decided by the database alone. One that was founded opens with its own root
key or not at all; one that was not holds nothing, so a crash before the founding transaction merely starts over.
"""

from __future__ import annotations

import logging
import os
import secrets
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secrets_service import admin, directory_store, first_format, integrity, names, places, rootkey, store
from secrets_service.authority import SigningKeys
from secrets_service.cipher import Damaged
from secrets_service.directory import FIRST_ENTITLEMENTS
from secrets_service.errors import RightsDamaged
from secrets_service.integrity import Integrity
from secrets_service.keyring import Keyring
from secrets_service.model import USERS, Email, Platform, Profile, SealedKeyring, SealedSigningKey, SecretBytes
from secrets_service.rootkey import RootKey
from secrets_service.settings import SecretsSettings
from secrets_service.tokens import TokenMacs
from servicekit.context import ADMINS
from servicekit.database import Database
from servicekit.errors import StartError

log = logging.getLogger(__name__)

ADMIN = "admin"
"""User name of the first admin."""


@dataclass(frozen=True, slots=True)
class Foundation:
    """What the parts of the service are built on."""

    platform: Platform
    keyring: Keyring
    integrity: Integrity
    token_macs: TokenMacs
    signing_keys: SigningKeys


async def opened(settings: SecretsSettings, database: Database, now: Callable[[], float]) -> Foundation:
    """Founds a new store, or opens one that was founded before; raises StartError when its key is not at hand."""
    platform = await database.read(store.stated_platform)
    if platform is None:
        if await database.read(store.holds_data):
            raise StartError(
                f"{settings.database} holds data, but not what a store begins with. Restore it from a backup."
            )
        return await _founded(settings, database, now)
    keyring, authenticated = await _opened_keyring(settings, database, platform, now)
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
    return Foundation(platform, keyring, authenticated, TokenMacs(keyring.token_mac_keys()), SigningKeys(keys))


async def _opened_keyring(
    settings: SecretsSettings, database: Database, platform: Platform, now: Callable[[], float]
) -> tuple[Keyring, Integrity]:
    sealed = await database.read(store.find_keyring)
    if sealed is None:
        root = rootkey.load(settings.root_key)
        keyring = await _migrated(settings, database, platform, root, now)
    else:
        root = rootkey.load_wanted(settings.root_key, sealed.root_key_id)
        before = _root_key_of(settings, sealed, root)
        keyring = _unsealed(settings, platform, sealed, before)
        if before != root:
            await database.write(store.replace_keyring, keyring.sealed(root))
            log.warning("store sealed under another root key", extra={"before": before.id, "root_key_id": root.id})
    authenticated = await _equip(database, keyring)
    if not keyring.rights_are_authenticated:
        keyring = await database.write(first_format.authenticate, root, keyring)
    return keyring, authenticated


async def _equip(database: Database, keyring: Keyring) -> Integrity:
    authenticated = Integrity(keyring.rights_keys())
    await database.equip(lambda connection: integrity.equip(connection, authenticated))
    return authenticated


def _root_key_of(settings: SecretsSettings, sealed: SealedKeyring, root: RootKey) -> RootKey:
    """The root key that a keyring is sealed under: the one in use, or the one before where that is at hand."""
    if sealed.root_key_id == root.id:
        return root
    if settings.previous_root_key_file is not None:
        before = rootkey.load(settings.previous_root_key_file)
        if sealed.root_key_id == before.id:
            return before
    raise StartError(
        f"The root key {settings.root_key} is {root.id}, but {settings.database} was sealed under"
        f" {sealed.root_key_id}. Put that one in its place, or name its file in TESSERA_PREVIOUS_ROOT_KEY_FILE to have"
        " the store sealed anew; nothing was changed."
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
    settings: SecretsSettings, database: Database, platform: Platform, root: RootKey, now: Callable[[], float]
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


async def _founded(settings: SecretsSettings, database: Database, now: Callable[[], float]) -> Foundation:
    store_id = os.urandom(16)
    root = rootkey.load_or_make(settings.root_key)
    keyring = Keyring.made(store_id, int(now() * 1000))
    macs = TokenMacs(keyring.token_mac_keys())
    key_id, key = secrets.token_hex(8), Ed25519PrivateKey.generate()
    sealed = SealedSigningKey(key_id, keyring.seal(SecretBytes(key.private_bytes_raw()), places.signing_key(key_id)))
    authenticated = await _equip(database, keyring)
    token, info = admin.write(settings.admin_token, now())

    def found(connection: sqlite3.Connection) -> Platform:
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
        extra={"root_key": str(settings.root_key), "admin_token": str(settings.admin_token)},
    )
    return Foundation(platform, keyring, authenticated, macs, SigningKeys({key_id: key}))
