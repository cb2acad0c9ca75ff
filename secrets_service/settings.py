"""What the Secrets service can be told, and where its files are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from servicekit import settings
from servicekit.settings import ServiceSettings, setting


def _at_least_one(text: str) -> int:
    """A whole number, one or more."""
    if (number := settings.count(text)) < 1:
        raise ValueError("expected a whole number, at least 1")
    return number


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecretsSettings(ServiceSettings):
    """Settings of the Secrets service; a public listener that would leak tokens raises ValueError."""

    listen: str = setting(
        "TESSERA_SECRETS_LISTEN",
        settings.address,
        default="127.0.0.1:8081",
        help="host:port of the public gRPC listener; port 0 lets the system choose.",
    )
    root_key_file: Path | None = setting(
        "TESSERA_ROOT_KEY_FILE",
        settings.file,
        default=None,
        help="File with the 32 bytes of the root key, mode 0600 or 0400; root.key in the data directory by default.",
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_plaintext("TESSERA_SECRETS_LISTEN", self.listen)

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
