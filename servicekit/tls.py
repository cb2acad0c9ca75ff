"""The certificate of the public listeners, read from two files and read again when they change.

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
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from servicekit import background, private_file
from servicekit.errors import StartError
from servicekit.settings import ServiceSettings

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often the files are looked at."""

LONGEST_FILE = 1 << 20
"""Bytes that are read of a file."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """A certificate with its chain, and its key: PEM, checked to belong together."""

    chain: bytes
    key: bytes = field(repr=False)
    context: ssl.SSLContext
    expires: datetime


class Certificate:
    """What listeners prove themselves with: the pair that the files held when they were last right."""

    def __init__(self, cert: Path, key: Path) -> None:
        """Reads the files; raises StartError when they are not a pair that clients could accept."""
        self._files = (cert, key)
        # Before they are read: a change in between is a change that the next look sees.
        self._seen = self._stamps()
        self._pair = _read(cert, key)

    @property
    def http_context(self) -> ssl.SSLContext:
        """For an HTTP server; each new connection is shown the pair of that moment."""
        # Loading another pair into a context that is in use would keep the old one beside it if its key is of another
        # kind, and clients may then choose the old one. So each handshake moves on to the newest pair's own context.
        context = self._pair.context
        context.sni_callback = self._hand_over
        return context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server; each new connection is shown the pair of that moment."""
        served = self._pair

        def renewed() -> Any:
            nonlocal served
            if self._pair is served:
                return None
            served = self._pair
            return _configuration(served)

        return grpc.dynamic_ssl_server_credentials(_configuration(served), renewed)

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
            self._pair = _read(*self._files)
        except StartError as error:
            log.error("new certificate refused, the old one goes on", extra={"cause": str(error)})
        else:
            log.info("certificate renewed", extra={"expires": self._pair.expires.isoformat()})

    def _hand_over(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._pair.context

    def _stamps(self) -> list[tuple[int, ...]]:
        return [_stamp(path) for path in self._files]


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


def _read(cert: Path, key: Path) -> _Pair:
    try:
        with cert.open("rb") as file:
            chain = file.read(LONGEST_FILE)
    except OSError as error:
        raise StartError(f"The certificate {cert} cannot be read ({error.strerror}): see TESSERA_TLS_CERT.") from None
    try:
        # Links are how tools that renew certificates put new ones in place.
        secret = private_file.read(key, what="The TLS key", longest=LONGEST_FILE, may_be_link=True)
    except FileNotFoundError:
        raise StartError(f"The TLS key {key} is missing: see TESSERA_TLS_KEY.") from None
    try:
        leaf = x509.load_pem_x509_certificates(chain)[0]
        is_usable = isinstance(leaf.public_key(), (rsa.RSAPublicKey, ec.EllipticCurvePublicKey))
    except Exception:  # whatever the library makes of a broken file
        raise StartError(f"The certificate {cert} holds no certificate in PEM form.") from None
    if not is_usable:
        raise StartError(f"The certificate {cert} has a key of a kind that not all clients know; use RSA or ECDSA.")
    expires = leaf.not_valid_after_utc
    if expires <= datetime.now(UTC):
        raise StartError(f"The certificate {cert} expired at {expires.isoformat()}; renew it.")
    return _Pair(chain, secret, _context(cert, key, chain, secret), expires)


def _context(cert: Path, key: Path, chain: bytes, secret: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # The bytes that were checked, not the files, which may be others by now.
    with _in_memory(chain) as chain_file, _in_memory(secret) as key_file:
        try:
            # With a password of its own it never asks for one at the terminal.
            context.load_cert_chain(chain_file, key_file, password="")
        except (ssl.SSLError, ValueError) as error:
            mismatch = getattr(error, "reason", None) == "KEY_VALUES_MISMATCH"
            cause = (
                f"is not the key of the certificate {cert}" if mismatch else "is no key in PEM form without a password"
            )
            raise StartError(f"The TLS key {key} {cause}.") from None
    return context


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """A name for bytes, for a library that takes only names; they never reach a disk."""
    descriptor = os.memfd_create("tls", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _configuration(pair: _Pair) -> Any:
    return grpc.ssl_server_certificate_configuration([(pair.key, pair.chain)])


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
