"""Multiple choice: which option an answer means. One that names none, or several, is unreadable; nothing is guessed."""

import re
from collections.abc import Iterable, Mapping

_ALONE = re.compile(r"\W*([A-Za-z])\W*")  # "(B)", "B.", "b"
_LEADING = re.compile(
    r"""\W{0,3}([A-Z])(?:
        \s*[.:)\]](?=\s|$|\W)(?!\s*(?:(?:or|and)\b|,\s*[(\[][A-Z][)\]]))  # "B: text", "(B) text"; not "(A) or (B)"
        |
        (?!\W*(?:(?:or|and|nor|as\s+well)\b|(?:is|was)(?:n['’]t|\s+(?:not|wrong|incorrect|false))\b))
        (?!\W*[A-Z](?:\W*$|\W*\b(?:or|and|nor)\b|[^\w\s'’]|\s*\n))  # "A, B", "A - B", a letter a line
        (?:
            (?<=\*\*[A-Z])\*\*  # "**B** text"
            | [^\S\n]*\n  # a line by itself
            | (?<!I)(?:  # "I, as a model": a word
                \s*,(?=\s)
                | \s+[-–—](?=\s) | \s*[–—]
                | \s+(?:because|since|as)\b
                # Only such words: where letters name parts of the picture, "B is the root" describes one.
                | \s+is\s+(?:(?:the|a|most|more|clearly|probably|likely|definitely|only|best)\s+){0,3}
                  (?:correct|right|true|best|answer|option|choice)\b
            )
        )
    )""",
    re.VERBOSE,
)
_QUOTED_LETTER = r"[(\[\"'*]*[A-Z](?![A-Za-z'’])[)\]\"'*]*"
# "not A", "isn't (A)", "neither A nor B"; "(A) is wrong", "option A is not".
_DENIED = re.compile(
    rf"(?i:\b(?:can)?not|n['’]t|\bneither|\bnor)(?:\s+be)?(?:\s+(?:option|choice))?\s+{_QUOTED_LETTER}"
    rf"(?:\s+n?or\s+{_QUOTED_LETTER})*"
    r"|(?:\b(?i:answer|option|choice)\s+)?(?<![A-Za-z'’])"
    rf"{_QUOTED_LETTER}\s+(?:is|was)(?:n['’]t|\s+(?:not|wrong|incorrect|false))\b"
)
# The letter of a statement, but not of "A or B". A small one only at the end, where it cannot be a word: "the answer is
# a horse".
_STATED_LETTER = (
    r"[\"'*(\[$]*(?:([A-Z])(?![A-Za-z])"
    r"(?![)\]\"'*]*\s*(?:\b(?:or|and)\b|[,/])\s*[(\[\"'*]*(?:[A-HJ-Z](?![A-Za-z])|I(?![A-Za-z]|\s+[a-z])))"
    r"|([a-z])(?=\W*$))"
)
_CONNECTED = r"(?:\b(?:is|would be|should be)\b|是|为|[:：])"
_CONCLUSION = re.compile(
    rf"(?i:(?:\banswer\b|答案|(?:\b(?:option|choice)\b|选项)(?=\s*{_CONNECTED}))\s*{_CONNECTED}?\s*[:：]?\s*"
    rf"(?:\b(?:option|choice)\b\s*)?){_STATED_LETTER}"
)
_NAMED = re.compile(rf"(?i:\b(?:option|choice)\b|选项)\s*{_STATED_LETTER}")
_BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")
_STANDING = re.compile(r"(?<![A-Za-z'’])([A-Z])(?![A-Za-z'’])")
# "A dog", "I see": words, but not in "A or B", "A is right".
_WORD_NOT_LETTER = re.compile(r"(?<![A-Za-z])[AI](?=[^\S\n]+[A-Za-z])(?!\s+(?:or|and|is|as\s+well)\b)")


def choose_option(answer: str, options: Mapping[str, str]) -> str | None:
    """Find the option that an answer means.

    Looked for in this order; the first step that finds anything decides: a letter alone ("B", "(B)"); an option's text
    alone; a conclusion ("The answer is B"); an enumeration ("A. a cat, B. a dog"); a letter in front ("B. a cat", "B,
    because it barks"); a named option ("option B"); letters in brackets; options' texts within the answer; letters
    standing by themselves, but "A" and "I" not where they are words. What the answer denies ("not A", "A is wrong",
    "not a cat") counts for nothing.

    Args:
        answer: text of the model.
        options: text by capital letter.

    Returns:
        The letter; `None` if the answer names no option, or several at the deciding step.
    """
    text = answer.strip()
    alone = _ALONE.fullmatch(text)
    if alone is not None and alone[1].upper() in options:
        return alone[1].upper()
    claimed = _DENIED.sub("", text)
    leading = _LEADING.match(claimed)
    steps: tuple[Iterable[str], ...] = (
        (letter for letter, option in options.items() if _plain(option) == _plain(text)),
        _stated(_CONCLUSION, claimed, options),
        _enumerated(claimed, options),
        (leading[1],) if leading else (),
        _stated(_NAMED, claimed, options),
        _BRACKETED.findall(claimed),
        _mentioned(text, options),
        _STANDING.findall(_WORD_NOT_LETTER.sub("", claimed)),
    )
    for step in steps:
        found = {letter for letter in step if letter in options}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _stated(form: re.Pattern[str], answer: str, options: Mapping[str, str]) -> list[str]:
    """Letters of statements; "A" before an option's text is an article, "I" before a word a pronoun."""
    letters = []
    for match in form.finditer(answer):
        letter = (match[1] or match[2]).upper()
        rest = answer[match.end() :]
        is_article = letter == "A" and any(
            re.match(rf"\s+{re.escape(text)}\b", rest, re.I) for text in options.values()
        )
        is_pronoun = letter == "I" and re.match(r"\s+[a-z]", rest)
        if not (is_article or is_pronoun):
            letters.append(letter)
    return letters


def _enumerated(answer: str, options: Mapping[str, str]) -> list[str]:
    """Letters of options that stand at the beginning one after the other, each with its text; none if it is one."""
    forms = {
        letter: rf"[(\[]?{letter}[.):\]]+\s*(?i:{re.escape(text.strip())})(?!\w)"
        for letter, text in options.items()
        if text.strip()
    }
    item = f"(?:{'|'.join(forms.values())})"
    enumeration = re.match(rf"{item}(?:[\s,;.]*(?:\b(?:or|and)\b\s*)?{item})+", answer) if forms else None
    return [letter for letter, form in forms.items() if enumeration and re.search(form, enumeration[0])]


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .")


def _as_words(option: str) -> re.Pattern[str]:
    """Finds an option's text as whole words that are not denied, and a number not within another: "1" in "1.5"."""
    before = r"(?<![\w-])(?<!\d[.,/])" if option[0].isdigit() else r"(?<!\w)"
    after = r"(?!\w|[.,/-]\d)" if option[-1].isdigit() else r"(?!\w)"
    denied = r"(?<!\bnot )(?<!n't )(?<!n’t )(?<!\bnever )(?<!\bnot a )(?<!\bnot an )(?<!\bnot the )"
    return re.compile(denied + before + re.escape(option) + after)


def _mentioned(answer: str, options: Mapping[str, str]) -> list[str]:
    """Options whose text stands in the answer as whole words, not counting those within a longer one that does."""
    text = _plain(answer)
    plain = {letter: _plain(option) for letter, option in options.items()}
    there = {letter: option for letter, option in plain.items() if option and _as_words(option).search(text)}
    return [
        letter
        for letter, option in there.items()
        if not any(option in other and option != other for other in there.values())
    ]
