from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from paris_swarm.expert.data.imagefolder import ImageFolderSource
from paris_swarm.expert.data.pictures import captioned
from paris_swarm.expert.data.sources import Captioned, PrepareError, Skipped


def read(folder: Path, **options) -> tuple[list[Captioned], dict[str, str]]:
    items = list(ImageFolderSource(folder, resolution=16, **options).items())
    usable = [item for item in items if isinstance(item, Captioned)]
    return usable, {item.file: item.why for item in items if isinstance(item, Skipped)}


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 10^10 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_good_pictures_come_in_the_order_of_the_metadata(photo_folder):
    usable, skipped = read(photo_folder(4))
    assert not skipped
    assert [item.record for item in usable] == [
        {"file": f"{number}.png", "text": f"picture number {number}"} for number in range(4)
    ]
    assert all(item.pixels.shape == (16, 16, 3) and item.pixels.dtype == np.uint8 for item in usable)


FAULTS = {
    "broken.png": "cannot be decoded as an image",
    "cut.png": "cannot be decoded as an image",
    "text.jpg": "no known image format",
    "empty.png": "empty (0 bytes)",
    "huge.png": "too large",
    "silent.png": "has no caption",
    "blank.png": "has no caption",
    "gone.png": "does not exist",
    "folder.png": "is not a file",
    "/etc/hostname": "absolute path",
    "C:\\pictures\\1.png": "absolute path",
    "../photos/0.png": "'..'",
    "0.png": "named twice",
    "link.png": "link to outside",
    "nul\0.png": "control characters",
    "half.png": "not valid Unicode",
    "unnamed.png": "no line in metadata.jsonl",
    "metadata.jsonl line 20": "is not JSON",
    "metadata.jsonl line 21": "not a JSON object",
    "metadata.jsonl line 22": "no file_name",
    "metadata.jsonl line 23": "not a string",
    "metadata.jsonl line 24": "is not JSON",
}


def spoil(folder: Path, outside: Path) -> None:
    good = (folder / "1.png").read_bytes()
    contents = {
        "broken.png": good[:60] + bytes(40) + good[100:],
        "cut.png": good[: len(good) // 2],
        "text.jpg": b"this is not a picture",
        "empty.png": b"",
        "huge.png": bomb(),
        "silent.png": good,
        "blank.png": good,
        "half.png": good,
        "unnamed.png": good,
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    (folder / "folder.png").mkdir()
    outside.write_bytes(good)
    (folder / "link.png").symlink_to(outside)
    texts = {"half.png": "half a pair \ud83d", "blank.png": " \t ", "silent.png": None}
    named = [name for name in FAULTS if not name.startswith("metadata") and name != "unnamed.png"]
    lines = [json.dumps({"file_name": name, "text": texts.get(name, "a caption")}) for name in named]
    assert len(lines) == 16
    with open(folder / "metadata.jsonl", "a", encoding="utf-8") as stream:
        stream.write(
            "\n".join([*lines, "{not json", "[1]", '{"text": "x"}', '{"file_name": "a", "text": 7}', "[" * 9999])
        )


def test_every_fault_is_named_and_the_rest_is_used(photo_folder, tmp_path):
    folder = photo_folder(3)
    spoil(folder, tmp_path / "outside.png")
    usable, skipped = read(folder)
    assert [item.record["file"] for item in usable] == ["0.png", "1.png", "2.png"]
    assert set(skipped) == set(FAULTS)
    for name, words in FAULTS.items():
        assert words in skipped[name], (name, skipped[name])
        assert str(tmp_path) not in skipped[name]


def test_csv_with_a_byte_order_mark_and_quoted_captions(photo_folder):
    folder = photo_folder(2)
    (folder / "metadata.jsonl").unlink()
    table = 'file_name,text,more\r\n0.png,"a cat, asleep",1\r\n1.png,"two\nlines"\r\n'
    (folder / "metadata.csv").write_bytes(table.encode("utf-8-sig"))
    usable, skipped = read(folder)
    assert [item.record["text"] for item in usable] == ["a cat, asleep", "two lines"]
    assert not skipped


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has no metadata.jsonl or metadata.csv"),
        ({"metadata.jsonl": b"", "metadata.csv": b"file_name,text\n"}, "keep one of them"),
        ({"metadata.jsonl": b"\xff\xfe{"}, "not UTF-8"),
        ({"metadata.csv": b"name,caption\n1,2\n"}, "must begin with a header"),
        ({"metadata.csv": b""}, "must begin with a header"),
    ],
)
def test_unreadable_metadata_is_refused(tmp_path, files, words):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(PrepareError, match=words):
        read(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(PrepareError, match="is not a folder"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("start", [0, 1, 3, 4, 6, 7, 8, 11])
def test_items_may_be_read_from_any_number_on(photo_folder, start):
    again = ({"file_name": "1.png", "text": "named twice"}, {"file_name": "gone.png", "text": "x"})
    folder = photo_folder(5, extra=again)
    for name in ("unnamed.png", "other.jpg"):
        (folder / name).write_bytes((folder / "0.png").read_bytes())
    source = ImageFolderSource(folder, resolution=16)
    names = [item.file if isinstance(item, Skipped) else item.record["file"] for item in source.items()]
    assert names == [*(f"{k}.png" for k in range(5)), "1.png", "gone.png", "other.jpg", "unnamed.png"]
    assert source.total() == len(names)
    rest = list(source.items(start))
    assert [item.file if isinstance(item, Skipped) else item.record["file"] for item in rest] == names[start:]
    if start <= 5 < len(names):
        assert rest[5 - start].why == "is named twice in metadata.jsonl"


def test_a_line_without_end_is_skipped_not_held(photo_folder, monkeypatch):
    monkeypatch.setattr("paris_swarm.expert.data.imagefolder.MAX_LINE_BYTES", 200)
    folder = photo_folder(2, extra=({"file_name": "x.png", "text": "long " * 300},))
    usable, skipped = read(folder)
    assert len(usable) == 2
    assert list(skipped) == ["metadata.jsonl line 3"]
    assert "is longer than" in skipped["metadata.jsonl line 3"]


def one_image(tmp_path: Path, image: Image.Image, name: str = "a.png", **options) -> np.ndarray:
    image.save(tmp_path / name, **options)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}))
    usable, skipped = read(tmp_path)
    assert not skipped
    return usable[0].pixels


def test_the_centre_is_kept(tmp_path):
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = (250, 10, 10)
    assert (one_image(tmp_path, Image.fromarray(wide))[:, :, 0] > 240).all()


def test_transparent_is_white(tmp_path):
    assert (one_image(tmp_path, Image.new("RGBA", (20, 20), (255, 0, 0, 0))) == 255).all()


def test_sixteen_bit_grey_is_not_clipped(tmp_path):
    ramp = np.tile(np.linspace(0, 60000, 32).astype(np.uint16), (32, 1))
    row = one_image(tmp_path, Image.fromarray(ramp))[8, :, 0].astype(int)
    assert row[0] < 20
    assert 100 < row[8] < 160


def test_a_turned_photo_stands_upright(tmp_path):
    half = np.zeros((30, 30, 3), dtype=np.uint8)
    half[:15] = 255  # white above, and the camera says: turn by 180 degrees
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = one_image(tmp_path, Image.fromarray(half), exif=exif)
    assert pixels[2].max() < 30
    assert pixels[-2].min() > 225


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), csv=st.booleans())
def test_no_metadata_bytes_raise_anything_but_a_prepare_error(tmp_path, data, csv):
    for name in ("metadata.jsonl", "metadata.csv"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / ("metadata.csv" if csv else "metadata.jsonl")).write_bytes((b"file_name,text\n" if csv else b"") + data)
    try:
        usable, _ = read(tmp_path)
    except PrepareError:
        return
    assert usable == []


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.integers(0, 2000),
    value=st.binary(min_size=1, max_size=8),
    form=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]),
)
def test_no_image_bytes_raise(tmp_path, place, value, form):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path, format=form)
    data = bytearray(path.read_bytes())
    place %= len(data)
    data[place : place + len(value)] = value
    path.write_bytes(data)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a"}))
    usable, skipped = read(tmp_path)
    assert len(usable) + len(skipped) == 1


def test_no_program_is_started_to_decode_a_picture(photo_folder, monkeypatch):
    """PostScript would be handed to Ghostscript, whatever the file is called."""
    import subprocess

    def refused(*_, **__):
        raise AssertionError("a picture started a program")

    monkeypatch.setattr(subprocess, "Popen", refused)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
    found = captioned("a.jpg", postscript, "a picture", 16)
    assert isinstance(found, Skipped)
    assert "no known image format" in found.why
