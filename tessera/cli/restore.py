"""`tessera restore`: makes a data directory of a backup, for `tessera up` to run on.

It takes the root key that the backup was made under. Nothing is restored of a backup that is not whole, and the
directory is there as a whole or not at all. What changed since the backup is as it was then: revoke again what was
revoked since, and keep the platform that the backup was made of from running beside the restored one.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import secrets
import shutil
import time
from pathlib import Path

from secrets_service import rootkey
from secrets_service.rootsource import RootSource
from servicekit import database
from servicekit.errors import StartError
from serving_service import store
from tessera.cli import archive, verify
from tessera.cli.archive import Backup, File, Progress

_FAILED = "Nothing was restored"

_PLACES = {archive.SECRETS: "secrets", archive.SERVING: "serving", "locks": "serving"}
"""The folder that each file or folder of a backup goes to; the rest goes to the data directory itself."""


def describe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser("restore", help="make a data directory of a backup", description=__doc__)
    parser.add_argument("backup", type=Path, metavar="BACKUP", help="the directory that `tessera backup` made")
    parser.add_argument("directory", type=Path, metavar="DIR", help="the data directory to be made, new or empty")
    verify.add_root_key(parser)
    parser.add_argument(
        "--with-damage",
        action="store_true",
        help="restore also where rights or values were damaged before the backup was made: they stay closed",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Restores, and says what is to be done next."""
    directory: Path = arguments.directory.absolute()
    if os.path.lexists(directory) and not _is_empty(directory):
        raise StartError(
            f"{directory} is not empty. Name a directory that is, or a new one; the root key by --root-key."
        )
    backup = archive.opened(arguments.backup.absolute())
    key = verify.root_key(arguments)
    if key is None and backup.manifest.has_root_key:
        raise StartError(
            f"{_FAILED}: the root key {backup.manifest.facts['root_key_id']} is in it, encrypted by a key service. Set"
            " TESSERA_ROOT_KEY_SOURCE=kms:/path of the plugin that speaks for that service."
        )
    if key is None:
        raise StartError(
            f"{_FAILED}: it takes the root key {backup.manifest.facts['root_key_id']}. Name its file by --root-key, or"
            " set TESSERA_ROOT_KEY_FILE or TESSERA_ROOT_KEY_SOURCE if it is to stay where it is."
        )
    _check(backup, key, with_damage=arguments.with_damage)
    staged = directory.with_name(f"{directory.name}.restoring-{secrets.token_hex(4)}")
    try:
        staged.mkdir(mode=0o700)
        _fill(staged, backup)
        if arguments.root_key is not None:
            with archive.open_for_writing(staged / "root.key") as file:
                file.write(rootkey.load(arguments.root_key).key.reveal())
        archive.sync_all(staged)
        staged.rename(directory)
        archive.sync(directory.parent)
    except OSError as error:
        raise StartError(f"{_FAILED}: {directory} cannot be made ({error.strerror}).") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    _tell(directory, backup)
    return 0


def _is_empty(directory: Path) -> bool:
    return directory.is_dir() and not directory.is_symlink() and not any(directory.iterdir())


def _check(backup: Backup, key: RootSource, *, with_damage: bool) -> None:
    if found := verify.faults_without_key(backup, print):
        raise StartError(f"{_FAILED}, since {backup.folder} is damaged: {'; '.join(found)}.")
    found = asyncio.run(verify.faults_with_key(backup, key))
    for fault in found:
        print(f"damaged: {fault}")
    if found and not with_damage:
        raise StartError(
            f"{_FAILED}, since something was damaged before the backup was made. Use another backup, or restore this"
            " one by --with-damage: what is damaged stays closed, and the rest works."
        )


def _fill(staged: Path, backup: Backup) -> None:
    for file in backup.manifest.files:
        _copy(backup, file, staged / _PLACES.get(file.name.partition("/")[0], ".") / file.name)
    # No replica of the platform that was backed up is ours, and whatever still runs of one must take us for the later.
    database.amended(staged / "serving" / archive.SERVING, store.begin_anew, int(time.time()))


def _copy(backup: Backup, file: File, to: Path) -> None:
    digest = hashlib.sha256()
    with archive.open_for_reading(backup.path(file.name)) as source, archive.open_for_writing(to) as target:
        for part in archive.parts(source, Progress(file.name, file.size, print)):
            digest.update(part)
            target.write(part)
    if digest.hexdigest() != file.sha256:
        raise StartError(f"{_FAILED}: {file.name} has changed while it was read.")


def _tell(directory: Path, backup: Backup) -> None:
    print(f"{directory} holds the platform as it was at {backup.manifest.made_at}.")
    print(f"Start it with:           tessera up --data-dir {directory}")
    print(f"Then, for a new token:   tessera admin-token --data-dir {directory}")
    if backup.manifest.facts["model_registry"] == "elsewhere":
        print("Its models come from a registry elsewhere: set TESSERA_MODEL_REGISTRY as it was.")
    else:
        print("Model files are not in a backup: they must be where the registry says, as they were.")
