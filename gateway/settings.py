"""What the gateway can be told."""

from __future__ import annotations

from dataclasses import dataclass

from servicekit.settings import ServiceSettings, address, calls, count, metrics_listen, origin, remote, seconds, setting


@dataclass(frozen=True, kw_only=True)
class GatewaySettings(ServiceSettings):
    """Where the gateway listens and what it allows."""

    listen: str = setting(
        "TESSERA_GATEWAY_LISTEN", address, default="127.0.0.1:8080", help="host:port of the REST API."
    )
    secrets_address: str = remote("TESSERA_SECRETS_ADDRESS", "Secrets")
    serving_address: str = remote("TESSERA_SERVING_ADDRESS", "Serving")
    metrics_listen: str = metrics_listen("TESSERA_GATEWAY_METRICS_LISTEN")
    calls: int = calls()
    public_url: str = setting(
        "TESSERA_PUBLIC_URL",
        origin,
        default="",
        help="The address that clients reach the REST API under; by default the one that it listens on.",
    )
    inference_deadline: float = setting(
        "TESSERA_INFERENCE_DEADLINE_SECONDS",
        seconds,
        default=597.0,
        help="Seconds that one inference may take, from connecting to the last byte of the answer.",
    )
    inference_body_limit: int = setting(
        "TESSERA_INFERENCE_BODY_LIMIT",
        count,
        default=16 * 1024 * 1024,
        help="Bytes that the body of an inference may have.",
    )
    queue_length: int = setting(
        "TESSERA_QUEUE_LENGTH",
        count,
        default=100,
        help="How many requests may wait for one served entity whose replicas are busy or not up yet.",
    )
    queue_seconds: float = setting(
        "TESSERA_QUEUE_SECONDS",
        seconds,
        default=50.0,
        help="Seconds that a request may wait for a replica; most clients give up after 60.",
    )
    stale_identity_seconds: float = setting(
        "TESSERA_STALE_IDENTITY_SECONDS",
        seconds,
        default=3600.0,
        help="Seconds for which a caller that was verified before may go on with inference while Secrets does not"
        " answer; 0 refuses at once.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_plaintext("TESSERA_GATEWAY_LISTEN", self.listen)
        self.refuse_unproven("TESSERA_SECRETS_ADDRESS", self.secrets_address)
        self.refuse_unproven("TESSERA_SERVING_ADDRESS", self.serving_address)
        self.refuse_open_metrics("TESSERA_GATEWAY_METRICS_LISTEN", self.metrics_listen)
