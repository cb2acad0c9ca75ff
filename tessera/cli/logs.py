"""`tessera logs`: what the model server of a served entity prints, or how its environment came about."""

from __future__ import annotations

import argparse

from servicekit.errors import StartError
from tessera.cli import endpoints, shown
from tessera.cli.rest import CutOffError, Rest, connected


def describe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser("logs", help="show a model's output", description=__doc__, epilog=shown.WHERE)
    parser.add_argument("endpoint", metavar="ENDPOINT", help="the endpoint's name")
    parser.add_argument("--entity", metavar="NAME", help="the served entity; default: the only one that there is")
    parser.add_argument("--build", action="store_true", help="how the model's environment came about, not its output")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="go on with what comes, until Ctrl-C, or until nothing of it is going to run or be built any more",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the log."""
    kind = "build-logs" if arguments.build else "logs"
    with connected() as rest:
        entity = shown.segment(arguments.entity or _only_entity(rest, arguments.endpoint))
        path = f"/served-models/{entity}/{kind}"
        whole = f"{endpoints.path_of(arguments.endpoint)}{path}"
        if not arguments.follow:
            shown.text(rest.call("GET", whole)["logs"])
            return 0
        followed = f"/api/2.0/tessera/serving-endpoints/{shown.segment(arguments.endpoint)}{path}:follow"
        try:
            for piece in rest.follow(followed):
                shown.text(piece)
        except CutOffError:
            rest.call("GET", whole)  # where the log may not be read any more, this says why
            raise
    return 0


def _only_entity(rest: Rest, endpoint: str) -> str:
    names = endpoints.entities_of(rest.call("GET", endpoints.path_of(endpoint)))
    if len(names) != 1:
        known = ", ".join(names) or "none"
        raise StartError(f"Name a served entity of {endpoint} with --entity. There are: {known}.")
    return names[0]
