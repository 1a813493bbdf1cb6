"""The download scheduler: whatever peers do, in any order, every chunk is saved once and no liar is asked again."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.swarm import counters, sources
from paris_swarm.swarm.counters import Counters, Tally
from paris_swarm.swarm.scheduling import Chunk, ChunkScheduler, FetchPolicy
from paris_swarm.swarm.sources import SourceBook

SIZE = 4 << 20


def chunks(count: int, files: int = 1) -> dict[Chunk, int]:
    return {(file, chunk): SIZE for file in range(files) for chunk in range(count)}


def scheduler(
    count: int, *peers: str, files: int = 1, book: SourceBook | None = None, **policy: float
) -> ChunkScheduler:
    made = ChunkScheduler(chunks(count, files), policy=FetchPolicy(**policy), book=book)  # type: ignore[arg-type]
    for peer in peers:
        made.add_source(peer)
        made.engage(peer, 0.0)
    return made


def take_all(made: ChunkScheduler, peer: str, now: float = 0.0) -> list[Chunk]:
    taken = []
    while (chunk := made.take(peer, now)) is not None:
        taken.append(chunk)
    return taken


def bring(made: ChunkScheduler, peer: str, chunk: Chunk, now: float) -> bool:
    wanted = made.delivered(peer, chunk, now)
    if wanted:
        made.saved(peer, chunk)
    return wanted


# ---- many keys


def test_a_source_known_to_be_good_does_not_wait_for_keys_that_were_never_asked() -> None:
    """Each of them can waste some seconds of a place: a thousand of them would keep it from being asked for hours."""
    book = SourceBook()
    book.delivered("good", SIZE, 1.0)
    book.failed("failed")
    made = scheduler(4, book=book)
    for peer in [*(f"key {n}" for n in range(100)), "failed", "good"]:
        made.add_source(peer)
    first = made.ready(0.0)
    assert (first[0], len(first)) == ("good", 8)
    assert "failed" not in first and len(set(first)) == 8, "and those never asked get their chance"


def test_a_book_of_sources_is_bounded_and_forgets_no_liar_and_nobody_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_KEPT", 8)
    book = SourceBook()
    book.ban("liar", "other bytes")
    book.delivered("good", SIZE, 1.0)
    for n in range(1000):
        book.of(f"key {n}")
        assert len(book.records) <= 32
    assert list(book.banned()) == ["liar"]
    assert book.of("good").chunks == 1
    for n in range(1000):
        book.ban(f"key {n}", "other bytes")
    assert len(book.records) <= 32


def test_peers_are_counted_one_by_one_up_to_a_bound_and_no_byte_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for one blob is counted, keys cost nothing, and all of it is written to disk now and then."""
    monkeypatch.setattr(counters, "MOST_PEERS", 8)
    seen = Counters()
    seen.add("sent", "friend", "checkpoint", wire=10_000, logical=20_000)
    for n in range(1000):
        seen.add("sent", f"key {n}", "blob", wire=2, logical=3)
        assert len(seen.sent) <= 18
    assert seen.sent["friend"]["checkpoint"].wire == 10_000
    assert seen.total("sent", "blob") == Tally(count=1000, wire=2000, logical=3000)
    assert seen.as_dict()["sent"][counters.OTHERS]["blob"]["count"] > 900


# ---- laws


class World:
    """Plays a download step by step; hypothesis decides who acts and what happens to whom."""

    def __init__(self, made: ChunkScheduler, draw: st.DataObject) -> None:
        self.made, self.draw, self.now = made, draw, 0.0
        self.saves: Counter[Chunk] = Counter()
        self.owed: dict[str, list[Chunk]] = {}
        self.checking: list[tuple[str, Chunk]] = []
        self.liars: set[str] = set()

    def step(self, peer: str, what: str) -> None:
        made = self.made
        self.now += 0.25
        if what == "check" and self.checking:
            owner, chunk = self.checking.pop(0)
            outcome = self.draw.draw(st.sampled_from(["good", "good", "good", "bad", "disk"]))
            if outcome == "good":
                self.saves[chunk] += 1
                made.saved(owner, chunk)
            elif outcome == "disk":
                made.unsaved(chunk)
            else:
                made.refused(owner, chunk, "other bytes")
                self.liars.add(owner)
                self.owed.pop(owner, None)
        elif peer in self.owed:
            owed = self.owed[peer]
            if what == "take" and (chunk := made.take(peer, self.now)) is not None:
                assert peer not in self.liars, "a liar was asked again"
                assert not self.saves[chunk], "a saved chunk was asked for again"
                assert chunk not in [item for _, item in self.checking], "a chunk that came was asked for again"
                owed.append(chunk)
            elif what == "answer" and owed:
                chunk = owed.pop(0)
                if made.delivered(peer, chunk, self.now):
                    self.checking.append((peer, chunk))
            elif what == "lack" and owed:
                made.not_held(peer, owed.pop(0))
            elif what == "part" and owed:
                made.part(peer, owed[0])
            elif what == "die":
                del self.owed[peer]
                made.failed(peer, self.now, self.draw.draw(st.sampled_from([0, 100_000, 10 << 20])))
            elif what == "close":
                del self.owed[peer]
                made.leave(peer)
        elif peer in made.ready(self.now):
            assert peer not in self.liars
            made.engage(peer, self.now)
            self.owed[peer] = []


@given(st.data(), st.integers(1, 6), st.integers(1, 2), st.integers(1, 4))
def test_every_chunk_is_saved_exactly_once_whatever_happens(
    draw: st.DataObject, count: int, files: int, peers: int
) -> None:
    made = ChunkScheduler(chunks(count, files))
    names = [f"peer{number}" for number in range(peers)]
    for name in names:
        made.add_source(name)
    world = World(made, draw)
    acts = ["take", "take", "answer", "answer", "check", "check", "lack", "part", "die", "close"]
    plan = draw.draw(st.lists(st.tuples(st.sampled_from(names), st.sampled_from(acts)), max_size=60))
    for peer, what in plan:
        world.step(peer, what)
        assert all(times == 1 for times in world.saves.values())
        assert made.missing == count * files - len(world.saves)
    # From here on one honest newcomer does its work, everybody else is silent: nothing may be lost or stuck.
    for owner, chunk in world.checking:
        world.saves[chunk] += 1
        made.saved(owner, chunk)
    made.add_source("honest")
    for peer in list(world.owed):
        made.leave(peer)
    made.engage("honest", world.now)
    for _ in range(2 * count * files):
        if (next_chunk := made.take("honest", world.now)) is None:
            break
        assert made.delivered("honest", next_chunk, world.now)
        world.saves[next_chunk] += 1
        made.saved("honest", next_chunk)
    assert made.done
    assert world.saves == Counter(chunks(count, files).keys())
    assert made.take("honest", world.now) is None


@given(st.data(), st.integers(1, 12), st.integers(1, 3))
def test_silent_owners_cannot_hold_the_last_chunks(draw: st.DataObject, count: int, silent: int) -> None:
    """Peers that were asked and never answer do not keep an honest one from finishing, without any of them failing."""
    names = [f"silent{number}" for number in range(silent)]
    made = scheduler(count, *names, "honest")
    for name in draw.draw(st.permutations(names)):
        take_all(made, name)
    now = 0.0
    for _ in range(10 * count):
        now += 1.0
        while (chunk := made.take("honest", now)) is not None:
            now += 0.1
            assert bring(made, "honest", chunk, now)
        if made.done:
            break
    assert made.done


# ---- order


def test_one_source_is_asked_in_the_order_of_the_files_with_a_full_pipeline_to_the_end() -> None:
    made = scheduler(5, "a")
    assert take_all(made, "a") == [(0, 0), (0, 1), (0, 2)]
    asked = [(0, 0), (0, 1), (0, 2)]
    for number in range(5):
        assert bring(made, "a", (0, number), 1.0 + number)
        asked += take_all(made, "a", 1.0 + number)
    assert asked == [(0, number) for number in range(5)]
    assert made.done


def test_the_rarest_chunk_goes_first() -> None:
    made = ChunkScheduler(chunks(4))
    made.add_source("all")
    made.add_source("some", holds=[(0, 0), (0, 1), (0, 3)])
    for peer in ("all", "some"):
        made.engage(peer, 0.0)
    assert made.take("all", 0.0) == (0, 2), "only one peer has it"
    assert made.take("some", 0.0) == (0, 0)


def test_a_peer_is_not_asked_for_what_it_said_it_lacks_until_it_is_asked_anew() -> None:
    made = scheduler(2, "a", files=2)
    assert made.take("a", 0.0) == (0, 0)
    made.not_held("a", (0, 0))
    assert take_all(made, "a") == [(1, 0), (1, 1)]
    for number in range(2):
        bring(made, "a", (1, number), 1.0)
    assert made.useless("a")
    made.failed("a", 1.0)
    assert made.ready(1.0) == ["a"], "it had been of use"
    made.engage("a", 1.0)
    assert made.take("a", 1.0) == (0, 0)


def test_near_the_end_chunks_are_not_queued_behind_one_another() -> None:
    made = scheduler(4, "a", "b")
    assert len(take_all(made, "a")) == 2
    assert len(take_all(made, "b")) == 1


def test_the_best_sources_are_used_first_and_new_ones_get_their_chance() -> None:
    book = SourceBook()
    for peer, seconds in (("slow", 4.0), ("fast", 1.0), ("flaky", 1.0)):
        book.delivered(peer, SIZE, seconds)
    for _ in range(5):
        book.failed("flaky")
    made = ChunkScheduler(chunks(4), policy=FetchPolicy(sources=4), book=book)
    for peer in ("flaky", "slow", "fast", "new"):
        made.add_source(peer)
    assert made.ready(0.0) == ["fast", "new", "slow", "flaky"]
    made.engage("new", 0.0)
    made.engage("fast", 0.0)
    assert made.ready(0.0) == ["slow", "flaky"]
    assert ChunkScheduler(chunks(1), policy=FetchPolicy(sources=0), book=book).ready(0.0) == []


# ---- the end


def at_speed(made: ChunkScheduler, speeds: dict[str, float]) -> float:
    """Play a download of honest peers with these speeds in chunks a second; returns the seconds it took."""
    now, sending = 0.0, {}
    while not made.done:
        for peer in speeds:
            take_all(made, peer, now)
        due: list[tuple[float, str, Chunk]] = []
        for peer, speed in speeds.items():
            asked = made._sources[peer].asked
            if asked:
                first = next(iter(asked))
                began = sending.setdefault((peer, first), now)
                due.append((began + 1 / speed, peer, first))
        now, peer, chunk = min(due)
        bring(made, peer, chunk, now)
    return now


def test_equal_sources_share_the_work_and_fetch_nothing_twice() -> None:
    made = scheduler(60, "a", "b", "c")
    seconds = at_speed(made, {"a": 1.0, "b": 1.0, "c": 1.0})
    assert seconds == pytest.approx(20.0)
    assert made.duplicate_bytes == 0
    assert [made.book.of(peer).chunks for peer in "abc"] == [20, 20, 20]


def test_a_fast_source_does_more_and_takes_over_the_end_from_a_slow_one() -> None:
    made = scheduler(40, "fast", "slow")
    seconds = at_speed(made, {"fast": 10.0, "slow": 0.2})
    assert seconds < 4.5, "the slow one's last chunk alone takes five seconds"
    assert made.book.of("fast").chunks >= 38


def test_the_first_copy_wins_and_the_other_is_counted() -> None:
    made = scheduler(1, "a", "b")
    assert made.take("a", 0.0) == (0, 0)
    assert made.take("b", 0.5) is None, "nothing says yet that it is late"
    assert made.take("b", 1.5) == (0, 0)
    assert made.take("b", 1.5) is None
    assert bring(made, "b", (0, 0), 2.0)
    assert made.done
    assert not bring(made, "a", (0, 0), 3.0)
    assert made.duplicate_bytes == SIZE


def test_a_copy_that_turns_out_bad_is_asked_for_again_of_another() -> None:
    made = scheduler(1, "liar", "honest")
    made.take("liar", 0.0)
    assert made.delivered("liar", (0, 0), 1.0)
    assert made.take("honest", 5.0) is None, "it is being checked"
    made.refused("liar", (0, 0), "other bytes")
    assert made.take("honest", 5.0) == (0, 0)
    assert made.ready(100.0) == []
    assert made.book.banned() == {"liar": "other bytes"}


# ---- failures


def test_a_failed_source_is_tried_again_later_and_later_still() -> None:
    made = ChunkScheduler(chunks(2), policy=FetchPolicy(backoff_s=1.0, backoff_max_s=4.0))
    made.add_source("a")
    now, pauses = 0.0, []
    for _ in range(4):
        made.engage("a", now)
        made.failed("a", now)
        assert made.exhausted
        pause = made.next_retry(now)
        assert pause is not None
        assert made.ready(now + pause - 0.01) == []
        assert made.ready(now + pause) == ["a"]
        pauses.append(pause)
        now += pause
    assert pauses == [1.0, 2.0, 4.0, 4.0]
    made.engage("a", now)
    bring(made, "a", made.take("a", now) or (9, 9), now)
    made.failed("a", now)
    assert made.ready(now) == ["a"], "a source that helps is used again at once"
    assert not made.exhausted


def test_a_source_whose_streams_end_early_is_asked_at_once_for_the_rest_of_what_it_began() -> None:
    made = scheduler(3, "limited", "other", pipeline=1)
    assert made.take("limited", 0.0) == (0, 0)
    assert made.failed("limited", 1.0, came=110_000), "smaller parts may come"
    assert made.book.of("limited").part == 16 * 1024
    for second in range(1, 40):
        assert made.ready(float(second)) == ["limited"]
        made.engage("limited", float(second))
        assert made.take("limited", float(second)) == (0, 0)
        made.part("limited", (0, 0))
        assert made.failed("limited", second + 0.5, came=110_000)
    assert made.take("other", 40.0) == (0, 1), "what another one began is left to it"
    bring(made, "other", (0, 1), 41.0)
    assert made.take("other", 41.0) == (0, 2)
    bring(made, "other", (0, 2), 42.0)
    assert made.take("other", 42.0) == (0, 0), "while there is anything else to do"
    record = made.book.of("limited")
    assert (record.success, record.banned) == (1.0, None)


def test_what_somebody_began_is_not_kept_from_a_source_that_holds_nothing_else() -> None:
    made = scheduler(1, "limited", "other", files=2, pipeline=1)
    assert made.take("limited", 0.0) == (0, 0)
    made.part("limited", (0, 0))
    assert made.failed("limited", 1.0, came=110_000)
    assert made.take("other", 1.0) == (1, 0)
    made.not_held("other", (1, 0))
    assert made.take("other", 1.0) == (0, 0)


def test_a_source_that_brings_nothing_more_is_left_like_any_other() -> None:
    made = ChunkScheduler(chunks(1), policy=FetchPolicy(backoff_s=1.0))
    made.add_source("a")
    made.engage("a", 0.0)
    made.take("a", 0.0)
    assert made.failed("a", 0.0, came=20_000), "parts of 16 KiB may come where chunks do not"
    for came in (20_000, 1):
        now = made.next_retry(0.0) or 0.0
        made.engage("a", now)
        made.take("a", now)
        assert not made.failed("a", now, came=came), "no part came, and none can be smaller"
        assert made.ready(now) == []
        assert made.exhausted


def test_a_circuit_that_ends_takes_three_empty_streams_with_it_and_no_more() -> None:
    made = ChunkScheduler(chunks(1), policy=FetchPolicy(backoff_s=1.0))
    made.add_source("limited")
    now = 0.0
    for _round in range(2):
        made.engage("limited", now)
        assert made.take("limited", now) == (0, 0)
        made.part("limited", (0, 0))
        assert made.failed("limited", now, came=110_000)
        for _empty in range(3):
            made.engage("limited", now)
            assert made.take("limited", now) == (0, 0)
            assert made.failed("limited", now), "one stream brought parts a moment ago"
            assert made.ready(now) == [], "not at once"
            now += made.next_retry(now) or 0.0
            assert made.ready(now) == ["limited"]
    assert made.book.of("limited").success == 1.0
    made.engage("limited", now)
    assert not made.failed("limited", now)
    assert made.book.of("limited").success < 1.0


def test_a_source_too_slow_over_all_its_streams_is_left() -> None:
    made = scheduler(4, "trickle", "other", min_rate=32_000.0, rate_window_s=10.0, pipeline=1)
    bring(made, "other", made.take("other", 0.0) or (9, 9), 0.1)
    now = 0.0
    made.take("trickle", now)
    for _ in range(4):
        now += 3.0
        made.arriving("trickle", 16_384, now)
        made.part("trickle", (0, 1))
        limited = made.failed("trickle", now, came=16_384)
        assert limited == (now < 10.0), "each stream brings a part, and all together next to nothing"
        if limited:
            made.engage("trickle", now)
            assert made.take("trickle", now) == (0, 1)
    assert made.ready(now) == []


def test_parts_grow_again_when_chunks_come_whole() -> None:
    book = SourceBook()
    assert book.cut_short("a", 1 << 20)
    assert not book.cut_short("a", 2 << 20), "no smaller for a stream that carried more"
    sizes = [book.of("a").part]
    while sizes[-1] < SIZE:
        book.came_whole("a")
        sizes.append(book.of("a").part)
    assert sizes == [128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, SIZE]
    assert not book.cut_short("a", 64 << 20), "enough for whole chunks"


def test_a_ban_lasts_beyond_one_download() -> None:
    book = SourceBook()
    first = scheduler(2, "liar", book=book)
    first.take("liar", 0.0)
    first.ban("liar", "a frame of rubbish")
    second = ChunkScheduler(chunks(2), book=book)
    second.add_source("liar")
    assert second.ready(1e9) == []
    assert second.next_retry(0.0) is None
    assert second.exhausted


def test_a_dropped_source_is_left_out_of_this_download_only() -> None:
    book = SourceBook()
    first = scheduler(2, "damaged", book=book)
    first.take("damaged", 0.0)
    first.drop("damaged")
    assert first.ready(1e9) == []
    second = ChunkScheduler(chunks(2), book=book)
    second.add_source("damaged")
    assert second.ready(0.0) == ["damaged"]


@pytest.mark.parametrize(("others", "left"), [((), False), (("other",), True)], ids=["the only one", "one of two"])
def test_a_slow_source_is_left_only_when_another_could_do_its_work(others: Iterable[str], left: bool) -> None:
    made = scheduler(6, "slow", min_rate=1000.0, rate_window_s=10.0)
    for other in others:
        made.add_source(other)
    made.take("slow", 0.0)
    made.arriving("slow", 9000, 5.0)
    assert not made.too_slow("slow", 9.9), "the window is not over"
    assert bool(made.too_slow("slow", 10.0)) is left
    made.arriving("slow", 20_000, 12.0)
    assert not made.too_slow("slow", 20.0), "each window counts for itself"


def test_the_only_source_is_left_when_no_chunk_comes_whole_over_all_its_streams() -> None:
    """Each stream brings a part, fast enough: without a bound the download would wait for ever."""
    made = scheduler(2, "parts", chunk_s=20.0, min_rate=1.0, rate_window_s=5.0)
    assert made.take("parts", 0.0) == (0, 0)
    for now in (6.0, 12.0, 18.0):
        made.arriving("parts", 1 << 20, now)
        made.part("parts", (0, 0))
        assert made.too_slow("parts", now) == ""
        assert made.failed("parts", now, came=1 << 20)
        made.engage("parts", now)
        assert made.take("parts", now) == (0, 0)
    made.arriving("parts", 1 << 20, 20.0)
    made.part("parts", (0, 0))
    assert "no whole chunk within 20 s" in made.too_slow("parts", 20.0)
    made.slow("parts", 20.0)
    assert made.exhausted
    made.engage("parts", 30.0)
    bring(made, "parts", made.take("parts", 30.0) or (9, 9), 49.0)
    assert made.too_slow("parts", 60.0) == "", "each chunk has its own time"


def test_an_idle_source_is_not_slow() -> None:
    made = scheduler(2, "idle", "other", min_rate=1000.0, rate_window_s=10.0)
    for chunk in take_all(made, "other"):
        bring(made, "other", chunk, 1.0)
    assert not made.too_slow("idle", 100.0)


def test_what_was_not_asked_cannot_be_delivered() -> None:
    made = scheduler(2, "a")
    with pytest.raises(ValueError, match="was not asked"):
        made.delivered("a", (0, 0), 0.0)
    assert math.isinf(made.book.of("a").score)


def test_chunks_and_sources_can_come_later() -> None:
    made = scheduler(1, "a")
    bring(made, "a", made.take("a", 0.0) or (9, 9), 1.0)
    assert made.done
    made.add_chunks(chunks(1, files=2))
    assert not made.done
    assert made.add_source("b")
    assert not made.add_source("b")
    assert made.ready(1.0) == ["b"]
    assert made.take("a", 1.0) == (1, 0)
