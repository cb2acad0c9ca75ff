"""What is fuzzed: parsers of what anybody may send, and of what somebody may have put into storage.

A target takes bytes and returns. It raises what the fuzzer reports: an error that its parser does not document, or an
answer that cannot be right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from types import MappingProxyType
from urllib.parse import quote

import orjson
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gateway import http_rules
from gateway.app import _OWNED
from gateway.http_rules import RouteTable
from gateway.json_codec import CodecError, codec_for, parse
from gateway.transcoding import request_message
from secrets_service import access_tokens, jwts, tokens
from secrets_service.access_tokens import AccessToken
from secrets_service.authority import SigningKeys
from secrets_service.cipher import KEY_LENGTH, Cipher, Damaged, Place, stated_version
from secrets_service.first_format import FirstFormat
from secrets_service.keyring import Keyring
from secrets_service.model import SealedKeyring, SecretBytes, TokenKind
from secrets_service.rootkey import RootKey
from servicekit import audit_records
from servicekit.audit_records import AuditKey, Head
from serving_service.environment import parse_reference

Target = Callable[[bytes], None]

STORE = b"s" * 16
PLACE = Place(kind="secret", scope=b"u" * 16, key="key", version=1)
VALUE = SecretBytes(b"the value")
_KEY = SecretBytes(bytes(range(KEY_LENGTH)))
_ROOT = RootKey.of(_KEY.reveal())
_CIPHER = Cipher(_KEY, STORE, 1)
_FIRST = FirstFormat(_KEY, STORE)
_SIGNING = SigningKeys({"key": Ed25519PrivateKey.from_private_bytes(bytes(range(32)))})
_AUDIT_KEY = AuditKey(_KEY.reveal())


AUDIENCE = "1"
ACCESS = AccessToken("7", "credential", None, 4_000_000_000)


class Wrong(Exception):
    """A parser took something for what it is not."""


def reference(data: bytes) -> None:
    """A value of `environment_vars`: either exactly a reference, or plain text (S16)."""
    text = data.decode(errors="replace")
    found = parse_reference(text)
    if found is not None and str(found) != text:
        raise Wrong(f"{text!r} was taken for {found}")


def path(data: bytes) -> None:
    """The path of a request: one way to write it, and its variables back in their places (S7)."""
    verb, _, raw = data.decode("latin-1").partition(" ")
    match = _routes().match(verb, raw)
    if match is None:
        return
    binding, values = match
    parts = [
        quote(values[each.variable] + each.verb, safe=":") if each.variable else each.literal
        for each in binding.segments
    ]
    again = _routes().match(verb, "/" + "/".join(parts))
    if again != match:
        raise Wrong(f"{raw!r} leads to {binding.template} with {values}, and that to {again}")


def rest(data: bytes) -> None:
    """A request of the REST API: number of the route, query, body, apart by line breaks."""
    head, _, rest = data.partition(b"\n")
    query, _, body = rest.partition(b"\n")
    routes = list(_routes())
    binding = routes[(head or b"\0")[0] % len(routes)]
    values = {each.variable: "1" for each in binding.segments if each.variable}
    codec = codec_for(binding.method.input_type)
    try:
        message = request_message(codec, binding, values, query, body)
    except CodecError as error:
        str(error)
        return
    written = orjson.dumps(codec.encode(message))
    if codec.decode(parse(written)) != message:
        raise Wrong(f"{binding.template}: what was read is not what is written of it")


def record(data: bytes) -> None:
    """A sealed record: it opens to what was sealed there, or is damaged (S2)."""
    with suppress(Damaged):
        stated_version(data)
    with suppress(Damaged):
        Keyring.opened(SealedKeyring(_ROOT.id, data, b""), _ROOT, STORE)
        raise Wrong("a keyring was made without the key")
    for read in (_FIRST.open, _CIPHER.open):
        with suppress(Damaged):
            if read(data, PLACE).reveal() != VALUE.reveal():
                raise Wrong("a record holds what nobody sealed")


def token(data: bytes) -> None:
    """A credential: a personal token, a client secret, an access token, or a JWT of somebody else's (S13)."""
    text = data.decode(errors="replace")
    for kind in TokenKind:
        found = tokens.parse(text, kind)
        if found is not None and found.text != text:
            raise Wrong("a token has two spellings")
    with suppress(jwts.Refused):
        jwts.peeked(text)
    with suppress(jwts.Refused):
        said = access_tokens.read(text, _SIGNING.public, audience=AUDIENCE, now=0.0)
        if said != ACCESS:
            raise Wrong("an access token was made without the key")


def audit(data: bytes) -> None:
    """An audit log: whatever was done to it, the records that are believed are those that were written (S27)."""
    lines = data.split(b"\n")
    verdict = audit_records.verify(lines, {"secrets": [_AUDIT_KEY]})
    if not set(lines[: verdict.records + verdict.repeated]) <= set(_records()):
        raise Wrong("a record was made without the key")


TARGETS: Mapping[str, Target] = MappingProxyType(
    {each.__name__: each for each in (reference, path, rest, record, token, audit)}
)


@cache
def _routes() -> RouteTable:
    files = [file for owned in _OWNED.values() for file in owned]
    return http_rules.bindings([service for file in files for service in file.services_by_name.values()])


@cache
def _records() -> tuple[bytes, ...]:
    lines, head = [], Head()
    for number in range(3):
        facts = {"service": "secrets", "method": "M", "object": f"key=k{number}"}
        line, head = audit_records.line(_AUDIT_KEY, head, facts, at=0.0)
        lines.append(line.encode())
    return tuple(lines)


SEEDS: Mapping[str, Sequence[bytes]] = MappingProxyType(
    {
        "reference": (b"{{secrets/scope/key}}", b"{{secrets/a@b.c/K-_.}}", b"{{secrets//}}", b"text {{secrets/a/b}}"),
        "path": (
            b"GET /api/2.0/secrets/get",
            b"POST /api/2.0/serving-endpoints",
            b"GET /api/2.0/serving-endpoints/a%20b/",
            b"POST /api/2.0/serving-endpoints/a/config:stop",
            b"GET /api/2.0/preview/scim/v2/Users/1",
        ),
        "rest": (
            b"\0\nscope=a&key=b\n",
            b"\1\n\n" + orjson.dumps({"scope": "a", "key": "b", "string_value": "c", "bytes_value": "YQ=="}),
            b"\2\na.b=1&a.b=2\n"
            + orjson.dumps(
                {
                    "name": "e",
                    "config": {
                        "served_entities": [{"entity_name": "m", "environment_vars": {"A": "{{secrets/a/b}}"}}],
                        "traffic_config": {"routes": [{"traffic_percentage": 100}]},
                    },
                    "tags": [{"key": "k"}],
                }
            ),
        ),
        "record": (
            _CIPHER.seal(VALUE, PLACE),
            _CIPHER.seal(VALUE, Place(kind="secret", scope=b"v" * 16, key="key", version=1)),
            Keyring.made(STORE, 1).sealed(RootKey.of(bytes(KEY_LENGTH))).record,
            b"\1" + bytes(60),
        ),
        "token": (
            tokens.make().text.encode(),
            tokens.make(TokenKind.CLIENT_SECRET).text.encode(),
            _SIGNING.access_token(ACCESS, audience=AUDIENCE, issued_at=0).encode(),
            b"eyJhbGciOiJub25lIn0.e30.",
        ),
        "audit": (b"\n".join(_records()), b"\n".join(_records()[1:]), _records()[0]),
    }
)
"""Where the fuzzer begins, per target."""
