"""`tessera up`: the whole platform on this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from servicekit import settings
from servicekit.errors import StartError
from tessera.cli import interruptible, platform
from tessera.cli.addresses import reachable
from tessera.cli.platform import Config, Platform


def describe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser("up", help="run the platform until Ctrl-C", description=__doc__)
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="where all data lives (default: %(default)s)",
        default=os.environ.get("TESSERA_DATA_DIR") or settings.default_data_dir(),
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8080, help="REST; 0 is any free port (default: %(default)s)")
    parser.add_argument("--secrets-port", type=_port, default=8081, metavar="PORT", help="gRPC (default: %(default)s)")
    parser.add_argument("--serving-port", type=_port, default=8082, metavar="PORT", help="gRPC (default: %(default)s)")
    parser.add_argument(
        "--allow-plaintext",
        action="store_true",
        help="allow a --host beyond loopback although nothing is encrypted: tokens and secrets travel in clear",
    )
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="PEM file: listen with TLS, as this certificate")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM file: the certificate's key, mode 0600")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the platform; 0 when it was stopped by a signal."""
    os.umask(0o077)
    environment = {**os.environ, "TESSERA_DATA_DIR": str(arguments.data_dir)}
    for variable, file in (("TESSERA_TLS_CERT", arguments.tls_cert), ("TESSERA_TLS_KEY", arguments.tls_key)):
        if file is not None:
            environment[variable] = str(file.absolute())
    if arguments.allow_plaintext:
        environment["TESSERA_ALLOW_PLAINTEXT_BEYOND_LOOPBACK"] = "true"
    elif not (_has_tls(environment) or settings.is_loopback(f"{arguments.host}:0")):
        raise StartError(
            f"--host {arguments.host} can be reached by other machines, and nothing here encrypts: tokens and secrets "
            "would travel in clear. Name a certificate with --tls-cert and --tls-key, or put something that encrypts "
            "in front and say so with --allow-plaintext."
        )
    ports = {"gateway": arguments.port, "secrets": arguments.secrets_port, "serving": arguments.serving_port}
    config = Config(environment=environment, host=arguments.host, ports=ports)
    return interruptible.run(partial(_up, config), interrupted=0)


def _has_tls(environment: Mapping[str, str]) -> bool:
    return settings.load(settings.ServiceSettings, environment).has_tls


async def _up(config: Config, hurry: asyncio.Event) -> int:
    _tell("Starting Tessera")
    try:
        async with platform.running(config, _tell, hurry=hurry) as running:
            _tell(summary(running))
            await running.stay()
    except asyncio.CancelledError:
        _tell("Stopped.")
        raise
    return 1


def summary(running: Platform) -> str:
    """Where everything is. The token's file is named, and its content never shown."""
    token = running.data_dir / "admin.token"
    rows = {
        "REST": running.addresses.url,
        "Secrets (gRPC)": reachable(running.addresses.secrets),
        "Serving (gRPC)": reachable(running.addresses.serving),
        "Data": running.data_dir,
        "Logs": running.data_dir / "run" / "*.log",
        "Token": token,
        "Model registry": running.registry_uri,
        "Isolation": running.isolation,
    }
    lines = [f"  {name:15} {value}" for name, value in rows.items()]
    return "\n".join(
        [
            "Ready.",
            *lines,
            "",
            "For Databricks clients:",
            f"  export DATABRICKS_HOST={running.public_url}",
            f"  export DATABRICKS_TOKEN=$(cat {token})",
            "To log and register models from here:",
            f"  export MLFLOW_TRACKING_URI={running.registry_uri} MLFLOW_REGISTRY_URI={running.registry_uri}",
            "",
            "Ctrl-C stops everything.",
        ]
    )


def _tell(line: str) -> None:
    print(line, flush=True)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text} is not a port: expected 0 to 65535")
    return int(text)
