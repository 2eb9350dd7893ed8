"""Samples, frames and prompts: from Video-R1's rows and media files to the ids a student reads.

    samples = load_samples("train.json", "videos")      every row is checked, none is dropped
    loader = ClipLoader(frames=16, max_pixels=128 * 28 * 28, factor=28, cache=FrameCache("frames"))
    loader.submit(samples[:8])                          they are decoded while the model works
    sample, reason = loader.get(samples[0])             the sample with its clip, or why it has none
    segment = Prompts(processor).prefix(sample)         [system, video, question]: ids and pixels

Prefix, patch, header and completion are tokenised apart and joined as ids, so that all rollouts of
a sample share one prefix. A prompt is never truncated: prompt_bound lets the caller refuse it.
`python data.py FD` is a decoding process, as ClipLoader starts it; it is of no use by hand.

Dimensions: F frames, N patches, M images or videos; image axes: c channels, h height, w width.
"""

import hashlib
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

import numpy as np
import torch
from torch import Tensor

KINDS = ("multiple choice", "numerical", "free-form", "OCR", "regression")
MEDIA_TYPES = {"video": "video", "image": "image", "frame": "video"}  # "frame": 200 in MVBench
MAX_IMAGE_PIXELS = 401_408  # 512 * 28 * 28
SHOWN = 30  # wrong rows or missing files that one message lists


# --- samples --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """Where to look for the answer: seconds, and perhaps a box (x1, y1, x2, y2) in 0..1."""
    start: float
    end: float
    box: tuple[float, float, float, float] | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Clip:
    """What a student sees of a file: frames [F, 3, h, w] in uint8, and their place in it."""
    frames: Tensor
    times: tuple[float, ...]
    indices: tuple[int, ...]
    fps: float
    duration: float
    total_frames: int


@dataclass(frozen=True)
class Sample:
    """One question about one file; ClipLoader fills in `clip`."""
    id: str
    question: str
    options: tuple[str, ...]
    answer: str
    kind: str
    media: str
    media_type: str
    process: str = ""
    evidence: tuple[Evidence, ...] = ()
    source: str = ""
    clip: Clip | None = None
    span: tuple[float, float] | None = None  # seconds of the file that are shown; None: all


def load_samples(path, video_root):
    """Read Video-R1's JSON or JSON lines; one ValueError names all the rows that are wrong.

    video_root: the folder that paths start from, or a JSON file {data_source: folder}, looked up by
    the data_source, its first path component, "" and "default" in turn. A row without problem_id
    goes by its number, counted from 0.
    """
    folders = _folders(Path(video_root))
    samples, problems, row_of = [], [], {}
    for number, row in enumerate(_rows(Path(path))):
        name = row.get("problem_id") if isinstance(row, dict) else None
        name = str(number if name in (None, "") else name)
        try:
            samples.append(_sample(row, name, folders))
            _require(name not in row_of, f"rows {row_of.get(name)} and {number} have the same id")
        except ValueError as error:
            problems.append(f"sample {name}: {error}")
        row_of[name] = number
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ValueError("\n".join(problems[:SHOWN] + more))
    _require(samples, f"{path} holds no samples")
    return samples


def missing_media(samples):
    """The samples whose file does not exist, so that all can be named before a model loads."""
    return [sample for sample in samples if not os.path.exists(sample.media)]


def missing_sentence(missing):
    """One sentence about what missing_media found: how many, and which."""
    names = ", ".join(f"{sample.id} ({sample.media})" for sample in missing[:SHOWN])
    more = ", ..." if len(missing) > SHOWN else ""
    return f"{len(missing)} samples have no media file: {names}{more}"


def _rows(path):
    """The rows of a JSON list, or of JSON lines."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return _parse(text, path)
    lines = enumerate(text.split("\n"), start=1)
    return [_parse(line, f"{path}, line {number},") for number, line in lines if line.strip()]


def _folders(root):
    """The map from data_source to media folder; {"": root} where root is itself the folder."""
    if root.is_dir():
        return {"": root}
    _require(root.is_file(), f"the video root {root} does not exist")
    folders = _parse(root.read_text(encoding="utf-8-sig"), root)
    _require(isinstance(folders, dict) and all(isinstance(v, str) for v in folders.values()),
             f"the video root {root} is neither a folder nor JSON from data_source to folder")
    return {source: root.parent / folder for source, folder in folders.items()}


def _parse(text, where):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _require(condition, sentence):
    if not condition:
        raise ValueError(sentence)


def _numbers(*values):
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)


def _sample(row, name, folders):
    """One row as a Sample; ValueError with what is wrong with it."""
    _require(isinstance(row, dict), f"the row is a {type(row).__name__}, not an object")
    _require(isinstance(row.get("problem_id"), int | str | None), "problem_id is not text or whole")
    for field in ("problem", "problem_type", "data_type", "path"):
        value = row.get(field)
        _require(isinstance(value, str) and value.strip(), f"{field} is missing or not text")
    kind, media_type = row["problem_type"], MEDIA_TYPES.get(row["data_type"])
    _require(kind in KINDS, f"problem_type {kind!r} is none of {', '.join(KINDS)}")
    _require(media_type, f"data_type {row['data_type']!r} is none of {', '.join(MEDIA_TYPES)}")

    solution = row.get("solution")
    _require(type(solution) in (str, int, float), "solution is missing or not text")
    tagged = re.search(r"<answer>(.*?)</answer>", str(solution), re.DOTALL)
    answer = (tagged[1] if tagged else str(solution)).strip()
    _require(answer, "solution holds no answer")
    options = (row.get("options") or []) if kind == "multiple choice" else []
    if kind == "multiple choice":
        _check_options(options, answer)
    elif kind in ("numerical", "regression"):
        number = r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
        _require(re.fullmatch(number, answer.replace(",", "")),
                 f"gold answer {answer!r} is not a number")

    process, evidence = row.get("process") or "", row.get("evidence") or []
    source = row.get("data_source") or ""
    _require(isinstance(process, str), "process is not text")
    _require(isinstance(source, str), "data_source is not text")
    _require(isinstance(evidence, list), "evidence is not a list")
    keys = [key for key in (source, source.split("/")[0], "", "default") if key in folders]
    _require(keys, f"data_source {source!r} is not in the map that the video root gives")
    media = os.path.abspath(folders[keys[0]] / row["path"])
    return Sample(name, row["problem"], tuple(options), answer, kind, media, media_type, process,
                  tuple(map(_evidence, evidence)), source)


def _check_options(options, answer):
    """Options are written "A. red" or "(A) red"; the gold answer is the letter of one of them."""
    _require(options, "a multiple choice question needs options")
    _require(isinstance(options, list) and all(isinstance(option, str) for option in options),
             "options is not a list of texts")
    found = [re.match(r"\s*\(?([A-Z])([.):]|\s*$)", option) for option in options]
    _require(all(found), "an option does not begin with its letter, as in 'A. red'")
    letters = [match[1] for match in found]
    _require(len(set(letters)) == len(letters), f"two options share a letter: {' '.join(letters)}")
    gold = re.match(r"\(?([A-Z])(?![A-Za-z])", answer)
    _require(gold and gold[1] in letters, f"gold answer {answer!r} is none of {' '.join(letters)}")


def _evidence(item):
    """One annotation {"start", "end", "box"?, "note"?}."""
    _require(isinstance(item, dict), f"evidence {item!r} is not an object")
    start, end, box, note = (item.get(field) for field in ("start", "end", "box", "note"))
    _require(_numbers(start, end) and 0 <= start <= end,
             f"evidence from {start!r} to {end!r} is not a span of seconds")
    _require(box is None or isinstance(box, list) and len(box) == 4 and _numbers(*box)
             and 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1,
             f"evidence box {box!r} is not [x1, y1, x2, y2] between 0 and 1")
    _require(isinstance(note, str | None), f"evidence note {note!r} is not text")
    return Evidence(float(start), float(end), tuple(map(float, box)) if box else None, note or "")


# --- decoding one file ----------------------------------------------------------------------------


class Stills:
    """A folder of numbered pictures, 3 a second (MVBench's TVQA), read as decord reads a video."""

    def __init__(self, folder):
        self.paths = sorted(Path(folder).glob("*.jpg"))
        _require(self.paths, "the folder holds no .jpg")

    def __len__(self):
        return len(self.paths)

    def get_avg_fps(self):
        return 3.0

    def get_batch(self, indices):
        from PIL import Image
        return torch.stack([torch.from_numpy(np.array(Image.open(self.paths[i]).convert("RGB")))
                            for i in indices])

    def get_frame_timestamp(self, indices):
        return np.array([(i / 3, (i + 1) / 3) for i in indices])


def decode(path, media_type, frames, max_pixels, factor, span=None):
    """Decode a file into a Clip of at most `frames` frames and max_pixels each; errors are raised.

    Times count from the first frame: the file's timestamps, or index / fps where it has none (avi).
    span: the seconds (start, end) to take the frames from; times and indices stay the file's.
    """
    info = os.stat(path)
    _require(info.st_size or not stat.S_ISREG(info.st_mode), "the file is empty")
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
        _require(timed, "the file has neither a frame rate nor timestamps")
        fps = total / float(duration)
    if not timed:
        times, duration = np.array(indices) / fps, (last + 1) / fps
    times = tuple(times.round(4).tolist())  # they were single precision
    return Clip(torch.cat(parts), times, tuple(indices), fps, round(float(duration), 4), total)


def _decode_image(path, max_pixels, factor):
    """An image as a clip of one frame: upright, what is transparent on white."""
    from PIL import Image, ImageOps
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    frame_chw = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return _still(resize(frame_chw[None], max_pixels, factor))


def _still(frames_1chw):
    return Clip(frames_1chw, (0.0,), (0,), 1.0, 0.0, 1)


def frame_indices(total, frames):
    """At most `frames` frame numbers spread evenly over 0..total-1, first and last included.

    Their count is even, as a temporal patch takes two frames, or one, which the processor doubles.
    """
    count = min(frames, total)
    count -= count % 2 if count > 1 else 0
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def fit(height, width, max_pixels, factor):
    """The nearest size with sides that are multiples of `factor` and at most max_pixels in all.

    A picture is not enlarged, but for a side that rounds up. max_pixels must be factor^2 or more.
    """
    h, w = (max(factor, round(side / factor) * factor) for side in (height, width))
    if h * w > max_pixels:
        shrink = factor * max(1, math.sqrt(height * width / max_pixels))
        h, w = (max(factor, int(side / shrink) * factor) for side in (height, width))
        longest = max_pixels // factor**2 * factor  # where the other side is `factor`
        h, w = min(h, longest), min(w, longest)
    return h, w


def resize(frames_Fchw, max_pixels, factor):
    """Bicubic with antialiasing, in uint8, to the size that `fit` gives."""
    size = fit(*frames_Fchw.shape[-2:], max_pixels, factor)
    if size != frames_Fchw.shape[-2:]:
        frames_Fchw = torch.nn.functional.interpolate(
            frames_Fchw, size, mode="bicubic", antialias=True)
    return frames_Fchw.contiguous()


def try_decode(*request):
    """decode() with its errors in one line: (clip, "") or (None, reason)."""
    try:
        return decode(*request), ""
    except Exception as error:  # whatever strange files make decoders say
        line = (str(error).strip() or "no message").splitlines()[0]  # decord adds a C++ trace ...
        line = re.sub(r"^\[[0-9:]+\] \S+: ", "", line)  # ... and begins with the time of day
        return None, f"{type(error).__name__}: {line}"[:300]


# --- frames on disk -------------------------------------------------------------------------------


def pack(clip):
    """A clip as bytes: a checksum of the rest, a line of JSON, the pixels."""
    numbers = clip.times, clip.indices, clip.fps, clip.duration, clip.total_frames
    head = json.dumps([clip.frames.shape, *numbers]).encode() + b"\n"
    rest = head + clip.frames.numpy().tobytes()
    return zlib.crc32(rest).to_bytes(4) + rest


def unpack(data):
    """The clip that was packed; ValueError where a byte is missing or wrong."""
    checksum, rest = data[:4], bytearray(data[4:])  # torch wants memory that it may write to
    _require(rest and zlib.crc32(rest).to_bytes(4) == checksum, "the frames are damaged")
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
    def key(path, *request):
        """An entry's name; a file with another mtime or size has another entry."""
        info = os.stat(path)
        parts = [path, info.st_mtime_ns, info.st_size, *request]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32] + ".clip"

    def get(self, key):
        """The clip, or None; a damaged entry is none, and the next put replaces it."""
        with suppress(OSError, ValueError), open(self.folder / key, "rb") as file:
            clip = unpack(file.read())
            os.utime(file.fileno())  # from now on the most recently used
            return clip
        return None

    def put(self, key, clip):
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
            warnings.warn(f"the frame cache cannot be written: {error}")
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

    def ask(self, request, seconds):
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

    def end(self):
        """Kill the process if it still runs; says how it ended."""
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
        _require(min(max_pixels, max_image_pixels) >= factor**2,
                 f"a limit of pixels is below {factor} x {factor}, one token")
        self.limits = {"video": (frames, max_pixels, factor),
                       "image": (1, max_image_pixels, factor)}
        self.time_limit, self.cache, self.counts = time_limit, cache, Counter()
        self.pending, self.jobs = {}, queue.SimpleQueue()
        self.workers = [Worker() for _ in range(workers)]
        self.threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True)
                        for worker in self.workers]  # one for each process, to watch over it
        for thread in self.threads:
            thread.start()

    def submit(self, samples):
        """Say which samples come next; what is decoded stays in memory until get() takes it."""
        for sample in samples:
            if self.workers and sample not in self.pending:
                self.pending[sample] = Future()
                self.jobs.put((sample, self.pending[sample]))

    def get(self, sample):
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

    def close(self):
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


def decoding_process(pipe):
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


def record_bad(path, sample, reason):
    """Append {"id", "media", "reason"} as a line of JSON; several processes may do so at once."""
    line = json.dumps({"id": sample.id, "media": sample.media, "reason": reason}) + "\n"
    with open(path, "ab", buffering=0) as file:
        file.write(line.encode())


# --- prompts --------------------------------------------------------------------------------------

TEMPLATE = """{question}

Work it out step by step from what is shown: what happens, when, where, and what follows from it. \
Write this reasoning between <think> and </think>, then the final answer between <answer> and \
</answer>. {answer_format}"""

ANSWER_FORMATS = {
    "multiple choice": "The final answer is the letter of one option, as in <answer>B</answer>.",
    "numerical": "The final answer is just a number, as in <answer>4.5</answer>.",
    "regression": "The final answer is just a number, as in <answer>4.5</answer>.",
    "OCR": "The final answer is the text that is shown, transcribed exactly.",
    "free-form": "The final answer is a short text.",
}

END = "[[end of the user's text]]"  # where the rendered chat is split into prefix and header
TIMESTAMP_TOKENS = 24  # more than Qwen3-VL's "<1234.5 seconds>" and tags for each temporal patch


@dataclass
class Segment:
    """A run of token ids with the pixels that its placeholders stand for.

    ids [n]; pixels [N, patch width] or None, in order of appearance; grids [M, 3]: patches t, h, w;
    seconds_per_grid [M]: seconds from one temporal patch to the next; 0 for an image, and for
    Qwen3-VL, which reads the time in the text.
    """
    ids: Tensor
    pixels: Tensor | None
    grids: Tensor
    seconds_per_grid: Tensor


class Prompts:
    """Samples and texts as Segments, by the checkpoint's own processor and chat template.

    template: the user's text with {question} and, if wanted, {answer_format}.
    header: what the chat template writes between the user's text and the completion.
    """

    def __init__(self, processor, template=None):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.template = template or TEMPLATE
        _require("{question}" in self.template, "the template has no {question}")
        video = processor.video_processor
        self.factor, self.merge = video.patch_size * video.merge_size, video.merge_size
        self.temporal = video.temporal_patch_size
        added = self.tokenizer.added_tokens_decoder.values()
        special = {processor.image_token, processor.video_token, *self.tokenizer.all_special_tokens}
        special |= {token.content for token in added if token.special}
        longest_first = sorted(special, reverse=True)  # of those that begin alike
        self.special = re.compile("|".join(map(re.escape, longest_first)))
        self.header_text = self._render([])[1]
        self.header = self._plain(self.header_text)
        # how the chat shows an image: what stands between two texts with an image between them
        shown = self._render([{"type": "text", "text": END}, {"type": "image"}])[0]
        self.image_text = shown.partition(END)[2]

    def clean(self, text):
        """The text without special tokens, also those that only taking out others would make."""
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair has no ids
        while (cleaned := self.special.sub("", text)) != text:
            text = cleaned
        return text

    def prefix(self, sample):
        """[system, video or image, question], up to the end of the user's text."""
        try:
            return self._seen(self._prefix_text(sample), sample.media_type, [sample.clip])
        except ValueError as error:
            raise ValueError(f"sample {sample.id}: {error}") from error

    def prompt_bound(self, sample, frames, max_pixels, max_image_pixels=MAX_IMAGE_PIXELS):
        """The most tokens that a sample's prefix can have, known without its file."""
        text = len(self._plain(self._prefix_text(sample)).ids)
        if sample.media_type == "image":
            return text + max_image_pixels // self.factor**2
        tokens = max_pixels // self.factor**2 + TIMESTAMP_TOKENS
        return text + math.ceil(frames / self.temporal) * tokens

    def patch(self, text, images=()):
        """A text, then uint8 images [3, h, w] of any size, to stand between prefix and header."""
        if not len(images):
            return self._plain(self.clean(text))
        clips = [_still(resize(image[None], MAX_IMAGE_PIXELS, self.factor)) for image in images]
        return self._seen(self.clean(text) + self.image_text * len(clips), "image", clips)

    def suffix(self, text, images=()):
        """A text and images, then the header: what stands between question and completion."""
        segment = self.patch(text, images)
        return replace(segment, ids=torch.cat([segment.ids, self.header.ids]))

    def completion(self, text):
        """The ids of a text and EOS."""
        eos = torch.tensor([self.tokenizer.eos_token_id])
        return torch.cat([self._plain(self.clean(text)).ids, eos])

    def text(self, ids):
        """Ids as text, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _prefix_text(self, sample):
        """The chat up to the end of the user's text, one placeholder for the video or image."""
        options = ["Options:", *sample.options] if sample.options else []
        text = self.template.replace("{answer_format}", ANSWER_FORMATS[sample.kind])
        text = self.clean(text.replace("{question}", "\n".join([sample.question, *options])))
        before, after = self._render([{"type": sample.media_type}, {"type": "text", "text": text}])
        assert after == self.header_text, f"sample {sample.id}: the chat template wrote {after!r}"
        if start := getattr(self.processor, "vision_start_token", None):
            # Qwen3-VL's processor tags each temporal patch. The one released with the checkpoints
            # put these in place of the template's own tags; transformers 5 keeps both.
            video, end = self.processor.video_token, self.processor.vision_end_token
            before = before.replace(f"{start}{video}{end}", video)
        return before

    def _render(self, content):
        """The chat before and after the end of a user message with this content."""
        message = {"role": "user", "content": [*content, {"type": "text", "text": END}]}
        chat = self.processor.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=False)
        before, end, after = chat.rpartition(END)
        _require(end, "the chat template does not show the user's text")
        return before, after

    def _plain(self, text):
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        return Segment(ids.long(), None, torch.zeros(0, 3, dtype=torch.long), torch.zeros(0))

    def _seen(self, text, media_type, clips):
        """A text with a placeholder for each clip, all images or all videos, of final size."""
        options = {"do_resize": False, "input_data_format": "channels_first"}
        if media_type == "image":
            media = {"images": [clip.frames[0] for clip in clips], "images_kwargs": options}
            names, token = ("pixel_values", "image_grid_thw"), self.processor.image_token_id
        else:
            metadata = [{"fps": clip.fps, "duration": clip.duration,
                         "total_num_frames": clip.total_frames,
                         "frames_indices": list(clip.indices)} for clip in clips]
            options |= {"do_sample_frames": False, "video_metadata": metadata}
            if hasattr(self.processor.video_processor, "cap_pixels_per_frame"):
                options["cap_pixels_per_frame"] = False  # it would warn of sizes that are ours
            media = {"videos": [clip.frames for clip in clips], "videos_kwargs": options}
            names, token = ("pixel_values_videos", "video_grid_thw"), self.processor.video_token_id
        out = self.processor(text=[text], return_tensors="pt", **media)
        ids, pixels, grids = out["input_ids"][0], *(out[name] for name in names)
        placeholders, patches = int((ids == token).sum()), int(grids.prod(dim=1).sum())
        _require(placeholders * self.merge**2 == patches,
                 f"{placeholders} placeholders stand for {patches} patches")
        seconds = torch.as_tensor(out.get("second_per_grid_ts", [0.0] * len(clips)))
        return Segment(ids, pixels, grids, seconds.float())


if __name__ == "__main__":
    decoding_process(Connection(int(sys.argv[1])))
