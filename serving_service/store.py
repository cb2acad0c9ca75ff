"""All SQL of this service: functions of a connection, handed to `Storage.read` and `Storage.write`.

Each function that changes something checks in the same transaction that the change still makes sense.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import orjson

from servicekit.distribution import Distribution
from servicekit.measures import Key, Measured, UsageKey, Used
from servicekit.storage import Connection
from serving_service import gpus
from serving_service.errors import (
    EndpointExists,
    EndpointNotFound,
    NothingToCancel,
    NotStoppable,
    TooManyEndpoints,
    UpdateInProgress,
)
from serving_service.model import (
    ConfigUpdate,
    Deployment,
    Endpoint,
    EndpointConfig,
    EntityState,
    Minute,
    MinuteOfUse,
    ModelVersion,
    Notice,
    ReplicaRecord,
    Route,
    ServedEntity,
)
from serving_service.phases import LaunchEvent, LaunchPhase, Outcome

log = logging.getLogger(__name__)

MAX_ENDPOINTS = 1_000
MOST_MINUTES = 24 * 60
"""How long it is kept what was measured in each minute."""

MOST_NUMBER = 2**63 - 1
"""Of a column of whole numbers."""

MAX_EVENTS = 500
"""Of one endpoint; a launch has some four."""

_COLUMNS = (
    "id, name, creator_id, creator, description, tags, created_at, updated_at, latest_version, active_version, "
    "pending_version, config_update, failures, is_deleted, creator_kind, ai_gateway, email_notifications, "
    "telemetry_config, budget_policy_id, route_optimized, is_stopped, rate_limits"
)


def reserve_endpoint(connection: Connection, endpoint: Endpoint) -> None:
    """Takes the name of a new endpoint, which nobody sees before it is committed.

    Raises EndpointExists, TooManyEndpoints.
    """
    if connection.execute("SELECT 1 FROM endpoints WHERE name = ? AND NOT is_deleted", (endpoint.name,)).fetchone():
        raise EndpointExists(endpoint.name)
    if connection.execute("SELECT count(*) FROM endpoints WHERE NOT is_deleted").fetchone()[0] >= MAX_ENDPOINTS:
        raise TooManyEndpoints(MAX_ENDPOINTS)
    connection.execute(
        f"INSERT INTO endpoints ({_COLUMNS}, is_reserved)"  # noqa: S608
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, ?, ?, '{}', FALSE, ?, ?, ?, ?, ?, ?, FALSE, ?, TRUE)",
        (
            endpoint.id,
            endpoint.name,
            endpoint.creator_id,
            endpoint.creator,
            endpoint.description,
            _json(endpoint.tags),
            endpoint.created_at,
            endpoint.updated_at,
            endpoint.latest_version,
            endpoint.pending.version if endpoint.pending else None,
            endpoint.config_update,
            endpoint.creator_kind,
            _optional_json(endpoint.ai_gateway),
            _optional_json(endpoint.email_notifications),
            _optional_json(endpoint.telemetry_config),
            endpoint.budget_policy_id,
            endpoint.route_optimized,
            _json(endpoint.rate_limits),
        ),
    )


def commit_endpoint(connection: Connection, endpoint: Endpoint) -> None:
    """Makes a reserved endpoint one that there is, with its pending configuration if it has one."""
    connection.execute("UPDATE endpoints SET is_reserved = FALSE WHERE id = ?", (endpoint.id,))
    if endpoint.pending:
        _add_config(connection, endpoint.id, endpoint.pending)


def release_endpoint(connection: Connection, endpoint_id: str) -> None:
    """Gives the name of a reserved endpoint free."""
    connection.execute("DELETE FROM endpoints WHERE id = ? AND is_reserved", (endpoint_id,))


def reserve_version(connection: Connection, seen: Endpoint, version: int) -> None:
    """Takes the next version of the endpoint that was seen as `seen`.

    Raises UpdateInProgress when it is being updated, or was since: what was checked against `seen` no longer holds.
    """
    changed = connection.execute(
        "UPDATE endpoints SET reserved_version = ? WHERE id = ? AND NOT is_deleted AND latest_version = ?"
        " AND config_update != 'IN_PROGRESS' AND reserved_version IS NULL",
        (version, seen.id, seen.latest_version),
    )
    if not changed.rowcount:
        raise UpdateInProgress(seen.name)


def propose_config(connection: Connection, seen: Endpoint, config: EndpointConfig) -> None:
    """Makes `config`, whose version was reserved, the pending one; raises EndpointNotFound when it is too late."""
    changed = connection.execute(
        "UPDATE endpoints SET latest_version = ?1, pending_version = ?1, reserved_version = NULL, updated_at = ?2,"
        " config_update = 'IN_PROGRESS', failures = '{}' WHERE id = ?3 AND NOT is_deleted AND reserved_version = ?1",
        (config.version, config.created_at, seen.id),
    )
    if not changed.rowcount:
        raise EndpointNotFound(seen.name)
    _add_config(connection, seen.id, config)
    _drop_old_configs(connection, seen.id)


def release_version(connection: Connection, endpoint_id: str, *, is_used: bool) -> None:
    """Gives a reserved version back; `is_used`: it is never to be given again, since Secrets may know it."""
    latest = "reserved_version" if is_used else "latest_version"
    connection.execute(
        f"UPDATE endpoints SET latest_version = {latest}, reserved_version = NULL"  # noqa: S608
        " WHERE id = ? AND reserved_version IS NOT NULL",
        (endpoint_id,),
    )


def clear_reservations(connection: Connection) -> None:
    """Undoes what a predecessor of this process had begun and not committed."""
    connection.execute("DELETE FROM endpoints WHERE is_reserved")
    connection.execute(
        "UPDATE endpoints SET latest_version = reserved_version, reserved_version = NULL"
        " WHERE reserved_version IS NOT NULL"
    )


def activate(connection: Connection, endpoint_id: str, version: int) -> bool:
    """Makes the pending version the active one, which runs; False when it is no longer the pending one."""
    changed = connection.execute(
        "UPDATE endpoints SET active_version = ?, pending_version = NULL, config_update = 'NOT_UPDATING', "
        "is_stopped = FALSE WHERE id = ? AND pending_version = ? AND config_update = 'IN_PROGRESS' AND NOT is_deleted",
        (version, endpoint_id, version),
    )
    _drop_old_configs(connection, endpoint_id)
    return changed.rowcount == 1


def fail_update(connection: Connection, endpoint_id: str, version: int, failures: Mapping[str, EntityState]) -> bool:
    """Records that the pending version could not be deployed, and how each of its entities ended.

    False when it is no longer being deployed.
    """
    changed = connection.execute(
        "UPDATE endpoints SET config_update = 'UPDATE_FAILED', failures = ? "
        "WHERE id = ? AND pending_version = ? AND config_update = 'IN_PROGRESS'",
        (_failures(failures), endpoint_id, version),
    )
    return changed.rowcount == 1


def cancel_update(connection: Connection, canceled: Endpoint) -> None:
    """Records that the update under way was given up, as `canceled` says; raises NothingToCancel when it has ended."""
    assert canceled.pending is not None
    changed = connection.execute(
        "UPDATE endpoints SET config_update = 'UPDATE_CANCELED', failures = ?, updated_at = ? "
        "WHERE id = ? AND pending_version = ? AND config_update = 'IN_PROGRESS' AND NOT is_deleted",
        (_failures(canceled.failures), canceled.updated_at, canceled.id, canceled.pending.version),
    )
    if not changed.rowcount:
        raise NothingToCancel(canceled.name)


def stop_endpoint(connection: Connection, stopped: Endpoint) -> None:
    """Has the active configuration of `stopped` rest, and forgets the pending one.

    Raises NotStoppable during an update.
    """
    assert stopped.active is not None
    changed = connection.execute(
        "UPDATE endpoints SET is_stopped = TRUE, pending_version = NULL, config_update = 'NOT_UPDATING',"
        " failures = '{}', updated_at = ? WHERE id = ? AND active_version = ? AND config_update != 'IN_PROGRESS'"
        " AND reserved_version IS NULL AND NOT is_deleted",
        (stopped.updated_at, stopped.id, stopped.active.version),
    )
    if not changed.rowcount:
        raise NotStoppable(stopped.name, NotStoppable.IS_UPDATING)
    _drop_old_configs(connection, stopped.id)


def save_details(connection: Connection, endpoint: Endpoint) -> None:
    """Records what is said of an endpoint beside its configuration, and when it was."""
    connection.execute(
        "UPDATE endpoints SET tags = ?, ai_gateway = ?, email_notifications = ?, telemetry_config = ?, rate_limits = ?,"
        " updated_at = ? WHERE id = ?",
        (
            _json(endpoint.tags),
            _optional_json(endpoint.ai_gateway),
            _optional_json(endpoint.email_notifications),
            _optional_json(endpoint.telemetry_config),
            _json(endpoint.rate_limits),
            endpoint.updated_at,
            endpoint.id,
        ),
    )


def mark_deleted(connection: Connection, endpoint_id: str) -> bool:
    """Frees the endpoint's name; False when it was deleted before."""
    changed = connection.execute(
        "UPDATE endpoints SET is_deleted = TRUE WHERE id = ? AND NOT is_deleted", (endpoint_id,)
    )
    return changed.rowcount == 1


def purge(connection: Connection, endpoint_id: str) -> None:
    """Removes what is left of a deleted endpoint."""
    connection.execute("DELETE FROM endpoints WHERE id = ? AND is_deleted", (endpoint_id,))


def endpoint_named(connection: Connection, name: str) -> Endpoint | None:
    """The endpoint of that name that is not deleted."""
    return _first(_endpoints(connection, "name = ? AND NOT is_deleted AND NOT is_reserved", name))


def id_of(connection: Connection, name: str) -> str | None:
    """The id of the endpoint of that name that is not deleted."""
    row = connection.execute(
        "SELECT id FROM endpoints WHERE name = ? AND NOT is_deleted AND NOT is_reserved", (name,)
    ).fetchone()
    return row[0] if row else None


def endpoint_with_id(connection: Connection, endpoint_id: str) -> Endpoint | None:
    """The endpoint with that id, deleted or not."""
    return _first(_endpoints(connection, "id = ?", endpoint_id))


def all_ids(connection: Connection) -> list[str]:
    """The ids of all endpoints that are not deleted."""
    rows = connection.execute("SELECT id FROM endpoints WHERE NOT is_deleted AND NOT is_reserved")
    return [row[0] for row in rows]


def endpoints_with_ids(connection: Connection, ids: Collection[str]) -> list[Endpoint]:
    """Those of these endpoints that are not deleted, by name."""
    return list(_endpoints(connection, "id IN (SELECT value FROM json_each(?)) AND NOT is_deleted", _json(ids)))


def all_endpoints(connection: Connection, *, deleted: bool) -> list[Endpoint]:
    """Every endpoint, by name; with `deleted`, those too whose replicas are still to be stopped."""
    return list(_endpoints(connection, "NOT is_reserved AND (NOT is_deleted OR ?)", deleted))


def deployed_by_others(connection: Connection, endpoint_id: str) -> list[EndpointConfig]:
    """What every other endpoint deploys just now, or has active."""
    rows = connection.execute(
        "SELECT version, configs.created_at, content FROM endpoints JOIN configs ON endpoint_id = id AND version ="
        " CASE config_update WHEN 'IN_PROGRESS' THEN pending_version ELSE active_version END"
        " WHERE id != ? AND NOT is_deleted AND NOT is_reserved",
        (endpoint_id,),
    ).fetchall()
    return [_config(version, created_at, orjson.loads(content)) for version, created_at, content in rows]


def add_events(connection: Connection, endpoint_id: str, events: Sequence[LaunchEvent]) -> None:
    """Records phases of launches; of each endpoint the newest are kept."""
    connection.executemany(
        "INSERT INTO events (endpoint_id, replica_id, version, entity, phase, outcome, started_at, duration, message)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                endpoint_id,
                event.replica_id,
                event.version,
                event.entity,
                event.phase,
                event.outcome,
                event.started_at,
                event.duration,
                event.message,
            )
            for event in events
        ],
    )
    connection.execute(
        "DELETE FROM events WHERE endpoint_id = ?1 AND id <="
        " (SELECT id FROM events WHERE endpoint_id = ?1 ORDER BY id DESC LIMIT 1 OFFSET ?2)",
        (endpoint_id, MAX_EVENTS),
    )


def events_of(connection: Connection, endpoint_id: str) -> list[LaunchEvent]:
    """The recorded phases of an endpoint's launches, in the order in which they ended."""
    rows = connection.execute(
        "SELECT replica_id, version, entity, phase, outcome, started_at, duration, message FROM events"
        " WHERE endpoint_id = ? ORDER BY id",
        (endpoint_id,),
    )
    return [
        LaunchEvent(
            replica_id=replica_id,
            version=version,
            entity=entity,
            phase=LaunchPhase(phase),
            outcome=Outcome(outcome),
            started_at=started_at,
            duration=duration,
            message=message,
        )
        for replica_id, version, entity, phase, outcome, started_at, duration, message in rows
    ]


def add_measures(
    connection: Connection,
    minutes: Sequence[Minute],
    usage: Sequence[MinuteOfUse],
    *,
    reports: Mapping[str, int],
    now: int,
    usage_days: int,
) -> frozenset[str]:
    """Adds what was measured to what is recorded of the same minutes, with the numbers of the last `reports` in it.

    What is older than MOST_MINUTES, or `usage_days`, is removed, by `now`, in Unix seconds. Returns the ids of all
    endpoints; of others nothing is recorded, nor what no database can hold: nothing else is to wait for that.
    """
    known = frozenset(row[0] for row in connection.execute("SELECT id FROM endpoints"))
    for minute in minutes:
        if minute.key.endpoint_id in known:
            _add_minute(connection, minute)
    for use in usage:
        if use.key.endpoint_id in known:
            _add_use(connection, use)
    connection.execute("DELETE FROM minutes WHERE minute <= ?", (now // 60 - MOST_MINUTES,))
    connection.execute("DELETE FROM usage WHERE minute <= ?", (now // 60 - usage_days * 24 * 60,))
    connection.executemany(
        "INSERT INTO reports (gateway_id, sequence, stored_at) VALUES (?, ?, ?)"
        " ON CONFLICT (gateway_id) DO UPDATE SET sequence = excluded.sequence, stored_at = excluded.stored_at",
        [(*each, now) for each in reports.items()],
    )
    connection.execute("DELETE FROM reports WHERE stored_at < ?", (now - 60 * MOST_MINUTES,))
    return known


def stored_reports(connection: Connection) -> dict[str, int]:
    """The number of the last report of each gateway that the recorded minutes hold."""
    return dict(connection.execute("SELECT gateway_id, sequence FROM reports").fetchall())


def minutes_of(
    connection: Connection, endpoint_id: str, *, start: int, end: int, after: Sequence[Any], limit: int
) -> list[Minute]:
    """What was measured of an endpoint from the minute `start` on and before `end`, the oldest first, at most `limit`.

    `after` is the place (minute, entity, version) behind which to go on; empty: at the beginning.
    """
    rows = connection.execute(
        "SELECT minute, entity, entity_version, requests, refused, failed, busy_ms, latency, latency_ms, prediction,"
        " prediction_ms, queue, queue_ms, replicas FROM minutes WHERE endpoint_id = ? AND minute >= ? AND minute < ?"
        " AND (minute, entity, entity_version) > (?, ?, ?) ORDER BY minute, entity, entity_version LIMIT ?",
        (endpoint_id, start, end, *(after or (-1, "", "")), limit),
    )
    return [_minute(endpoint_id, *row) for row in rows]


def keep_log(connection: Connection, endpoint_id: str, version: int, entity: str, text: str) -> None:
    """Keeps what a replica that has ended had printed, while there is the configuration that it ran."""
    connection.execute(
        "INSERT INTO last_logs (endpoint_id, version, entity, log)"
        " SELECT endpoint_id, version, ?3, ?4 FROM configs WHERE endpoint_id = ?1 AND version = ?2"
        " ON CONFLICT (endpoint_id, version, entity) DO UPDATE SET log = excluded.log",
        (endpoint_id, version, entity, text),
    )


def last_log(connection: Connection, endpoint_id: str, version: int, entity: str) -> str:
    """What the last replica that has ended had printed; empty when none has."""
    row = connection.execute(
        "SELECT log FROM last_logs WHERE endpoint_id = ? AND version = ? AND entity = ?", (endpoint_id, version, entity)
    ).fetchone()
    return str(row[0]) if row else ""


def to_tell(connection: Connection, endpoint_id: str, event: str) -> list[str]:
    """The addresses to tell of an event of an endpoint (`on_update_failure`, `on_update_success`)."""
    row = connection.execute("SELECT email_notifications FROM endpoints WHERE id = ?", (endpoint_id,)).fetchone()
    said = _optional(row[0]) if row else None
    return list(said.get(event, ())) if said else []


def add_notices(
    connection: Connection, endpoint_id: str, notices: Sequence[Notice], *, most: int, most_of_one: int
) -> bool:
    """Records what is to be told of an endpoint; False, and nothing is recorded, when more than `most` would wait.

    Or more than `most_of_one` of that endpoint.
    """
    waiting, of_one = connection.execute(
        "SELECT count(*), count(*) FILTER (WHERE json_extract(content, '$.endpoint_id') = ?) FROM notices",
        (endpoint_id,),
    ).fetchone()
    if waiting + len(notices) > most or of_one + len(notices) > most_of_one:
        return False
    connection.executemany(
        "INSERT INTO notices (id, courier, recipient, content, created_at, due_at, attempts)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (each.id, each.courier, each.recipient, _json(each.content), each.created_at, each.due_at, each.attempts)
            for each in notices
        ],
    )
    return True


def drop_notices_of_others(connection: Connection, couriers: Collection[str], *, before: int) -> int:
    """Forgets what was noted before then for other couriers than these; returns how many notices that were."""
    return connection.execute(
        "DELETE FROM notices WHERE created_at < ? AND courier NOT IN (SELECT value FROM json_each(?))",
        (before, _json(couriers)),
    ).rowcount


def first_notice(connection: Connection, couriers: Collection[str]) -> Notice | None:
    """The notice of these couriers that is due first, be it in the future."""
    row = connection.execute(
        "SELECT id, courier, recipient, content, created_at, due_at, attempts FROM notices"
        " WHERE courier IN (SELECT value FROM json_each(?)) ORDER BY due_at, rowid LIMIT 1",
        (_json(couriers),),
    ).fetchone()
    if row is None:
        return None
    id_, courier, recipient, content, created_at, due_at, attempts = row
    return Notice(
        id=id_,
        courier=courier,
        recipient=recipient,
        content=orjson.loads(content),
        created_at=created_at,
        due_at=due_at,
        attempts=attempts,
    )


def delay_notice(connection: Connection, notice_id: str, due_at: int, *, whole_courier: bool = False) -> None:
    """Records an attempt that failed, and when the next one is; `whole_courier`: none of its others is made before."""
    connection.execute("UPDATE notices SET attempts = attempts + 1, due_at = ? WHERE id = ?", (due_at, notice_id))
    if whole_courier:
        connection.execute(
            "UPDATE notices SET due_at = ?1 WHERE due_at < ?1"
            " AND courier = (SELECT courier FROM notices WHERE id = ?2)",
            (due_at, notice_id),
        )


def remove_notice(connection: Connection, notice_id: str) -> None:
    """Forgets a notice that was delivered or dropped."""
    connection.execute("DELETE FROM notices WHERE id = ?", (notice_id,))


def usage_of(
    connection: Connection, endpoint_id: str, *, start: int, end: int, after: Sequence[Any], limit: int
) -> list[MinuteOfUse]:
    """Who used an endpoint, as `minutes_of`; a place is (minute, entity, principal id)."""
    rows = connection.execute(
        "SELECT minute, entity, principal_id, requester, requests, refused, failed, input_tokens, output_tokens"
        " FROM usage WHERE endpoint_id = ? AND minute >= ? AND minute < ?"
        " AND (minute, entity, principal_id) > (?, ?, ?) ORDER BY minute, entity, principal_id LIMIT ?",
        (endpoint_id, start, end, *(after or (-1, "", "")), limit),
    )
    return [
        MinuteOfUse(UsageKey(endpoint_id, entity, principal_id, requester), minute, _used(*counts))
        for minute, entity, principal_id, requester, *counts in rows
    ]


def keep_build_log(connection: Connection, endpoint_id: str, version: int, entity: str, log: str) -> None:
    """Records how the environment of an entity came about; nothing for a configuration that is not known any more."""
    connection.execute(
        "INSERT INTO build_logs (endpoint_id, version, entity, log)"
        " SELECT endpoint_id, version, ?, ? FROM configs WHERE endpoint_id = ? AND version = ?"
        " ON CONFLICT (endpoint_id, version, entity) DO UPDATE SET log = excluded.log",
        (entity, log, endpoint_id, version),
    )


def build_log(connection: Connection, endpoint_id: str, version: int, entity: str) -> str:
    """How the environment of an entity came about; empty when nothing is recorded."""
    row = connection.execute(
        "SELECT log FROM build_logs WHERE endpoint_id = ? AND version = ? AND entity = ?",
        (endpoint_id, version, entity),
    ).fetchone()
    return str(row[0]) if row else ""


def add_use(connection: Connection, replica_id: str, folder: str) -> None:
    """Records that a replica uses a cached folder, until the replica is removed."""
    connection.execute(
        "INSERT INTO uses (replica_id, folder) SELECT id, ? FROM replicas WHERE id = ? ON CONFLICT DO NOTHING",
        (folder, replica_id),
    )


def used_folders(connection: Connection) -> frozenset[str]:
    """The cached folders that replicas use."""
    return frozenset(row[0] for row in connection.execute("SELECT DISTINCT folder FROM uses"))


def first_digest(connection: Connection, model: ModelVersion) -> str | None:
    """What the files of a model version were when they were first fetched; None when they never were."""
    row = connection.execute(
        "SELECT digest FROM fetched WHERE name = ? AND version = ? AND source = ? AND created_at = ?",
        (model.name, model.version, model.source, model.created_at),
    ).fetchone()
    return str(row[0]) if row else None


def keep_first_digest(connection: Connection, model: ModelVersion, digest: str) -> str:
    """Records what the files of a model version are, unless that was done before; returns what is recorded."""
    connection.execute(
        "INSERT INTO fetched (name, version, source, created_at, digest) VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (model.name, model.version, model.source, model.created_at, digest),
    )
    return first_digest(connection, model) or digest


def take_gpus(
    connection: Connection, replica_id: str, endpoint_id: str, *, devices: Sequence[str], count: int
) -> tuple[tuple[str, ...] | None, int]:
    """Records so many of the devices as a replica's, and returns them; None when too few are free.

    And how many the replicas of its endpoint had before.
    """
    rows = connection.execute("SELECT uuid, endpoint_id FROM gpus JOIN replicas ON replicas.id = replica_id").fetchall()
    own = sum(owner == endpoint_id for _, owner in rows)
    found = gpus.chosen(devices, {uuid for uuid, _ in rows}, count)
    connection.executemany(
        "INSERT INTO gpus (uuid, replica_id) VALUES (?, ?)", [(uuid, replica_id) for uuid in found or ()]
    )
    return found, own


def give_gpus_back(connection: Connection, replica_id: str) -> None:
    """Records that a replica has no GPUs any more."""
    connection.execute("DELETE FROM gpus WHERE replica_id = ?", (replica_id,))


def gpu_holders(connection: Connection) -> dict[str, tuple[str, ...]]:
    """The GPUs of each replica that has any."""
    found: dict[str, tuple[str, ...]] = {}
    for uuid, replica_id in connection.execute("SELECT uuid, replica_id FROM gpus ORDER BY uuid"):
        found[replica_id] = (*found.get(replica_id, ()), uuid)
    return found


def next_epoch(connection: Connection) -> int:
    """A number that is higher than every one before."""
    return int(connection.execute("UPDATE epochs SET epoch = epoch + 1 RETURNING epoch").fetchone()[0])


def begin_anew(connection: Connection, epoch: int) -> None:
    """Makes a restored database one of a service that has no replicas yet, and a higher epoch than ever before."""
    connection.execute("DELETE FROM replicas")
    connection.execute("UPDATE epochs SET epoch = ?1 WHERE epoch < ?1", (epoch,))


def user_of(connection: Connection, endpoint_id: str, users: range, busy: Collection[int]) -> int | None:
    """The user of an endpoint's models: the one it has, or else the first that is nobody's and not `busy`, now its own.

    None when there is no such user. One that it has is kept, unless `users` has changed and does not hold it any more.
    """
    taken = dict(connection.execute("SELECT endpoint_id, uid FROM users").fetchall())
    if taken.get(endpoint_id) in users:
        return int(taken[endpoint_id])
    unusable = {*taken.values(), *busy}
    free = next((uid for uid in users if uid not in unusable), None)
    if free is not None:
        connection.execute(
            "INSERT INTO users (uid, endpoint_id) VALUES (?, ?)"
            " ON CONFLICT (endpoint_id) DO UPDATE SET uid = excluded.uid",
            (free, endpoint_id),
        )
    return free


def add_replica(connection: Connection, replica: ReplicaRecord) -> None:
    """Records that a replica is about to be started."""
    connection.execute(
        "INSERT INTO replicas (id, endpoint_id, version, entity) VALUES (?, ?, ?, ?)",
        (replica.id, replica.endpoint_id, replica.version, replica.entity),
    )


def remove_replica(connection: Connection, replica_id: str) -> None:
    """Records that nothing is left of a replica, which uses nothing any more."""
    connection.execute("DELETE FROM replicas WHERE id = ?", (replica_id,))


def all_replicas(connection: Connection) -> list[ReplicaRecord]:
    """Every recorded replica, the oldest first."""
    rows = connection.execute("SELECT id, endpoint_id, version, entity FROM replicas ORDER BY rowid")
    return [ReplicaRecord(*row) for row in rows]


def _endpoints(connection: Connection, condition: str, argument: Any) -> Iterable[Endpoint]:
    # The statement is made of constants of this module only; what callers say is bound.
    query = f"SELECT {_COLUMNS} FROM endpoints WHERE {condition} ORDER BY name"  # noqa: S608
    for row in connection.execute(query, (argument,)).fetchall():
        (id_, name, creator_id, creator, description, tags, created_at, updated_at) = row[:8]
        (latest, active, pending, config_update, failures, is_deleted, creator_kind) = row[8:15]
        (ai_gateway, email_notifications, telemetry_config, budget_policy_id, route_optimized) = row[15:20]
        (is_stopped, rate_limits) = row[20:]
        configs = _configs(connection, id_)
        yield Endpoint(
            id=id_,
            name=name,
            creator_id=creator_id,
            creator=creator,
            creator_kind=creator_kind,
            description=description,
            tags=tuple((key, value) for key, value in orjson.loads(tags)),
            created_at=created_at,
            updated_at=updated_at,
            latest_version=latest,
            active=configs.get(active),
            pending=configs.get(pending),
            config_update=ConfigUpdate(config_update),
            failures={
                entity: EntityState(Deployment(deployment), message)
                for entity, (deployment, message) in orjson.loads(failures).items()
            },
            is_deleted=bool(is_deleted),
            ai_gateway=_optional(ai_gateway),
            email_notifications=_optional(email_notifications),
            telemetry_config=_optional(telemetry_config),
            rate_limits=tuple(orjson.loads(rate_limits)),
            budget_policy_id=budget_policy_id,
            route_optimized=bool(route_optimized),
            is_stopped=bool(is_stopped),
        )


def _configs(connection: Connection, endpoint_id: str) -> dict[int | None, EndpointConfig]:
    rows = connection.execute(
        "SELECT version, created_at, content FROM configs WHERE endpoint_id = ?", (endpoint_id,)
    ).fetchall()
    return {version: _config(version, created_at, orjson.loads(content)) for version, created_at, content in rows}


def _config(version: int, created_at: int, content: dict[str, Any]) -> EndpointConfig:
    return EndpointConfig(
        version=version,
        created_at=created_at,
        entities=tuple(
            ServedEntity(**{**entity, "model": ModelVersion(**entity["model"])}) for entity in content["entities"]
        ),
        routes=tuple(Route(**route) for route in content["routes"]),
        auto_capture=content.get("auto_capture"),
    )


def _add_config(connection: Connection, endpoint_id: str, config: EndpointConfig) -> None:
    content = {"entities": config.entities, "routes": config.routes, "auto_capture": config.auto_capture}
    connection.execute(
        "INSERT INTO configs (endpoint_id, version, created_at, content) VALUES (?, ?, ?, ?)",
        (endpoint_id, config.version, config.created_at, _json(content)),
    )


def _drop_old_configs(connection: Connection, endpoint_id: str) -> None:
    connection.execute(
        "DELETE FROM configs WHERE endpoint_id = ?1 AND version NOT IN "
        "(SELECT coalesce(active_version, 0) FROM endpoints WHERE id = ?1 UNION ALL "
        "SELECT coalesce(pending_version, 0) FROM endpoints WHERE id = ?1)",
        (endpoint_id,),
    )
    connection.execute(
        "DELETE FROM build_logs WHERE endpoint_id = ?1 AND version NOT IN "
        "(SELECT version FROM configs WHERE endpoint_id = ?1)",
        (endpoint_id,),
    )


def _failures(states: Mapping[str, EntityState]) -> str:
    return _json({name: [state.deployment, state.message] for name, state in states.items()})


def _fits(endpoint_id: str, *numbers: float) -> bool:
    """Whether a database can hold numbers; those that it cannot are dropped."""
    fits = all(math.isfinite(each) and abs(each) <= MOST_NUMBER for each in numbers)
    if not fits:
        log.error("a measure cannot be stored and is dropped", extra={"endpoint": endpoint_id})
    return fits


def _add_minute(connection: Connection, minute: Minute) -> None:
    key = (minute.key.endpoint_id, minute.minute, minute.key.entity, minute.key.entity_version)
    row = connection.execute(
        "SELECT minute, entity, entity_version, requests, refused, failed, busy_ms, latency, latency_ms, prediction,"
        " prediction_ms, queue, queue_ms, replicas FROM minutes WHERE endpoint_id = ? AND minute = ? AND entity = ?"
        " AND entity_version = ?",
        key,
    ).fetchone()
    measured = minute.measured
    if row is not None:
        measured = Measured()
        measured.merge(_minute(key[0], *row).measured)
        measured.merge(minute.measured)
    counts = (measured.requests, measured.refused, measured.failed, minute.replicas)
    times = (measured.busy, measured.latency.sum, measured.prediction.sum, measured.queue.sum)
    if not _fits(key[0], *counts, *times):
        return
    connection.execute(
        "INSERT INTO minutes (endpoint_id, minute, entity, entity_version, requests, refused, failed,"
        " busy_ms, latency, latency_ms, prediction, prediction_ms, queue, queue_ms, replicas)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (endpoint_id, minute, entity, entity_version) DO UPDATE SET requests = excluded.requests,"
        " refused = excluded.refused, failed = excluded.failed, busy_ms = excluded.busy_ms, latency = excluded.latency,"
        " latency_ms = excluded.latency_ms, prediction = excluded.prediction, prediction_ms = excluded.prediction_ms,"
        " queue = excluded.queue, queue_ms = excluded.queue_ms, replicas = excluded.replicas",
        (
            *key,
            measured.requests,
            measured.refused,
            measured.failed,
            measured.busy,
            *_distribution_row(measured.latency),
            *_distribution_row(measured.prediction),
            *_distribution_row(measured.queue),
            minute.replicas,
        ),
    )


def _add_use(connection: Connection, use: MinuteOfUse) -> None:
    key = (use.key.endpoint_id, use.minute, use.key.entity, use.key.principal_id)
    row = connection.execute(
        "SELECT requests, refused, failed, input_tokens, output_tokens FROM usage"
        " WHERE endpoint_id = ? AND minute = ? AND entity = ? AND principal_id = ?",
        key,
    ).fetchone()
    used = _used(*(row or (0, 0, 0, 0, 0)))
    used.merge(use.used)
    counts = (used.requests, used.refused, used.failed, used.input_tokens, used.output_tokens)
    if not _fits(key[0], *counts):
        return
    connection.execute(
        "INSERT INTO usage (endpoint_id, minute, entity, principal_id, requester, requests, refused, failed,"
        " input_tokens, output_tokens) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (endpoint_id, minute, entity, principal_id) DO UPDATE SET requester = excluded.requester,"
        " requests = excluded.requests, refused = excluded.refused, failed = excluded.failed,"
        " input_tokens = excluded.input_tokens, output_tokens = excluded.output_tokens",
        (*key, use.key.requester, *counts),
    )


def _used(requests: int, refused: int, failed: int, input_tokens: int, output_tokens: int) -> Used:
    used = Used()
    used.requests, used.refused, used.failed = requests, refused, failed
    used.input_tokens, used.output_tokens = input_tokens, output_tokens
    return used


def _minute(
    endpoint_id: str,
    minute: int,
    entity: str,
    entity_version: str,
    requests: int,
    refused: int,
    failed: int,
    busy: float,
    latency: str,
    latency_ms: float,
    prediction: str,
    prediction_ms: float,
    queue: str,
    queue_ms: float,
    replicas: int,
) -> Minute:
    measured = Measured()
    measured.requests, measured.refused, measured.failed, measured.busy = requests, refused, failed, busy
    measured.latency = _distribution(latency, latency_ms)
    measured.prediction = _distribution(prediction, prediction_ms)
    measured.queue = _distribution(queue, queue_ms)
    return Minute(Key(endpoint_id, entity, entity_version), minute, measured, replicas)


def _distribution_row(distribution: Distribution) -> tuple[str, float]:
    return _json([(place, count) for place, count in enumerate(distribution.counts) if count]), distribution.sum


def _distribution(counts: str, sum_ms: float) -> Distribution:
    found = Distribution(sum=sum_ms)
    for place, count in orjson.loads(counts):
        found.counts[place] = count
    return found


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()


def _optional_json(value: Any) -> str | None:
    return None if value is None else _json(value)


def _optional(text: str | None) -> Any:
    return None if text is None else orjson.loads(text)


def _first(endpoints: Iterable[Endpoint]) -> Endpoint | None:
    return next(iter(endpoints), None)
