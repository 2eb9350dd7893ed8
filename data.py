"""Samples and prompts: from Video-R1's rows to the ids that a student reads.

    samples = load_samples(read_rows("train.json"), {"": "videos"})    every row is checked
    segment = Prompts(processor).prefix(sample)    [system, video, question]: ids and pixels

Prefix, patch, header and completion are tokenised apart and joined as ids, so that all rollouts of
a sample share one prefix. A prompt is never truncated: prompt_bound lets the caller refuse it.
video.py reads the files.

Dimensions: N patches, M images or videos; image axes: h height, w width.
"""

import difflib
import math
import os
import re
import reprlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch
from torch import Tensor

from video import MAX_IMAGE_PIXELS, Clip, resize, still

KINDS = ("multiple choice", "numerical", "free-form", "OCR", "regression")
MEDIA_TYPES = {"video": "video", "image": "image", "frame": "video"}  # "frame": 200 in MVBench
FIELDS = ("problem", "problem_type", "data_type", "path")  # texts that every row has
OPTIONAL = ("problem_id", "options", "data_source", "process", "evidence")  # read where it is
SHOWN = 30  # wrong rows or missing files that one message lists


# --- samples --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """Where to look for the answer: seconds, and perhaps a box (x1, y1, x2, y2) in 0..1."""
    start: float
    end: float
    box: tuple[float, float, float, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """One question about one file, or, of media_type "", without; ClipLoader fills in `clip`."""
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


def load_samples(rows: list, folders: dict[str, Path], prefix: str = "") -> list[Sample]:
    """Read rows in Video-R1's format; one ValueError names all the rows that are wrong.

    folders: where the media of a data_source lie, looked up by the data_source, its first path
    component, "" and "default" in turn. A row without problem_id goes by its number, from 0.
    prefix: what ids begin with, so that those of several files differ.
    """
    samples, problems, row_of = [], [], {}
    _require_rows(rows)
    named = {key for row in rows if isinstance(row, dict) for key in row}
    for name in {*OPTIONAL} - named:
        for near in difflib.get_close_matches(name, named - {*FIELDS, *OPTIONAL}, 1, 0.9):
            first = next(n for n, row in enumerate(rows) if isinstance(row, dict) and near in row)
            raise ValueError(f"sample {prefix}{_name(rows[first], first)}: {near!r} is read by "
                             f"nothing, and no row has {name!r}: rename or remove it")
    for number, row in enumerate(rows):
        name = prefix + _name(row, number)
        try:
            samples.append(_sample(row, name, folders))
            _require(name not in row_of, f"rows {row_of.get(name)} and {number} have the same id")
        except ValueError as error:
            problems.append(f"sample {name}: {error}")
        row_of[name] = number
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ValueError("\n".join(problems[:SHOWN] + more))
    return samples


def missing_media(samples: list[Sample]) -> list[Sample]:
    """Return the samples whose file does not exist, so that all are named before a model loads."""
    return [sample for sample in samples if not os.path.exists(sample.media)]


def missing_sentence(missing: list[Sample]) -> str:
    """Return one sentence about what missing_media found: how many, and which."""
    names = ", ".join(f"{sample.id} ({sample.media})" for sample in missing[:SHOWN])
    more = ", ..." if len(missing) > SHOWN else ""
    return f"{len(missing)} samples have no media file: {names}{more}"


def _require(condition, sentence):
    if not condition:
        raise ValueError(sentence)


def _require_rows(rows):
    """Refuse a file that is one object with the list of rows in it, {"data": [...]}."""
    row = rows[0] if len(rows) == 1 else None
    if isinstance(row, dict) and not row.keys() & set(FIELDS):
        lists = [key for key, value in row.items()
                 if isinstance(value, list) and not any(isinstance(item, str) for item in value)]
        _require(not lists, "the file is not a list of rows but one object, which holds a list "
                 f"under {', '.join(map(reprlib.repr, lists[:5]))}: save that list alone")


def _name(row, number):
    """Return what a row goes by: its problem_id, or its number where it has none."""
    given = row.get("problem_id") if isinstance(row, dict) else None
    if given is None or given == "":
        return str(number)
    # reprlib's texts are short, however long or deeply nested the value is
    return str(given) if isinstance(given, str) or _numbers(given) else reprlib.repr(given)


def _numbers(*values):
    """Return whether all are numbers that a float can hold, neither infinite nor NaN."""
    return all(type(value) in (int, float) and abs(value) <= sys.float_info.max for value in values)


def _sample(row, name, folders):
    """Return one row as a Sample; ValueError with what is wrong with it."""
    _require(isinstance(row, dict), f"the row is a {type(row).__name__}, not an object")
    id = row.get("problem_id")
    _require(isinstance(id, str | None) or type(id) is int and _numbers(id),
             "problem_id is not text or a whole number of up to 308 digits")
    _require(not re.search("[\ud800-\udfff]", name), "problem_id holds half a surrogate pair")
    for field in FIELDS:
        value = row.get(field)
        _require(isinstance(value, str) and value.strip(), f"{field} is missing or not text")
    kind, media_type = row["problem_type"], MEDIA_TYPES.get(row["data_type"])
    _require(kind in KINDS, f"problem_type {kind[:80]!r} is none of {', '.join(KINDS)}")
    _require(media_type,
             f"data_type {row['data_type'][:80]!r} is none of {', '.join(MEDIA_TYPES)}")

    options = (row.get("options") or []) if kind == "multiple choice" else []
    answer = _answer(row.get("solution"), kind, options)
    process, evidence = row.get("process") or "", row.get("evidence") or []
    source = row.get("data_source") or ""
    _require(isinstance(process, str), "process is not text")
    _require(isinstance(source, str), "data_source is not text")
    _require(isinstance(evidence, list), "evidence is not a list")
    keys = [key for key in (source, source.split("/")[0], "", "default") if key in folders]
    _require(keys, f"data_source {source[:80]!r} is not in the map that the video root gives")
    media = os.path.abspath(folders[keys[0]] / row["path"])
    return Sample(name, row["problem"], tuple(options), answer, kind, media, media_type, process,
                  tuple(map(_evidence, evidence)), source)


def _answer(solution, kind, options):
    """Return the gold answer in a solution, checked."""
    _require(isinstance(solution, str) or _numbers(solution),
             "solution is missing, or is not text or a finite number")
    tagged = re.search(r"<answer>(.*?)</answer>", str(solution), re.DOTALL)
    answer = (tagged[1] if tagged else str(solution)).strip()
    _require(answer, "solution holds no answer")
    if kind == "multiple choice":
        _check_options(options, answer)
    elif kind in ("numerical", "regression"):
        number, bare = r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", answer.replace(",", "")
        _require(re.fullmatch(number, bare) and math.isfinite(float(bare)),
                 f"gold answer {answer[:80]!r} is not a finite number")
    return answer


def _check_options(options, answer):
    """See that options are labelled A, B, C ... in order and the gold answer is one's letter."""
    _require(options, "a multiple choice question needs options")
    _require(isinstance(options, list) and all(isinstance(option, str) for option in options),
             "options is not a list of texts")
    found = [re.match(r"\s*\(?([A-Z])([.):]|\s*$)", option) for option in options]
    _require(all(found), "an option does not begin with its letter, as in 'A. red'")
    letters = "".join(match[1] for match in found)
    _require(letters == ascii_uppercase[:len(options)],
             f"options are labelled {' '.join(letters[:40])}, not A, B, C ... in order")
    gold = re.match(r"\(?([A-Z])(?![A-Za-z])", answer)
    _require(gold and gold[1] in letters,
             f"gold answer {answer[:80]!r} is none of {' '.join(letters)}")


def _evidence(item):
    """Return one annotation {"start", "end", "box"?, "note"?} as Evidence."""
    _require(isinstance(item, dict), f"evidence {reprlib.repr(item)} is not an object")
    for key in item.keys() - {"start", "end", "box", "note"}:
        raise ValueError(f"evidence has {reprlib.repr(key)}, which nothing reads")
    start, end, box, note = (item.get(field) for field in ("start", "end", "box", "note"))
    _require(_numbers(start, end) and 0 <= start <= end,
             f"evidence from {reprlib.repr(start)} to {reprlib.repr(end)} is not a span of seconds")
    _require(box is None or isinstance(box, list) and len(box) == 4 and _numbers(*box)
             and 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1,
             f"evidence box {reprlib.repr(box)} is not [x1, y1, x2, y2] between 0 and 1")
    _require(isinstance(note, str | None), f"evidence note {reprlib.repr(note)} is not text")
    return Evidence(float(start), float(end), tuple(map(float, box)) if box else None, note or "")


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
    seconds_per_grid [M]: seconds from one temporal patch to the next; 0 for an image, and where
    the time stands in the text (Qwen3-VL's and later processors).
    """
    ids: Tensor
    pixels: Tensor | None
    grids: Tensor
    seconds_per_grid: Tensor


class Prompts:
    """Samples and texts as Segments, by the checkpoint's own processor and chat template.

    template: the user's text with {question} and, if wanted, {answer_format}.
    thinking: what a chat template is told that can be told, Qwen3.5's: others need not listen.
    header: what the chat template writes between the user's text and the completion.
    opened: the header's end that begins the response: <think> of a checkpoint that thinks.
    """

    def __init__(self, processor, template=None, thinking=True):
        self.processor, self.tokenizer, self.thinking = processor, processor.tokenizer, thinking
        self.template, self.chat = template or TEMPLATE, str(processor.chat_template)
        _require("{question}" in self.template, "the template has no {question}")
        video = processor.video_processor
        self.factor, self.merge = video.patch_size * video.merge_size, video.merge_size
        self.temporal = video.temporal_patch_size
        added = self.tokenizer.added_tokens_decoder.values()
        special = {processor.image_token, processor.video_token, *self.tokenizer.all_special_tokens}
        special |= {token.content for token in added if token.special}
        longest_first = sorted(special, reverse=True)  # of those that begin alike
        self.special = re.compile("|".join(map(re.escape, longest_first)))
        lost = self.special.findall("<think></think><answer></answer>")
        _require(not lost, f"the tokenizer has {lost} as special tokens, never sampled nor read")
        self.header_text = self._render([])[1]
        opened = self.header_text.partition("assistant\n")[2].lstrip()
        self.opened = "" if "</think>" in opened else opened  # a thought cut off before it began
        self.header = self._plain(self.header_text)
        # how the chat shows an image: what stands between two texts with an image between them
        shown = self._render([{"type": "text", "text": END}, {"type": "image"}])[0]
        self.image_text = shown.partition(END)[2]

    def clean(self, text: str) -> str:
        """Return the text without special tokens, also those that taking out others would make."""
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair has no ids
        while (cleaned := self.special.sub("", text)) != text:
            text = cleaned
        return text

    def prefix(self, sample: Sample) -> Segment:
        """Return [system, video or image, question], up to the end of the user's text."""
        try:
            return self._seen(self._prefix_text(sample), sample.media_type, [sample.clip])
        except ValueError as error:
            raise ValueError(f"sample {sample.id}: {error}") from error

    def prompt_bound(self, sample: Sample, frames: int, max_pixels: int,
                     max_image_pixels: int = MAX_IMAGE_PIXELS) -> int:
        """Return the most tokens that a sample's prefix can have, known without its file."""
        text = len(self._plain(self._prefix_text(sample)).ids)
        return text + self._media_bound(sample, frames, max_pixels, max_image_pixels)

    def _media_bound(self, sample, frames, max_pixels, max_image_pixels=MAX_IMAGE_PIXELS):
        if sample.media_type != "video":
            return max_image_pixels // self.factor**2 if sample.media_type else 0
        tokens = max_pixels // self.factor**2 + TIMESTAMP_TOKENS
        return math.ceil(frames / self.temporal) * tokens

    def refuse_long(self, samples: list[Sample], max_prompt: int, *limits: int) -> None:
        """Raise ValueError with the first sample whose prompt may exceed max_prompt tokens.

        limits: as in prompt_bound. Where the text's length settles it, as for nearly all samples,
        nothing is rendered or tokenised: that would take minutes for hundreds of thousands.
        """
        empty = {"type": "text", "text": ""}
        chats = {kind: self._render([{"type": kind}] * bool(kind) + [empty])[0]
                 for kind in {sample.media_type for sample in samples}}
        for sample in samples:
            room = max_prompt - self._media_bound(sample, *limits)
            if self._most_tokens(sample, chats[sample.media_type]) <= room:
                continue
            bound = self.prompt_bound(sample, *limits)
            _require(bound <= max_prompt, f"sample {sample.id}: its prompt may take {bound} "
                     f"tokens, more than --max_prompt {max_prompt}")

    def _most_tokens(self, sample, chat):
        """Return a number of tokens that a sample's text, put into an empty chat, cannot exceed.

        A token of the families' byte-level tokenizers is a byte or more; the NFC that they
        apply first makes at most three bytes of one, and leaves ASCII as it is.
        """
        template = self.template.replace("{answer_format}", ANSWER_FORMATS[sample.kind])
        asked = [sample.question, "\nOptions:", *(f"\n{option}" for option in sample.options)]
        return sum(len(text) if text.isascii() else 3 * len(text.encode("utf-8", "replace"))
                   for text in [chat, template, *template.count("{question}") * asked])

    def patch(self, text: str, images: Any = ()) -> Segment:
        """Return a text and uint8 images [3, h, w] of any size, to stand before the header."""
        if not len(images):
            return self._plain(self.clean(text))
        clips = [still(resize(image[None], MAX_IMAGE_PIXELS, self.factor)) for image in images]
        return self._seen(self.clean(text) + self.image_text * len(clips), "image", clips)

    def suffix(self, text: str, images: Any = ()) -> Segment:
        """Return text, images and header: what stands between question and completion."""
        segment = self.patch(text, images)
        return replace(segment, ids=torch.cat([segment.ids, self.header.ids]))

    def completion(self, text: str) -> Tensor:
        """Return the ids of a response and EOS, without what the chat template opens it with."""
        text, opening = self.clean(text), self.opened.strip()
        if opening:
            text = text.lstrip().removeprefix(opening).lstrip()
        if opening.endswith("<think>") and "</think>" not in text:
            text = f"</think>\n\n{text}"  # nothing was thought
        eos = torch.tensor([self.tokenizer.eos_token_id])
        return torch.cat([self._plain(text).ids, eos])

    def text(self, ids: Tensor) -> str:
        """Return a completion's ids as the response, with what the chat template has opened."""
        return self.opened + self.tokenizer.decode(ids, skip_special_tokens=True)

    def _prefix_text(self, sample):
        """Return the chat up to the end of the user's text, a placeholder for video or image."""
        options = ["Options:", *sample.options] if sample.options else []
        text = self.template.replace("{answer_format}", ANSWER_FORMATS[sample.kind])
        text = self.clean(text.replace("{question}", "\n".join([sample.question, *options])))
        seen = [{"type": sample.media_type}] * bool(sample.media_type)
        before, after = self._render([*seen, {"type": "text", "text": text}])
        assert after == self.header_text, f"sample {sample.id}: the chat template wrote {after!r}"
        if start := getattr(self.processor, "vision_start_token", None):
            # Qwen3-VL's processor tags each temporal patch. The one released with the checkpoints
            # put these in place of the template's own tags; transformers 5 keeps both.
            video, end = self.processor.video_token, self.processor.vision_end_token
            before = before.replace(f"{start}{video}{end}", video)
        return before

    def _render(self, content):
        """Return the chat before and after the end of a user message with this content."""
        message = {"role": "user", "content": [*content, {"type": "text", "text": END}]}
        told = {"enable_thinking": self.thinking} if "enable_thinking" in self.chat else {}
        chat = self.processor.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=False, **told)
        before, end, after = chat.rpartition(END)
        _require(end, "the chat template does not show the user's text")
        return before, after

    def _plain(self, text):
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        return Segment(ids.long(), None, torch.zeros(0, 3, dtype=torch.long), torch.zeros(0))

    def _seen(self, text, media_type, clips):
        """Return a text with a placeholder for each clip, all images or all videos; "": none."""
        if not media_type:
            return self._plain(text)
        options = {"do_resize": False, "input_data_format": "channels_first"}
        if media_type == "image":
            media = {"images": [clip.frames[0] for clip in clips], "images_kwargs": options}
            names, token = ("pixel_values", "image_grid_thw"), self.processor.image_token_id
        else:
            # at one frame a second, the numbers of frames are seconds: the clip's own clock
            metadata = [{"fps": 1.0, "duration": clip.duration, "frames_indices": list(clip.times),
                         "total_num_frames": clip.duration - clip.times[0]} for clip in clips]
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
