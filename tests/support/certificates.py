"""A certificate authority for a test, and what its clients need to see through TLS."""

from __future__ import annotations

import ipaddress
import os
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey

_DAY = timedelta(days=1)


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, as PEM."""

    serial: int
    cert: bytes
    key: bytes


class Files:
    """The two files that a service is told about."""

    def __init__(self, directory: Path) -> None:
        self.cert = directory / "tls.crt"
        self.key = directory / "tls.key"

    def hold(self, cert: bytes, key: bytes, *, mode: int = 0o600) -> None:
        """Replaces the content of both, each at once."""
        _replace(self.cert, cert, 0o644)
        _replace(self.key, key, mode)

    def settings(self) -> dict[str, Any]:
        """The settings that name them."""
        return {"tls_cert": self.cert, "tls_key": self.key}


class PeerFiles:
    """The three files that a service is told about for its peers on other machines."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.cert, self.key, self.ca = (directory / name for name in ("peer.pem", "peer.key", "ca.pem"))

    def hold(self, issued: Issued, *authorities: CertificateAuthority) -> Self:
        """Replaces the content of all, each at once."""
        _replace(self.ca, b"".join(authority.pem for authority in authorities), 0o644)
        _replace(self.cert, issued.cert, 0o644)
        _replace(self.key, issued.key, 0o600)
        return self

    def settings(self) -> dict[str, Any]:
        """The settings that name them."""
        return {"peer_cert": self.cert, "peer_key": self.key, "peer_ca": self.ca}

    def environment(self) -> dict[str, str]:
        """The variables that name them."""
        return {f"TESSERA_{name.upper()}": str(path) for name, path in self.settings().items()}


class CertificateAuthority:
    """Issues certificates: for this machine's loopback, and for services as each other's peers."""

    def __init__(self) -> None:
        self._key = new_key()
        self._name = _name("test authority")
        builder = self._builder(self._name, self._key, _DAY)
        self._cert = builder.add_extension(x509.BasicConstraints(True, None), True).sign(self._key, hashes.SHA256())

    @property
    def pem(self) -> bytes:
        """The root that clients trust."""
        return self._cert.public_bytes(serialization.Encoding.PEM)

    def client_context(self, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
        """For a client that trusts nobody else, and speaks this version and older ones."""
        context = ssl.create_default_context(cadata=self.pem.decode())
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.maximum_version = version
        return context

    def issue(self, key: Key | None = None, *, lasting: timedelta = _DAY) -> Issued:
        """A certificate for localhost and 127.0.0.1, of a new ECDSA key unless one is given."""
        key = key or new_key()
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = self._builder(_name("localhost"), key, lasting)
        cert = builder.add_extension(x509.SubjectAlternativeName(names), False).sign(self._key, hashes.SHA256())
        return Issued(cert.serial_number, cert.public_bytes(serialization.Encoding.PEM), key_pem(key))

    def issue_peer(self, *uris: str, lasting: timedelta = _DAY, is_authority: bool = False) -> Issued:
        """A certificate that bears these URIs; a name alone is the service of that name in the usual domain."""
        key = new_key()
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(uri if ":" in uri else f"spiffe://tessera/svc/{uri}") for uri in uris
        ]
        names = names or [x509.DNSName("localhost")]
        builder = self._builder(_name("peer"), key, lasting)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        if is_authority:
            builder = builder.add_extension(x509.BasicConstraints(True, None), True)
        cert = builder.sign(self._key, hashes.SHA256())
        return Issued(cert.serial_number, cert.public_bytes(serialization.Encoding.PEM), key_pem(key))

    def _builder(self, subject: x509.Name, key: Key, lasting: timedelta) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return x509.CertificateBuilder(
            issuer_name=self._name,
            subject_name=subject,
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - 2 * _DAY,
            not_valid_after=now + lasting,
        )


def new_key() -> ec.EllipticCurvePrivateKey:
    """A key of the kind that is made fastest."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: Key, password: bytes | None = None) -> bytes:
    """A private key as PEM, encrypted if there is a password."""
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _replace(path: Path, content: bytes, mode: int) -> None:
    staged = path.with_suffix(".new")
    staged.unlink(missing_ok=True)
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    staged.chmod(mode)
    staged.replace(path)
