"""A plugin for pytest: hypothesis draws the same cases in every run, and stops at the first that fails.

A fault that was caught once is then caught always, as long as test and code stay. Whether there is a case that fails is
all that counts here; looking for the smallest takes minutes where a case is a whole service.
"""

from __future__ import annotations

from hypothesis import Phase, settings

settings.register_profile("unshrunk", phases=(Phase.explicit, Phase.generate), derandomize=True)
settings.load_profile("unshrunk")
