"""Where the services listen: chosen once when the platform starts, and kept when a service is started again."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from servicekit.errors import StartError

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """`host:port` of each service's public listener."""

    gateway: str
    secrets: str
    serving: str
    has_tls: bool = False

    @property
    def url(self) -> str:
        """The base URL of the REST API as seen from this machine."""
        return f"{'https' if self.has_tls else 'http'}://{reachable(self.gateway)}"


def reachable(address: str) -> str:
    """The address to call for one to listen on: who listens everywhere is called on loopback."""
    host, _, port = address.rpartition(":")
    return f"{_EVERYWHERE.get(host, host)}:{port}"


def chosen(host: str, ports: Mapping[str, int], *, has_tls: bool = False) -> Addresses:
    """Checks that each port of `host` is free, and finds a free one where 0 is given.

    Raises StartError naming all that are not.
    """
    problems = []
    numbers = {}
    with contextlib.ExitStack() as stack:
        # All are held until all are chosen: two searches for a free port must not find the same one.
        for name, port in ports.items():
            try:
                numbers[name] = stack.enter_context(_bound(host, port))
            except OSError as error:
                used = error.errno == errno.EADDRINUSE
                flag = "--port" if name == "gateway" else f"--{name}-port"
                problems.append(
                    f"port {port} on {host} is in use; choose another with {flag}"
                    if used
                    else f"cannot listen on port {port} of {host}: {error.strerror}"
                )
    if problems:
        raise StartError("; ".join(problems))
    name_of_host = f"[{host}]" if ":" in host else host
    return Addresses(**{name: f"{name_of_host}:{number}" for name, number in numbers.items()}, has_tls=has_tls)


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[int]:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        # As the services do: a port that only waits for its last connections to fade is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
        yield int(probe.getsockname()[1])
