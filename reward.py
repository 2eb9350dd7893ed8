"""The rule-based verifier R(τ) (Eq. 3): what a completion answers, how right, in which format.

    parse_answer(text)                          what stands between <answer> and </answer>
    accuracy(kind, text, gold, options, mode)   in [0, 1], for the five kinds of question
    format_reward(text)                         1 for <think>..</think><answer>..</answer> alone
    check_gold(kind, answer, options)           refuses at load what no student could answer
    mra(pred, gold, comparison)                 VSI-Bench's mean relative accuracy, benchmarks only

The paper only says that the parsed answer matches. Tags, numerical, OCR, free-form and format
follow Video-R1's trainer. So a number is a bare number: "3 meters", "45%" and a Unicode minus are
none, "1,000" is one, and Python's float decides on the digits of other scripts. What differs:

  * Multiple choice in mode "lenient" (training) takes what a person takes for the letter; Video-R1
    wants the letter and nothing else (mode "strict"), so that "(B)" would be sent to the teacher.
  * A regression gold of 0 can be met; the trainer's 1e-9 above and below the line makes even the
    right answer worth 0.
  * The format wants each tag once; the trainer's pattern lets them repeat.

Nothing a student writes raises an error, and no pattern takes more than linear time.
"""

import math
import re
from collections.abc import Sequence
from functools import cache
from string import ascii_uppercase

import jiwer
import numpy as np

EXACT_KINDS = ("multiple choice", "numerical")  # z = 1 needs accuracy 1.0
GRADED_KINDS = ("OCR", "free-form", "regression")  # z = 1 needs accuracy ≥ pass_mark
KINDS = EXACT_KINDS + GRADED_KINDS

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)


def parse_answer(text: str, fallback: bool = False) -> str | None:
    """Return the stripped text of the first closed <answer>; None if there is none or it is empty.

    With `fallback`, as in the Video-R1 family's evaluation, the whole completion stands in for it.
    """
    start = text.find("<answer>")
    end = text.find("</answer>", start)  # not a pattern: "<answer>" + n spaces would cost n²
    answer = text[start + len("<answer>") : end].strip() if start >= 0 and end >= 0 else ""
    return answer or (text.strip() if fallback else "") or None


def format_reward(text: str) -> float:
    """Return 1.0 if all of `text` is <think>..</think>, white space, <answer>..</answer>, else 0.0.

    Each tag occurs exactly once; what stands between them may be empty.
    """
    return float(all(text.count(tag) == 1 for tag in _TAGS) and bool(_FORMAT.fullmatch(text)))


def accuracy(kind: str, text: str, gold: str, options: Sequence[str] = (), mode: str = "lenient",
             fallback: bool = False) -> float:
    """Return how right the answer in the completion `text` is, in [0, 1]; 0 if it has no answer.

    kind      one of KINDS; exact kinds give 0 or 1
    gold      the inside of the solution's <answer>
    options   as in the data, "A. red"
    mode      multiple choice only: "strict" wants the gold string, "lenient" the gold option
    fallback  as in parse_answer
    """
    assert kind in KINDS and mode in ("lenient", "strict"), (kind, mode)
    answer, gold = parse_answer(text, fallback), gold.strip()
    if answer is None:
        return 0.0
    if kind == "multiple choice":
        letter = choice(answer, options) if mode == "lenient" else None
        return float(answer == gold or (letter is not None and letter == choice(gold, options)))
    score = {"numerical": _numerical, "regression": _regression, "OCR": _ocr, "free-form": _rouge}
    return score[kind](answer, gold)


def check_gold(kind: str, answer: str, options: Sequence[str] = ()) -> None:
    """Raise ValueError, saying why, for a gold answer that no completion can be scored against."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of question {kind!r}, not one of {', '.join(KINDS)}")
    answer = answer.strip()
    shown = f"{kind} answer {answer[:80]!r}"
    if not answer:
        raise ValueError(f"{shown} is empty")
    if kind in ("numerical", "regression") and number(answer) is None:
        raise ValueError(f"{shown} is not a finite number")
    if kind == "multiple choice" and len(options) > len(ascii_uppercase):
        raise ValueError(f"{len(options)} options, but only {len(ascii_uppercase)} letters")
    if kind == "multiple choice" and options and choice(answer, options) is None:
        raise ValueError(f"{shown} names none of the {len(options)} options")


# --- multiple choice ------------------------------------------------------------------------------

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # "（Ｂ）" to "(B)"
_EDGES = " *_`\"'“”‘’"  # quotes and emphasis around an option's text

# Words before the answer proper, as in "So the correct answer is option B".
_FILLER = re.compile(
    r"(?i)(?:(?:so|thus|therefore|hence|i (?:think|choose|pick)|it|the|my|is|answer|option|choice"
    r"|letter|(?:correct|right|best|final) (?=answer|option|choice|letter|one\b))\b[\s:,]*)+"
)
_ALONE = re.compile(r"[\W_]*([A-Za-z])[\W_]*")
_LABEL = re.compile(r"[\W_]*([A-Za-z])[.)\]}:,*_\"'\s]+(?:- )?(.+)")  # "(B) - red": B and red
# An option's own label: "A. red", "(b) red", "A:red", "A" alone; not the A of "A.M.".
_OWN_LABEL = re.compile(r"[(\[]?([A-Za-z])(?:[)\].:]+(?![A-Za-z]\.)|$)")
_NEGATED = re.compile(
    r"(?i:\bnot|n['’]t|\bneither|\bexcept)(?: option)? (?:[A-Z]\b|[(\[][A-Za-z][)\]])"
)
# A letter that names an option: in brackets; small and marked at the very start; or a capital on
# its own. "T-shirt", "B's", "A.M.", "20 °C" and "4 A" name none, nor do the article and the pronoun
# ("A man", "I see"), which are told from "A is", "A and" and the like by the next word.
_NAMED = re.compile(
    r"[(\[{] ?([A-Za-z]) ?[)\]}]|^([a-z])[.):](?= |$)"
    r"|(?<![\w°-])(?<!\w['’])(?<!\d )"
    r"(?:([B-HJ-Z])|([AI])(?! (?!(?i:is|and|or|but|because|since)\b)\w))"
    r"(?!\w|-\w|['’]\w|\.[A-Za-z]\b)",
    re.ASCII,  # so that a letter among Chinese characters stands on its own
)


def choice(answer: str, options: Sequence[str] = ()) -> str | None:
    """Return the letter of the one option that `answer` stands for; None for none or several.

    Tried in this order: the letter alone; the text of one option; a letter before an option's text;
    the letters named in a sentence. A letter before another option's text and a negated letter are
    None. The letters are those of `labels`, or A to Z without options.
    """
    letters = labels(options) or ascii_uppercase
    texts = {letter: _option_text(option, letter) for option, letter in zip(options, letters)}
    said = _one_line(answer)
    filler = _FILLER.match(said)
    body = said[filler.end() :] if filler else said

    alone = _ALONE.fullmatch(body)
    if alone and alone[1].upper() in letters:
        return alone[1].upper()
    if same := _options_with(said, texts) or _options_with(body, texts):
        return same[0] if len(same) == 1 else None
    label = _LABEL.match(body)
    if label and label[1].upper() in letters and (same := _options_with(label[2], texts)):
        return label[1].upper() if label[1].upper() in same else None
    if _NEGATED.search(body):
        return None
    named = {"".join(groups).upper() for groups in _NAMED.findall(body)} & set(letters)
    return named.pop() if len(named) == 1 else None


def labels(options: Sequence[str]) -> str:
    """Return the options' own letters, in their order: "BA" for "B. red" and "A. blue".

    Where an option has none or two have the same, A, B, C ... by place.
    """
    found = [_OWN_LABEL.match(_one_line(option)) for option in options]
    own = {match[1].upper(): None for match in found if match}
    return "".join(own) if len(own) == len(options) else ascii_uppercase[: len(options)]


def _one_line(text: str) -> str:
    """Return `text` with full-width characters made plain and runs of white space made a space."""
    return " ".join(text.translate(_FULL_WIDTH).split())


def _bare(line: str) -> str:
    """Return a line for comparison: small letters, no quotes or emphasis, no punctuation behind."""
    return line.casefold().lstrip(_EDGES).rstrip(_EDGES + ".,;:。")


def _option_text(option: str, letter: str) -> str:
    """Return an option for comparison, without its own label ("A. ", "(A) ", "A: ")."""
    line = _one_line(option)
    label = _OWN_LABEL.match(line)
    return _bare(line[label.end() :] if label and label[1].upper() == letter else line)


def _options_with(line: str, texts: dict[str, str]) -> list[str]:
    """Return the letters of the options whose text is `line`."""
    line = _bare(line)
    return [letter for letter, text in texts.items() if text and text == line]


# --- numbers --------------------------------------------------------------------------------------


def number(text: str) -> float | None:
    """Return `text` without its commas as a finite float, or None if it is not one."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _numerical(answer: str, gold: str) -> float:
    """Return 1 if equal to two decimals; 0 if only one has a point or comma: 3.0 is not 3."""
    p, y = number(answer), number(gold)
    same_form = any(c in ".," for c in answer) == any(c in ".," for c in gold)
    return float(same_form and p is not None and y is not None and round(p, 2) == round(y, 2))


def _relative_error(p: float, y: float) -> float:
    """Return |p − y| / |y|; for y = 0 its limit, 0 if p is 0 and otherwise infinite."""
    if y == 0:
        return 0.0 if p == 0 else math.inf
    return abs(p - y) / abs(y)


def _regression(answer: str, gold: str) -> float:
    """Return 1 − min(1, |p − y| / |y|)."""
    p, y = number(answer), number(gold)
    return 1.0 - min(1.0, _relative_error(p, y)) if p is not None and y is not None else 0.0


def mra(pred: float | None, gold: float, comparison: str = "<=") -> float:
    """Return the share of t in 0.50, 0.55, …, 0.95 whose 1 − t the relative error keeps within.

    "<=" is VSI-Bench's own code, in float64; "<" is the Video-R1 family's, in float32 and over
    |y| + 1e-8. They differ by 0.1 at a threshold. A `pred` that is None or not finite gives 0.
    """
    assert comparison in ("<=", "<"), comparison
    if pred is None or not math.isfinite(pred):
        return 0.0
    t = np.linspace(0.5, 0.95, 10)
    if comparison == "<=":
        return float((_relative_error(pred, gold) <= 1 - t).mean())
    with np.errstate(over="ignore", invalid="ignore"):  # beyond float32: inf or nan, so 0
        p, y = np.float32(pred), np.float32(gold)
        error = abs(p - y) / (abs(y) + np.float32(1e-8))
    return float((error < 1 - t.astype(np.float32)).mean())


# --- texts ----------------------------------------------------------------------------------------


def _ocr(answer: str, gold: str) -> float:
    """Return 1 − word error rate, at least 0; white space of any kind separates words."""
    answer, gold = " ".join(answer.split()), " ".join(gold.split())  # jiwer splits at blanks alone
    return max(0.0, 1.0 - jiwer.wer(gold, answer)) if gold else 0.0


def _rouge(answer: str, gold: str) -> float:
    """Return the mean F of ROUGE-1, -2 and -L over word stems; 1 for the gold's own words.

    The 1 is our definition: a gold of one word has no bigram, one in another script no stems.
    """
    if answer.casefold().split() == gold.casefold().split():
        return 1.0
    scores = _rouge_scorer().score(gold, answer)
    return sum(score.fmeasure for score in scores.values()) / len(scores)


@cache
def _rouge_scorer():
    """Return the one ROUGE scorer, made when first used: it imports nltk for its Porter stemmer."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
