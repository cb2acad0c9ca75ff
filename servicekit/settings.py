"""Settings: environment variables read once, at start, into a frozen dataclass.

This is the only module that reads the environment. A settings class describes each field with `setting(...)`; the same
description checks the value, prints `--help` and fills the documentation. All mistakes are reported at once, so that a
person corrects a configuration in one go.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from servicekit import sockets
from servicekit.audit_files import FileSink
from servicekit.audit_forward import FileForwarder, Forwarder, SyslogForwarder
from servicekit.source import Network, networks

S = TypeVar("S")


class SettingsError(Exception):
    """Some settings are missing or wrong; `problems` has one line for each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def setting(
    variable: str,
    parse: Callable[[str], Any],
    *,
    help: str,
    default: Any = dataclasses.MISSING,
) -> Any:
    """A field of a settings class: read from `variable` by `parse`, which raises ValueError with what it expected.

    A `default` that is a function is called when settings are loaded, and may raise ValueError too.
    """
    metadata = {"variable": variable, "parse": parse, "help": help}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def load(cls: type[S], environ: Mapping[str, str] | None = None) -> S:
    """Builds a settings object from the environment; raises SettingsError naming every variable that is wrong.

    What a class checks across its fields comes after that: it needs values that are each right.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    problems: list[str] = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        variable = field.metadata["variable"]
        text = environ.get(variable, "")
        if text == "":
            if _is_required(field):
                problems.append(f"{variable} is not set. It says: {field.metadata['help']}")
            continue
        try:
            values[field.name] = field.metadata["parse"](text)
        except ValueError as error:
            problems.append(f"{variable} is not right: {error}")
    if problems:
        raise SettingsError(problems)
    try:
        return cls(**values)
    except ValueError as error:
        raise SettingsError([str(error)]) from None


def described(cls: type[Any]) -> str:
    """The settings of a class as text for `--help`: variable, default and meaning."""
    return "\n".join(
        f"  {field.metadata['variable']}  ({_default(field)})\n      {field.metadata['help']}"
        for field in dataclasses.fields(cls)
    )


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> str:
    if _is_required(field):
        return "required"
    if field.default_factory is not dataclasses.MISSING:
        return f"default: {field.default_factory()}"
    if isinstance(field.default, range):
        return f"default: {field.default[0]}-{field.default[-1]}"
    return "optional" if field.default in (None, "", ()) else f"default: {field.default}"


def default_data_dir() -> Path:
    """The user's own data directory for Tessera, after the XDG base directory specification.

    Raises ValueError for a user without a home directory.
    """
    chosen = os.environ.get("XDG_DATA_HOME", "")
    if Path(chosen).is_absolute():
        return Path(chosen) / "tessera"
    try:
        return Path.home() / ".local" / "share" / "tessera"
    except RuntimeError:
        raise ValueError("TESSERA_DATA_DIR is not set, and this user has no home directory.") from None


def boolean(text: str) -> bool:
    """`true` or `false`."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise ValueError("expected true or false")


def seconds(text: str) -> float:
    """A length of time in seconds, zero or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise ValueError("expected a number of seconds")
    return value


def ratio(text: str) -> float:
    """A number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise ValueError("expected a number from 0 to 1")
    return number


def count(text: str) -> int:
    """A whole number, zero or more."""
    if not (text.isascii() and text.isdigit()):
        raise ValueError("expected a whole number")
    return int(text)


def numbers(text: str) -> range:
    """Two whole numbers with `-` between: the first and the last of a range."""
    first, dash, last = text.partition("-")
    found = range(count(first), count(last) + 1) if dash else range(0)
    if not found:
        raise ValueError("expected two whole numbers, such as 200000-209999")
    return found


def directory(text: str) -> Path:
    """An absolute path of a directory; `~` is the home directory."""
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise ValueError("expected a directory; the home directory that it begins with is not known") from None


def file(text: str) -> Path:
    """An absolute path of a file; `~` is the home directory."""
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise ValueError("expected a file; the home directory that it begins with is not known") from None


def one_of(*choices: str) -> Callable[[str], str]:
    """One of the given words, in any letter case."""

    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return text.lower()

    return parse


def address(text: str) -> str:
    """`host:port` to listen on; port 0 lets the system choose."""
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 65536):
        raise ValueError("expected host:port, such as 127.0.0.1:8080")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError("expected host:port with brackets around an IPv6 address, such as [::1]:8080")
    return text


def peer_address(text: str) -> str:
    """`host:port` of a service on another machine."""
    if address(text).endswith(":0"):
        raise ValueError("expected the port that the service listens on for peers")
    return text


def trust_domain(text: str) -> str:
    """The name of a trust domain, after the SPIFFE specification."""
    if not re.fullmatch(r"[a-z0-9._-]{1,255}", text):
        raise ValueError("expected lower case letters, digits, `.`, `_` and `-`, such as tessera.example.com")
    return text


def metrics_address(text: str) -> str:
    """Where metrics are told: as `address`, or `unix:/path`."""
    return text if text.startswith("unix:/") else address(text)


def destination(text: str) -> str:
    """Where records go: `unix:/path` of a datagram socket, `tcp:host:port`, or `dir:/path`."""
    kind, _, place = text.partition(":")
    if kind == "tcp":
        return f"tcp:{peer_address(place)}"
    if kind not in ("unix", "dir") or not place.startswith("/"):
        raise ValueError("expected unix:/dev/log, tcp:127.0.0.1:601 or dir:/another/disk")
    return text


def remote(variable: str, name: str) -> Any:
    """The field of a settings class that says where another service is."""
    return setting(
        variable,
        peer_address,
        default="",
        help=f"host:port at which {name} lets in services of other machines. Not set: it is on this machine, and is"
        " reached through a socket.",
    )


def peer_listen(variable: str, names: str) -> Any:
    """The field of a settings class that says where services of other machines are let in."""
    return setting(
        variable,
        address,
        default="",
        help=f"host:port at which {names} on another machine may call, over TLS that proves both sides. Not set: none.",
    )


def calls() -> Any:
    """The field of a settings class that says how much is done at a time."""
    return setting(
        "TESSERA_CALLS",
        count,
        default=200,
        help="How many calls are answered at a time by each listener, of each kind (of callers, of the other services,"
        " health checks); more are answered 429. Queries of models have queues of their own. 0: any number.",
    )


def changes() -> Any:
    """The field of a settings class that says how fast one principal may change things."""
    return setting(
        "TESSERA_CHANGES_PER_SECOND",
        count,
        default=50,
        help="How many changes one user or service principal may make in a second, and twice as many at once; more are"
        " answered 429. Reads are not counted. 0: any number.",
    )


def metrics_listen(variable: str) -> Any:
    """The field of a settings class that says where the service tells its own metrics."""
    return setting(
        variable,
        metrics_address,
        default="",
        help="Where this service tells its own metrics, at GET /metrics, to whoever asks: host:port or unix:/path. Not"
        " set: nowhere.",
    )


def origin(text: str) -> str:
    """The address of a server, such as https://tessera.example.com, without a slash at its end."""
    if not text.startswith(("http://", "https://")):
        raise ValueError("expected an address that begins with http:// or https://")
    return text.rstrip("/")


def url(text: str) -> str:
    """Where something is sent by HTTP, without a user in it."""
    try:
        parts = urlsplit(text)
        has_port = parts.port != 0  # raises for what is none
    except ValueError:
        has_port = False
    is_url = has_port and parts.scheme in ("http", "https") and parts.hostname is not None
    if not is_url or parts.username is not None or parts.fragment or not text.isascii() or not text.isprintable():
        raise ValueError("expected an address that begins with http:// or https://, without user and fragment")
    return text


def is_loopback(listen: str) -> bool:
    """Whether `host:port` is reachable from this machine only."""
    host = listen.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """What every service can be told."""

    data_dir: Path = setting(
        "TESSERA_DATA_DIR",
        directory,
        default=default_data_dir,
        help="Directory of all data; made when it is not there.",
    )
    socket_dir: Path | None = setting(
        "TESSERA_SOCKET_DIR",
        directory,
        default=None,
        help="Directory of the internal sockets, mode 0700; by default it follows from the data directory.",
    )
    log_level: str = setting(
        "TESSERA_LOG_LEVEL",
        one_of("debug", "info", "warning", "error"),
        default="info",
        help="Which events are logged: debug, info, warning or error. Requests that succeed are logged at debug.",
    )
    drain_seconds: float = setting(
        "TESSERA_DRAIN_SECONDS",
        seconds,
        default=25.0,
        help="How many seconds calls under way may take to finish when the service is told to end; whoever tells it"
        " should wait 5 longer before it is killed. `tessera up` gives its services 5.",
    )
    supervised: bool = setting(
        "TESSERA_SUPERVISED",
        boolean,
        default=False,
        help="Whether to end when standard input closes, as it does when the supervisor is gone.",
    )
    allow_plaintext: bool = setting(
        "TESSERA_ALLOW_PLAINTEXT_BEYOND_LOOPBACK",
        boolean,
        default=False,
        help="Whether a listener without TLS may listen beyond loopback. Only behind something that encrypts.",
    )
    tls_cert: Path | None = setting(
        "TESSERA_TLS_CERT",
        file,
        default=None,
        help="PEM file with the certificate that the public listener shows, and those that lead to its root; followed"
        " when it changes. Not set: no TLS.",
    )
    tls_key: Path | None = setting(
        "TESSERA_TLS_KEY",
        file,
        default=None,
        help="PEM file with the certificate's key (RSA or ECDSA, not encrypted), mode 0600 or 0400.",
    )
    peer_cert: Path | None = setting(
        "TESSERA_PEER_CERT",
        file,
        default=None,
        help="PEM file with the certificate that this service shows to services on other machines; followed when it"
        " changes. Its one URI is spiffe://TRUST_DOMAIN/svc/NAME, with gateway, serving or secrets for NAME.",
    )
    peer_key: Path | None = setting(
        "TESSERA_PEER_KEY",
        file,
        default=None,
        help="PEM file with that certificate's key, mode 0600 or 0400.",
    )
    peer_ca: Path | None = setting(
        "TESSERA_PEER_CA",
        file,
        default=None,
        help="PEM file with the authorities that issue certificates to services, and to nobody else.",
    )
    peer_trust_domain: str = setting(
        "TESSERA_PEER_TRUST_DOMAIN",
        trust_domain,
        default="tessera",
        help="The trust domain that all services of this platform are in, and no others.",
    )

    trusted_proxies: tuple[Network, ...] = setting(
        "TESSERA_TRUSTED_PROXIES",
        networks,
        default=(),
        help="Addresses and networks, with commas between, of proxies whose X-Forwarded-For and X-Forwarded-Proto are"
        " believed when a source is logged. Not set: nobody's are.",
    )

    failed_logins: int = setting(
        "TESSERA_FAILED_LOGINS_PER_MINUTE",
        count,
        default=10,
        help="How many wrong credentials of one address are answered as such in a minute, and twice as many at once;"
        " beyond that they are answered 429. A good one is taken at any time. 0: any number.",
    )

    otlp_endpoint: str | None = setting(
        "TESSERA_OTLP_ENDPOINT",
        origin,
        default=None,
        help="Address of the OpenTelemetry collector that traces are sent to over OTLP and gRPC, such as"
        " http://127.0.0.1:4317. Not set: there are no traces.",
    )
    trace_ratio: float = setting(
        "TESSERA_TRACE_RATIO",
        ratio,
        default=1.0,
        help="How many of the traces that begin here are sent: 0 to 1. For others their callers say so.",
    )
    open_metrics: bool = setting(
        "TESSERA_METRICS_BEYOND_LOOPBACK",
        boolean,
        default=False,
        help="Whether the service's own metrics, which take no credential, may be told to other machines.",
    )

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TESSERA_TLS_CERT and TESSERA_TLS_KEY belong together: set both, or none.")
        if len({file is None for file in (self.peer_cert, self.peer_key, self.peer_ca)}) > 1:
            raise ValueError(
                "TESSERA_PEER_CERT, TESSERA_PEER_KEY and TESSERA_PEER_CA belong together: set all three, or none."
            )

    @property
    def has_tls(self) -> bool:
        """Whether the public listener speaks TLS."""
        return self.tls_cert is not None

    @property
    def sockets(self) -> Path:
        """The directory of the internal sockets, made if need be; raises StartError when it is not ours alone."""
        return sockets.socket_directory(self.data_dir, self.socket_dir)

    def refuse_unproven(self, variable: str, address: str) -> None:
        """Raises ValueError when peers on other machines are at `address` and there is nothing to know them by."""
        if address and self.peer_cert is None:
            raise ValueError(
                f"{variable} is {address}, and services on different machines know each other by certificates. Set"
                " TESSERA_PEER_CERT, TESSERA_PEER_KEY and TESSERA_PEER_CA; `tessera certs` makes a set to try it with."
            )

    def refuse_open_metrics(self, variable: str, listen: str) -> None:
        """Raises ValueError when other machines can reach `listen` and nobody allowed that."""
        if listen and not (listen.startswith("unix:") or is_loopback(listen) or self.open_metrics):
            raise ValueError(
                f"{variable} is {listen}, which other machines can reach, and metrics take no credential. Listen on"
                " 127.0.0.1 or unix:/path, or set TESSERA_METRICS_BEYOND_LOOPBACK=true."
            )

    def refuse_plaintext(self, variable: str, listen: str) -> None:
        """Raises ValueError when other machines can reach `listen` without TLS and nobody allowed that."""
        if not (self.has_tls or self.allow_plaintext or is_loopback(listen)):
            raise ValueError(
                f"{variable} is {listen}, which other machines can reach, and this listener has no TLS: tokens would"
                " travel in clear. Set TESSERA_TLS_CERT and TESSERA_TLS_KEY, or listen on 127.0.0.1, or set"
                " TESSERA_ALLOW_PLAINTEXT_BEYOND_LOOPBACK=true if something in front of it encrypts."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditedSettings(ServiceSettings):
    """What a service that keeps an audit log can be told besides."""

    audit_dir: Path | None = setting(
        "TESSERA_AUDIT_DIR",
        directory,
        default=None,
        help="Directory of the audit log's files, mode 0700; audit in the data directory by default.",
    )
    audit_file_mib: int = setting(
        "TESSERA_AUDIT_FILE_MIB",
        count,
        default=64,
        help="From how many MiB on a file of the audit log is followed by another.",
    )
    audit_keep_mib: int = setting(
        "TESSERA_AUDIT_KEEP_MIB",
        count,
        default=4096,
        help="How many MiB of the audit log each service keeps; the oldest files go first.",
    )
    audit_keep_days: int = setting(
        "TESSERA_AUDIT_KEEP_DAYS", count, default=365, help="For how many days files of the audit log are kept."
    )
    audit_forward: str = setting(
        "TESSERA_AUDIT_FORWARD",
        destination,
        default="",
        help="Who gets the audit records besides: unix:/dev/log or tcp:HOST:PORT, which speaks syslog, or"
        " dir:/another/disk. While they are not taken there, what must be recorded is refused. Not set: nobody.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        kind, _, place = self.audit_forward.partition(":")
        if kind == "tcp" and not (self.allow_plaintext or is_loopback(place)):
            raise ValueError(
                f"TESSERA_AUDIT_FORWARD is {self.audit_forward}, another machine, and syslog over TCP travels in clear."
                " Name a syslog server of this machine that passes records on over TLS, or set"
                " TESSERA_ALLOW_PLAINTEXT_BEYOND_LOOPBACK=true if something in between encrypts."
            )

    def audit_forwarder(self, service: str) -> Forwarder | None:
        """Who gets the audit records of a service besides, if anybody does."""
        kind, _, place = self.audit_forward.partition(":")
        match kind:
            case "dir":
                return FileForwarder(Path(place) / f"{service}.jsonl")
            case "unix":
                return SyslogForwarder(service, place)
            case "tcp":
                host, _, port = place.rpartition(":")
                return SyslogForwarder(service, (host.strip("[]"), int(port)))
        return None

    def audit_sink(self, service: str) -> FileSink:
        """Where the audit log of a service is kept."""
        return FileSink(
            self.audit_dir or self.data_dir / "audit",
            service,
            file_bytes=self.audit_file_mib << 20,
            keep_bytes=self.audit_keep_mib << 20,
            keep_seconds=self.audit_keep_days * 86_400.0,
        )
