"""What callers of this service can meet, with the documented texts. No text holds a value, a key or a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import grpc

from secrets_service.model import Kind, Permission
from servicekit.errors import (
    AlreadyExists,
    BadRequest,
    Conflict,
    DataLoss,
    InvalidParameter,
    LimitExceeded,
    MalformedRequest,
    NotFound,
    PermissionDenied,
    ServiceError,
    Unavailable,
)

_NOUNS = {Kind.USER: "user", Kind.GROUP: "group", Kind.SERVICE_PRINCIPAL: "service principal"}


class ScopeExists(AlreadyExists):
    """The scope's name is taken, in some letter case."""

    http_status = 400  # clients expect it here and nowhere else

    def __init__(self, scope: str) -> None:
        super().__init__(f"Scope {scope} already exists!")


class ScopeNotFound(NotFound):
    """There is no such scope. Scope names are public, so everybody is told."""

    def __init__(self, scope: str) -> None:
        super().__init__(f"Scope {scope} does not exist!")


class SecretNotFound(NotFound):
    """There is no such key; told only to those who may list the keys, or may write them."""

    def __init__(self, scope: str, key: str) -> None:
        super().__init__(f"Secret does not exist with scope: {scope} and key: {key}")


class VersionNotFound(NotFound):
    """The secret has no such version, or has it no longer."""

    def __init__(self, scope: str, key: str, version: int) -> None:
        super().__init__(
            f"Version {version} of key {key} in scope {scope} is not kept. List the versions to see which are."
        )


class VersionConflict(Conflict):
    """The secret is not at the version that a put asked for; told only to those who may write it."""

    def __init__(self, scope: str, key: str, current: int) -> None:
        found = f"is at version {current}" if current else "does not exist"
        super().__init__(
            f"if_version: key {key} in scope {scope} {found}, so nothing was put. Look at its versions, then try again."
        )


class AclNotFound(NotFound):
    """Nothing is granted to that principal itself."""

    def __init__(self, scope: str, principal: str) -> None:
        super().__init__(f"Nothing is granted to {principal} on scope {scope}.")


class ScopePermissionDenied(PermissionDenied):
    """The caller has too little permission on the scope."""

    def __init__(self, user: str, permission: Permission, scope: str) -> None:
        super().__init__(f"User {user} does not have {permission.name} permission on scope {scope}")


class EndpointNotFound(NotFound):
    """There is no such endpoint, or the caller may not know that there is."""

    def __init__(self, endpoint_id: str) -> None:
        super().__init__(f"Serving endpoint with id '{endpoint_id[:64]}' does not exist.")


class TooManyPermissions(LimitExceeded):
    """The endpoint's access control list is full."""

    def __init__(self, endpoint_id: str, limit: int) -> None:
        super().__init__(
            f"Serving endpoint '{endpoint_id}' cannot have more than {limit} permissions. Grant to a group instead."
        )


class AdminsOnly(PermissionDenied):
    """Only members of `admins` may do this."""

    def __init__(self, action: str) -> None:
        super().__init__(f"Only admins may {action}. Ask a member of the group admins.")


class ValueNotGiven(MalformedRequest):
    """A put without a value."""

    def __init__(self) -> None:
        super().__init__("Exactly one of string_value and bytes_value is required; neither was given.")


class ValueTooLong(InvalidParameter):
    """A value beyond the limit."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"The secret value is longer than {limit} bytes, which is the limit.")


class TooManyScopes(LimitExceeded):
    """The workspace is full."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"There are {limit} scopes already, which is the limit. Delete one first.")


class TooManySecrets(LimitExceeded):
    """The scope is full."""

    def __init__(self, scope: str, limit: int) -> None:
        super().__init__(f"Scope {scope} holds {limit} secrets already, which is the limit. Delete one first.")


class TooManyAcls(LimitExceeded):
    """The scope's access control list is full."""

    def __init__(self, scope: str, limit: int) -> None:
        super().__init__(f"Scope {scope} has {limit} ACLs already, which is the limit. Grant to a group instead.")


class ValuesTooLong(LimitExceeded):
    """The values for one launch do not fit into an environment."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"The secret values for this launch are longer than {limit} bytes together, which is the limit."
            " Use shorter values, or fewer."
        )


class UnknownPrincipal(InvalidParameter):
    """A permission or a token for somebody who does not exist."""

    def __init__(self, field: str, principal: str) -> None:
        super().__init__(f"{field}: there is no user, service principal or group named {principal}.")


class SecretDamaged(DataLoss):
    """A stored value does not open at its own place."""

    def __init__(self, scope: str, key: str) -> None:
        super().__init__(
            f"The stored value of key {key} in scope {scope} failed its integrity check and was not used. Put it again."
        )


class ScopeDamaged(DataLoss):
    """The key of a scope does not open."""

    def __init__(self, scope: str) -> None:
        super().__init__(
            f"The key of scope {scope} failed its integrity check, so nothing is sealed under it. Restore the service's"
            " data from a backup, or delete the scope and make it anew."
        )


class RightsDamaged(DataLoss):
    """What decides about rights was changed by somebody else than this service."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(
            f"What is stored about {kind} {name} failed its integrity check, so nothing is allowed because of it."
            " Restore the service's data from a backup."
        )


class RootKeyNotReplaced(BadRequest):
    """A new root key cannot be written beside the one in use, or could not be moved into its place."""

    def __init__(self, path: str, cause: str) -> None:
        super().__init__(
            f"A new root key cannot be put in the place of {path}: {cause}. Let the service write there; or start it"
            " with the new key's file in TESSERA_ROOT_KEY_FILE and this one's in TESSERA_PREVIOUS_ROOT_KEY_FILE."
        )


class RootKeyGiven(BadRequest):
    """The root key was given to the service at its start, which has no way to replace it."""

    def __init__(self, source: str) -> None:
        super().__init__(
            f"The root key comes from {source}, where the service cannot put another one. Start it with the new key"
            " there, and say in TESSERA_PREVIOUS_ROOT_KEY_SOURCE where this one is."
        )


class KeySourceDown(Unavailable):
    """The plugin of a key service does not answer, or is not well; that may change."""

    def __init__(self, source: str, cause: str, remedy: str = "See the plugin's log.") -> None:
        super().__init__(f"The root key's source does not answer: {source}: {cause}. {remedy}")


class KeySourceWrong(BadRequest):
    """The plugin of a key service answers what no root key can be had with, and will again."""

    def __init__(self, source: str, cause: str) -> None:
        super().__init__(f"The root key's source cannot be used: {source}: {cause}.")


class RootKeyWrong(BadRequest):
    """The file of the root key does not hold the one that is in use."""


class PrincipalNotFound(NotFound):
    """There is no principal of that kind and id."""

    def __init__(self, kind: Kind, principal_id: str) -> None:
        super().__init__(f"{_NOUNS[kind].capitalize()} {principal_id} does not exist.")


class PrincipalExists(AlreadyExists):
    """The name belongs to another principal: ACLs name all kinds in one field."""

    facts: ClassVar[Mapping[str, str]] = {"scim_type": "uniqueness"}

    def __init__(self, name: str) -> None:
        super().__init__(f"A user, service principal or group named {name} already exists.")


class TooManyPrincipals(LimitExceeded):
    """The workspace is full."""

    def __init__(self, noun: str, limit: int) -> None:
        super().__init__(f"There are {limit} {noun} already, which is the limit. Delete one first.")


class InvalidMember(InvalidParameter):
    """A group cannot have that member."""

    def __init__(self, member: str, *, is_group: bool) -> None:
        cause = "is a group; members are users and service principals" if is_group else "does not exist"
        super().__init__(f"members: principal {member} {cause}.")


class InvalidFilter(InvalidParameter):
    """A SCIM filter that is not understood."""

    facts: ClassVar[Mapping[str, str]] = {"scim_type": "invalidFilter"}

    def __init__(self, problem: str) -> None:
        super().__init__(f"The filter {problem}")


class InvalidPath(InvalidParameter):
    """The path of a patch names nothing that can be changed."""

    facts: ClassVar[Mapping[str, str]] = {"scim_type": "invalidPath"}

    def __init__(self) -> None:
        super().__init__(
            "Operations.path: names nothing that is known. Write attribute, attribute.part, or for lists"
            ' attribute[part eq "..."].'
        )


class NoTarget(InvalidParameter):
    """A patch changes nothing that is there."""

    facts: ClassVar[Mapping[str, str]] = {"scim_type": "noTarget"}


class NotChangeable(InvalidParameter):
    """What is built in, or decided by the platform."""

    facts: ClassVar[Mapping[str, str]] = {"scim_type": "mutability"}


class LastAdmin(NotChangeable):
    """Nobody could administer the workspace any more."""

    def __init__(self) -> None:
        super().__init__("The group admins would have no active member any more. Add another one first.")


class AnswerDamaged(DataLoss):
    """The first answer to a request that is retried failed its integrity check."""

    def __init__(self) -> None:
        super().__init__("The request was done before, but its answer is damaged. See what it changed.")


class TokenNotFound(NotFound):
    """There is no token of that id, or the caller may not know of it."""

    def __init__(self, token_id: str) -> None:
        super().__init__(f"Token {token_id} does not exist.")


class TooManyTokens(ServiceError):
    """The principal owns as many tokens as it may."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "QUOTA_EXCEEDED"

    def __init__(self, limit: int) -> None:
        super().__init__(f"There are {limit} tokens of this user already, which is the limit. Delete one first.")


class ClientSecretNotFound(NotFound):
    """The service principal has no client secret of that id."""

    def __init__(self, secret_id: str) -> None:
        super().__init__(f"Secret {secret_id} does not exist.")


class TooManyClientSecrets(ServiceError):
    """The service principal has as many client secrets as it may."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "QUOTA_EXCEEDED"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"There are {limit} secrets of this service principal already, which is the limit. Delete one first."
        )


class TooManyNewTokens(ServiceError):
    """The principal got as many tokens just now as it may."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "REQUEST_LIMIT_EXCEEDED"

    def __init__(self, limit: int, *, retry_after: int) -> None:
        super().__init__(
            f"{limit} tokens of this user were made within a minute, which is the limit.", retry_after=retry_after
        )
