"""The cache: right pixels, decoded once, rebuilt when damaged, nothing half-written left."""

import hashlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.data import cache, known, limit_photos, load_images, open_photos
from train.errors import DataError, DiskError


def scene(i: int, width: int = 60, height: int = 40) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 3 + i, y * 5, 100 + x + y], -1).astype(np.uint8)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of twelve PNGs, b/11 a copy of b/10."""
    root = tmp_path / "photos"
    for label, first in (("a", 0), ("b", 100)):
        (root / label).mkdir(parents=True)
        for i in range(12):
            pixels = scene(first + min(i, 10) if label == "b" else i)
            Image.fromarray(pixels).save(root / label / f"{i:02}.png")
    return root


def load(folder, cache_dir, size=32, **options):
    return load_images(
        open_photos(str(folder)), size, cache_dir=cache_dir, progress=False, **options
    )


def counting(photos, calls: list):
    """The same photos, noting every decoded file."""
    inner = photos.load
    return replace(photos, load=lambda file, side: calls.append(file) or inner(file, side))


def test_pixels_are_the_antialiased_centre_square(folder, tmp_path):
    images, photos = load(folder, tmp_path / "cache", size=20)
    assert images.shape == (24, 20, 20, 3)
    assert images.dtype == np.uint8
    assert not images.flags.writeable
    for i in (0, 13):
        centre = Image.fromarray(photos.read(i)[:, 10:50])
        expected = np.asarray(centre.resize((20, 20), Image.Resampling.BICUBIC)).astype(int)
        # resizing the whole and cropping sees a little beyond the square at its edges
        assert np.abs(images[i].astype(int) - expected)[:, 1:-1].max() <= 1
        # a box average is an independent antialiased truth for this factor of two
        box = photos.read(i)[:, 10:50].reshape(20, 2, 20, 2, 3).mean((1, 3))
        assert np.abs(images[i] - box)[1:-1, 1:-1].max() <= 2


def test_each_content_is_decoded_once_ever(folder, tmp_path):
    calls: list[str] = []
    photos = counting(open_photos(str(folder)), calls)
    first, _ = load_images(photos, 32, cache_dir=tmp_path / "c", progress=False)
    assert sorted(calls) == sorted(set(photos.files) - {"b/11.png"})
    assert np.array_equal(first[22], first[23])
    again, _ = load_images(photos, 32, cache_dir=tmp_path / "c", progress=False)
    assert len(calls) == 23
    assert np.array_equal(first, again)
    load_images(photos, 24, cache_dir=tmp_path / "c", progress=False)
    assert len(calls) == 46  # another size is another cache
    Image.fromarray(scene(77)).save(folder / "a" / "00.png")
    changed, _ = load(folder, tmp_path / "c")
    assert not np.array_equal(changed[0], first[0])
    assert np.array_equal(changed[1:], first[1:])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:100],
        lambda data: b"",
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: data[:-60] + bytes([data[-60] ^ 64]) + data[-59:],
        lambda data: data[:-40] + b"\xff" * 8 + data[-32:],
        lambda data: data + b"x",
    ],
    ids=["cut", "short", "empty", "pixel", "footer", "length", "longer"],
)
def test_a_damaged_cache_is_built_again(folder, tmp_path, damage):
    whole, _ = load(folder, tmp_path / "c")
    expected = whole.copy()
    (path,) = (tmp_path / "c").glob("*.images")
    sound = path.read_bytes()
    time.sleep(0.02)  # time stamps have a resolution
    path.write_bytes(damage(sound))
    images, _ = load(folder, tmp_path / "c")
    assert np.array_equal(images, expected)
    assert path.read_bytes() == sound


def test_a_known_cache_is_not_read_through_again_and_a_copied_one_is_once(
    folder, tmp_path, monkeypatch
):
    """What a start costs must not grow with the cache; what came from elsewhere is verified."""
    verified = []
    real = cache._sound
    monkeypatch.setattr(cache, "_sound", lambda *args: verified.append(args) or real(*args))
    first, _ = load(folder, tmp_path / "c")
    load(folder, tmp_path / "c")
    assert verified == []
    monkeypatch.setattr(known, "SETTLED_NS", 0)
    (path,) = (tmp_path / "c").glob("*.images")
    (tmp_path / "d").mkdir()
    shutil.copy2(path, tmp_path / "d")
    time.sleep(0.02)
    for _ in range(2):
        again, _ = load(folder, tmp_path / "d")
        assert np.array_equal(again, first)
    assert len(verified) == 1


def test_a_damaged_memory_only_costs_the_work_again(folder, tmp_path):
    first, _ = load(folder, tmp_path / "c")
    (memory,) = (tmp_path / "c").glob("*.known.json")
    for content in (b"", b"[1]", b'{"x.images": 3}', memory.read_bytes()[:-9], b"\xff"):
        memory.write_bytes(content)
        assert np.array_equal(load(folder, tmp_path / "c")[0], first)


def test_photos_are_hashed_once_and_again_when_they_change(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LAPIS_CACHE", str(tmp_path / "c"))
    read = []
    real = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, kind: read.append(file.name) or real(file, kind)
    )
    fresh = open_photos(str(folder))
    assert open_photos(str(folder)).digests == fresh.digests
    assert len(read) == 48  # files this young may still change unseen
    monkeypatch.setattr(known, "SETTLED_NS", 0)
    time.sleep(0.02)
    open_photos(str(folder))
    read.clear()
    assert open_photos(str(folder)).digests == fresh.digests
    assert read == []
    changed = folder / "a" / "03.png"
    before = changed.stat()
    content = bytearray(changed.read_bytes())
    content[-20] ^= 1
    changed.write_bytes(content)  # the same size
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))  # and the same time
    digests = open_photos(str(folder)).digests
    assert read == [str(changed)]
    assert digests[3] == hashlib.sha256(content).hexdigest() != fresh.digests[3]
    assert digests[4:] == fresh.digests[4:]


def test_the_size_is_said_before_it_is_built_and_must_be_free(
    folder, tmp_path, monkeypatch, capsys
):
    photos = open_photos(str(folder))
    load_images(photos, 32, cache_dir=tmp_path / "c", progress=True)
    assert "cache: 24 photos at 32 px, 0.1 MB of " in capsys.readouterr().out
    load_images(photos, 32, cache_dir=tmp_path / "c", progress=True)
    assert "cache:" not in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 70_000))
    with pytest.raises(DiskError, match=r"\(0\.1 MB are free\): it needs 0\.1 MB"):
        load(folder, tmp_path / "d")
    assert list((tmp_path / "d").iterdir()) == []


def test_unreadable_photos_are_left_out_and_stay_so(folder, tmp_path):
    (folder / "a" / "05.png").write_bytes(b"<html>not found</html>")
    for _ in range(2):  # decoded, then from the cache
        images, photos = load(folder, tmp_path / "c")
        assert len(images) == len(photos) == 23
        assert "a/05.png" not in photos.files
        assert [(e.file, e.reason, e.bad) for e in photos.excluded] == [
            ("a/05.png", "not an image", True)
        ]
        row = photos.files.index("a/06.png")
        assert np.array_equal(images[row], cache.square(Image.fromarray(scene(6)), 32))


def test_too_many_bad_photos_or_too_few_good_ones(folder, tmp_path):
    for name in ("00", "01"):
        (folder / "a" / f"{name}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"8\.3% of the photos .*a/00.png: empty file.*--max-bad"):
        load(folder, tmp_path / "c")
    _, photos = load(folder, tmp_path / "c", max_bad=0.5)
    assert len(photos) == 22
    for i in range(2, 11):
        (folder / "a" / f"{i:02}.png").unlink()
    with pytest.raises(DataError, match=r"class a .* readable photos, 1 instead of"):
        load(folder, tmp_path / "c", max_bad=0.5)


def test_few_photos_in_a_class_warn(folder, tmp_path):
    for i in range(5):
        (folder / "b" / f"{i:02}.png").unlink()
    with pytest.warns(UserWarning, match="class b has only 7 photos"):
        load(folder, tmp_path / "c")


def test_a_folder_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"needs 0\.1 MB.*LAPIS_CACHE"):
        load(folder, tmp_path / "file")


def test_bad_photos_are_judged_by_share_also_after_a_limit(tmp_path):
    """Three rows without a file among 203 are fine, and still are when ten photos are drawn."""
    (tmp_path / "train").mkdir()
    rows = ["filename,label"]
    for i in range(203):
        rows.append(f"{i}.png,{'xy'[i % 2]}")
        if i < 200:
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "train" / f"{i}.png")
    (tmp_path / "train.csv").write_text("\n".join(rows))
    photos = open_photos(str(tmp_path))
    assert photos.bad_share == pytest.approx(3 / 203)
    with pytest.warns(UserWarning, match="only 5 photos"):
        _, loaded = load_images(
            limit_photos(photos, 10), 8, cache_dir=tmp_path / "c", progress=False
        )
    assert len(loaded) == 10
    assert len(loaded.excluded) == 3


def test_a_full_disk_is_one_sentence_and_leaves_nothing(folder, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(DiskError, match=r"cannot be written \(File too large\)"):
            load(folder, tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "c").iterdir()) == []


def test_stale_leftovers_go_and_fresh_ones_stay(folder, tmp_path):
    (tmp_path / "c").mkdir()
    stale, fresh = tmp_path / "c" / "x.1.tmp", tmp_path / "c" / "x.2.tmp"
    stale.write_bytes(b"x")
    fresh.write_bytes(b"x")
    os.utime(stale, (time.time() - 7200,) * 2)
    load(folder, tmp_path / "c")
    assert not stale.exists()
    assert fresh.exists()


def test_an_error_while_building_leaves_nothing(folder, tmp_path):
    def broken(file, side):
        raise RuntimeError("pulled the plug")

    photos = replace(open_photos(str(folder)), load=broken)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        load_images(photos, 32, cache_dir=tmp_path / "c", progress=False)
    assert list((tmp_path / "c").iterdir()) == []


def _build(folder, cache_dir, delay):
    photos = open_photos(str(folder))
    inner = photos.load

    def slow(file, side):
        time.sleep(delay)
        return inner(file, side)

    load_images(replace(photos, load=slow), 32, cache_dir=cache_dir, progress=False)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_while_building_and_two_builders_at_once(folder, tmp_path):
    fork = multiprocessing.get_context("fork")
    killed = fork.Process(target=_build, args=(folder, tmp_path / "c", 1.0))
    killed.start()
    deadline = time.time() + 60
    while not list(tmp_path.glob("c/*.tmp")) and time.time() < deadline:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert not list(tmp_path.glob("c/*.images"))
    pair = [fork.Process(target=_build, args=(folder, tmp_path / "c", 0.01)) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    assert [process.exitcode for process in pair] == [0, 0]
    assert len(list(tmp_path.glob("c/*.images"))) == 1
    images, photos = load(folder, tmp_path / "c")
    assert len(images) == 24
    assert np.array_equal(images[3], cache.square(Image.fromarray(photos.read(3)), 32))


def _build_until(folder, cache_dir, boundary: int) -> None:
    """Build, and die at the n-th of the calls that write, as in a loss of power."""
    calls = 0

    def counted(function):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls == boundary:
                os._exit(9)
            return function(*args, **options)

        return call

    class File:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            found = getattr(self.file, name)
            return counted(found) if name in ("write", "flush") else found

    write = cache._write_squares
    cache._write_squares = lambda file, *rest: write(File(file), *rest)
    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    load_images(open_photos(str(folder)), 32, cache_dir=cache_dir, progress=False)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_at_every_write_the_next_run_has_the_right_pixels(folder, tmp_path):
    expected, _ = load(folder, tmp_path / "whole")
    fork = multiprocessing.get_context("fork")
    codes = []
    # 24 squares, fsync, replace, then the memory's fsync, replace and the folder's fsync
    for boundary in (1, 2, 23, 24, 25, 26, 27, 28, 29, 30):
        process = fork.Process(target=_build_until, args=(folder, tmp_path / "c", boundary))
        process.start()
        process.join(60)
        codes.append(process.exitcode)
        kept = {p.suffix for p in (tmp_path / "c").iterdir()}
        assert kept <= {".tmp", ".images", ".json"} or boundary > 26
        images, photos = load(folder, tmp_path / "c")
        assert np.array_equal(images, expected)
        assert len(photos) == 24
        shutil.rmtree(tmp_path / "c")
    assert codes == [9] * 9 + [0]


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LAPIS_CACHE", str(tmp_path))
    assert cache.default_cache_dir() == tmp_path
    monkeypatch.delenv("LAPIS_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.default_cache_dir() == tmp_path / "xdg" / "lapis"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.default_cache_dir() == Path.home() / ".cache" / "lapis"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.default_cache_dir() == Path.home() / "Library" / "Caches" / "lapis"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert cache.default_cache_dir() == tmp_path / "lapis" / "cache"
    monkeypatch.setenv("LOCALAPPDATA", "")
    assert cache.default_cache_dir() == Path.home() / "AppData" / "Local" / "lapis" / "cache"
