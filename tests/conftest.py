"""What holds for all tests: how Hypothesis draws its cases, and that programs can be interrupted.

No test has a deadline of its own: how fast a machine is says nothing about the code.

The rule: every change is tried on the same cases, so that what was green stays green until something changes; the long
tier draws new ones in each run, and prints what it takes to replay one that fails. Where a fault was planted, whether
there is a case that fails is all that counts: looking for the smallest takes minutes where a case is a whole service.
"""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, Phase, settings

settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("anew", settings.get_profile("steady"), derandomize=False, print_blob=True)
settings.register_profile("unshrunk", settings.get_profile("steady"), phases=(Phase.explicit, Phase.generate))

# A shell without job control has what it starts in the background ignore ^C, and so would what the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
