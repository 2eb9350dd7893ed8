"""Makers of real media files whose every frame carries its number, and what a player shows of them.

    path, truth = make(folder, "h264", "mp4", "b", "cut")     truth: [(number, seconds), ...]
    number(frame)    of a shown frame [3, h, w]; None where the picture is not whole and upright

A picture is 4 x 3 blocks. The corners are white, red, blue and dark grey, so a turned, mirrored or
recoloured picture has no number; the others are black or white: seven bits and their parity.
Everything is written by PyAV; nothing here is read from video.py.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FRAMES, RATE, GOP, BLOCK = 48, 25, 12, 16
CORNERS = {(0, 0): (255, 255, 255), (0, 3): (255, 0, 0), (2, 0): (0, 0, 255), (2, 3): (64, 64, 64)}
BITS = [(row, column) for row in range(3) for column in range(4) if (row, column) not in CORNERS]
ENCODERS = {  # of each codec, and the pixel format it is given
    "h264": ("libx264", "yuv420p"), "hevc": ("libx265", "yuv420p"), "mpeg4": ("mpeg4", "yuv420p"),
    "xvid": ("mpeg4", "yuv420p"), "vp8": ("libvpx", "yuv420p"), "vp9": ("libvpx-vp9", "yuv420p"),
    "av1": ("libsvtav1", "yuv420p"), "mjpeg": ("mjpeg", "yuvj420p"), "wmv2": ("wmv2", "yuv420p"),
    "prores": ("prores_ks", "yuv422p10le"), "gif": ("gif", "rgb8"), "flv1": ("flv", "yuv420p"),
    "mpeg2": ("mpeg2video", "yuv420p")}
UNEVEN = (0.04, 0.2, 0.01, 0.5, 0.03, 0.07)  # seconds from frame to frame, over and over


def missing(codec):
    """Return why a codec cannot be tried with this build of PyAV, or None."""
    try:
        av.codec.Codec(ENCODERS[codec][0], "w")
    except av.codec.codec.UnknownCodecError:
        return f"this build of PyAV has no encoder {ENCODERS[codec][0]}"


# --- pictures -------------------------------------------------------------------------------------


def picture(n):
    """Return the picture of a number below 128 as uint8 [48, 64, 3]."""
    bits = [n >> i & 1 for i in range(7)]
    blocks = np.zeros((3, 4, 3), np.uint8)
    for place, bit in zip(BITS, [*bits, sum(bits) % 2]):
        blocks[place] = 255 * bit
    for place, colour in CORNERS.items():
        blocks[place] = colour
    return blocks.repeat(BLOCK, 0).repeat(BLOCK, 1)


def blocks_of(frame_3hw):
    """Return the mean colour of the inner part of each block, [3, 4, 3]."""
    h, w = frame_3hw.shape[1:]
    inner = [[frame_3hw[:, h * (4 * i + 1) // 12:h * (4 * i + 3) // 12,
                        w * (4 * j + 1) // 16:w * (4 * j + 3) // 16] for j in range(4)]
             for i in range(3)]
    return np.array([[np.asarray(part, float).mean((1, 2)) for part in row] for row in inner])


def number(frame_3hw):
    """Read the number off a frame [3, h, w] of any size; None where there is none beyond doubt."""
    blocks = blocks_of(frame_3hw)
    if any(np.abs(blocks[place] - colour).max() > 60 for place, colour in CORNERS.items()):
        return None
    values = np.array([blocks[place] for place in BITS])
    if np.abs(values - 128).min() < 68:
        return None
    bits = [int(value) for value in values.mean(1) > 128]
    return sum(bit << i for i, bit in enumerate(bits[:7])) if sum(bits) % 2 == 0 else None


# --- whole files ----------------------------------------------------------------------------------


def even(frames=FRAMES, rate=RATE, start=0.0):
    """Return evenly spaced times in seconds."""
    return [start + float(i / Fraction(rate)) for i in range(frames)]


def uneven(frames=FRAMES):
    """Return times of a variable frame rate, from 0."""
    return [sum(UNEVEN[j % len(UNEVEN)] for j in range(i)) for i in range(frames)]


def from_first(numbers, times):
    """Return [(number, seconds from the first)], in order of presentation."""
    shown = sorted(zip(times, numbers))
    return [(n, round(time - shown[0][0], 4)) for time, n in shown]


def options_of(codec, shape):
    """Return the encoder's options: key frames every GOP; two B-frames between others, if any."""
    b = 0 if shape == "plain" else 2
    if codec in ("h264", "hevc"):
        given = (f"keyint={GOP}:min-keyint={GOP}:scenecut=0:bframes={b}:b-adapt=0:"
                 f"open-gop={int(shape == 'open')}:log-level=none" + ":ctu=16" * (codec == "hevc"))
        return {("x264" if codec == "h264" else "x265") + "-params": given, "preset": "veryfast"}
    if codec in ("mpeg4", "xvid", "mpeg2"):
        flags = "+qscale" + "+cgop" * (shape == "b")
        return {"bf": str(b), "qscale": "3", "flags": flags, "sc_threshold": "1000000000"}
    return {"vp8": {"crf": "10", "b": "1M"}, "vp9": {"crf": "10", "b": "0", "cpu-used": "8"},
            "av1": {"preset": "8", "crf": "8", "svtav1-params": "lp=1"}}.get(codec, {})


def write(path, codec="h264", shape="plain", times=None, *, rate=RATE, draw=picture, pix_fmt=None,
          muxer=None, prepare=None, encoder=None, convert=None):
    """Write frame i at times[i] seconds; return [(number, seconds)] as a player shows them.

    shape: plain, b (B-frames), open (and open GOPs). draw(i): the picture as uint8 [h, w, 3 or 4].
    muxer, encoder: options. prepare(stream): what is set before the first frame. convert: how
    frames are reformatted to pix_fmt.
    """
    times = times or even(rate=rate)
    steps = [time * rate for time in times]
    steady = all(abs(step - round(step)) < 1e-6 for step in steps)
    tick = 1 / Fraction(rate) if steady else Fraction(1, 100)
    name, usual = ENCODERS[codec]
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(name, rate=rate)
        stream.options = options_of(codec, shape) | (encoder or {})
        stream.height, stream.width = draw(0).shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = pix_fmt or usual, tick
        stream.codec_context.gop_size, stream.codec_context.thread_count = GOP, 1
        if codec == "xvid":
            stream.codec_context.codec_tag = "XVID"
        if prepare:
            prepare(stream)
        for i, time in enumerate(times):
            pixels = draw(i)
            frame = av.VideoFrame.from_ndarray(pixels, ("rgb24", "rgba")[pixels.shape[2] - 3])
            frame = frame.reformat(format=stream.pix_fmt, **(convert or {}))
            frame.time_base, frame.pts = tick, round(time / tick)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return from_first(range(len(times)), times)


# --- copies of coded frames -----------------------------------------------------------------------


def copy(source, target, keep=lambda packets: packets, shift=0.0, muxer=None):
    """Copy the packets that `keep` returns, `shift` seconds later, without decoding them.

    keep: from a list of (number, seconds from the first frame, packet), in the file's order, to
    those of them that are copied. Returns these.
    """
    with av.open(str(source)) as old, av.open(str(target), "w", options=muxer or {}) as new:
        stream = old.streams.video[0]
        packets = [packet for packet in old.demux(stream) if packet.size]
        for packet, following in reversed(list(zip(packets, packets[1:]))):
            if packet.dts is None:  # Matroska has no decoding times; the first are not guessed
                packet.dts = following.dts - round(1 / RATE / packet.time_base)
        order = sorted(packet.pts for packet in packets)
        found = [(order.index(packet.pts), float((packet.pts - order[0]) * stream.time_base),
                  packet) for packet in packets]
        out, kept = new.add_stream_from_template(stream, opaque=True), keep(found)
        for _, _, packet in kept:
            later = round(shift / packet.time_base) - order[0]
            packet.pts, packet.dts, packet.stream = packet.pts + later, packet.dts + later, out
            new.mux(packet)
    return kept


def cut(source, target, start, end, from_key, muxer=None):
    """Copy what is coded from start to end, as `ffmpeg -ss start -to end -c copy`, and return
    [(number, seconds)] as a player shows them.

    from_key: from the key frame before `start`; the edit list of an mp4 then says that the frames
    before `start` are not shown. Without it, from the first packet after `start`: a player shows
    nothing before the first key frame, nor what is coded after it and shown before it.
    """
    def keep(packets):
        behind = [i for i, (_, time, packet) in enumerate(packets)
                  if packet.is_keyframe and time <= start]
        first = behind[-1] if from_key else 0
        moments = [float(packet.dts * packet.time_base) for _, _, packet in packets]
        moments = [moment - moments[0] + packets[0][1] for moment in moments]
        return [packet for i, packet in enumerate(packets)
                if moments[i] < end and i >= first and (from_key or moments[i] >= start)]

    kept = copy(source, target, keep, shift=-start, muxer=muxer)
    if not from_key:
        key = next(i for i, (_, _, packet) in enumerate(kept) if packet.is_keyframe)
        kept, start = kept[key:], kept[key][1]
    shown = [(number, time) for number, time, _ in kept if time >= start]
    return from_first(*zip(*shown))


def drop(packets):
    """Leave out six B-frames that no other frame needs, then a whole group of pictures."""
    latest = [max(time for _, time, _ in packets[:i + 1]) for i in range(len(packets))]
    b = [i for i, (_, time, _) in enumerate(packets) if time < latest[i]]
    keys = [i for i, (_, _, packet) in enumerate(packets) if packet.is_keyframe]
    left_out = {*b[3:9], *range(keys[-2], keys[-1])}
    return [packet for i, packet in enumerate(packets) if i not in left_out]


def in_order(path):
    """Return the numbers that decoding from start to end shows, as far as it goes."""
    numbers = []
    try:
        with av.open(str(path)) as container:
            for packet in container.demux(video=0):
                try:
                    frames = packet.decode()
                except av.error.FFmpegError:
                    continue
                numbers += [number(frame.to_ndarray(format="rgb24").transpose(2, 0, 1))
                            for frame in frames]
    except (av.error.FFmpegError, IndexError):  # not even a stream
        pass
    return numbers


def without_stamps(path):
    """Take the times of all but every fifth frame out of a transport stream, in place."""
    data, frames = bytearray(path.read_bytes()), 0
    for start in range(0, len(data), 188):
        header = data.find(b"\0\0\1\xe0", start, start + 188)
        if data[start + 1] & 0x40 and header > 0:
            if frames % 5:
                length = data[header + 8]
                data[header + 7] &= 0x3f  # neither a presentation nor a decoding time follows
                data[header + 9:header + 9 + length] = b"\xff" * length
            frames += 1
    path.write_bytes(data)


def hide(packets):
    """Mark three frames of a vp8 file as not shown, as its alternate reference frames are."""
    for n, _, packet in packets:
        coded = bytes(packet)
        packet.update(bytes([coded[0] & ~16 if n in (3, 20, 46) else coded[0]]) + coded[1:])
    return packets


def pack(source, target):
    """Write an XviD file with a B-frame between others as DivX packs it: a reference and the
    B-frame before it in one chunk, then a chunk that says "no frame".
    """
    def kind(coded):  # 0 I, 1 P, 2 B
        return coded[coded.index(b"\0\0\1\xb6") + 4] >> 6

    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        frames = [bytes(packet) for packet in old.demux(video=0) if packet.size]
        stream = new.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.codec_context.codec_tag = 64, 48, "XVID"
        for i, coded in enumerate(frames):
            if kind(coded) == 2:  # a P-frame's head with the time of the one before, not coded
                coded = b"\0\0\1\xb6" + int(f"0101{i % RATE:05b}1001111", 2).to_bytes(2)
            elif i + 1 < len(frames) and kind(frames[i + 1]) == 2:
                coded += frames[i + 1]
            at = coded.find(b"Lavc")  # who wrote it: a DivX that packs
            coded = coded if at < 0 else coded[:at] + b"DivX503b1393p" + coded[at + 13:]
            packet = av.Packet(coded)
            packet.pts = packet.dts = i
            packet.time_base, packet.stream = Fraction(1, RATE), stream
            packet.is_keyframe = kind(coded) == 0
            new.mux(packet)


# --- the matrix -----------------------------------------------------------------------------------

FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
ONE = 1 << 16
MATRICES = {  # a, b, c, d of ISO/IEC 14496-12: x' = a x + c y, y' = b x + d y, y downwards
    90: (0, ONE, -ONE, 0), 180: (-ONE, 0, 0, -ONE), 270: (0, -ONE, ONE, 0)}


def turned(degrees):
    """Return write's arguments for pictures stored turned and shown turned back clockwise."""
    a, b, c, d = MATRICES[degrees]
    return {"draw": lambda i: np.rot90(picture(i), degrees // 90).repeat(2, 0).repeat(2, 1),
            "prepare": lambda stream: stream.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30))}


def make(folder, codec, container, shape="plain", change="whole"):
    """Write one file of the matrix; return its path and [(number, seconds)], what a player shows.

    change: whole, uneven, late, early, fragments, turned90, turned180, turned270, cut, cut_key,
    dropped, unstamped.
    """
    path = Path(folder) / f"{codec}-{shape}-{change}.{container}"
    given, times = {}, None
    if change == "uneven":
        times = uneven()
    elif change in ("late", "early"):
        times = even(start=7.52 if change == "late" else -0.52)
        given["muxer"] = {"avoid_negative_ts": "disabled"}
    elif change == "fragments":
        given["muxer"] = FRAGMENTS
    elif change.startswith("turned"):
        given = turned(int(change[6:]))
    if change in ("cut", "cut_key", "dropped"):
        whole = path.with_name("whole-" + path.name)
        params = {"h264": "x264-params", "hevc": "x265-params"}.get(codec)
        no_pyramid = {params: options_of(codec, shape)[params] + ":b-pyramid=0"} if params else {}
        write(whole, codec, shape, encoder=no_pyramid)
        if change == "dropped":
            kept = copy(whole, path, drop)
            return path, from_first(*zip(*[(n, time) for n, time, _ in kept]))
        return path, cut(whole, path, 0.71, 1.6, change == "cut_key")
    truth = write(path, codec, shape, times, **given)
    if change == "unstamped":
        without_stamps(path)
    if change == "early" and container in ("mp4", "mov"):  # before 0 nothing is shown
        truth = from_first(*zip(*[(n, time) for n, time in enumerate(times) if time >= 0]))
    return path, truth
