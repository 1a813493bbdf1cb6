"""What the fixtures `timed` and `named_rule` hand to a test."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

Timed = Callable[[], AbstractContextManager[None]]
"""Makes a block whose seconds are written down."""
NamedRule = Callable[[Exception], None]
"""Asserts that an error's rule stands in the test's docstring."""
