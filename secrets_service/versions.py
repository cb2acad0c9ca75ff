"""The use cases of a secret's versions: list, restore, purge. The order of checks is that of scopes.py."""

from __future__ import annotations

from secrets_service import names, store
from secrets_service.errors import SecretNotFound, VersionNotFound
from secrets_service.memory import RememberingDatabase
from secrets_service.model import VersionInfo
from secrets_service.scopes import permitted
from secrets_service.values import SecretValues
from servicekit import audit
from servicekit.context import Principal
from servicekit.storage import Connection


class SecretVersions:
    """What was put under a key before, as far as it is kept."""

    def __init__(self, database: RememberingDatabase, values: SecretValues) -> None:
        self._database = database
        self._values = values

    async def list_versions(self, *, scope: str, key: str, caller: Principal) -> tuple[str, list[VersionInfo]]:
        """A key as it is shown, and its versions, the newest first; held ones also after the key was deleted."""
        names.scope_name(scope)
        folded = names.folded(names.key_name(key))

        def find(connection: Connection) -> tuple[str, list[VersionInfo]]:
            found = permitted(connection, scope, caller)
            known = store.find_key(connection, found, folded)
            versions = store.versions(connection, known) if known else []
            if known is None or not versions:
                raise SecretNotFound(found.name, key)
            return known.name, versions

        return await self._database.read(find)

    async def restore(self, *, scope: str, key: str, version: int, caller: Principal) -> int:
        """Puts the value of an older version again; the new version."""
        names.scope_name(scope)
        folded = names.folded(names.key_name(key))

        def restore(connection: Connection) -> tuple[int, int]:
            found = permitted(connection, scope, caller)
            known = store.find_key(connection, found, folded)
            if known is None or not known.current:
                raise SecretNotFound(found.name, key)
            # What somebody deleted is only there for those who still run on it.
            sealed = store.find_version(connection, known, version) if version >= known.first_version else None
            if sealed is None:
                raise VersionNotFound(found.name, known.name, version)
            value = self._values.open(found, sealed)
            restored, destroyed = self._values.add(connection, found, known.name, value)
            audit.value(f"{found.name}/{known.name}", restored, value.reveal())
            return restored, destroyed

        return await self._database.destroy(restore, leaves_rights=True)

    async def purge(self, *, scope: str, key: str, caller: Principal) -> None:
        """Deletes a secret and destroys all its values at once."""
        names.scope_name(scope)
        folded = names.folded(names.key_name(key))

        def purge(connection: Connection) -> tuple[None, int]:
            found = permitted(connection, scope, caller)
            known = store.find_key(connection, found, folded)
            destroyed = self._values.purge(connection, known) if known else 0
            if not destroyed:
                raise SecretNotFound(found.name, key)
            return None, destroyed

        await self._database.destroy(purge, leaves_rights=True)
