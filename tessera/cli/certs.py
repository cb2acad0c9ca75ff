"""`tessera certs`: an authority and a certificate for each service, to try out services on different machines.

For trying, not for keeping: the authority's key lies in a file beside the certificates. What runs for good takes
certificates from an authority that guards its key and renews them, with the same URIs.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from servicekit import peers, private_file, settings
from servicekit.errors import StartError

SERVICES = ("gateway", "serving", "secrets")

_TRUST_DOMAIN = "tessera"
_HOURS = 24
_AUTHORITY_LIFE = timedelta(days=365)
_SKEW = timedelta(minutes=5)
"""How far back certificates begin, for machines whose clocks differ."""


@dataclass(frozen=True, slots=True)
class _Authority:
    cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def describe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "certs", help="make certificates with which services on different machines can be tried", description=__doc__
    )
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="gets a folder for each service, and `authority` with the key"
    )
    parser.add_argument(
        "--trust-domain",
        type=_trust_domain,
        metavar="NAME",
        help=f"of all of them (default: {_TRUST_DOMAIN}; with --renew that of the certificates that are there, which"
        " stays as it is)",
    )
    parser.add_argument(
        "--hours",
        type=_hours,
        help=f"that they last (default: {_HOURS}; with --renew as long as the certificates that are there)",
    )
    parser.add_argument(
        "--renew",
        action="store_true",
        help="replace the certificates by new ones of the authority that is there, of the same trust domain",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Makes or renews the set and prints where it is; nothing is overwritten unless it is renewed."""
    directory: Path = arguments.directory.absolute()
    os.umask(0o077)
    if arguments.renew:
        authority = _opened(directory)
        trust_domain, hours = _as_before(directory, arguments.trust_domain, arguments.hours)
    else:
        authority = _founded(directory)
        trust_domain, hours = arguments.trust_domain or _TRUST_DOMAIN, arguments.hours or _HOURS
    for name in SERVICES:
        uri = peers.spiffe_id(trust_domain, name)
        _issue(directory / name, authority, uri, timedelta(hours=hours))
        print(f"{directory / name}: peer.pem, peer.key and ca.pem for {uri}")
    print(
        f"They last {hours} hours; `tessera certs --renew {directory}` replaces them while services run, by some of the"
        " same trust domain that last as long."
    )
    return 0


def _as_before(directory: Path, trust_domain: str | None, hours: int | None) -> tuple[str, int]:
    """The trust domain of the certificates that are there, and how long they last unless something else is asked for.

    Services refuse a certificate of another trust domain than they were told, so none replaces those that are there.
    """
    found = [_described(path) for name in SERVICES if os.path.lexists(path := directory / name / "peer.pem")]
    domains = sorted({domain for domain, _ in found} | ({trust_domain} if trust_domain else set()))
    if not domains:
        raise StartError(
            f"No certificate in {directory} says of which trust domain it is; name it with --trust-domain."
        )
    if len(domains) > 1:
        raise StartError(
            f"Renewing changes no trust domain, and there is more than one: {', '.join(domains)}. Nothing is replaced;"
            " make a new set in another directory."
        )
    return domains[0], hours or min((lasting for _, lasting in found), default=_HOURS)


def _described(path: Path) -> tuple[str, int]:
    """The trust domain of a certificate of a set, and how many hours it was to last."""
    try:
        cert = x509.load_pem_x509_certificate(path.read_bytes())
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        domain = settings.trust_domain(uri.removeprefix("spiffe://").removesuffix(f"/svc/{path.parent.name}"))
    except (OSError, ValueError, x509.ExtensionNotFound):
        raise StartError(
            f"{path} is no certificate of such a set, so nothing is replaced; make a new set in another directory."
        ) from None
    return domain, max(1, round((cert.not_valid_after_utc - cert.not_valid_before_utc) / timedelta(hours=1)))


def _trust_domain(text: str) -> str:
    try:
        return settings.trust_domain(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is no name of a trust domain: {error}") from None


def _hours(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 24 * 365):
        raise argparse.ArgumentTypeError(f"{text} is no number of hours from 1 to {24 * 365}")
    return int(text)


def _founded(directory: Path) -> _Authority:
    names = [directory / "authority" / name for name in ("ca.pem", "ca.key")]
    names += [directory / service / name for service in SERVICES for name in ("peer.pem", "peer.key", "ca.pem")]
    if found := [str(path) for path in names if os.path.lexists(path)]:
        raise StartError(f"{found[0]} is there already, and nothing is overwritten; --renew replaces certificates.")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Tessera services, for trying")])
    cert = (
        _builder(name, name, key.public_key(), _AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(directory / "authority" / "ca.key", _key_pem(key))
    _write(directory / "authority" / "ca.pem", cert.public_bytes(serialization.Encoding.PEM))
    return _Authority(cert, key)


def _opened(directory: Path) -> _Authority:
    folder = directory / "authority"
    try:
        secret = private_file.read(folder / "ca.key", what="The authority's key", longest=1 << 20, may_be_link=False)
        cert = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        key = serialization.load_pem_private_key(secret, None)
    except (OSError, ValueError, TypeError):
        raise StartError(f"There is no authority in {folder} to renew certificates of; leave out --renew.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != cert.public_key():
        raise StartError(f"The key in {folder} is not the key of the authority beside it.")
    if cert.not_valid_after_utc <= datetime.now(UTC):
        raise StartError(f"The authority in {folder} has expired; make a new set in another directory.")
    return _Authority(cert, key)


def _issue(folder: Path, authority: _Authority, uri: str, lasting: timedelta) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name)])
    cert = (
        _builder(authority.cert.subject, name, key.public_key(), lasting)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    _write(folder / "ca.pem", authority.cert.public_bytes(serialization.Encoding.PEM))
    _write(folder / "peer.key", _key_pem(key))
    _write(folder / "peer.pem", cert.public_bytes(serialization.Encoding.PEM))


def _builder(
    issuer: x509.Name, subject: x509.Name, key: ec.EllipticCurvePublicKey, lasting: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key,
        serial_number=x509.random_serial_number(),
        not_valid_before=now - _SKEW,
        not_valid_after=now + lasting,
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes) -> None:
    """Puts a file in its place at once, for its owner alone: services may be looking at it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.new")
    staged.unlink(missing_ok=True)
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    staged.replace(path)
