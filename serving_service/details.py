"""What callers say about an endpoint beside its configuration: read, checked, kept as it was said, and shown again.

The rule: whatever is switched on is honoured or refused by its name, and never kept in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import orjson
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message

from servicekit.errors import FeatureDisabled, InvalidParameter
from servicekit.rate_limits import MEASURES, Limits, folded
from serving_service.model import Endpoint, EndpointConfig
from tessera.serving.v1 import serving_pb2 as pb

M = TypeVar("M", bound=Message)
Plain = Mapping[str, Any]
"""A message as it was given: only what was said is in it."""

Tags = tuple[tuple[str, str | None], ...]

MAX_LISTED_BYTES = 16 * 1024
"""Of what the list shows of an endpoint: all endpoints that there can be must fit into that one answer."""

MAX_ADDRESSES = 100
"""Of each list of people to tell."""

MAX_LIMITS = 20
MAX_GROUP_LIMITS = 5
"""Rate limits of one endpoint, in each spelling."""

_ADDRESS = re.compile(r"[^@\s\x00-\x1f\x7f]{1,64}@[^@\s\x00-\x1f\x7f]{1,255}")


def plain(message: Message) -> Plain:
    """What the message says, as plain values."""
    said: Plain = MessageToDict(message, preserving_proto_field_name=True)
    return said


def message(kind: type[M], said: Plain | None) -> M | None:
    """The message that was made `plain`."""
    return None if said is None else ParseDict(dict(said), kind())


def read_tags(tags: Iterable[pb.EndpointTag], *, at: str) -> Tags:
    """Tags in the order given; raises InvalidParameter for one without a key, or a key that is given twice."""
    read = tuple((tag.key, tag.value if tag.HasField("value") else None) for tag in tags)
    keys = [key for key, _ in read]
    if "" in keys:
        raise InvalidParameter(f"{at}: every tag needs a key.")
    if len(set(keys)) < len(keys):
        raise InvalidParameter(f"{at}: a key may be given once only.")
    return read


def changed_tags(tags: Tags, *, added: Tags, deleted: Iterable[str]) -> Tags:
    """The tags after a change: what is given anew keeps its place, what is new comes last, and deleting wins."""
    gone = set(deleted)
    return tuple((key, value) for key, value in {**dict(tags), **dict(added)}.items() if key not in gone)


def check_listed(endpoint: Endpoint) -> None:
    """Raises InvalidParameter when what the list shows of an endpoint is too long, however it came to be so."""
    configs = [config for config in (endpoint.active, endpoint.pending) if config is not None]
    # Names are shown twice, as entities and as models; the JSON text of the rest is at least as long as its message.
    names = [2 * sum(map(_length, _names(config))) for config in configs]
    said = (endpoint.description, endpoint.tags, endpoint.ai_gateway, endpoint.telemetry_config)
    size = len(orjson.dumps((*said, endpoint.budget_policy_id))) + max(names, default=0)
    if size > MAX_LISTED_BYTES:
        raise InvalidParameter(
            "description, tags, ai_gateway, telemetry_config, budget_policy_id and the names of served entities: they"
            f" have {size} bytes together, more than the limit of {MAX_LISTED_BYTES}. Shorten them."
        )


def read_ai_gateway(gateway: pb.AiGatewayConfig, *, at: str) -> Plain | None:
    """The configuration as it was given, None for an empty one.

    Raises FeatureDisabled for what is switched on and not offered, InvalidParameter for limits that make no sense.
    """
    refuse(next(_gateway_features(gateway), None), at=at)
    _check_limits(gateway.rate_limits, at=f"{at}.rate_limits" if at else "rate_limits")
    return plain(gateway) or None


def read_notifications(notifications: pb.EmailNotifications, *, at: str) -> Plain:
    """Whom to tell, as it was given; raises InvalidParameter for what is no address."""
    for field in ("on_update_failure", "on_update_success"):
        addresses: Sequence[str] = getattr(notifications, field)
        if len(addresses) > MAX_ADDRESSES:
            raise InvalidParameter(f"{at}.{field}: give at most {MAX_ADDRESSES} addresses. Use one of a group.")
        for index, address in enumerate(addresses):
            if not _ADDRESS.fullmatch(address):
                raise InvalidParameter(f"{at}.{field}[{index}]: give an e-mail address, such as ada@example.com.")
    return plain(notifications)


def read_telemetry(telemetry: pb.TelemetryConfig, *, at: str) -> Plain:
    """The configuration as it was given; raises FeatureDisabled for what is switched on."""
    refuse(next(_telemetry_features(telemetry), None), at=at)
    return plain(telemetry)


def read_auto_capture(capture: pb.AutoCaptureConfig, *, at: str) -> Plain:
    """The configuration as it was given; raises FeatureDisabled when it is switched on."""
    refuse("enabled" if capture.enabled else None, at=at)
    return plain(capture)


def read_rate_limits(given: Sequence[pb.RateLimit]) -> tuple[Plain, ...]:
    """Limits in the older spelling, as they were given; raises InvalidParameter."""
    for index, limit in enumerate(given):
        if not limit.HasField("calls"):
            raise InvalidParameter(f"rate_limits[{index}].calls: say how many calls are allowed.")
        if limit.key not in ("", "user", "endpoint"):
            raise InvalidParameter(f"rate_limits[{index}].key: give `user` or `endpoint`; ai_gateway knows more.")
    said = tuple(plain(limit) for limit in given)
    _check_limits(_newer(said), at="rate_limits")
    return said


def is_usage_tracked(endpoint: Endpoint) -> bool:
    """Whether it is to be recorded who uses the endpoint."""
    gateway = message(pb.AiGatewayConfig, endpoint.ai_gateway)
    return gateway is not None and gateway.usage_tracking_config.enabled


def limits(endpoint: Endpoint) -> Limits:
    """Every limit that the endpoint's callers have to keep to."""
    gateway = message(pb.AiGatewayConfig, endpoint.ai_gateway) or pb.AiGatewayConfig()
    return Limits(endpoint.id, (*_newer(endpoint.rate_limits), *gateway.rate_limits))


def refuse(feature: str | None, *, at: str = "") -> None:
    """Raises FeatureDisabled, naming the field of a feature that is not offered; None: all is well."""
    if feature is not None:
        path = f"{at}.{feature}" if at else feature
        raise FeatureDisabled(f"{path}: this feature is not offered here. Leave the field out, or switch it off.")


def _names(config: EndpointConfig) -> Iterator[str]:
    for entity in config.entities:
        yield from (entity.name, entity.model.name, entity.model.version)


def _length(text: str) -> int:
    return len(text.encode()) + 4  # with what a message has around it


def _newer(said: Iterable[Plain]) -> list[pb.AiGatewayRateLimit]:
    """Limits of the older spelling in the newer one, which has all its fields."""
    return [ParseDict(dict(limit), pb.AiGatewayRateLimit()) for limit in said]


def _check_limits(limits: Sequence[pb.AiGatewayRateLimit], *, at: str) -> None:
    if len(limits) > MAX_LIMITS:
        raise InvalidParameter(f"{at}: give at most {MAX_LIMITS} limits.")
    if sum(limit.key == "user_group" for limit in limits) > MAX_GROUP_LIMITS:
        raise InvalidParameter(f"{at}: give at most {MAX_GROUP_LIMITS} limits for groups.")
    seen: set[tuple[str, str, str]] = set()
    for index, limit in enumerate(limits):
        _check_limit(limit, at=f"{at}[{index}]")
        for measure in MEASURES:
            what = (limit.key or "endpoint", folded(limit.principal), measure)
            if limit.HasField(measure):
                if what in seen:
                    raise InvalidParameter(f"{at}[{index}].{measure}: there is another limit for the same. Give one.")
                seen.add(what)


def _check_limit(limit: pb.AiGatewayRateLimit, *, at: str) -> None:
    if limit.renewal_period != "minute":
        raise InvalidParameter(f"{at}.renewal_period: give `minute`, the only one there is.")
    if limit.key not in ("", "endpoint", "user", "user_group", "service_principal"):
        raise InvalidParameter(f"{at}.key: give `user`, `user_group`, `service_principal` or `endpoint`.")
    if limit.key in ("", "endpoint") and limit.principal:
        raise InvalidParameter(f"{at}.principal: a limit of the endpoint is for all. Give a `key` that goes with it.")
    if limit.key in ("user_group", "service_principal") and not limit.principal:
        raise InvalidParameter(f"{at}.principal: name the one that the limit is for.")
    if not any(limit.HasField(measure) for measure in MEASURES):
        raise InvalidParameter(f"{at}: give `calls` or `tokens`.")
    for measure in MEASURES:
        if getattr(limit, measure) < 0:
            raise InvalidParameter(f"{at}.{measure}: give 0 or more.")


def _gateway_features(gateway: pb.AiGatewayConfig) -> Iterator[str]:
    for field in ("fallback_config", "inference_table_config"):
        if getattr(gateway, field).enabled:
            yield f"{field}.enabled"
    for side in ("input", "output"):
        guardrail: pb.AiGatewayGuardrail = getattr(gateway.guardrails, side)
        if guardrail.pii.behavior not in (pb.AiGatewayPii.BEHAVIOR_UNSPECIFIED, pb.AiGatewayPii.NONE):
            yield f"guardrails.{side}.pii"
        for field in ("safety", "invalid_keywords", "valid_topics"):
            if getattr(guardrail, field):
                yield f"guardrails.{side}.{field}"


def _telemetry_features(telemetry: pb.TelemetryConfig) -> Iterator[str]:
    for field in ("telemetry_profile_id", "enabled_telemetry_features"):
        if getattr(telemetry, field):
            yield field
    for table in telemetry.table_names.DESCRIPTOR.fields_by_name:
        if getattr(telemetry.table_names, table):
            yield f"table_names.{table}"
    if telemetry.inference_table_config.sampling_fraction:
        yield "inference_table_config.sampling_fraction"
