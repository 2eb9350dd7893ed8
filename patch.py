"""The evidence patch: its parts, words and pictures, and whether a rationale uses it (Eq. 5, 6).

A patch says what kind of error was made and where to look again, never what is to be seen there.

    patch = parse_patch(given, clip.times)        what a teacher submitted, checked and bounded
    given = object_in(text, "score")              the JSON object in what a model wrote
    text = render(patch, "text")                  what the student reads after its question
    images = patch_images(patch, frames, "frames")    what it is shown again
    alignment(rationale, patch)                   whether it then refers to the evidence
    patch_from_evidence(sample, response)         a patch without any teacher model

Departs from the paper: one error type per patch.

Dimensions: F frames that the student sees; h, w pixels.
"""

import bisect
import json
import math
import re
import unicodedata
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

ERROR_TYPES = ("temporal", "spatial", "misconception")  # the paper's appendix, Table 6
QUERY_KINDS = ("counting", "dynamics", "temporal", "spatial", "attribute", "logic")  # Table 1
EVIDENCE_LEVELS = ("none", "text", "frames")
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.S | re.I)
MAX_GUIDANCE = 400  # characters; with the caps below a patch stays under about 250 tokens
MAX_MARKER, MAX_MARKERS, MAX_REGIONS = 80, 3, 4
MAX_KEY_IMAGES, MIN_CROP = 4, 28  # whole frames shown again; smallest side of a crop in pixels
LATE = 0.5  # seconds by which evidence may end behind the clip's end
MAX_JSON, MAX_DEPTH = 4_000_000, 200  # characters and levels of JSON from outside that are read


@dataclass(frozen=True)
class Patch:
    """One evidence patch c_i with its error type e_i (Eq. 5)."""

    error_type: str  # one of ERROR_TYPES
    query_kind: str  # one of QUERY_KINDS
    guidance: str
    key_frames: tuple[int, int] | None  # first and last, inclusive, among the F frames
    times: tuple[float, float] | None  # the same range in seconds
    temporal_markers: tuple[str, ...] = ()
    regions: tuple[tuple[float, float, float, float], ...] = ()  # x1 y1 x2 y2, each in 0..1

    def __post_init__(self):
        """Bound what is in it, whoever made it: the student reads all of it."""
        markers = tuple(plain(marker, MAX_MARKER) for marker in self.temporal_markers[:MAX_MARKERS])
        object.__setattr__(self, "guidance", plain(self.guidance, MAX_GUIDANCE))
        object.__setattr__(self, "temporal_markers", markers)
        object.__setattr__(self, "regions", tuple(self.regions[:MAX_REGIONS]))


def plain(text: Any, limit: int) -> str:
    """Return `text` as one bounded line that cannot alter the structure of a prompt.

    Control and invisible characters, line breaks, think/answer tags, chat markers and every angle
    bracket go; without a bracket no sequence of the pieces can form a new marker.
    """
    text = unicodedata.normalize("NFKC", str(text)[: 20 * limit])
    text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    text = "".join(c for c in text if not unicodedata.category(c).startswith("C"))
    text = re.sub(r"</?[A-Za-z|][^<>]{0,60}>", " ", text)
    text = " ".join(re.sub(r"[<>]", " ", text).split())
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0]


def answer_in(response: str) -> str:
    """Return the last answer that a response gives, "" where it gives none."""
    return ["", *ANSWER.findall(response)][-1].strip()


def render(patch: Patch, evidence: str) -> str:
    """Return what the student reads after its question, at evidence level none, text or frames.

    none     error type, temporal markers and guidance, without frame numbers or regions (Table 3)
    text     adds the key-frame range with its seconds and the regions
    frames   reads as text does; the images come from `patch_images`
    """
    assert evidence in EVIDENCE_LEVELS, evidence
    error = patch.error_type + ("" if patch.error_type == "misconception" else " error")
    texts, where = [patch.guidance, *patch.temporal_markers], places(patch)
    if evidence == "none":
        texts, where = map(_without_places, texts), ""
    guidance, *markers = texts
    where = f" Look again at {where}." if where else ""
    moment = f" Moment: {'; '.join(filter(None, markers))}." if any(markers) else ""
    return f"\nEvidence: a {error}.{where}{moment} {guidance}".rstrip()


def places(patch: Patch) -> str:
    """Name the key frames, their seconds and the regions in words."""
    seconds = " ({:.1f} s to {:.1f} s)".format(*patch.times) if patch.times else ""
    frames = ["frames {} to {}".format(*patch.key_frames) + seconds] if patch.key_frames else []
    regions = ["region ({:.2f}, {:.2f}) to ({:.2f}, {:.2f})".format(*r) for r in patch.regions]
    return ", ".join(frames + regions)


def _without_places(text: str) -> str:
    """Take frame numbers, seconds and coordinates out of free text."""
    number = r"\[?\(?\d+(?:[.:]\d+)?(?:\s*s(?:ec(?:ond)?s?)?\b)?\)?\]?"
    several = rf"{number}(?:\s*(?:,|to|and|through|[-–])\s*{number})*"
    text = re.sub(rf"\b(?:frames?|seconds?|times?)\s+{several}", "the clip", text, flags=re.I)
    text = re.sub(r"[(\[]\s*\d*\.?\d+(?:\s*,\s*\d*\.?\d+)+\s*[)\]]", "", text)
    return re.sub(r"\b\d+(?:\.\d+)?\s*s(?:ec(?:ond)?s?)?\b", "", text)


def patch_images(patch: Patch, frames_F3hw: Any, evidence: str) -> list:
    """Return the key frames and the crops of the regions from them as uint8 [3, h, w] images.

    At most MAX_KEY_IMAGES frames spread over the range, then each region from the first and the
    last of them; empty unless evidence is "frames". A patch without key frames crops the middle.
    """
    assert evidence in EVIDENCE_LEVELS, evidence
    if evidence != "frames":
        return []
    F, images = len(frames_F3hw), []
    first, last = patch.key_frames or (F // 2, F // 2)
    assert 0 <= first <= last < F, f"key frames {patch.key_frames} of {F}"
    if patch.key_frames:
        shown = np.linspace(first, last, min(MAX_KEY_IMAGES, last - first + 1)).round()
        images = [frames_F3hw[int(i)] for i in shown]
    for region in patch.regions[: MAX_REGIONS // 2]:
        images += [crop(frames_F3hw[i], region) for i in sorted({first, last})]
    return images


def crop(image_3hw: Any, region: tuple[float, float, float, float]) -> Any:
    """Cut a normalised region out of an image, at least MIN_CROP pixels a side if it can be."""
    h, w = image_3hw.shape[-2:]
    x1, x2 = _widened(region[0] * w, region[2] * w, w)
    y1, y2 = _widened(region[1] * h, region[3] * h, h)
    return image_3hw[..., y1:y2, x1:x2]


def _widened(low: float, high: float, size: int) -> tuple[int, int]:
    low, high = int(low), math.ceil(high - 1e-3)
    length = min(max(high - low, MIN_CROP), size)
    low = min(max(0, low - (length - (high - low)) // 2), size - length)
    return low, low + length


# --- does a rationale refer to the patch? ---------------------------------------------------------

_REAL_NUMBER = r"(\d+(?:\.\d+)?)"
_UNIT = r"(?:s|secs?|seconds?)\b"
_TO = r"\s*(?:to|and|through|until|[-–—])\s*"
FRAMES = re.compile(rf"\bframes?\s*#?[\[(]?\s*(\d+(?:\s*,\s*\d+)*)(?:,?{_TO}(\d+))?", re.I)
SECONDS = re.compile(rf"{_REAL_NUMBER}\s*(?:{_UNIT})?(?:{_TO}{_REAL_NUMBER}\s*)?{_UNIT}", re.I)
_SHARE = r"(0?\.\d+|[01](?:\.0+)?)"
_BOX = re.compile(r"(?:[\s,;()\[\]]|to|and)+".join([rf"(?<![\d.]){_SHARE}(?![\d.]*\d)"] * 4), re.I)
_CORNER = re.compile(r"\b(top|upper|bottom|lower)[\s-]+(left|right)", re.I)


def alignment(text: str, patch: Patch) -> float:
    """Return 1.0 if the rationale refers to the patch's frames, times or regions, else 0.0.

    The paper's "dependency alignment", which its equations do not hold: measured, not rewarded
    unless --alignment_weight says so.
    A range of frames or seconds counts when it overlaps the patch's and is at most twice as long,
    so that naming the whole clip does not. A box counts at an IoU of 0.5, a named corner
    ("top left") when it holds the region's centre. What stands inside <answer> is no rationale.
    """
    rationale = re.sub(r"<answer>.*?(</answer>|$)", " ", text, flags=re.S | re.I)
    boxes = [tuple(map(float, numbers)) for numbers in _BOX.findall(rationale)]
    corners = {(v.lower() in ("top", "upper"), s.lower()) for v, s in _CORNER.findall(rationale)}
    return float(names_range(rationale, patch) or any(
        (y1 + y2 < 1, "left" if x1 + x2 < 1 else "right") in corners
        or any(_iou(box, (x1, y1, x2, y2)) >= 0.5 for box in boxes)
        for x1, y1, x2, y2 in patch.regions))


def names_range(rationale: str, patch: Patch) -> bool:
    """Return whether a range of frames or of seconds in the text is the patch's."""
    spans = (FRAMES, patch.key_frames, 1.0), (SECONDS, patch.times, 0.1)  # 0.1: rounded times
    for pattern, span, slack in spans:
        for named in pattern.findall(rationale) if span else ():
            numbers = [float(n) for n in ",".join(filter(None, named)).split(",")]
            low, high, (first, last) = min(numbers), max(numbers), span
            overlaps = low <= last + slack / 2 and high >= first - slack / 2
            if overlaps and high - low + slack <= 2 * (last - first + slack):
                return True
    return False


def _iou(a, b) -> float:
    overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    return overlap / union if union > 0 else 0.0


# --- kinds of question, key frames, annotations ---------------------------------------------------

# The first kind whose words occur in the question; "attribute" when none do.
KIND_WORDS = (
    ("temporal", r"^\W*(for )?how long\b|how many (seconds|minutes|hours)\b"),
    ("counting", r"how (many|often)|number of|count\b|total of"),
    ("logic", r"\bwhy\b|cause|reason|because|purpose|infer|imply|explain|would|predict|intention"),
    ("spatial", r"^\W*(in |on |at )?(where|which (side|corner|quadrant|part|position))"),
    ("temporal", r"^\W*(when|in what order|at what (time|second|moment))"),
    ("attribute", r"colou?r|material|shape|texture|made of|wearing|what (kind|type)|text|read"),
    ("dynamics", r"direction|\bmov(e|es|ed|ing|ement)|motion|speed|fast|slow|rotat|turn|path"),
    ("temporal", r"before|after|first|last|order|when|sequence|earl|later|begin|start|\bend"),
    ("spatial", r"where|left|right|behind|in front|distance|close|far|position|corner|quadrant"),
)
WHERE_TO_LOOK = {
    "counting": "Count again, one by one, and leave out what was counted before.",
    "dynamics": "Follow the subject from frame to frame and compare its positions.",
    "temporal": "Compare what comes earlier with what comes later.",
    "spatial": "Check where things are in relation to each other.",
    "attribute": "Look closely at what the question asks about.",
    "logic": "Watch what comes just before and what follows from it.",
}


def query_kind(question: str) -> str:
    """Return the kind of a question by the words in it, one of QUERY_KINDS."""
    found = (kind for kind, words in KIND_WORDS if re.search(words, question, re.I))
    return next(found, "attribute")


def key_range(times: tuple[float, ...], start: float, end: float) -> tuple[int, int] | None:
    """Return the first and last frame inside [start, end], widened to two; None for one frame."""
    if len(times) < 2:
        return None
    first = bisect.bisect_left(times, start - 1e-3)
    last = bisect.bisect_right(times, end + 1e-3) - 1
    first, last = sorted((first, last))  # none is inside: the frame before and the one after
    first = min(max(first, 0), len(times) - 2)
    return first, min(max(last, first + 1), len(times) - 1)


def outside_clip(sample: Any) -> str:
    """Return what is wrong with evidence that lies outside the sample's clip, "" if none does.

    It may end half a second or a frame behind the clip's end, since annotators round. Of an image
    seconds mean nothing.
    """
    clip = sample.clip
    first, last = clip.times[0], clip.duration
    for e in sample.evidence if len(clip.times) > 1 else ():
        if e.end < first or e.start > last or e.end > last + max(LATE, 1 / clip.fps):
            shown = f"from {first:.1f} s to" if first else "of"
            return (f"evidence from {e.start:.10g} s to {e.end:.10g} s lies outside the clip "
                    f"{shown} {last:.1f} s")
    return ""


def patch_from_evidence(sample: Any, response: str) -> Patch:
    """Return the sample's `evidence` annotation as the patch for a failed response.

    It is for evidence within the clip: see `outside_clip`.
    error type   misconception: no answer to be read in the response; spatial: the evidence has a
                 box and the response names the right range (or there is one image only);
                 temporal: all else
    """
    times, evidence = sample.clip.times, sample.evidence
    key_frames = key_range(times, min(e.start for e in evidence), max(e.end for e in evidence))
    seconds = (times[key_frames[0]], times[key_frames[1]]) if key_frames else None
    kind = query_kind(sample.question)
    guidance = " ".join([WHERE_TO_LOOK[kind], *(e.note for e in evidence)])
    boxes = tuple(e.box for e in evidence if e.box)
    patch = Patch("temporal", kind, guidance, key_frames, seconds, regions=boxes)
    if not answer_in(response):
        return replace(patch, error_type="misconception")
    if boxes and (key_frames is None or names_range(response, patch)):
        return replace(patch, error_type="spatial")
    return patch


# --- what a teacher submits -----------------------------------------------------------------------


def read_json(text: str) -> Any:
    """Return the value of a JSON text from outside; ValueError for none, a long or a deep one.

    Bounded before it is parsed: deep brackets end a parser, or whoever writes the value again.
    """
    if len(text) > MAX_JSON:
        raise ValueError(f"more than {MAX_JSON} characters")
    brackets = re.findall(r"[][{}]", re.sub(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', "", text, flags=re.S))
    if max(accumulate(1 if b in "[{" else -1 for b in brackets), default=0) > MAX_DEPTH:
        raise ValueError(f"brackets in more than {MAX_DEPTH} levels")
    return json.loads(text, strict=False)  # not strict: line breaks stand in strings


def object_in(text: str, name: str) -> dict:
    """Return the last JSON object in a text that has a key `name`, whatever stands around it.

    A fence, a sentence, thoughts, drafts. ValueError where there is none.
    """
    text = text[-20_000:]
    for start in [match.start() for match in re.finditer("{", text)][:-50:-1]:
        with suppress(ValueError, RecursionError):
            found, _ = json.JSONDecoder(strict=False).raw_decode(text, start)
            if name in found:
                return found
    raise ValueError(f"no JSON object with {name} in {plain(text, 60)!r}")


def _listed(given: Any) -> list:
    """Return a list, also from its JSON text; anything else as the one member of a list."""
    with suppress(ValueError):
        found = read_json(given) if isinstance(given, str) else given
        given = given if isinstance(found, (str, int, float)) else found
    return given if isinstance(given, list) else [] if given in (None, "") else [given]


def parse_patch(given: Any, times: tuple[float, ...]) -> Patch:
    """Return the patch that a teacher submitted, of F frames at `times`.

    Lists may come as JSON text, a lone marker or region without its list. ValueError says what the
    teacher has to mend.
    """
    if not isinstance(given, dict):
        raise ValueError("the input must be an object")
    kinds = []
    for name, allowed in (("error_type", ERROR_TYPES), ("query_kind", QUERY_KINDS)):
        kinds.append(str(given.get(name)).strip().lower())
        if kinds[-1] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}")
    guidance = given.get("guidance")
    if not isinstance(guidance, str) or not plain(guidance, MAX_GUIDANCE):
        raise ValueError("guidance must be a sentence")
    frames, markers, regions = (
        _listed(given.get(name)) for name in ("key_frames", "temporal_markers", "regions"))
    if not all(isinstance(marker, str) for marker in markers):
        raise ValueError("temporal_markers must be strings")
    F = len(times)
    frames = [parse_index(index, F) for index in frames] if F > 1 else []  # an image has no range
    if F > 1 and len(set(frames)) < 2:
        raise ValueError("key_frames must be the first and the last of a range, never one frame")
    span = (min(frames), max(frames)) if frames else None
    seconds = (times[span[0]], times[span[1]]) if span else None
    if regions and not isinstance(regions[0], list):
        regions = [regions]  # one region without the list of regions around it
    regions = map(parse_region, regions[:MAX_REGIONS])
    return Patch(*kinds, guidance, span, seconds, tuple(markers), tuple(regions))


def parse_number(value: Any) -> float:
    """Return a finite number, also from text; ValueError where it is none."""
    with suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, bool) and math.isfinite(number := float(value)):
            return number
    raise ValueError(f"{plain(value, 40)!r} is not a number")


def parse_index(value: Any, F: int) -> int:
    """Return a frame index in 0..F-1; ValueError where it is none."""
    index = parse_number(value)
    if not index.is_integer() or not 0 <= index < F:
        raise ValueError(f"a frame index must be a whole number from 0 to {F - 1}")
    return int(index)


def parse_region(values: Any) -> tuple[float, float, float, float]:
    """Return x1, y1, x2, y2 as shares of the frame; ValueError where they are no box."""
    box = tuple(parse_number(v) for v in values) if isinstance(values, (list, tuple)) else ()
    if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ValueError("a region is x1, y1, x2, y2 in 0..1 with x1 < x2 and y1 < y2")
    return box
