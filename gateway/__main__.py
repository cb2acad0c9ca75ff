"""`python -m gateway`: starts the gateway."""

import sys

from gateway.app import running
from gateway.settings import GatewaySettings
from servicekit import process

sys.exit(process.run("gateway", "Tessera's REST API, in front of Secrets and Serving.", GatewaySettings, running))
