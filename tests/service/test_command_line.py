"""The commands that ask a platform: what they print, and what they say when they cannot."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from servicekit.audit_files import first_of
from servicekit.audit_records import EXPIRED, AuditKey, Head, line
from tessera.cli import audit
from tessera.cli.rest import Rest
from tests.support.builders import an_input
from tests.support.command_line import Ran, login, running, tessera
from tests.support.eventually import eventually
from tests.support.platform import Platform, running_platform

DEMO = "talking-1"


@pytest.fixture(scope="module")
async def platform() -> AsyncIterator[Platform]:
    """With an endpoint that answers, and one whose update failed."""
    async with running_platform() as running:
        await running.introduce("bob")
        admin = running.endpoints_of("admin")
        for name, model in (("demo", "talking"), ("broken", "ready")):
            await admin.create(name, model)
            await admin.settled(name)
        await admin.query("demo", path=b'{"say": "some words"}')
        failing = an_input("failing", name="new", environment_vars={"SAID": "no weights"})
        await admin.update("broken", failing)
        await admin.settled("broken")
        yield running


async def run(platform: Platform, *arguments: str) -> str:
    """What a command prints that goes well."""
    ran = await tessera(login(platform.url, platform.tokens["admin"]), *arguments)
    assert (ran.status, ran.complained) == (0, "")
    return ran.said


async def complaint(environment: dict[str, str], *arguments: str) -> str:
    """What a command says that does not."""
    ran = await tessera(environment, *arguments)
    assert (ran.status, ran.said) == (1, "")
    return ran.complained


async def test_endpoints_are_listed_with_their_states(platform: Platform) -> None:
    first, *others = (await run(platform, "endpoints")).splitlines()
    assert first.split() == ["NAME", "STATE", "UPDATE", "MODELS", "CREATOR"]
    assert [line.split() for line in others] == [
        ["broken", "READY", "UPDATE_FAILED", "ready", "1", "admin"],
        ["demo", "READY", "NOT_UPDATING", "talking", "1", "admin"],
    ]


async def test_endpoint_is_told_with_the_cause_of_its_failure(platform: Platform) -> None:
    cause = (
        "Phase load failed: KeyError: no weights. Its log says more. Mend the model or its variables, then update the"
        " endpoint."
    )
    assert (await run(platform, "endpoints", "broken")).splitlines() == [
        "broken READY UPDATE_FAILED",
        "  active configuration 1",
        "    ready-1 (ready 1): READY",
        "  pending configuration 2",
        "    new (failing 1): FAILED",
        f"      {cause}",
    ]


async def test_events_have_durations_and_causes(platform: Platform) -> None:
    lines = (await run(platform, "events", "broken")).splitlines()
    began = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(rf"{began}  ready-1 1 [0-9a-f]{{8}}  model download +\d+\.\d{{3}} s  succeeded", lines[0])
    assert re.fullmatch(rf"{began}  new 2 [0-9a-f]{{8}}  load +\d+\.\d{{3}} s  failed", lines[-2])
    assert lines[-1].startswith("    Phase load failed: KeyError: no weights. ")


@pytest.mark.parametrize("log", ["secrets", "serving"])
async def test_an_audit_log_is_shown_exported_and_verified(platform: Platform, tmp_path: Path, log: str) -> None:
    newest = [json.loads(line) for line in (await run(platform, "audit", "tail", log, "-n", "3")).splitlines()]
    assert [each["service"] for each in newest] == [log] * 3
    assert [each["seq"] - newest[0]["seq"] for each in newest] == [0, 1, 2]
    keys, exported = tmp_path / "keys", tmp_path / "log"
    await run(platform, "audit", "keys", str(keys), "--data-dir", str(platform.secrets.settings.data_dir))
    said = await run(platform, "audit", "export", log, str(exported))
    lines = exported.read_text().splitlines()
    assert said == f"{exported}: records 1 to {len(lines)}\n"
    assert len(lines) >= newest[-1]["seq"]
    assert (keys.stat().st_mode | exported.stat().st_mode) & 0o777 == 0o600
    verify = ("audit", "verify", str(exported), "--keys", str(keys))
    assert (await run(platform, *verify)).startswith(f"whole: {len(lines)} records of {log}, 1 to {len(lines)}, head ")
    for name in ("secrets", "serving"):  # a log in the place of the other is none
        exported.replace(tmp_path / f"{name}-000000000001.jsonl")
        exported = tmp_path / f"{name}-000000000001.jsonl"
        found = await tessera({}, "audit", "verify", str(exported), "--keys", str(keys))
        assert found.status == (0 if name == log else 1)
        assert name == log or "which is none at hand of the service that it names" in found.said
    exported = exported.replace(tmp_path / "log")
    exported.write_text("\n".join(lines[:4] + lines[5:]) + "\n")
    found = await tessera({}, *verify)
    assert (found.status, found.said) == (1, "NOT WHOLE: line 5: record 6 does not follow record 4\n")
    # What is there already is no place to export to, and what was exported is not begun anew.
    assert "cannot be written" in await complaint(
        login(platform.url, platform.tokens["admin"]), "audit", "export", log, str(exported)
    )


async def test_an_audit_log_is_exported_to_standard_output(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = await tessera(login(platform.url, platform.tokens["admin"]), "audit", "export", "serving", "-")
    numbers = [json.loads(line)["seq"] for line in ran.said.splitlines()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert (ran.status, ran.complained) == (0, f"-: records 1 to {len(numbers)}\n")
    assert list(tmp_path.iterdir()) == []


async def test_an_audit_log_without_a_record_is_shown_and_exported(tmp_path: Path) -> None:
    exported = tmp_path / "log"
    async with running_platform() as platform:
        # Each question is recorded when it has its answer, so there is one for each log.
        assert await run(platform, "audit", "export", "serving", str(exported)) == f"{exported}: no records\n"
    assert exported.read_text() == ""
    async with running_platform() as platform:
        assert await run(platform, "audit", "tail", "serving") == ""


KEY = AuditKey(bytes(32))


def a_log(*facts: dict[str, Any], service: str = "secrets") -> list[str]:
    """A record with each of these facts, as lines."""
    head, lines = Head(), []
    for each in facts:
        text, head = line(KEY, head, {"service": service, **each}, at=0.0)
        lines.append(f"{text}\n")
    return lines


def verifying(folder: Path, *files: Path) -> tuple[str, ...]:
    """The command that verifies these files of records of `a_log`; what it needs besides is in the folder."""
    keys = folder / "keys"
    keys.touch(0o600)
    keys.write_text(json.dumps([{"service": name, "key": KEY.raw.hex()} for name in ("secrets", "serving")]))
    return ("audit", "verify", *map(str, files), "--keys", str(keys))


@pytest.mark.parametrize("names", [("old", "new"), ("secrets.jsonl.1", "secrets.jsonl"), ("a", "b")])
async def test_files_of_an_audit_log_have_any_names_and_any_order(tmp_path: Path, names: tuple[str, str]) -> None:
    records, (old, new), empty = a_log(*[{}] * 20), (tmp_path / name for name in names), tmp_path / "c"
    old.write_text("".join(records[:9]))
    # As a forwarder that was killed leaves it: half a line is taken back, and a record may be there twice.
    new.write_text("".join(records[8:]))
    empty.touch()
    for files in ((old, new, empty), (empty, new, old)):
        found = await tessera({}, *verifying(tmp_path, *files))
        assert (found.status, found.said[:36]) == (0, "whole: 20 records of secrets, 1 to 2")
    new.write_text("".join(["no record\n", *records[9:]]))
    found = await tessera({}, *verifying(tmp_path, new, old))
    assert (found.status, found.said) == (1, "NOT WHOLE: line 10: this is no record\n")
    for missing in ("secrets.jsonl.2", "secrets-000000000021.jsonl"):
        said = await complaint({}, *verifying(tmp_path, tmp_path / missing, old))
        assert f"{missing} cannot be read" in said
    said = await complaint({}, *verifying(tmp_path, Path("/dev/null"), old))
    assert "/dev/null is no regular file." in said  # a pipe can be read once only


async def test_an_audit_log_is_verified_from_where_it_is_said_to_begin(tmp_path: Path) -> None:
    records, exported = a_log(*[{}] * 9), tmp_path / "log"
    exported.write_text("".join(records[4:]))
    verify = verifying(tmp_path, exported)
    found = await tessera({}, *verify)
    assert (found.status, "the log begins at record 5, and" in found.said) == (1, True)
    found = await tessera({}, *verify, "--from", "4")  # which is missing, then
    assert (found.status, "the log begins at record 5, and" in found.said) == (1, True)
    for begin in ("5", "6"):
        found = await tessera({}, *verify, "--from", begin)
        assert (found.status, found.said[:34]) == (0, "whole: 5 records of secrets, 5 to ")


async def test_an_audit_log_is_verified_as_a_syslog_server_wrote_it(tmp_path: Path) -> None:
    records, log = a_log({"object": "{"}, {}), tmp_path / "log"
    verify = verifying(tmp_path, log)
    log.write_text("".join(f"Nov 28 04:30:00 host tessera-secrets[7]: {each}" for each in records))
    found = await tessera({}, *verify)
    assert (found.status, found.said) == (1, "NOT WHOLE: line 1: this is no record\n")
    found = await tessera({}, *verify, "--syslog")
    assert (found.status, found.said[:40]) == (0, "whole: 2 records of secrets, 1 to 2, hea")
    for changed in (records[0].replace('{"seq"', '{{"seq"'), f"{records[0][:-1]} \n", records[0][1:]):
        log.write_text(f"host: {changed}")
        found = await tessera({}, *verify, "--syslog")
        assert (found.status, found.said) == (1, "NOT WHOLE: line 1: this is no record\n")


def published(record: str, **instead: object) -> str:
    """What a service's log says when that record is the last."""
    of = json.loads(record)
    event = {
        "seq": of["seq"],
        "mac": of["mac"],
        "service": f"{of['service']}_service",
        "event": "audit head",
        **instead,
    }
    return f"{json.dumps(event)}\n"


async def test_an_end_that_was_cut_off_is_found_by_heads_of_that_service(tmp_path: Path) -> None:
    records, others = a_log(*[{}] * 9), a_log(*[{}] * 9, service="serving")
    log, old, new = tmp_path / "log", tmp_path / "old", tmp_path / "new"
    log.write_text("".join(records))
    old.write_text("".join(["Traceback\n", published(records[3]), published(others[3])]))
    new.write_text("".join([published(others[8]), published(records[6]), published(records[6])]))
    verify = (*verifying(tmp_path, log), "--heads", str(old))
    found = await tessera({}, *verify, "--heads", str(new))
    assert found.status == 0
    assert found.said.splitlines()[1] == "published heads of secrets that are in it: 2, the last at record 7"
    log.write_text("".join(records[:5]))
    assert (await tessera({}, *verify)).status == 0  # the newest heads are elsewhere
    found = await tessera({}, *verify, "--heads", str(new))
    assert (found.status, found.said) == (1, "NOT WHOLE: the log ends at record 5, and record 7 was published\n")


@pytest.mark.parametrize("heads", ["/dev/null", "serving"])
async def test_heads_that_say_nothing_about_an_audit_log_are_no_assurance(tmp_path: Path, heads: str) -> None:
    log, begun = tmp_path / "log", a_log(*[{}] * 5)
    log.write_text("".join(begun[2:]))
    (tmp_path / "serving").write_text(published(a_log({}, service="serving")[0]) + published(begun[1]))
    said = await complaint({}, *verifying(tmp_path, log), "--from", "3", "--heads", str(tmp_path / heads))
    assert f"No head of secrets from record 3 on is in {tmp_path / heads}, so" in said


async def test_a_damaged_head_is_told_with_its_place_and_other_lines_are_passed_over(tmp_path: Path) -> None:
    log, heads, (record,) = tmp_path / "log", tmp_path / "heads", a_log({})
    log.write_text(record)
    verify = (*verifying(tmp_path, log), "--heads", str(heads))
    other = f"{'[' * 200_000}\n\n[]\n\x00\n"
    heads.write_text(other + published(record))
    assert (await tessera({}, *verify)).status == 0
    for instead in ({"seq": "x"}, {"seq": None}, {"seq": True}, {"mac": 1}):
        heads.write_text(f"{other}{published(record, **instead)}")
        assert f"{heads}, line 5, is no head of an audit log" in await complaint({}, *verify)
    heads.write_text('{"event":"audit head"}')
    assert f"{heads}, line 1, is no head of an audit log" in await complaint({}, *verify)


@pytest.mark.parametrize("content", ["[" * 200_000, "", "1", '[{"service":"secrets"}]', '{"a":1}'])
async def test_damaged_keys_of_audit_logs_are_told(tmp_path: Path, content: str) -> None:
    verify = verifying(tmp_path, tmp_path / "log")
    (tmp_path / "keys").write_text(content)
    assert "is not what `tessera audit keys` wrote" in await complaint({}, *verify)


async def test_keys_of_audit_logs_that_others_may_read_are_refused(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(a_log({})[0])
    verify = verifying(tmp_path, log)
    (tmp_path / "keys").chmod(0o644)
    assert "has mode 0644, so others may have read it." in await complaint({}, *verify)
    (tmp_path / "keys").unlink()
    assert f"{tmp_path / 'keys'} cannot be read" in await complaint({}, *verify)


async def test_no_record_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    found = await tessera({}, *verifying(tmp_path, tmp_path / "log"))
    assert (found.status, found.said) == (1, "NOT WHOLE: the log holds no record\n")


async def test_an_audit_log_of_which_files_expire_is_verified_from_there_on(tmp_path: Path) -> None:
    files = [tmp_path / f"secrets-{number:012}.jsonl" for number in range(1, 5)]
    for path, record in zip(files, a_log({}, {}, {}, {"method": EXPIRED, "through": 2}), strict=True):
        path.write_text(record)
    verify = verifying(tmp_path, *files)
    for path in files[:2]:
        path.unlink()
        assert (await tessera({}, *verify)).status == 0
    files[2].unlink()  # which the log does not say
    found = await tessera({}, *verify)
    assert (found.status, "the log begins at record 4" in found.said) == (1, True)
    files[3].unlink()  # nothing is left, so none of these is a log
    assert "secrets-000000000004.jsonl cannot be read" in await complaint({}, *verify)


async def test_an_export_ends_when_records_that_it_is_to_write_expire_before_it_comes_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_platform(audit_file_mib=0) as platform:  # so that whatever is written begins another file
        folder, exported = platform.secrets.settings.data_dir / "audit", tmp_path / "log"

        def files() -> list[Path]:
            return sorted(folder.glob("secrets-*"))

        await eventually(lambda: bool(files()))
        await platform.introduce("ada")
        await eventually(lambda: first_of(files()[-1]) > 3)
        ask = audit._records

        def asked(rest: Rest, log: str, **about: int) -> list[str]:
            found = ask(rest, log, **about)
            if "after" in about:
                for path in files()[:-1]:
                    path.unlink()
            return found

        monkeypatch.setattr(audit, "_records", asked)
        monkeypatch.setattr(audit, "_MOST", 1)
        export = ("audit", "export", "secrets", str(exported))
        for further in ((), ("--after", "1")):
            said = await complaint(login(platform.url, platform.tokens["admin"]), *export, *further)
            assert re.search(r"Records 2 to \d+ of the log were removed .* Export it again, without --after\.", said)
            assert not exported.exists()
        monkeypatch.undo()
        await run(platform, *export)
        numbers = [json.loads(line)["seq"] for line in exported.read_text().splitlines()]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))


async def test_an_audit_log_is_followed_over_its_files_until_ctrl_c() -> None:
    async with running_platform(audit_file_mib=0) as platform:  # so that whatever is written begins another file
        program = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "tessera.cli", "audit", "tail", "secrets", "-n", "1", "--follow"),
            env={"PATH": os.environ["PATH"], **login(platform.url, platform.tokens["admin"])},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert program.stdout is not None
        folder = platform.secrets.settings.data_dir / "audit"
        async with asyncio.timeout(60):
            shown = [json.loads(await program.stdout.readline())]
            for name in ("first", "second"):
                await platform.introduce(name)
                while name not in json.dumps(shown[-1]):
                    shown.append(json.loads(await program.stdout.readline()))
                last = shown[-1]["seq"]  # what comes now is in another file
                await eventually(lambda last=last: last in [each["seq"] for each in of_files(folder)])
            program.send_signal(signal.SIGINT)
            _, complained = await program.communicate()
        assert (program.returncode, complained) == (130, b"")
        begin, end = shown[0]["seq"], shown[-1]["seq"]
        # Everything once and in order, but for what the follower asked itself, which is in the log.
        between = [each for each in of_files(folder) if begin < each["seq"] <= end]
        asked = [each for each in between if each["request_id"].startswith("follow-")]
        assert asked
        assert shown[1:] == [each for each in between if each not in asked]
        assert any(begin < int(path.stem.rpartition("-")[2]) <= end for path in folder.iterdir()), "files were begun"


def of_files(folder: Path) -> list[dict[str, Any]]:
    """The records in the files of an audit log."""
    return [json.loads(line) for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]


async def test_only_admins_read_an_audit_log(platform: Platform) -> None:
    for log in ("secrets", "serving"):
        said = await complaint(login(platform.url, platform.tokens["bob"]), "audit", "tail", log)
        assert "Only admins may read the audit log." in said


async def test_logs_are_shown(platform: Platform) -> None:
    assert await run(platform, "logs", "demo") == "some words\n"
    assert await run(platform, "logs", "demo", "--entity", DEMO) == "some words\n"
    assert "nothing is built" in await run(platform, "logs", "demo", "--build")
    assert await run(platform, "logs", "demo", "--build", "--follow") == await run(platform, "logs", "demo", "--build")


async def test_logs_are_followed_to_their_end(platform: Platform) -> None:
    admin = platform.endpoints_of("admin")
    await admin.create("ending", "talking")
    await admin.settled("ending")
    async with running(login(platform.url, platform.tokens["admin"]), "logs", "ending", "--follow") as followed:
        await admin.query("ending", path=b'{"say": "first"}')
        await until(followed, "first\n")
        await admin.query("ending", path=b'{"say": "second"}')
        await until(followed, "first\nsecond\n")
        await admin.stop("ending")
    assert (followed.status, followed.complained) == (0, "")


async def until(ran: Ran, words: str) -> None:
    await eventually(lambda: words in ran.said, what=f"{words!r} is printed")


async def test_follower_whose_endpoint_goes_is_told_why_it_ends(platform: Platform) -> None:
    admin = platform.endpoints_of("admin")
    await admin.create("going", "talking")
    await admin.settled("going")
    async with running(login(platform.url, platform.tokens["admin"]), "logs", "going", "--follow") as followed:
        await admin.query("going", path=b'{"say": "words"}')
        await until(followed, "words\n")
        await admin.delete("going")
    assert followed.status == 1
    assert "404: Endpoint with name 'going' does not exist." in followed.complained


async def test_what_cannot_be_done_is_said_in_one_line(platform: Platform) -> None:
    admin = login(platform.url, platform.tokens["admin"])
    for environment, arguments, words in (
        ({}, ["endpoints"], "Set DATABRICKS_HOST and DATABRICKS_TOKEN: the platform's address, such as"),
        ({"DATABRICKS_HOST": platform.url}, ["endpoints"], "Set DATABRICKS_TOKEN: a token for the platform.\n"),
        ({"DATABRICKS_TOKEN": "x"}, ["endpoints"], "Set DATABRICKS_HOST: the platform's address, such as http://127.0"),
        (
            login("http://127.0.0.1:1", "x"),
            ["events", "demo"],
            "not answered by http://127.0.0.1:1: Connection refused",
        ),
        (login("http://127.0.0.1:port", "x"), ["endpoints"], "DATABRICKS_HOST is http://127.0.0.1:port"),
        (login(platform.url, "dapi-wrong"), ["endpoints"], "403: Invalid access token."),
        (login(platform.url, "two\nlines"), ["endpoints"], "DATABRICKS_TOKEN"),
        (admin, ["endpoints", "none"], "404: Endpoint with name 'none' does not exist."),
        (admin, ["events", "a/b"], "404"),
        (admin, ["logs", "none", "--follow"], "404: Endpoint with name 'none' does not exist."),
        (admin, ["logs", "broken"], "Name a served entity of broken with --entity. There are: new, ready-1."),
        (admin, ["logs", "demo", "--entity", "none"], "has no served entity with name 'none'"),
        (admin, ["logs", "demo", "--entity", "none", "--follow"], "has no served entity with name 'none'"),
    ):
        said = await complaint(environment, *arguments)
        assert words in said, (arguments, said)
        assert said.startswith("tessera: ")
        assert said.count("\n") == 1


async def test_wrong_usage_shows_what_there_is() -> None:
    ran = await tessera({}, "nonsense")
    assert ran.status == 2
    for command in ("up", "demo", "endpoints", "events", "logs", "admin-token"):
        assert command in ran.complained


@pytest.mark.parametrize("command", ["endpoints", "events", "logs"])
async def test_help_says_which_platform_is_asked(command: str) -> None:
    ran = await tessera({}, command, "--help")
    assert ran.status == 0
    assert "DATABRICKS_HOST" in ran.said
