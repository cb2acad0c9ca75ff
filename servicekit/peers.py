"""Who a peer on another machine is: what its certificate says in its one URI, once the certificate is verified.

The rule: a peer is `spiffe://<trust domain>/svc/<name>`, whole and exactly, in a certificate that an authority of ours
issued to it and that is good now. Host names and addresses mean nothing: machines are renamed and copied. Both sides
look at each other so. Files are followed (`servicekit.tls`), so what is renewed counts for the next connection.
"""

from __future__ import annotations

import logging
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from cryptography import x509

from servicekit import background, tls
from servicekit.errors import StartError
from servicekit.settings import ServiceSettings

log = logging.getLogger(__name__)

LONGEST_LIFE = timedelta(hours=24)
"""How long a certificate should last: there are no revocations, so a stolen key is good until then."""

_CERT, _KEY, _CA = "TESSERA_PEER_CERT", "TESSERA_PEER_KEY", "TESSERA_PEER_CA"


class PeerRefused(Exception):
    """A peer is not who it has to be; the text says why, in words that may be logged."""


def spiffe_id(trust_domain: str, name: str) -> str:
    """The URI of the service `name`."""
    return f"spiffe://{trust_domain}/svc/{name}"


@dataclass(frozen=True, slots=True)
class _Identity:
    pair: tls.Pair
    as_server: ssl.SSLContext
    as_client: ssl.SSLContext


class PeerCertificate:
    """What this service proves itself with to its peers, and what it knows them by."""

    def __init__(self, cert: Path, key: Path, ca: Path, *, name: str, trust_domain: str) -> None:
        """`name` is this service's own. Raises StartError when the files hold no pair that says so."""
        self._trust_domain = trust_domain

        def read() -> _Identity:
            return _read(cert, key, ca, own=spiffe_id(trust_domain, name))

        self._identity = tls.Followed((cert, key, ca), read, lambda identity: identity.pair.expires)
        self.follow = self._identity.follow

    @property
    def as_server(self) -> ssl.SSLContext:
        """For the next connection that a peer opens: it must show a certificate of our authority."""
        return self._identity.current.as_server

    @property
    def as_client(self) -> ssl.SSLContext:
        """For the next connection to a peer."""
        return self._identity.current.as_client

    def name_of(self, connection: ssl.SSLObject) -> str:
        """The name of the service at the other end of a connection whose handshake is over; raises PeerRefused."""
        shown = connection.getpeercert(binary_form=True)
        if shown is None:
            raise PeerRefused("it showed no certificate")
        uri = _uri(x509.load_der_x509_certificate(shown))
        name = uri.removeprefix(spiffe_id(self._trust_domain, ""))
        if uri != spiffe_id(self._trust_domain, name) or not re.fullmatch("[a-z]+", name):
            # As it was in the certificate, which an authority of ours signed: no stranger chose it.
            raise PeerRefused(f"it is {uri[:300]}, which is no service of {self._trust_domain}")
        return name


@asynccontextmanager
async def followed(settings: ServiceSettings, name: str) -> AsyncIterator[PeerCertificate | None]:
    """What the service `name` is configured to prove itself to peers with, followed until left; None when it has none.

    Raises StartError when it is not right.
    """
    if settings.peer_cert is None or settings.peer_key is None or settings.peer_ca is None:
        yield None
        return
    certificate = PeerCertificate(
        settings.peer_cert, settings.peer_key, settings.peer_ca, name=name, trust_domain=settings.peer_trust_domain
    )
    async with background.running({"peer certificate": certificate.follow}):
        yield certificate


def _read(cert: Path, key: Path, ca: Path, *, own: str) -> _Identity:
    pair = tls.read_pair(cert, key, variables=(_CERT, _KEY))
    authorities = tls.read_certificates(ca, variable=_CA)
    tls.parsed(ca, authorities)
    try:
        uri = _uri(pair.leaf)
    except PeerRefused as refused:
        raise StartError(f"The certificate {cert} is for no service: {refused}. It must be for {own}.") from None
    if uri != own:
        raise StartError(f"The certificate {cert} is for {uri}, and this service is {own}: see {_CERT}.")
    life = pair.leaf.not_valid_after_utc - pair.leaf.not_valid_before_utc
    if life > LONGEST_LIFE + timedelta(hours=1):  # some authorities date theirs back a little
        hours = round(life / timedelta(hours=1))
        log.warning("peer certificate lasts long: nothing revokes it", extra={"hours": hours, "recommended_hours": 24})
    return _Identity(
        pair,
        _context(pair, ssl.PROTOCOL_TLS_SERVER, authorities, ca),
        _context(pair, ssl.PROTOCOL_TLS_CLIENT, authorities, ca),
    )


def _context(pair: tls.Pair, protocol: ssl._SSLMethod, authorities: bytes, ca: Path) -> ssl.SSLContext:
    context = pair.context(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3  # both ends are ours
    context.check_hostname = False  # the URI is looked at instead, by `name_of`
    context.verify_mode = ssl.CERT_REQUIRED
    if protocol is ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # a session that is resumed would not be verified again
    try:
        context.load_verify_locations(cadata=authorities.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise StartError(f"The authorities in {ca} cannot be read: see {_CA}.") from None
    return context


def _uri(leaf: x509.Certificate) -> str:
    """The one URI of a certificate that is its bearer's own; raises PeerRefused."""
    extensions = leaf.extensions
    try:
        uris = extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
            x509.UniformResourceIdentifier
        )
    except x509.ExtensionNotFound:
        uris = []
    if len(uris) != 1:
        raise PeerRefused(f"its certificate names {len(uris)} URIs instead of one")
    try:
        is_authority = extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        is_authority = False
    if is_authority:
        raise PeerRefused("its certificate is an authority's, which vouches for others and not for its bearer")
    return str(uris[0])
