"""What Secrets adds to a backup: database and audit log, and the MAC by which a restore knows what it is given.

The MAC's key is derived from a store key that the copied keyring holds: whoever has the root key can verify it, and
nobody else can make one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from secrets_service import store
from secrets_service.foundation import Foundation
from secrets_service.integrity import Integrity
from secrets_service.keyring import Keyring
from servicekit import backups, database
from servicekit.audit_export import Exporter
from servicekit.backups import Copy
from servicekit.errors import InvalidParameter
from servicekit.storage import Storage

DATABASE = "secrets.db"

_KIND = "backup"


class SecretsBackups:
    """Backups of a service that runs."""

    def __init__(self, base: Foundation, opened: Storage, exporter: Exporter) -> None:
        self._base = base
        self._database = opened
        self._exporter = exporter

    @asynccontextmanager
    async def taken(self, directory: Path) -> AsyncIterator[Copy]:
        """Copies what there is now."""
        # Before the copy: a key in use is on stable storage, so the copy holds it; none is ever taken out.
        version = self._base.keyring.current
        path = directory / DATABASE
        files = await backups.with_audit_log(self._database, self._exporter, path)
        with database.looked_at(path) as connection:
            sealed, platform = store.find_keyring(connection), store.stated_platform(connection)
        assert sealed is not None  # the service does not run without
        assert platform is not None
        facts = {
            "store_id": platform.store_id.hex(),
            "root_key_id": sealed.root_key_id,
            "store_key_version": str(version),
            "root_key": "elsewhere" if sealed.wrapped is None else "encrypted",
        }
        yield Copy(files, facts)

    def authenticated(self, manifest: bytes, store_key_version: int) -> bytes:
        """The MAC of a manifest."""
        keys = self._base.keyring.backup_keys()
        if store_key_version not in keys:
            raise InvalidParameter("store_key_version: there is no such key.")
        return Integrity({store_key_version: keys[store_key_version]}).mac(_KIND, manifest)


def is_authentic(keyring: Keyring, manifest: bytes, mac: bytes) -> bool:
    """Whether a MAC was made of this manifest, by a service that had this keyring."""
    return Integrity(keyring.backup_keys()).is_intact(mac, _KIND, manifest)
