"""Serves one model: `python -P -u -m serving_service.model_server --model PATH --fd N --report-fd M`.

Says on the report pipe, once, whether it is ready or why it never will be, and closes it. TERM ends it with status 0
after the requests in flight are done.
"""

import argparse
import gc
import os
import sys
import time
import traceback

from serving_service.model_server.application import Application
from serving_service.model_server.report import Report


def main() -> int:
    parser = argparse.ArgumentParser(prog="serving_service.model_server")
    parser.add_argument("--model", required=True, help="folder of an MLflow model")
    parser.add_argument("--fd", required=True, type=int, help="inherited listening socket")
    parser.add_argument("--report-fd", required=True, type=int, help="inherited pipe that is told how the start went")
    parser.add_argument("--threads", type=int, default=4, help="calls of the model at a time (default: %(default)s)")
    arguments = parser.parse_args()
    for fd in (arguments.fd, arguments.report_fd):
        os.set_inheritable(fd, False)  # processes that the model starts must not keep them open
    report = Report(arguments.report_fd)
    began = time.monotonic()
    try:
        # Imported here, as in `_loaded`: a missing or broken dependency is a cause to report like any other.
        from serving_service.model_server.server import serve

        app = _loaded(arguments.model, threads=arguments.threads)
    except BaseException as error:
        traceback.print_exc()
        report.failed(error)
        return 1
    serve(app, fd=arguments.fd, on_ready=lambda: report.ready(load_seconds=time.monotonic() - began))
    return 0


def _loaded(path: str, *, threads: int) -> Application:
    """Raises whatever the loading of the model raises."""
    # Hardly anything that is imported is garbage, and looking for it takes a fifth of the start. Afterwards what is
    # there stays; without the freeze each full collection would go through all of it, and stop every call for 0.1 s.
    gc.disable()
    from serving_service.model_server import mlflow_rules
    from serving_service.model_server.scoring import Scoring

    gc.freeze()
    gc.enable()
    scoring = Scoring(mlflow_rules.load(path))
    gc.collect()
    gc.freeze()
    seconds = mlflow_rules.longest_seconds(os.environ)
    return Application(scoring.answer, threads=threads, seconds=seconds, version=mlflow_rules.MLFLOW_VERSION)


if __name__ == "__main__":
    sys.exit(main())
