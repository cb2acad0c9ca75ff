"""Tiny programs in the place of the services, each named for its behaviour, so that `up` is tested on bad days.

`python stand_ins.py <service> <behaviour>`: `well` listens and says that it is ready; `dying` says why it cannot start
and ends; `waiting` says what it waits for, and does; `stubborn` is well and ignores every wish that it may end.
"""

import http.server
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from servicekit import sockets

SERVICES = ("secrets", "serving", "gateway")
CAUSE = "The root key is not the one that this database was made with."


def commands(**behaviours: str) -> Mapping[str, Sequence[str]]:
    """How to start stand-ins for the three services, `well` where nothing else is said."""
    return {name: (sys.executable, "-P", __file__, name, behaviours.get(name, "well")) for name in SERVICES}


def main(service: str, behaviour: str) -> None:
    log(event="stand-in started", behaviour=behaviour)
    if behaviour == "dying":
        log(event="cannot start", cause=CAUSE)
        sys.exit(1)
    if behaviour == "waiting":
        log(event="waiting", cause=CAUSE)
        sys.stdin.buffer.read()
        sys.exit(0)
    stubborn = behaviour == "stubborn"
    signal.signal(signal.SIGTERM, signal.SIG_IGN if stubborn else lambda *_: os._exit(0))
    if not stubborn:
        threading.Thread(target=end_with_supervisor, daemon=True).start()
    if service == "gateway":
        serve_http(os.environ["TESSERA_GATEWAY_LISTEN"])
    else:
        directory = sockets.socket_directory(Path(os.environ["TESSERA_DATA_DIR"]))
        serve_grpc(sockets.socket_address(directory, callee=service, caller="gateway"))


def log(**event: str) -> None:
    """One line of JSON, as the services write them."""
    sys.stderr.write(json.dumps(event) + "\n")
    sys.stderr.flush()


def end_with_supervisor() -> None:
    """The supervisor holds the other end of standard input and never writes."""
    sys.stdin.buffer.read()
    os._exit(1)


def serve_http(address: str) -> None:
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Requests are not worth a line."""

    host, _, port = address.rpartition(":")
    http.server.HTTPServer((host, int(port)), Health).serve_forever()


def serve_grpc(address: str) -> None:
    import grpc
    from grpc_health.v1 import health, health_pb2_grpc

    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    server.add_insecure_port(address)
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main(*sys.argv[1:])
