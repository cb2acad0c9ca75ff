"""Certificates in files, read again when these change; and the one that the public listeners show.

The rule: what is shown is a pair that was checked, always. A pair that is broken stops a start; while the service runs,
the one before goes on and the log says why. A connection keeps the certificate that it began with. The key is in no
log, no error and no file but its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from servicekit import background, private_file
from servicekit.errors import StartError
from servicekit.settings import ServiceSettings

log = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_SECONDS = 1.0
"""How often the files are looked at."""

LONGEST_FILE = 1 << 20
"""Bytes that are read of a file."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate with its chain, and its key: PEM, checked to belong together."""

    chain: bytes
    key: bytes = field(repr=False)
    leaf: x509.Certificate
    files: tuple[Path, Path]

    @property
    def expires(self) -> datetime:
        return self.leaf.not_valid_after_utc

    def context(self, protocol: ssl._SSLMethod) -> ssl.SSLContext:
        """A context that shows the pair; raises StartError when it is none."""
        cert, key = self.files
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # The bytes that were checked, not the files, which may be others by now.
        with _in_memory(self.chain) as chain_file, _in_memory(self.key) as key_file:
            try:
                # With a password of its own it never asks for one at the terminal.
                context.load_cert_chain(chain_file, key_file, password="")
            except (ssl.SSLError, ValueError) as error:
                mismatch = getattr(error, "reason", None) == "KEY_VALUES_MISMATCH"
                cause = (
                    f"is not the key of the certificate {cert}"
                    if mismatch
                    else "is no key in PEM form without a password"
                )
                raise StartError(f"The TLS key {key} {cause}.") from None
        return context


class Followed(Generic[T]):
    """What files hold that were last right: `current` changes when they do.

    `read` raises StartError when the files are not right, and `expires` tells when what it read does.
    """

    def __init__(self, files: Sequence[Path], read: Callable[[], T], expires: Callable[[T], datetime]) -> None:
        """Reads the files; raises StartError."""
        self._files = files
        self._read = read
        self._expires = expires
        # Before they are read: a change in between is a change that the next look sees.
        self._seen = self._stamps()
        self.current = read()

    async def follow(self) -> None:
        """Looks at the files for ever."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.look()

    def look(self) -> None:
        """Takes over what the files hold if they have changed and are right; logs what became of it."""
        stamps = self._stamps()
        if stamps == self._seen:
            return
        self._seen = stamps
        try:
            self.current = self._read()
        except StartError as error:
            log.error("new certificate refused, the old one goes on", extra={"cause": str(error)})
        else:
            log.info("certificate renewed", extra={"expires": self._expires(self.current).isoformat()})

    def _stamps(self) -> list[tuple[int, ...]]:
        return [_stamp(path) for path in self._files]


@dataclass(frozen=True, slots=True)
class _Shown:
    pair: Pair
    context: ssl.SSLContext


class Certificate:
    """What public listeners prove themselves with: the pair that the files held when they were last right."""

    def __init__(self, cert: Path, key: Path) -> None:
        """Reads the files; raises StartError when they are not a pair that clients could accept."""

        def read() -> _Shown:
            pair = read_pair(cert, key, variables=("TESSERA_TLS_CERT", "TESSERA_TLS_KEY"))
            return _Shown(pair, pair.context(ssl.PROTOCOL_TLS_SERVER))

        self._shown = Followed((cert, key), read, lambda shown: shown.pair.expires)
        self.follow = self._shown.follow

    @property
    def http_context(self) -> ssl.SSLContext:
        """For an HTTP server; each new connection is shown the pair of that moment."""
        # Loading another pair into a context that is in use would keep the old one beside it if its key is of another
        # kind, and clients may then choose the old one. So each handshake moves on to the newest pair's own context.
        context = self._shown.current.context
        context.sni_callback = self._hand_over
        return context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server; each new connection is shown the pair of that moment."""
        served = self._shown.current.pair

        def renewed() -> Any:
            nonlocal served
            if self._shown.current.pair is served:
                return None
            served = self._shown.current.pair
            return _configuration(served)

        return grpc.dynamic_ssl_server_credentials(_configuration(served), renewed)

    def _hand_over(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._shown.current.context


@asynccontextmanager
async def followed(settings: ServiceSettings) -> AsyncIterator[Certificate | None]:
    """The certificate that a service is configured with, followed until left; None when it has none.

    Raises StartError when it is not right.
    """
    certificate = configured(settings)
    if certificate is None:
        yield None
        return
    async with background.running({"certificate": certificate.follow}):
        yield certificate


def configured(settings: ServiceSettings) -> Certificate | None:
    """The certificate as it is now, or None; raises StartError when it is not right."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return Certificate(settings.tls_cert, settings.tls_key)


def read_pair(cert: Path, key: Path, *, variables: tuple[str, str]) -> Pair:
    """The pair in two files, which `variables` name; raises StartError when they hold none that is good today."""
    chain = read_certificates(cert, variable=variables[0])
    try:
        # Links are how tools that renew certificates put new ones in place.
        secret = private_file.read(key, what="The TLS key", longest=LONGEST_FILE, may_be_link=True)
    except FileNotFoundError:
        raise StartError(f"The TLS key {key} is missing: see {variables[1]}.") from None
    leaf = parsed(cert, chain)[0]
    if not isinstance(leaf.public_key(), (rsa.RSAPublicKey, ec.EllipticCurvePublicKey)):
        raise StartError(f"The certificate {cert} has a key of a kind that not all clients know; use RSA or ECDSA.")
    pair = Pair(chain, secret, leaf, (cert, key))
    if pair.expires <= datetime.now(UTC):
        raise StartError(f"The certificate {cert} expired at {pair.expires.isoformat()}; renew it.")
    return pair


def read_certificates(cert: Path, *, variable: str) -> bytes:
    """The content of a file of certificates, which `variable` names; raises StartError."""
    try:
        with cert.open("rb") as file:
            return file.read(LONGEST_FILE)
    except OSError as error:
        raise StartError(f"The certificate {cert} cannot be read ({error.strerror}): see {variable}.") from None


def parsed(cert: Path, content: bytes) -> list[x509.Certificate]:
    """The certificates in PEM, one at least; raises StartError, which names their file."""
    try:
        found = x509.load_pem_x509_certificates(content)
        found[0].public_key()
    except Exception:  # whatever the library makes of a broken file
        raise StartError(f"The certificate {cert} holds no certificate in PEM form.") from None
    return found


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """A name for bytes, for a library that takes only names; they never reach a disk."""
    descriptor = os.memfd_create("tls", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _configuration(pair: Pair) -> Any:
    return grpc.ssl_server_certificate_configuration([(pair.key, pair.chain)])


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
