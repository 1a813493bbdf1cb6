"""The key that is the peer: shown, backed up, restored, never overwritten, never open to others."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from paris_swarm.cli import exits
from paris_swarm.cli.app import run


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    assert run([*words, "--json"]) == exits.OK
    return json.loads(capsys.readouterr().out)


def test_a_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = ["--home", str(tmp_path / "home")]
    first = answer(capsys, *home, "identity", "show")
    assert answer(capsys, "identity", "show", *home) == first
    assert first["peer"].startswith("12D3KooW")
    assert stat.S_IMODE(Path(first["path"]).stat().st_mode) == 0o600


def test_backup_and_restore(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, backup = tmp_path / "one", tmp_path / "two", tmp_path / "backup.key"
    peer = answer(capsys, "--home", str(one), "identity", "show")["peer"]
    answer(capsys, "--home", str(one), "identity", "export", str(backup))
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    assert answer(capsys, "--home", str(two), "identity", "import", str(backup))["peer"] == peer
    assert answer(capsys, "--home", str(two), "identity", "show")["peer"] == peer


def test_neither_a_key_nor_a_backup_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, backup = tmp_path / "one", tmp_path / "two", tmp_path / "backup.key"
    answer(capsys, "--home", str(one), "identity", "show")
    other = answer(capsys, "--home", str(two), "identity", "show")["peer"]
    answer(capsys, "--home", str(one), "identity", "export", str(backup))
    kept = backup.read_bytes()
    assert run(["--home", str(two), "identity", "export", str(backup)]) == exits.USAGE
    assert backup.read_bytes() == kept
    assert run(["--home", str(two), "identity", "import", str(backup)]) == exits.USAGE
    assert "never overwritten" in capsys.readouterr().err
    assert answer(capsys, "--home", str(two), "identity", "show")["peer"] == other


def test_rubbish_is_no_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rubbish = tmp_path / "rubbish"
    rubbish.write_bytes(b"not a key")
    assert run(["--home", str(tmp_path / "home"), "identity", "import", str(rubbish)]) == exits.USAGE
    assert str(rubbish) in capsys.readouterr().err
    assert not (tmp_path / "home" / "identity.key").exists()


def test_a_key_open_to_others_is_refused_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(answer(capsys, "--home", str(tmp_path), "identity", "show")["path"])
    path.chmod(0o644)
    assert run(["--home", str(tmp_path), "identity", "show"]) == exits.USAGE
    assert f"chmod 600 {path}" in capsys.readouterr().err
