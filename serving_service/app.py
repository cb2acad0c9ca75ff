"""The whole service on one page: what there is, and what is handed to whom."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

from servicekit import audit, channels, database, grpc_server, peers, relay, sockets, tls
from servicekit.access import AccessTable
from servicekit.audit import Trail
from servicekit.audit_export import Exporter
from servicekit.audit_servicer import AuditLogServicer
from servicekit.audit_tail import AuditTail
from servicekit.backups import BackupsServicer
from servicekit.failed_logins import FailedLogins
from servicekit.grpc_server import CallLimits, Listener
from servicekit.http_client import HttpPool
from servicekit.identity import TokenExchange, by_assertion, by_token
from servicekit.measures import Measures
from servicekit.metrics import ServiceMetrics, listening
from servicekit.once import Answers, Unsealed
from servicekit.rate_limits import Ledger
from servicekit.relay import Way
from serving_service import audit_key, cgroups, couriers, nvidia_smi, store
from serving_service.audit_readers import require_admin
from serving_service.backups import ServingBackups
from serving_service.build_logs import BuildLogs
from serving_service.caches import FolderCache
from serving_service.consumption import Consumption
from serving_service.controller import Doors
from serving_service.controllers import Controllers
from serving_service.endpoints import Endpoints
from serving_service.environment import SecretReferences
from serving_service.followers import Followers
from serving_service.gpu_loads import GpuLoads
from serving_service.gpu_pool import GpuPool
from serving_service.helper_variables import HelperVariables
from serving_service.isolation import Isolation, ModelUsers, probed
from serving_service.launch_metrics import LaunchMetrics
from serving_service.launcher import Launcher, LocalLauncher, model_environment, replica_socket
from serving_service.launches import Launches
from serving_service.meters import Meters
from serving_service.model_environments import ModelEnvironments, Places
from serving_service.monitoring import Monitoring
from serving_service.notices import Outbox
from serving_service.probes import Probes
from serving_service.query import Queries
from serving_service.quotas import EndpointChanges
from serving_service.registry import MODEL_FOLDER, MlflowRegistry, Registry
from serving_service.routes import RouteTable
from serving_service.scaling import Patience
from serving_service.servicer import MeteringServicer, RoutesServicer, ServingEndpointsServicer
from serving_service.settings import ServingSettings, own_environment
from serving_service.settlement import Settlement
from serving_service.slots import LaunchSlots
from serving_service.template import Template
from tessera.backups.v1 import backups_pb2
from tessera.policy import POLICY
from tessera.serving.v1 import serving_pb2 as pb

log = logging.getLogger(__name__)

MIGRATIONS = files("serving_service") / "migrations"

MESSAGE_LIMIT = 17 << 20
"""Bytes of one message: the body of a query, and room for what is around it."""

PEERS = ("gateway", "operator")
"""Who may call over a socket of its own; the operator is the person who runs this machine."""

LONGEST_FOLLOWED = 6 * 3600.0
"""Seconds for which a log can be followed after its connection takes no new calls: nothing else takes as long."""

ISOLATION_FILE = "isolation.txt"
"""Beside the database: what isolates models here, for whoever starts the platform."""


@dataclass(frozen=True)
class Running:
    """The service while it runs."""

    address: str
    """`host:port` of the public listener, with the port that the system chose."""

    peer_address: str
    """That of the one for gateways on other machines; empty when there is none."""


@asynccontextmanager
async def running(
    settings: ServingSettings, *, launcher: Launcher | None = None, registry: Registry | None = None
) -> AsyncIterator[Running]:
    """The whole service: entering opens it, leaving drains and closes it.

    `launcher` and `registry` take the place of the real ones in tests. Raises StartError.
    """
    directory = settings.sockets
    data = settings.data_dir / "serving"
    async with AsyncExitStack() as stack:
        opened = await stack.enter_async_context(database.opened(data / "serving.db", MIGRATIONS))
        await opened.write(store.clear_reservations)
        certificate = await stack.enter_async_context(peers.followed(settings, "serving"))
        if certificate is not None and settings.secrets_address:
            way = Way(settings.secrets_address, "secrets", certificate)
            path = sockets.socket_path(directory, callee="secrets", caller="serving")
            await stack.enter_async_context(way.leading_from(path))
        secrets = await stack.enter_async_context(
            channels.opened(sockets.socket_address(directory, callee="secrets", caller="serving"))
        )
        trail = Trail("serving", opened, key=None)
        sink = settings.audit_sink("serving")
        exporter = Exporter(trail, opened, sink, settings.audit_forwarder("serving"))
        await exporter.compare()
        stack.push_async_callback(exporter.finish)
        await stack.enter_async_context(audit.opened(trail))
        pool = HttpPool()
        stack.push_async_callback(pool.close)
        exchange = TokenExchange(secrets, stale_seconds=settings.stale_identity_seconds)
        access = AccessTable(forget=exchange.forget, stale_seconds=settings.stale_identity_seconds)
        settlement = Settlement(secrets, opened)
        references = SecretReferences(secrets, settlement)
        variables = HelperVariables(settings.registry_env_file, service_environment=own_environment())
        used = partial(opened.read, store.used_folders)
        models = FolderCache(data / "models", content=MODEL_FOLDER, bound=settings.model_cache << 20, used=used)
        registry = registry or MlflowRegistry(
            settings.registry_uri, models, variables, opened, closed=settings.own_folders
        )
        places = Places.below(data)
        environments = ModelEnvironments(places, variables, bound=settings.environment_cache << 20, used=used)
        build_logs = BuildLogs(opened)
        smi = nvidia_smi.program(own_environment().get("PATH"))
        gpus = GpuPool(opened, await nvidia_smi.machine(smi, settings.gpus))
        isolation, template = Isolation(), None
        if launcher is None:
            if settings.warm_start:
                template = Template(
                    model_environment(
                        {},
                        directory=directory / "template",
                        service=own_environment(),
                        gpus=() if gpus.machine.has_driver else None,
                    )
                )
            groups = await asyncio.to_thread(cgroups.found, settings.limits)
            launcher = LocalLauncher(
                directory / "replicas",
                settings.supervisor_lock,
                service_environment=own_environment(),
                epoch=await opened.write(store.next_epoch),
                cgroups=groups,
                template=template,
            )
            isolation = await probed(
                launcher, groups, settings.model_users, is_required=settings.isolation == "required"
            )
            (data / ISOLATION_FILE).write_text(f"{isolation.summary}\n")
        users = ModelUsers(opened, isolation.users) if isolation.users else None
        ledger = Ledger()
        outbox = Outbox(opened, *couriers.configured(settings))
        await outbox.clear()
        metrics = ServiceMetrics()
        routes = RouteTable(ledger, ack_seconds=settings.route_ack_seconds, queue_length=settings.queue_length)
        controllers = Controllers(
            Doors(
                database=opened,
                launcher=launcher,
                launches=Launches(
                    opened,
                    registry,
                    environments,
                    build_logs,
                    references,
                    settlement,
                    users,
                    gpus,
                    refusal=isolation.refusal,
                    download_deadline=settings.download_deadline,
                    build_deadline=settings.build_deadline,
                    reference_deadline=settings.reference_deadline,
                ),
                probes=Probes(pool, patience=settings.liveness_deadline),
                notice=isolation.notice,
                routes=routes,
                launched=LaunchMetrics(metrics.registry),
                outbox=outbox,
                inference_deadline=settings.inference_deadline,
                deploy_deadline=settings.deploy_deadline,
                patience=Patience(quiet=settings.quiet_seconds, idle=settings.idle_seconds),
                slots=LaunchSlots(settings.parallel_launches),
                gpus=gpus,
                load_deadline=settings.load_deadline,
            )
        )
        own_measures = Measures()
        meters = Meters(opened, own_measures, lambda key: len(controllers.ready(key)), usage_days=settings.usage_days)
        await meters.load()
        consumption = Consumption(
            controllers.processes,
            memory_limit=settings.limits.memory,
            gpus=GpuLoads(smi, gpus) if smi and gpus.machine.devices else None,
        )
        followers = Followers()
        endpoints = Endpoints(
            opened,
            registry,
            references,
            controllers,
            build_logs,
            followers,
            access=access,
            settlement=settlement,
            answers=Answers(Unsealed(), time.time, trail),
            monitoring=Monitoring(opened, meters, consumption, controllers),
            public_url=settings.public_url,
            can_notify=outbox.is_open,
            machine=gpus.machine,
            often=EndpointChanges(settings.endpoint_changes),
        )
        queries = Queries(
            routes,
            access,
            pool,
            ledger,
            own_measures,
            deadline=settings.inference_deadline,
            queue_seconds=settings.queue_seconds,
        )
        backups = ServingBackups(opened, exporter, settlement, registry=settings.embedded_registry, locks=places.locks)
        entrance = ""
        if certificate is not None and settings.peer_listen:
            doors = partial(_behind, directory)
            entrance = await stack.enter_async_context(relay.admitting(settings.peer_listen, certificate, doors))
        services = pb.DESCRIPTOR.services_by_name
        addresses = await stack.enter_async_context(
            grpc_server.serving(
                [
                    Listener(
                        address=settings.listen,
                        identify=by_token(exchange),
                        certificate=await stack.enter_async_context(tls.followed(settings)),
                        trusted_proxies=settings.trusted_proxies,
                        failed_logins=FailedLogins(settings.failed_logins),
                        reflection=settings.has_reflection,
                    ),
                    *(
                        Listener(
                            address=sockets.socket_address(directory, callee="serving", caller=peer),
                            identify=by_assertion(exchange.verifier),
                            peer=peer,
                        )
                        for peer in PEERS
                    ),
                ],
                services=[
                    (services["ServingEndpoints"], ServingEndpointsServicer(endpoints, queries)),
                    (services["Routes"], RoutesServicer(routes)),
                    (services["Metering"], MeteringServicer(meters)),
                    (
                        backups_pb2.DESCRIPTOR.services_by_name["Backups"],
                        BackupsServicer(data / "copies", backups.taken),
                    ),
                    (services["ServingAuditLog"], AuditLogServicer(AuditTail(opened, sink), require_admin)),
                ],
                table=POLICY,
                readiness={"database": opened.ping},
                # Who is followed comes last: streams end with these jobs, and would hold the service up otherwise.
                jobs={
                    "audit": trail.run,
                    "audit key": partial(audit_key.follow, trail, secrets),
                    "audit export": exporter.run,
                    "registry": registry.run,
                    "environments": environments.run,
                    "controllers": controllers.run,
                    "access": partial(access.follow, secrets),
                    "settlement": settlement.run,
                    "meters": meters.run,
                    "consumption": consumption.run,
                    **({"template": template.run} if template else {}),
                    "notices": outbox.run,
                    "loads": routes.loads.run,
                    "routes": routes.run,
                    "followers": followers.run,
                },
                message_limit=MESSAGE_LIMIT,
                limits=CallLimits(calls=settings.calls, changes=settings.changes, longest=LONGEST_FOLLOWED),
                drain_seconds=settings.drain_seconds,
                metrics=metrics,
                trail=trail,
            )
        )
        trail.watched_by(metrics)
        metrics.watch("tessera_endpoints", "Endpoints that there are.", controllers.count)
        metrics.watch("tessera_replicas", "Replicas by their state.", controllers.replicas, "state")
        metrics.watch("tessera_gateways", "Gateways that follow the routes.", routes.gateways)
        await stack.enter_async_context(listening(settings.metrics_listen, metrics))
        yield Running(addresses[0], entrance)


def _behind(directory: Path, caller: str, door: str) -> str | None:
    """The socket that a peer on another machine gets to: a gateway to the RPCs, and to replicas by their ids."""
    if caller != "gateway":
        return None
    if door == relay.RPC:
        return sockets.socket_path(directory, callee="serving", caller=caller)
    replica = door.removeprefix(relay.REPLICA)
    if door == relay.REPLICA + replica and re.fullmatch("[0-9a-f]{32}", replica):
        return str(replica_socket(directory / "replicas" / replica))
    return None
