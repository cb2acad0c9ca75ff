"""`tessera backup`: copies what the platform keeps into a new directory, while it runs.

The directory holds secret values sealed only, and no root key: keep the root key elsewhere, since nothing can be
restored without it. One that a key service keeps is in it, as that service encrypted it. Model files are not in it,
wherever the registry keeps them; docs/backup.md tells what is and why.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias, cast

import grpc

from servicekit import channels
from servicekit.errors import StartError
from tessera.backups.v1 import backups_pb2 as pb
from tessera.backups.v1 import backups_pb2_grpc as rpc
from tessera.cli import archive, interruptible, operator, verify
from tessera.cli.archive import File, Manifest, Progress
from tessera.secrets.v1 import secrets_pb2, secrets_pb2_grpc

_SILENCE_SECONDS = 600.0
"""How long a service may take to copy what it keeps, or to send the next part."""

_TIMEOUT_SECONDS = 60.0

_FAILED = "There is no backup"

_Call: TypeAlias = "grpc.aio.StreamStreamCall[pb.CopyRequest, pb.CopyResponse]"
_INTERRUPTED = 130


def describe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser("backup", help="copy what the running platform keeps", description=__doc__)
    parser.add_argument("target", type=Path, metavar="TARGET", help="the directory to be made; it must not exist")
    operator.add_data_dir(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Makes the backup and says what is in it; what fails or is interrupted leaves nothing."""
    return interruptible.run(lambda hurry: made(arguments), interrupted=_INTERRUPTED)


async def made(arguments: argparse.Namespace) -> int:
    """Makes the backup; raises StartError."""
    target: Path = arguments.target.absolute()
    with _staged(target) as folder:
        manifest = await _copied(arguments, folder)
        found = await asyncio.to_thread(verify.faults_without_key, archive.opened(folder), print)
        if found:
            raise StartError(f"{_FAILED}, since what would be in it is damaged: {'; '.join(found)}.")
        await asyncio.to_thread(archive.sync_all, folder)
        _place(folder, target)
    for file in manifest.files:
        print(f"  {file.name}: {file.size:,} bytes")
    print(f"{target} holds the platform as it was at {manifest.made_at}.")
    needed = f"To restore it takes the root key {manifest.facts['root_key_id']}, which is"
    if manifest.has_root_key:
        print(f"{needed} in it, encrypted: only the key service of this platform decrypts it.")
    else:
        print(f"{needed} not in it.")
    return 0


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A new folder beside the target, which is gone in the end unless it was moved there."""
    if os.path.lexists(target):
        raise StartError(f"{target} is there already, and nothing is overwritten; name another directory.")
    folder = target.with_name(f"{target.name}.incomplete-{secrets.token_hex(4)}")
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise StartError(f"{target} cannot be made: {error.strerror}.") from None
    try:
        yield folder
    except OSError as error:
        raise StartError(f"{_FAILED}: {error.strerror}.") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _place(folder: Path, target: Path) -> None:
    folder.rename(target)
    archive.sync(target.parent)


async def _copied(arguments: argparse.Namespace, folder: Path) -> Manifest:
    async with AsyncExitStack() as stack:
        connected = partial(operator.connected, arguments, failed=_FAILED)
        of_serving = await stack.enter_async_context(connected("serving"))
        of_secrets = await stack.enter_async_context(connected("secrets"))
        # Serving first: until we have Secrets' copy too, it has nothing forgotten there that its own refers to.
        serving = await _Copying.begun(of_serving)
        keeper = await _Copying.begun(of_secrets)
        made_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        for copying in (serving, keeper):
            await copying.call.done_writing()
        files = [*await serving.written(folder), *await keeper.written(folder)]
        facts = {**serving.snapshot.facts, **keeper.snapshot.facts}
        manifest = Manifest(made_at, metadata.version("tessera"), facts, tuple(files))
        request = secrets_pb2.AuthenticateBackupRequest(
            manifest=manifest.content(), store_key_version=int(facts["store_key_version"])
        )
        answer = await secrets_pb2_grpc.KeysStub(of_secrets).AuthenticateBackup(
            request, timeout=_TIMEOUT_SECONDS, metadata=channels.outgoing_metadata()
        )
    await asyncio.to_thread(_write_manifest, folder, manifest.content(), answer.mac)
    return manifest


def _write_manifest(folder: Path, content: bytes, mac: bytes) -> None:
    for name, written in ((archive.MANIFEST, content), (archive.CHECK, archive.check(content, mac))):
        with archive.open_for_writing(folder / name) as file:
            file.write(written)


class _Copying:
    """The copy that a service hands out."""

    def __init__(self, call: _Call, snapshot: pb.Snapshot) -> None:
        self.call = call
        self.snapshot = snapshot
        self._rest = b""

    @classmethod
    async def begun(cls, channel: grpc.aio.Channel) -> _Copying:
        """Returns when everything is copied."""
        call = rpc.BackupsStub(channel).Copy(metadata=channels.outgoing_metadata())
        return cls(call, (await _next(call)).snapshot)

    async def written(self, folder: Path) -> list[File]:
        """Writes the files into a folder, to the end of the call."""
        files = [await self._write(folder, file) for file in self.snapshot.files]
        if self._rest or await _read(self.call) is not None:
            raise StartError(f"{_FAILED}: a service sent more than it had announced.")
        return files

    async def _write(self, folder: Path, file: pb.CopiedFile) -> File:
        if not archive.is_name(file.name):
            raise StartError(f"{_FAILED}: a service sent a file with a name that no backup has.")
        progress, digest, missing = Progress(file.name, file.size, print), hashlib.sha256(), file.size
        with archive.open_for_writing(folder / file.name) as target:
            while missing:
                received = self._rest or (await _next(self.call)).content
                part, self._rest = received[:missing], received[missing:]
                missing -= len(part)
                digest.update(part)
                await asyncio.to_thread(target.write, part)
                progress.more(len(part))
        return File(file.name, file.size, digest.hexdigest())


async def _next(call: _Call) -> pb.CopyResponse:
    response = await _read(call)
    if response is None:
        raise StartError(f"{_FAILED}: a service sent less than it had announced.")
    return response


async def _read(call: _Call) -> pb.CopyResponse | None:
    """The next part; None when there is none."""
    try:
        async with asyncio.timeout(_SILENCE_SECONDS):
            response: Any = await call.read()
    except TimeoutError:
        raise StartError(f"{_FAILED}: a service has not answered for {_SILENCE_SECONDS:.0f} s.") from None
    return None if response is grpc.aio.EOF else cast(pb.CopyResponse, response)
