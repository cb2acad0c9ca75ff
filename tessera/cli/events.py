"""`tessera events`: what the launches of an endpoint did when: each phase, how long it took, and why one failed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

from tessera.cli import shown
from tessera.cli.rest import Rest, connected

_LOOK_SECONDS = 1.0
_RUNNING = "RUNNING"


def describe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "events", help="tell what an endpoint's launches did when", description=__doc__, epilog=shown.WHERE
    )
    parser.add_argument("endpoint", metavar="ENDPOINT", help="the endpoint's name")
    parser.add_argument("--follow", action="store_true", help="go on with what happens from now on, until Ctrl-C")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the events, the oldest first."""
    path = f"/api/2.0/tessera/serving-endpoints/{shown.segment(arguments.endpoint)}/events"
    known: set[tuple[str, ...]] = set()
    with connected() as rest:
        while True:
            for event in _new(rest, path, known):
                shown.lines(_lines(event))
            if not arguments.follow:
                return 0
            time.sleep(_LOOK_SECONDS)


def _new(rest: Rest, path: str, known: set[tuple[str, ...]]) -> Iterator[dict[str, Any]]:
    """The events that are not `known`; a phase is one while it goes on, and another when it has ended."""
    for event in rest.call("GET", path)["events"]:
        key = (event["replica_id"], event["phase"], str(event["start_time"]), event["outcome"])
        if key not in known:
            known.add(key)
            yield event


def _lines(event: dict[str, Any]) -> Iterator[str]:
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["start_time"] / 1000))
    phase, outcome = event["phase"].lower().replace("_", " "), event["outcome"].lower()
    launch = f"{event['served_entity_name']} {event['config_version']} {event['replica_id'][:8]}"
    yield f"{began}  {launch}  {phase:<17}  {event['duration_ms'] / 1000:>8.3f} s  {outcome}"
    if event["message"] and event["outcome"] != _RUNNING:
        yield f"    {event['message']}"
