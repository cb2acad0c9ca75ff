"""Serves one model: `python -P -u -m serving_service.model_server --model PATH --fd N --report-fd M`.

Says on the report pipe, once, whether it is ready or why it never will be, and closes it. TERM ends it with status 0
after the requests in flight are done.
"""

import argparse
import os
import sys
import time
import traceback

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
        # Imported here, because a missing or broken dependency is a cause to report like any other.
        from serving_service.model_server import mlflow_rules
        from serving_service.model_server.application import Application
        from serving_service.model_server.scoring import Scoring
        from serving_service.model_server.server import serve

        seconds = mlflow_rules.longest_seconds(os.environ)
        app = Application(Scoring(mlflow_rules.load(arguments.model)), threads=arguments.threads, seconds=seconds)
    except BaseException as error:
        traceback.print_exc()
        report.failed(error)
        return 1
    serve(app, fd=arguments.fd, on_ready=lambda: report.ready(load_seconds=time.monotonic() - began))
    return 0


if __name__ == "__main__":
    sys.exit(main())
