"""Errors of model code: what the caller is told, and what the log keeps.

The log keeps where an error arose and of which type it is, never its text: that may repeat a request.
"""

import json
import sys
import traceback

MODEL_FAILED = (
    "Encountered an unexpected error while evaluating the model. Verify that the input is compatible with the model "
    "for inference."
)


def log(error: BaseException) -> None:
    """Writes the type and the frames of an error, and of those that led to it, to the log."""
    while True:
        where = "".join(traceback.format_tb(error.__traceback__))
        sys.stderr.write(f"The model raised {type(error).__name__} while answering a request:\n{where}")
        cause = error.__cause__ or error.__context__
        if cause is None:
            return
        error = cause


def documented(status: int, body: bytes) -> tuple[int, bytes]:
    """An error of MLflow's server as the documented envelope: its message, and nothing of a stack."""
    if status == 504:
        return 504, envelope("DEADLINE_EXCEEDED", "The model did not answer within the time limit of a request.")
    message = _message(body) if status < 500 or body.startswith(b"{") else MODEL_FAILED
    # What goes wrong in a model is the caller's or the model's doing: a client must not repeat it as if we had failed.
    return (status if status < 500 else 400), envelope("BAD_REQUEST", message)


def envelope(error_code: str, message: str) -> bytes:
    return json.dumps({"error_code": error_code, "message": message}).encode()


def _message(body: bytes) -> str:
    text = body.decode("utf-8", "replace")
    try:
        document = json.loads(text)
    except ValueError:
        return text
    if isinstance(document, dict):
        return str(document.get("message") or document.get("detail") or MODEL_FAILED)
    return text
