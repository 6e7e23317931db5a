"""Tokens to text, piece by piece: whole letters only, and nothing from the first stop word on."""

from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what incomplete UTF-8 is decoded to


class LetterDecoder:
    """Decodes an answer token by token; an incomplete letter waits for its last byte.

    This relies on the tokenizer being one of bytes, where text of whole letters does not change with what follows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._waiting: list[int] = []

    def feed(self, token: int) -> str:
        """Takes a token; returns the text that is whole now, special tokens kept."""
        self._waiting.append(token)
        text = self._text()
        if text.endswith(_REPLACEMENT):
            return ""
        self._waiting.clear()
        return text

    def flush(self) -> str:
        """Returns the rest, even if it is no whole letter."""
        text = self._text()
        self._waiting.clear()
        return text

    def _text(self) -> str:
        # decode() of one list of ids gives one text.
        return self._tokenizer.decode(  # type: ignore[return-value]
            self._waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


class StopWordFilter:
    """Passes text on up to the first stop word, which is left out even if it comes in several pieces.

    The first is the one that is complete first; so what comes does not depend on how the text was cut into pieces. Text
    that may be the beginning of a stop word waits for the next piece.

    Attributes:
        is_over: Whether a stop word was found.
    """

    def __init__(self, stop_words: Sequence[str]) -> None:
        self.is_over = False
        self._words = [word for word in stop_words if word]
        self._pending = ""

    def feed(self, piece: str) -> str:
        """Takes a piece; returns the text that is certain not to belong to a stop word."""
        if self.is_over:
            return ""
        self._pending += piece
        found = [(start + len(word), start) for word in self._words if (start := self._pending.find(word)) >= 0]
        if found:
            self.is_over = True
            return self._take(min(found)[1])
        return self._take(len(self._pending) - _length_of_possible_start(self._pending, self._words))

    def flush(self) -> str:
        """Returns what waits for a piece that does not come any more."""
        return "" if self.is_over else self._take(len(self._pending))

    def _take(self, length: int) -> str:
        taken, self._pending = self._pending[:length], self._pending[length:]
        return taken


def until_stop_word(pieces: Iterable[str], stop_words: Sequence[str]) -> Iterator[str]:
    """Passes pieces on up to the first stop word, see `StopWordFilter`."""
    stop = StopWordFilter(stop_words)
    for piece in pieces:
        if text := stop.feed(piece):
            yield text
        if stop.is_over:
            return
    if text := stop.flush():
        yield text


def _length_of_possible_start(text: str, stop_words: Sequence[str]) -> int:
    """Length of the longest end of a text that a stop word begins with."""
    longest = max((len(word) - 1 for word in stop_words), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(word.startswith(text[-length:]) for word in stop_words):
            return length
    return 0
