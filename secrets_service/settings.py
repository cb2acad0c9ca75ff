"""What the Secrets service can be told, and where its files are."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from servicekit import settings
from servicekit.settings import AuditedSettings, setting


def _at_least_one(text: str) -> int:
    """A whole number, one or more."""
    if (number := settings.count(text)) < 1:
        raise ValueError("expected a whole number, at least 1")
    return number


LONGEST_SOCKET_PATH = 107
"""Bytes that the kernel takes."""


def key_source(text: str) -> str:
    """Where a root key comes from, other than a file: `fd:N`, `credential:NAME` or `kms:/path`."""
    kind, _, where = text.partition(":")
    match kind:
        case "fd":
            _inherited(where)
        case "credential":
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}", where):
                raise ValueError("expected the name of a credential after credential:, without a directory")
        case "kms":
            if not where.startswith("/") or len(os.fsencode(where)) > LONGEST_SOCKET_PATH:
                raise ValueError(
                    f"expected the absolute path of a socket after kms:, of at most {LONGEST_SOCKET_PATH} bytes"
                )
        case _:
            raise ValueError("expected fd:N, credential:NAME or kms:/path")
    return text


def _current_source(text: str) -> str:
    if text.partition(":")[0] not in ("file", "fd", "credential", "kms") or text.startswith("file:"):
        raise ValueError(
            "expected file (TESSERA_ROOT_KEY_FILE says which), fd:N, credential:NAME or kms:/path. A key in the"
            " environment is not taken, where other programs can read it"
        )
    return text if text == "file" else key_source(text)


def _inherited(number: str) -> None:
    # What this process has opened itself is closed in programs that it starts, so that shows which ones were inherited.
    if not settings.count(number) > 2:
        raise ValueError("expected a descriptor after fd:, 3 or more")
    try:
        flags = fcntl.fcntl(int(number), fcntl.F_GETFD)
    except (OSError, OverflowError):
        flags = fcntl.FD_CLOEXEC
    if flags & fcntl.FD_CLOEXEC:
        raise ValueError(f"descriptor {number} was not handed to this process; start it with one that is open")


def issuer_url(text: str) -> str:
    """An address that keys are fetched from, as given: https, or http on this machine."""
    parts = urlsplit(text)
    is_safe = parts.scheme == "https" or (parts.scheme == "http" and settings.is_loopback(f"{parts.hostname}:0"))
    if not (is_safe and parts.hostname and parts.port != 0 and text.isascii() and text.isprintable()):
        raise ValueError("expected an address that begins with https:// (http:// for 127.0.0.1, ::1 and localhost)")
    if "@" in parts.netloc or "#" in text or " " in text:
        raise ValueError("expected an address without user name, fragment and spaces")
    return text


def _issuer(text: str) -> str:
    if "?" in text:
        raise ValueError("expected an address without a query")
    return issuer_url(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecretsSettings(AuditedSettings):
    """Settings of the Secrets service; a public listener that would leak tokens raises ValueError."""

    listen: str = setting(
        "TESSERA_SECRETS_LISTEN",
        settings.address,
        default="127.0.0.1:8081",
        help="host:port of the public gRPC listener; port 0 lets the system choose.",
    )
    peer_listen: str = settings.peer_listen("TESSERA_SECRETS_PEER_LISTEN", "the gateway and Serving")
    metrics_listen: str = settings.metrics_listen("TESSERA_SECRETS_METRICS_LISTEN")
    calls: int = settings.calls()
    changes: int = settings.changes()
    root_key_source: str = setting(
        "TESSERA_ROOT_KEY_SOURCE",
        _current_source,
        default="file",
        help="Where the root key comes from: file; fd:N, a descriptor that the service is started with, which holds the"
        " 32 bytes; credential:NAME, a file in CREDENTIALS_DIRECTORY; or kms:/path, the socket of a plugin that speaks"
        " for a key service (docs/kms.md).",
    )
    previous_root_key_source: str = setting(
        "TESSERA_PREVIOUS_ROOT_KEY_SOURCE",
        key_source,
        default="",
        help="Where the root key before the one in use comes from, when that is no file: as TESSERA_ROOT_KEY_SOURCE. A"
        " start that finds the store sealed under it seals it under the one in use.",
    )
    credentials_directory: Path | None = setting(
        "CREDENTIALS_DIRECTORY",
        settings.directory,
        default=None,
        help="Directory of the credentials that a supervisor gives this service; systemd sets it.",
    )
    root_key_file: Path | None = setting(
        "TESSERA_ROOT_KEY_FILE",
        settings.file,
        default=None,
        help="File with the 32 bytes of the root key, mode 0600 or 0400; root.key in the data directory by default.",
    )
    previous_root_key_file: Path | None = setting(
        "TESSERA_PREVIOUS_ROOT_KEY_FILE",
        settings.file,
        default=None,
        help="File with the root key before the one in use: a start that finds the store sealed under it seals it"
        " under the one in use. For keys that the service cannot write; not needed once that is done.",
    )
    scope_key_days: int = setting(
        "TESSERA_SCOPE_KEY_DAYS",
        settings.count,
        default=90,
        help="After how many days the key of a scope is renewed, and its values sealed anew in the background. 0: only"
        " when asked for (`tessera keys rotate scope`).",
    )
    store_key_days: int = setting(
        "TESSERA_STORE_KEY_DAYS",
        settings.count,
        default=365,
        help="After how many days the store key is renewed. 0: only when asked for (`tessera keys rotate store`).",
    )
    tokens_per_minute: int = setting(
        "TESSERA_TOKENS_PER_MINUTE",
        settings.count,
        default=10,
        help="Tokens that one user or service principal may get within a minute; more are answered 429. 0: any number.",
    )
    secret_versions: int = setting(
        "TESSERA_SECRET_VERSIONS",
        _at_least_one,
        default=5,
        help="How many versions of each secret are kept, the one that is read included; those in use stay besides.",
    )
    authors_need_read: bool = setting(
        "TESSERA_AUTHORS_NEED_READ",
        settings.boolean,
        default=True,
        help="Whether whoever changes what an endpoint runs needs READ on the secrets that it refers to already; no:"
        " its creator's READ is enough.",
    )
    reflection: bool | None = setting(
        "TESSERA_REFLECTION",
        settings.boolean,
        default=None,
        help="Whether callers with a token may ask for descriptors; by default only where the listener is on loopback.",
    )

    oidc_issuer: str = setting(
        "TESSERA_OIDC_ISSUER",
        _issuer,
        default="",
        help="Address of an OpenID Connect issuer whose tokens are taken too, exactly as their claim iss spells it. Not"
        " set: only tokens of this platform are.",
    )
    oidc_audience: str = setting(
        "TESSERA_OIDC_AUDIENCE",
        str,
        default="",
        help="What the claim aud of that issuer's tokens must be; belongs to TESSERA_OIDC_ISSUER.",
    )
    oidc_claim: str = setting(
        "TESSERA_OIDC_CLAIM",
        str,
        default="sub",
        help="The claim of that issuer's tokens that holds a user name or application id of this platform, such as sub"
        " or email (which must be verified then).",
    )
    oidc_jwks_url: str = setting(
        "TESSERA_OIDC_JWKS_URL",
        issuer_url,
        default="",
        help="Address of that issuer's keys; by default the one that its discovery document names.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_plaintext("TESSERA_SECRETS_LISTEN", self.listen)
        self.refuse_unproven("TESSERA_SECRETS_PEER_LISTEN", self.peer_listen)
        self.refuse_open_metrics("TESSERA_SECRETS_METRICS_LISTEN", self.metrics_listen)
        self._check_key_sources()
        if bool(self.oidc_issuer) != bool(self.oidc_audience):
            raise ValueError("TESSERA_OIDC_ISSUER and TESSERA_OIDC_AUDIENCE belong together: set both, or none.")
        if not self.oidc_issuer and (self.oidc_jwks_url or self.oidc_claim != "sub"):
            raise ValueError("TESSERA_OIDC_CLAIM and TESSERA_OIDC_JWKS_URL mean nothing without TESSERA_OIDC_ISSUER.")

    def _check_key_sources(self) -> None:
        sources = (self.root_key_source, self.previous_root_key_source)
        if self.root_key_source != "file" and self.root_key_file is not None:
            raise ValueError(
                f"TESSERA_ROOT_KEY_SOURCE is {self.root_key_source}, so TESSERA_ROOT_KEY_FILE means nothing: set one of"
                " them. For the key before, there is TESSERA_PREVIOUS_ROOT_KEY_FILE."
            )
        if self.previous_root_key_source and self.previous_root_key_file is not None:
            raise ValueError(
                "TESSERA_PREVIOUS_ROOT_KEY_SOURCE and TESSERA_PREVIOUS_ROOT_KEY_FILE name two keys: set one of them."
            )
        if all(source.startswith("kms:") for source in sources):
            raise ValueError(
                "TESSERA_ROOT_KEY_SOURCE and TESSERA_PREVIOUS_ROOT_KEY_SOURCE are both plugins. From one plugin to"
                " another go by way of a file: seal the store under its key first."
            )
        if self.root_key_source == self.previous_root_key_source:
            raise ValueError("TESSERA_ROOT_KEY_SOURCE and TESSERA_PREVIOUS_ROOT_KEY_SOURCE are the same.")
        if self.credentials_directory is None and any(source.startswith("credential:") for source in sources):
            raise ValueError(
                "A root key is to be a credential, and CREDENTIALS_DIRECTORY is not set: start the service from a unit"
                " with LoadCredential= or LoadCredentialEncrypted=."
            )

    @property
    def database(self) -> Path:
        """Where everything but the root key is kept."""
        return self.data_dir / "secrets" / "secrets.db"

    @property
    def root_key(self) -> Path:
        """Where the root key is kept."""
        return self.root_key_file or self.data_dir / "root.key"

    @property
    def admin_token(self) -> Path:
        """Where the first admin's token is written for the operator."""
        return self.data_dir / "admin.token"

    @property
    def offers_reflection(self) -> bool:
        """Whether the public listener answers reflection."""
        return settings.is_loopback(self.listen) if self.reflection is None else self.reflection
