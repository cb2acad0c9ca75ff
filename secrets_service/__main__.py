"""`python -m secrets_service`: runs the Secrets service until TERM or INT."""

import sys

from secrets_service.app import running
from secrets_service.settings import SecretsSettings
from servicekit import process

if __name__ == "__main__":
    sys.exit(process.run("secrets_service", "Secret scopes, secrets, users and tokens.", SecretsSettings, running))
