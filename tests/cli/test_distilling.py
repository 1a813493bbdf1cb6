"""What `distill` settles before it trains: the folder it may write to, and how its threads round."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from paris_swarm.cli.app import app
from paris_swarm.cli.distilling import begin_work
from paris_swarm.cli.exits import Usage
from paris_swarm.cli.student_plan import student_data
from paris_swarm.dht_schemas.canonical import canonical_json
from paris_swarm.dht_schemas.plan import MAX_FREE_FORM
from paris_swarm.expert.provenance import flushes_denormals


def test_subnormal_numbers_are_flushed_before_torch_makes_its_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads made earlier would keep them, so a run that went on, which makes its threads elsewhere, would round
    otherwise than one in a piece.
    """
    seen = []

    def look(*_: object, **__: object) -> None:
        seen.append(flushes_denormals())
        raise ValueError("enough was seen")

    monkeypatch.setattr("paris_swarm.router.verify.verify_folder", look)
    before = flushes_denormals()
    answer = CliRunner().invoke(app, ["distill", str(tmp_path / "m"), "-o", str(tmp_path / "s"), "--device", "cpu"])
    assert seen == [True], answer.output
    assert flushes_denormals() == before


def test_a_folder_that_took_the_students_place_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """`write_folder` replaces an assembled folder: only this very student, written earlier, may give way."""
    out = tmp_path / "student"
    work = begin_work(out, {"seed": 1})
    assert begin_work(out, {"seed": 1}) == work
    out.mkdir()
    assert begin_work(out, {"seed": 1}) == work  # an empty folder is in nobody's way
    (out / "plan.json").write_bytes(b"a plan of somebody else")
    (out / "lock.json").write_bytes(b"a lock of somebody else")
    with pytest.raises(Usage, match="holds something else than the student"):
        begin_work(out, {"seed": 1})
    (work / "plan").mkdir()
    (work / "plan" / "plan.json").write_bytes(b"our plan")
    with pytest.raises(Usage, match="holds something else than the student"):
        begin_work(out, {"seed": 1})
    (out / "plan.json").write_bytes(b"our plan")
    assert begin_work(out, {"seed": 1}) == work


def test_a_student_of_more_teachers_than_its_plan_has_room_for_names_their_assembly() -> None:
    facts, distilled = {"source": {"kind": "made"}}, {"plan": "ab" * 32, "assembly": "cd" * 32, "start": "mean"}

    def teachers(count: int) -> dict[str, str]:
        return {str(k): f"{k:064x}" for k in range(count)}

    few = student_data(facts, distilled, teachers(8))
    assert few["distilled"]["teachers"] == teachers(8)
    many = student_data(facts, distilled, teachers(1024))
    assert len(canonical_json(many)) <= MAX_FREE_FORM < len(canonical_json(teachers(1024)))
    assert many == {**facts, "distilled": distilled}
    with pytest.raises(ValueError, match="a student's plan has room for 65,536"):
        student_data({"source": "x" * MAX_FREE_FORM}, distilled, teachers(1))
