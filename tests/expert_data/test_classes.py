"""Classes of pictures: from folders, metadata, tables and archives into caption records, and from there to a plan."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from tests.expert_data.plain_encoders import MeanColour, WordEncoder, picture
from tests.expert_data.test_tables_and_tars import png, write_tar

from paris_swarm.cli.partitioning import find_partition
from paris_swarm.expert.data.parts import merge
from paris_swarm.expert.data.pictures import class_name
from paris_swarm.expert.data.prepare import Part, opened_source, own_images, prepare
from paris_swarm.expert.data.shards import PreparedData
from paris_swarm.expert.data.sources import Captioned, PrepareError, Skipped

NAMES = ["tabby_cat", "golden_retriever", "goldfish"]


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """train/tabby_cat/0.png and so on: 4, 3 and 2 pictures; and what else lies in such folders."""
    folder = tmp_path / "animals"
    number = 0
    for name, count in zip(NAMES, (4, 3, 2), strict=True):
        (folder / "train" / name).mkdir(parents=True)
        for place in range(count):
            picture(number).save(folder / "train" / name / f"{place}.png")
            number += 1
    (folder / "train" / NAMES[0] / "notes.txt").write_text("not a picture")
    (folder / "train" / NAMES[1] / "torn.jpg").write_bytes(b"\xff\xd8")
    (folder / ".thumbnails").mkdir()
    picture(90).save(folder / ".thumbnails" / "0.png")
    picture(91).save(folder / "lost.png")
    return folder


def encoded(source: Path, out: Path, **options: object) -> PreparedData:
    encoders = {"text_encoder": WordEncoder(), "feature_encoder": MeanColour()}
    return PreparedData.open(prepare(source, out, resolution=8, shard_rows=4, **encoders, **options).folder)


def said(place: Path, **options: object) -> list[tuple[str, str, str | None]]:
    """(file, caption, class) of every usable item."""
    items = list(own_images(place, resolution=8, **options).items())
    records = [item.record for item in items if isinstance(item, Captioned)]
    return [(record["file"], record["text"], record.get("class")) for record in records]


def test_a_folder_for_each_class_needs_no_metadata(classes: Path, tmp_path: Path) -> None:
    source = own_images(classes, resolution=8)
    items = list(source.items())
    assert len(items) == source.total() == 11
    used = [item.record for item in items if isinstance(item, Captioned)]
    assert [record["class"] for record in used] == [NAMES[1]] * 3 + [NAMES[2]] * 2 + [NAMES[0]] * 4
    assert {record["text"] for record in used} == {"tabby cat", "golden retriever", "goldfish"}
    why = {item.file: item.why for item in items if isinstance(item, Skipped)}
    assert why.keys() == {"lost.png", f"train/{NAMES[1]}/torn.jpg"}
    assert "no folder of a class" in why["lost.png"]
    for start in range(12):
        rest = list(own_images(classes, resolution=8).items(start))
        assert [_name(item) for item in rest] == [_name(item) for item in items[start:]]
    before = source.fingerprint()
    picture(92).save(classes / "train" / NAMES[0] / "new.png")
    assert own_images(classes, resolution=8).fingerprint() != before
    with pytest.raises(PrepareError, match="had 4 pictures, now 5"):
        list(source.items())


@pytest.mark.parametrize("column", ["image_column", "text_column", "class_column"])
def test_a_column_is_refused_where_there_is_none(classes: Path, column: str) -> None:
    """What a person asks for is never left out in silence."""
    with pytest.raises(PrepareError, match=rf"{classes} has no .*--{column.replace('_', '-')}"):
        own_images(classes, resolution=8, **{column: "breed"})
    with pytest.raises(PrepareError, match=rf"drawn pictures have no columns.*--{column.replace('_', '-')}"):
        opened_source("dicebear", resolution=8, count=8, **{column: "breed"})


def test_captions_beside_pictures_are_not_passed_over(classes: Path) -> None:
    (classes / "train" / NAMES[1] / "0.txt").write_text("a dog that waits for a train")
    with pytest.raises(PrepareError, match=r"has 0\.txt beside a picture: .*metadata\.jsonl"):
        own_images(classes, resolution=8)


def _name(item: Captioned | Skipped) -> str:
    return item.file if isinstance(item, Skipped) else item.record["file"]


def test_classes_become_clusters_of_a_plan(classes: Path, tmp_path: Path) -> None:
    data = encoded(classes, tmp_path / "data")
    found = find_partition(data, 3, seed=0, method="class")
    assert found.class_key == "class"
    assert found.classes == {"tabby_cat": 0, "golden_retriever": 1, "goldfish": 2}  # the largest first
    records = data.captions()
    assert found.labels.tolist() == [NAMES.index(record["class"]) for record in records]
    for index in (1, 2):
        encoded_part = {"text_encoder": WordEncoder(), "feature_encoder": MeanColour(), "part": Part(index, 2)}
        prepare(classes, tmp_path / "parts", resolution=8, shard_rows=4, **encoded_part)
    joined = PreparedData.open(merge(tmp_path / "parts", tmp_path / "joined").folder)
    assert joined.captions() == records


def test_rows_without_classes_are_told_where_classes_come_from(photo_folder, tmp_path: Path) -> None:
    data = encoded(photo_folder(8), tmp_path / "data")
    with pytest.raises(ValueError, match=r"have no class: .*--class-column.*--class-key"):
        find_partition(data, 2, seed=0, method="class")


def test_metadata_names_classes_and_else_the_folder_does(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "cats").mkdir(parents=True)
    lines = []
    for number, more in enumerate(({}, {"label": 3}, {"class": " big  cat "}, {"label": None}, {"kind": "lion"})):
        picture(number).save(folder / "cats" / f"{number}.png")
        lines.append({"file_name": f"cats/{number}.png", "text": f"picture {number}", **more})
    picture(9).save(folder / "9.png")
    lines.append({"file_name": "9.png", "text": "alone"})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    assert [each[2] for each in said(folder)] == ["cats", "3", "big cat", "cats", "cats", None]
    named = [each[2] for each in said(folder, class_column="kind")]
    assert named == ["cats", "cats", "cats", "cats", "lion", None]
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text,label\ncats/0.png,a cat,tabby\n9.png,alone,\n")
    assert [each[2] for each in said(folder)] == ["tabby", None]


def hugging_face(names: list[str] | None) -> dict[bytes, bytes]:
    feature = {"_type": "ClassLabel", "names": names} if names else {"_type": "Value", "dtype": "int64"}
    return {b"huggingface": json.dumps({"info": {"features": {"label": feature}}}).encode()}


def test_a_tables_class_numbers_have_names_where_it_knows_them(tmp_path: Path) -> None:
    rows = [{"image": png(number), "label": label} for number, label in enumerate((1, 0, -1, 2, None))]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table.replace_schema_metadata(hugging_face(NAMES)), tmp_path / "named.parquet")
    assert [each[1:] for each in said(tmp_path / "named.parquet")] == [
        ("golden retriever", "golden_retriever"),
        ("tabby cat", "tabby_cat"),
        ("goldfish", "goldfish"),
    ]  # the others have neither caption nor class
    parquet.write_table(table.replace_schema_metadata(hugging_face(None)), tmp_path / "numbers.parquet")
    with pytest.raises(PrepareError, match="no known text column"):
        own_images(tmp_path / "numbers.parquet", resolution=8)
    captions = pyarrow.array([f"picture {number}" for number in range(5)])
    parquet.write_table(table.append_column("text", captions), tmp_path / "both.parquet")
    assert [each[1:] for each in said(tmp_path / "both.parquet")] == [
        ("picture 0", "1"), ("picture 1", "0"), ("picture 2", None), ("picture 3", "2"), ("picture 4", None),
    ]  # fmt: skip
    with pytest.raises(PrepareError, match="no column 'breed'"):
        own_images(tmp_path / "both.parquet", resolution=8, class_column="breed")


def test_a_saved_dataset_of_an_image_classifier_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    columns = {"image": [{"bytes": png(number), "path": None} for number in range(3)], "label": [2, 0, 1]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    assert [each[1:] for each in said(tmp_path / "saved")] == [
        ("goldfish", "goldfish"), ("tabby cat", "tabby_cat"), ("golden retriever", "golden_retriever"),
    ]  # fmt: skip


def test_archives_name_classes_beside_pictures(tmp_path: Path) -> None:
    members = [("0.png", png(0)), ("0.txt", b"a cat"), ("0.cls", b"17\n"), ("1.png", png(1)), ("1.txt", b"a dog")]
    members += [
        ("2.png", png(2)),
        ("2.json", json.dumps({"caption": "a fish", "label": "goldfish", "tank": 4}).encode()),
    ]
    write_tar(tmp_path / "a.tar", members)
    assert [each[2] for each in said(tmp_path / "a.tar")] == ["17", None, "goldfish"]
    assert [each[2] for each in said(tmp_path / "a.tar", class_column="tank")] == ["17", None, "4"]


@pytest.mark.parametrize("value", [None, "", " \n", -1, 1.5, True, "x" * 201, "\ud800", b"", [], {}])
def test_what_names_no_class(value: object) -> None:
    assert class_name(value) is None


def test_a_link_out_of_a_class_folder_is_not_followed(classes: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    (classes / "train" / NAMES[2] / "z.png").symlink_to(tmp_path / "private.png")
    items = list(own_images(classes, resolution=8).items())
    assert [item.why for item in items if _name(item).endswith("z.png")] == ["is a link to outside the folder"]


def test_names_that_are_no_utf8_are_written_as_escapes(tmp_path: Path) -> None:
    """Linux names files with any bytes, and metadata.jsonl with any escape: neither may end the whole preparation."""
    folder = tmp_path / "animals"
    (folder / "cat").mkdir(parents=True)
    for number, name in enumerate((b"good.png", b"\xff.png")):
        (folder / "cat" / os.fsdecode(name)).write_bytes(png(number))
    (folder / "cat" / os.fsdecode(b"torn\xfe.png")).write_bytes(b"torn")
    data = encoded(folder, tmp_path / "data")
    assert {record["file"] for record in data.captions()} == {"cat/good.png", r"cat/\udcff.png"}
    assert [item["file"] for item in data.manifest["skipped"]] == [r"cat/torn\udcfe.png"]
    (folder / "metadata.jsonl").write_text('{"file_name": "\\ud800.png", "text": "none"}\n')
    items = list(own_images(folder, resolution=8).items())
    assert items[0] == Skipped(r"\ud800.png", "has a file_name with control characters")
