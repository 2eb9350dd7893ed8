"""The verifier: each test names the mistake it catches; expected values are worked out by hand."""

import math
import random
import socket
import time

import pytest

import reward

pytestmark = pytest.mark.quick

COLOURS = ("A. red", "B. blue", "C. green", "D. A man in white")
FOURTEEN = tuple(f"{letter}. thing {i}" for i, letter in enumerate("ABCDEFGHIJKLMN"))


def say(answer, thought="Because."):
    return f"<think>{thought}</think>\n<answer>{answer}</answer>"


# --- parse_answer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer, whole",
    [
        (say(" B \n"), "B", "B"),
        ("<answer>A</answer> or <answer>B</answer>", "A", "A"),  # several: the first
        ("<answer>A<answer>B</answer></answer>", "A<answer>B", "A<answer>B"),  # nested
        ("</answer> <answer>B</answer>", "B", "B"),  # a stray closing tag before it
        (" B ", None, "B"),  # no answer
        ("<answer>B", None, "<answer>B"),  # unclosed, as when cut off
        ("B</answer>", None, "B</answer>"),
        ("x<answer> \n</answer>", None, "x<answer> \n</answer>"),  # empty
        ("<Answer>B</Answer>", None, "<Answer>B</Answer>"),  # tags are small letters
        ("", None, None),
        (" \n", None, None),
    ],
)
def test_parse_answer(text, answer, whole):
    """Catches: the last answer taken, an empty one kept, raw text scored in training."""
    assert reward.parse_answer(text) == answer
    assert reward.parse_answer(text, fallback=True) == whole


def test_fallback_reaches_the_score():
    """Catches: training that pays for a letter without tags, evaluation that does not."""
    assert reward.accuracy("multiple choice", "B", "B", COLOURS) == 0.0
    assert reward.accuracy("multiple choice", "B", "B", COLOURS, fallback=True) == 1.0
    assert reward.accuracy("multiple choice", "B", "B", COLOURS, "strict", fallback=True) == 1.0
    assert reward.accuracy("regression", "4", "4") == 0.0


# --- format ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think>a\nb</think><answer>B</answer>", 1.0),
        ("<think>a</think> \n\n <answer>B\n</answer>", 1.0),
        ("<think></think><answer></answer>", 1.0),  # the convention; the answer still scores 0
        (" <think>a</think><answer>B</answer>", 0.0),  # anything before or behind
        ("<think>a</think><answer>B</answer>\n", 0.0),
        ("<think>a</think> so <answer>B</answer>", 0.0),  # between
        ("<answer>B</answer><think>a</think>", 0.0),  # order
        ("<think>a</think><answer>B", 0.0),  # unclosed
        ("<think>a<answer>B</answer>", 0.0),
        ("<answer>B</answer>", 0.0),
        ("<think>a</think><answer>A</answer><answer>B</answer>", 0.0),  # one tag twice
        ("<think>a<think>b</think><answer>B</answer>", 0.0),
        ("<think>a</think></think><answer>B</answer>", 0.0),
        ("<think>say <answer>A</answer></think><answer>B</answer>", 0.0),  # nested
        ("<think>a</think><answer><think>B</think></answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format_reward(text, expected):
    """Catches: search for fullmatch, a dot that stops at newlines, repeated or nested tags paid."""
    assert reward.format_reward(text) == expected


# --- multiple choice ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    "B|b|(B)|(b)|[B]|B.|b.|B)|B:|**B**|'B'|$B$|\\boxed{B}|（Ｂ）|B。|Option B|option b|Answer: B"
    "|B, B|The answer is B|The answer is B.|the answer is b|So the correct answer is (b) blue"
    "|I think B|B. blue|b. blue|b. bluish|(B) Blue.|B: blue|B blue|B - blue|**B.** blue"
    "|B. it has the colour of the sky|B. A ball that is blue|B is right because it is blue|blue"
    "|Blue|blue.|'blue'|the answer is blue|答案是B|B or G".split("|"),  # there is no option G
)
def test_lenient_accepts_what_a_person_reads_as_b(answer):
    """Catches: a right answer sent to the teacher because of a bracket or a full stop."""
    assert reward.choice(answer, COLOURS) == "B"
    assert reward.accuracy("multiple choice", say(answer), "B", COLOURS) == 1.0
    assert reward.accuracy("multiple choice", say(answer), "A", COLOURS) == 0.0


@pytest.mark.parametrize(
    "answer",
    "A and B|A, B|A/B|(A) (B)|AB|A B C D|B, not A|not B|The answer is not B|It isn't (b)"
    "|B. red|B - red|red, blue|E|(E)|bluish|a dog|A dog|I see nothing|B-roll|B's"
    "|in the A.M.|about 20 °C|some 4 A|none|?|2".split("|"),
)
def test_lenient_refuses_several_or_none(answer):
    """Catches: hedging that pays, the article "A" or a unit read as an option, letters beyond D."""
    assert reward.choice(answer, COLOURS) is None
    for gold in "ABCD":
        assert reward.accuracy("multiple choice", say(answer), gold, COLOURS) == 0.0


@pytest.mark.parametrize(
    "answer, options, letter",
    [
        ("D. A man in white", COLOURS, "D"),  # the article in an option's own text is not option A
        ("a man in white", COLOURS, "D"),
        ("A", COLOURS, "A"),
        ("A is right", COLOURS, "A"),
        ("A red", COLOURS, "A"),
        ("n", FOURTEEN, "N"),
        ("thing 13", FOURTEEN, "N"),
        ("thing 1", FOURTEEN, "B"),  # not the prefix of thing 10
        ("I", FOURTEEN, "I"),
        ("I think N", FOURTEEN, "N"),  # the pronoun
        ("N", FOURTEEN[:13], None),
        ("C", ("A. yes", "B. no"), None),
        ("right", ("A. left", "B. right"), "B"),
        ("The answer is right.", ("A. left", "B. right"), "B"),  # "right" is no filler word
        ("same", ("A. same", "B. same"), None),  # the text of two options
        ("B. same", ("A. same", "B. same"), "B"),
        ("man", ("man", "dog"), "A"),  # options without labels
        ("A dog", ("A man", "A dog"), "B"),
        ("red", ("(A) red", "(B) blue"), "A"),
        ("red", ("a) red", "b) blue"), "A"),
        ("-3", ("A. 3", "B. -3"), "B"),  # a sign is text
        ("A. -3", ("A. -3", "B. 3"), "A"),
        ("3", ("A. 1", "B. 2", "C. 3"), "C"),
        ("A", ("A. B", "B. A"), "A"),  # the letter comes before the text
        ("", ("A. ", "B. "), None),  # blank options
        ("B", ("A. ", "B. "), "B"),
        ("none", ("A. ", "B. "), None),
        ("...", ("A. ", "B. yes"), None),
        ("Option 2: it falls", ("A. Option 1: it rises", "B. Option 2: it falls"), "B"),
        ("Z", (), "Z"),  # no options known
        ("A ball", (), None),
    ],
)
def test_choice_within_the_options(answer, options, letter):
    """Catches: a fixed range A to E, an option's text taken apart, an ambiguous text guessed at."""
    assert reward.choice(answer, options) == letter


@pytest.mark.parametrize(
    "options, gold, right, wrong",
    [
        (("B. red", "A. blue"), "A", "A|A. blue|blue|The answer is A.", "B|B. red|red"),
        (("(b) red", "(a) blue"), "A", "(a)|(a) blue|Blue.", "(b)|(b) red|red"),
        (("B.red", "A.blue"), "A", "A|A.blue|blue", "B|B.red|red"),
        (("A. x", "C. y", "D. z"), "D", "D|D. z|z|I pick (D)", "C|y|B|A"),  # a gap
        (("A.M.", "P.M."), "B", "B|P.M.", "A|A.M.|P"),  # not labels: letters go by place
        (("A. x", "A. y"), "B", "B|A. y", "A|A. x|x"),  # nor these
    ],
)
def test_a_letter_is_the_one_that_its_option_bears(options, gold, right, wrong):
    """Catches: the verifier that goes by place, so that the wrong option is paid for."""
    for answers, score in ((right, 1.0), (wrong, 0.0)):
        for answer in answers.split("|"):
            assert reward.accuracy("multiple choice", say(answer), gold, options) == score, answer


def test_labels_in_another_order_are_checked_against_the_gold():
    """Catches: a gold letter that no option bears, accepted because there are enough options."""
    reward.check_gold("multiple choice", "D", ("A. x", "C. y", "D. z"))
    with pytest.raises(ValueError, match="names none of the 3 options"):
        reward.check_gold("multiple choice", "B", ("A. x", "C. y", "D. z"))


def test_strict_is_string_equality():
    """Catches: a strict score, the one others report, that is kinder or harsher than theirs."""
    for answer, expected in [("B", 1.0), (" B ", 1.0), ("b", 0.0), ("B.", 0.0), ("B. blue", 0.0)]:
        assert reward.accuracy("multiple choice", say(answer), " B", COLOURS, "strict") == expected
    assert reward.accuracy("multiple choice", say("yes"), "yes") == 1.0  # lenient is never harsher


def test_first_answer_counts():
    """Catches: a student that lists every letter in answers of its own and is paid for one."""
    text = "<think>x</think><answer>A</answer><answer>B</answer>"
    assert reward.accuracy("multiple choice", text, "A", COLOURS) == 1.0
    assert reward.accuracy("multiple choice", text, "B", COLOURS) == 0.0


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, gold, expected",
    [
        ("3", "3", 1.0),
        ("03", "3", 1.0),
        ("3.0", "3", 0.0),  # only one of the two has a point
        ("3", "3.0", 0.0),
        ("3.0", "3.00", 1.0),
        ("3.141", "3.14", 1.0),  # two decimals
        ("3.15", "3.14", 0.0),
        ("-3", "3", 0.0),
        ("1,000", "1,000", 1.0),
        ("1,000", "1000", 0.0),  # only one of the two has a comma
        ("1,000", "1000.0", 1.0),
        ("1e3", "1000", 1.0),
        ("٣", "3", 1.0),  # an Arabic three
        ("３", "3", 1.0),  # a full-width three
        ("²", "2", 0.0),  # superscript
        ("−3", "-3", 0.0),  # the Unicode minus
        ("3 meters", "3", 0.0),
        ("45%", "45", 0.0),
        ("three", "3", 0.0),
        ("nan", "3", 0.0),
        ("inf", "3", 0.0),
        ("1e999", "3", 0.0),
        ("nan", "nan", 0.0),  # a malformed gold pays nobody
        ("inf", "inf", 0.0),
        (",", "3", 0.0),
    ],
)
def test_numerical(answer, gold, expected):
    """Catches: float equality, a missing same-form rule, units parsed, nan or inf right."""
    assert reward.accuracy("numerical", say(answer), gold) == expected


@pytest.mark.parametrize(
    "answer, gold, expected",
    [
        ("4", "4", 1.0),
        ("3", "4", 0.75),  # 1 - 1/4
        ("5", "4", 0.75),
        ("4", "5", 0.8),  # 1 - 1/5: over the gold, not over the prediction
        ("-3", "-4", 0.75),
        ("9", "4", 0.0),  # never below 0
        ("-4", "4", 0.0),
        ("1,200.5", "1200.5", 1.0),
        ("0", "0", 1.0),
        ("-0.0", "0", 1.0),
        ("0.001", "0", 0.0),
        ("3 meters", "3", 0.0),
        ("nan", "4", 0.0),
        ("-inf", "4", 0.0),
        ("1e308", "-1e308", 0.0),  # the difference overflows
        ("1e308", "5e-324", 0.0),  # the quotient overflows
    ],
)
def test_regression(answer, gold, expected):
    """Catches: MRA in training, a negative reward, division by zero, a gold of 0 never right."""
    assert reward.accuracy("regression", say(answer), gold) == pytest.approx(expected)


@pytest.mark.parametrize(
    "pred, gold, official, family",
    [(3, 2, 0.1, 0.0), (5, 4, 0.6, 0.5), (10, 8, 0.6, 0.5), (1.1, 1.0, 0.9, 0.8), (4, 3, 0.4, 0.4)]
    + [(0.4, 0.5, 0.7, 0.6)]  # 0.2 in float32 is not below 1 - 0.8 in float32
    + [(7, 7, 1.0, 1.0), (1, 100, 0.0, 0.0), (0, 0, 1.0, 1.0), (1, 0, 0.0, 0.0)]
    + [(bad, 2, 0.0, 0.0) for bad in (math.nan, math.inf, -math.inf, 1e300, None)],
)
def test_mra_at_the_thresholds(pred, gold, official, family):
    """Catches: < for <=, float64 for float32, a threshold missing; five were measured."""
    assert reward.mra(pred, gold) == pytest.approx(official)
    assert reward.mra(pred, gold, "<") == pytest.approx(family)


def test_mra_between_the_thresholds():
    """Catches: a wrong grid. Between thresholds both forms count the bounds 5, ..., 50 % above."""
    for percent in (1, 6, 12, 23, 37, 49, 51, 99):
        expected = sum(percent < bound for bound in range(5, 55, 5)) / 10
        for sign in (1, -1):
            pred = 80 * (1 + sign * percent / 100)
            assert reward.mra(pred, 80) == pytest.approx(expected)
            assert reward.mra(pred, 80, "<") == pytest.approx(expected)


# --- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, gold, expected",
    [
        ("stop at the sign", "stop at the sign", 1.0),
        ("stop at sign", "stop at the sign", 0.75),  # one word of four is missing
        ("stop on sign", "stop at the sign", 0.5),  # one substituted, one missing
        ("stop it now", "stop", 0.0),  # two inserted for one: 1 - 2 is clamped
        ("stop", "stop at the sign", 0.25),
        ("Stop at the sign", "stop at the sign", 0.75),  # capitals count
        ("stop\nat  the\tsign", "stop at the sign", 1.0),  # any white space separates
        ("ABC", "", 0.0),
    ],
)
def test_ocr(answer, gold, expected):
    """Catches: characters for words, gold and answer exchanged, no clamp, newlines glued."""
    assert reward.accuracy("OCR", say(answer), gold) == pytest.approx(expected)


@pytest.mark.parametrize(
    "answer, gold, expected",
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The cat, sat!", "the cat sat", 1.0),
        # 1: two of three words, F 2/3; 2: one of two bigrams, F 1/2; L: F 2/3
        ("the cat ran", "the cat sat", (2 / 3 + 1 / 2 + 2 / 3) / 3),
        # 1: P 1, R 1/2, F 2/3; 2: P 1, R 1/3, F 1/2; L: F 2/3. Recall alone would give 4/9
        ("one two", "one two six ten", (2 / 3 + 1 / 2 + 2 / 3) / 3),
        # 1: F 1; no bigram; L: "sat" or "cat" alone, F 1/2
        ("sat cat", "cat sat", (1 + 0 + 1 / 2) / 3),
        ("dogs runs", "dog running", 1.0),  # stems
        ("Umbrella", "umbrella", 1.0),  # one word has no bigram: ROUGE alone would give 2/3
        ("红色", "红色", 1.0),  # ROUGE drops every character of it
        ("dog", "umbrella", 0.0),
        ("...", "umbrella", 0.0),
    ],
)
def test_free_form(answer, gold, expected):
    """Catches: recall or precision for F, ROUGE-L alone, no stemming, capitals compared."""
    assert reward.accuracy("free-form", say(answer), gold) == pytest.approx(expected)


def test_rouge_is_made_once_and_offline(monkeypatch):
    """Catches: a scorer per rollout, a stemmer that downloads, where there is no network."""

    def refuse(*_):
        raise AssertionError("network used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    reward._rouge_scorer.cache_clear()
    assert reward.accuracy("free-form", say("a red ball"), "a red ball") == pytest.approx(1.0)
    assert reward._rouge_scorer() is reward._rouge_scorer()


# --- golds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, answer, options",
    [
        ("numerical", "3 meters", ()),
        ("numerical", "45%", ()),
        ("numerical", "nan", ()),
        ("regression", "1e999", ()),
        ("regression", "", ()),
        ("free-form", " \n", ()),
        ("OCR", "", ()),
        ("multiple choice", "", COLOURS),
        ("multiple choice", "E", COLOURS),
        ("multiple choice", "A and B", COLOURS),
        ("multiple choice", "A", tuple(map(str, range(27)))),
        ("essay", "x", ()),
    ],
)
def test_check_gold_refuses(kind, answer, options):
    """Catches: a sample that no completion can ever solve, paid for in teacher calls."""
    with pytest.raises(ValueError):
        reward.check_gold(kind, answer, options)


@pytest.mark.parametrize(
    "kind, answer, options",
    [
        ("numerical", "1,000.5", ()),
        ("regression", "0", ()),
        ("free-form", "a red ball", ()),
        ("OCR", "红色", ()),
        ("multiple choice", "N", FOURTEEN),
        ("multiple choice", "B. blue", COLOURS),
        ("multiple choice", "yes", ()),
    ],
)
def test_check_gold_accepts_what_can_be_scored(kind, answer, options):
    """Catches: a good sample refused; what is accepted must score for its own text."""
    reward.check_gold(kind, answer, options)
    assert reward.accuracy(kind, say(answer), answer, options) == 1.0


def test_check_gold_covers_every_kind():
    """Catches: a kind of question that is neither exact nor graded, or both."""
    assert set(reward.KINDS) == {"multiple choice", "numerical", "free-form", "OCR", "regression"}
    assert set(reward.EXACT_KINDS) == {"multiple choice", "numerical"}
    assert not set(reward.EXACT_KINDS) & set(reward.GRADED_KINDS)


# --- whatever a student writes --------------------------------------------------------------------

GOLDS = {
    "multiple choice": "B",
    "numerical": "3",
    "regression": "3.5",
    "OCR": "stop at the sign",
    "free-form": "the man opens the red door",
}


def scores(text):
    """Every score that a completion can be given, checked for range."""
    out = [reward.format_reward(text)]
    for kind, gold in GOLDS.items():
        out.append(reward.accuracy(kind, text, gold, COLOURS))
    for mode in ("strict", "lenient"):
        out.append(reward.accuracy("multiple choice", text, "B", COLOURS, mode, fallback=True))
    assert all(isinstance(x, float) and 0.0 <= x <= 1.0 for x in out), (text[:80], out)
    assert out[-2] <= out[-1], f"strict above lenient for {text[:80]!r}"
    return out


def test_random_texts_raise_nothing():
    """Catches: any exception on any text, scores that are nan or outside 0 and 1."""
    draw = random.Random(0)
    pieces = list("ABab13.,;:-()[]{}*_'\"\\$%° \n\t\0\u2028\u200b") + ["e\u0301", "\ud800"]
    pieces += ["<answer>", "</answer>", "<think>", "</think>", "the answer is ", "option ", " not "]
    pieces += ["nan", "inf", "1e999", "−", "٣", "²", "½", "红", "🙂", "Ｂ", "n't ", "blue"]
    pieces += ["A man "]
    for _ in range(700):
        inside = "".join(draw.choices(pieces, k=draw.randrange(12)))
        scores(inside)
        scores(say(inside))


PIECES = ["<answer>", "</answer>", "<think>", "<think></think>", " ", "\n", "(", "( ", "B", "B "]
PIECES += ["b. ", ".", "*", "_", "-", "9", "1,", "the ", "the answer is ", "not ", "n't "]
PIECES += ["option ", "B. blue ", "a\u0301\u0323", "\ufdfa", "Ｂ"]


@pytest.mark.parametrize("piece", PIECES)
def test_no_pattern_is_quadratic_in_100_000_characters(piece):
    """Catches: patterns that backtrack, Unicode normalisation (quadratic in combining marks)."""
    text = piece * (100_000 // len(piece))
    start = time.process_time()
    for around in (text, "<answer>" + text, "B" + text + "!x"):
        reward.format_reward(around)
        reward.format_reward(say("B", around))
        reward.parse_answer(around, fallback=True)
        reward.choice(around, COLOURS)
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("piece", ["y", "9", "a b "])
def test_every_score_of_100_000_characters(piece):
    """Catches: recursion in the stemmer (a run of y), quadratic word or number comparison."""
    start = time.process_time()
    scores(say(piece * (100_000 // len(piece))))
    assert time.process_time() - start < 2.0
