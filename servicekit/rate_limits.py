"""How much callers may ask of an endpoint in a minute (contract 5.11): the limits, and what was used of them.

The rule: in no 60 seconds does one process let more through than a limit says. Uses are counted by second of the
machine's monotonic clock, and a second counts until it has wholly left the last minute. Tokens are known when an answer
has ended only; so a budget of tokens is one that can be overdrawn once, and then admits nobody until it is renewed.

Whoever admits requests keeps a `Ledger`. What each used is told to the others as totals of a second, named after who
counted them: hearing one twice changes nothing, and one who starts anew learns what was used before. Between two
tellings (`SHARE_SECONDS`) nobody knows of the others, so together they may exceed a limit by what was admitted
meanwhile; one gateway alone never does.
"""

from __future__ import annotations

import math
import time
import unicodedata
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

from servicekit.context import Principal
from servicekit.errors import TooManyRequests
from servicekit.token_usage import MOST_SUMMED
from tessera.serving.v1 import serving_pb2 as pb

WINDOW_SECONDS = 60
"""What `minute`, the only renewal period, stands for."""

SHARE_SECONDS = 0.5
"""How long a use waits until the others are told, so that many are told together."""

Measure = Literal["calls", "tokens"]
MEASURES: tuple[Measure, ...] = ("calls", "tokens")


class Bucket(NamedTuple):
    """What is counted together: one measure for an endpoint as a whole, for one caller of it, or for one group."""

    endpoint_id: str
    kind: Literal["endpoint", "caller", "group"]
    subject: str
    """Empty, a caller's id, or a group's name as it is compared."""
    measure: Measure


@dataclass(frozen=True, slots=True)
class Limit:
    """So much of a bucket may be used in a minute; `whose` says it to the caller."""

    bucket: Bucket
    most: int
    whose: str


class RateLimited(TooManyRequests):
    """A limit of the endpoint is used up for now (contract 6.7)."""

    def __init__(self, limit: Limit, retry_after: int) -> None:
        super().__init__(
            f"Exceeded the rate limit of {limit.most} {limit.bucket.measure} per minute for {limit.whose}. Try again in"
            f" {retry_after} s.",
            retry_after=retry_after,
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """All limits of one endpoint, as they were configured.

    The limit of an endpoint is for all its callers together. Of those for callers, the most special counts, for calls
    and tokens each: a limit for the caller by name, else those of its groups, else the one for every user. A group's
    limit is shared by its members; who is in several such groups may ask as long as one of them has something left.
    """

    endpoint_id: str
    rules: tuple[pb.AiGatewayRateLimit, ...] = ()

    def of(self, caller: Principal) -> Iterator[Sequence[Limit]]:
        """What the caller has to keep to: of each of these, at least one limit must have something left."""
        for measure in MEASURES:
            of_measure = [rule for rule in self.rules if rule.HasField(measure)]
            yield from (
                [self._limit(rule, "endpoint", "", measure, "this endpoint")]
                for rule in of_measure
                if rule.key in ("endpoint", "")
            )
            if special := self._of_caller(of_measure, caller, measure):
                yield special

    def _of_caller(self, rules: Iterable[pb.AiGatewayRateLimit], caller: Principal, measure: Measure) -> list[Limit]:
        name = folded(caller.name)
        groups = {folded(group) for group in caller.groups}
        own: list[Limit] = []
        shared: list[Limit] = []
        default: list[Limit] = []
        for rule in rules:
            principal = folded(rule.principal)
            if rule.key in ("user", "service_principal") and principal == name:
                own.append(self._limit(rule, "caller", caller.id, measure, f"'{caller.name}'"))
            elif rule.key == "user" and not principal:
                default.append(self._limit(rule, "caller", caller.id, measure, f"'{caller.name}'"))
            elif rule.key == "user_group" and principal in groups:
                shared.append(self._limit(rule, "group", principal, measure, f"the members of '{rule.principal}'"))
        return own[:1] or shared or default[:1]

    def _limit(
        self,
        rule: pb.AiGatewayRateLimit,
        kind: Literal["endpoint", "caller", "group"],
        subject: str,
        measure: Measure,
        whose: str,
    ) -> Limit:
        return Limit(Bucket(self.endpoint_id, kind, subject, measure), getattr(rule, measure), whose)


class Ledger:
    """What was used of which bucket in the last minute, here and by the others.

    `now` tells seconds on a clock that all who share counts have in common: they are processes of one machine.
    """

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self.source = uuid.uuid4().hex
        """Tells our own counts from those of others."""
        self._now = now
        self._uses: dict[Bucket, dict[str, dict[int, int]]] = {}
        self._feeds: set[Feed] = set()
        self._swept = -math.inf

    def admit(self, limits: Limits, caller: Principal) -> Charge:
        """Counts a call; raises RateLimited, and counts nothing, when a limit has nothing left.

        The charge that is returned is told afterwards how many tokens the answer took.
        """
        if not limits.rules:
            return Charge(self, ())
        now = self._now()  # once: no use may leave the minute between the refusal and its `retry_after`
        self._sweep(now)
        charged: list[Bucket] = []
        refusal: RateLimited | None = None
        for choice in limits.of(caller):
            free = next((limit for limit in choice if self._used(limit.bucket, now) < limit.most), None)
            if free is not None:
                charged.append(free.bucket)
                continue
            refused = self._refusal(choice, now)
            if refusal is None or (refused.retry_after or 0) > (refusal.retry_after or 0):
                refusal = refused
        if refusal is not None:
            raise refusal
        charged = list(dict.fromkeys(charged))
        for bucket in charged:
            if bucket.measure == "calls":
                self._count(bucket, 1, now)
        return Charge(self, tuple(bucket for bucket in charged if bucket.measure == "tokens"))

    def use(self, bucket: Bucket, amount: int) -> None:
        """Counts what is used now."""
        self._count(bucket, amount, self._now())

    def _count(self, bucket: Bucket, amount: int, now: float) -> None:
        second = math.floor(now)
        seconds = self._uses.setdefault(bucket, {}).setdefault(self.source, {})
        seconds[second] = min(seconds.get(second, 0) + amount, MOST_SUMMED)
        self._told(bucket, self.source, second)

    def learn(self, uses: Iterable[pb.LimitUse]) -> None:
        """Hears what others used; what they heard from us is ours already."""
        now = self._now()
        for use in uses:
            if use.source != self.source and _is_recent(use.second, now):
                bucket = _bucket(use)
                self._uses.setdefault(bucket, {}).setdefault(use.source, {})[use.second] = use.amount
                self._told(bucket, use.source, use.second)
        self._sweep(now)

    @contextmanager
    def feed(self, woken: Callable[[], object], *, own_only: bool) -> Iterator[Feed]:
        """What somebody is to be told from now on, beginning with all that there is; `woken` hears that there is more.

        `own_only` leaves out what was learned.
        """
        feed = Feed(self, woken, own_only=own_only)
        for bucket, sources in self._uses.items():
            for source, seconds in sources.items():
                for second in seconds:
                    feed.add(bucket, source, second)
        self._feeds.add(feed)
        try:
            yield feed
        finally:
            self._feeds.discard(feed)

    def amount(self, bucket: Bucket, source: str, second: int) -> int:
        """What one counted in a second; 0 when it was dropped."""
        return self._uses.get(bucket, {}).get(source, {}).get(second, 0)

    def __len__(self) -> int:
        """How many buckets are remembered."""
        return len(self._uses)

    def _used(self, bucket: Bucket, now: float) -> int:
        return sum(
            amount
            for seconds in self._uses.get(bucket, {}).values()
            for second, amount in seconds.items()
            if _is_recent(second, now)
        )

    def _refusal(self, choice: Sequence[Limit], now: float) -> RateLimited:
        waits = [(self._wait(limit, now), limit) for limit in choice]
        wait, limit = min(waits, key=lambda each: each[0])
        return RateLimited(limit, wait)

    def _wait(self, limit: Limit, now: float) -> int:
        """Whole seconds until a limit has something left again, if nobody uses it meanwhile."""
        by_second: Counter[int] = Counter()
        for seconds in self._uses.get(limit.bucket, {}).values():
            by_second.update(seconds)
        left = self._used(limit.bucket, now)
        for second in sorted(each for each in by_second if _is_recent(each, now)):
            left -= by_second[second]
            if left < limit.most:
                return max(math.ceil(second + WINDOW_SECONDS + 1 - now), 1)
        return WINDOW_SECONDS  # nothing was used: there is nothing to have

    def _sweep(self, now: float) -> None:
        """Forgets what left the last minute, once a minute: only what was used of late takes memory."""
        if now - self._swept < WINDOW_SECONDS:
            return
        self._swept = now
        for bucket, sources in list(self._uses.items()):
            for source, seconds in list(sources.items()):
                for second in [each for each in seconds if not _is_recent(each, now)]:
                    del seconds[second]
                if not seconds:
                    del sources[source]
            if not sources:
                del self._uses[bucket]

    def _told(self, bucket: Bucket, source: str, second: int) -> None:
        for feed in self._feeds:
            feed.add(bucket, source, second)


class Charge:
    """What one admitted request is going to use, besides the call itself."""

    __slots__ = ("_buckets", "_ledger")

    def __init__(self, ledger: Ledger, buckets: Sequence[Bucket]) -> None:
        self._ledger = ledger
        self._buckets = buckets

    @property
    def wants_tokens(self) -> bool:
        """Whether it has to be known how many tokens the answer took."""
        return bool(self._buckets)

    def tokens(self, amount: int) -> None:
        """Counts the tokens of the answer, once it has ended."""
        for bucket in self._buckets if amount else ():
            self._ledger.use(bucket, amount)


class Feed:
    """What one who shares counts has not been told yet; each second of a bucket is told once, with its total."""

    def __init__(self, ledger: Ledger, woken: Callable[[], object], *, own_only: bool) -> None:
        self._ledger = ledger
        self._woken = woken
        self._own_only = own_only
        self._due: set[tuple[Bucket, str, int]] = set()
        self.without = ""
        """The source that is told to: it knows its own counts."""

    def add(self, bucket: Bucket, source: str, second: int) -> None:
        """Has a total be told, unless it is none of theirs."""
        if source == self.without or (self._own_only and source != self._ledger.source):
            return
        if not self._due:
            self._woken()
        self._due.add((bucket, source, second))

    def take(self) -> list[pb.LimitUse]:
        """All that is to be told now."""
        due, self._due = self._due, set()
        return [
            pb.LimitUse(
                source=source,
                endpoint_id=bucket.endpoint_id,
                kind=bucket.kind,
                subject=bucket.subject,
                measure=bucket.measure,
                second=second,
                amount=amount,
            )
            for bucket, source, second in sorted(due)
            if source != self.without and (amount := self._ledger.amount(bucket, source, second))
        ]


def folded(name: str) -> str:
    """The form in which names of principals are compared."""
    return (
        name.lower() if name.isascii() else unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    )


def _is_recent(second: int, now: float) -> bool:
    return math.floor(now) - second <= WINDOW_SECONDS


def _bucket(use: pb.LimitUse) -> Bucket:
    # The words come from a process of ours of the same version, and an unknown one is a bucket that nobody asks for.
    return Bucket(use.endpoint_id, use.kind, use.subject, use.measure)  # type: ignore[arg-type]
