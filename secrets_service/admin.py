"""The operator's way in: the first admin's token, in a file that only the operator can read.

The token is always in a file before the database learns of it. At the first start that is its own file, since a crash
in between starts over. At a renewal it is one beside it, which takes its place once the database has the new token: one
that is refused leaves the file as good as it was. A crash in between leaves a file that no longer works, and asking
again renews it. Nothing but the first start and the operator's own request ever writes the file: a token that was taken
away stays away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from secrets_service import directory_store, files, store, tokens
from secrets_service.memory import RememberingDatabase
from secrets_service.model import TokenInfo
from secrets_service.personal_tokens import DAY
from servicekit.storage import Connection

log = logging.getLogger(__name__)

LIFETIME = 90 * DAY
"""Seconds that a token in the file is good."""

_COMMENT = "admin.token, written for the operator of this machine"


class AdminToken:
    """The token in `DIR/admin.token`. `now` tells Unix seconds."""

    def __init__(
        self,
        path: Path,
        database: RememberingDatabase,
        macs: tokens.TokenMacs,
        now: Callable[[], float],
    ) -> None:
        self._path = path
        self._database = database
        self._macs = macs
        self._now = now
        self._one_at_a_time = asyncio.Lock()

    async def renew(self) -> tuple[Path, int]:
        """Puts a new token in place of the old one, which is revoked; where it is, and its end in Unix milliseconds."""
        # To its end: whoever asked may be gone when the token is stored, and its file is not in its place then.
        return await asyncio.shield(asyncio.ensure_future(self._renew()))

    async def _renew(self) -> tuple[Path, int]:
        async with self._one_at_a_time:
            staged = self._path.with_name(f"{self._path.name}.next")
            token, info = await asyncio.to_thread(write, staged, self._now())
            try:
                await self._record(token, info)
            except Exception:
                with contextlib.suppress(OSError):
                    staged.unlink()
                raise
            path = await asyncio.to_thread(self._moved, staged)
            log.info("admin token renewed", extra={"file": str(path), "token_id": token.id})
            return path, info.expires_ms

    async def _record(self, token: tokens.Presented, info: TokenInfo) -> None:

        def record(connection: Connection) -> None:
            platform = store.find_platform(connection)
            store.replace_admin_token_id(connection, token.id)
            # Who asks owns the machine, and may have nobody else left to ask.
            directory_store.restore_admin(connection, platform.admin_id)
            owner = platform.admin_id
            store.insert_token(connection, info, owner_id=owner, creator_id=owner, mac=self._macs.of(token))

        await self._database.write(record)

    def _moved(self, staged: Path) -> Path:
        """Where the token is once it was tried to move it into its place; it is good, wherever that is."""
        try:
            files.rename(staged, self._path)
        except OSError as error:
            log.warning(
                "the admin token could not be moved into its place",
                extra={"file": str(staged), "place": str(self._path), "cause": error.strerror},
            )
        return staged if os.path.lexists(staged) else self._path


def write(path: Path, now: float) -> tuple[tokens.Presented, TokenInfo]:
    """Makes a token and writes it to its file; it is no good before the database has it."""
    token = tokens.make()
    created_ms = int(now * 1000)
    files.write_private(path, token.text.encode() + b"\n", replace=True)
    return token, TokenInfo(token.id, created_ms, created_ms + LIFETIME * 1000, _COMMENT)
