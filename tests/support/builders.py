"""Values for tests, with readable defaults: `a_config(entities=["churn"])`, `a_create("demo", model="ready")`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serving_service.model import ConfigUpdate, Endpoint, EndpointConfig, ModelVersion, Route, ServedEntity
from tessera.serving.v1 import serving_pb2 as pb

NOW = 1_700_000_000_000


def an_entity(
    name: str = "churn", *, environment: Mapping[str, str] | None = None, model: str = "churn"
) -> ServedEntity:
    """A served entity of version 1 of a model."""
    return ServedEntity(
        name=name,
        model=ModelVersion(name=model, version="1", source=f"file:{model}", created_at=NOW),
        environment=environment or {},
        instance_profile_arn="",
        workload_size="Small",
        workload_type="CPU",
        scale_to_zero=False,
        min_concurrency=None,
        max_concurrency=None,
        creator="maker@example.com",
        created_at=NOW,
    )


def a_config(version: int = 1, *, entities: Sequence[str] = ("churn",)) -> EndpointConfig:
    """A configuration that sends everything to its first entity."""
    return EndpointConfig(
        version=version,
        created_at=NOW,
        entities=tuple(map(an_entity, entities)),
        routes=tuple(Route(name, 0 if index else 100) for index, name in enumerate(entities)),
    )


def an_endpoint(name: str = "demo", **facts: Any) -> Endpoint:
    """An endpoint whose first configuration is being deployed."""
    defaults: dict[str, Any] = {
        "id": f"{name}-id",
        "creator_id": "1",
        "creator": "maker@example.com",
        "creator_kind": "User",
        "description": "",
        "tags": (),
        "created_at": NOW,
        "updated_at": NOW,
        "latest_version": 1,
        "pending": a_config(),
        "config_update": ConfigUpdate.IN_PROGRESS,
    }
    return Endpoint(name=name, **{**defaults, **facts})


def an_input(model: str = "churn", *, version: str = "1", **fields: Any) -> pb.ServedEntityInput:
    """A served entity as a caller gives it."""
    return pb.ServedEntityInput(**{"entity_name": model, "entity_version": version, **fields})


def a_config_input(
    *entities: pb.ServedEntityInput, routes: Sequence[tuple[str, int]] = (), **fields: Any
) -> pb.EndpointCoreConfigInput:
    """A configuration as a caller gives it."""
    return pb.EndpointCoreConfigInput(
        served_entities=entities,
        traffic_config=pb.TrafficConfigInput(
            routes=[pb.RouteInput(served_entity_name=name, traffic_percentage=share) for name, share in routes]
        ),
        **fields,
    )
