"""`python -m tests.bench`: measures and prints the tables, each as soon as it is known.

Figures, not verdicts: a figure beyond its limit does not change the exit status.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import signal
import sys
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

from tests.bench import (
    footprint,
    invocation,
    launch,
    load,
    many_endpoints,
    many_secrets,
    model_server,
    peers,
    rest_list,
    rest_read,
    secret_read,
    secret_write,
    start,
)
from tests.bench.run import Run

TABLES = {
    "secret-read": secret_read.measure,
    "secret-write": secret_write.measure,
    "many-secrets": many_secrets.measure,
    "rest-read": rest_read.measure,
    "rest-list": rest_list.measure,
    "model-server": model_server.measure,
    "invocation": invocation.measure,
    "peers": peers.measure,
    "launch": launch.measure,
    "start": start.measure,
    "many-endpoints": many_endpoints.measure,
    "footprint": footprint.measure,
}

_LIBRARIES = ("grpcio", "protobuf", "uvloop", "uvicorn", "mlflow-skinny")


def main() -> int:
    """Runs the benchmarks that were asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description="Measures the platform against baselines."
    )
    parser.add_argument(
        "--only", action="append", choices=TABLES, metavar="NAME", help=f"one of {', '.join(TABLES)}; may be repeated"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="how often each figure is measured (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=int, default=3, help="length of each load (default: %(default)s)")
    parser.add_argument(
        "--patience",
        type=float,
        default=8,
        metavar="SECONDS",
        help="how long a figure may be waited for and repeated while others use the machine (default: %(default)s)",
    )
    options = parser.parse_args()
    if options.rounds < 1 or options.seconds < 1:
        parser.error("--rounds and --seconds are 1 at least")
    load.require_programs()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was started is ended
    _print(_machine())
    with ExitStack() as exits:
        directory = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="t-", dir="/tmp")))
        run = Run(
            rounds=options.rounds,
            seconds=options.seconds,
            patience=options.patience,
            directory=directory,
            exits=exits,
        )
        for name in options.only or TABLES:
            _print(f"\n{TABLES[name](run)}")
    return 0


def _machine() -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    return (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {len(os.sched_getaffinity(0))} cores ({platform.machine()}), "
        f"Python {platform.python_version()}, {libraries}"
    )


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
