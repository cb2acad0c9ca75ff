"""Errors: what the caller is told, and what the log keeps.

The log keeps where an error arose and of which type it is, never its text: that may repeat a request.
"""

import json
import sys
import traceback

MODEL_FAILED = (
    "Encountered an unexpected error while evaluating the model. Verify that the input is compatible with the model "
    "for inference."
)
TOO_LATE = "The model did not answer within the time limit of a request."


def log(error: BaseException) -> None:
    """Writes the type and the frames of an error, and of those that led to it, to the log."""
    while True:
        where = "".join(traceback.format_tb(error.__traceback__))
        sys.stderr.write(f"The model raised {type(error).__name__} while answering a request:\n{where}")
        cause = error.__cause__ or error.__context__
        if cause is None:
            return
        error = cause


def envelope(error_code: str, message: str) -> bytes:
    """The documented shape of an error."""
    return json.dumps({"error_code": error_code, "message": message}).encode()
