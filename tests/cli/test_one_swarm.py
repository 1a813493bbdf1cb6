"""From a folder of one's own pictures to a picture drawn by verified experts, by real processes on loopback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from own_pictures import BAD, GOOD
from swarm_processes import Answer, done, verb
from swarm_story import SLOTS, STEPS, Story

from paris_swarm.cli.exits import Usage
from paris_swarm.cli.folder_options import pinned_plan
from paris_swarm.router.png import read_text


def test_prepare_names_and_counts_what_it_skips(prepared: Answer, own_folder: Path, tmp_path: Path) -> None:
    assert prepared.json["count"] == GOOD
    skipped = {item["file"]: item["why"] for item in prepared.json["skipped"]}
    assert skipped.keys() == BAD.keys()
    for name, why in BAD.items():
        assert why in skipped[name]

    out = tmp_path / "for-people"
    text = done(verb("prepare", own_folder, out, "--resolution", 12, "--workers", 1, "--count", 8)).said
    assert "8 rows in" in text
    assert "2 rows skipped: broken.png: cannot be decoded" in text, (
        "the first eight usable rows come after two bad ones"
    )
    assert "empty.png: is empty (0 bytes)" in text


def test_strict_refuses_the_same_folder_and_names_the_first_bad_file(own_folder: Path, tmp_path: Path) -> None:
    answer = verb("prepare", own_folder, tmp_path / "data", "--resolution", 12, "--workers", 1, "--strict")
    assert answer.code == 2
    assert "broken.png: cannot be decoded" in answer.said
    assert "without --strict" in answer.said
    assert not (tmp_path / "data").exists(), "a refused folder leaves nothing behind"


def test_the_same_input_gives_the_same_bytes(prepared: Answer, own_folder: Path, data: Path, tmp_path: Path) -> None:
    done(verb("prepare", own_folder, tmp_path / "again", "--resolution", 12, "--workers", 2, "--json"))
    assert {path.name: path.read_bytes() for path in data.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()
    }


def test_init_prints_the_report_and_an_invite(plan: Answer, room: Path) -> None:
    report = plan.json
    assert report["invite"] == f"paris:{report['plan']}"
    assert sum(report["partition"]["sizes"]) == GOOD
    assert min(report["partition"]["sizes"]) >= 8
    assert report["bars"].keys() == set(SLOTS)
    assert {f"cluster-{k}.png" for k in range(2)} <= {path.name for path in (room / "plan").iterdir()}
    assert Path(report["sealed_probe"]).stat().st_mode & 0o777 == 0o600


def test_status_has_exactly_the_documented_keys(story: Story) -> None:
    status = story.status
    assert status.keys() == {"plan", "name", "time", "peers", "slots", "admission", "notice", "outlaws"}
    assert (status["admission"], status["notice"], status["outlaws"]) == ("open", None, [])
    assert status["plan"] == story.plan_id
    assert status["name"] == "two kinds"
    assert [slot["slot"] for slot in status["slots"]] == list(SLOTS)
    for slot in status["slots"]:
        assert slot.keys() == {"slot", "claims", "checkpoint"}
        assert slot["checkpoint"].keys() == {"root", "author", "step", "bytes", "probe_loss", "holders", "age_s"}
        assert slot["checkpoint"]["step"] == STEPS
        assert slot["claims"] == [], "a finished slot is given back"
    for peer in status["peers"]:
        assert peer.keys() == {"peer", "slots", "last_seen_s"}
    assert {peer["peer"] for peer in status["peers"]} == {story.peers["alice"], story.peers["bob"]}


def test_status_for_people_shows_every_slot_and_who_holds_it(story: Story) -> None:
    for slot in story.status["slots"]:
        assert slot["checkpoint"]["root"][:6] in story.status_text
        assert slot["checkpoint"]["author"][-8:] in story.status_text


def test_each_peer_trained_a_cluster_of_its_own_and_one_the_router(story: Story) -> None:
    authors = {slot["slot"]: slot["checkpoint"]["author"] for slot in story.status["slots"]}
    assert authors["router"] == story.peers["alice"]
    assert {authors["0"], authors["1"]} == {story.peers["alice"], story.peers["bob"]}


def test_assemble_before_anything_is_published_names_the_missing_slots(story: Story) -> None:
    assert story.early is not None
    assert story.early.code == 5
    assert "no verified checkpoint yet for slot 0, 1, router" in story.early.said
    assert "--allow-missing" in story.early.said
    assert not (story.folder / "early").exists()


def test_no_checkpoint_byte_moved_before_the_first_assembly(story: Story) -> None:
    assert story.served_before == 0
    assert story.assembled["bytes"] > 0
    # The counters at the very end hold every byte ever sent: nobody but the assemblers got one.
    assert story.served == sum(answer["bytes"] for answer in (story.assembled, story.kept, story.outlived))


def test_assembled_from_a_home_that_trained_nothing(story: Story) -> None:
    assert story.assembled["missing"] == []
    assert story.assembled["refused"] == []
    said = {slot["slot"]: slot["checkpoint"] for slot in story.status["slots"]}
    for slot in story.assembled["slots"]:
        announced = said[slot["slot"]]
        assert (slot["root"], slot["step"], slot["peer"]) == (announced["root"], STEPS, announced["author"])
        assert slot["probe_loss"] == pytest.approx(announced["probe_loss"], rel=0.01)


def test_checkpoints_outlive_their_authors_where_somebody_assembled_and_serves(story: Story) -> None:
    assert story.keeper not in story.peers.values()
    assert {slot["slot"]: slot["root"] for slot in story.outlived["slots"]} == {
        slot["slot"]: slot["root"] for slot in story.assembled["slots"]
    }
    stored = done(verb("--home", story.home("keeper"), "store", "ls", "--json")).json["roots"]
    kept = {row["slot"]: row for row in stored if row["kind"] == "checkpoint"}
    assert set(kept) == set(SLOTS)
    assert all(row["complete"] for row in kept.values()), "a successor needs every file"
    assert all(row["kept"] == [f"copy for others, slot {slot}"] for slot, row in kept.items())
    parts = done(verb("--home", story.home("artist"), "store", "ls", "--json")).json["roots"]
    assert not any(row["complete"] for row in parts if row["kind"] == "checkpoint"), "EMA weights are enough to draw"


def test_verify_passes_and_pins_the_plan(story: Story) -> None:
    report = done(verb("verify", story.model, "--plan", story.invite, "--json")).json
    assert report["ok"] is True
    assert report["plan"] == story.plan_id
    assert [slot["slot"] for slot in report["slots"]] == list(SLOTS)
    text = done(verb("verify", story.model)).said
    assert story.plan_id in text
    assert report["organiser"] in text

    other = verb("verify", story.model, "--plan", "0" * 64)
    assert other.code == 4
    assert story.plan_id in other.said


def test_a_plan_is_pinned_by_its_id_an_invite_or_its_folder(plan: Answer, room: Path) -> None:
    plan_id = plan.json["plan"]
    for said in (plan_id, plan.json["invite"], room / "plan", room / "plan" / "plan.json"):
        assert pinned_plan(str(said)) == plan_id
    assert pinned_plan(None) is None
    for said in (room, room / "nowhere", plan_id[:12], plan_id.upper(), ""):
        with pytest.raises(Usage, match=r"neither a plan's id, nor an invite .* nor a plan folder"):
            pinned_plan(str(said))


def test_sample_draws_a_picture_that_says_where_it_comes_from(story: Story, tmp_path: Path) -> None:
    png = tmp_path / "drawn.png"
    prompts = ["a flag, red above blue", "a green disc on black ground"]
    arguments = ["--prompt", prompts[0], "--prompt", prompts[1], "-n", 2, "--steps", 4, "--seed", 7, "-o", png]
    report = done(verb("sample", story.model, *arguments, "--device", "cpu", "--json")).json
    text = read_text(png)
    assert text["prompt"] == "\n".join(prompts)
    assert text["plan"] == story.plan_id == report["plan"]
    assert text["assembly"] == story.assembled["digest"] == report["assembly"]
    assert (text["seed"], text["strategy"], text["steps"]) == ("7", "top-1", "4")
    assert float(text["guidance"]) == report["guidance"]
    assert "experts" in text
    assert png.read_bytes()[:4] == b"\x89PNG"
    beside = json.loads((tmp_path / "drawn.png.json").read_text("utf-8"))
    assert report["sidecar"] == str(tmp_path / "drawn.png.json")
    assert (beside["plan"], beside["assembly"], beside["seed"]) == (story.plan_id, report["assembly"], 7)
    assert [one["prompt"] for one in beside["pictures"]] == [prompts[0], prompts[0], prompts[1], prompts[1]]
    assert all(sum(one["shares"].values()) == pytest.approx(1, abs=1e-4) for one in beside["pictures"])

    again = tmp_path / "again.png"
    done(verb("sample", story.model, *arguments[:-1], again, "--device", "cpu", "--json"))
    assert again.read_bytes() == png.read_bytes(), "the same seed draws the same picture"


def test_signals_end_every_process_and_leave_no_p2pd(story: Story) -> None:
    assert story.exit_codes == {"alice": 0, "bob": 0, "keeper": 0, "bootstrap": 0}
    assert story.left_running == []


def test_keys_are_private_and_nothing_is_left_half_written(story: Story) -> None:
    for name in ("bootstrap", "alice", "bob", "artist"):
        assert (story.home(name) / "identity.key").stat().st_mode & 0o777 == 0o600
    left = [path for path in story.folder.rglob("*") if path.name.endswith(".tmp") or ".corrupt-" in path.name]
    assert left == []
