"""video.py against files of every kind: each frame shown is the right one, at the right time.

media.py writes the files and says what a player shows of each; nothing here is read from video.py
but what it answers.
"""

import base64
import io
import os
import re
import shutil
import struct
from fractions import Fraction

import av
import media
import numpy as np
import pytest
import torch
from conftest import PIXELS, sample
from media import FRAMES, blocks_of, even, make, number, picture, write
from PIL import Image

import teacher
import video

FACTOR, MILLISECOND = 16, 0.00101

# --- the matrix -----------------------------------------------------------------------------------

REORDERED = ("plain", "b", "open")
CONTAINERS = {
    "h264": ("mp4", "mov", "mkv", "avi", "ts", "flv", "h264"), "mpeg4": ("mp4", "mkv", "avi"),
    "hevc": ("mp4", "mov", "mkv", "ts", "flv", "hevc"), "xvid": ("avi",), "vp8": ("webm", "mkv"),
    "vp9": ("webm", "mkv", "mp4"), "av1": ("mp4", "mkv", "webm"), "mjpeg": ("avi", "mov", "mkv"),
    "prores": ("mov", "mkv"), "wmv2": ("wmv",), "gif": ("gif",), "flv1": ("flv",),
    "mpeg2": ("ts", "mpg")}
CHANGES = {  # the containers that can hold them
    "uneven": ("mp4", "mov", "mkv", "webm", "ts", "flv", "wmv", "gif"),
    "late": ("mp4", "mov", "mkv", "webm", "ts", "flv", "wmv"), "early": ("mp4", "mov", "ts"),
    "cut": ("mp4", "mkv", "webm", "ts"), "cut_key": ("mp4", "mov"), "fragments": ("mp4",),
    "turned90": ("mp4", "mov", "mkv"), "turned180": ("mp4",), "turned270": ("mp4", "mov"),
    "dropped": ("mp4", "mkv", "ts"), "unstamped": ("ts",)}
USUAL = {("h264", "mp4"), ("h264", "mkv"), ("h264", "ts"), ("hevc", "mp4"), ("mpeg4", "mp4"),
         ("vp9", "webm"), ("av1", "mp4"), ("wmv2", "wmv"), ("gif", "gif"), ("vp8", "webm")}


def cases(many=True):
    """Return all files of the matrix; those that are seldom met, or much like another, are slow.

    many: also whole files and cuts of all codecs and containers are not slow.
    """
    for codec, containers in CONTAINERS.items():
        shapes = REORDERED if codec in ("h264", "hevc", "mpeg4", "xvid", "mpeg2") else ("plain",)
        for container in containers:
            for shape in shapes:
                changes = [change for change, holders in CHANGES.items() if container in holders
                           and (change != "dropped" or shape == "b")
                           and (not change.startswith("turned") or codec in ("h264", "hevc"))]
                for change in ["whole", *changes]:
                    usual = (codec, container) in USUAL and shape == shapes[len(shapes) // 2]
                    usual |= (codec, shape, change) == ("hevc", "open", "cut")
                    usual |= many and change in ("whole", "cut_key") and codec != "mpeg2"
                    yield pytest.param((codec, container, shape, change),
                                       id=f"{codec}-{container}-{shape}-{change}",
                                       marks=() if usual else pytest.mark.slow)



@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function from a case to (path, truth); each file is written once."""
    folder, files = tmp_path_factory.mktemp("matrix"), {}

    def get(case):
        if reason := media.missing(case[0]):
            pytest.skip(reason)
        if case not in files:
            path, truth = make(folder, *case)
            files[case] = str(path), truth
        return files[case]
    return get


def decode(path, frames=16, **options):
    return video.decode(str(path), "video", frames, PIXELS, FACTOR, **options)


def spread(first, last, frames):
    """Return `frames` positions, evenly spread from first to last; an even number, or one."""
    count = min(frames, last - first + 1)
    count -= count % 2 if count > 1 else 0
    return [first + round(i * (last - first) / (count - 1)) if count > 1 else first
            for i in range(count)]


def at(truth, seconds):
    """Return the position of the frame that is shown at a time."""
    return max([i for i, (_, time) in enumerate(truth) if time <= seconds + 1e-4], default=0)


def check(clip, truth, positions):
    """See that a clip shows the frames at these positions of the truth, and says when."""
    assert not clip.damage or "of 60.0 s" in clip.damage or "of 192.0 s" in clip.damage
    numbers = [number(frame) for frame in clip.frames]
    assert numbers == [truth[i][0] for i in positions]
    assert clip.times == pytest.approx([truth[i][1] for i in positions], abs=MILLISECOND)
    assert list(clip.indices) == list(positions)


def fresh(path, folder):
    """Return a copy of a file, of which nothing is known yet in this process."""
    number_of = len(list(folder.iterdir()))
    return shutil.copy(path, folder / f"{number_of}{os.path.splitext(path)[1]}")


def shown(jpegs):
    """Return the numbers that a teacher sees."""
    images = [Image.open(io.BytesIO(base64.b64decode(data))) for data in jpegs]
    return [number(np.asarray(image.convert("RGB")).transpose(2, 0, 1)) for image in images]


@pytest.mark.parametrize("case", list(cases()))
def test_the_student_sees_the_right_frames(case, made):
    """Catches: a seek that lands elsewhere, a frozen picture, decoding order, another's times."""
    path, truth = made(case)
    assert case[3] != "whole" or [n for n, _ in truth] == list(range(FRAMES))
    clip = decode(path)
    check(clip, truth, spread(0, len(truth) - 1, 16))
    assert clip.times[0] == 0 and clip.total_frames == len(truth) and clip.reader
    last = truth[-1][1]
    assert last < clip.duration <= last + max(1.0, last / len(truth))
    if case[3] in ("whole", "late", "fragments"):
        assert clip.duration == pytest.approx(FRAMES / 25, abs=0.002)
        assert clip.fps == pytest.approx(25, rel=0.01)
    check(decode(path, 100), truth, spread(0, len(truth) - 1, 100))


@pytest.mark.parametrize("case", list(cases(many=False)))
def test_the_teacher_sees_the_same_frames(case, made, tmp_path):
    """Catches: tools with a clock or a reader of their own, a neighbour of the frame asked for."""
    path, truth = made(case)
    clip = decode(path)
    asked = sample(fresh(path, tmp_path), clip=clip)
    wanted = spread(0, len(truth) - 1, 16)
    third = truth[3][1]
    for moments in (clip.times, [0.0, third - 0.003, third + 0.003, truth[-1][1] + 9.0]):
        frames, times = video.originals(asked, seconds=list(moments))
        there = [truth[i] for i in wanted]
        if moments != clip.times:
            there = [truth[at(truth, moment)] for moment in moments]
        assert [number(frame) for frame in frames] == [n for n, _ in there]
        assert times == pytest.approx([time for _, time in there], abs=MILLISECOND)
    for i in (0, 7, len(clip.times) - 1):
        n, time = truth[wanted[i]]
        box = {"index": i, "x1": 0.0, "y1": 0.0, "x2": 1.0, "y2": 1.0}
        for name in ("get_frame", "zoom_region"):
            text, jpegs = teacher.look(asked, name, box)
            assert shown(jpegs) == [n] and f"frame {i}, {time:.2f} s" in text
    start, stride = truth[2][1] + 0.004, truth[-1][1] / 9
    _, jpegs = teacher.look(asked, "get_temporal_segment",
                            {"start": start, "end": start + 5.01 * stride, "stride": stride})
    there = [truth[at(truth, start + i * stride)][0] for i in range(6)]
    assert shown(jpegs) == list(dict.fromkeys(there))  # each picture once


@pytest.mark.parametrize("case", list(cases(many=False)))
def test_a_span_shows_its_own_frames(case, made, tmp_path):
    """Catches: seconds taken for numbers of frames, the frame shown at the start left out."""
    path, truth = made(case)
    last = truth[-1][1]
    inside = (truth[5][1] + truth[6][1]) / 2
    for start, end in [(0.0, last / 2 + 0.004), (inside, last * 0.9 + 0.004), (inside, inside),
                       (truth[4][1], truth[4][1]), (last - 0.003, last + 5)]:
        positions = spread(at(truth, start), at(truth, end), 16)
        path = fresh(path, tmp_path)
        clip = decode(path, span=(start, end))
        check(clip, truth, positions)
        asked = sample(fresh(path, tmp_path), clip=clip, span=(start, end))
        assert shown(teacher.look(asked, "get_frame", {"index": len(positions) - 1})[1]) == [
            truth[positions[-1]][0]]
    with pytest.raises(ValueError, match="span"):
        decode(path, span=(last + 3, last + 4))


# --- corners of the matrix ------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts", "avi", "flv"])
def test_times_that_no_decimal_holds(container, tmp_path):
    """Catches: the frame before, where a time was rounded down and asked for again."""
    path = tmp_path / f"ntsc.{container}"
    truth = write(path, "h264", "b", rate=Fraction(30000, 1001))
    clip = decode(path, FRAMES)
    check(clip, truth, range(FRAMES))
    assert clip.duration == pytest.approx(FRAMES * 1001 / 30000, abs=0.002)
    asked = sample(path, clip=clip)
    assert list(map(number, video.originals(asked, seconds=clip.times)[0])) == list(range(FRAMES))
    for i, time in enumerate(clip.times):
        check(decode(path, 1, span=(time, time)), truth, [i])


def test_frames_and_packets_are_not_the_same_number(tmp_path):
    """Catches: hidden and packed frames counted, a clock that starts again after 26.5 hours."""
    write(tmp_path / "vp8.webm", "vp8")
    media.copy(tmp_path / "vp8.webm", tmp_path / "hidden.webm", media.hide)
    left = [n for n in range(FRAMES) if n not in (3, 20, 46)]
    write(tmp_path / "xvid.avi", "xvid", "open", encoder={"bf": "1"})
    media.pack(tmp_path / "xvid.avi", tmp_path / "packed.avi")
    write(tmp_path / "wraps.ts", "h264", "b", even(start=95441.6))  # 2^33 / 90000 s are 95443.7 s
    for name, numbers in [("hidden.webm", left), ("packed.avi", range(FRAMES)),
                          ("wraps.ts", range(FRAMES))]:
        truth = [(n, n / 25) for n in numbers]
        clip = decode(tmp_path / name)
        check(clip, truth, spread(0, len(truth) - 1, 16))
        check(decode(fresh(tmp_path / name, tmp_path), 4, span=(1.2, 1.5)), truth,
              spread(at(truth, 1.2), at(truth, 1.5), 4))
        asked = sample(fresh(tmp_path / name, tmp_path), clip=clip)
        jpegs = teacher.look(asked, "get_frame", {"index": 14})[1]
        assert shown(jpegs) == [number(clip.frames[14])]


@pytest.mark.parametrize("codec", ["h264", "xvid", "mjpeg"])
def test_an_avi_that_leaves_most_of_its_slots_empty(codec, tmp_path):
    """Catches: times by the 600 frames a second that `ffmpeg -c copy x.avi` writes into the head,
    of which 25 are there; guessed presentation times taken for true ones.
    """
    truth = write(tmp_path / "sparse.avi", codec, "b", even(), rate=600)
    check(decode(tmp_path / "sparse.avi", FRAMES), truth, range(FRAMES))
    if codec == "h264":
        truth = media.cut(tmp_path / "sparse.avi", tmp_path / "cut.avi", 0.71, 1.6, from_key=False)
        check(decode(tmp_path / "cut.avi", FRAMES), truth, spread(0, len(truth) - 1, FRAMES))


@pytest.mark.parametrize("codec", ["h264", "xvid"])
def test_an_avi_whose_second_slot_comes_late(codec, tmp_path):
    """Catches: the gap that `ffmpeg -c copy x.avi` leaves behind the first of frames that are
    coded in another order than shown, taken for time that the first frame is shown.
    """
    def later(packets):
        for _, _, packet in packets[1:]:
            packet.dts, packet.pts = packet.dts + 2, packet.pts + 2
        return packets

    truth = write(tmp_path / "even.avi", codec, "b")
    media.copy(tmp_path / "even.avi", tmp_path / "gap.avi", later)
    check(decode(tmp_path / "gap.avi", FRAMES), truth, range(FRAMES))


def test_a_container_that_claims_more(tmp_path):
    """Catches: frames of a header's count that are not there, times stretched to its duration."""
    truth = write(tmp_path / "a.avi", "xvid", "b"), write(tmp_path / "m.mkv", "h264", "b")
    avi, mkv = ((tmp_path / name).read_bytes() for name in ("a.avi", "m.mkv"))
    for head, field in ((b"avih", 24), (b"strh", 40)):
        at_field = avi.index(head) + field
        assert struct.unpack_from("<I", avi, at_field) == (FRAMES,)
        avi = avi[:at_field] + struct.pack("<I", 100 * FRAMES) + avi[at_field + 4:]
    duration = mkv.index(b"\x44\x89\x88") + 3  # EBML: Duration, 8 bytes
    assert struct.unpack_from(">d", mkv, duration)[0] == pytest.approx(1920, abs=80)
    mkv = mkv[:duration] + struct.pack(">d", 60_000) + mkv[duration + 8:]
    for name, data, true in [("a.avi", avi, truth[0]), ("m.mkv", mkv, truth[1])]:
        (tmp_path / name).write_bytes(data)
        clip = decode(tmp_path / name)
        check(clip, true, spread(0, FRAMES - 1, 16))
        assert clip.duration == pytest.approx(1.92, abs=0.002) and clip.total_frames == FRAMES


# --- what a picture looks like --------------------------------------------------------------------


def setting(**values):
    def prepare(stream):
        for name, value in values.items():
            setattr(stream.codec_context, name, value)
    return prepare


def clear(i):
    """Return the picture with its seventh block transparent; what it hides is red."""
    pixels = np.dstack([picture(i), np.full((48, 64), 255, np.uint8)])
    pixels[16:32, 32:48] = 255, 0, 0, 0
    return pixels


def turned_wide(stream):
    TURNED["prepare"](stream)
    stream.codec_context.sample_aspect_ratio = Fraction(2, 1)


def mirrored(stream):
    stream.set_display_matrix((-media.ONE, 0, 0, 0, media.ONE, 0, 0, 0, 1 << 30))


TURNED = media.turned(90)
WIDE, TALL = ({"sample_aspect_ratio": Fraction(*ratio)} for ratio in ((2, 1), (1, 2)))
BT709, FULL = {"colorspace": 1}, {"color_range": 2}
LOOKS = {  # codec, container, and what is set
    "limited": ("h264", "mp4", {}), "full": ("h264", "mp4", {"pix_fmt": "yuvj420p"}),
    "full-vp9": ("vp9", "webm", {"prepare": setting(**FULL), "convert": {"dst_color_range": 2}}),
    "full-mjpeg": ("mjpeg", "avi", {}), "4:4:4": ("h264", "mkv", {"pix_fmt": "yuv444p"}),
    "bt709": ("h264", "mp4", {"prepare": setting(**BT709), "convert": {"dst_colorspace": 1}}),
    "10-bit-hevc": ("hevc", "mp4", {"pix_fmt": "yuv420p10le"}),
    "10-bit-h264": ("h264", "mkv", {"pix_fmt": "yuv420p10le"}),
    "10-bit-av1": ("av1", "mp4", {"pix_fmt": "yuv420p10le"}), "gif": ("gif", "gif", {}),
    "wide": ("h264", "mp4", {"prepare": setting(**WIDE)}),
    "wide-vp9": ("vp9", "mp4", {"prepare": setting(**WIDE)}),  # only the container says it
    "wide-av1": ("av1", "mp4", {"prepare": setting(**WIDE)}),  # and the stream says 1:1
    "tall": ("h264", "mkv", {"prepare": setting(**TALL)}),
    "tall-turned": ("h264", "mp4", {"prepare": turned_wide, "draw": TURNED["draw"]}),
    "mirrored": ("h264", "mp4", {"prepare": mirrored, "draw": lambda i: picture(i)[:, ::-1]}),
    "alpha-vp9": ("vp9", "webm", {"pix_fmt": "yuva420p", "draw": clear}),
    "alpha-prores": ("prores", "mov", {"pix_fmt": "yuva444p10le", "draw": clear})}


@pytest.mark.parametrize("look", LOOKS)
def test_pictures_look_as_a_player_shows_them(look, tmp_path):
    """Catches: full range taken for limited, BT.709 for BT.601, pixels taken for square; and a
    student that sees another picture than its teacher.
    """
    codec, container, options = LOOKS[look]
    path = tmp_path / f"look.{container}"
    draw = options.get("draw", picture)
    truth = write(path, codec, "b", **{**options, "draw": lambda i: draw(i + 16)})
    clip = decode(path, FRAMES)
    originals, _ = video.originals(sample(path, clip=clip), seconds=clip.times)
    for frames in (clip.frames, originals):
        corners = blocks_of(frames[7])[[0, 0, 2, 2], [0, 3, 0, 3]]
        assert np.abs(corners - list(media.CORNERS.values())).max() <= 6
        assert abs(corners[3].mean() - 64) < 3.5  # 56 or 71 where the range is mistaken
        shape = 2 * 64 / 48 if "wide" in look else 0.5 * 64 / 48 if "tall" in look else 64 / 48
        assert frames[7].shape[2] / frames[7].shape[1] == pytest.approx(shape, rel=0.03)
        if "alpha" not in look:
            assert list(map(number, frames)) == [n + 16 for n, _ in truth]
    seen = [blocks_of(frames[7]) for frames in (clip.frames, originals)]
    assert np.abs(seen[0] - seen[1]).max() < 2


def test_a_cover_is_not_the_video(tmp_path):
    """Catches: the picture of an album, larger and first in the file, taken for the film."""
    for name in ("cover.mkv", "cover.mp4"):
        with av.open(str(tmp_path / name), "w") as container:
            cover, film = container.add_stream("mjpeg", rate=1), container.add_stream("libx264", 25)
            for stream, scale, format in (cover, 5, "yuvj420p"), (film, 1, "yuv420p"):
                stream.width, stream.height, stream.pix_fmt = 64 * scale, 48 * scale, format
            cover.disposition = av.stream.Disposition.attached_pic
            for stream, scale, numbers in (cover, 5, [99]), (film, 1, range(FRAMES)):
                for i, n in enumerate(numbers):
                    pixels = picture(n).repeat(scale, 0).repeat(scale, 1)
                    frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
                    frame.pts, frame.time_base = i, 1 / stream.codec_context.rate
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
        clip = decode(tmp_path / name)
        check(clip, [(n, n / 25) for n in range(FRAMES)], spread(0, FRAMES - 1, 16))
        look = teacher.look(sample(tmp_path / name, clip=clip), "get_frame", {"index": 9})
        assert shown(look[1]) == [number(clip.frames[9])]


# --- files that are broken, and what is no video --------------------------------------------------


@pytest.fixture(scope="module")
def loader():
    loader = video.ClipLoader(16, PIXELS, FACTOR, workers=1, time_limit=5)
    yield loader
    loader.close()


def plain(reason):
    """Return whether a reason is one sentence that its reader understands."""
    return (len(reason.split()) > 3 and len(reason) < 300 and "\n" not in reason
            and not re.search("Errno|::|0x[0-9a-f]|[.]c(c|pp)?:|avcodec|avformat|NoneType", reason))


def no_video(folder):
    """Make what cannot be shown; return its names and a word of the reason for each."""
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("<html><body>404 Not Found</body></html>\n" * 9)
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(70_000))
    (folder / "zeros.mkv").write_bytes(bytes(70_000))
    (folder / "folder").mkdir()
    (folder / "folder" / "notes.txt").write_text("no picture")
    os.mkfifo(folder / "pipe.mp4")
    for name, rate in ("audio.mp4", 44100), ("audio.mkv", 48000):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("aac", rate=rate)
            for i in range(30):
                silence = np.zeros((2, 1024), np.float32)
                frame = av.AudioFrame.from_ndarray(silence, "fltp", "stereo")
                frame.sample_rate, frame.pts = rate, 1024 * i
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return {"empty.mp4": "empty", "text.mp4": "video", "noise.mp4": "video", "zeros.mkv": "video",
            "folder": "picture", "pipe.mp4": "pipe", "audio.mp4": "audio", "audio.mkv": "audio",
            "missing.mp4": "No such file", "/dev/zero": "device"}


def test_what_is_no_video_is_named(loader, tmp_path):
    """Catches: a run that hangs or ends at one file, C++ for a reason, the next file lost."""
    words = no_video(tmp_path)
    write(tmp_path / "good.mp4", "h264", "b")
    samples = [sample(tmp_path / name, id=name) for name in words]
    good = [sample(tmp_path / "good.mp4", id=str(i)) for i in range(len(words))]
    loader.submit([each for pair in zip(samples, good) for each in pair])
    for bad, after in zip(samples, good):
        found, reason = loader.get(bad)
        assert found is None and plain(reason), f"{bad.id}: {reason}"
        assert words[bad.id] in reason, f"{bad.id}: {reason}"
        found, reason = loader.get(after)
        assert reason is None and number(found.clip.frames[15]) == FRAMES - 1


def test_a_name_does_not_matter(loader, tmp_path):
    """Catches: a reader chosen by the ending of the name."""
    write(tmp_path / "a.webm", "vp9")
    write(tmp_path / "b.avi", "xvid", "b")
    for path, name in ("a.webm", "a.mp4"), ("b.avi", "b.mkv"), ("a.webm", "no ending"):
        (tmp_path / name).write_bytes((tmp_path / path).read_bytes())
        found, reason = loader.get(sample(tmp_path / name, id=name))
        assert reason is None
        check(found.clip, [(n, n / 25) for n in range(FRAMES)], spread(0, FRAMES - 1, 16))


@pytest.mark.parametrize("codec, container", [
    ("h264", "mp4"), ("h264", "mkv"), ("h264", "ts"), ("xvid", "avi"), ("vp9", "webm"),
    pytest.param("hevc", "mp4", marks=pytest.mark.slow),
    pytest.param("h264", "flv", marks=pytest.mark.slow)])
def test_a_truncated_file_is_used_as_far_as_it_goes(codec, container, loader, tmp_path):
    """Catches: a frozen or half a picture at the end, a whole file lost for its last second, a
    sixth of a file taken for all of it.
    """
    path = tmp_path / f"whole.{container}"
    write(path, codec, "b", muxer={"movflags": "faststart"} if container == "mp4" else None)
    data, used = path.read_bytes(), 0
    for percent in range(5, 100, 10):
        path = tmp_path / f"{percent}.{container}"
        path.write_bytes(data[:len(data) * percent // 100])
        whole = list(dict.fromkeys(media.in_order(path)))  # a number twice: one is no whole picture
        whole = [n for n in whole if n is not None]
        found, reason = loader.get(sample(path))
        assert found or plain(reason), reason
        used += bool(found)
        if container == "mp4" and not 0.4 * FRAMES < len(whole) < 0.6 * FRAMES:  # it says how many
            assert bool(found) == (len(whole) > 0.5 * FRAMES), reason
            assert found or not whole or re.search(r"\d+ of \d+", reason), reason
        elif len(whole) > 0.6 * FRAMES:
            assert found, reason
        if found:
            assert container not in ("mkv", "webm") or percent > 85 or found.clip.damage
            numbers = [number(frame) for frame in found.clip.frames]
            assert numbers == [whole[i] for i in spread(0, len(whole) - 1, 16)], percent
            assert found.clip.times == pytest.approx([n / 25 for n in numbers], abs=MILLISECOND)
    assert used >= 2


@pytest.mark.parametrize("codec, container", [
    ("h264", "mp4"), ("h264", "mkv"), ("hevc", "ts"), ("mpeg4", "mp4")])
def test_a_hole_in_a_file_spoils_its_surroundings_only(codec, container, loader, tmp_path):
    """Catches: times that move up after lost frames, a decoder that hangs or dies of zeros."""
    path = tmp_path / f"hole.{container}"
    write(path, codec, "b")
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    data[places[27]:places[30]] = bytes(places[30] - places[27])  # the third group is 24 to 35
    path.write_bytes(data)
    found, reason = loader.get(sample(path))
    assert found or plain(reason), reason
    if found:
        for time, frame in zip(found.clip.times, found.clip.frames):
            assert 0.95 < time < 1.45 or number(frame) == round(25 * time)


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_a_damaged_start_moves_every_clock_alike(codec, tmp_path):
    """Catches: a span, or a tool, that counts from a first frame which the whole clip lacks."""
    path = tmp_path / "start.mp4"
    write(path, codec, "b")
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    data[places[0]:places[3]] = bytes(places[3] - places[0])
    path.write_bytes(data)
    whole, part = decode(path, 100), decode(fresh(path, tmp_path), span=(0.7, 1.0))
    told = {time: number(frame) for time, frame in zip(whole.times, whole.frames)}
    assert [number(frame) for frame in part.frames] == [told[time] for time in part.times]
    asked = sample(fresh(path, tmp_path), clip=part)
    [frame], times = video.originals(asked, seconds=[0.8])
    assert times[0] in told and number(frame) == told[times[0]]


# --- images and folders of them -------------------------------------------------------------------

RAMP = np.arange(48 * 64).reshape(48, 64) / (48 * 64 - 1)  # 0..1


def png(path, pixels, format):
    """Write a PNG of a depth that Pillow does not write."""
    coder = av.CodecContext.create("png", "w")
    coder.width, coder.height, coder.pix_fmt = 64, 48, format
    coder.time_base = Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(pixels, format)
    path.write_bytes(b"".join(bytes(packet) for packet in coder.encode(frame) + coder.encode()))


def upright(orientation):
    """Return picture 5 as it is stored for an EXIF orientation."""
    whole = picture(5)
    return [whole, whole[:, ::-1], whole[::-1, ::-1], whole[::-1],  # row 0 is the top or bottom
            whole.swapaxes(0, 1), np.rot90(whole), whole[::-1, ::-1].swapaxes(0, 1),
            np.rot90(whole, -1)][orientation - 1].copy()  # column 0 is the top or bottom


def images(folder):
    """Write images of all kinds; yield each one's path and the picture [48, 64, 3] it shows."""
    grey = np.repeat(255 * RAMP[:, :, None], 3, 2)
    alpha = np.where(np.arange(64) < 32, 255, 0).astype(np.uint8)[None].repeat(48, 0)
    on_white = np.where(alpha[:, :, None] > 0, picture(5), 255)
    deep = np.round(RAMP * 65535).astype(np.uint16)
    Image.fromarray(deep).save(folder / "grey16.png")
    yield "grey16.png", grey
    Image.fromarray(deep).save(folder / "grey16.tif")
    yield "grey16.tif", grey
    png(folder / "rgb16.png", np.dstack([deep, deep[::-1], deep[:, ::-1]]), "rgb48be")
    yield "rgb16.png", 255 * np.dstack([RAMP, RAMP[::-1], RAMP[:, ::-1]])
    for name, most in ("float1.tif", 1), ("float255.tif", 255):
        Image.fromarray((most * RAMP).astype(np.float32)).save(folder / name)
        yield name, grey
    palette = Image.fromarray(picture(5)).quantize(8)
    clear = palette.getpixel((2, 2))  # the index of white, in a corner
    palette.save(folder / "palette.png")
    yield "palette.png", picture(5)
    red = palette.getpixel((60, 2))
    palette.save(folder / "clear.png", transparency=red)
    assert red != clear
    yield "clear.png", np.where((picture(5) == (255, 0, 0)).all(2, keepdims=True), 255, picture(5))
    Image.fromarray(np.dstack([picture(5), alpha])).save(folder / "rgba.png")
    yield "rgba.png", on_white
    light = np.round(255 * RAMP).astype(np.uint8)
    Image.fromarray(np.dstack([light, alpha]), "LA").save(folder / "la.png")
    yield "la.png", np.where(alpha[:, :, None] > 0, grey, 255)
    Image.fromarray(RAMP > 0.5).save(folder / "bits.png")
    yield "bits.png", np.repeat(255 * (RAMP > 0.5)[:, :, None], 3, 2)
    Image.fromarray(picture(5)).convert("CMYK").save(folder / "cmyk.jpg", quality=100)
    yield "cmyk.jpg", picture(5)
    for orientation in range(1, 9):
        image = Image.fromarray(upright(orientation))
        (exif := image.getexif())[0x0112] = orientation
        image.save(folder / f"exif{orientation}.png", exif=exif)
        yield f"exif{orientation}.png", picture(5)
    write(folder / "moves.gif", "gif", draw=lambda i: picture(i + 5))
    yield "moves.gif", picture(5)


def test_images_are_the_same_for_student_and_teacher(tmp_path):
    """Catches: 16 bits cut off at 255, floats cut to 0, clear shown as black, a turned image."""
    for name, expected in images(tmp_path):
        clip = video.decode(str(tmp_path / name), "image", 1, PIXELS, FACTOR)
        [seen], times = video.originals(sample(tmp_path / name, "image"), seconds=[0.0])
        assert torch.equal(clip.frames[0], seen), name
        assert times == [0.0] and clip.times == (0.0,)
        apart = np.abs(seen.numpy().transpose(1, 2, 0) - np.asarray(expected, float))
        edges = 30 if name.endswith(("jpg", "gif")) else 1
        assert np.median(apart) <= 4 and np.quantile(apart, 0.9) <= edges, name


@pytest.mark.parametrize("pattern", ["{}.jpg", "{}.png", "frame_{}.jpg", "{:05}.jpeg"])
def test_folders_of_frames(pattern, tmp_path):
    """Catches: 1, 10, 11, 12, 2, ...; a kind of file left out; a folder that no tool can read."""
    for n in range(1, 13):
        Image.fromarray(picture(n)).save(tmp_path / pattern.format(n), quality=95)
    (tmp_path / ".DS_Store").write_bytes(b"no picture")
    (tmp_path / "._1.jpg").write_bytes(b"no picture")  # macOS leaves these on other disks
    truth = [(n, (n - 1) / 3) for n in range(1, 13)]
    clip = decode(tmp_path, 12)
    check(clip, truth, range(12))
    assert clip.duration == pytest.approx(4) and clip.total_frames == 12
    check(decode(tmp_path, 6, span=(1.1, 2.9)), truth, spread(3, 8, 6))
    asked = sample(tmp_path, clip=clip)
    frames, times = video.originals(asked, seconds=list(clip.times))
    assert list(map(number, frames)) == list(range(1, 13)) and times == pytest.approx(clip.times)
    assert shown(teacher.look(asked, "get_frame", {"index": 10})[1]) == [11]
    segment = {"start": 1.5, "end": 3.6, "stride": 0.5}
    assert shown(teacher.look(asked, "get_temporal_segment", segment)[1]) == [5, 7, 8, 10, 11]
