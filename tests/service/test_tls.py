"""TLS on real listeners: who is believed, what is refused, and how a certificate is renewed while the service runs."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servicekit import tls
from servicekit.errors import StartError
from servicekit.logs import JsonLines
from servicekit.tls import Certificate
from tests.support.certificates import CertificateAuthority, Files, key_pem, new_key
from tests.support.eventually import eventually
from tests.support.gateway import platform
from tests.support.secrets import running_secrets

AUTHORITY = CertificateAuthority()
HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """The files of a certificate."""
    files = Files(tmp_path)
    one = AUTHORITY.issue()
    files.hold(one.cert, one.key)
    return files


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are looked at more often than a person would wait for."""
    monkeypatch.setattr(tls, "LOOK_SECONDS", 0.01)


class Connection:
    """One connection to the gateway, kept open."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @property
    def serial(self) -> int:
        """The serial number of the certificate that was shown."""
        shown = self._writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return x509.load_der_x509_certificate(shown).serial_number

    async def status(self, request: bytes = HEALTH) -> bytes:
        """The first line of the answer to a request; empty when there is none."""
        self._writer.write(request)
        async with asyncio.timeout(30):
            line = await self._reader.readline()
            if line:
                await self._reader.readuntil(b'{"status":"ok"}')
            return line.strip()


@asynccontextmanager
async def connected(url: str, context: ssl.SSLContext | None, name: str | None = None) -> AsyncIterator[Connection]:
    """A connection to a URL's host and port; `name` is the one that the certificate is to bear."""
    port = int(url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


async def serial_at(url: str, name: str | None = None) -> int:
    """The serial number that a new connection is shown."""
    async with connected(url, AUTHORITY.client_context(), name) as connection:
        return connection.serial


@asynccontextmanager
async def channel_to(address: str, *, trusted: bytes | None = AUTHORITY.pem) -> AsyncIterator[Any]:
    """A health stub on a connection of its own; without TLS when nobody is trusted."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with (
        grpc.aio.insecure_channel(address, options=options)
        if trusted is None
        else grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(trusted), options=options)
    ) as channel:
        yield health_pb2_grpc.HealthStub(channel)


async def is_well(stub: Any) -> bool:
    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def test_gateway_proves_itself_to_who_trusts_the_authority_and_says_https(files: Files) -> None:
    async with platform(**files.settings()) as gateway:
        assert gateway.url.startswith("https://127.0.0.1:")
        for name in ("localhost", "127.0.0.1"):
            async with connected(gateway.url, AUTHORITY.client_context(), name) as connection:
                assert await connection.status() == b"HTTP/1.1 200 OK"
        with pytest.raises(ssl.SSLCertVerificationError):
            async with connected(gateway.url, CertificateAuthority().client_context()):
                pytest.fail("believed without an authority")


async def test_gateway_speaks_tls_1_2_and_nothing_older(files: Files) -> None:
    # The library may refuse older ones by itself; that is not relied on.
    assert Certificate(files.cert, files.key).http_context.minimum_version is ssl.TLSVersion.TLSv1_2
    async with platform(**files.settings()) as gateway:
        async with connected(gateway.url, AUTHORITY.client_context(ssl.TLSVersion.TLSv1_2)) as connection:
            assert await connection.status() == b"HTTP/1.1 200 OK"
        with pytest.warns(DeprecationWarning, match="TLSv1"):
            older = AUTHORITY.client_context(ssl.TLSVersion.TLSv1_1)
        older.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            async with connected(gateway.url, older):
                pytest.fail("spoke TLS 1.1")


async def test_plain_text_at_a_tls_port_is_not_answered(files: Files) -> None:
    async with platform(**files.settings()) as gateway, connected(gateway.url, None) as connection:
        try:
            said = await connection.status()
        except (ConnectionError, asyncio.IncompleteReadError):
            said = b""
        assert b"HTTP" not in said


async def test_grpc_listener_proves_itself_and_takes_no_plain_text(files: Files) -> None:
    async with running_secrets(**files.settings()) as secrets:
        async with channel_to(secrets.address) as stub:
            await eventually(lambda: is_well(stub))
        for trusted in (CertificateAuthority().pem, None):
            async with channel_to(secrets.address, trusted=trusted) as stub:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await is_well(stub)
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.usefixtures("looks_often")
@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
async def test_new_files_serve_new_connections_while_an_old_one_goes_on(files: Files, name: str) -> None:
    async with (
        platform(**files.settings()) as gateway,
        connected(gateway.url, AUTHORITY.client_context(), name) as old,
    ):
        before = old.serial
        # A key of another kind: a context that held both would leave the choice to the client.
        new = AUTHORITY.issue(rsa.generate_private_key(65537, 2048))
        files.hold(new.cert, new.key)

        async def is_new() -> bool:
            return await serial_at(gateway.url, name) == new.serial

        await eventually(is_new, what="the new certificate")
        assert await old.status() == b"HTTP/1.1 200 OK"
        assert old.serial == before


@pytest.mark.usefixtures("looks_often")
async def test_new_files_serve_new_grpc_connections_while_an_old_one_goes_on(files: Files) -> None:
    other = CertificateAuthority()
    async with running_secrets(**files.settings()) as secrets, channel_to(secrets.address) as old:
        await eventually(lambda: is_well(old))
        new = other.issue()
        files.hold(new.cert, new.key)

        async def is_new() -> bool:
            async with channel_to(secrets.address, trusted=other.pem) as stub:
                try:
                    return await is_well(stub)
                except grpc.aio.AioRpcError:
                    return False

        await eventually(is_new, what="the new certificate")
        assert await is_well(old)


@pytest.mark.usefixtures("looks_often")
async def test_broken_files_keep_the_old_certificate_and_the_log_says_why_without_the_key(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    before, after = AUTHORITY.issue(), AUTHORITY.issue()
    files.hold(before.cert, before.key)
    async with platform(**files.settings()) as gateway:
        for cert, key in ((before.cert, after.key), (b"nonsense", after.key), (before.cert, after.key[:-40])):
            seen = len(_refusals(caplog))
            files.hold(cert, key)
            await eventually(partial(_more_refusals, caplog, seen), what="a refusal")
            assert await serial_at(gateway.url) == before.serial
        files.key.unlink()
        await eventually(lambda: any("missing" in cause for cause in _refusals(caplog)), what="a refusal")
        assert await serial_at(gateway.url) == before.serial
        files.hold(after.cert, after.key)

        async def is_new() -> bool:
            return await serial_at(gateway.url) == after.serial

        await eventually(is_new, what="the pair that is right again")
    lines = "\n".join(JsonLines("test").format(record) for record in caplog.records)
    assert f"is not the key of the certificate {files.cert}" in lines
    assert "certificate renewed" in lines
    for line in (before.key + after.key).decode().splitlines():
        assert line.startswith("-----") or line not in lines


def _more_refusals(caplog: pytest.LogCaptureFixture, seen: int) -> bool:
    return len(_refusals(caplog)) > seen


def _refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [vars(record)["cause"] for record in caplog.records if "certificate refused" in record.getMessage()]


# What stops a start.


async def test_gateway_and_secrets_do_not_start_with_a_key_of_another_certificate(files: Files) -> None:
    files.hold(AUTHORITY.issue().cert, AUTHORITY.issue().key)
    for service in (platform(**files.settings()), running_secrets(**files.settings())):
        with pytest.raises(StartError, match="is not the key of the certificate"):
            async with service:
                pytest.fail("started with a key of another certificate")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_key_that_others_may_read_or_write_is_refused(files: Files, mode: int) -> None:
    one = AUTHORITY.issue()
    files.hold(one.cert, one.key, mode=mode)
    with pytest.raises(StartError, match=f"{files.key} has mode {mode:04o}.*chmod 600"):
        Certificate(files.cert, files.key)


def test_key_that_is_no_regular_file_is_refused_without_waiting_for_a_writer(files: Files) -> None:
    files.key.unlink()
    os.mkfifo(files.key, 0o600)
    with pytest.raises(StartError, match="is not a regular file"):
        Certificate(files.cert, files.key)


def test_key_of_another_user_is_refused(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(StartError, match="belongs to another user"):
        Certificate(files.cert, files.key)


def test_links_to_both_files_are_followed_as_renewing_tools_make_them(files: Files, tmp_path: Path) -> None:
    for name, target in (("cert", files.cert), ("key", files.key)):
        (tmp_path / name).symlink_to(target)
    Certificate(tmp_path / "cert", tmp_path / "key")


def test_missing_file_is_named_with_the_setting_that_names_it(files: Files) -> None:
    with pytest.raises(StartError, match="TESSERA_TLS_CERT"):
        Certificate(files.cert.with_name("none"), files.key)
    with pytest.raises(StartError, match="TESSERA_TLS_KEY"):
        Certificate(files.cert, files.key.with_name("none"))


def test_expired_certificate_is_refused(files: Files) -> None:
    old = AUTHORITY.issue(lasting=-timedelta(hours=1))
    files.hold(old.cert, old.key)
    with pytest.raises(StartError, match="expired at"):
        Certificate(files.cert, files.key)


def test_encrypted_key_is_refused_and_no_password_is_asked_for(files: Files) -> None:
    key = new_key()
    files.hold(AUTHORITY.issue(key).cert, key_pem(key, b"password"))
    with pytest.raises(StartError, match="without a password"):
        Certificate(files.cert, files.key)


def test_kind_of_key_that_grpc_clients_do_not_know_is_refused(files: Files) -> None:
    one = AUTHORITY.issue(ed25519.Ed25519PrivateKey.generate())
    files.hold(one.cert, one.key)
    with pytest.raises(StartError, match="use RSA or ECDSA"):
        Certificate(files.cert, files.key)


def test_pair_shows_no_key(files: Files) -> None:
    assert "PRIVATE" not in repr(vars(Certificate(files.cert, files.key)))
