"""The leak guard: what a patch may not give away, and the audit of a run's patches.

    problem = leak(patch, sample, response)    "direct: ..." (the answer), "partial: ...", "unread:
                                               ..." (not in English) or ""
    problem = await blind_leak(patch, sample, guess)    the same by a model without the video
    python guard.py RUN                        leaks, error types, repairs and cost of a run

The paper trusts its prompts to keep answers out of patches (Table 5); the rules here check. They
know English alone: what is in another language is for the blind test (--blind_test), or refused.
"""

import argparse
import asyncio
import functools
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from patch import ERROR_TYPES, FRAMES, SECONDS, Patch, answer_in, plain, render

# --- the rules ------------------------------------------------------------------------------------

_COUNT = (
    "zero none|one single once|two twice both pair duo couple|three third thrice trio|four fourth"
    "|five fifth|six sixth|seven seventh|eight eighth|nine ninth|ten tenth|eleven|twelve dozen"
    "|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen"
)
NUMBERS = {word: n for n, group in enumerate(_COUNT.split("|")) for word in group.split()}
TENS = dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 99, 10)))
_SMALL = rf"(?:(?:{'|'.join(TENS)})(?:[ -](?:{'|'.join(NUMBERS)}))?|{'|'.join(NUMBERS)})"
_NUMBER_WORDS = re.compile(rf"\b{_SMALL}(?: hundred(?:(?: and)? {_SMALL})?)?(?: thousand)?\b")
_COUNTS_ONE = re.compile(r"(?<!\S)(only|just|exactly|is|but)\s+$")
_GROUPS = (
    "red crimson scarlet|blue navy azure|gray grey silver|purple violet|color colour|car automobile"
    "|bike bicycle|sofa couch|phone smartphone cellphone|tv television|child kid|over above"
    "|under below beneath underneath|stop halt|metal metallic steel|end last final"
    "|counterclockwise anticlockwise|right rightward rightwards|left leftward leftwards"
)
SAME = {w: group.split()[0] for group in _GROUPS.split("|") for w in group.split()}  # one meaning
NAMED = {  # what a question may ask for, the stem that says so, its common answers as stems
    "colour": ("color", "red blue green yellow orang purpl pink brown black white gray gold beig"),
    "direction": ("direct", "left right up down upward downward clockwis counterclockwise forward"
                  " backward toward away horizont vertic north south east west"),
}  # fmt: skip
EMPTY = set(  # words that tell no answer from another
    "a an the of to in on at by for from with and or nor is are was were be been being it its he"
    " she him his her they them their this that these those there then than as because so if no not"
    " yes do does did has have had will would can could should what which who whom whose when where"
    " why how into onto out off any all each i you your we our us video clip frame scene object"
    " thing moment time second way camera event part place option answer man woman person people"
    " boy girl hand get put turn move come more other same start begin before after".split()
)
ADVICE = set(  # advice begins with one of these; any other sentence states something
    "analyze analyse ask attend avoid be begin check choose compare concentrate consider continue"
    " count crop decide determine distinguish divide do don't draw enlarge estimate examine find"
    " focus follow freeze give go identify ignore inspect judge keep list listen locate look make"
    " mark measure multiply note notice observe order pan pause pay pick re-examine read recheck"
    " recount replay review revisit rewatch rewind scan search see select separate slow sort start"
    " step stay study subtract take tap think tick time trace track treat try use verify view wait"
    " watch write zoom".split()
)
PERCEIVED = "see notice find spot hear recognise recognize".split()  # "Can you see the planks?"
LATIN = set(  # common words of Spanish, French, German, Italian and Portuguese, none of English
    "el los las del una un que por para con su sus es le les du une est et dans pour sur der das"
    " und den dem ein eine mit von ist nicht il gli che della di em uma os na al se si ne la de en"
    " lo".split()
)
POLAR = ("is are was were do does did has had can isn't aren't wasn't weren't don't doesn't didn't"
         " hasn't can't couldn't won't would wouldn't have").split()
OPENING = "after at before by during for from if in on once over when while with".split()
LEAD = "then now also but and so first finally instead rather again next please carefully only"
NOTE = "(note|notice|see|observe|remember|consider|keep in mind)"
LEAD = rf"^((?:{LEAD.replace(' ', '|')}),? )*({NOTE} that )?"
ABOUT_THE_TASK = re.compile(  # statements that are no harm
    r"(what )?you\b(?! (should|will|can|could|would|must) (see|find|notice|get|spot))|your\b"
    r"|(part of )?the (question|task|camera|frames?|clip|range|letters|text|view|relevant)\b"
    r"|the \w+ (lies|can be found)\b|motion blur|.*\b(easy|hard) to (see|miss|overlook)"
    r"|.*\b(partly \w+|partially \w+|blurred)|.* (matters?|of no use)$"
)
_MORE = "(more|less|fewer|smaller|larger|bigger|greater|higher|lower|longer|shorter|later|earlier)"
_EXTREME = "(many|few|much|high|low|large|big|small|long|short|early|late|far|close|fast|slow)"
TOLD = {  # what no patch may say, whatever the question
    "direct: states the answer": r"\b(answer|solution) (is|=|:|(should|must|would) be)\b"
    r"|\b(correct|right) (answer|option|choice)\b",
    "direct: names an option": r"\b(option|choice|letter) \(?[a-h]\b|\([a-h]\)|\bpick \(?[b-h]\b",
    "direct: tells the student what to write": r"\b(ignore|disregard|forget) .*\binstruction"
    r"|\b(respond|reply|answer|output) (only )?(with|by)\b|\bsystem prompt\b",
    "partial: compares with the answer given": rf"\btoo {_EXTREME}\b(?! (in|into|back))"
    rf"|\b(much|far|slightly|even|a lot|\d+) {_MORE}\b|\bat (least|most) \d|\bafter \d+ ?s\b"
    r"|\bwrong (way|order|direction|side)\b|\b(so|very|almost|nearly|quite) (close|right|there)\b"
    r"|\b(one|1|2|3) (short|off|early|late)\b|\boff by\b|\bgo (up|down) by\b|\bconservative\b"
    r"|\b(actually|really) the (first|last|\d+|second|third)\b"
    rf"|\b({_MORE}|faster|slower|closer|often)\b[^.;]* than (you|that|what|before|a|half|\d)"
    r"|\byou (\w+ )?(missed|forgot|overlooked|skipped|exchanged|swapped|reversed|\w+counted)\b"
    r"|\b(over|under)-?estimat|\b(double|twice) (the|as)\b|\bhalf (as|of)\b|\bopposite\b"
    r"|\bother (than|order|way)\b|\badd (a|one|some|another)\b",
    "partial: rules something out": r"\b(do not|don't) expect\b|\brul(e|es|ing) out\b",
    "partial: hints by association": r"\b(think of|imagine|reminds?|rhymes|sounds like)\b",
    "partial: describes the text": r"\b(start|begin|end)(s|ing|ning)? with\b",
    "partial: points at a single frame": r"\bat \d+(\.\d+)? ?(s|sec|seconds?)\b|\bsecond \d"
    r"|\bframe #?\d+\b(?! ?(to|and|through|until|,|-|–) ?(frame )?\d)",
    "partial: tells of somebody": r", (who|which|whose) (?!of\b)",
}
STATED, UNREAD = "partial: states what is to be seen", "unread: not in English"


@functools.cache
def _stem(word: str) -> str:
    from nltk.stem.porter import PorterStemmer  # a dependency of rouge-score
    return PorterStemmer().stem(word)


def spelled(text: str) -> str:
    """Return text in lower case with numbers as digits: "Twenty-four, a dozen" -> "24, a 12".

    A lone "one" stays a word unless it counts ("only one", "there is one"), so does "once more".
    """

    def value(match):
        start, end = match.span()
        counts = _COUNTS_ONE.search(text, max(0, start - 20), start)
        if match[0] == "one" and not counts or match[0] == "once" and text[end : end + 1].isspace():
            return match[0]
        total = 0
        for word in re.findall("[a-z]+", match[0]):
            total += NUMBERS.get(word, 0) + TENS.get(word, 0)
            total *= {"hundred": 100, "thousand": 1000}.get(word, 1)
        return str(total)

    text = text.lower().replace("’", "'")
    text = re.sub(r"\b([a-z][- ]){2,}[a-z]\b", lambda m: re.sub("[- ]", "", m[0]), text)  # s-t-o-p
    text = _NUMBER_WORDS.sub(value, text)
    text = re.sub(r"\bhalf an? (\d+)", lambda m: f"{int(m[1]) / 2:g}", text)
    return re.sub(r"\b(\d+) and a half\b", r"\1.5", text)


def words(text: str) -> set[str]:
    """Return the words of a text in a common form: number, inflection and spelling set aside."""
    text = re.sub(r"\b(\w{3,}?)ish\b", r"\1", spelled(text))  # greenish
    found = re.findall(r"\d+(?:\.\d+)?|[^\W\d_]+", text)
    return {SAME.get(w) or SAME.get(_stem(w), _stem(w)) for w in found}


def telling(answer: str, known: set[str]) -> set[str]:
    """Return the words of an answer that tell it apart from others: not empty, not known yet."""
    found = words(answer) - words("a an the of to it is") - known
    return found - words(" ".join(EMPTY)) or found


def leak(patch: Patch, sample: Any, response: str) -> str:
    """Return what a patch gives away: "direct: …" (the answer), "partial: …" (some of it) or "".

    Rules on what the student would read.
    """
    guidance = _bare(patch.guidance)
    text = spelled("; ".join([guidance, *patch.temporal_markers]))
    told = [what for what, pattern in TOLD.items() if re.search(pattern, text)]
    direct = [what for what in told if what.startswith("direct")]
    found = [*direct, tells_answer(text, sample, response), _tells_place(patch, sample), *told]
    stated = UNREAD if foreign(text) else STATED if states(guidance) else ""
    return next(filter(None, found), stated)


def foreign(text: str) -> bool:
    """Return whether a clause is in another language than English, as far as a rule can tell."""
    def other(clause):
        heads = re.findall(r"[^\W\d_]+", clause)
        known = sum(word in EMPTY or word in ADVICE for word in heads)
        return sum(word in LATIN for word in heads) > known

    return bool(re.search(r"[^\W\d_\u0000-\u024f]{2}", text)) or any(
        map(other, re.split(r"[.;!?:]\s+", text)))


def _bare(text: str) -> str:
    """Take Markdown out of a text, and the numbers of a list of advice that begins with 1."""
    text = re.sub(r"[*_`~#|]+|(?<!\S)-(?=\s)", " ", text)
    number = rf"(?<!\S)\d+[.)]\s+(?=(?:{'|'.join(ADVICE)})\b)"
    return re.sub(number, "", text, flags=re.I) if re.match(r"\s*1[.)]\s", text) else text


def tells_answer(text: str, sample: Any, response: str) -> str:
    """Look for the gold answer, its number, colours or directions, and for other options."""
    options = [plain(option, 500) for option in sample.options]
    options = {o.lstrip("(")[:1].upper(): re.sub(r"^\(?[A-Za-z][.):]\s*", "", o) for o in options}
    asked, gold = plain(sample.question, 2000), plain(sample.answer, 500)
    gold, response = options.get(gold.strip("(). ").upper(), gold), response[:20_000]
    said = answer_in(response)
    said = options.get(said.strip("(). ").upper()[:1], said)
    text = re.sub(r"\bright (?=before|after|when|where|at|as\b)|\b(?<=write|.note) down\b", "",
                  FRAMES.sub(" ", text))
    if not re.search(r"second|when|long|time|duration|minute", asked, re.I):
        text = SECONDS.sub(" ", text)
    told, question = words(text), words(asked)
    shared = set.intersection(*map(words, options.values())) if options else set()
    named = {o for o in options.values() if telling(o, question | shared) <= told
             or ord(max(o, default="a")) > 0x3000 and o in text}  # written without spaces
    if ord(max(gold, default="a")) > 0x3000 and gold in text and not options or \
            gold in named and len(named) < len(options):
        return "direct: names the answer"
    if len(options) > 2 and named == set(options.values()) - {gold}:
        return "direct: leaves one option"
    if named - {said} and gold not in named:
        return "partial: names an option"
    goal, slack = _number(gold), 0.25 if sample.kind == "regression" else 0.001  # of the goal
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]
    numbers += [number / 100 for number in numbers]  # 280 cm are 2.8 m
    if goal is not None and any(abs(number - goal) <= slack * abs(goal) for number in numbers):
        return "direct: names the number"
    tells = telling(gold, question | shared)
    hits = (tells - words(said)) & told
    if hits and len(named) < max(len(options), 1):
        if len(hits) * 2 >= len(tells):
            return "direct: names the answer"
        if len(hits) * 6 > len(tells):
            return "partial: names a part of the answer"
    answers = words(gold).union(*map(words, options.values()))
    new = told - question - shared - words(response)
    for what, (stem, names) in NAMED.items():
        names = set(names.split())
        if new & names and (stem in question or answers & names):
            return f"partial: names a {what}"
    return ""


def _number(text: str) -> float | None:
    """Return the number that an answer is, its unit set aside; None where it is none."""
    match = re.fullmatch(r"\D{0,3}(\d+(?:\.\d+)?)\s*[^\d\W]*\W*", spelled(text).replace(",", ""))
    return float(match[1]) if match else None


def _tells_place(patch: Patch, sample) -> str:
    """Look for the answer in the key frames (where a time is asked for) or regions (a place)."""
    times = sample.clip.times if sample.clip else ()
    if patch.key_frames and len(times) > 1:
        first, last = patch.key_frames
        if first == last:
            return "partial: points at a single frame"
        number, narrow = _number(sample.answer), last - first + 1 < max(4, len(times) / 4)
        when = r"^\W*when|what (second|time|moment)|how many seconds"
        asks = re.search(when, sample.question, re.I)
        if asks and narrow and number is not None and times[first] <= number <= times[last]:
            return "direct: the key frames give the time away"
    place = r"\W*(in |on |at )?(where|which (side|corner|quadrant|half))"
    small = any((x2 - x1) * (y2 - y1) < 0.4 for x1, y1, x2, y2 in patch.regions)
    if small and re.match(place, sample.question, re.I):
        return "direct: the region gives the place away"
    return ""


def states(text: str) -> bool:
    """Return whether a clause states something about the video where it should give advice.

    So does a question that can be answered with yes; a place alone states nothing.
    """
    text = SECONDS.sub(" ", FRAMES.sub(" ", text))
    text = re.sub(r"[(\[]?[xy]?[ =]*\b[01]?\.\d+\b[)\]]?", " ", text)
    for clause in re.split(r"(?<=[.;!?:])\s+", text.lower()):
        clause = re.sub(LEAD, "", clause.strip(" \"'"))
        heads = re.findall(r"[\w'-]*\w", clause) or ["look"]
        pairs = list(zip(heads, heads[1:10]))
        asks = clause.endswith("?") and (heads[0] not in POLAR or any(
            a == "you" and b not in PERCEIVED for a, b in pairs))
        leads = heads[0] in OPENING and any(
            b in ADVICE and a not in "a an the his her its to".split() for a, b in pairs[1:])
        label = len(heads) == 1 and clause.endswith(":")
        if not (asks or leads or label or heads[0] in ADVICE
                or ABOUT_THE_TASK.match(clause.rstrip(".;:!"))):
            return True
    return False


# --- the blind test -------------------------------------------------------------------------------


def asked_text(sample: Any) -> str:
    """Return question and options as bounded text."""
    options = "".join(f"\n{plain(option, 300)}" for option in sample.options)
    return f"Question: {plain(sample.question, 4000)}{options}"


async def blind_leak(patch: Patch, sample: Any, guess: Callable) -> str:
    """Ask for the answer without the video, with and without the patch; return what it gives away.

    Refused if the patch brings more right answers than guessing and at least half of the k replies
    more than none brings: a model's habit of saying "yes" is then no leak.
    guess(text) -> k replies; all is asked in one batch.
    """
    asked = "You cannot see the video. Reply with your answer alone; guess if you must.\n"
    asked += asked_text(sample)

    def right(reply):
        said = plain(reply, 200)
        told = tells_answer(spelled(said), sample, "").startswith("direct")
        return told or said.strip("(). ").upper() == sample.answer.strip("(). ").upper()

    replies = await asyncio.gather(guess(asked + render(patch, "text")), guess(asked))
    hits, before = (sum(map(right, some)) for some in replies)
    k, chance = len(replies[0]), 1 / len(sample.options) if sample.options else 0.1
    seen = hits > k * chance and hits - before >= max(1, k / 2)
    return "blind test: the answer can be told from the patch alone" if seen else ""


# --- the audit of a run ---------------------------------------------------------------------------

LEAKS = ("direct", "partial", "unread")  # what the rules find, and what they cannot read
SAID = "status reason".split()  # by each line of patches.jsonl; by those with a patch also:
SAID_OF_PATCH = "error_type query_kind guidance key_frames times question options answer".split()


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % Wilson interval of the share k / n."""
    middle, spread = k + z * z / 2, z * math.sqrt(k * (n - k) / max(n, 1) + z * z / 4)
    return max(0.0, (middle - spread) / (n + z * z)), min(1.0, (middle + spread) / (n + z * z))


def audit(rows: list[dict], price: str = "") -> dict:
    """Count a run's diagnoses: how they ended, error types, repairs, leaks, cost.

    Leaks are counted twice: as first submitted by the teacher (what the prompt alone lets through,
    Table 5), and by the rules of `leak` in the patches that students were shown. What the rules
    let pass and the blind test refused is counted apart. Without a price there are no dollars.
    """

    def share(k, n):
        return {"count": k, "of": n, "share": k / n if n else None, "interval": wilson(k, n)}

    def repaired(some):
        return share(sum(row.get("repaired") is True for row in some), len(some))

    patched = [row for row in rows if row["status"] == "patched"]
    judged = [row for row in rows if row["status"] in ("patched", "refused")]
    first = Counter(row["reason"].removeprefix("mended ").split(":")[0] for row in judged)
    submitted = {kind: share(first[kind], len(judged)) for kind in (*LEAKS, "blind test")}
    unknown = {"kind": "", "response": "", "clip": None}  # what a row may not say
    asked = [SimpleNamespace(**unknown | row) for row in patched]
    leaks = [leak(patch_of(row), sample, sample.response) for row, sample in zip(patched, asked)]
    shown = Counter(problem.split(":")[0] for problem in leaks)
    types = {t: [row for row in patched if row["error_type"] == t] for t in ERROR_TYPES}
    tokens = [sum(row.get(f"{kind}_tokens") or 0 for row in rows)
              for kind in ("input", "cache_write", "cache_read", "output")]
    into, write, read, out = tokens
    dollars = money([into - write - read, write, read, out], prices(price))
    n = max(len(patched), 1)
    why = Counter(row["reason"] for row in rows if row["status"] != "patched")
    return {
        "diagnoses": len(rows),
        "status": dict(Counter(row["status"] for row in rows).most_common()),
        "reasons": dict(why.most_common()),
        "error_types": {t: share(len(some), len(patched)) for t, some in types.items()},
        "repair_rate": {"all": repaired(patched)} | {t: repaired(rs) for t, rs in types.items()},
        "leaks_submitted": submitted,
        "leaks_shown": {kind: share(shown[kind], len(patched)) for kind in LEAKS},
        "a_patch": {"input": into / n, "output": out / n,
                    "dollars": dollars / n if price else None},
    }


def diagnoses(path: Path) -> list[dict]:
    """Return the lines of a patches.jsonl; ValueError where there are none or one is none."""
    whole = path.read_bytes() if path.exists() else b""
    rows = []
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):  # what a kill has torn has no end
        rows.append(row := _parsed(line, f"{path}, line {number},"))
        needed = SAID + (SAID_OF_PATCH if row.get("status") == "patched" else [])
        if missing := [name for name in needed if name not in row]:
            raise ValueError(f"{path}, line {number}, is no diagnosis: it has no {missing[0]}")
    if not rows:
        raise ValueError(f"{path} holds no diagnoses: in this run nobody was asked for a patch")
    return rows


def price_of(run: Path) -> str:
    """Return the price that a run's config.json names, "" where it names none."""
    path = run / "config.json"
    config = _parsed(path.read_bytes(), path) if path.exists() else {}
    return str(config.get("teacher_price") or "")


def _parsed(text, where):
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} is not an object")
    return found


def prices(text: str, flag: str = "--price") -> tuple[float, float]:
    """Return dollars per token in and out from "3/15", dollars per million."""
    if not text:
        return 0.0, 0.0
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*/\s*(\d+\.?\d*|\.\d+)\s*", text)
    if not match:
        raise ValueError(f"{flag} is IN/OUT in dollars for a million tokens, as 3/15, not {text!r}")
    return float(match[1]) / 1e6, float(match[2]) / 1e6


def check_money(price: str, budget: float, flags: str) -> None:
    """Refuse a price that cannot be read and a budget without one; flags: --teacher or --api."""
    prices(price, f"{flags}_price")
    if budget and not price:
        raise ValueError(f"{flags}_budget is in dollars and needs {flags}_price IN/OUT")


def money(usage: list, price: tuple[float, float]) -> float:
    """Return dollars; writing to the prompt cache costs 1.25 of an input token, reading 0.1."""
    into, write, read, out = usage
    return (into + 1.25 * write + 0.1 * read) * price[0] + out * price[1]


def patch_of(row: dict) -> Patch:
    """Return the patch in a row of patches.jsonl."""
    return Patch(**{f.name: row[f.name] for f in fields(Patch) if f.name in row})


def print_audit(found: dict) -> None:
    """Print the counts as a table."""
    ends = ", ".join(f"{n} {status}" for status, n in found["status"].items())
    print(f"{found['diagnoses']} diagnoses: {ends}")
    for title in ("error_types", "repair_rate", "leaks_submitted", "leaks_shown"):
        print(title.replace("_", " "))
        for name, numbers in found[title].items():
            low, high = numbers["interval"]
            row = f"  {name:<34}{numbers['count']:>6} of {numbers['of']:<6}"
            row += f"{numbers['share']:>7.1%}   [{low:.1%}, {high:.1%}]" if numbers["of"] else ""
            print(row)
    print("not patched because")
    for reason, n in found["reasons"].items():
        print(f"  {reason:<34}{n:>6}")
    known = ((what, n) for what, n in found["a_patch"].items() if n is not None)
    print("a patch:", ", ".join(f"{n:.5g} {what}" for what, n in known))


def draw(rows: list[dict], count: int, path: Path) -> None:
    """Write some patches to a file, for reading by hand."""
    patched = [row for row in rows if row["status"] == "patched"]
    parts = []
    for row in random.Random(0).sample(patched, min(count, len(patched))):
        parts += [f"## step {row['step']}, sample {row['sample']}, slot {row['slot']}"]
        parts += [row["question"], *row["options"], f"gold: {row['answer']}"]
        shown = "patch:" + render(patch_of(row), "text")
        parts += ["response: " + plain(row["response"], 2000), shown]
        parts += [f"repaired: {row['repaired']}; leak (direct, partial, none): ____"]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8", errors="backslashreplace")


def main(argv: list[str] | None = None) -> None:
    """Audit the run that the command line names: print its counts, write them as audit.json.

    A run that cannot be audited is refused in one sentence, with exit code 2.
    """
    parser = argparse.ArgumentParser(description="Audit the patches of a run.")
    parser.add_argument("run", type=Path, help="the run's folder, or its patches.jsonl")
    parser.add_argument("--price", default="", help="dollars for a million tokens in and out, 3/15 "
                        "(default: what config.json of the run says)")
    parser.add_argument("--draw", type=int, default=0, metavar="N",
                        help="write N patches to patches_drawn.md, to be read by hand")
    args = parser.parse_args(argv)
    path = args.run if args.run.is_file() else args.run / "patches.jsonl"
    try:
        if not args.run.exists():
            raise ValueError(f"{args.run} does not exist")
        rows = diagnoses(path)
        found = audit(rows, args.price or price_of(path.parent))
        print_audit(found)
        path.with_name("audit.json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"as JSON: {path.with_name('audit.json')}; some to read: python guard.py {args.run} "
              "--draw 20")
        if args.draw:
            draw(rows, args.draw, path.with_name("patches_drawn.md"))
            print(f"{args.draw} patches to read: {path.with_name('patches_drawn.md')}")
    except (ValueError, OSError) as error:
        print(f"guard.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)


if __name__ == "__main__":
    main()
