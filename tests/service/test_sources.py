"""Refused credentials are logged, once each, with where they came from; nothing else believes a forwarding header."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Any
from urllib.parse import urlencode

import pytest

from servicekit.logs import JsonLines
from servicekit.source import networks
from tessera.secrets.v1 import secrets_pb2
from tests.support.certificates import CertificateAuthority, Files
from tests.support.gateway import platform
from tests.support.http import fetch
from tests.support.platform import running_platform
from tests.support.secrets import Caller, refusal, running_secrets

SCOPES = "/api/2.0/secrets/scopes/list"
FORWARDED = {"x-forwarded-for": "203.0.113.66, 198.51.100.9", "x-forwarded-proto": "https"}
BAD_TOKEN = "canary-0123456789"
US = networks("127.0.0.1")


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG)
    return caplog


def events(log: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The fields of each event that tells of a refused credential, which it never shows."""
    assert BAD_TOKEN not in "".join(JsonLines("test").format(record) for record in log.records)
    found = [vars(record) for record in log.records if record.getMessage() == "credential refused"]
    return [{name: event[name] for name in ("source", "scheme", "reason")} for event in found]


@pytest.mark.parametrize(
    ("trusted", "source", "scheme"),
    [(US, "198.51.100.9", "https"), (networks("10.0.0.0/8"), "127.0.0.1", "http"), ((), "127.0.0.1", "http")],
    ids=["a trusted proxy", "not this one", "none"],
)
async def test_gateway_logs_a_refused_credential_with_the_source_that_it_can_believe(
    log: pytest.LogCaptureFixture, trusted: Any, source: str, scheme: str
) -> None:
    async with platform(trusted_proxies=trusted) as gateway:
        for token in (None, BAD_TOKEN):
            answer = await fetch(gateway.url, "GET", SCOPES, token=token, headers=FORWARDED)
            assert answer.status in (401, 403)
    assert events(log) == [
        {"source": source, "scheme": scheme, "reason": reason} for reason in ("UNAUTHENTICATED", "PERMISSION_DENIED")
    ]


@pytest.mark.parametrize(
    ("trusted", "source", "scheme"), [(US, "198.51.100.9", "https"), ((), "127.0.0.1", "http")], ids=["trusted", "not"]
)
async def test_grpc_listener_logs_a_refused_credential_with_the_source_that_it_can_believe(
    log: pytest.LogCaptureFixture, trusted: Any, source: str, scheme: str
) -> None:
    async with running_secrets(trusted_proxies=trusted) as secrets:
        for metadata in ((), (("authorization", f"Bearer {BAD_TOKEN}"),)):
            caller = Caller(secrets.public_channel, *metadata, *FORWARDED.items())
            await refusal(caller(caller.secrets.ListScopes, secrets_pb2.ListScopesRequest()))
    assert events(log) == [
        {"source": source, "scheme": scheme, "reason": reason} for reason in ("UNAUTHENTICATED", "PERMISSION_DENIED")
    ]


async def test_request_with_a_good_credential_is_no_such_event(log: pytest.LogCaptureFixture) -> None:
    async with platform() as gateway:
        assert (await fetch(gateway.url, "GET", "/nowhere", token="owner-token")).status == 404
    assert events(log) == []


async def test_public_url_is_a_setting_whatever_a_trusted_proxy_says() -> None:
    spoofed = {
        **FORWARDED,
        "host": "evil.example",
        "x-forwarded-host": "evil.example",
        "forwarded": "host=evil.example",
    }
    async with platform(trusted_proxies=US) as gateway:
        answer = await fetch(gateway.url, "GET", "/.well-known/databricks-config", headers=spoofed)
        assert answer.json()["oidc_endpoint"] == f"{gateway.url}/oidc"
    async with platform(trusted_proxies=US, public_url="https://tessera.example") as gateway:
        answer = await fetch(gateway.url, "GET", "/.well-known/databricks-config", headers=spoofed)
        assert answer.json()["oidc_endpoint"] == "https://tessera.example/oidc"


async def test_source_says_https_where_the_listener_speaks_tls(log: pytest.LogCaptureFixture, tmp_path: Any) -> None:
    authority, files = CertificateAuthority(), Files(tmp_path)
    one = authority.issue()
    files.hold(one.cert, one.key)
    async with platform(**files.settings()) as gateway:
        assert (await _answered_over_tls(gateway.url, authority)).startswith(b"HTTP/1.1 401 ")
    assert events(log) == [{"source": "127.0.0.1", "scheme": "https", "reason": "UNAUTHENTICATED"}]


async def _answered_over_tls(url: str, authority: CertificateAuthority) -> bytes:
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", int(url.rpartition(":")[2]), ssl=authority.client_context()
    )
    try:
        writer.write(f"GET {SCOPES} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        return await reader.read()
    finally:
        writer.close()


async def test_guessing_is_slowed_down_and_a_good_token_is_taken_at_any_time() -> None:
    """S11, over REST; one client that keeps to itself could not tell a refusal of its own from one of its address."""
    async with platform(failed_logins=10) as gateway:

        async def status(token: str) -> int:
            return (await fetch(gateway.url, "GET", "/api/2.0/serving-endpoints", token=token)).status

        good = await status("owner-token")
        wrong = [await status(f"wrong-{number}") for number in range(60)]
        assert wrong[:20] == [403] * 20
        assert wrong[25:] == [429] * 35
        assert await status("owner-token") == good
        refused = await fetch(gateway.url, "GET", SCOPES, token="wrong")
        assert refused.json()["error_code"] == "REQUEST_LIMIT_EXCEEDED"
        assert 1 <= int(refused.headers["retry-after"]) <= 6
        form = {"grant_type": "client_credentials", "scope": "all-apis", "client_id": "a", "client_secret": "wrong"}
        oauth = await fetch(
            gateway.url,
            "POST",
            "/oidc/v1/token",
            body=urlencode(form).encode(),
            headers={"content-type": "application/x-www-form-urlencoded"},
        )
        assert (oauth.status, oauth.json()["error"]) == (429, "invalid_client")
        assert (await fetch(gateway.url, "GET", SCOPES)).status == 401
        assert (await fetch(gateway.url, "GET", SCOPES, headers=FORWARDED, token="wrong")).status == 429


@pytest.mark.parametrize(("token", "event"), [("wrong-{}", "call refused"), ("e30.e30.{:04}", "JWT refused")])
async def test_guesses_that_a_gateway_passes_on_do_not_fill_the_log_of_who_judges_them(
    log: pytest.LogCaptureFixture, token: str, event: str
) -> None:
    async with running_platform() as platform:
        log.clear()
        for number in range(100):
            assert (await platform.fetch("GET", SCOPES, token=token.format(number))).status == 403
    told = Counter(record.message for record in log.records)
    assert told["credential refused"] == 100, "the gateway of this test has no limit"
    assert 0 < told["call refused"] < 50
    assert 0 < told[event] < 50


async def test_guessing_over_grpc_is_slowed_down_and_a_good_token_is_taken_at_any_time() -> None:
    async with running_secrets(failed_logins=10) as service:
        refusals = []
        for number in range(60):
            caller = service.public(f"wrong-{number}")
            refusals.append(
                (await refusal(caller(caller.secrets.ListScopes, secrets_pb2.ListScopesRequest()))).code.name
            )
        assert refusals[:20] == ["PERMISSION_DENIED"] * 20
        assert refusals[25:] == ["RESOURCE_EXHAUSTED"] * 35
        await service.admin(service.admin.secrets.ListScopes, secrets_pb2.ListScopesRequest())
