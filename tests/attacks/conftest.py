"""One swarm of real nodes for the whole folder; a fresh slot with an honest claim for every attack."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from arena import Arena, LoopThread, Stage, small_plan
from fixture_types import NamedRule, Timed

from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.serving import serve_files

FIGURES = "PARIS_SWARM_ATTACK_FIGURES"
"""Path of a JSON file into which the seconds of each attack are written (docs/results/attacks.json)."""


@pytest.fixture(scope="session")
def figures() -> Iterator[dict[str, float]]:
    found: dict[str, float] = {}
    yield found
    if path := os.environ.get(FIGURES):
        kept = json.loads(Path(path).read_text()) if Path(path).exists() else {}
        Path(path).write_text(json.dumps(dict(sorted({**kept, **found}.items())), indent=1) + "\n")


@pytest.fixture
def timed(request: pytest.FixtureRequest, figures: dict[str, float]) -> Timed:
    """How long the block took (of several the longest): from the first hostile byte until it was refused, or the honest
    record read again.
    """

    @contextmanager
    def block() -> Iterator[None]:
        begun = time.monotonic()
        yield
        name = request.node.originalname
        figures[name] = max(figures.get(name, 0.0), round(time.monotonic() - begun, 4))

    return block


@pytest.fixture
def named_rule(request: pytest.FixtureRequest) -> NamedRule:
    """Assert that an error's rule stands in the test's docstring, and so in docs/attacks.md."""

    def named(error: Exception) -> None:
        assert isinstance(error, RecordError), repr(error)
        said = f"{error.rule} ({type(error).__name__})"
        doc = " ".join((request.function.__doc__ or "").split())
        assert error.rule in doc and type(error).__name__ in doc, f"{said}: {error.detail}"

    return named


@pytest.fixture(scope="session")
def loop_thread() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.stop()


@pytest.fixture(scope="session")
def arena(loop_thread: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    """An open swarm: alice, bob, carol, and a rogue beside them."""
    made = Arena(loop_thread, tmp_path_factory.mktemp("open"), small_plan())
    loop_thread.run(made.open())
    yield made
    loop_thread.run(made.close())


@pytest.fixture
def stage(arena: Arena) -> Iterator[Stage]:
    """A fresh slot with alice's claim. Whatever the attack was, honest peers read that claim when it is over."""
    made = arena.run(arena.raise_curtain())
    yield made
    arena.run(arena.check_honest_claim(made))
    arena.run(arena.drop_curtain(made))


@pytest.fixture(scope="session")
def mallorys_node(arena: Arena) -> Iterator[SwarmNode]:
    node = arena.run(arena.node("mallory", arena.alice, arena.bob, identity=arena.mallory))
    yield node
    arena.run(arena.close_nodes(node))


@pytest.fixture
def liar(mallorys_node: SwarmNode, arena: Arena) -> Iterator[SwarmNode]:
    """Mallory's node: a peer like any other, whose streams and files are what each test makes of them."""
    yield mallorys_node
    for node in (mallorys_node, arena.alice):
        node.transport.serve(serve_files(node.store, node.counters))
    for reader in (arena.alice, arena.bob, arena.carol):
        reader.book.records.clear()  # who served other bytes is asked no more: here mallory gets another chance
