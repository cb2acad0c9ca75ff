"""A reference plugin: what docs/kms.md asks of one, with keys in files where a real one calls a key service.

    python -m tests.support.reference_kms /run/kms/plugin.sock /var/lib/kms-keys

An example to begin with, and what the tests run against. Not for anything that matters: who has the files has the keys.
Each `ID.key` holds 32 bytes, and `current` names the one that encrypts. `rotate` adds one, as a key service does; an
older one opens what was encrypted under it until somebody deletes its file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tessera.kms.v2 import kms_pb2 as pb
from tessera.kms.v2 import kms_pb2_grpc as rpc

NONCE_LENGTH = 12


class Keys:
    """Keys in a directory, which is made when it is not there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._named.exists():
            self.rotate()

    @property
    def current(self) -> str:
        """The id of the key that encrypts."""
        return self._named.read_text()

    def rotate(self) -> str:
        """Has a new key encrypt from now on; its id."""
        key_id = secrets.token_hex(8)
        self._file(key_id).write_bytes(os.urandom(32))
        staged = self._directory / "next"
        staged.write_text(key_id)
        staged.replace(self._named)
        return key_id

    def cipher(self, key_id: str) -> AESGCM | None:
        """What encrypts and decrypts under a key; None for one that is not there."""
        # The name comes from outside: only one that we gave is looked for.
        if len(key_id) != 16 or not set(key_id) <= set("0123456789abcdef"):
            return None
        with contextlib.suppress(FileNotFoundError):
            return AESGCM(self._file(key_id).read_bytes())
        return None

    def forget(self, key_id: str) -> None:
        """Deletes a key, and with it all that was encrypted under it."""
        self._file(key_id).unlink()

    @property
    def _named(self) -> Path:
        return self._directory / "current"

    def _file(self, key_id: str) -> Path:
        return self._directory / f"{key_id}.key"


class Plugin(rpc.KeyManagementServiceServicer):
    """The three calls."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    async def Status(self, request: pb.StatusRequest, context: Any) -> pb.StatusResponse:
        return pb.StatusResponse(version="v2", healthz="ok", key_id=self._keys.current)

    async def Encrypt(self, request: pb.EncryptRequest, context: Any) -> pb.EncryptResponse:
        key_id = self._keys.current
        cipher = self._keys.cipher(key_id)
        if cipher is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the current key is not there")
            raise AssertionError("abort raises")
        nonce = os.urandom(NONCE_LENGTH)
        sealed = cipher.encrypt(nonce, request.plaintext, key_id.encode())
        return pb.EncryptResponse(ciphertext=nonce + sealed, key_id=key_id)

    async def Decrypt(self, request: pb.DecryptRequest, context: Any) -> pb.DecryptResponse:
        cipher = self._keys.cipher(request.key_id)
        if cipher is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such key")
            raise AssertionError("abort raises")
        nonce, sealed = request.ciphertext[:NONCE_LENGTH], request.ciphertext[NONCE_LENGTH:]
        try:
            return pb.DecryptResponse(plaintext=cipher.decrypt(nonce, sealed, request.key_id.encode()))
        except (InvalidTag, ValueError):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "this was not encrypted under that key")
            raise


@asynccontextmanager
async def listening(socket: Path, plugin: rpc.KeyManagementServiceServicer) -> AsyncIterator[None]:
    """Answers at a socket, which only this user can use."""
    socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    server = grpc.aio.server()
    rpc.add_KeyManagementServiceServicer_to_server(plugin, server)
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)
        socket.unlink(missing_ok=True)


async def _main(socket: Path, directory: Path) -> None:
    async with listening(socket, Plugin(Keys(directory))):
        await asyncio.Event().wait()


if __name__ == "__main__":
    os.umask(0o077)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main(*map(Path, sys.argv[1:])))
