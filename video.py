"""Files to frames: reading, timestamps, a cache on disk, and worker processes that can be killed.

    clip = decode("a.mp4", "video", 16, 128 * 28 * 28, 28)    frames that a student sees, and when
    loader = ClipLoader(16, 128 * 28 * 28, 28, cache=FrameCache("frames"))
    loader.submit(samples[:8])                  they are decoded while the model works
    sample, reason = loader.get(samples[0])     the sample with its clip, or why it has none
    frames, times = originals(sample, [3.5])    what a teacher's tools look at

There is one clock: a time is the presentation time in the file, in seconds from the first frame
that is shown. There is one reader, PyAV; decord is for runs that must see what it shows.

A sample is whatever has media, media_type, span and clip (data.py). `python video.py FD` is a
decoding process, as ClipLoader starts it; it is of no use by hand.

Dimensions: F frames; image axes: c channels, h height, w width.
"""

import base64
import bisect
import functools
import hashlib
import io
import itertools
import json
import math
import os
import queue
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_IMAGE_PIXELS = 401_408  # 512 * 28 * 28
PICTURES = ".jpg .jpeg .png .webp .bmp".split()  # in folders of frames
START_SECONDS = 120.0  # time limit for a decoding process to begin
READER = 2  # of this file: what an older one read is not taken from a cache
MAX_SENT_PIXELS, MAX_SENT_BYTES = 1024 * 1024, 1_000_000  # of a JPEG; APIs shrink larger images
STRIP_PIXELS, STRIP_BYTES = 128 * 128, 4096  # of one frame of a strip
MAX_JPEG_SIDE = 65_500


@dataclass(frozen=True, eq=False)
class Clip:
    """What a student sees of a file: frames [F, 3, h, w] in uint8, and their place in it.

    times: seconds from the first frame that the file shows; indices: numbers in order of
    presentation. fps: the file's average. duration: seconds until the last of the frames to choose
    from ends; total_frames: how many these were. reader: what read the file; damage: how much of it
    could be read, "" where all.
    """
    frames: Tensor
    times: tuple[float, ...]
    indices: tuple[int, ...]
    fps: float
    duration: float
    total_frames: int
    reader: str = "pyav"
    damage: str = ""


# --- reading one file -----------------------------------------------------------------------------


class Stills:
    """A folder of numbered pictures, 3 a second (MVBench's TVQA), read as a video."""

    reader, damage = "pictures", ""

    def __init__(self, folder):
        paths = [path for path in Path(folder).iterdir()
                 if path.suffix.lower() in PICTURES and not path.name.startswith(".")]
        if not paths:
            raise ValueError(f"the folder holds no picture ({', '.join(PICTURES)})")
        self.paths = sorted(paths, key=lambda path: [  # 2.jpg comes before 10.jpg
            int(part) if part.isdecimal() else part for part in re.split("([0-9]+)", path.name)])
        self.times = [round(i / 3, 4) for i in range(len(paths) + 1)]

    def pictures(self, indices: list[int]) -> Iterator[Tensor]:
        """Yield pictures in uint8 [3, h, w]."""
        return (read_image(self.paths[i]) for i in indices)


class Video:
    """A video file, read by PyAV (FFmpeg), each frame known by its presentation timestamp.

    The timestamps of all packets are read first, without decoding. A wanted frame is decoded from
    the key frame before it, and each frame on the way must be the next one that the packets
    promise. It is a ValueError where packets are not frames, lack timestamps or are damaged; then
    `in_order` decodes the whole file to see which frames there are, and again to take the wanted.

    times: seconds of N + 1 moments, the start of each frame and the end of the last.
    """

    def __init__(self, path: str, in_order: bool = False):
        self.path, self.reader = path, "pyav in order" if in_order else "pyav"
        self.keys, self.first, self.damage = [], None, ""
        with _opened(path) as (container, stream):
            stamps, last = (self._decode if in_order else self._index)(container, stream)
            rate, tick = stream.average_rate or stream.guessed_rate, stream.time_base
            whole = _seconds(container, stream)
        if stamps is None:
            if not rate:
                raise ValueError("it has neither a frame rate nor timestamps")
            stamps, last, tick = range(len(self.pts)), 1, 1 / rate
        seconds = [(stamp - stamps[0]) * tick.numerator / tick.denominator for stamp in stamps]
        mean = seconds[-1] / (len(seconds) - 1) if len(seconds) > 1 else 1 / (rate or 1)
        seconds.append(seconds[-1] + float(last * tick or mean))
        self.times = [round(t, 4) for t in seconds]
        late = max(float(stamps[0] * tick), 0.0)  # some containers count from 0 all the same
        if not self.damage and late + seconds[-1] < 0.9 * whole:  # others than mp4 just end
            self.damage = f"{seconds[-1]:.1f} of {whole:.1f} s readable"

    def _index(self, container, stream):
        """Learn frames from packets; return their timestamps and how long the last one lasts."""
        packets, vp8 = [], stream.codec_context.name == "vp8"
        for packet in container.demux(stream):
            if packet.size:  # the last one is empty
                # vp8 has hidden frames; other codecs keep theirs in the packets of shown ones
                hidden = packet.is_discard or vp8 and not memoryview(packet)[0] & 16
                packets.append((packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe,
                                hidden, packet.is_corrupt))
        guessed = _one_time(container)
        whole = len(packets) >= _promised(container, stream) and not any(
            pts is None or corrupt or guessed and pts != dts
            for pts, dts, *_, corrupt in packets)
        self.keys = sorted(packet[:2] for packet in packets if whole and packet[3])
        shown = list(itertools.dropwhile(lambda packet: not packet[3], packets))
        ends = {packet[0]: packet[2] for packet in shown if not packet[4]}
        stamps = sorted(ends) if self.keys else []
        # a cut before an open GOP leaves frames before the first key frame, without their sources
        if (not stamps or len(stamps) < sum(not packet[4] for packet in shown)
                or stamps[0] < shown[0][0]):
            raise ValueError("its packets do not tell which frames it has")
        self.pts = stamps
        return stamps, ends[stamps[-1]]

    def _decode(self, container, stream):
        """Learn frames by decoding all; return as _index does, None without timestamps."""
        frames, packets, lost, late = [], 0, 0, 0
        for packet, decoded in _decoded(container, stream):
            lost += decoded is None
            packets += packet.size > 0
            late = 0 if packet.size else len(decoded or ())
            if self.first is None and packet.is_keyframe:
                self.first = packet.pts
            frames += [(frame.pts, frame.is_corrupt, frame.duration) for frame in decoded or ()
                       if None in (frame.pts, self.first) or frame.pts >= self.first]
        sound = [i for i, frame in enumerate(frames) if not frame[1]]
        lost += max(_promised(container, stream) - packets, 0) + len(frames) - len(sound)
        self.damage = f"{len(sound)} of {len(sound) + lost} frames readable" if lost else ""
        if not sound or lost > len(sound):
            raise ValueError(self.damage or "no frame could be decoded")
        self.pts, last = [frames[i][0] for i in sound], frames[sound[-1]][2]
        stamps = {frame[0] for frame in frames}
        if None in stamps or len(stamps) < len(frames):
            return None, 0
        stamps = sorted(stamps)
        if _one_time(container) and late and len(stamps) > 1:  # shown when they are handed out
            step = stamps[-1] - stamps[-2]
            stamps = stamps[late:] + [stamps[-1] + step * (i + 1) for i in range(late)]
        return [stamps[i] for i in sound], last

    def pictures(self, indices: list[int]) -> Iterator[Tensor]:
        """Yield frames in uint8 [3, h, w]; indices must not fall."""
        from av.video.reformatter import VideoReformatter
        with _opened(self.path) as (container, stream):
            key, at, frames = -1, 0, _frames(container, stream, self.first)
            convert = VideoReformatter()
            for n, index in enumerate([0, *indices]):  # the clock's zero has to be there
                wanted = bisect.bisect(self.keys, self.pts[index], key=lambda key: key[0]) - 1
                if wanted > key:
                    key, (pts, dts) = wanted, self.keys[wanted]
                    container.seek(pts if dts is None else dts, stream=stream)
                    at = bisect.bisect_left(self.pts, pts)
                    frames = _frames(container, stream, pts)
                while at <= index:
                    frame = next(frames, None)
                    if frame is None or frame.pts != self.pts[at]:
                        raise ValueError("its frames are not those that its packets promise")
                    at += 1
                if n:
                    yield _picture(frame, stream.sample_aspect_ratio, convert)


@contextmanager
def _opened(path):
    """Open a video file as (container, stream); ValueError says what it is instead."""
    import av  # nothing but decoding needs it
    try:
        container = av.open(path, metadata_errors="ignore")
    except av.FFmpegError as error:
        raise ValueError("it is no video that FFmpeg knows, or its head is damaged or cut off "
                         f"({error.strerror})") from error
    with container:
        if container.format.name in ("concat", "hls", "dash"):
            raise ValueError("it is a list of other files, not a video")
        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            kinds = sorted({other.type for other in container.streams} - {"video"})
            raise ValueError(f"it has no video stream, only {' and '.join(kinds) or 'data'}")
        if stream.codec_context is None:
            raise ValueError("FFmpeg has no decoder for its codec")
        stream.codec_context.thread_count = 1
        yield container, stream


def _one_time(container):
    """Return whether packets have no times but the order of decoding; FFmpeg guesses the others."""
    return "avi" in container.format.name


def _promised(container, stream):
    """Return how many packets an mp4's table names, without those that its edit list cuts off."""
    return len(stream.index_entries) if "mp4" in container.format.name else 0


def _seconds(container, stream):
    """Return how long a container says that its video is, 0 if it does not say.

    An mp4 counts what an edit list hides; the length of several streams may be another's.
    """
    if "mp4" in container.format.name:
        return 0.0
    if said := re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = map(float, said.groups())
        return 3600 * hours + 60 * minutes + seconds
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0


def _frames(container, stream, start=None):
    """Yield sound frames, from the key frame at the timestamp `start` on if one is given.

    Seeking may end before that key frame; and what the decoder shows before it lacks its sources.
    """
    for _, frames in _decoded(container, stream, start):
        for frame in frames or ():
            if not frame.is_corrupt and (None in (start, frame.pts) or frame.pts >= start):
                yield frame


def _decoded(container, stream, start=None):
    """Yield (packet, its frames, None where it cannot be decoded), as far as the file goes.

    Where a container has but one time a packet, frames get these, in the order of decoding.
    """
    import av
    single, waiting = _one_time(container), True
    with suppress(av.FFmpegError):  # the file breaks off
        for packet in container.demux(stream):  # the last is empty: what the decoder still has
            if single or packet.pts is None:
                packet.pts = packet.dts
            waiting = waiting and (not packet.is_keyframe if start is None else packet.pts != start)
            try:
                frames = [] if waiting else packet.decode()
            except av.FFmpegError:
                frames = None
            yield packet, frames


def _picture(frame, aspect, convert):
    """Return a frame as a player shows it: pixels square, upright, what is transparent on white."""
    from PIL import Image
    alpha = any(component.is_alpha for component in frame.format.components)
    pixels_hwc = convert.reformat(frame, max(1, round(frame.width * (aspect or 1))), threads=1,
                                  format="rgba" if alpha else "rgb24").to_ndarray()
    if alpha:
        pixels_hwc = _on_white(Image.fromarray(pixels_hwc))
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            pixels_hwc = _upright(pixels_hwc, np.frombuffer(bytes(data), np.int32))
    return torch.from_numpy(np.ascontiguousarray(pixels_hwc)).permute(2, 0, 1)


def _upright(pixels_hwc, matrix):
    """Turn and mirror as FFmpeg's display matrix says: x' = a x + c y, y' = b x + d y."""
    a, b, c, d = matrix[[0, 1, 3, 4]]
    if abs(b) > abs(a):  # by 90 or 270 degrees
        pixels_hwc, a, d = pixels_hwc.transpose(1, 0, 2), c, b
    return pixels_hwc[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]


def shown_at(times: list[float], t: float) -> int:
    """Return which frame is shown at t seconds; times: as in Video."""
    return max(bisect.bisect(times, t + 1e-4, hi=len(times) - 1) - 1, 0)


def _take(path, choose, change, in_order=False):
    """Return (film, indices, pictures) of a file: those that choose(times) names, in rising order.

    change(picture, first changed one if any) is what becomes of each.
    """
    info = _checked(path)
    ways = [functools.partial(_video, path, info.st_mtime_ns, info.st_size, order)
            for order in (False, True)[in_order:]]
    for way in [functools.partial(Stills, path)] if stat.S_ISDIR(info.st_mode) else ways:
        try:
            film = way()
            indices, taken = choose(film.times), []
            for picture in film.pictures(indices):
                taken.append(change(picture, *taken[:1]))
            return film, indices, taken
        except Exception as error:  # whatever strange files make FFmpeg say; another way may do
            failure = error
    raise failure


def _checked(path):
    """Return what the system says of a file or folder; ValueError for what cannot be one."""
    info = os.stat(path)
    if not (stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode)):
        raise ValueError("it is no file, but a pipe, a socket or a device")
    if not info.st_size:
        raise ValueError("the file is empty")
    return info


@functools.lru_cache(maxsize=16)
def _video(path, mtime, size, in_order):
    """Return the Video, learnt once for all looks of a teacher."""
    return Video(path, in_order)


def decode(path: str, media_type: str, frames: int, max_pixels: int, factor: int,
           span: tuple[float, float] | None = None, decoder: str = "pyav") -> Clip:
    """Decode a file into a Clip of at most `frames` frames and max_pixels each; errors are raised.

    span: the seconds (start, end) to take the frames from; times and indices stay the file's.
    decoder: "pyav", "decord" or "in order" (see Video). decord's pictures are compared with PyAV's;
    where they differ it is a ValueError.
    """
    if media_type == "image":
        _checked(path)
        return still(resize(read_image(path)[None], max_pixels, factor))

    def bounds(times):
        if span and span[0] > times[-1]:
            raise ValueError(f"the span from {span[0]:g} s to {span[1]:g} s lies outside the clip "
                             f"of {times[-1]:g} s")
        return [shown_at(times, t) for t in span] if span else (0, len(times) - 2)

    def choose(times):
        first, last = bounds(times)
        return [first + i for i in frame_indices(last - first + 1, frames)]

    def change(picture_chw, first=None):
        if first is None:
            return resize(picture_chw[None], max_pixels, factor)
        return scale(picture_chw[None], first.shape[-2:])  # also where the size changes half-way

    film, indices, taken = _take(path, choose, change, decoder == "in order")
    (first, last), total = bounds(film.times), len(film.times) - 1
    clip = Clip(torch.cat(taken), tuple(film.times[i] for i in indices), tuple(indices),
                total / film.times[-1], film.times[last + 1], last - first + 1, film.reader,
                film.damage)
    if decoder == "decord" and isinstance(film, Video):
        return replace(clip, frames=_by_decord(path, clip, total), reader="decord")
    return clip


def _by_decord(path, clip, total):
    """Return the clip's frames as decord shows them; ValueError where they are other pictures."""
    import decord
    decord.logging.set_level(decord.logging.QUIET)
    reader, taken = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1), []
    for i in range(0, len(clip.indices), 8):  # 64 frames of a 4K film are 1.6 GB before scaling
        batch_Fhwc = torch.from_numpy(reader.get_batch(clip.indices[i:i + 8]).asnumpy())
        taken.append(scale(batch_Fhwc.permute(0, 3, 1, 2), clip.frames.shape[-2:]))
    frames = torch.cat(taken)
    apart = (frames.float() - clip.frames.float()).abs().mean((1, 2, 3))
    if len(reader) != total or apart.max() > 2:  # of 255; both convert 8-bit colours alike
        raise ValueError(f"decord counts {len(reader)} frames of {total} in it, and shows "
                         f"{int((apart > 2).sum())} of {len(apart)} pictures wrong")
    return frames


def read_image(path: Any) -> Tensor:
    """Return an image as uint8 [3, h, w]: upright, on white, the first of several.

    More than 8 bits are scaled from their range: 65,535 for 16 bits; for 32 bits and floats the
    least of 1 (floats), 255, 65,535 and the largest value that holds them all.
    """
    from PIL import Image, ImageOps
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode[0] in "IF":  # I;16, I (32 bits), F
        values_hw = np.nan_to_num(np.asarray(image, np.float64))
        largest = 65535 if image.mode.startswith("I;16") else values_hw.max()
        white = next(w for w in (1, 255, 65535, largest)[image.mode[0] == "I":] if w >= largest)
        image = Image.fromarray((values_hw / white * 255).clip(0, 255).round().astype(np.uint8))
    return torch.from_numpy(_on_white(image.convert("RGBA"))).permute(2, 0, 1)


def _on_white(image):
    """Return an RGBA image as uint8 [h, w, 3], what is transparent on white."""
    from PIL import Image
    white = Image.new("RGBA", image.size, "white")
    return np.array(Image.alpha_composite(white, image).convert("RGB"))


def still(frames_1chw: Tensor) -> Clip:
    """Return the clip of one image."""
    return Clip(frames_1chw, (0.0,), (0,), 1.0, 0.0, 1, "pillow")


def frame_indices(total: int, frames: int) -> list[int]:
    """Return at most `frames` frame numbers spread evenly over 0..total-1, first and last included.

    Their count is even, as a temporal patch takes two frames, or one, which the processor doubles.
    """
    count = min(frames, total)
    count -= count % 2 if count > 1 else 0
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def fit(height: int, width: int, max_pixels: int, factor: int) -> tuple[int, int]:
    """Return the nearest size whose sides are multiples of `factor`, at most max_pixels in all.

    A picture is not enlarged, but for a side that rounds up. max_pixels must be factor^2 or more.
    """
    h, w = (max(factor, round(side / factor) * factor) for side in (height, width))
    if h * w > max_pixels:
        shrink = factor * max(1, math.sqrt(height * width / max_pixels))
        h, w = (max(factor, int(side / shrink) * factor) for side in (height, width))
        longest = max_pixels // factor**2 * factor  # where the other side is `factor`
        h, w = min(h, longest), min(w, longest)
    return h, w


def resize(frames_Fchw: Tensor, max_pixels: int, factor: int) -> Tensor:
    """Scale to what `fit` gives."""
    return scale(frames_Fchw, fit(*frames_Fchw.shape[-2:], max_pixels, factor))


def scale(frames_Fchw: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale to (h, w): bicubic with antialiasing, in uint8."""
    if size != frames_Fchw.shape[-2:]:
        frames_Fchw = torch.nn.functional.interpolate(
            frames_Fchw, size, mode="bicubic", antialias=True)
    return frames_Fchw.contiguous()


def try_decode(*request: Any) -> tuple[Clip | None, str]:
    """Decode as decode() does: (clip, "") or (None, its error in one line)."""
    try:
        return decode(*request), ""
    except Exception as error:  # whatever strange files make decoders say
        line = (str(error).strip() or "no message").splitlines()[0]  # decord adds a C++ trace ...
        line = re.sub(r"^\[[0-9:]+\] \S+: ", "", line)  # ... and begins with the time of day
        name = "" if type(error) is ValueError else f"{type(error).__name__}: "
        return None, f"{name}{line}"[:300]


# --- frames on disk -------------------------------------------------------------------------------


def pack(clip: Clip) -> bytes:
    """Return a clip as bytes: a checksum of the rest, a line of JSON, the pixels."""
    rest = [getattr(clip, field.name) for field in fields(Clip)[1:]]
    head = json.dumps([clip.frames.shape, *rest]).encode() + b"\n"
    rest = head + clip.frames.numpy().tobytes()
    return zlib.crc32(rest).to_bytes(4) + rest


def unpack(data: bytes) -> Clip:
    """Return the clip that was packed; ValueError where a byte is missing or wrong."""
    checksum, rest = data[:4], bytearray(data[4:])  # torch wants memory that it may write to
    if not rest or zlib.crc32(rest).to_bytes(4) != checksum:
        raise ValueError("the frames are damaged")
    pixels = rest.index(b"\n") + 1
    shape, times, indices, *others = json.loads(rest[:pixels])
    frames = torch.frombuffer(rest, dtype=torch.uint8, offset=pixels).view(shape)
    return Clip(frames, tuple(times), tuple(indices), *others)


class FrameCache:
    """Decoded clips in a folder of at most max_bytes; those used longest ago make room for others.

    Several processes may share the folder: an entry is written aside and renamed. What is being
    written is not counted, so P processes may exceed max_bytes by P - 1 clips for a moment.
    """

    def __init__(self, folder, max_bytes=50e9):
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def key(path: str, *request: Any) -> str:
        """Return an entry's name: another file, mtime, size, request or reader has another."""
        info = os.stat(path)
        parts = [READER, version("av"), path, info.st_mtime_ns, info.st_size, *request]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32] + ".clip"

    def get(self, key: str) -> Clip | None:
        """Return the clip, or None; a damaged entry is none, and the next put replaces it."""
        with suppress(OSError, ValueError), open(self.folder / key, "rb") as file:
            clip = unpack(file.read())
            with suppress(OSError):  # another user's cache can be read
                os.utime(file.fileno())  # from now on the most recently used
            return clip
        return None

    def put(self, key: str, clip: Clip) -> None:
        """Store a clip; a full or read-only disk costs the entry, not the run."""
        data = pack(clip)
        if len(data) > self.max_bytes:
            return
        aside = self.folder / f"{key}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            self._make_room(len(data))
            aside.write_bytes(data)
            os.replace(aside, self.folder / key)
        except OSError as error:
            warnings.warn(f"the frame cache cannot be written: {error}", stacklevel=2)
            with suppress(OSError):
                aside.unlink()

    def _make_room(self, size):
        """Remove what was used longest ago until `size` more bytes fit."""
        entries = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # another process was faster
                info = entry.stat()
                if entry.name.endswith(".clip"):
                    entries.append((info.st_mtime_ns, info.st_size, entry.path))
                elif time.time() - info.st_mtime > 3600:  # left by a process that was killed
                    os.unlink(entry.path)
        excess = sum(entry[1] for entry in entries) + size - self.max_bytes
        for _, entry_size, path in sorted(entries):
            if excess > 0:
                Path(path).unlink(missing_ok=True)
                excess -= entry_size


# --- decoding ahead, in processes that can be killed ----------------------------------------------


class Worker:
    """One decoding process and the pipe to it; started when asked, if it is not running."""

    process = None

    def ask(self, request: tuple, seconds: float) -> tuple[Clip | None, str]:
        """Decode: (clip, "") or (None, reason), within `seconds` once the process runs."""
        if not self.process or self.process.poll() is not None:  # it may have died since
            self._start()
        try:
            self.pipe.send(request)
            if not self.pipe.poll(seconds):
                self.end()
                return None, f"decoding took longer than {seconds:g} s"
            packed, reason = self.pipe.recv()
        except (EOFError, OSError):
            return None, f"the decoding process died, {self.end()}"
        return packed and unpack(packed), reason

    def _start(self):
        self.pipe, theirs = Pipe()
        command = [sys.executable, os.path.abspath(__file__), str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        with suppress(EOFError, OSError):
            if self.pipe.poll(START_SECONDS):
                self.pipe.recv()  # its imports are done
                return
        raise RuntimeError(f"a decoding process did not start, {self.end()}")

    def end(self) -> str:
        """Kill the process if it still runs; return how it ended."""
        self.process.kill()
        code = self.process.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"


class ClipLoader:
    """Decodes samples ahead, in processes that are killed when a file takes longer than time_limit.

    A file that is corrupt, hangs or crashes the decoder costs its sample only; where a process had
    to be killed, the file is read once more, in order, before it is given up. `counts` says what
    became of samples: decoded, cached, failed, and how many of the first two were damaged. With
    workers = 0 decoding happens here, without time limit. The processes end with close(), and by
    themselves when this one is gone, in whatever way.
    """

    def __init__(self, frames, max_pixels, factor, max_image_pixels=MAX_IMAGE_PIXELS, workers=2,
                 time_limit=60.0, cache=None, decoder="pyav"):
        if min(max_pixels, max_image_pixels) < factor**2:
            raise ValueError(f"a limit of pixels is below {factor} x {factor}, one token")
        self.limits = {"video": (frames, max_pixels, factor),
                       "image": (1, max_image_pixels, factor)}
        self.time_limit, self.cache, self.decoder = time_limit, cache, decoder
        self.counts, self.given_up = Counter(), {}
        self.pending, self.jobs = {}, queue.SimpleQueue()
        self.workers = [Worker() for _ in range(workers)]
        self.threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True)
                        for worker in self.workers]  # one for each process, to watch over it
        for thread in self.threads:
            thread.start()

    def submit(self, samples: list) -> None:
        """Say which samples come next; what is decoded stays in memory until get() takes it."""
        for sample in samples:
            if self.workers and sample not in self.pending:
                self.pending[sample] = Future()
                self.jobs.put((sample, self.pending[sample]))

    def get(self, sample: Any) -> tuple[Any, str | None]:
        """Wait for a sample: (sample with its clip, None) or (None, reason)."""
        self.submit([sample])
        future = self.pending.pop(sample, None)
        clip, outcome = future.result() if future else self._load(sample)
        self.counts[outcome if clip else "failed"] += 1
        self.counts["damaged"] += bool(clip and clip.damage)
        return (replace(sample, clip=clip), None) if clip else (None, outcome)

    def _serve(self, worker):
        while job := self.jobs.get():
            sample, future = job
            try:
                future.set_result(self._load(sample, worker))
            except BaseException as error:  # not the file's fault: get() raises it
                future.set_exception(error)
        if worker.process:
            worker.end()

    def _load(self, sample, worker=None):
        """(clip, "cached" or "decoded") or (None, reason)."""
        request = (sample.media, sample.media_type, *self.limits[sample.media_type])
        request += sample.span, self.decoder
        try:
            key = FrameCache.key(*request)
        except OSError as error:
            return None, f"the file cannot be read: {error.strerror}"
        if key in self.given_up:
            return None, self.given_up[key]
        if self.cache and (clip := self.cache.get(key)):
            return clip, "cached"
        clip, reason = worker.ask(request, self.time_limit) if worker else try_decode(*request)
        if worker and worker.process.returncode is not None:  # it had to be killed, or died
            clip, _ = worker.ask((*request[:-1], "in order"), self.time_limit)
            if clip is None:
                self.given_up[key] = reason
        if clip and self.cache:
            self.cache.put(key, clip)
        return clip, reason or "decoded"

    def close(self) -> None:
        """End all processes and threads; what was submitted and not taken is lost."""
        with suppress(queue.Empty):
            while True:
                self.jobs.get_nowait()[1].cancel()
        for _ in self.threads:
            self.jobs.put(None)
        for worker, thread in zip(self.workers, self.threads):
            while thread.is_alive():
                if worker.process:
                    worker.process.kill()  # again and again: it may just be starting
                thread.join(0.1)


def decoding_process(pipe: Connection) -> None:
    """Answer requests until the pipe is closed, which is also how the parent's end shows."""
    import av  # noqa: F401, to fail here rather than at each file
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent

    def answer(*request):
        clip, reason = try_decode(*request)
        pipe.send((clip and pack(clip), reason))

    with suppress(EOFError, OSError):
        pipe.send("ready")
        while True:
            threading.Thread(target=answer, args=pipe.recv(), daemon=True).start()
    os._exit(0)  # also out of a file that hangs


# --- originals, for a teacher's tools -------------------------------------------------------------


def originals(sample: Any, seconds: Any) -> tuple[list[Tensor], list[float]]:
    """Return what is shown at any of the seconds, each frame once and in order, and since when.

    Frames are uint8 [3, h, w] in the file's own size.
    """
    if sample.media_type == "image":
        return [read_image(sample.media)], [0.0]
    in_order = bool(sample.clip) and sample.clip.reader == "pyav in order"
    film, indices, frames = _take(
        sample.media, lambda times: sorted({shown_at(times, t) for t in seconds}),
        lambda picture, *_: picture, in_order)
    return frames, [film.times[i] for i in indices]


def jpeg(image_3hw: Tensor, side: int = 0, pixels: int = MAX_SENT_PIXELS) -> str:
    """Return an image as JPEG in base64: at least `side` long where given, within the limits."""
    from PIL import Image
    h, w = image_3hw.shape[-2:]
    scale = min(max(1.0, side / max(h, w)), math.sqrt(pixels / (h * w)))
    image = Image.fromarray(image_3hw.permute(1, 2, 0).numpy())
    if scale != 1:
        image = image.resize((max(1, int(w * scale)), max(1, int(h * scale))))
    image.save(file := io.BytesIO(), "JPEG", quality=90)
    if len(file.getvalue()) > MAX_SENT_BYTES and pixels > 4096:
        return jpeg(image_3hw, 0, pixels // 2)
    return base64.b64encode(file.getvalue()).decode()


def strip_size(frames_F3hw: Tensor) -> tuple[int, int]:
    """Return width and height in pixels of one frame of the frames' `strip`."""
    F, _, h, w = frames_F3hw.shape
    scale = min(1.0, math.sqrt(STRIP_PIXELS / (h * w)), MAX_JPEG_SIDE / (F * w))
    return max(1, int(w * scale)), max(1, int(h * scale))


def strip(frames_F3hw: Tensor) -> bytes:
    """Return frames side by side as one small JPEG, coarser where it would be too large."""
    from PIL import Image
    (F, _, h, w), (width, height) = frames_F3hw.shape, strip_size(frames_F3hw)
    image = Image.fromarray(frames_F3hw.permute(2, 0, 3, 1).reshape(h, F * w, 3).numpy())
    image = image.resize((F * width, height))
    for quality in (80, 60, 40, 20):
        image.save(file := io.BytesIO(), "JPEG", quality=quality)
        if file.tell() <= F * STRIP_BYTES:
            break
    return file.getvalue()


if __name__ == "__main__":
    decoding_process(Connection(int(sys.argv[1])))
