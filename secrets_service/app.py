"""The one page where the Secrets service is wired."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources

from secrets_service import directory_store, foundation, rootsource
from secrets_service.admin import AdminToken
from secrets_service.answers import AnswerSeal
from secrets_service.audit_servicer import SECRETS, SERVING, AuditKeysServicer, audit_key, audit_readers
from secrets_service.authority import Authority, by_confirmed_assertion, by_own_token
from secrets_service.backups import SecretsBackups
from secrets_service.client_secrets import ClientSecrets
from secrets_service.clock import Onward
from secrets_service.directory import Accounts, Directory, Groups
from secrets_service.errors import KeySourceDown
from secrets_service.feed import AccessFeed
from secrets_service.foundation import Foundation
from secrets_service.grants import LaunchGrants
from secrets_service.identity_servicer import AuthorityServicer, ClientSecretsServicer, TokensServicer
from secrets_service.issuer_keys import IssuerKeys
from secrets_service.keys_servicer import KeysServicer
from secrets_service.kms import KmsPlugin
from secrets_service.memory import RememberingDatabase
from secrets_service.model import Kind
from secrets_service.oidc import ExternalIssuer
from secrets_service.permissions import EndpointPermissions
from secrets_service.permissions_servicer import AccessFeedServicer, PermissionsServicer
from secrets_service.personal_tokens import Tokens
from secrets_service.resolver import References
from secrets_service.rootsource import RootSource
from secrets_service.rotation import KeyAges, KeyRotation
from secrets_service.scim_servicer import ScimServicer
from secrets_service.scopes import SecretScopes
from secrets_service.servicer import SecretResolverServicer, SecretsServicer
from secrets_service.settings import SecretsSettings
from secrets_service.throttle import Throttle
from secrets_service.values import SecretValues
from secrets_service.versions import SecretVersions
from servicekit import audit, database, grpc_server, peers, relay, sockets, tls
from servicekit.audit import Trail
from servicekit.audit_export import Exporter
from servicekit.audit_servicer import AuditLogServicer
from servicekit.audit_tail import AuditTail
from servicekit.backups import BackupsServicer
from servicekit.errors import Unavailable
from servicekit.failed_logins import FailedLogins
from servicekit.grpc_server import CallLimits, Listener
from servicekit.metrics import ServiceMetrics, listening
from servicekit.once import Answers
from servicekit.storage import Storage
from servicekit.tls import Certificate
from tessera.backups.v1 import backups_pb2
from tessera.identity.v1 import audit_pb2, identity_pb2, permissions_pb2
from tessera.policy import POLICY
from tessera.secrets.v1 import secrets_pb2

log = logging.getLogger(__name__)

MIGRATIONS = resources.files("secrets_service") / "migrations"

MESSAGE_LIMIT = 4 * 1024 * 1024
"""Bytes of a message: an answer of Resolve is the largest. Values have a limit of their own."""

SEALED_RETRY_SECONDS = 1.0
"""How long a start without its root key waits until it asks the key's source again."""

REMOTE_PEERS = ("gateway", "serving")
"""Who may call from another machine."""

PEERS = (*REMOTE_PEERS, "operator")
"""Who may call over a socket of its own; the operator is the person who runs this machine."""


@dataclass(frozen=True, slots=True)
class Running:
    """The service while it runs."""

    address: str
    """`host:port` of the public listener, with the port that the system chose."""

    peer_address: str
    """That of the one for peers on other machines; empty when there is none."""


@asynccontextmanager
async def running(settings: SecretsSettings, *, now: Callable[[], float] = time.time) -> AsyncIterator[Running]:
    """The whole service: entering opens it, leaving drains and closes it. Raises StartError.

    `now` tells Unix seconds.
    """
    async with AsyncExitStack() as stack:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = await stack.enter_async_context(
            database.opened(settings.database, MIGRATIONS, functions=directory_store.FUNCTIONS)
        )
        root = rootsource.chosen(settings)
        certificate = await stack.enter_async_context(tls.followed(settings))
        base = await _unsealed(settings, root, file, now, certificate)
        feed = AccessFeed()
        trail = Trail(SECRETS, file, audit_key(base.keyring, SECRETS), now=now)
        sink = settings.audit_sink(SECRETS)
        exporter = Exporter(trail, file, sink, settings.audit_forwarder(SECRETS), now=now)
        await exporter.compare()
        stack.push_async_callback(exporter.finish)
        await stack.enter_async_context(audit.opened(trail))
        opened = RememberingDatabase(file, Answers(AnswerSeal(base.keyring), now, trail), feed)
        onward = Onward(now)
        authority = Authority(
            opened,
            base.token_macs,
            base.signing_keys,
            _external_issuer(settings, onward, stack),
            workspace_id=base.platform.workspace_id,
            now=onward,
            wall=now,
        )
        values = SecretValues(base.keyring, keep=settings.secret_versions, now=now)
        scopes = SecretScopes(opened, values)
        versions = SecretVersions(opened, values)
        grants = LaunchGrants(opened, values, References(values), authors_need_read=settings.authors_need_read)
        directory = Directory(opened)
        users, service_principals = Accounts(directory, Kind.USER), Accounts(directory, Kind.SERVICE_PRINCIPAL)
        tokens = Tokens(opened, base.token_macs, Throttle(settings.tokens_per_minute, now), onward)
        client_secrets = ClientSecrets(opened, base.token_macs, onward)
        admin_token = AdminToken(settings.admin_token, opened, base.token_macs, now)
        backups = SecretsBackups(base, file, exporter)
        ages = KeyAges(store=settings.store_key_days, scope=settings.scope_key_days)
        rotation = KeyRotation(base, opened, ages, now, renewed=lambda: trail.open(audit_key(base.keyring, SECRETS)))
        stack.push_async_callback(rotation.close)
        jobs = {
            "access feed": feed.run,
            "key rotation": rotation.run,
            "audit": trail.run,
            "audit export": exporter.run,
        }
        if isinstance(root, KmsPlugin):
            jobs["key source"] = partial(root.follow, rotation.rotate_root)
        by_peer = by_confirmed_assertion(authority)
        listeners = [
            Listener(
                address=settings.listen,
                identify=by_own_token(authority),
                certificate=certificate,
                trusted_proxies=settings.trusted_proxies,
                failed_logins=FailedLogins(settings.failed_logins),
                reflection=settings.offers_reflection,
            ),
            *(
                Listener(
                    address=sockets.socket_address(settings.sockets, callee="secrets", caller=peer),
                    identify=by_peer,
                    peer=peer,
                )
                for peer in PEERS
            ),
        ]
        entrance = await stack.enter_async_context(_entrance(settings))
        metrics = ServiceMetrics()
        metrics.watch("tessera_access_followers", "Services that follow changes of permissions.", feed.followers)
        trail.watched_by(metrics)
        secrets_services = secrets_pb2.DESCRIPTOR.services_by_name
        identity_services = identity_pb2.DESCRIPTOR.services_by_name
        audit_services = audit_pb2.DESCRIPTOR.services_by_name
        permission_services = permissions_pb2.DESCRIPTOR.services_by_name
        addresses = await stack.enter_async_context(
            grpc_server.serving(
                listeners,
                services=[
                    (secrets_services["Secrets"], SecretsServicer(scopes, versions)),
                    (secrets_services["SecretResolver"], SecretResolverServicer(grants)),
                    (secrets_services["Keys"], KeysServicer(rotation, backups)),
                    (
                        backups_pb2.DESCRIPTOR.services_by_name["Backups"],
                        BackupsServicer(settings.database.parent / "copies", backups.taken),
                    ),
                    (identity_services["Scim"], ScimServicer(users, Groups(directory), service_principals)),
                    (identity_services["Tokens"], TokensServicer(tokens)),
                    (identity_services["ServicePrincipalSecrets"], ClientSecretsServicer(client_secrets)),
                    (
                        identity_services["Authority"],
                        AuthorityServicer(authority, admin_token, lambda: audit_key(base.keyring, SERVING).id),
                    ),
                    (permission_services["Permissions"], PermissionsServicer(EndpointPermissions(opened))),
                    (permission_services["AccessFeed"], AccessFeedServicer(feed, opened)),
                    (audit_services["AuditLog"], AuditLogServicer(AuditTail(file, sink), audit_readers(opened))),
                    (audit_services["AuditKeys"], AuditKeysServicer(base.keyring)),
                ],
                table=POLICY,
                readiness={"database": file.ping},
                jobs=jobs,
                message_limit=MESSAGE_LIMIT,
                limits=CallLimits(calls=settings.calls, changes=settings.changes),
                drain_seconds=settings.drain_seconds,
                metrics=metrics,
                trail=trail,
            )
        )
        await stack.enter_async_context(listening(settings.metrics_listen, metrics))
        yield Running(addresses[0], entrance)


async def _unsealed(
    settings: SecretsSettings,
    root: RootSource,
    file: Storage,
    now: Callable[[], float],
    certificate: Certificate | None,
) -> Foundation:
    """What a start finds or makes. A key service that does not answer is waited for, and readiness says so."""
    try:
        return await foundation.opened(settings, root, file, now)
    except KeySourceDown as error:
        log.warning("sealed until the source of the root key answers", extra={"cause": error.message})
    sealed = Unavailable("Secrets is sealed until the source of its root key answers.", retry_after=5)
    listeners: list[tuple[str, Certificate | None]] = [
        (settings.listen, certificate),
        *((sockets.socket_address(settings.sockets, callee="secrets", caller=peer), None) for peer in PEERS),
    ]
    async with grpc_server.refusing(listeners, sealed):
        while True:
            await asyncio.sleep(SEALED_RETRY_SECONDS)
            with contextlib.suppress(KeySourceDown):
                return await foundation.opened(settings, root, file, now)


@asynccontextmanager
async def _entrance(settings: SecretsSettings) -> AsyncIterator[str]:
    """Lets in peers on other machines, each to its own socket, where settings say so; yields the address."""
    async with peers.followed(settings, "secrets") as certificate:
        if certificate is None or not settings.peer_listen:
            yield ""
            return
        doors = {peer: sockets.socket_path(settings.sockets, callee="secrets", caller=peer) for peer in REMOTE_PEERS}

        def behind(caller: str, door: str) -> str | None:
            return doors.get(caller) if door == relay.RPC else None

        async with relay.admitting(settings.peer_listen, certificate, behind) as address:
            yield address


def _external_issuer(
    settings: SecretsSettings, now: Callable[[], float], stack: AsyncExitStack
) -> ExternalIssuer | None:
    if not settings.oidc_issuer:
        return None
    keys = IssuerKeys(settings.oidc_issuer, settings.oidc_jwks_url, now)
    stack.push_async_callback(keys.close)
    return ExternalIssuer(
        issuer=settings.oidc_issuer,
        audience=settings.oidc_audience,
        claim=settings.oidc_claim,
        keys=keys,
        now=now,
    )
