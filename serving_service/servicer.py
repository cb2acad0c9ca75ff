"""Messages to calls and back; no decisions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.any_pb2 import Any as AnyMessage

from servicekit import once
from servicekit.context import current_caller
from serving_service import exposition, messages
from serving_service.endpoints import Endpoints
from serving_service.meters import Meters
from serving_service.query import AnswerHead, Queries
from serving_service.routes import RouteTable
from tessera.serving.v1 import serving_pb2 as pb

FOLLOWED_TYPE = "text/plain; charset=utf-8"

Call = grpc.aio.ServicerContext[Any, Any]


class ServingEndpointsServicer:
    """tessera.serving.v1.ServingEndpoints."""

    def __init__(self, endpoints: Endpoints, queries: Queries) -> None:
        self._endpoints = endpoints
        self._queries = queries

    async def CreateServingEndpoint(
        self, request: pb.CreateServingEndpointRequest, call: Call
    ) -> pb.ServingEndpointDetailed:
        return await once.answer(self._endpoints.create(request, caller=current_caller()), messages.detailed)

    async def GetServingEndpoint(self, request: pb.GetServingEndpointRequest, call: Call) -> pb.ServingEndpointDetailed:
        return messages.detailed(await self._endpoints.get(request.name, caller=current_caller()))

    async def ListServingEndpoints(
        self, request: pb.ListServingEndpointsRequest, call: Call
    ) -> pb.ListServingEndpointsResponse:
        views = await self._endpoints.list_visible(caller=current_caller())
        return pb.ListServingEndpointsResponse(endpoints=map(messages.summary, views))

    async def DeleteServingEndpoint(
        self, request: pb.DeleteServingEndpointRequest, call: Call
    ) -> pb.DeleteServingEndpointResponse:
        await self._endpoints.delete(request.name, caller=current_caller())
        return pb.DeleteServingEndpointResponse()

    async def UpdateServingEndpointConfig(
        self, request: pb.UpdateServingEndpointConfigRequest, call: Call
    ) -> pb.ServingEndpointDetailed:
        config = pb.EndpointCoreConfigInput(
            served_entities=request.served_entities,
            traffic_config=request.traffic_config,
            auto_capture_config=request.auto_capture_config if request.HasField("auto_capture_config") else None,
        )
        return await once.answer(
            self._endpoints.update_config(request.name, config, caller=current_caller()), messages.detailed
        )

    async def StopServingEndpoint(
        self, request: pb.StopServingEndpointRequest, call: Call
    ) -> pb.ServingEndpointDetailed:
        return await once.answer(self._endpoints.stop(request.name, caller=current_caller()), messages.detailed)

    async def StartServingEndpoint(
        self, request: pb.StartServingEndpointRequest, call: Call
    ) -> pb.ServingEndpointDetailed:
        return await once.answer(self._endpoints.start(request.name, caller=current_caller()), messages.detailed)

    async def CancelServingEndpointUpdate(
        self, request: pb.CancelServingEndpointUpdateRequest, call: Call
    ) -> pb.ServingEndpointDetailed:
        return await once.answer(
            self._endpoints.cancel_update(request.name, caller=current_caller()), messages.detailed
        )

    async def PatchServingEndpointTags(
        self, request: pb.PatchServingEndpointTagsRequest, call: Call
    ) -> pb.EndpointTags:
        return await once.answer(
            self._endpoints.patch_tags(request, caller=current_caller()),
            lambda endpoint: pb.EndpointTags(tags=messages.tags(endpoint)),
        )

    async def PutServingEndpointRateLimits(
        self, request: pb.PutServingEndpointRateLimitsRequest, call: Call
    ) -> pb.RateLimits:
        return await once.answer(
            self._endpoints.put_rate_limits(request, caller=current_caller()), messages.rate_limits
        )

    async def PutServingEndpointAiGateway(
        self, request: pb.PutServingEndpointAiGatewayRequest, call: Call
    ) -> pb.AiGatewayConfig:
        return await once.answer(
            self._endpoints.put_ai_gateway(request.name, request.ai_gateway, caller=current_caller()),
            messages.ai_gateway,
        )

    async def UpdateServingEndpointNotifications(
        self, request: pb.UpdateServingEndpointNotificationsRequest, call: Call
    ) -> pb.UpdateServingEndpointNotificationsResponse:
        given = request.email_notifications if request.HasField("email_notifications") else None
        return await once.answer(
            self._endpoints.update_notifications(request.name, given, caller=current_caller()), messages.notifications
        )

    async def PatchServingEndpointTelemetryConfig(
        self, request: pb.PatchServingEndpointTelemetryConfigRequest, call: Call
    ) -> pb.ServingEndpointDetailed:
        given = request.telemetry_config if request.HasField("telemetry_config") else None
        return await once.answer(
            self._endpoints.patch_telemetry(request.name, given, caller=current_caller()), messages.detailed
        )

    async def ListServingEndpointEvents(
        self, request: pb.ListServingEndpointEventsRequest, call: Call
    ) -> pb.ListServingEndpointEventsResponse:
        events = await self._endpoints.events(request.name, caller=current_caller())
        return pb.ListServingEndpointEventsResponse(events=map(messages.event, events))

    async def ExportServingEndpointMetrics(
        self, request: pb.ExportServingEndpointMetricsRequest, call: Call
    ) -> HttpBody:
        text = await self._endpoints.metrics(request.name, caller=current_caller())
        return HttpBody(content_type=exposition.CONTENT_TYPE, data=text)

    async def ListServingEndpointMetricsHistory(
        self, request: pb.ListServingEndpointMetricsHistoryRequest, call: Call
    ) -> pb.ListServingEndpointMetricsHistoryResponse:
        page = await self._endpoints.metrics_history(request, caller=current_caller())
        return pb.ListServingEndpointMetricsHistoryResponse(
            points=map(messages.metrics_point, page.items), next_page_token=page.next_token
        )

    async def ListServingEndpointUsage(
        self, request: pb.ListServingEndpointUsageRequest, call: Call
    ) -> pb.ListServingEndpointUsageResponse:
        page = await self._endpoints.usage(request, caller=current_caller())
        return pb.ListServingEndpointUsageResponse(
            usage=map(messages.usage, page.items), next_page_token=page.next_token
        )

    async def GetServedModelLogs(self, request: pb.GetServedModelLogsRequest, call: Call) -> pb.ServedModelLogs:
        logs = await self._endpoints.logs(request.name, request.served_model_name, caller=current_caller())
        return pb.ServedModelLogs(logs=logs)

    async def GetServedModelBuildLogs(
        self, request: pb.GetServedModelBuildLogsRequest, call: Call
    ) -> pb.ServedModelLogs:
        version = request.config_version if request.HasField("config_version") else None
        logs = await self._endpoints.build_logs(
            request.name, request.served_model_name, version, caller=current_caller()
        )
        return pb.ServedModelLogs(logs=logs)

    async def FollowServedModelLogs(
        self, request: pb.FollowServedModelLogsRequest, call: Call
    ) -> AsyncIterator[HttpBody]:
        pieces = self._endpoints.follow_logs(request.name, request.served_model_name, caller=current_caller)
        async for text in pieces:
            yield _piece(text)

    async def FollowServedModelBuildLogs(
        self, request: pb.FollowServedModelBuildLogsRequest, call: Call
    ) -> AsyncIterator[HttpBody]:
        version = request.config_version if request.HasField("config_version") else None
        pieces = self._endpoints.follow_build_logs(
            request.name, request.served_model_name, version, caller=current_caller
        )
        async for text in pieces:
            yield _piece(text)

    async def GetServingEndpointOpenApi(self, request: pb.GetServingEndpointOpenApiRequest, call: Call) -> HttpBody:
        document = await self._endpoints.openapi(request.name, caller=current_caller())
        return HttpBody(content_type="application/json", data=document)

    async def Query(self, request: pb.QueryRequest, call: Call) -> AsyncIterator[HttpBody]:
        answer = self._queries.query(
            request.name,
            request.served_entity_name,
            request.body.content_type,
            request.body.data,
            caller=current_caller(),
            timeout=call.time_remaining(),
        )
        first: HttpBody | None = None
        async for part in answer:
            if isinstance(part, AnswerHead):
                first = _first_message(part)
            elif first is not None:
                first.data = part
                yield first
                first = None
            else:
                yield HttpBody(data=part)
        if first is not None:
            yield first


class RoutesServicer:
    """tessera.serving.v1.Routes."""

    def __init__(self, routes: RouteTable) -> None:
        self._routes = routes

    async def Watch(self, reports: AsyncIterator[pb.RouteReport], call: Call) -> AsyncIterator[pb.RouteTable]:
        async for table in self._routes.watch(reports):
            yield table


class MeteringServicer:
    """tessera.serving.v1.Metering."""

    def __init__(self, meters: Meters) -> None:
        self._meters = meters

    async def Report(self, request: pb.MeasuresReport, call: Call) -> pb.MeasuresReceipt:
        return self._meters.receive(request)


def _piece(text: str) -> HttpBody:
    return HttpBody(content_type=FOLLOWED_TYPE, data=text.encode())


def _first_message(head: AnswerHead) -> HttpBody:
    extension = AnyMessage()
    extension.Pack(pb.QueryHead(status=head.status, served_entity_name=head.entity))
    return HttpBody(content_type=head.content_type, extensions=[extension])
