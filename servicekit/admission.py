"""Servers that take so many requests at a time each, and queues in front of them.

The rules: a place that was taken is given back whatever happens, and goes to whoever has waited longest; a queue is
bounded; who waits is told to look again when what it waits for can no longer come. How much there is to do is kept for
telling others: the most at a time since they were told, so that nothing is missed that was over by then.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

LOAD_SECONDS = 1.0
"""How often others are told of the load while there is any."""

Key = tuple[str, str]


@dataclass(frozen=True)
class Offer:
    """What a queue leads to."""

    servers: tuple[tuple[str, str, int], ...]
    """Id, address and limit of each."""
    is_awaited: bool
    """Whether there are going to be some, if there are none now."""


class QueueFull(Exception):
    """As many wait as may."""


class Load(NamedTuple):
    """How many requests were under way, and how many waited, at the most."""

    in_flight: int
    waiting: int


@dataclass(slots=True, eq=False)
class Server:
    """One server, with the number of requests that it has of ours."""

    id: str
    address: str
    queue: Queue
    limit: int = 0
    """How many it takes at a time; 0: any number."""
    busy: int = 0
    is_retired: bool = False
    """Whether it gets no new request."""


@dataclass(slots=True, eq=False)
class _Waiter:
    turn: asyncio.Future[Server | None]
    avoided: Collection[Server]


class Queue:
    """Requests for any one of some servers."""

    __slots__ = ("_all", "_in_flight", "_known", "_peak", "_waiting", "key", "servers")

    def __init__(self, key: Key, queues: Queues) -> None:
        self.key = key
        self.servers: tuple[Server, ...] = ()
        self._known: dict[str, Server] = {}
        """The servers, and those retired ones that have requests left."""
        self._all = queues
        self._waiting: deque[_Waiter] = deque()
        self._in_flight = 0
        self._peak = Load(0, 0)

    def take(self, avoided: Collection[Server] = ()) -> Server | None:
        """The least busy server that has room, taken for one request; None when that one has to wait."""
        return None if self._waiting else self._taken(avoided)

    async def wait(self, until: float, avoided: Collection[Server] = ()) -> Server | None:
        """As `take`, once it is this one's turn; None when it is better to look again.

        `until` is on the loop's clock. Raises QueueFull, and TimeoutError.
        """
        if len(self._waiting) >= self._all.length:
            raise QueueFull
        waiter = _Waiter(asyncio.get_running_loop().create_future(), avoided)
        self._waiting.append(waiter)
        self._note()
        self._admit()  # who came before may wait for a server that this one can do without
        try:
            async with asyncio.timeout_at(until):
                return await waiter.turn
        except BaseException:
            # Its turn may have come in the same moment.
            if waiter.turn.done() and not waiter.turn.cancelled() and (server := waiter.turn.result()) is not None:
                self.give_back(server)
            raise
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)

    def give_back(self, server: Server) -> None:
        """The request that a server was taken for is over."""
        server.busy -= 1
        self._in_flight -= 1
        self._all.in_flight -= 1
        if server.is_retired and not server.busy:
            self._known.pop(server.id, None)
            self._all.unused(server)
        self._admit()

    def serve(self, offer: Offer) -> None:
        """Leads to what is offered from now on."""
        self.servers = tuple(self._server(*each) for each in offer.servers)
        for server in self._known.values():
            server.is_retired = server not in self.servers
            self._all.retired.discard(server)
            if server.is_retired and server.busy:
                self._all.retired.add(server)
        self._known = {each.id: each for each in self._known.values() if each.busy or not each.is_retired}
        self._admit()
        if self.servers or not offer.is_awaited:
            self.look_again()

    def look_again(self) -> None:
        """Has those look again for whom nothing comes here any more: they avoid all servers that there are, if any."""
        for waiter in list(self._waiting):
            if not waiter.turn.done() and all(server in waiter.avoided for server in self.servers):
                self._waiting.remove(waiter)
                waiter.turn.set_result(None)

    def told(self) -> Load:
        """The most there was since the last time; from now on it is counted anew."""
        peak, self._peak = self._peak, Load(self._in_flight, len(self._waiting))
        return peak

    def _server(self, id: str, address: str, limit: int) -> Server:
        server = self._known.get(id)
        if server is None:
            server = self._known[id] = Server(id, address, self)
        server.limit = limit
        return server

    def _taken(self, avoided: Collection[Server]) -> Server | None:
        best: Server | None = None
        for server in self.servers:
            has_room = not server.limit or server.busy < server.limit
            if has_room and (best is None or server.busy < best.busy) and server not in avoided:
                best = server
        if best is not None:
            best.busy += 1
            self._in_flight += 1
            self._all.in_flight += 1
            self._note()
        return best

    def _admit(self) -> None:
        """Gives what has room to those who wait, the first first."""
        if not self._waiting:
            return
        for waiter in list(self._waiting):
            if waiter.turn.done():
                continue  # it is about to leave
            server = self._taken(waiter.avoided)
            if server is not None:
                self._waiting.remove(waiter)
                waiter.turn.set_result(server)
            elif not waiter.avoided:
                return

    def _note(self) -> None:
        before, now = self._peak, Load(self._in_flight, len(self._waiting))
        if now.in_flight > before.in_flight or now.waiting > before.waiting:
            self._peak = Load(max(now.in_flight, before.in_flight), max(now.waiting, before.waiting))
            self._all.noticed(self, is_first_waiter=now.waiting > 0 == before.waiting)


class Queues:
    """All queues of a process, by owner and name. `changed` is set when others should hear of something at once."""

    def __init__(self, *, length: int, changed: asyncio.Event) -> None:
        """`length`: how many may wait in one queue."""
        self.length = length
        self.in_flight = 0
        """How many requests are under way, in all queues together."""
        self.retired: set[Server] = set()
        """Those that get no new request and have some left."""
        self._changed = changed
        self._by_owner: dict[str, dict[str, Queue]] = {}
        self._lively: set[Queue] = set()
        """Those that had load when others were told the last time, or have had since."""
        self._hurried: dict[Queue, float] = {}

    def serve(self, owner: str, offers: Mapping[str, Offer]) -> dict[str, Queue]:
        """The queues of an owner, by name, which lead to what is offered from now on.

        Whoever waits in one that is there no more looks again.
        """
        before = self._by_owner.pop(owner, {})
        queues = {name: before.get(name) or Queue((owner, name), self) for name in offers}
        if queues:
            self._by_owner[owner] = queues
        for name, queue in before.items():
            if name not in offers:
                queue.serve(Offer((), is_awaited=False))
        for name, queue in queues.items():
            queue.serve(offers[name])
        return queues

    def of(self, owner: str, name: str) -> Queue:
        """The queue of that name; raises KeyError when there is none."""
        return self._by_owner[owner][name]

    def unused(self, server: Server) -> None:
        """A retired server has no request left."""
        self.retired.discard(server)
        self._changed.set()

    def noticed(self, queue: Queue, *, is_first_waiter: bool) -> None:
        """There is more load than before."""
        if queue in self._lively and not is_first_waiter:
            return  # it is told soon
        self._lively.add(queue)
        now = asyncio.get_running_loop().time()
        if now >= self._hurried.get(queue, float("-inf")) + LOAD_SECONDS:
            self._hurried[queue] = now
            self._changed.set()

    @property
    def seconds(self) -> float | None:
        """When to tell others of the load again; None while there is none."""
        return LOAD_SECONDS if self._lively else None

    def loads(self) -> dict[Key, Load]:
        """What others are to be told now. Of what is not named there is none."""
        told = {queue: queue.told() for queue in self._lively}
        # Also that the load is over has to be told.
        self._lively = {queue for queue, load in told.items() if any(load)}
        self._hurried = {queue: at for queue, at in self._hurried.items() if queue in self._lively}
        loads: dict[Key, Load] = {}
        for queue, load in told.items():
            before = loads.get(queue.key, Load(0, 0))
            loads[queue.key] = Load(before.in_flight + load.in_flight, before.waiting + load.waiting)
        return {key: load for key, load in loads.items() if any(load)}


class Turn(ABC):
    """One request's way to a server: `async with turn as server`, again after `avoid` when that one was no good."""

    def __init__(self, *, seconds: float) -> None:
        """`seconds` is how long the request waits, all in all, from the first time that it has to."""
        self._seconds = seconds
        self._until: float | None = None
        self._avoided: set[Server] = set()
        self._server: Server | None = None
        self.queue: Queue
        self.has_waited = False
        """Whether some time passed before the server was found: what was decided before may not hold any more."""

    @abstractmethod
    def choose(self, avoided: Collection[Server]) -> Queue:
        """Where to queue, given the servers to avoid; what it raises is raised to whoever enters."""

    async def __aenter__(self) -> Server:
        """Raises QueueFull, TimeoutError."""
        while self._server is None:
            self.queue = self.choose(self._avoided)
            self._server = self.queue.take(self._avoided)
            if self._server is None:
                self.has_waited = True
                self._server = await self.queue.wait(self._waits_until(), self._avoided)
        return self._server

    async def __aexit__(self, *exception: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Gives the server back, also before the end of the context; safe to repeat."""
        server, self._server = self._server, None
        if server is not None:
            server.queue.give_back(server)

    def _waits_until(self) -> float:
        if self._until is None:  # most never wait
            self._until = asyncio.get_running_loop().time() + self._seconds
        return self._until

    def avoid(self, server: Server) -> None:
        """Has the next attempt go to another one."""
        self._avoided.add(server)
