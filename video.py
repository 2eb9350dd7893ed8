"""Files to frames: reading, timestamps, a cache on disk, and worker processes that can be killed.

    clip = decode("a.mp4", "video", 16, 128 * 28 * 28, 28)    frames that a student sees, and when
    loader = ClipLoader(16, 128 * 28 * 28, 28, cache=FrameCache("frames"))
    loader.submit(samples[:8])                  they are decoded while the model works
    sample, reason = loader.get(samples[0])     the sample with its clip, or why it has none
    frames, times = originals(sample, seconds=[3.5])    what a teacher's tools look at

A sample is whatever has media, media_type, span and clip (data.py). `python video.py FD` is a
decoding process, as ClipLoader starts it; it is of no use by hand.

Dimensions: F frames; image axes: c channels, h height, w width.
"""

import base64
import bisect
import functools
import hashlib
import io
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
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_IMAGE_PIXELS = 401_408  # 512 * 28 * 28
MAX_SENT_PIXELS, MAX_SENT_BYTES = 1024 * 1024, 1_000_000  # of a JPEG; APIs shrink larger images


@dataclass(frozen=True, eq=False)
class Clip:
    """What a student sees of a file: frames [F, 3, h, w] in uint8, and their place in it."""
    frames: Tensor
    times: tuple[float, ...]
    indices: tuple[int, ...]
    fps: float
    duration: float
    total_frames: int


# --- decoding one file ----------------------------------------------------------------------------


class Stills:
    """A folder of numbered pictures, 3 a second (MVBench's TVQA), read as decord reads a video."""

    def __init__(self, folder):
        self.paths = sorted(Path(folder).glob("*.jpg"))
        if not self.paths:
            raise ValueError("the folder holds no .jpg")

    def __len__(self):
        return len(self.paths)

    def get_avg_fps(self) -> float:
        """Return MVBench's frame rate."""
        return 3.0

    def get_batch(self, indices: list[int]) -> Tensor:
        """Return pictures as uint8 [F, h, w, c]."""
        from PIL import Image
        return torch.stack([torch.from_numpy(np.array(Image.open(self.paths[i]).convert("RGB")))
                            for i in indices])

    def get_frame_timestamp(self, indices: list[int]) -> np.ndarray:
        """Return when pictures start and end, in seconds [F, 2]."""
        return np.array([(i / 3, (i + 1) / 3) for i in indices])


def decode(path: str, media_type: str, frames: int, max_pixels: int, factor: int,
           span: tuple[float, float] | None = None) -> Clip:
    """Decode a file into a Clip of at most `frames` frames and max_pixels each; errors are raised.

    Times count from the first frame: the file's timestamps, or index / fps where it has none (avi).
    span: the seconds (start, end) to take the frames from; times and indices stay the file's.
    """
    info = os.stat(path)
    if stat.S_ISREG(info.st_mode) and not info.st_size:
        raise ValueError("the file is empty")
    if media_type == "image":
        return _decode_image(path, max_pixels, factor)
    if os.path.isdir(path):
        reader = Stills(path)
    else:
        import decord  # nothing but decoding needs it
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
    total, fps = len(reader), float(reader.get_avg_fps())
    first, last = (min(round(t * fps), total - 1) for t in span) if span else (0, total - 1)
    total = last - first + 1
    indices = [first + i for i in frame_indices(total, frames)]
    parts = []
    for i in range(0, len(indices), 8):  # 64 frames of a 4K film are 1.6 GB before resizing
        batch = reader.get_batch(indices[i:i + 8])
        frames_Fhwc = batch if torch.is_tensor(batch) else torch.from_numpy(batch.asnumpy())
        parts.append(resize(frames_Fhwc.permute(0, 3, 1, 2), max_pixels, factor))
    spans = reader.get_frame_timestamp([*indices, last]).astype(float)  # rows of start, end
    times, duration = spans[:-1, 0], spans[-1, 1]  # counted from the first frame
    timed = duration > times[-1] and (np.diff(times) > 0).all()
    if not 0 < fps < math.inf:
        if not timed:
            raise ValueError("the file has neither a frame rate nor timestamps")
        fps = total / float(duration)
    if not timed:
        times, duration = np.array(indices) / fps, (last + 1) / fps
    times = tuple(times.round(4).tolist())  # they were single precision
    return Clip(torch.cat(parts), times, tuple(indices), fps, round(float(duration), 4), total)


def _decode_image(path, max_pixels, factor):
    """Return an image as a clip of one frame: upright, what is transparent on white."""
    from PIL import Image, ImageOps
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    frame_chw = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return still(resize(frame_chw[None], max_pixels, factor))


def still(frames_1chw: Tensor) -> Clip:
    """Return the clip of one image."""
    return Clip(frames_1chw, (0.0,), (0,), 1.0, 0.0, 1)


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
    """Resize to what `fit` gives: bicubic with antialiasing, in uint8."""
    size = fit(*frames_Fchw.shape[-2:], max_pixels, factor)
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
        return None, f"{type(error).__name__}: {line}"[:300]


# --- frames on disk -------------------------------------------------------------------------------


def pack(clip: Clip) -> bytes:
    """Return a clip as bytes: a checksum of the rest, a line of JSON, the pixels."""
    numbers = clip.times, clip.indices, clip.fps, clip.duration, clip.total_frames
    head = json.dumps([clip.frames.shape, *numbers]).encode() + b"\n"
    rest = head + clip.frames.numpy().tobytes()
    return zlib.crc32(rest).to_bytes(4) + rest


def unpack(data: bytes) -> Clip:
    """Return the clip that was packed; ValueError where a byte is missing or wrong."""
    checksum, rest = data[:4], bytearray(data[4:])  # torch wants memory that it may write to
    if not rest or zlib.crc32(rest).to_bytes(4) != checksum:
        raise ValueError("the frames are damaged")
    pixels = rest.index(b"\n") + 1
    shape, times, indices, *numbers = json.loads(rest[:pixels])
    frames = torch.frombuffer(rest, dtype=torch.uint8, offset=pixels).view(shape)
    return Clip(frames, tuple(times), tuple(indices), *numbers)


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
        """Return an entry's name; a file with another mtime or size has another entry."""
        info = os.stat(path)
        parts = [path, info.st_mtime_ns, info.st_size, *request]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32] + ".clip"

    def get(self, key: str) -> Clip | None:
        """Return the clip, or None; a damaged entry is none, and the next put replaces it."""
        with suppress(OSError, ValueError), open(self.folder / key, "rb") as file:
            clip = unpack(file.read())
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
            aside.unlink(missing_ok=True)

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
        try:
            self.pipe.recv()  # its imports are done
        except (EOFError, OSError):
            raise RuntimeError(f"a decoding process did not start, {self.end()}") from None

    def end(self) -> str:
        """Kill the process if it still runs; return how it ended."""
        self.process.kill()
        code = self.process.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"


class ClipLoader:
    """Decodes samples ahead, in processes that are killed when a file takes longer than time_limit.

    A file that is corrupt, hangs or crashes the decoder costs its sample only. `counts` says what
    became of samples: decoded, cached, failed. With workers = 0 decoding happens here, without time
    limit. The processes end with close(), and by themselves when this one is gone, in whatever way.
    """

    def __init__(self, frames, max_pixels, factor, max_image_pixels=MAX_IMAGE_PIXELS, workers=2,
                 time_limit=60.0, cache=None):
        if min(max_pixels, max_image_pixels) < factor**2:
            raise ValueError(f"a limit of pixels is below {factor} x {factor}, one token")
        self.limits = {"video": (frames, max_pixels, factor),
                       "image": (1, max_image_pixels, factor)}
        self.time_limit, self.cache, self.counts = time_limit, cache, Counter()
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
        request += (sample.span,) if sample.span else ()
        try:
            key = FrameCache.key(*request)
        except OSError as error:
            return None, f"the file cannot be read: {error.strerror}"
        if self.cache and (clip := self.cache.get(key)):
            return clip, "cached"
        clip, reason = worker.ask(request, self.time_limit) if worker else try_decode(*request)
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
    import decord
    decord.logging.set_level(decord.logging.QUIET)
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

_READING = threading.Lock()  # decord's readers are not thread-safe


@functools.lru_cache(maxsize=4)
def _reader(path: str):
    import decord
    return decord.VideoReader(path, num_threads=1)


def originals(sample: Any, indices: list[int] | None = None,
              seconds: Any = None) -> tuple[list, list[float]]:
    """Return frames of the original file as uint8 [3, h, w], by number or time, and their times."""
    if sample.media_type == "image":
        from PIL import Image, ImageOps
        with Image.open(sample.media) as file:
            image = np.array(ImageOps.exif_transpose(file).convert("RGB"))
        return [torch.from_numpy(image).permute(2, 0, 1)], [0.0]
    if not _READING.acquire(timeout=20):
        raise ValueError("the video cannot be read now; submit without further looks")
    try:
        reader = _reader(sample.media)
        starts = [float(start) for start, _ in reader.get_frame_timestamp(range(len(reader)))]
        if indices is None:
            indices = [max(bisect.bisect_right(starts, t) - 1, 0) for t in seconds]
        frames = torch.from_numpy(reader.get_batch(indices).asnumpy()).permute(0, 3, 1, 2)
    finally:
        _READING.release()
    return list(frames), [starts[i] for i in indices]


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


if __name__ == "__main__":
    decoding_process(Connection(int(sys.argv[1])))
