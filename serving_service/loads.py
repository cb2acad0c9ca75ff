"""How much there is to do for each served entity: what gateways report, and our own queries, which wait here.

The rule: what one reporter said holds until it says something else or goes away. Whoever scales an entity hears of each
change of the sum, and of nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping

from servicekit.admission import Key, Queues
from tessera.serving.v1 import serving_pb2 as pb


class Loads:
    """The load of all served entities. Lives on one event loop."""

    def __init__(self, *, queue_length: int) -> None:
        """`queue_length`: how many of our own queries may wait for one entity."""
        self._reported: dict[object, Mapping[Key, int]] = {}
        self._changed = asyncio.Event()
        self.queues = Queues(length=queue_length, changed=self._changed)
        self.on_change: Callable[[str], None] = lambda endpoint_id: None
        """Called with an endpoint's id when the load of one of its entities has changed."""
        self.on_unused: Callable[[], None] = lambda: None
        """Called when a replica that is retired has perhaps no query of ours left."""

    def of(self, endpoint_id: str, entity: str) -> int:
        """How many requests at a time an entity has, those that wait included."""
        return sum(loads.get((endpoint_id, entity), 0) for loads in self._reported.values())

    def report(self, reporter: object, loads: Iterable[pb.EntityLoad]) -> None:
        """Takes what a gateway reports; it reports nothing when it goes away."""
        self._learn(
            reporter, {(each.endpoint_id, each.served_entity_name): each.in_flight + each.waiting for each in loads}
        )

    async def run(self) -> None:
        """Takes our own queries into account, until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.queues.seconds):
                    await self._changed.wait()
            self._changed.clear()
            self.on_unused()
            self._learn(self, {key: sum(load) for key, load in self.queues.loads().items()})

    def _learn(self, reporter: object, loads: Mapping[Key, int]) -> None:
        before = self._reported.pop(reporter, {})
        if loads:
            self._reported[reporter] = loads
        changed = {key[0] for key in before.keys() | loads.keys() if before.get(key) != loads.get(key)}
        for endpoint_id in changed:
            self.on_change(endpoint_id)
