"""A configuration as callers give it, read into one of ours. The rule: whatever leaves here can be deployed.

What is wrong is refused with the path of the field and what to write instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from servicekit.errors import InvalidParameter
from serving_service import details, environment, gpus
from serving_service.gpus import Machine
from serving_service.model import EndpointConfig, ModelVersion, Route, ServedEntity
from serving_service.scaling import REPLICA_CONCURRENCY, WORKLOAD_SIZES
from tessera.serving.v1 import serving_pb2 as pb

MAX_ENTITIES = 10
MAX_CONFIG_BYTES = 256 * 1024
CPU_TYPES = (pb.CPU, pb.CPU_MEDIUM, pb.CPU_LARGE)

_NOT_OFFERED = (
    "external_model",
    "min_provisioned_throughput",
    "max_provisioned_throughput",
    "provisioned_model_units",
    "burst_scaling_enabled",
)

_ENDPOINT_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}")
_ENTITY_NAME = re.compile(r"[A-Za-z0-9_-]{1,255}")
_RESERVED_PREFIX = "databricks-"


def check_create(request: pb.CreateServingEndpointRequest) -> None:
    """Checks the name of a new endpoint and the size of the request; raises InvalidParameter."""
    if not _ENDPOINT_NAME.fullmatch(request.name):
        raise InvalidParameter("name: use 1 to 63 letters, digits, '-' or '_'.")
    if request.name.startswith(_RESERVED_PREFIX):
        raise InvalidParameter(f"name: names that start with '{_RESERVED_PREFIX}' are reserved. Choose another name.")
    _check_size(request.ByteSize())


def read_config(
    message: pb.EndpointCoreConfigInput, *, at: str, version: int, author: str, now: int, machine: Machine
) -> EndpointConfig:
    """The configuration that `message` describes, with defaults filled in; its models are not looked up yet.

    `at` is the path of the configuration in the request, `now` Unix milliseconds, `machine` where models run. Raises
    InvalidParameter or FeatureDisabled.
    """
    prefix = f"{at}." if at else ""
    _check_size(message.ByteSize())
    capture = None
    if message.HasField("auto_capture_config"):
        capture = details.read_auto_capture(message.auto_capture_config, at=f"{prefix}auto_capture_config")
    if not 1 <= len(message.served_entities) <= MAX_ENTITIES:
        raise InvalidParameter(f"{prefix}served_entities: give 1 to {MAX_ENTITIES} served entities.")
    entities = tuple(
        _read_entity(entity, at=f"{prefix}served_entities[{index}]", author=author, now=now, machine=machine)
        for index, entity in enumerate(message.served_entities)
    )
    names = [entity.name for entity in entities]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidParameter(
                f"{prefix}served_entities[{index}].name: '{name}' is used twice. Give each served entity its own name."
            )
    routes = _read_routes(message.traffic_config.routes, names, at=f"{prefix}traffic_config.routes")
    return EndpointConfig(version=version, created_at=now, entities=entities, routes=routes, auto_capture=capture)


def _read_entity(message: pb.ServedEntityInput, *, at: str, author: str, now: int, machine: Machine) -> ServedEntity:
    given = {field.name for field, _ in message.ListFields()}  # a flag that is false is not among them
    details.refuse(next((field for field in _NOT_OFFERED if field in given), None), at=at)
    for field in ("entity_name", "entity_version"):
        if not getattr(message, field).strip():
            raise InvalidParameter(f"{at}.{field}: name the registered model and its version.")
    environment.check_declared(message.environment_vars, f"{at}.environment_vars")
    _check_gpus(message, at, machine)
    _check_type(message.workload_type, at, machine)
    _check_workload(message, at)
    has_concurrency = message.HasField("min_provisioned_concurrency") or message.HasField("max_provisioned_concurrency")
    return ServedEntity(
        name=_entity_name(message, at),
        model=ModelVersion(name=message.entity_name, version=message.entity_version, source="", created_at=0),
        environment=dict(message.environment_vars),
        instance_profile_arn=message.instance_profile_arn,
        workload_size=message.workload_size or ("" if has_concurrency else "Small"),
        workload_type=pb.WorkloadType.Name(message.workload_type or pb.CPU),
        scale_to_zero=message.scale_to_zero_enabled,
        min_concurrency=_optional(message, "min_provisioned_concurrency"),
        max_concurrency=_optional(message, "max_provisioned_concurrency"),
        creator=author,
        created_at=now,
    )


def _entity_name(message: pb.ServedEntityInput, at: str) -> str:
    if message.name:
        if not _ENTITY_NAME.fullmatch(message.name):
            raise InvalidParameter(f"{at}.name: use 1 to 255 letters, digits, '-' or '_'.")
        return message.name
    default = f"{message.entity_name.rpartition('.')[2]}-{message.entity_version}"
    if not _ENTITY_NAME.fullmatch(default):
        raise InvalidParameter(
            f"{at}.name: none can be made from the model's name. Give one of letters, digits, '-' or '_'."
        )
    return default


def _check_gpus(message: pb.ServedEntityInput, at: str, machine: Machine) -> None:
    if machine.has_driver and gpus.VISIBLE in message.environment_vars:
        raise InvalidParameter(
            f"{at}.environment_vars: {gpus.VISIBLE} belongs to the platform, which gives each replica the GPUs of its"
            " workload_type. Leave it out."
        )


def _check_type(workload_type: pb.WorkloadType.ValueType, at: str, machine: Machine) -> None:
    names = {number: name for name, number in pb.WorkloadType.items()}
    there = len(machine.devices)
    offered = [kind for kind in names if kind in CPU_TYPES or 0 < gpus.needed(names[kind]) <= there]
    if workload_type in (*offered, pb.WORKLOAD_TYPE_UNSPECIFIED):
        return
    problem = "this kind of machine is not offered here"
    if there and workload_type in names:
        kind = names[workload_type]
        problem = f"a replica of {kind} takes {gpus.needed(kind)} GPUs, and this machine has {there}"
    raise InvalidParameter(f"{at}.workload_type: {problem}. Use one of {', '.join(names[each] for each in offered)}.")


def _check_workload(message: pb.ServedEntityInput, at: str) -> None:
    if message.workload_size and message.workload_size not in WORKLOAD_SIZES:
        raise InvalidParameter(f"{at}.workload_size: use one of {', '.join(WORKLOAD_SIZES)}.")
    bounds = {
        name: getattr(message, name)
        for name in ("min_provisioned_concurrency", "max_provisioned_concurrency")
        if message.HasField(name)
    }
    if bounds and message.workload_size:
        raise InvalidParameter(f"{at}.workload_size: give it or provisioned concurrency, not both.")
    for name, value in bounds.items():
        if value < 0 or value % REPLICA_CONCURRENCY:
            raise InvalidParameter(f"{at}.{name}: use a multiple of {REPLICA_CONCURRENCY}.")
    if len(bounds) == 2 and bounds["max_provisioned_concurrency"] < bounds["min_provisioned_concurrency"]:
        raise InvalidParameter(f"{at}.max_provisioned_concurrency: it may not be below the minimum.")
    if bounds.get("max_provisioned_concurrency") == 0:
        raise InvalidParameter(f"{at}.max_provisioned_concurrency: use at least {REPLICA_CONCURRENCY}.")


def _read_routes(routes: Sequence[pb.RouteInput], names: list[str], *, at: str) -> tuple[Route, ...]:
    if not routes:
        if len(names) > 1:
            raise InvalidParameter(f"{at}: with several served entities, give each a route with its percentage.")
        return (Route(names[0], 100),)
    routed: list[Route] = []
    for index, route in enumerate(routes):
        name = route.served_entity_name
        if name not in names:
            known = ", ".join(f"'{each}'" for each in names)
            raise InvalidParameter(f"{at}[{index}].served_entity_name: name one of the served entities: {known}.")
        if any(name == other.entity for other in routed):
            raise InvalidParameter(f"{at}[{index}].served_entity_name: '{name}' has a route already.")
        if not route.HasField("traffic_percentage") or not 0 <= route.traffic_percentage <= 100:
            raise InvalidParameter(f"{at}[{index}].traffic_percentage: give a whole number from 0 to 100.")
        routed.append(Route(name, route.traffic_percentage))
    if missing := [name for name in names if name not in {route.entity for route in routed}]:
        raise InvalidParameter(f"{at}: served entity '{missing[0]}' has no route. Give it one, maybe of 0 percent.")
    if (total := sum(route.percentage for route in routed)) != 100:
        raise InvalidParameter(f"{at}: the percentages add up to {total}. They must add up to 100.")
    return tuple(routed)


def _optional(message: pb.ServedEntityInput, field: str) -> int | None:
    return getattr(message, field) if message.HasField(field) else None  # type: ignore[arg-type]


def _check_size(size: int) -> None:
    if size > MAX_CONFIG_BYTES:
        raise InvalidParameter(f"config: it has {size} bytes, more than the limit of {MAX_CONFIG_BYTES}. Shorten it.")
