"""The ways to tell people: mail, and a webhook in the form of https://www.standardwebhooks.com.

Both go through the standard library, which waits; so each delivery has a thread of its own that nobody waits for when
the service stops.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import http.client
import smtplib
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.errors import MessageError
from email.message import EmailMessage
from email.utils import formatdate
from pathlib import Path
from urllib.parse import urlsplit

import orjson

from servicekit import private_file
from servicekit.errors import StartError
from servicekit.threads import OneThread
from serving_service.model import Notice
from serving_service.notices import Courier, NotTaken, NotTakenYet
from serving_service.settings import ServingSettings

TIMEOUT_SECONDS = 20.0
"""Of each step of a conversation."""

LONGEST_SECRET = 4_096

PORTS = {"starttls": 587, "tls": 465, "none": 25}
"""Where mail servers listen, by how the connection is secured."""


@dataclass(frozen=True, kw_only=True)
class Mail:
    """A mail for each recipient, handed to one server."""

    host: str
    port: int
    sender: str
    security: str
    """`starttls`, `tls` or `none`."""
    user: str | None
    password: str | None = field(repr=False)

    name = "mail"

    def recipients(self, addresses: list[str]) -> list[str]:
        return list(dict.fromkeys(addresses))

    async def deliver(self, notice: Notice) -> None:
        try:
            message = self._message(notice)
        except (ValueError, MessageError, IndexError, AttributeError):  # what the parser of addresses raises
            raise NotTaken("the address cannot be written into a mail") from None
        await OneThread("notice").run(lambda: self._send(notice.recipient, message))

    def _message(self, notice: Notice) -> EmailMessage:
        content = notice.content
        how = "failed" if content["event"] == "update_failed" else "went well"
        message = EmailMessage()
        message["From"] = self.sender
        message["To"] = notice.recipient
        message["Subject"] = f"Update of {content['endpoint']} {how} (version {content['config_version']})"
        message["Date"] = formatdate(notice.created_at / 1000)
        message["Message-ID"] = f"<{notice.id}@{self.sender.rpartition('@')[2]}>"
        message["Auto-Submitted"] = "auto-generated"
        entities = [
            f"{each['name']}: {each['entity_name']}, version {each['entity_version']}\n"
            + (f"    {each['problem']}\n" if "problem" in each else "")
            for each in content["served_entities"]
        ]
        message.set_content(
            f"The update of the serving endpoint {content['endpoint']} to configuration version"
            f" {content['config_version']} {how}.\n\n{''.join(entities)}"
        )
        return message

    def _send(self, recipient: str, message: EmailMessage) -> None:
        with contextlib.closing(self._connected()) as server:
            try:
                server.send_message(message, to_addrs=[recipient])
            except smtplib.SMTPRecipientsRefused as error:
                code = next(iter(error.recipients.values()))[0]
                raise _refused("the address", code) from None
            except smtplib.SMTPNotSupportedError:
                raise NotTaken("the server does not take addresses that are not ASCII") from None
            except smtplib.SMTPDataError as error:
                raise _refused("the mail", error.smtp_code) from None
            # The mail was taken, whatever is said to the goodbye.
            with contextlib.suppress(smtplib.SMTPException, OSError):
                server.quit()

    def _connected(self) -> smtplib.SMTP:
        context = ssl.create_default_context()
        if self.security == "tls":
            server: smtplib.SMTP = smtplib.SMTP_SSL(self.host, self.port, timeout=TIMEOUT_SECONDS, context=context)
        else:
            server = smtplib.SMTP(self.host, self.port, timeout=TIMEOUT_SECONDS)
        try:
            if self.security == "starttls":
                server.starttls(context=context)
            if self.user is not None and self.password is not None:
                server.login(self.user, self.password)
        except BaseException:
            server.close()
            raise
        return server


@dataclass(frozen=True, kw_only=True)
class Webhook:
    """One signed POST for all recipients, which are named in it. A redirection is not followed: it is no answer."""

    url: str
    key: bytes = field(repr=False)
    now: Callable[[], float] = time.time

    name = "webhook"

    def recipients(self, addresses: list[str]) -> list[str]:
        return [orjson.dumps(list(dict.fromkeys(addresses))).decode()]

    async def deliver(self, notice: Notice) -> None:
        body = orjson.dumps({**notice.content, "recipients": orjson.loads(notice.recipient)})
        moment = str(int(self.now()))
        signed = b".".join((notice.id.encode(), moment.encode(), body))
        signature = base64.b64encode(hmac.digest(self.key, signed, hashlib.sha256)).decode()
        headers = {
            "content-type": "application/json",
            "webhook-id": notice.id,
            "webhook-timestamp": moment,
            "webhook-signature": f"v1,{signature}",
        }
        status = await OneThread("notice").run(lambda: self._post(body, headers))
        if not 200 <= status < 300:
            raise NotTakenYet(f"the answer was {status}")

    def _post(self, body: bytes, headers: dict[str, str]) -> int:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        if parts.scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=TIMEOUT_SECONDS, context=ssl.create_default_context()
            )
        else:
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_SECONDS)
        try:
            connection.request("POST", f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}", body, headers)
            return connection.getresponse().status
        finally:
            connection.close()


def configured(settings: ServingSettings) -> list[Courier]:
    """The ways that the settings name; raises StartError for a secret that cannot be read."""
    found: list[Courier] = []
    if settings.smtp_host is not None and settings.smtp_from is not None:
        file = settings.smtp_password_file
        found.append(
            Mail(
                host=settings.smtp_host,
                port=settings.smtp_port or PORTS[settings.smtp_security],
                sender=settings.smtp_from,
                security=settings.smtp_security,
                user=settings.smtp_user,
                password=_secret(file, what="The password of the mail server,") if file is not None else None,
            )
        )
    if settings.webhook_url is not None and settings.webhook_secret_file is not None:
        key = _webhook_key(_secret(settings.webhook_secret_file, what="The secret of the webhook,"))
        found.append(Webhook(url=settings.webhook_url, key=key))
    return found


def _secret(path: Path, *, what: str) -> str:
    """The text of a file that only we can read, without the end of its line; raises StartError."""
    try:
        text = private_file.read(path, what=what, longest=LONGEST_SECRET, may_be_link=True).decode()
    except FileNotFoundError:
        raise StartError(f"{what} {path} is not there.") from None
    except UnicodeDecodeError:
        raise StartError(f"{what} {path} is not text.") from None
    if not (text := text.strip("\r\n")):
        raise StartError(f"{what} {path} is empty.")
    return text


def _webhook_key(text: str) -> bytes:
    """The key that a webhook's secret stands for: base64 behind `whsec_`, or the text itself; raises StartError."""
    if not text.startswith("whsec_"):
        return text.encode()
    try:
        return base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        raise StartError("The webhook's secret begins with whsec_ and goes on with what is no base64.") from None


def _refused(what: str, code: int) -> Exception:
    """The server's answer, without its text, which may hold anything."""
    said = f"{what} was refused with {code}"
    return NotTaken(said) if 500 <= code < 600 else NotTakenYet(said)
