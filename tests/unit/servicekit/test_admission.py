"""Queues in front of servers: who gets a place and when, who leaves, and what others are told of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection

import pytest

from servicekit.admission import LOAD_SECONDS, Load, Offer, Queue, QueueFull, Queues, Server, Turn
from tests.support.seed import seeded

LONG = 30.0


def offer(*limits: int, is_awaited: bool = False) -> Offer:
    return Offer(tuple((f"s{n}", f"unix:/{n}", limit) for n, limit in enumerate(limits)), is_awaited)


def queues(length: int = 10) -> tuple[Queues, asyncio.Event]:
    changed = asyncio.Event()
    return Queues(length=length, changed=changed), changed


def one_queue(*limits: int, length: int = 10, is_awaited: bool = False) -> Queue:
    return queues(length)[0].serve("owner", {"name": offer(*limits, is_awaited=is_awaited)})["name"]


def waiting(queue: Queue, *, seconds: float = LONG) -> asyncio.Task[Server | None]:
    return asyncio.create_task(queue.wait(asyncio.get_running_loop().time() + seconds))


class TurnBy(Turn):
    """A turn at the queue that a function says."""

    def __init__(self, choice: Callable[[Collection[Server]], Queue], *, seconds: float) -> None:
        super().__init__(seconds=seconds)
        self._choice = choice

    def choose(self, avoided: Collection[Server]) -> Queue:
        return self._choice(avoided)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_least_busy_server_is_taken_and_none_beyond_its_limit() -> None:
    queue = one_queue(2, 2)
    taken = [queue.take() for _ in range(4)]
    assert sorted(server.id for server in taken if server) == ["s0", "s0", "s1", "s1"]
    assert [server.id for server in taken[:2] if server] == ["s0", "s1"]
    assert queue.take() is None
    unlimited = one_queue(0)
    assert all(unlimited.take() for _ in range(100))


async def test_nobody_waits_for_a_server_that_another_one_avoids() -> None:
    queue = one_queue(1, 1)
    free, busy = queue.take(), queue.take()
    assert free is not None
    until = asyncio.get_running_loop().time() + LONG
    picky = asyncio.create_task(queue.wait(until, {free}))
    await settle()
    queue.give_back(free)
    newcomer = waiting(queue)
    await settle()
    assert newcomer.done()
    assert await newcomer is free
    assert busy is not None
    queue.give_back(busy)
    assert await picky is busy


async def test_a_place_goes_to_whoever_has_waited_longest() -> None:
    queue = one_queue(1)
    server = queue.take()
    assert server is not None
    first, second = waiting(queue), waiting(queue)
    await settle()
    queue.give_back(server)
    assert queue.take() is None, "nobody passes those who wait"
    assert await first is server
    assert not second.done()
    queue.give_back(server)
    assert await second is server


async def test_as_many_wait_as_may_and_no_more() -> None:
    queue = one_queue(1, length=2)
    server = queue.take()
    waiters = [waiting(queue), waiting(queue)]
    await settle()
    with pytest.raises(QueueFull):
        await waiting(queue)
    waiters[0].cancel()
    await settle()
    last = waiting(queue)
    await settle()
    assert server is not None
    for waiter in (waiters[1], last):
        queue.give_back(server)
        assert await waiter is server


async def test_who_has_waited_long_enough_leaves() -> None:
    queue = one_queue(1)
    server = queue.take()
    with pytest.raises(TimeoutError):
        await waiting(queue, seconds=0.01)
    assert server is not None
    queue.give_back(server)
    assert queue.take() is server


async def test_a_place_is_not_lost_when_its_waiter_leaves_in_the_same_moment() -> None:
    queue = one_queue(1)
    server = queue.take()
    assert server is not None
    leaving = waiting(queue)
    await settle()
    queue.give_back(server)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert leaving.cancelled()
    assert queue.take() is server


async def test_who_waits_for_what_comes_no_more_looks_again() -> None:
    all_queues, _ = queues()
    queue = all_queues.serve("owner", {"name": offer(is_awaited=True)})["name"]
    first = waiting(queue)
    await settle()
    all_queues.serve("owner", {"name": offer(is_awaited=True), "other": offer(1)})
    await settle()
    assert not first.done()
    all_queues.serve("owner", {"name": offer()})
    assert await first is None
    second = waiting(queue)
    await settle()
    all_queues.serve("owner", {"other": offer(1)})
    assert await second is None


async def test_who_avoids_all_that_is_left_looks_again() -> None:
    all_queues, _ = queues()
    queue = all_queues.serve("owner", {"name": offer(1, 1)})["name"]
    avoided, other = queue.take(), queue.take()
    assert avoided is not None
    until = asyncio.get_running_loop().time() + LONG
    picky, patient = asyncio.create_task(queue.wait(until, {avoided})), waiting(queue)
    await settle()
    all_queues.serve("owner", {"name": offer(1)})
    await settle()
    assert picky.done()
    assert await picky is None
    assert not patient.done()
    queue.give_back(avoided)
    assert await patient is avoided
    assert other is not None
    queue.give_back(other)


async def test_servers_that_come_up_take_those_who_wait() -> None:
    all_queues, _ = queues()
    queue = all_queues.serve("owner", {"name": offer(is_awaited=True)})["name"]
    waiters = [waiting(queue) for _ in range(3)]
    await settle()
    all_queues.serve("owner", {"name": offer(2)})
    await settle()
    assert [waiter.done() for waiter in waiters] == [True, True, False]
    server = await waiters[0]
    assert server is not None
    queue.give_back(server)
    assert await waiters[2] is server


async def test_a_retired_server_gets_nothing_new_and_is_known_until_it_is_unused() -> None:
    all_queues, changed = queues()
    queue = all_queues.serve("owner", {"name": offer(2)})["name"]
    old = queue.take()
    assert old is not None
    all_queues.serve("owner", {"name": Offer((("new", "unix:/new", 1),), is_awaited=False)})
    new = queue.take()
    assert new is not None
    assert new.id == "new"
    assert queue.take() is None
    assert all_queues.retired == {old}
    all_queues.serve("owner", {"name": offer(2)})
    assert (all_queues.retired, queue.servers) == ({new}, (old,)), "one that comes back has what it had"
    all_queues.serve("owner", {})
    changed.clear()
    queue.give_back(old)
    assert changed.is_set()
    assert all_queues.retired == {new}


async def test_a_turn_looks_again_until_there_is_a_server_and_avoids_the_bad_ones() -> None:
    queue = one_queue(1, 1)

    def choose(avoided: Collection[Server]) -> Queue:
        if all(server in avoided for server in queue.servers):
            raise LookupError
        return queue

    turn = TurnBy(choose, seconds=LONG)
    async with turn as first:
        turn.avoid(first)
    async with turn as second:
        assert second is not first
        blocked = asyncio.create_task(turn_of(TurnBy(choose, seconds=LONG), avoiding=first))
        await settle()
        assert not blocked.done(), "the free server is one to avoid"
        turn.avoid(second)
    assert await blocked is second
    with pytest.raises(LookupError):
        await turn.__aenter__()
    assert [server.busy for server in queue.servers] == [0, 0]


async def turn_of(turn: Turn, *, avoiding: Server) -> Server:
    turn.avoid(avoiding)
    async with turn as server:
        return server


async def test_others_are_told_the_most_there_was_and_then_that_it_is_over() -> None:
    all_queues, changed = queues()
    queue = all_queues.serve("owner", {"name": offer(1)})["name"]
    assert all_queues.seconds is None
    server = queue.take()
    assert changed.is_set(), "the first load is told at once"
    changed.clear()
    waiter = waiting(queue)
    await settle()
    assert server is not None
    queue.give_back(server)
    await waiter
    queue.give_back(server)
    assert all_queues.loads() == {("owner", "name"): Load(1, 1)}
    assert all_queues.seconds == LOAD_SECONDS
    assert all_queues.loads() == {}
    assert all_queues.seconds is None


async def test_the_first_who_waits_is_told_at_once_and_the_next_ones_with_the_others() -> None:
    all_queues, changed = queues()
    queue = all_queues.serve("owner", {"name": offer(1)})["name"]
    waiters = [waiting(queue)]
    await settle()
    assert changed.is_set()
    for _ in range(3):
        changed.clear()
        all_queues.loads()
        waiters.append(waiting(queue))
        await settle()
    assert not changed.is_set()
    for waiter in waiters:
        waiter.cancel()


async def test_whatever_comes_and_goes_no_limit_is_passed_and_no_place_is_lost() -> None:
    chance = seeded()
    all_queues, _ = queues(length=8)
    queue = all_queues.serve("owner", {"name": offer(2, 3)})["name"]
    most = 0

    @contextlib.asynccontextmanager
    async def counted() -> AsyncIterator[None]:
        nonlocal most
        async with TurnBy(lambda _: queue, seconds=chance.choice((0.001, LONG))) as server:
            most = max(most, sum(each.busy for each in queue.servers))
            assert server.busy <= server.limit
            yield

    async def request() -> None:
        with contextlib.suppress(QueueFull, TimeoutError):
            async with counted():
                await asyncio.sleep(chance.random() / 500)

    for _ in range(60):
        tasks = [asyncio.create_task(request()) for _ in range(chance.randrange(1, 12))]
        await asyncio.sleep(chance.random() / 500)
        for task in tasks:
            if chance.random() < 0.3:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert most == 5
    assert [server.busy for server in queue.servers] == [0, 0]
    assert [queue.take() is None for _ in range(6)] == [False] * 5 + [True]
