"""`tessera verify`: whether a backup is as it was made, and with the root key also whether it can be restored.

Without the root key every byte shows that was changed by accident. That somebody changed the backup and made its
digests anew, that stored rights or sealed values are damaged, and that it opens at all, shows with the root key only.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from importlib import resources
from pathlib import Path

from secrets_service import backups, inspection, rootkey, rootsource
from secrets_service.rootsource import GivenSource, RootSource
from secrets_service.settings import SecretsSettings
from servicekit import database, settings
from servicekit.errors import StartError
from servicekit.storage import StorageError
from tessera.cli import archive
from tessera.cli.archive import Backup, Tell

_MIGRATIONS = {
    archive.SECRETS: resources.files("secrets_service") / "migrations",
    archive.SERVING: resources.files("serving_service") / "migrations",
    archive.REGISTRY: None,
}

_WITH_KEY = "whether it opens, was not changed on purpose, and has all rights and sealed values"


def describe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser("verify", help="look whether a backup is whole", description=__doc__)
    parser.add_argument("backup", type=Path, metavar="BACKUP", help="the directory that `tessera backup` made")
    add_root_key(parser)
    parser.set_defaults(run=run)


def add_root_key(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names the root key."""
    parser.add_argument(
        "--root-key",
        type=Path,
        metavar="FILE",
        help="the root key of the backup, mode 0600 (default: where TESSERA_ROOT_KEY_SOURCE or _FILE say it is)",
    )


def root_key(arguments: argparse.Namespace) -> RootSource | None:
    """Where the root key is, if that is said. Nothing is ever changed there."""
    configured = settings.load(SecretsSettings, os.environ)
    if arguments.root_key is None and configured.root_key_source != "file":
        return rootsource.chosen(configured)
    path: Path | None = arguments.root_key or configured.root_key_file
    if path is None:
        return None
    return GivenSource(f"file {path}", lambda: rootkey.load(path).key.reveal())


def run(arguments: argparse.Namespace) -> int:
    """Says what was found; 0 when nothing is wrong with what could be looked at."""
    backup = archive.opened(arguments.backup.absolute())
    key = root_key(arguments)
    found = faults_without_key(backup, print)
    if not found and key is not None:
        found = asyncio.run(faults_with_key(backup, key))
    for fault in found:
        print(f"damaged: {fault}")
    if found:
        return 1
    made = f"Made at {backup.manifest.made_at} by version {backup.manifest.version}, under the root key"
    print(f"{made} {backup.manifest.facts['root_key_id']}.")
    if key is None:
        print("Every byte is as it was written, and the databases are whole.")
        print(f"Not looked at without the root key: {_WITH_KEY}.")
    else:
        print("Every byte is as it was written; it opens, and all rights and sealed values are whole.")
    return 0


def faults_without_key(backup: Backup, tell: Tell) -> list[str]:
    """What is wrong with a backup as far as anybody can see, one line each."""
    found = archive.faults(backup, tell)
    for name, migrations in _MIGRATIONS.items():
        if not found and backup.path(name).exists():
            found += [f"{name}: {fault}" for fault in database.faults(backup.path(name), migrations)]
    return found


async def faults_with_key(backup: Backup, key: RootSource) -> list[str]:
    """What else is wrong with a backup that is whole; raises StartError when the root key does not open it."""
    copy = backup.path(archive.SECRETS)
    keyring = await inspection.keyring(copy, key)
    if not backups.is_authentic(keyring, backup.content, backup.mac):
        raise StartError(
            f"{backup.folder} was changed since it was made: its manifest does not fit its MAC. Use another backup."
        )
    try:
        return [f"{archive.SECRETS}: {fault}" for fault in inspection.faults(copy, keyring)]
    except StorageError as error:
        return [f"{archive.SECRETS}: {error}"]
