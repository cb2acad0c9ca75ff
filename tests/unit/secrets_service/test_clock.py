"""Time goes on, whatever is done to the clock."""

from __future__ import annotations

from secrets_service.clock import Onward


class Clocks:
    def __init__(self) -> None:
        self.wall, self.steady = 1_000.0, 5.0

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


def test_a_clock_that_is_set_back_neither_takes_time_back_nor_stops_it() -> None:
    clocks = Clocks()
    now = Onward(lambda: clocks.wall, steady=lambda: clocks.steady)
    clocks.pass_by(10)
    assert now() == 1_010
    clocks.wall -= 100
    assert now() == 1_010
    clocks.pass_by(30)
    assert now() == 1_040
    clocks.wall += 1_000
    assert now() == 1_940
    clocks.pass_by(1)
    assert now() == 1_941
