"""The seed of a test that draws its own cases: printed at its start, and taken from TESSERA_SEED to replay."""

from __future__ import annotations

import os
import random
import sys


def seeded() -> random.Random:
    """A source of chance; says in the test's output how to draw the same again."""
    seed = os.environ.get("TESSERA_SEED") or str(random.SystemRandom().getrandbits(32))
    sys.stdout.write(f"TESSERA_SEED={seed}\n")
    return random.Random(seed)
