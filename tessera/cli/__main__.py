"""`tessera <command>`: finds the command and runs it. Each command is a module that describes and runs itself."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from servicekit.errors import StartError
from servicekit.settings import SettingsError
from tessera.cli import admin_token, audit, backup, certs, demo, endpoints, events, keys, logs, restore, up, verify

INTERRUPTED, CLOSED = 130, 141
"""The status of a command that a person ended, or whose output nobody reads any more; as shells have it."""

_COMMANDS = (up, demo, endpoints, events, logs, admin_token, keys, backup, verify, restore, certs, audit)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0 done, 1 failed with a reason on standard error, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="tessera", description="A self-hosted platform for secrets and model serving."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.describe(commands)
    chosen = parser.parse_args(arguments)
    try:
        status: int = chosen.run(chosen)
    except SettingsError as error:
        for problem in error.problems:
            print(f"tessera: {problem}", file=sys.stderr)
        return 2
    except StartError as error:
        print(f"tessera: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read what was printed has enough. Nothing else is to be written there in the end, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    return status


if __name__ == "__main__":
    sys.exit(main())
