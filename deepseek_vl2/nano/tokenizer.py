"""nano's tokenizer: byte-level BPE cut like DeepSeek's, small, with one token for every coordinate.

The vocabulary is built anew each time from the phrases in `questions` and comes out the same: 256 bytes, the numbers 10
to 999, merges for the words of questions and answers, the special tokens at the end. Capital letters never join, so
printed words are read letter by letter.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepseek_vl2.models.special_tokens import ADDED_TOKENS, BOS, EOS, PAD
from deepseek_vl2.nano import questions
from deepseek_vl2.nano.scenes import COLOR_NAMES, SHAPE_NAMES

VOCAB_SIZE = 1664
MODEL_MAX_LENGTH = 4096
NUM_INTEGERS = 1000
SPECIAL_TOKENS = (PAD, BOS, EOS, *ADDED_TOKENS)

# Up to three digits; the marks of a list of boxes; a word with the space before it; other signs; line ends and spaces.
SPLIT_PATTERN = (
    r"\p{N}{1,3}"
    r"|\], \[|\[\[|\]\]|, (?=\p{N}|\z)"
    r"|[^\r\n\p{L}\p{N}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+?(?=\[\[|\]\]|, |[^\p{P}\p{S}]|\z)[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Words that later questions are likely to need, so that they find their tokens ready; and answers that start with one.
_WORD_LIST = """
above and at below beside between big bigger biggest both bottom bright by center column corner count
different down find first five four it large larger largest last left letter letters line locate middle more
most name near nearest next no not on only or other over part photo please read right row same second side six
small smaller smallest tall than these they three top two under up yes zero
"""
MORE_WORDS = tuple(_WORD_LIST.split())
MORE_ANSWERS = ("yes", "no", "left", "right", "above", "below", "zero", "one", "two", "three", "none", "both")


def _phrases() -> Iterator[str]:
    """Every form of a question with every name that can stand in it, and the names by themselves."""
    nouns = [*SHAPE_NAMES, *questions.ANY_SHAPE, "word", "number"]
    names = [f"{color} {noun}" for color in COLOR_NAMES for noun in nouns] + nouns
    for name in names:
        yield from (name, f"the {name}", f"the {questions.plural(name)}", name.capitalize(), f"The {name}")
    for form in (*questions.MARKED_LOCATE, *questions.PLAIN_LOCATE, *questions.COLOR, *questions.SHAPE):
        yield form.format("the circle")
    for form in (*questions.LOCATE_ALL, *questions.COUNT):
        yield form.format("circles", one="circle")
    yield from (form.split("|>")[-1] for form in questions.DESCRIBE)
    yield from (*questions.READ_WORD, *questions.READ_NUMBER, *questions.READ_TEXT)
    yield "[[0, 0, 0, 0], [0, 0, 0, 0]]\n\n: . "


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _number_merges() -> list[tuple[str, str]]:
    """Merges that make one token of 10 to 999, whichever pair of digits joins first; a leading zero stays alone."""
    tens = [(str(n)[0], str(n)[1]) for n in range(10, 100)]
    hundreds = [(str(n)[:2], str(n)[2]) for n in range(100, NUM_INTEGERS)]
    hundreds += [(str(n)[0], str(n)[1:]) for n in range(100, NUM_INTEGERS) if str(n)[1] != "0"]
    return tens + hundreds


def _word_merges(alphabet: list[str], limit: int) -> list[tuple[str, str]]:
    """The first `limit` merges that BPE learns on the phrases."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = _pre_tokenizer()
    # The phrases weigh more than the other words, so their merges come first.
    corpus = [phrase for phrase in _phrases() for _ in range(4)] + [f" {word}" for word in MORE_WORDS] + [*MORE_ANSWERS]
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + limit, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(corpus, trainer)
    return [(left, right) for left, right in json.loads(trained.to_str())["model"]["merges"]]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer: `VOCAB_SIZE` tokens, the same on every run.

    Raises:
        RuntimeError: If the phrases do not give enough merges to fill the vocabulary.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = [str(n) for n in range(10, NUM_INTEGERS)]
    limit = VOCAB_SIZE - len(alphabet) - len(numbers) - len(SPECIAL_TOKENS)
    word_merges = _word_merges(alphabet, limit)
    tokens = [*alphabet, *numbers, *(left + right for left, right in word_merges)]
    if len(tokens) + len(SPECIAL_TOKENS) != VOCAB_SIZE or len(set(tokens)) != len(tokens):
        raise RuntimeError(
            f"the phrases give {len(word_merges)} merges where a vocabulary of {VOCAB_SIZE} takes {limit}; add words"
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=_number_merges() + word_merges))
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(path: str | Path) -> None:
    """Builds the tokenizer and writes its files to the folder `path`, which is made if missing."""
    build_tokenizer().save_pretrained(str(path))


def number_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids of the numbers 0 to 999, each of which is one token.

    Raises:
        ValueError: If the tokenizer cuts one of them into several.
    """
    ids = []
    for number in range(NUM_INTEGERS):
        found = tokenizer.encode(str(number), add_special_tokens=False)
        if len(found) != 1:
            raise ValueError(f"the tokenizer cuts {number} into {len(found)} tokens; this is not nano's tokenizer")
        ids += found
    return ids
