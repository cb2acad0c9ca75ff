"""Services on different machines: who gets in by a certificate, through which door, and who is turned away and told of.

Both sides are the real ones, over TCP on loopback; what is behind the doors echoes, or is the Secrets service.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from servicekit import channels, peers, relay, sockets, tls
from servicekit.errors import StartError
from servicekit.peers import PeerCertificate
from servicekit.relay import Way
from serving_service.app import _behind
from tessera.identity.v1 import identity_pb2, identity_pb2_grpc
from tessera.secrets.v1 import secrets_pb2, secrets_pb2_grpc
from tests.support.certificates import CertificateAuthority, Issued, PeerFiles
from tests.support.eventually import eventually
from tests.support.secrets import running_secrets
from tests.support.sockets import short_directory

AUTHORITY = CertificateAuthority()
SECRETS = "spiffe://tessera/svc/secrets"


def certificate(directory: Path, name: str, *, issued: Issued | None = None) -> PeerCertificate:
    """A certificate of a service, as its process has it."""
    files = PeerFiles(directory / name).hold(issued or AUTHORITY.issue_peer(name), AUTHORITY)
    return PeerCertificate(files.cert, files.key, files.ca, name=name, trust_domain="tessera")


@asynccontextmanager
async def echoing(path: Path) -> AsyncIterator[list[bytes]]:
    """What is behind a door: says everything again, and keeps it in the list."""
    heard: list[bytes] = []
    tasks = set()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(65536):
                heard.append(piece)
                writer.write(piece)
                await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async with await asyncio.start_unix_server(echo, path):
        yield heard
    await asyncio.gather(*filter(None, tasks))


@asynccontextmanager
async def entrance(directory: Path, shown: PeerCertificate) -> AsyncIterator[tuple[str, list[bytes]]]:
    """An entrance for gateways to something that echoes: its address, and what was heard inside."""
    path = directory / "inside.sock"

    def doors(caller: str, door: str) -> str | None:
        return str(path) if (caller, door) == ("gateway", relay.RPC) else None

    async with echoing(path) as heard, relay.admitting("127.0.0.1:0", shown, doors) as address:
        yield address, heard


@pytest.fixture
def directory() -> Any:
    with short_directory() as path:
        yield path


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are looked at more often than a person would wait for."""
    monkeypatch.setattr(tls, "LOOK_SECONDS", 0.01)


def causes(caplog: pytest.LogCaptureFixture, event: str) -> list[str]:
    return [f"{vars(record).get('peer')}: {vars(record)['cause']}" for record in caplog.records if record.msg == event]


async def asked(way: Way, text: bytes, door: str = relay.RPC) -> bytes:
    """What is answered to a text behind a door."""
    connection = await way.dial(door)
    reader, writer = await asyncio.open_unix_connection(sock=connection)
    writer.write(text)
    try:
        async with asyncio.timeout(30):
            return await reader.readexactly(len(text))
    finally:
        writer.close()


# Who gets in.


async def test_a_peer_gets_through_to_the_socket_and_as_much_as_it_says_comes_back(directory: Path) -> None:
    text = os.urandom(3_000_000)
    async with entrance(directory, certificate(directory, "secrets")) as (address, heard):
        way = Way(address, "secrets", certificate(directory, "gateway"))
        assert await asked(way, text) == text
    assert b"".join(heard) == text


STRANGERS = {
    "an authority of its own": (
        CertificateAuthority().issue_peer("gateway"),
        "unknown: its certificate is not accepted",
    ),
    "expired": (AUTHORITY.issue_peer("gateway", lasting=-timedelta(hours=1)), "certificate has expired"),
    "another trust domain": (AUTHORITY.issue_peer("spiffe://other/svc/gateway"), "no service of tessera"),
    "a longer trust domain": (AUTHORITY.issue_peer("spiffe://tessera.other/svc/gateway"), "no service of tessera"),
    "below the service": (AUTHORITY.issue_peer("spiffe://tessera/svc/gateway/x"), "no service of tessera"),
    "in other letters": (AUTHORITY.issue_peer("spiffe://tessera/svc/Gateway"), "no service of tessera"),
    "another kind": (AUTHORITY.issue_peer("spiffe://tessera/user/gateway"), "no service of tessera"),
    "another scheme": (AUTHORITY.issue_peer("https://tessera/svc/gateway"), "no service of tessera"),
    "two names": (AUTHORITY.issue_peer("gateway", "serving"), "names 2 URIs instead of one"),
    "no name": (AUTHORITY.issue_peer(), "names 0 URIs instead of one"),
    "an authority": (AUTHORITY.issue_peer("gateway", is_authority=True), "vouches for others"),
    "a service that has no door here": (AUTHORITY.issue_peer("serving"), "serving: there is no such door for it"),
    "who runs the machine": (AUTHORITY.issue_peer("operator"), "operator: there is no such door for it"),
}


@pytest.mark.parametrize("who", STRANGERS)
async def test_a_stranger_is_turned_away_and_the_log_says_who_and_why(
    directory: Path, caplog: pytest.LogCaptureFixture, who: str
) -> None:
    issued, cause = STRANGERS[who]
    async with entrance(directory, certificate(directory, "secrets")) as (address, heard):
        assert await _said_to(address, issued) == b""
        await eventually(lambda: bool(causes(caplog, "peer refused")), what="an event")
    (found,) = causes(caplog, "peer refused")
    assert cause in found
    assert heard == []


async def test_who_shows_no_certificate_or_speaks_no_tls_is_turned_away(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with entrance(directory, certificate(directory, "secrets")) as (address, heard):
        assert await _said_to(address, None) == b""
        await eventually(lambda: len(causes(caplog, "peer refused")) == 1, what="an event")
        reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
        writer.write(b"rpc\nGET / HTTP/1.1\r\n\r\n")
        assert b"ok" not in await reader.read()
        writer.close()
        await eventually(lambda: len(causes(caplog, "peer refused")) == 2, what="an event")
    first, second = causes(caplog, "peer refused")
    assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in first
    assert second.startswith("unknown: TLS failed")
    assert heard == []


async def test_strangers_who_say_nothing_are_dropped_in_time_and_keep_nobody_out(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "GREETING_SECONDS", 0.2)
    monkeypatch.setattr(relay, "STRANGERS", 2)
    async with entrance(directory, certificate(directory, "secrets")) as (address, _):
        port = int(address.rpartition(":")[2])
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(6)]
        monkeypatch.setattr(relay, "GREETING_SECONDS", 10.0)  # for who waits behind them
        assert await asked(Way(address, "secrets", certificate(directory, "gateway")), b"hello") == b"hello"
        for _, writer in silent:
            writer.close()
    assert any("took longer" in cause for cause in causes(caplog, "peer refused"))


async def test_one_address_cannot_fill_the_log(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "HEARD_PER_MINUTE", 2)
    async with entrance(directory, certificate(directory, "secrets")) as (address, _):
        for source in ("127.0.0.1",) * 20 + ("127.0.0.2",):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", int(address.rpartition(":")[2]), local_addr=(source, 0)
            )
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            await reader.read()
            writer.close()
        await eventually(lambda: vars(caplog.records[-1]).get("source") == "127.0.0.2")
    told = [(record.message, vars(record)["source"]) for record in caplog.records if record.name == relay.__name__]
    assert told == [
        *[("peer refused", "127.0.0.1")] * 4,
        ("too many peers refused, no more of this address are logged", "127.0.0.1"),
        ("peer refused", "127.0.0.2"),
    ]


async def _said_to(address: str, issued: Issued | None) -> bytes:
    """What a program of somebody else's is answered, that believes everything."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if issued is not None:
        with tls._in_memory(issued.cert) as cert, tls._in_memory(issued.key) as key:
            context.load_cert_chain(cert, key)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]), ssl=context)
    try:
        writer.write(b"rpc\n")
        async with asyncio.timeout(30):
            return await reader.read(10)
    except (ssl.SSLError, ConnectionError):
        return b""
    finally:
        writer.transport.abort()


# Whom a caller believes.


@pytest.mark.parametrize(
    ("issued", "cause"),
    [
        (AUTHORITY.issue_peer("serving"), "it is serving"),
        (AUTHORITY.issue_peer("spiffe://other/svc/secrets"), "no service of tessera"),
        (AUTHORITY.issue_peer(SECRETS, lasting=-timedelta(hours=1)), "certificate has expired"),
        (CertificateAuthority().issue_peer("secrets"), "its certificate is not accepted"),
        (AUTHORITY.issue(), "names 0 URIs"),
    ],
)
async def test_a_caller_says_nothing_to_who_is_not_the_service_that_it_means(
    directory: Path, caplog: pytest.LogCaptureFixture, issued: Issued, cause: str
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tls._in_memory(issued.cert) as cert, tls._in_memory(issued.key) as key:
        context.load_cert_chain(cert, key)
    heard = []

    async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            heard.append(await reader.read(100))
        writer.transport.abort()

    async with await asyncio.start_server(pretend, "127.0.0.1", 0, ssl=context) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        way = Way(address, "secrets", certificate(directory, "gateway"))
        with pytest.raises(relay.Unreachable, match=cause):
            await way.dial(relay.RPC)
        # Attempts follow each other quickly while nobody is there, and are one event.
        with pytest.raises(relay.Unreachable):
            await way.dial(relay.RPC)
    assert not any(heard)
    (told,) = causes(caplog, "peer not reached")
    assert cause in told


async def test_a_caller_that_is_refused_learns_that_it_is(directory: Path) -> None:
    async with entrance(directory, certificate(directory, "secrets")) as (address, _):
        with pytest.raises(relay.Unreachable, match=r"ALERT|closed the connection"):
            await Way(address, "secrets", certificate(directory, "serving")).dial(relay.RPC)
    with pytest.raises(relay.Unreachable, match="Connect call failed"):
        await Way(address, "secrets", certificate(directory, "serving")).dial(relay.RPC)


async def test_a_dial_that_is_given_up_at_its_end_leaves_no_connection(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, is_reached, has_ended = asyncio.open_unix_connection, asyncio.Event(), asyncio.Event()

    async def connected(*where: Any, **options: Any) -> Any:
        if "sock" not in options:
            return await connect(*where, **options)
        with options["sock"]:
            is_reached.set()
            return await asyncio.Event().wait()

    async def inside(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        has_ended.set()

    monkeypatch.setattr(asyncio, "open_unix_connection", connected)
    path = str(directory / "inside.sock")
    async with (
        await asyncio.start_unix_server(inside, path),
        relay.admitting("127.0.0.1:0", certificate(directory, "secrets"), lambda *_: path) as address,
    ):
        way = Way(address, "secrets", certificate(directory, "gateway"))
        dialling = asyncio.create_task(way.dial(relay.RPC))
        await is_reached.wait()
        dialling.cancel()
        await asyncio.gather(dialling, return_exceptions=True)
        async with asyncio.timeout(10):
            await has_ended.wait()


# What is renewed.


@pytest.mark.usefixtures("looks_often")
async def test_renewed_files_count_for_new_connections_while_old_ones_go_on(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = CertificateAuthority()
    ours = PeerFiles(directory / "secrets").hold(AUTHORITY.issue_peer("secrets"), AUTHORITY)
    theirs = PeerFiles(directory / "gateway").hold(AUTHORITY.issue_peer("gateway"), AUTHORITY)
    async with (
        peers.followed(_settings(directory, ours), "secrets") as inside,
        peers.followed(_settings(directory, theirs), "gateway") as outside,
    ):
        assert inside is not None
        assert outside is not None
        async with entrance(directory, inside) as (address, _):
            way = Way(address, "secrets", outside)
            reader, writer = await asyncio.open_unix_connection(sock=await way.dial(relay.RPC))
            before = outside.as_client
            # Broken first: the old one goes on, and the log says why.
            theirs.key.write_bytes(b"broken")
            await eventually(lambda: bool(causes(caplog, "new certificate refused, the old one goes on")))
            assert await asked(way, b"still") == b"still"
            # Then another authority altogether, first at one side and then at the other.
            theirs.hold(other.issue_peer("gateway"), other)
            await eventually(lambda: outside.as_client is not before, what="the gateway's new certificate")
            with pytest.raises(relay.Unreachable):
                await way.dial(relay.RPC)
            seen = inside.as_server
            ours.hold(other.issue_peer("secrets"), other)
            await eventually(lambda: inside.as_server is not seen, what="the new certificate of Secrets")

            async def is_let_in() -> bool:
                with contextlib.suppress(relay.Unreachable):
                    return await asked(way, b"new") == b"new"
                return False

            await eventually(is_let_in)
            writer.write(b"old")
            assert await reader.readexactly(3) == b"old"
            writer.close()
            assert await _said_to(address, AUTHORITY.issue_peer("gateway")) == b""


def _settings(directory: Path, files: PeerFiles) -> Any:
    from servicekit.settings import ServiceSettings

    return ServiceSettings(data_dir=directory, **files.settings())


def test_long_life_is_warned_of(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificate(directory, "gateway", issued=AUTHORITY.issue_peer("gateway", lasting=timedelta(days=30)))
    assert "peer certificate lasts long" in caplog.text


@pytest.mark.parametrize(
    ("issued", "cause"),
    [
        (AUTHORITY.issue_peer("serving"), "is for spiffe://tessera/svc/serving, and this service is"),
        (AUTHORITY.issue_peer(), "is for no service"),
        (AUTHORITY.issue_peer("gateway", lasting=-timedelta(hours=1)), "expired at"),
    ],
)
def test_certificate_that_peers_would_refuse_stops_the_start(directory: Path, issued: Issued, cause: str) -> None:
    with pytest.raises(StartError, match=cause):
        certificate(directory, "gateway", issued=issued)


def test_authority_that_is_none_stops_the_start(directory: Path) -> None:
    files = PeerFiles(directory / "gateway").hold(AUTHORITY.issue_peer("gateway"))
    with pytest.raises(StartError, match="holds no certificate"):
        PeerCertificate(files.cert, files.key, files.ca, name="gateway", trust_domain="tessera")


# What is behind the doors.


@asynccontextmanager
async def calling(directory: Path, address: str, name: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel of the service `name` on another machine to Secrets, as that service has it."""
    own = directory / f"machine-of-{name}"
    own.mkdir()
    path = sockets.socket_path(own, callee="secrets", caller=name)
    async with (
        Way(address, "secrets", certificate(directory, name)).leading_from(path),
        channels.opened(f"unix:{path}") as channel,
    ):
        yield channel


async def _code(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


async def test_each_peer_calls_what_is_its_own_and_nothing_else_is_there(directory: Path) -> None:
    files = PeerFiles(directory / "own").hold(AUTHORITY.issue_peer("secrets"), AUTHORITY)
    async with running_secrets(**files.settings(), peer_listen="127.0.0.1:0") as secrets:
        codes = {}
        for name in ("gateway", "serving"):
            async with calling(directory, secrets.peer_address, name) as channel:
                authority = identity_pb2_grpc.AuthorityStub(channel)
                resolver = secrets_pb2_grpc.SecretResolverStub(channel)
                exchange = identity_pb2.ExchangeTokenRequest(token=secrets.admin_token)
                assertion = (await authority.ExchangeToken(exchange, timeout=10)).assertion
                held, renewal = secrets_pb2.ReconcileRequest(), identity_pb2.RenewAdminTokenRequest()
                proof = ((channels.ASSERTION, assertion),)
                codes[name] = [
                    await _code(authority.IssueToken(identity_pb2.IssueTokenRequest(), timeout=10, metadata=proof)),
                    await _code(resolver.Reconcile(held, timeout=10, metadata=proof)),
                    await _code(authority.RenewAdminToken(renewal, timeout=10, metadata=proof)),
                    await _code(_scopes(channel, ())),
                    await _code(_scopes(channel, proof)),
                ]
        assert codes["gateway"][1:] == ["UNIMPLEMENTED", "UNIMPLEMENTED", "UNAUTHENTICATED", "OK"]
        assert codes["serving"] == ["UNIMPLEMENTED", "OK", "UNIMPLEMENTED", "UNAUTHENTICATED", "OK"]
        assert codes["gateway"][0] not in ("UNIMPLEMENTED", "OK")


def _scopes(channel: grpc.aio.Channel, metadata: Any) -> Any:
    return secrets_pb2_grpc.SecretsStub(channel).ListScopes(
        secrets_pb2.ListScopesRequest(), timeout=10, metadata=metadata
    )


async def test_a_call_that_waits_through_a_restart_of_the_entrance_is_answered(directory: Path) -> None:
    """As with a socket: who is just being started is waited for."""
    shown = certificate(directory, "secrets")
    async with entrance(directory, shown) as (address, _):
        pass
    async with calling(directory, address, "gateway") as channel:
        assert channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.IDLE
        files = PeerFiles(directory / "own").hold(AUTHORITY.issue_peer("secrets"), AUTHORITY)
        async with running_secrets(**files.settings(), peer_listen=address):
            await channels.until_connected(channel, within=10)
            assert await _code(_scopes(channel, ())) == "UNAUTHENTICATED"


async def test_a_socket_that_a_service_of_this_machine_listens_on_is_not_taken_away(directory: Path) -> None:
    path = directory / "secrets-for-gateway.sock"
    way = Way("127.0.0.1:1", "secrets", certificate(directory, "gateway"))
    async with echoing(path):
        with pytest.raises(StartError, match="runs on this machine too"):
            async with way.leading_from(str(path)):
                pytest.fail("took the socket")
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"still there")
        assert await reader.readexactly(11) == b"still there"
        writer.close()
    async with way.leading_from(str(path)):  # what is left behind is nobody's
        pass


@pytest.mark.parametrize(
    ("caller", "door", "found"),
    [
        ("gateway", "rpc", "/s/serving-for-gateway.sock"),
        ("gateway", "replica/" + "a" * 32, f"/s/replicas/{'a' * 32}/http.sock"),
        ("serving", "rpc", None),
        ("secrets", "replica/" + "a" * 32, None),
        ("gateway", "a" * 32, None),
        ("gateway", "replica/../../../etc", None),
        ("gateway", "replica/" + "a" * 31 + "/", None),
        ("gateway", "replica/" + "a" * 32 + "\n", None),
        ("gateway", "", None),
    ],
)
def test_gateways_get_to_rpcs_and_to_replicas_of_serving_and_others_nowhere(
    caller: str, door: str, found: str | None
) -> None:
    assert _behind(Path("/s"), caller, door) == found


async def test_no_event_of_a_refusal_holds_a_key(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    issued = CertificateAuthority().issue_peer("gateway")
    async with entrance(directory, certificate(directory, "secrets")) as (address, _):
        await _said_to(address, issued)
        await eventually(lambda: bool(causes(caplog, "peer refused")), what="an event")
    key = issued.key.decode().splitlines()[1]
    assert key not in "\n".join(repr(vars(record)) for record in caplog.records)
