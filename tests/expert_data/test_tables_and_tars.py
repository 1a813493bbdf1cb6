"""Other people's forms of captioned images: parquet, saved datasets, webdataset tars; bad rows named, the rest used."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tests.expert_data.plain_encoders import picture

from paris_swarm.expert.data.pictures import SeenNumbers
from paris_swarm.expert.data.prepare import own_images, prepare
from paris_swarm.expert.data.shards import PreparedData
from paris_swarm.expert.data.sources import Captioned, PrepareError, Skipped


def png(number: int) -> bytes:
    out = io.BytesIO()
    picture(number).save(out, "png")
    return out.getvalue()


def write_parquet(path: Path, records: list[dict]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def split(source: object) -> tuple[list[Captioned], list[Skipped]]:
    items = list(source.items())
    return [i for i in items if isinstance(i, Captioned)], [i for i in items if isinstance(i, Skipped)]


def test_parquet_of_bytes_and_of_hugging_face_structs(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "a.parquet", [{"image": {"bytes": png(k), "path": None}, "text": f"no {k}"} for k in range(3)]
    )
    write_parquet(tmp_path / "b.parquet", [{"image": {"bytes": png(9), "path": "x.png"}, "text": "nine"}])
    good, bad = split(own_images(tmp_path, resolution=16))
    assert [item.record["text"] for item in good] == ["no 0", "no 1", "no 2", "nine"]
    assert good[3].record["file"] == "b.parquet row 0"
    assert not bad
    plain = tmp_path / "plain"
    plain.mkdir()
    write_parquet(plain / "p.parquet", [{"jpg": png(1), "caption": "one", "score": 0.5}])
    source = own_images(plain, resolution=16)
    assert source.describe()["source"] == {"kind": "parquet", "image_column": "jpg", "text_column": "caption"}
    assert split(source)[0][0].pixels.shape == (16, 16, 3)


def test_every_bad_row_of_a_table_is_named_and_the_rest_is_used(tmp_path: Path) -> None:
    records = [
        {"image": png(0), "text": "good"},
        {"image": b"not a picture", "text": "bad bytes"},
        {"image": None, "text": "none"},
        {"image": png(1), "text": "  "},
        {"image": png(0), "text": "good"},
        {"image": png(2)[:200], "text": "cut short"},
        {"image": png(3), "text": "last"},
    ]
    write_parquet(tmp_path / "t.parquet", records)
    source = own_images(tmp_path / "t.parquet", resolution=16)
    good, bad = split(source)
    assert [item.record["text"] for item in good] == ["good", "good", "last"]
    assert [item.file for item in bad] == [f"t.parquet row {row}" for row in (1, 2, 3, 5)]
    assert "no known image format" in bad[0].why
    assert "no image bytes" in bad[1].why
    assert "no caption" in bad[2].why
    for start in range(len(records) + 1):
        rest = [getattr(item, "file", None) or item.record["file"] for item in source.items(start)]
        assert rest == [f"t.parquet row {row}" for row in range(start, len(records))]


def test_columns_are_found_or_named_or_asked_for(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", [{"photo": png(0), "alt": "words"}])
    with pytest.raises(PrepareError, match="--image-column"):
        own_images(tmp_path, resolution=16)
    with pytest.raises(PrepareError, match="no column 'Alt'; there are: photo, alt"):
        own_images(tmp_path, resolution=16, image_column="photo", text_column="Alt")
    good, _ = split(own_images(tmp_path, resolution=16, image_column="photo", text_column="alt"))
    assert good[0].record["text"] == "words"


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", [{"image": png(0), "text": "x"}])
    whole = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(whole[:-20])
    with pytest.raises(PrepareError, match=r"t\.parquet"):
        own_images(tmp_path, resolution=16)


def test_a_saved_dataset_is_read_in_its_own_order(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(k), "path": None} for k in range(4)], "text": [f"no {k}" for k in range(4)]},
        features=features,
    )
    data.select([3, 1, 0]).save_to_disk(str(tmp_path / "saved"))
    good, bad = split(own_images(tmp_path / "saved", resolution=16))
    assert [item.record["text"] for item in good] == ["no 3", "no 1", "no 0"]
    assert not bad
    assert [item.record["file"] for item in own_images(tmp_path / "saved", resolution=16).items(2)] == ["row 2"]
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "splits"))
    good, _ = split(own_images(tmp_path / "splits", resolution=16))
    assert len(good) == 4
    assert good[0].record["file"] == "train row 0"


def test_webdataset_tars_with_text_or_json_captions(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "00000.tar",
        [
            ("a/0001.png", png(1)),
            ("a/0001.txt", b"one"),
            ("a/0001.json", b'{"caption": "not this"}'),
            ("a/0002.json", json.dumps({"caption": "two", "width": 3}).encode()),
            ("a/0002.PNG", png(2)),
            ("a/0003.txt", b"no picture"),
            ("a/0004.jpg", b"broken"),
            ("a/0004.txt", b"four"),
            ("a/0005.png", png(5)),
            ("a/0005.json", b"{"),
        ],
    )
    write_tar(tmp_path / "00001.tar", [("../../0006.png", png(6)), ("../../0006.txt", "sechs ü".encode())])
    source = own_images(tmp_path, resolution=16)
    assert source.total() == 6
    whole = list(map(repr, source.items()))
    assert all(list(map(repr, source.items(start))) == whole[start:] for start in range(7))
    good, bad = split(source)
    assert [item.record["text"] for item in good] == ["one", "two", "sechs ü"]
    assert [(item.file, item.why.split(" (")[0]) for item in bad] == [
        ("00000.tar a/0003", "has no image member"),
        ("00000.tar a/0004", "cannot be decoded as an image"),
        ("00000.tar a/0005", "has no caption"),
    ]


def test_a_torn_tar_is_named_with_the_place(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "t.tar",
        [(f"{k}.{kind}", data) for k in range(3) for kind, data in (("png", png(k)), ("txt", b"x%d" % k))],
    )
    whole = (tmp_path / "t.tar").read_bytes()
    (tmp_path / "t.tar").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(PrepareError, match=r"t\.tar"):
        list(own_images(tmp_path / "t.tar", resolution=16).items())


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_prepare_takes_either_to_the_same_rows_as_a_folder(
    tmp_path: Path, photo_folder: object, encoders: dict[str, object], kind: str
) -> None:
    folder = photo_folder(5)
    place = tmp_path / "other"
    place.mkdir()
    pairs = [((folder / f"{k}.png").read_bytes(), f"picture number {k}") for k in range(5)]
    if kind == "parquet":
        write_parquet(place / "x.parquet", [{"image": image, "text": text} for image, text in pairs])
    else:
        write_tar(
            place / "x.tar",
            [
                (f"{k}.{e}", d)
                for k, (image, text) in enumerate(pairs)
                for e, d in (("png", image), ("txt", text.encode()))
            ],
        )
    prepare(folder, tmp_path / "one", resolution=16, **encoders)
    prepare(place, tmp_path / "two", resolution=16, **encoders)
    one, two = PreparedData.open(tmp_path / "one"), PreparedData.open(tmp_path / "two")
    np.testing.assert_array_equal(one.digests, two.digests)
    np.testing.assert_array_equal(one.pixels(range(5)), two.pixels(range(5)))


def test_column_names_for_a_source_without_columns_are_refused(photo_folder: object) -> None:
    with pytest.raises(PrepareError, match="--image-column"):
        own_images(photo_folder(2), resolution=16, image_column="image")


def test_rows_seen_are_remembered_across_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paris_swarm.expert.data.pictures._RECENT", 50)
    draw = np.random.default_rng(0)
    digests = [row.tobytes() for row in draw.integers(0, 256, (500, 16), dtype=np.uint8)]
    seen = SeenNumbers()
    assert all(seen.add(digest) for digest in digests)
    assert not any(seen.add(digest) for digest in digests[::7])
