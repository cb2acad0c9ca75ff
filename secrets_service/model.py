"""What the Secrets service knows: frozen records without behaviour, free of gRPC and SQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Generic, NoReturn, TypeVar

from servicekit.context import ADMINS, Level

USERS = "users"

T = TypeVar("T")


class Kind(StrEnum):
    """What a principal is."""

    USER = "user"
    GROUP = "group"
    SERVICE_PRINCIPAL = "service_principal"


class SecretBytes:
    """Bytes that nobody may read by accident: only `reveal()` gives them, and no text form shows them."""

    __slots__ = ("_bytes",)

    def __init__(self, value: bytes) -> None:
        self._bytes = value

    def reveal(self) -> bytes:
        """The bytes themselves: for sealing, and for the one answer that is meant to hold them."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._bytes)

    def __repr__(self) -> str:
        return "SecretBytes(***)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret value is not pickled")


class Permission(IntEnum):
    """Levels of an ACL; each includes those below it."""

    READ = 1
    WRITE = 2
    MANAGE = 3


@dataclass(frozen=True, slots=True)
class Scope:
    """A scope; `uuid` binds its ciphertexts, so that a scope made anew under an old name opens none of them."""

    id: int
    uuid: bytes
    name: str


@dataclass(frozen=True, slots=True)
class Standing:
    """What decides about a principal in one scope: its groups, and what was granted to it or to one of them."""

    groups: frozenset[str]
    granted: tuple[Permission, ...]


@dataclass(frozen=True, slots=True)
class SecretInfo:
    """A secret without its value; the time is in Unix milliseconds."""

    key: str
    updated_ms: int


@dataclass(frozen=True, slots=True)
class Key:
    """A key that was put once; versions below `first_version` are older than its last deletion."""

    id: int
    name: str
    first_version: int
    last_version: int

    @property
    def current(self) -> int:
        """The version that is read; 0 when the key is deleted."""
        return self.last_version if self.last_version >= self.first_version else 0


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """A version of a secret without its value; the time is in Unix milliseconds."""

    version: int
    created_ms: int
    is_current: bool
    is_held: bool
    """Whether a running replica was started with it."""
    is_deleted: bool
    """Whether it is older than the last deletion of its key."""


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """A version of a scope's key as it is stored: sealed under a store key."""

    version: int
    record: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SealedSecret:
    """A version of a secret as it is stored, with the key of its scope that opens it, as that one is."""

    key_id: int
    key: str
    version: int
    record: bytes = field(repr=False)
    wrapped_key: WrappedKey


@dataclass(frozen=True, slots=True)
class Grant:
    """A permission on a scope, granted to the principal of that name."""

    principal: str
    permission: Permission


@dataclass(frozen=True, slots=True)
class Group:
    """A group, as its members and ACLs know it."""

    id: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupProfile:
    """What an admin says about a group; `members` are ids of users and service principals, as they were sent."""

    name: str
    members: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    entitlements: tuple[str, ...] = ()
    external_id: str = ""


@dataclass(frozen=True, slots=True)
class Member:
    """A user or service principal, as its groups know it."""

    id: int
    kind: Kind
    display_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DetailedGroup:
    """A group with all that is known about it; the id is never given to another principal."""

    id: int
    name: str
    members: tuple[Member, ...]
    roles: tuple[str, ...]
    entitlements: tuple[str, ...]
    external_id: str


@dataclass(frozen=True, slots=True)
class Email:
    """An e-mail address of a user."""

    type: str
    value: str
    is_primary: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What an admin says about a user or a service principal, whose name is its application id."""

    name: str
    display_name: str = ""
    given_name: str = ""
    family_name: str = ""
    emails: tuple[Email, ...] = ()
    is_active: bool = True
    roles: tuple[str, ...] = ()
    entitlements: tuple[str, ...] = ()
    external_id: str = ""


@dataclass(frozen=True, slots=True)
class User:
    """Who can own tokens: a user or, where `kind` says so, a service principal. The id is never given to another."""

    id: int
    profile: Profile
    groups: tuple[Group, ...]
    kind: Kind = Kind.USER

    @property
    def is_admin(self) -> bool:
        return any(group.name == ADMINS for group in self.groups)


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some of the principals that match, and how many match in all; `start` is one-based."""

    items: tuple[T, ...]
    start: int
    total: int


class TokenKind(StrEnum):
    """What a credential that we made is good for; the values are those of the database."""

    PERSONAL = "personal"
    """A personal access token: taken wherever a caller shows who it is."""

    CLIENT_SECRET = "client_secret"  # noqa: S105 (a kind, not a secret)
    """A service principal's client secret: for getting access tokens with, and for nothing else."""


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """What is remembered about a token; times are in Unix milliseconds."""

    id: str
    created_ms: int
    expires_ms: int
    comment: str


@dataclass(frozen=True, slots=True)
class ManagedToken:
    """What admins are told about a token; the name is empty when whoever made it is gone."""

    info: TokenInfo
    owner_id: int
    creator_id: int
    creator_name: str


@dataclass(frozen=True, slots=True)
class TokenMac:
    """What is stored of a token's secret: a MAC, and under which version of its key."""

    version: int
    mac: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class StoredToken:
    """A token or client secret that was found, and whose it is."""

    info: TokenInfo
    owner: User
    kind: TokenKind
    mac_version: int
    """Under which version of its key the MAC is that is stored of it."""


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that was just made, with the text that is shown once."""

    info: TokenInfo
    value: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ClientSecret:
    """What is remembered about a client secret."""

    info: TokenInfo
    mac: TokenMac


@dataclass(frozen=True, slots=True)
class NewClientSecret:
    """A client secret that was just made, with the text that is shown once."""

    secret: ClientSecret
    value: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class NewAccessToken:
    """An access token that was just made, and for how many seconds it is good."""

    value: str = field(repr=False)
    seconds: int


@dataclass(frozen=True, slots=True)
class Platform:
    """What the first start decided for the life of the database."""

    store_id: bytes
    """Binds every ciphertext and every key to this database."""

    workspace_id: str
    """Sixteen decimal digits."""

    admin_id: int
    """The user whose token stands in admin.token."""

    admin_token_id: str
    """The public id of that token."""


@dataclass(frozen=True, slots=True)
class SealedKeyring:
    """The keyring as it is stored: sealed under the root key of that id."""

    root_key_id: str
    record: bytes = field(repr=False)
    wrapped: bytes | None = field(default=None, repr=False)
    """What the source of the root key needs to have it again; None where it keeps the key itself."""


@dataclass(frozen=True, slots=True)
class StoreKeyUse:
    """A store key, when it was made (Unix milliseconds), and how many scope keys and MACs are under it."""

    version: int
    made_ms: int
    scope_keys: int
    tokens: int
    rights: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyStatus:
    """Which keys there are, and how much is not under the newest ones."""

    root_key_id: str
    root_key_source: str
    """Where the root key comes from, for people."""
    store_keys: Sequence[StoreKeyUse]
    scopes: int
    oldest_scope_key_ms: int
    """When the oldest of the keys was made that values are sealed under now."""
    values_behind: int


@dataclass(frozen=True, slots=True)
class SealedSigningKey:
    """The key that signs assertions, as it is stored."""

    key_id: str
    record: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Reference:
    """The scope and key that an environment variable refers to."""

    scope: str
    key: str

    @property
    def folded(self) -> Reference:
        """The same reference in the letter case that is looked up."""
        return Reference(self.scope.lower(), self.key.lower())


class FailureKind(StrEnum):
    """Why a reference cannot be resolved; the names are those of the proto."""

    SCOPE_MISSING = "SCOPE_MISSING"
    KEY_MISSING = "KEY_MISSING"
    NOT_PERMITTED = "NOT_PERMITTED"
    CREATOR_INACTIVE = "CREATOR_INACTIVE"
    NOT_TEXT = "NOT_TEXT"
    DAMAGED = "DAMAGED"
    NOT_GRANTED = "NOT_GRANTED"


@dataclass(frozen=True, slots=True)
class ReferenceFailure:
    """A reference that cannot be resolved; `principal` is whose permission or account is missing."""

    reference: Reference
    kind: FailureKind
    principal: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A serving endpoint, as far as rights are concerned. It is remembered when it is deleted."""

    id: str
    creator_id: int
    """Whose READ counts at each launch; never given to another principal, so it may be nobody's any more."""
    is_inherited: bool = False
    """Whether it is older than grants and gets its first ones with its launches."""
    is_deleted: bool = False


@dataclass(frozen=True, slots=True)
class EndpointGrant:
    """A level on an endpoint, granted to the principal of that kind and name."""

    kind: Kind
    principal: str
    display_name: str
    level: Level


@dataclass(frozen=True, slots=True)
class GrantedReference:
    """A reference as it was granted: by names, folded, and which scope had that name then."""

    scope: str
    key: str
    scope_uuid: bytes


@dataclass(frozen=True, slots=True)
class LaunchGrant:
    """What may be launched with secrets: whatever `digest` stands for, in one configuration of one endpoint."""

    version: int
    digest: bytes
    author_id: int
    references: tuple[GrantedReference, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessChange:
    """What one transaction changed about who may do what."""

    endpoints: Mapping[str, Mapping[int, Level]] = field(default_factory=dict)
    """All that is granted now on the endpoints on which anything changed, by principal id."""
    removed_endpoints: frozenset[str] = frozenset()
    principals: frozenset[str] = frozenset()
    """Ids of users and service principals whose identity is to be asked for again."""
    tokens: frozenset[str] = frozenset()
    """Public ids of credentials that are no good any more."""
