"""`tessera endpoints`: which serving endpoints there are, or how one of them is: what failed, and what helps."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from tessera.cli import shown
from tessera.cli.rest import connected

ENDPOINTS = "/api/2.0/serving-endpoints"


def describe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "endpoints", help="list serving endpoints, or tell how one is", description=__doc__, epilog=shown.WHERE
    )
    parser.add_argument("endpoint", nargs="?", metavar="ENDPOINT", help="tell how this one is; default: list all")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints what there is."""
    with connected() as rest:
        if arguments.endpoint is None:
            rows = [_summary(each) for each in rest.call("GET", ENDPOINTS)["endpoints"]]
            shown.table(("NAME", "STATE", "UPDATE", "MODELS", "CREATOR"), rows)
        else:
            shown.lines(_details(rest.call("GET", path_of(arguments.endpoint))))
    return 0


def path_of(endpoint: str) -> str:
    """The path of an endpoint in the REST API."""
    return f"{ENDPOINTS}/{shown.segment(endpoint)}"


def entities_of(endpoint: dict[str, Any]) -> list[str]:
    """The names of the served entities of both configurations."""
    names = [entity["name"] for _, config in _configurations(endpoint) for entity in config["served_entities"]]
    return sorted(set(names))


def _configurations(endpoint: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    both = (("active", endpoint.get("config")), ("pending", endpoint.get("pending_config")))
    return [(name, config) for name, config in both if config is not None]


def _summary(endpoint: dict[str, Any]) -> tuple[str, ...]:
    entities = endpoint.get("config", {}).get("served_entities", [])
    models = ", ".join(f"{each['entity_name']} {each['entity_version']}" for each in entities)
    return (endpoint["name"], *_state(endpoint), models or "-", endpoint.get("creator", "-"))


def _state(endpoint: dict[str, Any]) -> tuple[str, str]:
    """How it is, and how its update goes."""
    state = endpoint["state"]
    is_stopped = state.get("suspend") == "STOPPED"
    return ("STOPPED" if is_stopped else state["ready"]), state["config_update"]


def _details(endpoint: dict[str, Any]) -> Iterator[str]:
    yield " ".join((endpoint["name"], *_state(endpoint)))
    for name, config in _configurations(endpoint):
        yield f"  {name} configuration {config['config_version']}"
        for entity in config["served_entities"]:
            state = entity["state"]
            model = f"{entity['entity_name']} {entity['entity_version']}"
            yield f"    {entity['name']} ({model}): {state['deployment'].removeprefix('DEPLOYMENT_')}"
            if message := state.get("deployment_state_message"):
                yield f"      {message}"
