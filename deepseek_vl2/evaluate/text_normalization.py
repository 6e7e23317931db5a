"""How VQA accuracy compares texts: the normalisation of the VQA challenge (Antol et al., arXiv 1505.00468, section 5).

The rules are those of the challenge's evaluation program, its peculiarities included, so that figures compare.
"""

import re

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """Every contraction by the forms in which one of its apostrophes was forgotten."""
    table = {"somebody'd": "somebodyd"}  # so in the challenge's program
    for word in _CONTRACTED.split():
        for mark in re.finditer("'", word):
            table[word[: mark.start()] + word[mark.end() :]] = word
    return table


_CONTRACTIONS = _contractions()


def normalize_vqa(text: str) -> str:
    """Bring an answer into the form in which VQA accuracy compares it.

    Punctuation goes, number words become digits, articles go, forgotten apostrophes of contractions come back.
    """
    words = _without_punctuation(re.sub(r"[\n\t]", " ", text).strip()).lower().split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """A mark beside a space goes, one between letters becomes a space; all go where a number has a comma in it."""
    has_comma_in_number = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if is_beside_space or has_comma_in_number else " ")
    return _FULL_STOP.sub("", result)
