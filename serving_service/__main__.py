"""Starts the Serving service."""

import sys

from servicekit import process
from serving_service.app import running
from serving_service.settings import ServingSettings

if __name__ == "__main__":
    sys.exit(process.run("serving_service", "Serving endpoints: models as processes.", ServingSettings, running))
