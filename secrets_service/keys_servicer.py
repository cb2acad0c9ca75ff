"""Keys: messages to calls and back. What is done is told in rotation.py."""

from __future__ import annotations

from typing import Any

from secrets_service.backups import SecretsBackups
from secrets_service.model import KeyStatus
from secrets_service.rotation import KeyRotation
from tessera.secrets.v1 import secrets_pb2 as pb
from tessera.secrets.v1 import secrets_pb2_grpc as rpc


class KeysServicer(rpc.KeysServicer):
    """The keys that everything is sealed under."""

    def __init__(self, rotation: KeyRotation, backups: SecretsBackups) -> None:
        self._rotation = rotation
        self._backups = backups

    async def GetKeyStatus(self, request: pb.GetKeyStatusRequest, context: Any) -> pb.KeyStatus:
        return _as_message(await self._rotation.status())

    async def RotateRootKey(self, request: pb.RotateRootKeyRequest, context: Any) -> pb.KeyStatus:
        return _as_message(await self._rotation.rotate_root())

    async def RotateStoreKey(self, request: pb.RotateStoreKeyRequest, context: Any) -> pb.KeyStatus:
        return _as_message(await self._rotation.rotate_store())

    async def RotateScopeKeys(self, request: pb.RotateScopeKeysRequest, context: Any) -> pb.KeyStatus:
        return _as_message(await self._rotation.rotate_scopes(request.scopes))

    async def AuthenticateBackup(
        self, request: pb.AuthenticateBackupRequest, context: Any
    ) -> pb.AuthenticateBackupResponse:
        return pb.AuthenticateBackupResponse(
            mac=self._backups.authenticated(request.manifest, request.store_key_version)
        )


def _as_message(status: KeyStatus) -> pb.KeyStatus:
    return pb.KeyStatus(
        root_key_id=status.root_key_id,
        root_key_source=status.root_key_source,
        store_keys=[
            pb.StoreKey(
                version=each.version,
                creation_timestamp=each.made_ms,
                scope_keys=each.scope_keys,
                tokens=each.tokens,
                rights=each.rights,
            )
            for each in status.store_keys
        ],
        scopes=status.scopes,
        oldest_scope_key_timestamp=status.oldest_scope_key_ms,
        values_behind=status.values_behind,
    )
