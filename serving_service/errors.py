"""The errors of this service that callers meet."""

from __future__ import annotations

from collections.abc import Mapping

from servicekit import errors


class EndpointNotFound(errors.NotFound):
    """There is no such endpoint, or the caller may not know of it."""

    def __init__(self, name: str) -> None:
        super().__init__(f"Endpoint with name '{name}' does not exist.")


class EntityNotFound(errors.NotFound):
    """The endpoint has no such served entity."""

    def __init__(self, endpoint: str, entity: str) -> None:
        super().__init__(f"Endpoint '{endpoint}' has no served entity with name '{entity}'.")


class ConfigVersionNotFound(errors.NotFound):
    """The endpoint's active and pending configurations have other versions."""

    def __init__(self, endpoint: str, version: int) -> None:
        super().__init__(f"Endpoint '{endpoint}' has no configuration with version {version}.")


class EndpointExists(errors.AlreadyExists):
    """The name is taken, maybe by an endpoint that the caller may not see."""

    def __init__(self, name: str) -> None:
        super().__init__(f"Serving endpoint with name '{name}' already exists. Choose another name.")


class UpdateInProgress(errors.Conflict):
    """The endpoint is being updated."""

    def __init__(self, name: str) -> None:
        super().__init__(f"Endpoint '{name}' is being updated. Wait until that update has ended, then send this one.")


class NotStoppable(errors.BadRequest):
    """There is nothing that could be stopped just now."""

    IS_UPDATING = "it is being updated. Wait until that update has ended, or cancel it."
    IS_BARE = "no configuration of it has ever been active."

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"Endpoint '{name}' cannot be stopped: {why}")


class NotStopped(errors.BadRequest):
    """Only what was stopped can be started."""

    def __init__(self, name: str) -> None:
        super().__init__(f"Endpoint '{name}' is not stopped, so it cannot be started.")


class NothingToCancel(errors.BadRequest):
    """No update is under way, or it ended a moment ago."""

    def __init__(self, name: str) -> None:
        super().__init__(f"Endpoint '{name}' is not being updated, so there is nothing to cancel.")


class NotDescribable(errors.BadRequest):
    """How the endpoint is queried cannot be said."""

    IS_NOT_READY = "it is not ready. Its state and logs say why."
    HAS_NO_SIGNATURE = "the model of served entity '{entity}' was logged without a signature that says what it takes."

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"Endpoint '{name}' cannot be described: {why}")


class TelemetryNotSupported(errors.InvalidParameter):
    """The endpoint has no model that could report anything."""

    def __init__(self) -> None:
        super().__init__(
            "Telemetry configuration is not supported for endpoint type 'NO_CONFIG'. Give the endpoint a configuration"
            " first."
        )


class TooManyEndpoints(errors.LimitExceeded):
    """The workspace is full."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"There are {limit} serving endpoints, which is the limit. Delete one first.")


class TooManyEndpointChanges(errors.TooManyRequests):
    """Endpoints were made or changed as often of late as may be."""

    def __init__(self, limit: int, *, retry_after: int) -> None:
        super().__init__(
            f"Serving endpoints were made or got another configuration {limit} times within five minutes, which is the"
            f" limit. Try again in {retry_after} s.",
            retry_after=retry_after,
        )


class ConcurrencyQuotaExceeded(errors.LimitExceeded):
    """More concurrency would be provisioned than may be."""

    def __init__(self, what: str, concurrency: int, limit: int) -> None:
        super().__init__(
            f"Workspace exceeded provisioned concurrency quota: {what} would have {concurrency} of at most {limit}."
            " Choose a smaller workload_size or max_provisioned_concurrency, or delete an endpoint."
        )


class ModelNotFound(errors.NotFound):
    """The registry has no such model version."""

    def __init__(self, name: str, version: str) -> None:
        super().__init__(f"Version {version} of model '{name}' is not in the model registry. Register it first.")


class ModelBroken(errors.BadRequest):
    """What is registered as this model version is no model."""

    def __init__(self, name: str, version: str, problem: str) -> None:
        super().__init__(
            f"Version {version} of model '{name}' cannot be used: {problem}. Register the model again, and update the"
            " endpoint to that version."
        )


class ModelChanged(errors.BadRequest):
    """The files of this model version are not those that were fetched first."""

    def __init__(self, name: str, version: str) -> None:
        super().__init__(
            f"The files of version {version} of model '{name}' were changed since they were first fetched. Put back"
            " what they were; or register the model again, and update the endpoint to that version."
        )


class RegistryUnusable(errors.BadRequest):
    """The registry cannot be used as configured; a retry does not help."""


class DiskFull(errors.Unavailable):
    """What was fetched finds no room."""

    def __init__(self) -> None:
        super().__init__("The disk that models are kept on is full. Make room on it.", retry_after=1)


class NotDeployed(errors.NotFound):
    """Nothing answers queries under this name."""

    reason = "ENDPOINT_NOT_FOUND"

    def __init__(self) -> None:
        super().__init__("The given endpoint does not exist, or nothing has been deployed under it yet.")


class NotReady(errors.BadRequest):
    """The entity is not running just now, and waiting does not help."""

    def __init__(self, endpoint: str, problems: Mapping[str, str]) -> None:
        """`problems` has a sentence for each entity, which may be empty."""
        names = ", ".join(f"'{entity}'" for entity in problems)
        why = " ".join(filter(None, problems.values())) or "Its state and logs say why."
        super().__init__(f"Endpoint '{endpoint}' is not ready: {names} has no running replica just now. {why}")


class NotUpYet(errors.Unavailable):
    """The entity is on its way up from zero, and the query has waited for it as long as it may."""

    def __init__(self, entity: str) -> None:
        super().__init__(
            f"'{entity}' is scaling from zero and was not up in time. Try again in a moment.", retry_after=5
        )


class TooBusy(errors.TooManyRequests):
    """All replicas are busy, and as many queries wait as may, or this one has waited as long as it may."""

    def __init__(self) -> None:
        super().__init__(
            "Too many concurrent requests. Consider increasing the provisioned concurrency of the served entity.",
            retry_after=1,
        )


class Stopped(errors.BadRequest):
    """Somebody stopped the endpoint."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(f"Endpoint '{endpoint}' is stopped. Start it, then ask again.")


class ModelServerFailed(errors.ServiceError):
    """The model server ended in the middle of a request."""

    def __init__(self, entity: str) -> None:
        super().__init__(f"The model server of '{entity}' ended while it was answering. Its logs say why.")
