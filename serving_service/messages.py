"""Our endpoints as messages. Both spellings of served entities are always filled, since clients read either."""

from __future__ import annotations

import json
from collections.abc import Mapping

from google.protobuf.json_format import ParseDict

from servicekit.identity import authorization_details
from serving_service import details
from serving_service.endpoints import View
from serving_service.model import (
    ConfigUpdate,
    Endpoint,
    EndpointConfig,
    EntityState,
    Minute,
    MinuteOfUse,
    ServedEntity,
)
from serving_service.monitoring import MINUTE_MS
from serving_service.phases import LaunchEvent
from tessera.identity.v1.permissions_pb2 import PermissionLevel
from tessera.serving.v1 import serving_pb2 as pb


def detailed(view: View) -> pb.ServingEndpointDetailed:
    """The endpoint with its configurations."""
    endpoint = view.endpoint
    return pb.ServingEndpointDetailed(
        name=endpoint.name,
        id=endpoint.id,
        creator=endpoint.creator,
        creator_display_name=endpoint.creator,
        creator_kind=endpoint.creator_kind,
        creation_timestamp=endpoint.created_at,
        last_updated_timestamp=endpoint.updated_at,
        state=_state(view),
        config=_config(endpoint.active, view.active) if endpoint.active else None,
        pending_config=_config(endpoint.pending, view.pending, is_pending=True) if endpoint.pending else None,
        permission_level=PermissionLevel.Value(view.level.name),
        description=endpoint.description,
        tags=tags(endpoint),
        route_optimized=endpoint.route_optimized,
        ai_gateway=details.message(pb.AiGatewayConfig, endpoint.ai_gateway),
        email_notifications=details.message(pb.EmailNotifications, endpoint.email_notifications),
        telemetry_config=details.message(pb.TelemetryConfig, endpoint.telemetry_config),
        effective_budget_policy_id=endpoint.budget_policy_id,
        endpoint_url=view.url,
        data_plane_info=_data_plane(view) if view.url else None,
    )


def summary(view: View) -> pb.ServingEndpointSummary:
    """The endpoint as it stands in a list, without environment variables."""
    endpoint = view.endpoint
    config = endpoint.active or endpoint.pending
    return pb.ServingEndpointSummary(
        name=endpoint.name,
        id=endpoint.id,
        creator=endpoint.creator,
        creation_timestamp=endpoint.created_at,
        last_updated_timestamp=endpoint.updated_at,
        state=_state(view),
        config=_config_summary(config) if config else None,
        tags=tags(endpoint),
        description=endpoint.description,
        ai_gateway=details.message(pb.AiGatewayConfig, endpoint.ai_gateway),
        budget_policy_id=endpoint.budget_policy_id,
        telemetry_config=details.message(pb.TelemetryConfig, endpoint.telemetry_config),
    )


def tags(endpoint: Endpoint) -> list[pb.EndpointTag]:
    """The endpoint's tags, in their order."""
    return [pb.EndpointTag(key=key, value=value) for key, value in endpoint.tags]


def ai_gateway(endpoint: Endpoint) -> pb.AiGatewayConfig:
    """The endpoint's AI gateway configuration; an empty one when it has none."""
    return details.message(pb.AiGatewayConfig, endpoint.ai_gateway or {}) or pb.AiGatewayConfig()


def rate_limits(endpoint: Endpoint) -> pb.RateLimits:
    """The endpoint's rate limits in the older spelling."""
    return pb.RateLimits(rate_limits=[ParseDict(dict(limit), pb.RateLimit()) for limit in endpoint.rate_limits])


def notifications(endpoint: Endpoint) -> pb.UpdateServingEndpointNotificationsResponse:
    """Whom to tell about the endpoint."""
    return pb.UpdateServingEndpointNotificationsResponse(
        name=endpoint.name,
        email_notifications=details.message(pb.EmailNotifications, endpoint.email_notifications),
    )


def event(event: LaunchEvent) -> pb.LaunchEvent:
    """One phase of one launch."""
    return pb.LaunchEvent(
        served_entity_name=event.entity,
        config_version=event.version,
        replica_id=event.replica_id,
        phase=pb.LaunchEvent.Phase.Value(event.phase.name),
        outcome=pb.LaunchEvent.Outcome.Value(event.outcome.value),
        start_time=event.started_at,
        duration_ms=event.duration,
        message=event.message,
    )


def _data_plane(view: View) -> pb.ModelDataPlaneInfo:
    """Where the endpoint is asked, and what a token for it must allow; clients send the text as it is."""
    allowed = json.dumps([authorization_details(view.endpoint.id)], separators=(",", ":"))
    return pb.ModelDataPlaneInfo(query_info=pb.DataPlaneInfo(endpoint_url=view.url, authorization_details=allowed))


def _state(view: View) -> pb.EndpointState:
    endpoint = view.endpoint
    update: Mapping[ConfigUpdate, pb.EndpointState.ConfigUpdate.ValueType] = {
        ConfigUpdate.NOT_UPDATING: pb.EndpointState.NOT_UPDATING,
        ConfigUpdate.IN_PROGRESS: pb.EndpointState.IN_PROGRESS,
        ConfigUpdate.UPDATE_FAILED: pb.EndpointState.UPDATE_FAILED,
        ConfigUpdate.UPDATE_CANCELED: pb.EndpointState.UPDATE_CANCELED,
    }
    return pb.EndpointState(
        ready=pb.EndpointState.READY if view.is_ready else pb.EndpointState.NOT_READY,
        config_update=update[endpoint.config_update],
        suspend=pb.EndpointState.STOPPED if endpoint.is_resting else pb.EndpointState.NOT_SUSPENDED,
    )


def _config(
    config: EndpointConfig, states: Mapping[str, EntityState], *, is_pending: bool = False
) -> pb.EndpointCoreConfigOutput:
    return pb.EndpointCoreConfigOutput(
        served_entities=[_served_entity(entity, states[entity.name]) for entity in config.entities],
        served_models=[_served_model(entity, states[entity.name]) for entity in config.entities],
        traffic_config=pb.TrafficConfigOutput(
            routes=[
                pb.RouteOutput(
                    served_entity_name=route.entity, served_model_name=route.entity, traffic_percentage=route.percentage
                )
                for route in config.routes
            ]
        ),
        config_version=config.version,
        start_time=config.created_at if is_pending else None,
        auto_capture_config=details.message(pb.AutoCaptureConfig, config.auto_capture),
    )


def _served_entity(entity: ServedEntity, state: EntityState) -> pb.ServedEntityOutput:
    return pb.ServedEntityOutput(
        name=entity.name,
        entity_name=entity.model.name,
        entity_version=entity.model.version,
        environment_vars=entity.environment,
        instance_profile_arn=entity.instance_profile_arn,
        workload_size=entity.workload_size,
        workload_type=pb.WorkloadType.Value(entity.workload_type),
        scale_to_zero_enabled=entity.scale_to_zero,
        min_provisioned_concurrency=entity.min_concurrency,
        max_provisioned_concurrency=entity.max_concurrency,
        creator=entity.creator,
        creation_timestamp=entity.created_at,
        state=_entity_state(state),
    )


def _served_model(entity: ServedEntity, state: EntityState) -> pb.ServedModelOutput:
    return pb.ServedModelOutput(
        name=entity.name,
        model_name=entity.model.name,
        model_version=entity.model.version,
        environment_vars=entity.environment,
        instance_profile_arn=entity.instance_profile_arn,
        workload_size=entity.workload_size,
        workload_type=pb.WorkloadType.Value(entity.workload_type),
        scale_to_zero_enabled=entity.scale_to_zero,
        min_provisioned_concurrency=entity.min_concurrency,
        max_provisioned_concurrency=entity.max_concurrency,
        creator=entity.creator,
        creation_timestamp=entity.created_at,
        state=_entity_state(state),
    )


def _entity_state(state: EntityState) -> pb.ServedEntityState:
    return pb.ServedEntityState(
        deployment=pb.ServedEntityState.Deployment.Value(state.deployment.value),
        deployment_state_message=state.message,
    )


def _config_summary(config: EndpointConfig) -> pb.EndpointConfigSummary:
    return pb.EndpointConfigSummary(
        served_entities=[
            pb.ServedEntitySummary(name=each.name, entity_name=each.model.name, entity_version=each.model.version)
            for each in config.entities
        ],
        served_models=[
            pb.ServedModelSummary(name=each.name, model_name=each.model.name, model_version=each.model.version)
            for each in config.entities
        ],
    )


def metrics_point(minute: Minute) -> pb.MetricsPoint:
    """What was measured in one minute."""
    measured = minute.measured
    p50, p90, p99 = (measured.latency.quantile(share) for share in (0.5, 0.9, 0.99))
    return pb.MetricsPoint(
        start_time=minute.minute * MINUTE_MS,
        served_entity_name=minute.key.entity,
        entity_version=minute.key.entity_version,
        request_count=measured.requests,
        request_4xx_count=measured.refused,
        request_5xx_count=measured.failed,
        latency_p50_ms=p50,
        latency_p90_ms=p90,
        latency_p99_ms=p99,
        mean_prediction_ms=measured.prediction.mean,
        mean_queue_ms=measured.queue.mean,
        mean_concurrency=measured.busy / MINUTE_MS,
        replicas=minute.replicas,
    )


def usage(use: MinuteOfUse) -> pb.EndpointUsage:
    """What one caller used in one minute."""
    used = use.used
    return pb.EndpointUsage(
        start_time=use.minute * MINUTE_MS,
        served_entity_name=use.key.entity,
        requester=use.key.requester,
        requester_id=use.key.principal_id,
        request_count=used.requests,
        request_4xx_count=used.refused,
        request_5xx_count=used.failed,
        input_tokens=used.input_tokens,
        output_tokens=used.output_tokens,
    )
