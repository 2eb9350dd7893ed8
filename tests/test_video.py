"""video.py against real media files and real processes."""

import os
import random
import re
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from conftest import PIXELS, make_video, sample
from PIL import Image

import video
from video import Clip, ClipLoader, FrameCache, decode

# ---------------------------------------------------------------------------------------------
# Decoding


def greys(clip):
    """Which of make_video's frames a clip shows."""
    return [round(float(frame.float().mean()) / 8) for frame in clip.frames]


def test_first_and_last_frame_are_included(film):
    """Catches: linspace without its end, floor for round, frames out of order."""
    clip = decode(film, "video", 6, PIXELS, 28)
    assert clip.indices == (0, 5, 9, 14, 18, 23) == tuple(greys(clip))  # 4.6, 9.2, 13.8, 18.4
    assert clip.frames.dtype == torch.uint8 and clip.frames.shape == (6, 3, 84, 140)
    assert (clip.fps, clip.duration, clip.total_frames) == (8.0, 3.0, 24)
    assert greys(decode(film, "video", 24, PIXELS, 28)) == list(range(24))  # more than one batch


def test_times_are_the_files_own(film, tmp_path):
    """Catches: index / fps for uneven frames, a late start, an avi timed by its B-frames."""
    assert decode(film, "video", 4, PIXELS, 28).times == (0.0, 1.0, 1.875, 2.875)
    seconds = [0.5, 0.6, 0.7, 1.5, 3.0, 3.1]
    paths = [make_video(tmp_path / name, 6, times=seconds) for name in ("v.mp4", "v.mkv")]
    for path in paths:
        clip = decode(path, "video", 6, PIXELS, 28)
        assert clip.times == pytest.approx([s - 0.5 for s in seconds], abs=0.002)
        assert clip.times[-1] < clip.duration < 3.0 and clip.total_frames == 6
        assert clip.fps == pytest.approx(6 / clip.duration, rel=1e-3)
    clip = decode(make_video(tmp_path / "v.avi"), "video", 6, PIXELS, 28)  # a frame rate, no times
    assert clip.times == pytest.approx([i / 8 for i in clip.indices], abs=1e-4)
    assert clip.indices == (0, 5, 9, 14, 18, 23) == tuple(greys(clip))


def test_a_span_is_in_seconds(tmp_path):
    """Catches: a span taken as frame numbers over a mean rate, or as the end when behind it."""
    seconds = [0, 0.1, 0.2, 0.3, 4, 8, 8.1, 8.2]
    path = make_video(tmp_path / "v.mp4", 8, times=seconds)
    for span, indices in [((0, 3), (0, 3)), ((3, 5), (3, 4)), ((5, 6), (4,)), ((4, 8.1), (4, 6))]:
        clip = decode(path, "video", 2, PIXELS, 28, span)
        assert (clip.indices, tuple(greys(clip))) == (indices, indices), span
        assert clip.times == pytest.approx([seconds[i] for i in indices], abs=1e-3)
    with pytest.raises(ValueError, match="the span from 9000 s to 9500 s lies outside the clip of"):
        decode(path, "video", 2, PIXELS, 28, (9000, 9500))


@pytest.mark.parametrize("total, wanted, indices", [
    (1, 16, (0,)), (2, 16, (0, 1)), (3, 16, (0, 2)), (5, 16, (0, 1, 3, 4)), (24, 5, (0, 8, 15, 23)),
    (24, 1, (0,))])
def test_short_clips_have_an_even_number_of_frames(tmp_path, total, wanted, indices):
    """Catches: an odd frame that the processor would double unseen; a clip of 3 or 1 refused."""
    clip = decode(make_video(tmp_path / "v.mp4", total, (56, 56)), "video", wanted, PIXELS, 28)
    assert clip.indices == indices == tuple(greys(clip))
    assert len(clip.times) == len(clip.frames) == len(indices)
    assert clip.times == tuple(i / 8 for i in indices)


def test_sizes_fit_the_patches():
    """Catches: a side that is no multiple, more pixels than allowed, enlargement, lost aspect."""
    choose = random.Random(0)
    for _ in range(2000):
        h, w = choose.randint(1, 3000), choose.randint(1, 3000)
        factor, limit = choose.choice([28, 32]), choose.choice([1024, 5000, 100_352, 401_408])
        fh, fw = video.fit(h, w, limit, factor)
        assert fh % factor == fw % factor == 0 and factor**2 <= fh * fw <= limit
        assert fh < max(factor, h) + factor and fw < max(factor, w) + factor
        if min(fh, fw) >= 3 * factor:
            assert fh / fw == pytest.approx(h / w, rel=0.35)
            assert fh * fw > 0.5 * min(limit, h * w)
    assert video.fit(1080, 1920, PIXELS, 28) == (224, 420)
    assert video.fit(56, 84, PIXELS, 28) == (56, 84)
    assert video.fit(5, 100_000, PIXELS, 28) == (28, 3584)


def test_odd_sizes_and_reduction(tmp_path):
    """Catches: nearest-neighbour reduction, height and width swapped, pixels out of order."""
    clip = decode(make_video(tmp_path / "v.mp4", 4, (51, 37)), "video", 4, PIXELS, 28)
    assert clip.frames.shape == (4, 3, 56, 28) and greys(clip) == [0, 1, 2, 3]
    stripes = torch.zeros(1, 3, 128, 256, dtype=torch.uint8)
    stripes[:, 0, :, ::4] = 200  # every fourth column red
    small = video.resize(stripes, 64 * 32, 32).float()
    assert small.shape == (1, 3, 32, 64) and small[:, 1:].max() == 0
    inside = small[:, 0, :, 2:-2]
    assert (inside - 50).abs().max() <= 2  # a quarter, antialiased; 0 without


def test_images(tmp_path):
    """Catches: transparency turned black, EXIF rotation ignored, channels in the wrong order."""
    Image.new("RGBA", (84, 56), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    upright = Image.new("RGB", (84, 56), (200, 100, 50))
    exif = upright.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    upright.save(tmp_path / "turned.png", exif=exif)
    clip = decode(str(tmp_path / "clear.png"), "image", 1, PIXELS, 28)
    assert clip.frames.shape == (1, 3, 56, 84) and clip.frames.min() == 255
    assert (clip.times, clip.indices) == ((0.0,), (0,))
    clip = decode(str(tmp_path / "turned.png"), "image", 1, PIXELS, 28)
    assert clip.frames.shape == (1, 3, 84, 56)
    assert clip.frames[0, :, 9, 9].tolist() == [200, 100, 50]


def test_bad_files_have_a_reason(film, tmp_path):
    """Catches: an error that ends the run, a stack trace or the time of day in a reason."""
    whole = Path(film).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "zero.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_bytes(b"<html>404</html>")
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {Path(film).name}\n")
    (tmp_path / Path(film).name).write_bytes(whole)
    loader = ClipLoader(4, PIXELS, 28, workers=0)
    reasons = {}
    for name, media_type in [("cut.mp4", "video"), ("zero.mp4", "video"), ("text.mp4", "video"),
                             ("zero.mp4", "image"), ("text.mp4", "image"), ("none.mp4", "video"),
                             ("list.mp4", "video")]:
        clip, reasons[name, media_type] = loader.get(sample(tmp_path / name, media_type))
        assert clip is None
    assert all(reason and "\n" not in reason for reason in reasons.values())
    for media_type in ("video", "image"):
        assert reasons["zero.mp4", media_type] == "the file is empty"
    assert reasons["list.mp4", "video"] == "it is a list of other files, not a video"
    assert reasons["none.mp4", "video"] == "the file cannot be read: No such file or directory"
    good, reason = loader.get(sample(film))
    assert reason is None and greys(good.clip) == [0, 8, 15, 23]
    assert loader.counts == {"failed": 7, "decoded": 1, "damaged": 0}


def test_decord_shows_the_same_or_is_refused(film, tmp_path):
    """Catches: --decoder decord that shows wrong pictures, or reads by PyAV without a word."""
    clip, theirs = (decode(film, "video", 6, PIXELS, 28, None, name) for name in ("pyav", "decord"))
    assert (clip.reader, theirs.reader) == ("pyav", "decord") and clip.times == theirs.times
    assert torch.equal(clip.frames, theirs.frames)
    cut = str(tmp_path / "cut.mp4")  # from the middle of a GOP on, as stream copy leaves it
    with av.open(make_video(tmp_path / "long.mp4", 60)) as source, av.open(cut, "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None and packet.dts * packet.time_base >= 1:
                packet.stream = stream
                copy.mux(packet)
    assert greys(decode(cut, "video", 4, PIXELS, 28)) == [0, 9, 18, 27]  # frames 32 to 59, mod 32
    _, reason = video.try_decode(cut, "video", 4, PIXELS, 28, None, "decord")
    assert re.fullmatch(r"decord counts \d+ frames of 28 in it, and shows \d of 4 pictures wrong",
                        reason)


# ---------------------------------------------------------------------------------------------
# Frames on disk


def a_clip(value=1, frames=2):
    pixels = torch.full((frames, 3, 28, 56), value, dtype=torch.uint8)
    pixels[0, 0, 3, 5] = 200
    times = tuple(i / 3 for i in range(frames))
    return Clip(pixels, times, tuple(range(frames)), 29.97, 2 / 3, 20, "pyav in order", "1 of 3")


def same(one, other):
    fields = ("times", "indices", "fps", "duration", "total_frames", "reader", "damage")
    return torch.equal(one.frames, other.frames) and all(
        getattr(one, field) == getattr(other, field) for field in fields)


def test_cache_gives_back_what_was_stored(film, tmp_path):
    """Catches: floats rounded, pixels shifted, a hit that decodes again or a miss that does not."""
    cache = FrameCache(tmp_path / "cache")
    assert cache.get("x.clip") is None
    cache.put("x.clip", a_clip())
    assert same(cache.get("x.clip"), a_clip())
    loader = ClipLoader(4, PIXELS, 28, workers=0, cache=cache)
    first, second = loader.get(sample(film))[0], loader.get(sample(film, id="8"))[0]
    assert loader.counts == {"decoded": 1, "cached": 1, "damaged": 0}
    assert same(first.clip, second.clip) and (first.id, second.id) == ("7", "8")


def test_every_setting_and_the_file_are_in_the_key(film, tmp_path, monkeypatch):
    """Catches: frames of another size, count, file or reader, wrong ones too, kept for ever."""
    settings = ["video", 16, PIXELS, 28, None, "pyav"]
    keys = {FrameCache.key(film, *settings)}
    for i, other in enumerate(["image", 8, PIXELS // 2, 32, (0, 1), "decord"]):
        keys.add(FrameCache.key(film, *settings[:i], other, *settings[i + 1:]))
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(Path(film).read_bytes())
    os.utime(copy, ns=(1, 10**18))
    keys.add(FrameCache.key(str(copy), *settings))
    os.utime(copy, ns=(1, 10**18 + 1))
    keys.add(FrameCache.key(str(copy), *settings))
    copy.write_bytes(b"other")
    os.utime(copy, ns=(1, 10**18 + 1))
    keys.add(FrameCache.key(str(copy), *settings))
    monkeypatch.setattr(video, "READER", video.READER + 1)
    keys.add(FrameCache.key(str(copy), *settings))
    monkeypatch.setattr(video, "version", lambda package: "99")
    keys.add(FrameCache.key(str(copy), *settings))
    assert len(keys) == 12


def test_damaged_entries_are_misses_and_replaced(film, tmp_path):
    """Catches: a crash or wrong frames after a disk filled up or a bit flipped."""
    loader = ClipLoader(4, PIXELS, 28, workers=0, cache=FrameCache(tmp_path))
    clip = loader.get(sample(film))[0].clip
    entry, = tmp_path.iterdir()
    whole = entry.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    longer = whole[:8] + struct.pack("<I", 10**6) + whole[12:]
    for damaged in (b"", whole[:7], whole[:-1], whole + b"x", bytes(flipped), b"FFR0" + whole[4:],
                    longer):
        entry.write_bytes(damaged)
        assert same(loader.get(sample(film))[0].clip, clip)
        assert entry.read_bytes() == whole
    assert loader.counts == {"decoded": 8, "damaged": 0}


def test_cache_removes_what_was_used_longest_ago(tmp_path):
    """Catches: a folder that grows without end, the newest or the just used removed."""
    size = len(video.pack(a_clip()))
    cache = FrameCache(tmp_path, max_bytes=3 * size + size // 2)
    for i, key in enumerate(["a.clip", "b.clip", "c.clip"]):
        cache.put(key, a_clip())
        os.utime(tmp_path / key, ns=(0, i))
    assert cache.get("a.clip")  # now b is the oldest
    cache.put("d.clip", a_clip())
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.clip", "c.clip", "d.clip"}
    cache.put("e.clip", a_clip(frames=6))  # as large as three
    assert {entry.name for entry in tmp_path.iterdir()} == {"e.clip"}
    cache.put("f.clip", a_clip(frames=20))  # larger than the cache
    assert {entry.name for entry in tmp_path.iterdir()} == {"e.clip"}


def test_cache_clears_up_after_killed_processes(tmp_path):
    """Catches: half-written files that stay for ever, or are taken from a process that writes."""
    for name, age in [("old.tmp", 7200), ("new.tmp", 0)]:
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    FrameCache(tmp_path).put("x.clip", a_clip())
    assert {entry.name for entry in tmp_path.iterdir()} == {"new.tmp", "x.clip"}


def test_cache_shared_by_writers_and_readers(tmp_path):
    """Catches: an entry visible before it is whole, an error where another removed it first."""
    size, failures = len(video.pack(a_clip())), []

    def work(seed):
        choose, cache = random.Random(seed), FrameCache(tmp_path, max_bytes=3 * size)
        try:
            for _ in range(60):
                key = choose.choice("abcdef") + ".clip"
                cache.put(key, a_clip(ord(key[0])))
                found = cache.get(key)
                assert found is None or same(found, a_clip(ord(key[0])))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_disk_that_cannot_be_written_costs_no_sample(film, tmp_path):
    """Catches: a full disk that ends the run, or fails every sample, though decoding works."""
    cache = FrameCache(tmp_path / "cache")
    cache.folder.rmdir()
    loader = ClipLoader(4, PIXELS, 28, workers=0, cache=cache)
    with pytest.warns(UserWarning, match="the frame cache cannot be written"):
        assert loader.get(sample(film))[0].clip.frames.shape[0] == 4


def test_another_users_cache_is_read(film, tmp_path, monkeypatch):
    """Catches: a cache without the right to write never hit, or ending the run when it is full."""
    cache = FrameCache(tmp_path / "cache")
    loader = ClipLoader(4, PIXELS, 28, workers=0, cache=cache)
    loader.get(sample(film))

    def refused(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    for owner, name in [(os, "utime"), (os, "replace"), (Path, "write_bytes"), (Path, "unlink"),
                        (os, "unlink")]:
        monkeypatch.setattr(owner, name, refused)
    assert loader.get(sample(film))[0]
    with pytest.warns(UserWarning, match="the frame cache cannot be written"):
        assert loader.get(sample(film, span=(0, 1)))[0]
    assert loader.counts == {"decoded": 2, "cached": 1, "damaged": 0}


# ---------------------------------------------------------------------------------------------
# Decoding processes


@pytest.fixture
def fifo(tmp_path):
    """Make a picture that hangs: no reader gets past open() before someone opens it to write."""
    folder = tmp_path / "hangs"
    folder.mkdir()
    os.mkfifo(folder / "1.jpg")
    return str(folder)


@pytest.fixture(scope="module")
def loader():
    """One decoding process for several tests, as starting one takes a second or more."""
    loader = ClipLoader(4, PIXELS, 28, workers=1, time_limit=2)
    yield loader
    loader.close()
    assert not any(thread.is_alive() for thread in loader.threads)


def test_processes_give_what_this_process_gives(loader, film, tmp_path):
    """Catches: frames mixed up between samples or damaged on the way; a clip not prefetched."""
    media = [film, make_video(tmp_path / "b.mp4", 9, (60, 60)), str(tmp_path / "none.mp4")]
    samples = [sample(path, id=str(i), question=q) for q in "xy" for i, path in enumerate(media)]
    here = ClipLoader(4, PIXELS, 28, workers=0)
    loader.submit(samples)
    for wanted in reversed(samples):
        (found, reason), (expected, same_reason) = loader.get(wanted), here.get(wanted)
        assert reason == same_reason
        assert expected is None or same(found.clip, expected.clip)
        assert expected is None or replace(found, clip=None) == wanted
    assert loader.counts == here.counts == {"decoded": 4, "failed": 2, "damaged": 0}
    assert not loader.pending


def test_a_file_that_hangs_costs_its_sample_only(loader, film, fifo, monkeypatch):
    """Catches: a hang that stops the run, a process left, a time limit passed on or paid again."""
    wanted = [sample(film, id="1"), sample(fifo, id="2"), sample(film, id="3")]
    loader.submit(wanted)
    assert loader.get(wanted[0])[0]
    hung = loader.workers[0].process
    assert loader.get(wanted[1]) == (None, "decoding took longer than 2 s")
    assert loader.get(wanted[2])[0]
    monkeypatch.setattr(video.Worker, "ask", None)
    assert loader.get(wanted[1]) == (None, "decoding took longer than 2 s")  # it is not asked
    assert hung.returncode == -signal.SIGKILL and loader.workers[0].process.pid != hung.pid


def test_a_process_that_dies_costs_its_sample_only(loader, film, fifo):
    """Catches: a crash of the decoder (a segfault, the OOM killer) that ends or stops the run."""
    wanted = [sample(fifo, id="1"), sample(film, id="2")]
    loader.submit(wanted)
    with open(f"{fifo}/1.jpg", "wb"):  # returns when the process has opened the file to decode it
        os.kill(loader.workers[0].process.pid, signal.SIGSEGV)
        assert loader.get(wanted[0]) == (None, "the decoding process died, signal 11")
    assert loader.get(wanted[1])[0]
    loader.workers[0].process.kill()
    loader.workers[0].process.wait()
    assert loader.get(sample(film, id="3"))[0]  # it died between two files


def test_a_file_is_read_once_more_after_a_kill(film, monkeypatch):
    """Catches: a file that one way of reading cannot survive given up, though the other can."""
    loader, asked = ClipLoader(4, PIXELS, 28, workers=1), []
    ask = video.Worker.ask

    def first_is_killed(self, request, seconds):
        asked.append(request[-1])
        answer = ask(self, request, seconds)
        return answer if len(asked) > 1 else (None, f"the decoding process died, {self.end()}")

    monkeypatch.setattr(video.Worker, "ask", first_is_killed)
    found, reason = loader.get(sample(film))
    assert reason is None and asked == ["pyav", "in order"]
    assert found.clip.reader == "pyav in order" and greys(found.clip) == [0, 8, 15, 23]
    loader.close()


def test_close_in_the_middle_of_a_file(film, fifo):
    """Catches: close() that waits for the time limit or for the queue, or leaves a process."""
    loader = ClipLoader(4, PIXELS, 28, workers=1, time_limit=1e6)
    loader.submit([sample(fifo), sample(fifo, id="8"), sample(film)])
    with open(f"{fifo}/1.jpg", "wb"):
        process = loader.workers[0].process
        loader.close()
    assert process.returncode == -signal.SIGKILL
    ClipLoader(4, PIXELS, 28).close()  # nothing was ever started


def test_processes_end_when_the_parent_is_killed(fifo):
    """Catches: decoding processes that stay for ever after kill -9, even inside a hanging file."""
    script = ("import data, sys, video\n"
              "loader = video.ClipLoader(4, 10**6, 28, workers=1, time_limit=1e6)\n"
              "sample = data.Sample('1', '?', (), 'x', 'free-form', sys.argv[1], 'video')\n"
              "loader.submit([sample])\n"
              "sys.stdin.readline()\n"
              "print(loader.workers[0].process.pid, flush=True)\n"
              "sys.stdin.readline()\n")
    parent = subprocess.Popen([sys.executable, "-c", script, fifo], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              cwd=Path(video.__file__).parent)
    with open(f"{fifo}/1.jpg", "wb"):
        parent.stdin.write("\n")
        parent.stdin.flush()
        process = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        parent.wait()
        ended = select.poll()
        ended.register(process, select.POLLIN)
        assert ended.poll(30_000)
    os.close(process)
    parent.stdin.close()
    parent.stdout.close()


def test_a_process_that_cannot_start_is_no_bad_sample(film, tmp_path, monkeypatch):
    """Catches: a data set dropped sample by sample because av is not installed."""
    loader = ClipLoader(4, PIXELS, 28, workers=1)
    monkeypatch.setattr(video.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start, exit code 1"):
        loader.get(sample(film))
    loader.close()
    mute = tmp_path / "mute"
    mute.write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    mute.chmod(0o755)
    monkeypatch.setattr(video.sys, "executable", str(mute))
    monkeypatch.setattr(video, "START_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match="did not start, signal 9"):
        video.Worker().ask((), 1)
    with pytest.raises(ValueError, match="below 28 x 28"):
        ClipLoader(4, 500, 28)
