"""The environment variables of served entities: which may be declared, which are references, and what those stand for.

A value is a secret reference only if it is one from its first to its last character; everything else is plain text.
Secret values pass through here once per launch, on their way to the launcher, and are kept nowhere.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import grpc
import orjson

from servicekit import channels
from servicekit.errors import InvalidParameter, PermissionDenied, ServiceError
from serving_service.launcher import is_reserved
from serving_service.model import EndpointConfig, ServedEntity
from serving_service.settlement import Settlement
from tessera.secrets.v1 import secrets_pb2 as pb
from tessera.secrets.v1 import secrets_pb2_grpc as rpc

MAX_VARIABLES = 50
MAX_ENTRY_BYTES = 131_070
"""Name and value together: what the kernel takes for one variable."""
MAX_TOTAL_BYTES = 1 << 20

GRANT_SECONDS = 5.0
RESOLVE_SECONDS = 5.0

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_REFERENCE = re.compile(r"\{\{secrets/([A-Za-z0-9_.@-]{1,128})/([A-Za-z0-9_.-]{1,128})\}\}")

_Kind = pb.ReferenceFailure
_REFUSALS = (_Kind.NOT_PERMITTED, _Kind.CREATOR_INACTIVE)


class UnresolvableError(Exception):
    """A launch cannot have its environment; the message names scope, key and variable, and never a value."""

    def __init__(self, message: str, *, is_permission: bool = False) -> None:
        super().__init__(message)
        self.is_permission = is_permission
        """Whether what is referred to is there, and may not be read."""


@dataclass(frozen=True)
class SecretRef:
    """A secret reference, parsed."""

    scope: str
    key: str

    def __str__(self) -> str:
        return f"{{{{secrets/{self.scope}/{self.key}}}}}"

    @property
    def folded(self) -> tuple[str, str]:
        """What the reference is compared by: Secrets ignores the letter case of both names."""
        return self.scope.lower(), self.key.lower()


@dataclass(frozen=True)
class ResolvedEnvironment:
    """The declared variables of one launch with their values, and those values among them that are secret."""

    variables: Mapping[str, str] = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)


def parse_reference(value: str) -> SecretRef | None:
    """The reference that `value` is; None for plain text."""
    match = _REFERENCE.fullmatch(value)
    return SecretRef(*match.groups()) if match else None


def references_of(entities: Iterable[ServedEntity]) -> dict[tuple[str, str], SecretRef]:
    """Every reference of these entities once, by what it is compared by."""
    found: dict[tuple[str, str], SecretRef] = {}
    for entity in entities:
        for value in entity.environment.values():
            if reference := parse_reference(value):
                found.setdefault(reference.folded, reference)
    return found


def check_declared(variables: Mapping[str, str], at: str) -> None:
    """Raises InvalidParameter, naming the variable, for what no process could be given. `at` is the field's path."""
    if len(variables) > MAX_VARIABLES:
        raise InvalidParameter(f"{at}: {len(variables)} variables are declared; at most {MAX_VARIABLES} are allowed.")
    for name, value in sorted(variables.items()):
        if not _NAME.fullmatch(name):
            raise InvalidParameter(
                f"{at}: {name[:128]!r} is no name of a variable. Use letters, digits and '_', and no digit in front."
            )
        if is_reserved(name):
            raise InvalidParameter(f"{at}: {name} belongs to the platform. Choose another name.")
        if problem := _problem(name, value):
            raise InvalidParameter(f"{at}.{name[:128]}: {problem}")


def digest_of(entity: ServedEntity) -> bytes:
    """32 bytes that stand for what an entity runs and with which variables; not for its name, its size or its share.

    Secrets keeps them for as long as the configuration lives: another way to make them must be told from this one.
    """
    model = entity.model
    # What was granted before the place was recorded stays good, and cannot be had by leaving out a place that was.
    place = [] if model.location is None else [model.location]
    content = {
        "model": [model.name, model.version, model.source, model.created_at, *place],
        "environment": dict(entity.environment),
        "instance_profile_arn": entity.instance_profile_arn,
    }
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).digest()


class SecretReferences:
    """Asks Secrets about references: may an endpoint use them, and what do they stand for."""

    def __init__(self, channel: grpc.aio.Channel, settlement: Settlement) -> None:
        self._channel = channel
        self._resolver = rpc.SecretResolverStub(channel)
        self._settlement = settlement

    async def grant(self, endpoint_id: str, config: EndpointConfig | None, *, is_new: bool) -> None:
        """Has the endpoint granted what a configuration refers to, on behalf of the caller.

        Raises PermissionDenied or InvalidParameter, naming every reference that cannot be granted, PermissionDenied too
        when the creator is not active; and what Secrets answers else. Then nothing is granted, unless nobody knows:
        Unavailable, DeadlineExceeded, or a failure of Secrets itself.
        """
        await self._settlement.reconciled()
        entities = () if config is None else config.entities
        answer = await channels.call(
            self._resolver.GrantLaunches,
            pb.GrantLaunchesRequest(
                endpoint_id=endpoint_id,
                is_new=is_new,
                version=0 if config is None else config.version,
                entities=[
                    pb.GrantedEntity(digest=digest_of(entity), references=map(_message, references.values()))
                    for entity in entities
                    if (references := references_of([entity]))
                ],
            ),
            peer="Secrets",
            timeout=GRANT_SECONDS,
            waiting_for=self._channel,
        )
        if answer.creator_is_inactive:
            raise PermissionDenied(
                "The creator of the endpoint, as whom it runs, is not active or was removed. Create the endpoint anew."
            )
        if not answer.failures:
            return
        # One sentence per cause: entities may share a reference, and so do their failures.
        causes = " ".join(dict.fromkeys(_cause(failure, entities) for failure in answer.failures))
        if any(failure.kind in _REFUSALS for failure in answer.failures):
            raise PermissionDenied(causes)
        raise InvalidParameter(f"Invalid secret provided. {causes}")

    async def resolve(
        self, entity: ServedEntity, *, endpoint_id: str, version: int, replica_id: str
    ) -> ResolvedEnvironment:
        """The environment of one launch.

        Raises UnresolvableError when a value cannot be had or used, and ServiceError when Secrets does not answer.
        """
        references = references_of([entity])
        values: dict[tuple[str, str], str] = {}
        if references:
            await self._settlement.reconciled()
            answer = await channels.call(
                self._resolver.Resolve,
                pb.ResolveRequest(
                    endpoint_id=endpoint_id,
                    version=version,
                    digest=digest_of(entity),
                    replica_id=replica_id,
                    references=map(_message, references.values()),
                ),
                peer="Secrets",
                timeout=RESOLVE_SECONDS,
            )
            if answer.failures:
                raise UnresolvableError(
                    " ".join(_cause(failure, [entity]) for failure in answer.failures),
                    is_permission=any(failure.kind in (*_REFUSALS, _Kind.NOT_GRANTED) for failure in answer.failures),
                )
            if len(answer.values) != len(references):
                raise ServiceError("The Secrets service answered with another number of values than was asked for.")
            for folded, value in zip(references, answer.values, strict=True):
                values[folded] = _text(value, references[folded], entity)
        variables = {}
        for name, declared in entity.environment.items():
            reference = parse_reference(declared)
            variables[name] = values[reference.folded] if reference else declared
            if problem := _problem(name, variables[name]):
                raise UnresolvableError(f"Environment variable {name} of served entity '{entity.name}': {problem}")
        total = sum(_size(name, value) for name, value in variables.items())
        if total > MAX_TOTAL_BYTES:
            raise UnresolvableError(
                f"The environment variables of served entity '{entity.name}' have {total} bytes together, more than "
                f"the limit of {MAX_TOTAL_BYTES}. Use shorter secrets."
            )
        return ResolvedEnvironment(variables, tuple(values.values()))


def _message(reference: SecretRef) -> pb.SecretReference:
    return pb.SecretReference(scope=reference.scope, key=reference.key)


def _cause(failure: pb.ReferenceFailure, entities: Iterable[ServedEntity]) -> str:
    """One sentence about a failed reference: what is wrong, where it stands, and what to do."""
    scope, key, who = failure.reference.scope, failure.reference.key, failure.principal
    reference = SecretRef(scope, key)
    places = ", ".join(
        f"{variable} of served entity '{entity.name}'"
        for entity in entities
        for variable, value in sorted(entity.environment.items())
        if (found := parse_reference(value)) and found.folded == reference.folded
    )
    where = f"(referenced as {reference} by environment variable {places})"
    match failure.kind:
        case _Kind.NOT_PERMITTED:
            return f"User {who} does not have READ permission on scope {scope} {where}."
        case _Kind.CREATOR_INACTIVE:
            return f"User {who}, as whom the endpoint runs, is not active {where}. Create the endpoint anew."
        case _Kind.SCOPE_MISSING:
            return f"Scope {scope} does not exist {where}, so key {key} cannot be read. Create the scope."
        case _Kind.KEY_MISSING:
            return f"Scope {scope} has no key {key} {where}. Put the secret."
        case _Kind.NOT_GRANTED:
            return f"{reference} was never granted to what is to run {where}. Update the endpoint's configuration."
        case _Kind.NOT_TEXT:
            return f"The value of key {key} in scope {scope} is not UTF-8 text or holds a NUL {where}. Put it as text."
        case _:
            return f"The value of key {key} in scope {scope} cannot be read {where}. Put it again."


def _text(value: bytes, reference: SecretRef, entity: ServedEntity) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        failure = pb.ReferenceFailure(reference=_message(reference), kind=_Kind.NOT_TEXT)
        # Not chained: the decoding error holds the value.
        raise UnresolvableError(_cause(failure, [entity])) from None


def _problem(name: str, value: str) -> str | None:
    if "\0" in value:
        return "The value holds a NUL character, which no environment variable can. Put it as text without one."
    if (size := _size(name, value)) > MAX_ENTRY_BYTES:
        return f"Name and value have {size} bytes, more than the limit of {MAX_ENTRY_BYTES}. Use a shorter value."
    return None


def _size(name: str, value: str) -> int:
    return len(name) + len(value.encode())
