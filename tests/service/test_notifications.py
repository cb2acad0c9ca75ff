"""Notifications of ended updates: by a real mail server and a real webhook, once each, also after a restart."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.smtp import AuthResult

from servicekit.errors import StartError
from serving_service import couriers, notices
from serving_service.couriers import Mail
from serving_service.model import Notice
from serving_service.notices import NotTaken
from tessera.serving.v1 import serving_pb2 as pb
from tests.support.builders import an_input
from tests.support.certificates import CertificateAuthority, Files
from tests.support.eventually import eventually
from tests.support.receivers import MailServer, Receiver, mail_server, webhook_receiver
from tests.support.secrets import data_directory, running_secrets
from tests.support.serving import ServingCaller, no_replicas, running_serving, serving_settings

ADA, BOB = "ada@example.com", "bob@example.com"
TOLD = pb.EmailNotifications(on_update_failure=[ADA, BOB], on_update_success=[BOB])
SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()


@asynccontextmanager
async def running_admin(directory: Path, **changes: Any) -> AsyncIterator[ServingCaller]:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(no_replicas(directory))
        secrets = await stack.enter_async_context(running_secrets(directory))
        serving = await stack.enter_async_context(running_serving(directory, route_ack_seconds=0.3, **changes))
        yield serving.public(secrets.admin_token)


def by_mail(server: MailServer) -> dict[str, Any]:
    return {
        "smtp_host": "127.0.0.1",
        "smtp_port": server.port,
        "smtp_security": "none",
        "smtp_from": "tessera@example.com",
    }


def by_webhook(directory: Path, receiver: Receiver) -> dict[str, Any]:
    file = directory / "webhook-secret"
    file.touch(mode=0o600)
    file.write_text(f"{SECRET}\n")
    return {"webhook_url": f"{receiver.url}hook?of=tessera", "webhook_secret_file": file}


async def test_each_end_of_an_update_is_mailed_to_those_who_asked_for_it() -> None:
    with data_directory() as directory:
        async with mail_server() as server, running_admin(directory, **by_mail(server)) as admin:
            await admin.create("demo", email_notifications=TOLD)
            await admin.settled("demo")
            await eventually(lambda: len(server.mails) == 1, what="the success is told")
            await admin.update("demo", an_input("dying", environment_vars={"KEY": "a value"}))
            await admin.settled("demo")
            await eventually(lambda: len(server.mails) == 3, what="the failure is told")
    (recipient, success), *failures = server.mails
    assert (recipient, success["To"], success["From"]) == (BOB, BOB, "tessera@example.com")
    assert success["Subject"] == "Update of demo went well (version 1)"
    assert sorted(recipient for recipient, _ in failures) == [ADA, BOB]
    failure = failures[0][1]
    assert failure["Subject"] == "Update of demo failed (version 2)"
    assert failure["Message-ID"] != failures[1][1]["Message-ID"]
    text = failure.get_content()
    assert "dying-1: dying, version 1" in text
    assert "the model server exited with status 3 before it was ready" in text
    assert "a value" not in text


async def test_an_update_that_is_cancelled_is_told_to_nobody() -> None:
    with data_directory() as directory:
        async with mail_server() as server, running_admin(directory, **by_mail(server)) as admin:
            await admin.create("demo", "slow", email_notifications=TOLD)
            await admin.cancel("demo")
            await admin.settled("demo")
            await admin.update("demo", an_input("ready"))
            await admin.settled("demo")
            await eventually(lambda: len(server.mails) == 1, what="the success is told")
    assert server.mails[0][1]["Subject"] == "Update of demo went well (version 2)"


@pytest.mark.parametrize("goodbye", ["421 Too many connections", "500 What?", "Nonsense"])
async def test_a_mail_that_was_taken_is_not_sent_again_whatever_the_goodbye(goodbye: str) -> None:
    async with mail_server(MailServer(goodbye=goodbye)) as server:
        mail = Mail(
            host="127.0.0.1", port=server.port, sender="tessera@example.com", security="none", user=None, password=None
        )
        await mail.deliver(a_notice())
    assert len(server.mails) == 1


async def test_the_webhook_gets_one_signed_post_and_is_not_followed_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notices, "FIRST_PAUSE_SECONDS", 0.05)
    with data_directory() as directory, webhook_receiver() as receiver:
        receiver.statuses = [307, 500]
        async with running_admin(directory, **by_webhook(directory, receiver)) as admin:
            await admin.create("demo", "dying", email_notifications=TOLD)
            await admin.settled("demo")
            await eventually(lambda: len(receiver.posted) == 3, what="the third attempt")
            await admin.delete("demo")
    (headers, body), *others = receiver.posted
    assert [other for _, other in others] == [body, body]
    assert {each["webhook-id"] for each, _ in receiver.posted} == {headers["webhook-id"]}
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.digest(b"k" * 32, signed, hashlib.sha256)).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    document = json.loads(body)
    assert (document["event"], document["endpoint"], document["recipients"]) == ("update_failed", "demo", [ADA, BOB])
    assert "exited with status 3" in document["served_entities"][0]["problem"]


async def test_what_was_noted_before_a_restart_is_delivered_after_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notices, "FIRST_PAUSE_SECONDS", 1.0)
    with data_directory() as directory:
        async with mail_server() as server:
            nobody_there = by_mail(server)
        async with running_admin(directory, **nobody_there) as admin:
            await admin.create("demo", "dying", email_notifications=TOLD)
            await admin.settled("demo")
            await eventually(lambda: "notices cannot be delivered now" in caplog.messages)
        async with mail_server(server, port=server.port), running_admin(directory, **nobody_there):
            await eventually(lambda: len(server.mails) == 2, what="both are told")
    assert sorted(recipient for recipient, _ in server.mails) == [ADA, BOB]


async def test_an_address_that_the_server_refuses_for_good_is_given_up_and_the_others_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with data_directory() as directory:
        async with mail_server() as server:
            server.refusals[ADA] = "550 no such user"
            async with running_admin(directory, **by_mail(server)) as admin:
                await admin.create("demo", "dying", email_notifications=TOLD)
                await eventually(lambda: len(server.mails) == 1, what="bob is told")
                await eventually(lambda: "notice is dropped: it was refused" in caplog.messages)
    assert server.mails[0][0] == BOB


async def test_where_there_is_a_way_nobody_is_warned() -> None:
    with data_directory() as directory:
        async with mail_server() as server, running_admin(directory, **by_mail(server)) as admin:
            call = admin.stub.CreateServingEndpoint(
                pb.CreateServingEndpointRequest(name="demo", email_notifications=TOLD), metadata=admin._metadata
            )
            await call
            assert "x-tessera-warning" not in dict(await call.trailing_metadata())


def a_notice(recipient: str = ADA) -> Notice:
    content = {"event": "update_failed", "endpoint": "demo", "config_version": 1, "served_entities": []}
    return Notice(id="n1", courier="mail", recipient=recipient, content=content, created_at=0, due_at=0)


@pytest.mark.parametrize("recipient", ["<>@example.com", "é@example.com", ",@;"])
async def test_an_address_that_no_mail_can_be_written_to_is_given_up(recipient: str) -> None:
    async with mail_server(enable_SMTPUTF8=False) as server:
        mail = Mail(
            host="127.0.0.1", port=server.port, sender="t@example.com", security="none", user=None, password=None
        )
        with pytest.raises(NotTaken):
            await mail.deliver(a_notice(recipient))


async def test_the_password_is_sent_to_nobody_who_cannot_show_a_certificate(tmp_path: Path) -> None:
    issued, files = CertificateAuthority().issue(), Files(tmp_path)
    files.hold(issued.cert, issued.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.cert, files.key)
    seen: list[Any] = []

    def authenticate(*arguments: Any) -> AuthResult:
        seen.append(arguments)
        return AuthResult(success=True)

    async with mail_server(tls_context=context, require_starttls=True, authenticator=authenticate) as server:
        mail = Mail(
            host="127.0.0.1", port=server.port, sender="t@example.com", security="starttls", user="u", password="p"
        )
        with pytest.raises(ssl.SSLCertVerificationError):
            await mail.deliver(a_notice())
    assert seen == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"smtp_host": "h"}, "TESSERA_SMTP_FROM"),
        ({"smtp_host": "h", "smtp_from": "a@b", "smtp_user": "u"}, "TESSERA_SMTP_PASSWORD_FILE"),
        ({"webhook_url": "https://h"}, "TESSERA_NOTIFICATION_WEBHOOK_SECRET_FILE"),
        (
            {
                "smtp_host": "h",
                "smtp_from": "a@b",
                "smtp_user": "u",
                "smtp_password_file": Path("/nowhere"),
                "smtp_security": "none",
            },
            "would travel in clear",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        serving_settings(tmp_path, **changes)


@pytest.mark.parametrize(
    ("mode", "content", "problem"),
    [
        (0o644, b"x", "mode 0644"),
        (0o600, b"\n", "is empty"),
        (0o600, b"\xff", "is not text"),
        (0o600, b"whsec_!", "no base64"),
        (None, b"", "is not there"),
    ],
)
def test_a_secret_that_is_not_as_it_should_be_stops_the_start(
    tmp_path: Path, mode: int | None, content: bytes, problem: str
) -> None:
    file = tmp_path / "secret"
    if mode is not None:
        file.write_bytes(content)
        file.chmod(mode)
    settings = serving_settings(tmp_path, webhook_url="https://example.com", webhook_secret_file=file)
    with pytest.raises(StartError, match=problem):
        couriers.configured(settings)
