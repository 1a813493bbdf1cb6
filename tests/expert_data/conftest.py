from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.expert_data.plain_encoders import MeanColour, WordEncoder, picture


@pytest.fixture
def encoders() -> dict[str, object]:
    return {"text_encoder": WordEncoder(), "feature_encoder": MeanColour()}


@pytest.fixture
def photo_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of ``count`` captioned pictures; ``extra`` metadata entries come behind them."""

    def make(count: int = 5, extra: tuple[dict, ...] = ()) -> Path:
        folder = tmp_path / "photos"
        folder.mkdir()
        entries = []
        for number in range(count):
            picture(number).save(folder / f"{number}.png")
            entries.append({"file_name": f"{number}.png", "text": f"picture number {number}"})
        lines = [json.dumps(entry) for entry in (*entries, *extra)]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    return make
