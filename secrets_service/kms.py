"""A root key that an external key service keeps: a plugin beside us speaks for it, over a Unix socket.

The plugin encrypts and decrypts one thing, a root key that we make; what it answers is stored beside the keyring. So
it is needed at a start and for a new root key, and not in between: an outage of the key service stops nothing that
runs. Whoever listens at the socket sees root keys, so nobody but our user and root may be able to put one there.

The plugin's key has an id. When that is another one than the root key is encrypted under, the key service has rotated
its key, and we make a new root key under it.

The rule: a root key that the plugin does not give back is never put in use.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import secrets
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError

from secrets_service.errors import KeySourceDown, KeySourceWrong
from secrets_service.model import SealedKeyring
from secrets_service.rootkey import LENGTH, RootKey
from servicekit import channels
from servicekit.errors import ServiceError
from servicekit.storage import StorageError
from tessera.kms.v2 import kms_pb2 as pb
from tessera.kms.v2 import kms_pb2_grpc as rpc

log = logging.getLogger(__name__)

A = TypeVar("A")

DEADLINE_SECONDS = 3.0
"""Of every call."""

POLL_SECONDS = 30.0
"""How often the plugin is asked how it is, and which key it has."""

LONGEST_ID = 1024
LONGEST_CIPHERTEXT = 1024
LONGEST_ANNOTATIONS = 32 * 1024

FORMAT = b"\x01"
"""Of what is stored of an encrypted root key: this byte, and the plugin's answer as it was."""

_FOR_GOOD = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.DATA_LOSS,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
"""What a plugin answers that asking again does not change."""

_NOBODY_THERE = "Start the plugin, or name the socket that it listens at."


class KmsPlugin:
    """The source of root keys at a socket: `rootsource.RootSource`. Raises KeySourceDown and KeySourceWrong."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._in_use: RootKey | None = None
        self._staged: RootKey | None = None
        self._answers = True

    @property
    def name(self) -> str:
        """What it is called in messages."""
        under = "" if self._in_use is None else f", key {_shown(_stored(self._in_use.wrapped or b'').key_id)}"
        return f"KMS plugin {self._path}{under}{'' if self._answers else ' (does not answer)'}"

    async def key_of(self, sealed: SealedKeyring) -> RootKey | None:
        """As `RootSource.key_of`."""
        if sealed.wrapped is None:
            return None
        if self._in_use is None or self._in_use.id != sealed.root_key_id:
            self._in_use = await self._decrypted(sealed.wrapped)
        return self._in_use

    async def first(self) -> RootKey:
        """As `RootSource.first`."""
        root = await self.stage()
        await self.finish()
        return root

    async def stage(self) -> RootKey:
        """As `RootSource.stage`."""
        status = await self.status()
        key = os.urandom(LENGTH)
        answer = await self._called(
            lambda stub: stub.Encrypt, pb.EncryptRequest(plaintext=key, uid=secrets.token_hex(16)), pb.EncryptResponse
        )
        if answer.key_id != status.key_id:
            raise KeySourceDown(self.name, "its key changed just now")
        if not 0 < len(answer.ciphertext) <= LONGEST_CIPHERTEXT or _size(answer) > LONGEST_ANNOTATIONS:
            raise KeySourceWrong(self.name, "what it encrypted is longer than it may be, or empty")
        wrapped = FORMAT + answer.SerializeToString()
        root = await self._decrypted(wrapped)
        if not hmac.compare_digest(root.key.reveal(), key):
            raise KeySourceWrong(self.name, "it does not give back what it encrypted")
        self._staged = root
        return root

    async def drop(self) -> None:
        """As `RootSource.drop`."""
        self._staged = None

    async def finish(self) -> None:
        """As `RootSource.finish`."""
        self._in_use = self._staged

    async def follow(self, rotate: Callable[[], Awaitable[object]]) -> None:
        """Asks the plugin how it is, again and again, and has the root key rotated when its key is another one."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                if await self._has_another_key():
                    await rotate()
            except (ServiceError, StorageError) as error:
                cause = error.message if isinstance(error, ServiceError) else "the database failed"
                log.log(logging.WARNING if self._answers else logging.DEBUG, "key source fails", extra={"cause": cause})
                self._answers = not isinstance(error, KeySourceDown)
            else:
                if not self._answers:
                    log.info("key source answers again", extra={"source": str(self._path)})
                self._answers = True

    async def status(self) -> pb.StatusResponse:
        """How the plugin is, when it is well."""
        status = await self._called(lambda stub: stub.Status, pb.StatusRequest(), pb.StatusResponse)
        if status.version != "v2":
            raise KeySourceWrong(self.name, f"it speaks version {_shown(status.version)} of the API, not v2")
        if status.healthz != "ok":
            raise KeySourceDown(self.name, f"it says of itself: {_shown(status.healthz)}")
        if not 0 < len(status.key_id.encode()) <= LONGEST_ID:
            raise KeySourceWrong(self.name, "the id of its key is longer than it may be, or empty")
        return status

    async def _has_another_key(self) -> bool:
        key_id = (await self.status()).key_id
        return self._in_use is not None and _stored(self._in_use.wrapped or b"").key_id != key_id

    async def _decrypted(self, wrapped: bytes) -> RootKey:
        stored = _stored(wrapped)
        request = pb.DecryptRequest(
            ciphertext=stored.ciphertext,
            uid=secrets.token_hex(16),
            key_id=stored.key_id,
            annotations=stored.annotations,
        )
        answer = await self._called(lambda stub: stub.Decrypt, request, pb.DecryptResponse)
        if len(answer.plaintext) != LENGTH:
            raise KeySourceWrong(self.name, f"what it decrypted is no key of {LENGTH} bytes")
        return RootKey.of(answer.plaintext, wrapped)

    async def _called(self, method: Callable[[rpc.KeyManagementServiceStub], object], request: object, _: type[A]) -> A:
        """The plugin's answer. Its texts of errors are not passed on: nobody knows what it puts there."""
        await asyncio.to_thread(self._refuse_unsafe)
        # A channel of its own for each call: they are rare, and a plugin that was restarted is found at once.
        async with channels.opened(f"unix:{self._path}") as channel:
            call: Callable[..., Awaitable[A]] = method(rpc.KeyManagementServiceStub(channel))  # type: ignore[assignment]
            try:
                async with asyncio.timeout(DEADLINE_SECONDS + 1):
                    return await call(request, timeout=DEADLINE_SECONDS)
            except TimeoutError:
                raise KeySourceDown(self.name, "no answer in time") from None
            except grpc.aio.AioRpcError as error:
                # UNAVAILABLE is also what gRPC says when there was nobody to ask.
                if (
                    error.code() == grpc.StatusCode.UNAVAILABLE
                    and channel.get_state() != grpc.ChannelConnectivity.READY
                ):
                    cause = "nothing listens at that socket, or nothing that this user may speak to"
                    raise KeySourceDown(self.name, cause, _NOBODY_THERE) from None
                kind = KeySourceWrong if error.code() in _FOR_GOOD else KeySourceDown
                raise kind(self.name, f"it answered {error.code().name}") from None

    def _refuse_unsafe(self) -> None:
        """Raises KeySourceDown when there is no socket, KeySourceWrong when others could have put it there."""
        try:
            socket, directory = self._path.lstat(), self._path.parent.stat()
        except OSError as error:
            raise KeySourceDown(self.name, f"its socket cannot be found ({error.strerror})", _NOBODY_THERE) from None
        if not stat.S_ISSOCK(socket.st_mode):
            raise KeySourceWrong(self.name, "it is no socket")
        if {socket.st_uid, directory.st_uid} - {0, os.geteuid()} or directory.st_mode & 0o022:
            raise KeySourceWrong(
                self.name,
                "others could have put it there; the socket and its directory must belong to this user or to root, and"
                " nobody else may write to the directory",
            )


def _stored(wrapped: bytes) -> pb.EncryptResponse:
    try:
        if wrapped[:1] == FORMAT:
            return pb.EncryptResponse.FromString(wrapped[1:])
    except DecodeError:
        pass
    raise KeySourceWrong("The KMS plugin", "what was stored of its answer is damaged")


def _size(answer: pb.EncryptResponse) -> int:
    return sum(len(name.encode()) + len(value) for name, value in answer.annotations.items())


def _shown(text: str) -> str:
    """A text of the plugin's as it may stand in a log or on a terminal."""
    return "".join(each if each.isprintable() else "?" for each in text[:200])
