"""The operator's way in: the first admin's token, in a file that only the operator can read.

The file is always written before the database learns of the token. A crash in between is harmless at the first start,
which then starts over, and at a renewal leaves a file that no longer works and that is renewed by asking again. Nothing
but the first start and the operator's own request ever writes the file: a token that was taken away stays away.
"""

from __future__ import annotations

import logging
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

    async def renew(self) -> tuple[Path, int]:
        """Puts a new token in place of the old one, which is revoked; where it is, and its end in Unix milliseconds."""
        token, info = write(self._path, self._now())

        def record(connection: Connection) -> None:
            platform = store.find_platform(connection)
            store.replace_admin_token_id(connection, token.id)
            # Who asks owns the machine, and may have nobody else left to ask.
            directory_store.restore_admin(connection, platform.admin_id)
            owner = platform.admin_id
            store.insert_token(connection, info, owner_id=owner, creator_id=owner, mac=self._macs.of(token))

        await self._database.write(record)
        log.info("admin token renewed", extra={"file": str(self._path), "token_id": token.id})
        return self._path, info.expires_ms


def write(path: Path, now: float) -> tuple[tokens.Presented, TokenInfo]:
    """Makes a token and writes it to its file; it is no good before the database has it."""
    token = tokens.make()
    created_ms = int(now * 1000)
    files.write_private(path, token.text.encode() + b"\n", replace=True)
    return token, TokenInfo(token.id, created_ms, created_ms + LIFETIME * 1000, _COMMENT)
