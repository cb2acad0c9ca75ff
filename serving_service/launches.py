"""From a served entity to a launch: its model's files, then its secrets' values, right before they are needed.

What goes wrong is one of two things: `LaunchImpossible`, which only a person can change, or `LaunchDelayed`, which time
may cure.
"""

from __future__ import annotations

from collections.abc import Callable

import grpc

from servicekit.errors import ServiceError
from serving_service.environment import SecretReferences, UnresolvableError
from serving_service.isolation import ModelUsers, UsersExhausted
from serving_service.launcher import Launch
from serving_service.model import Endpoint, ServedEntity
from serving_service.registry import Registry
from serving_service.settlement import Settlement

_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL)


class LaunchImpossible(Exception):
    """The launch cannot be; the message says what to change."""


class LaunchDelayed(Exception):
    """Something that the launch needs is not there just now."""


class Launches:
    """Makes launches of what the registry and Secrets hold."""

    def __init__(
        self,
        registry: Registry,
        references: SecretReferences,
        settlement: Settlement,
        users: ModelUsers | None,
        *,
        refusal: str = "",
    ) -> None:
        """`users` is None where models run as the service's own user; with a `refusal`, nothing may be launched."""
        self._registry = registry
        self._references = references
        self._settlement = settlement
        self._users = users
        self._refusal = refusal

    async def prepare(
        self, endpoint: Endpoint, version: int, entity: ServedEntity, replica_id: str, say: Callable[[str], None]
    ) -> Launch:
        """Everything that one replica is started from; `say` hears which step is under way.

        Raises LaunchImpossible or LaunchDelayed.
        """
        if self._refusal:
            raise LaunchImpossible(self._refusal)
        try:
            user = await self._users.of(endpoint.id) if self._users else None
            say("Fetching the model.")
            path = await self._registry.fetch(entity.model)
            say("Reading secrets.")
            resolved = await self._references.resolve(
                entity, endpoint_id=endpoint.id, version=version, replica_id=replica_id
            )
        except (UnresolvableError, UsersExhausted) as error:
            raise LaunchImpossible(str(error)) from None
        except ServiceError as error:
            kind = LaunchDelayed if error.code in _PASSING else LaunchImpossible
            raise kind(error.message) from None
        except OSError as error:
            raise LaunchDelayed(f"The model's files cannot be kept: {error.strerror}.") from None
        say("Starting the model server.")
        return Launch(
            replica_id=replica_id,
            model_path=path,
            environment=resolved.variables,
            masked_values=resolved.secrets,
            user=user,
        )

    def ended(self, replica_id: str) -> None:
        """Lets go of what a launch held, once its process is over or there is never going to be one; idempotent."""
        self._settlement.ended(replica_id)

    def dropped(self, endpoint_id: str, version: int) -> None:
        """Gives back what a configuration was granted that is never going to be launched again; idempotent."""
        self._settlement.dropped(endpoint_id, version)
