"""What the first start makes, and every later start must find: root key, store id, signing key, admins, first admin.

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

from secrets_service import admin, directory_store, grant_store, names, rootkey, store
from secrets_service.authority import SigningKeys
from secrets_service.cipher import Cipher, Damaged, Place
from secrets_service.directory import FIRST_ENTITLEMENTS
from secrets_service.model import USERS, Email, Platform, Profile, SealedSigningKey, SecretBytes
from secrets_service.settings import SecretsSettings
from secrets_service.tokens import TokenMac
from servicekit.context import ADMINS
from servicekit.database import Database
from servicekit.errors import StartError

log = logging.getLogger(__name__)

ADMIN = "admin"
"""User name of the first admin."""

_CHECK = SecretBytes(b"this is the key")
_CHECK_PLACE = Place(kind="key-check")
_TOKEN_MAC = "token-mac"  # noqa: S105 (a label, not a token)


@dataclass(frozen=True, slots=True)
class Foundation:
    """What the parts of the service are built on."""

    platform: Platform
    cipher: Cipher
    token_mac: TokenMac
    signing_keys: SigningKeys


async def opened(settings: SecretsSettings, database: Database, now: Callable[[], float]) -> Foundation:
    """Founds a new store, or opens one that was founded before; raises StartError when its key is not at hand."""
    platform = await database.read(store.find_platform)
    if platform is None:
        return await _founded(settings, database, now)
    cipher = Cipher(rootkey.load(settings.root_key), platform.store_id)
    try:
        cipher.open(platform.key_check, _CHECK_PLACE)
        keys = {
            sealed.key_id: Ed25519PrivateKey.from_private_bytes(
                cipher.open(sealed.record, _signing_place(sealed.key_id)).reveal()
            )
            for sealed in await database.read(store.signing_keys)
        }
    except Damaged:
        raise StartError(
            f"The root key {settings.root_key} is not the one that {settings.database} was sealed under."
            " Put the right one in its place; nothing was changed."
        ) from None
    return Foundation(platform, cipher, _token_mac(cipher), SigningKeys(keys))


async def _founded(settings: SecretsSettings, database: Database, now: Callable[[], float]) -> Foundation:
    store_id = os.urandom(16)
    cipher = Cipher(rootkey.load_or_make(settings.root_key), store_id)
    mac = _token_mac(cipher)
    key_id, key = secrets.token_hex(8), Ed25519PrivateKey.generate()
    sealed = SealedSigningKey(key_id, cipher.seal(SecretBytes(key.private_bytes_raw()), _signing_place(key_id)))
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
        store.insert_token(connection, info, owner_id=user.id, creator_id=user.id, mac=mac.of(token))
        store.insert_signing_key(connection, sealed)
        # Sixteen digits: clients read it as a signed 64-bit number.
        workspace_id = str(10**15 + secrets.randbelow(9 * 10**15))
        platform = Platform(store_id, workspace_id, cipher.seal(_CHECK, _CHECK_PLACE), user.id, token.id)
        store.insert_platform(connection, platform)
        grant_store.older_endpoints_are_known(connection)  # there are none
        return platform

    platform = await database.write(found)
    log.warning(
        "first start: keep a safe copy of the root key; without it every stored value is lost",
        extra={"root_key": str(settings.root_key), "admin_token": str(settings.admin_token)},
    )
    return Foundation(platform, cipher, mac, SigningKeys({key_id: key}))


def _token_mac(cipher: Cipher) -> TokenMac:
    return TokenMac(cipher.derive(_TOKEN_MAC))


def _signing_place(key_id: str) -> Place:
    return Place(kind="signing-key", key=key_id)
