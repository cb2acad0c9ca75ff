"""AuditKeys: the keys of the audit logs, for whoever records and for whoever verifies. They are derived, not stored."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from secrets_service.callers import require_admin
from secrets_service.keyring import Keyring
from secrets_service.memory import RememberingDatabase
from servicekit import audit
from servicekit.audit_records import AuditKey
from servicekit.context import current_caller
from tessera.identity.v1 import audit_pb2 as pb
from tessera.identity.v1 import audit_pb2_grpc as rpc

SECRETS, SERVING = "secrets", "serving"
"""The services that keep an audit log."""


def audit_keys(keyring: Keyring) -> dict[str, list[AuditKey]]:
    """The audit keys of each service that keeps a log; the last of each is in use."""
    return {
        service: [AuditKey(key.reveal()) for _, key in sorted(keyring.audit_keys(service).items())]
        for service in (SECRETS, SERVING)
    }


def audit_key(keyring: Keyring, service: str) -> AuditKey:
    """The one that is in use."""
    return audit_keys(keyring)[service][-1]


def audit_readers(database: RememberingDatabase) -> Callable[[], Awaitable[None]]:
    """What returns when the caller may read the audit log; raises AdminsOnly."""

    async def require() -> None:
        await database.read(require_admin, current_caller(), "read the audit log")

    return require


class AuditKeysServicer(rpc.AuditKeysServicer):
    """Hands out audit keys."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    async def GetKey(self, request: pb.GetAuditKeyRequest, context: Any) -> pb.AuditKey:
        audit.sensitive()
        return pb.AuditKey(service=SERVING, key=audit_key(self._keyring, SERVING).raw)

    async def ListKeys(self, request: pb.ListAuditKeysRequest, context: Any) -> pb.ListAuditKeysResponse:
        audit.sensitive()
        of_services = audit_keys(self._keyring).items()
        return pb.ListAuditKeysResponse(
            keys=[pb.AuditKey(service=service, key=key.raw) for service, keys in of_services for key in keys]
        )
