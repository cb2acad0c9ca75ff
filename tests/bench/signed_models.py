"""`python -m tests.bench.signed_models FOLDER`: saves the models of the table `model-server`, one folder each."""

from __future__ import annotations

import sys
from pathlib import Path

import cloudpickle

from tests.differential import models


def main() -> None:
    cloudpickle.register_pickle_by_value(models)  # the servers that are measured do not find our tests
    for name in ("doubles", "double tensor"):
        models.saved(name, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
