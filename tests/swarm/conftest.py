"""Fixtures of the swarm room."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import settings
from worlds import HivemindWorld, MemoryWorld, World

# The machines that run this are shared: a slow example is no failure.
settings.register_profile("swarm", deadline=None, max_examples=100)
settings.load_profile("swarm")


@pytest.fixture(params=[MemoryWorld, HivemindWorld], ids=["memory", "hivemind"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    """Every transport in turn."""
    made: World = request.param(tmp_path)
    return made


@pytest.fixture
def memory_world(tmp_path: Path) -> MemoryWorld:
    return MemoryWorld(tmp_path)


@pytest.fixture
def hivemind_world(tmp_path: Path) -> HivemindWorld:
    return HivemindWorld(tmp_path)


@pytest.fixture
def soon() -> float:
    """A lease end one minute from now, Unix seconds."""
    return time.time() + 60.0
