"""Shards: what is read from good ones, what other programs make of ours, and every broken one."""

import hashlib
import io
import json
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from train.data import known, load_images, open_photos, pack, shards
from train.data.examine import examine
from train.errors import DataError, UsageError


def photo(i: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 16), (5 * i % 256, 3 * i % 256, 90)).save(stream, kind)
    return stream.getvalue()


def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(first: int = 0, count: int = 6) -> list[tuple[str, bytes]]:
    """Photos and text labels, x and y in turn."""
    return [
        member
        for i in range(first, first + count)
        for member in ((f"{i:03}.png", photo(i)), (f"{i:03}.cls", b"xy"[i % 2 : i % 2 + 1]))
    ]


def test_samples_become_photos_in_the_order_of_the_shards(tmp_path):
    write(tmp_path / "a-1.tar", samples(6))
    write(tmp_path / "a-0.tar", samples(0))
    photos = open_photos(f"shards:{tmp_path}")
    assert photos.classes == ("x", "y")
    assert photos.files == tuple(f"a-{i // 6}/{i:03}.png" for i in range(12))
    assert photos.labels.tolist() == [0, 1] * 6
    assert photos.digests[7] == hashlib.sha256(photo(7)).hexdigest()
    assert photos.load.read("a-1/007.png") == photo(7)
    assert photos.excluded == ()
    with pytest.warns(UserWarning, match="only 6 photos"):
        images, _ = load_images(photos, 16, cache_dir=tmp_path / "c", progress=False)
    assert images[9, 8, 8].tolist() == [45, 27, 90]
    few = open_photos(f"shards:{tmp_path}/a-[0].tar")
    assert few.files == photos.files[:6]


def test_ranges_and_shares(tmp_path):
    tmp_path = tmp_path / "user@host"
    for i in range(8, 12):
        write(tmp_path / f"a-{i:02}.tar", samples(10 * i, 4))
    pattern = f"shards:{tmp_path}/a-{{08..11}}.tar"
    whole = open_photos(pattern)
    assert len(whole) == 16
    parts = [open_photos(f"{pattern}@{k}/3") for k in (1, 2, 3)]
    assert [len(part) for part in parts] == [8, 4, 4]
    assert sorted(f for part in parts for f in part.files) == list(whole.files)
    with pytest.raises(DataError, match=r"no shard .*a-12\.tar is there"):
        open_photos(f"shards:{tmp_path}/a-{{08..12}}.tar")
    for wrong in ("0/3", "4/3", "1/5"):
        with pytest.raises(UsageError, match="share must be K/N"):
            open_photos(f"{pattern}@{wrong}")


def test_a_list_of_classes_is_the_same_for_every_machine(tmp_path):
    (tmp_path / "classes.txt").write_bytes("\ufeffsoto\r\nbakso\r\nrendang\r\n".encode())
    write(tmp_path / "0.tar", [("a.png", photo(0)), ("a.cls", b"0")])
    write(tmp_path / "1.tar", [("a.png", photo(2)), ("a.json", b'{"label": "bakso", "w": 3}')])
    for number, label in ((1, "soto"), (2, "bakso")):
        photos = open_photos(f"shards:{tmp_path}@{number}/2")
        assert photos.classes == ("bakso", "rendang", "soto")
        assert photos.classes[photos.labels[0]] == label
    write(tmp_path / "2.tar", [("a.png", photo(2)), ("a.cls", b"3")])
    with pytest.raises(DataError, match=r"a\.png in .*2\.tar has the label '3', which classes"):
        open_photos(f"shards:{tmp_path}")
    (tmp_path / "classes.txt").write_text("a\na\n")
    with pytest.raises(DataError, match=r"classes\.txt names a class twice"):
        open_photos(f"shards:{tmp_path}")


def test_a_packed_folder_needs_no_labels(tmp_path):
    for i in range(8):
        path = tmp_path / "photos" / "xy"[i % 2] / f"{i}.v2.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(i))
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(tmp_path / "photos", ".")
    photos = open_photos(f"shards:{tmp_path}/s.tar")
    assert sorted(photos.files) == sorted(f"s/{'xy'[i % 2]}/{i}.v2.png" for i in range(8))
    assert [photos.classes[k] for k in photos.labels] == [f.split("/")[1] for f in photos.files]
    assert len(open_photos(f"shards:{tmp_path}/s.tar", classes=("x", "y"))) == 8
    with pytest.raises(UsageError, match="--classes names z"):
        open_photos(f"shards:{tmp_path}/s.tar", classes=("x", "z"))


def test_what_is_left_out_is_counted_with_its_reason(tmp_path):
    members = [
        *samples(),
        ("000.json", b'{"caption": "no label here"}'),
        ("alone.png", photo(50)),
        ("000.txt", b"a caption"),
        ("._000.png", b"junk"),
        ("empty.cls", b"x"),
    ]
    shard = write(tmp_path / "a.tar", members)
    with tarfile.open(shard, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    photos = open_photos(f"shards:{shard}")
    assert len(photos) == 6
    assert {(e.file, e.bad): e.reason for e in photos.excluded} == {
        ("a/alone.png", True): "has no label",
        ("a/000.txt", False): "not a photo",
        ("a/._000.png", False): "not a photo",
        ("a/empty", True): "a label without a photo",
        ("a/link.png", True): "is not a regular file",
    }
    assert photos.bad_share == pytest.approx(3 / 9)
    with pytest.raises(DataError, match=r"33\.3% of the photos .*--max-bad"):
        load_images(photos, 16, cache_dir=tmp_path / "c", progress=False)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([("000.png", photo(9))], r"000\.png in .*a\.tar is a second photo of its sample"),
        ([("003.cls", b"y")], r"003\.cls in .*a\.tar is a second cls of its sample"),
        ([("003.jpg", photo(3))], r"003\.jpg in .* is a second photo"),
        ([("../b.png", photo(9))], r"\.\./b\.png in .* leads out"),
        ([("/b.png", photo(9))], r"/b\.png in .* leads out"),
        ([("b.cls", b" \n")], r"b\.cls in .* holds no label"),
        ([("b.cls", b"\xff\xfe")], r"b\.cls in .* holds no label"),
        ([("b.json", b"{")], r"b\.json in .* holds no label"),
        ([("b.json", b"[1]")], r"b\.json in .* holds no label"),
    ],
)
def test_samples_that_cannot_be_trusted(tmp_path, extra, message):
    write(tmp_path / "a.tar", [*samples(), *extra])
    with pytest.raises(DataError, match=message) as caught:
        open_photos(f"shards:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_every_truncation_is_noticed(tmp_path):
    whole = write(tmp_path / "a.tar", samples()).read_bytes()
    end = 12 * 512 + sum(512 * -(-len(content) // 512) for _, content in samples())
    assert whole[end:] == bytes(len(whole) - end)
    for length in [0, 1, 100, 511, *range(512, end + 512, 512), end - 1, end + 511]:
        (tmp_path / "a.tar").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"a\.tar is (cut off|not a whole)"):
            open_photos(f"shards:{tmp_path}")


@pytest.mark.parametrize("content", [b"<html>404</html>" * 99, b"\x1f\x8b" * 999, os.urandom(4096)])
def test_files_that_are_no_shards(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar is not a whole, uncompressed tar"):
        open_photos(f"shards:{tmp_path}")


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    shard = write(tmp_path / "a.tar", samples())
    content = bytearray(shard.read_bytes())
    content[2048 + 5] ^= 1  # within the third header's name: its checksum fails
    shard.write_bytes(content)
    with pytest.raises(DataError, match="cut off or damaged"):
        open_photos(f"shards:{tmp_path}")


def test_places_that_are_no_paths(tmp_path):
    for place in ("pipe:cat /etc/passwd", "https://example.org/a.tar", "s3://bucket/a.tar"):
        with pytest.raises(DataError, match="mount or copy the shards first"):
            open_photos(f"shards:{place}")
    with pytest.raises(DataError, match=r"no shard .*\*\.tar is there"):
        open_photos(f"shards:{tmp_path}")


def test_a_shard_is_read_through_once_and_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(known, "SETTLED_NS", 0)
    write(tmp_path / "a.tar", samples())
    time.sleep(0.02)
    before = open_photos(f"shards:{tmp_path}")
    reads = []
    real = shards.read_index
    monkeypatch.setattr(shards, "read_index", lambda path: reads.append(path) or real(path))
    assert open_photos(f"shards:{tmp_path}").digests == before.digests
    assert reads == []
    write(tmp_path / "a.tar", samples(1))
    assert open_photos(f"shards:{tmp_path}").digests != before.digests
    assert len(reads) == 1


def test_a_shard_that_changes_under_the_reader(tmp_path):
    shard = write(tmp_path / "a.tar", samples())
    photos = open_photos(f"shards:{tmp_path}")
    shard.write_bytes(shard.read_bytes()[:512])
    with pytest.raises(DataError, match=r"a\.tar became shorter"):
        photos.load("a/005.png")
    shard.unlink()
    with pytest.raises(DataError, match=r"a\.tar cannot be read"):
        photos.load("a/005.png")


def test_webdataset_reads_what_we_pack_and_we_read_what_it_writes(tmp_path, capsys):
    for i in range(20):
        path = tmp_path / "photos" / ("rendang", "bakso")[i % 2] / f"{i}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(i))
    out = tmp_path / "packed"
    command = [str(tmp_path / "photos"), "--out", str(out), "--shard-mb", "0.005"]
    assert pack.main(command) == 0
    written = sorted(out.glob("*.tar"))
    assert len(written) > 2
    assert f"{len(written)} shards in" in capsys.readouterr().out
    theirs = webdataset.WebDataset([str(path) for path in written], shardshuffle=False)
    expected = {(sample["png"], ("bakso", "rendang")[int(sample["cls"])]) for sample in theirs}
    photos = open_photos(f"shards:{out}")
    ours = {
        (photos.load.read(file), photos.classes[label])
        for file, label in zip(photos.files, photos.labels, strict=True)
    }
    source = {(photo(i), ("rendang", "bakso")[i % 2]) for i in range(20)}
    assert ours == expected == source
    assert pack.main(command) == 2  # nothing is written over
    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as writer:
        for i in range(6):
            writer.write({"__key__": f"{i:04}", "png": photo(i), "json": {"label": "xy"[i % 2]}})
    photos = open_photos(f"shards:{tmp_path}/theirs.tar")
    assert [photos.load.read(file) for file in photos.files] == [photo(i) for i in range(6)]
    assert photos.labels.tolist() == [0, 1] * 3


def test_a_drawing_cannot_be_packed(tmp_path, capsys):
    assert pack.main(["synthetic", "--out", str(tmp_path)]) == 2
    assert "has no photo files" in capsys.readouterr().err


def test_the_folder_check_sees_the_stored_form_of_photos_in_shards(tmp_path):
    members = [
        m for i in range(4) for m in ((f"{i}.jpg", photo(i)), (f"{i}.cls", b"xy"[i % 2 :][:1]))
    ]
    examined = examine(open_photos(f"shards:{write(tmp_path / 'a.tar', members)}"), progress=False)
    assert {look.form for look in examined.looks} == {("PNG", "RGB", 1, 1)}
    assert {look.size for look in examined.looks} == {(20, 16)}


def test_labels_in_json_may_be_numbers(tmp_path):
    members = [
        member
        for i in range(4)
        for member in ((f"{i}.png", photo(i)), (f"{i}.json", json.dumps({"label": i % 2}).encode()))
    ]
    write(tmp_path / "a.tar", members)
    photos = open_photos(f"shards:{tmp_path}")
    assert photos.classes == ("0", "1")
    assert np.bincount(photos.labels).tolist() == [2, 2]
