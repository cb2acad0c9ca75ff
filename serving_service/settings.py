"""What can be configured about Serving. The only place of this service that looks at the environment."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from servicekit import settings
from servicekit.settings import setting
from serving_service.cgroups import Limits, memory_of_machine

_LAST_USER = 2**32 - 2


def _mail_address(text: str) -> str:
    """An address such as tessera@example.com."""
    user, at, host = text.rpartition("@")
    if not (user and at and host) or not text.isascii() or not text.isprintable() or set(text) & set(" ,<>"):
        raise ValueError("expected an e-mail address, such as tessera@example.com")
    return text


def _gpus(text: str) -> frozenset[str]:
    """UUIDs with commas between, or `none`."""
    found = frozenset(each.strip() for each in text.split(","))
    if found == {"none"}:
        return frozenset()
    if not all(each.startswith("GPU-") for each in found):
        raise ValueError("expected none, or UUIDs such as GPU-8932f937-d72c-4106-c12f-20bd9faed9f6 with commas between")
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingSettings(settings.AuditedSettings):
    """The settings of the Serving service."""

    listen: str = setting(
        "TESSERA_SERVING_LISTEN",
        settings.address,
        default="127.0.0.1:8082",
        help="Where the public gRPC API listens: host:port.",
    )
    peer_listen: str = settings.peer_listen("TESSERA_SERVING_PEER_LISTEN", "gateways")
    secrets_address: str = settings.remote("TESSERA_SECRETS_ADDRESS", "Secrets")
    metrics_listen: str = settings.metrics_listen("TESSERA_SERVING_METRICS_LISTEN")
    calls: int = settings.calls()
    changes: int = settings.changes()
    endpoint_changes: int = setting(
        "TESSERA_ENDPOINT_CHANGES_PER_5_MINUTES",
        settings.count,
        default=50,
        help="How often endpoints may be made or get another configuration within five minutes, by all callers"
        " together; more is answered 429. 0: any number.",
    )
    public_url: str = setting(
        "TESSERA_PUBLIC_URL",
        settings.origin,
        default="",
        help="The address that clients reach the REST API under. Route-optimized endpoints are told by it; not set:"
        " there are none.",
    )
    model_registry: str | None = setting(
        "TESSERA_MODEL_REGISTRY",
        str,
        default=None,
        help="URI of the MLflow registry that models come from. Not set: the one in the data directory.",
    )
    registry_env_file: Path | None = setting(
        "TESSERA_REGISTRY_ENV_FILE",
        settings.file,
        default=None,
        help="File, mode 0600 or 0400, of NAME=value lines that only helper processes see: credentials of the registry"
        " and of the stores behind it, such as MLFLOW_TRACKING_TOKEN or AWS_SECRET_ACCESS_KEY, and in UV_ variables,"
        " such as UV_DEFAULT_INDEX, where packages come from. Read again when it has changed.",
    )
    model_cache: int = setting(
        "TESSERA_MODEL_CACHE_MIB",
        settings.count,
        default=50 << 10,
        help="Room for fetched models, in MiB. What was not used for longest goes first; what runs stays.",
    )
    environment_cache: int = setting(
        "TESSERA_ENVIRONMENT_CACHE_MIB",
        settings.count,
        default=50 << 10,
        help="Room for models' environments and the packages for them, in MiB. What was not used for"
        " longest goes first; what runs stays.",
    )
    supervisor_lock: Path | None = setting(
        "TESSERA_SUPERVISOR_LOCK",
        settings.directory,
        default=None,
        help="File that the supervisor keeps locked; replicas end when it is gone. Not set: nobody supervises them.",
    )
    reflection: bool | None = setting(
        "TESSERA_REFLECTION",
        settings.boolean,
        default=None,
        help="Whether callers with a token may read the API's descriptors. Not set: only on a loopback address.",
    )
    inference_deadline: float = setting(
        "TESSERA_INFERENCE_DEADLINE_SECONDS",
        settings.seconds,
        default=597.0,
        help="Seconds that a model has for one request.",
    )
    deploy_deadline: float = setting(
        "TESSERA_DEPLOY_DEADLINE_SECONDS",
        settings.seconds,
        default=1800.0,
        help="Seconds until a configuration that is still not ready counts as failed.",
    )
    download_deadline: float = setting(
        "TESSERA_DOWNLOAD_DEADLINE_SECONDS",
        settings.seconds,
        default=1500.0,
        help="Seconds that fetching a model's files may take; a launch that needs longer fails.",
    )
    build_deadline: float = setting(
        "TESSERA_BUILD_DEADLINE_SECONDS",
        settings.seconds,
        default=1200.0,
        help="Seconds that building a model's environment may take; a launch that needs longer fails.",
    )
    reference_deadline: float = setting(
        "TESSERA_REFERENCE_DEADLINE_SECONDS",
        settings.seconds,
        default=30.0,
        help="Seconds that reading the secrets of a launch may take; one that needs longer is tried again.",
    )
    load_deadline: float = setting(
        "TESSERA_LOAD_DEADLINE_SECONDS",
        settings.seconds,
        default=1200.0,
        help="Seconds from the start of a model server until its model is loaded; a launch that needs longer fails.",
    )
    liveness_deadline: float = setting(
        "TESSERA_LIVENESS_DEADLINE_SECONDS",
        settings.seconds,
        default=120.0,
        help="Seconds for which a model server may not answer at all before it is ended and started again.",
    )
    route_ack_seconds: float = setting(
        "TESSERA_ROUTE_ACK_SECONDS",
        settings.seconds,
        default=5.0,
        help="Seconds that a gateway has for following a change of the routes before it is cut off.",
    )
    queue_length: int = setting(
        "TESSERA_QUEUE_LENGTH",
        settings.count,
        default=100,
        help="How many queries may wait for one served entity whose replicas are busy or not up yet.",
    )
    queue_seconds: float = setting(
        "TESSERA_QUEUE_SECONDS",
        settings.seconds,
        default=50.0,
        help="Seconds that a query may wait for a replica; most clients give up after 60.",
    )
    quiet_seconds: float = setting(
        "TESSERA_QUIET_SECONDS",
        settings.seconds,
        default=300.0,
        help="Seconds for which a replica was not needed before it is stopped; an entity keeps its fewest.",
    )
    idle_seconds: float = setting(
        "TESSERA_IDLE_SECONDS",
        settings.seconds,
        default=1800.0,
        help="Seconds without a request after which a served entity that may be at zero goes there.",
    )
    parallel_launches: int = setting(
        "TESSERA_PARALLEL_LAUNCHES",
        settings.count,
        default=8,
        help="How many replicas are started at a time; one that takes long to load its model makes room for others.",
    )
    stale_identity_seconds: float = setting(
        "TESSERA_STALE_IDENTITY_SECONDS",
        settings.seconds,
        default=3600.0,
        help="For how long a known caller may go on querying models while Secrets does not answer, in seconds.",
    )
    usage_days: int = setting(
        "TESSERA_USAGE_DAYS",
        settings.count,
        default=30,
        help="Days for which it is kept who has used the endpoints whose usage is tracked.",
    )
    model_users: range = setting(
        "TESSERA_MODEL_USERS",
        settings.numbers,
        default=range(200_000, 210_000),
        help="User ids that models run as when Serving runs as root, one for each endpoint: first-last. Nobody else may"
        " have them; platforms on one machine each need their own.",
    )
    model_processes: int = setting(
        "TESSERA_MODEL_PROCESSES",
        settings.count,
        default=512,
        help="How many processes and threads one replica may have.",
    )
    model_memory: int | None = setting(
        "TESSERA_MODEL_MEMORY_MIB",
        settings.count,
        default=None,
        help="How much memory one replica may use, in MiB. Not set: three quarters of the machine's.",
    )
    gpus: frozenset[str] | None = setting(
        "TESSERA_GPUS",
        _gpus,
        default=None,
        help="Which GPUs models get: `none`, or their UUIDs as `nvidia-smi -L` lists them, with commas between. Not"
        " set: all that this machine has. Platforms on one machine each need their own.",
    )
    isolation: str = setting(
        "TESSERA_ISOLATION",
        settings.one_of("auto", "required"),
        default="auto",
        help="Whether models run where something that isolates them is missing: `auto`, then it is said; or `required`,"
        " then they do not.",
    )

    warm_start: bool = setting(
        "TESSERA_WARM_START",
        settings.boolean,
        default=True,
        help="Whether replicas are forked from a process that has MLflow in memory, where their variables allow that:"
        " they start much faster then, and share that memory.",
    )
    smtp_host: str | None = setting(
        "TESSERA_SMTP_HOST",
        str,
        default=None,
        help="Mail server that notifications of ended updates are handed to. Not set: none are mailed.",
    )
    smtp_port: int | None = setting(
        "TESSERA_SMTP_PORT",
        settings.count,
        default=None,
        help="Its port. Not set: 587, with `tls` 465, with `none` 25.",
    )
    smtp_security: str = setting(
        "TESSERA_SMTP_SECURITY",
        settings.one_of("starttls", "tls", "none"),
        default="starttls",
        help="How the connection to it is secured: `starttls`, `tls`, or `none`, which takes no password along.",
    )
    smtp_from: str | None = setting(
        "TESSERA_SMTP_FROM",
        _mail_address,
        default=None,
        help="The address that mails come from.",
    )
    smtp_user: str | None = setting(
        "TESSERA_SMTP_USER", str, default=None, help="Who logs in to the mail server. Not set: nobody does."
    )
    smtp_password_file: Path | None = setting(
        "TESSERA_SMTP_PASSWORD_FILE",
        settings.file,
        default=None,
        help="File with that one's password, mode 0600 or 0400.",
    )
    webhook_url: str | None = setting(
        "TESSERA_NOTIFICATION_WEBHOOK_URL",
        settings.url,
        default=None,
        help="Where notifications of ended updates are posted, in the form of standardwebhooks.com. Not set: nowhere.",
    )
    webhook_secret_file: Path | None = setting(
        "TESSERA_NOTIFICATION_WEBHOOK_SECRET_FILE",
        settings.file,
        default=None,
        help="File with the secret that these are signed with, mode 0600 or 0400: `whsec_` and base64, or any text.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _together(("TESSERA_SMTP_HOST", self.smtp_host), ("TESSERA_SMTP_FROM", self.smtp_from))
        _together(("TESSERA_SMTP_USER", self.smtp_user), ("TESSERA_SMTP_PASSWORD_FILE", self.smtp_password_file))
        _together(
            ("TESSERA_NOTIFICATION_WEBHOOK_URL", self.webhook_url),
            ("TESSERA_NOTIFICATION_WEBHOOK_SECRET_FILE", self.webhook_secret_file),
        )
        if self.smtp_user is not None and self.smtp_security == "none":
            raise ValueError(
                "TESSERA_SMTP_SECURITY is none, so the password in TESSERA_SMTP_PASSWORD_FILE would travel"
                " in clear. Use starttls or tls, or do without a user."
            )
        self.refuse_plaintext("TESSERA_SERVING_LISTEN", self.listen)
        self.refuse_unproven("TESSERA_SERVING_PEER_LISTEN", self.peer_listen)
        self.refuse_unproven("TESSERA_SECRETS_ADDRESS", self.secrets_address)
        self.refuse_open_metrics("TESSERA_SERVING_METRICS_LISTEN", self.metrics_listen)
        if self.model_users[0] < 1 or self.model_users[-1] > _LAST_USER:
            raise ValueError(f"TESSERA_MODEL_USERS is not right: expected users between 1 and {_LAST_USER}, never root")

    @property
    def limits(self) -> Limits:
        """What one replica may use."""
        memory = self.model_memory << 20 if self.model_memory else memory_of_machine() * 3 // 4
        return Limits(processes=self.model_processes, memory=memory)

    @property
    def registry_uri(self) -> str:
        """The registry that models come from."""
        return self.model_registry or _sqlite(self.data_dir / "registry.db")

    @property
    def embedded_registry(self) -> Path | None:
        """The registry's file in the data directory; None when models come from another one."""
        embedded = self.data_dir / "registry.db"
        return embedded if self.registry_uri == _sqlite(embedded) else None

    @property
    def own_folders(self) -> tuple[Path, ...]:
        """Where the platform keeps its own data; the rest of the data directory may hold files of models."""
        named = (self.data_dir / name for name in ("audit", "run", "secrets", "serving"))
        return (*named, *((self.audit_dir,) if self.audit_dir else ()), self.sockets)

    @property
    def has_reflection(self) -> bool:
        """Whether the public listener offers reflection."""
        return settings.is_loopback(self.listen) if self.reflection is None else self.reflection


def _sqlite(path: Path) -> str:
    return f"sqlite:///{path}"


def _together(*pair: tuple[str, object]) -> None:
    """Raises ValueError when one of two settings is there without the other."""
    (first, one), (second, other) = pair
    if (one is None) != (other is None):
        raise ValueError(f"{first} and {second} belong together: set both, or none.")


def own_environment() -> Mapping[str, str]:
    """This process's environment, from which the launcher and the registry helper each take their allowed part."""
    return os.environ
