"""What `tessera up` tells of why a service ended: the last line of its log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from secrets_service import rootsource
from secrets_service.app import MIGRATIONS
from secrets_service.foundation import opened
from servicekit import database
from servicekit.errors import StartError
from tessera.cli.service_log import ServiceLog
from tests.support.secrets import Clock, data_directory, running_secrets, settings_for


def last_words(path: Path, line: str) -> str:
    path.write_text(f"earlier\n{line}\n")
    return ServiceLog(path).last_words()


async def test_a_cause_of_ours_is_told_to_its_end(tmp_path: Path) -> None:
    with data_directory() as directory:
        async with running_secrets(directory):
            pass
        (directory / "root.key").write_bytes(bytes(32))
        settings = settings_for(directory)
        async with database.opened(settings.database, MIGRATIONS) as storage:
            with pytest.raises(StartError) as refused:
                await opened(settings, rootsource.chosen(settings), storage, Clock())
    cause = str(refused.value).replace(str(directory), "/srv/a/rather/deep/directory/of/the/platform")
    assert cause.endswith("nothing was changed.")
    assert last_words(tmp_path / "log", json.dumps({"event": "cannot start", "cause": cause})) == cause


@pytest.mark.parametrize("is_event", [True, False])
def test_a_cause_that_is_too_long_is_cut_at_a_word(tmp_path: Path, is_event: bool) -> None:
    long = "reason " * 1_000
    found = last_words(tmp_path / "log", json.dumps({"cause": long}) if is_event else long)
    assert 1_900 < len(found) < 2_010
    assert found.endswith("reason ...")
    assert last_words(tmp_path / "log", "x" * 3_000) == "x" * 2_000 + " ..."


def test_a_line_without_a_cause_tells_nothing(tmp_path: Path) -> None:
    assert last_words(tmp_path / "log", json.dumps({"event": "stopped"})) == ""
    assert last_words(tmp_path / "log", "[]") == ""
