"""A clock that is off is named before it costs a lease."""

from __future__ import annotations

import logging

import pytest

from paris_swarm.cli.connect import check_clock
from paris_swarm.cli.exits import USAGE, Usage, exit_code


@pytest.mark.parametrize("offset", [None, 0.0, 0.9, -0.9])
def test_a_good_clock_is_not_mentioned(offset: float | None, caplog: pytest.LogCaptureFixture) -> None:
    check_clock(offset)
    assert caplog.records == []


def test_a_clock_one_second_off_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_clock(-1.5)
    assert "1.5 s ahead of" in caplog.text


def test_a_clock_three_seconds_off_is_refused_with_the_remedy() -> None:
    with pytest.raises(Usage, match=r"3\.2 s behind .*NTP") as caught:
        check_clock(3.2)
    assert exit_code(caught.value) == USAGE
