"""What people see, on a terminal of 80 columns without colour: nothing cut off, the facts there."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
from rich.console import Console

from paris_swarm.cli.views import bar, dashboard, partition_table, picture, size
from paris_swarm.router.cluster_report import ClusterReport
from paris_swarm.swarm.peer import LaneState
from paris_swarm.swarm.status import (
    CheckpointStatus,
    ClaimStatus,
    NoticeStatus,
    OutlawStatus,
    PeerStatus,
    SlotStatus,
    SwarmStatus,
    status_from_dict,
)

PEER = "12D3KooWQ39FJ1zDnRGQsz9yRmtCCrSrXD2q3mRM5HZRMQEYFXeX"
OTHER = "12D3KooWR72CRpPLqFjmBpJ6Sk633B4o78BVoXZAe1FofPCmdL3o"
STATUS = SwarmStatus(
    plan="d" * 64,
    name="demo",
    time=1_800_000_000.0,
    peers=(PeerStatus(PEER, ("0",), 1.0),),
    slots=(
        SlotStatus(
            "0",
            (
                ClaimStatus(PEER, 123456, 400000, 0.12345, 1234.5, 299.9, "cuda", False),
                ClaimStatus(OTHER, 0, 400000, None, 0.0, 3.0, "cpu", True),
            ),
            CheckpointStatus("f" * 64, PEER, 123000, 2_400_000_000, 0.14567, 12, 60.0),
        ),
        SlotStatus("1", (), CheckpointStatus("e" * 64, OTHER, 400000, 5, 0.1, 1, 86400.0)),
        SlotStatus("router", (), None),
    ),
)


def shown(renderable: object) -> str:
    stream = io.StringIO()
    Console(file=stream, width=80, color_system=None, legacy_windows=False).print(renderable)
    return stream.getvalue()


def test_the_dashboard_fits_eighty_columns() -> None:
    text = shown(dashboard(STATUS, lanes=[LaneState("cluster", "training", "0")], own=PEER))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for fact in (PEER[-8:] + "*", "123k/400k", "0.1235", "123k ffffff x12", "stale", OTHER[-8:], "1234"):
        assert fact in text
    assert "free" in text
    assert "cluster 0: training" in text


def test_what_the_organiser_said_and_who_is_out_stands_below_the_table() -> None:
    assert "notice" not in shown(dashboard(STATUS))
    notice = NoticeStatus(3, "paused", (PEER, OTHER), "back at noon", True)
    told = replace(STATUS, notice=notice, outlaws=(OutlawStatus(OTHER, "claim", "0", 7),))
    text = shown(dashboard(told))
    for fact in ("notice 3: the swarm is paused: back at noon", PEER[-8:], "two notices 3", f"out: {OTHER[-8:]}"):
        assert fact in text
    assert status_from_dict(json.loads(json.dumps(told.as_dict()))) == told
    quiet = replace(STATUS, notice=NoticeStatus(4, "running", (), "", False))
    assert "notice" not in shown(dashboard(quiet)), "a notice that takes everything back is no news"


def test_a_finished_slot_names_its_author_and_checkpoint() -> None:
    line = next(line for line in shown(dashboard(STATUS)).splitlines() if line.strip().startswith("1 "))
    assert OTHER[-8:] in line
    assert "400k eeeeee" in line


def test_status_json_round_trips_and_has_the_documented_keys() -> None:
    report = STATUS.as_dict()
    assert set(report) == {"plan", "name", "time", "peers", "slots", "admission", "notice", "outlaws"}
    assert set(report["slots"][0]["claims"][0]) >= {"peer", "step", "steps", "loss", "images_per_s", "lease_left_s"}
    assert set(report["slots"][0]["checkpoint"]) == {
        "root",
        "author",
        "step",
        "bytes",
        "probe_loss",
        "holders",
        "age_s",
    }
    assert status_from_dict(report) == STATUS


def test_the_cluster_report_names_families_and_lets_silhouettes_be_undefined() -> None:
    report = ClusterReport(
        sizes=(60, 40),
        shares=(0.6, 0.4),
        silhouette=None,
        silhouettes=(0.5, None),
        families=({"planets": 59, "rings": 1}, {"sprouts": 40}),
        purity=0.99,
        nmi=0.9,
        examples=((0,), (1,)),
        warnings=(),
    )
    text = shown(partition_table(report))
    assert "planets 98%, rings 2%" in text
    assert "60.0%" in text
    assert "0.50" in text


def test_a_picture_keeps_its_colours_in_half_the_lines() -> None:
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[0, 0] = (255, 0, 0)
    text = picture(pixels)
    assert text.plain.count("\n") == 2
    assert any("rgb(255,0,0) on rgb(0,0,0)" in str(span.style) for span in text.spans)


def test_small_renderings() -> None:
    assert bar(0) == "░" * 8
    assert bar(0.5) == "████░░░░"
    assert bar(2.0) == "█" * 8
    assert size(999) == "999 B"
    assert size(12_345_678) == "12.3 MB"


def test_no_markup_is_read_in_a_plans_name() -> None:
    for name in ("[/nothing]", "[link=file:///etc]click[/link]"):
        assert name in shown(dashboard(replace(STATUS, name=name)))
