"""nano's tokenizer: byte-level BPE cut like DeepSeek's, small, with one token for every coordinate.

The vocabulary is built anew each time from the phrases in `questions` and comes out the same: 256 bytes, the numbers 10
to 999, merges for the words of questions and answers, free places, the special tokens at the end. Capital letters
never join and digits do so in boxes only, so printed words and numbers are read sign by sign.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepseek_vl2.models.special_tokens import ADDED_TOKENS, BOS, EOS, PAD
from deepseek_vl2.nano import questions
from deepseek_vl2.nano.layouts import ROW_NAMES
from deepseek_vl2.nano.phrases import ANY_SHAPE_ZH, COLORS_ZH, SHAPES_ZH, row_in_words

VOCAB_SIZE = 1920
MODEL_MAX_LENGTH = 4096
NUM_INTEGERS = 1000
SPECIAL_TOKENS = (PAD, BOS, EOS, *ADDED_TOKENS)

# A coordinate of up to three digits behind "[" or ", "; any other digit alone; the marks of a list of boxes; a word
# with the space before it; other signs; line ends and spaces.
SPLIT_PATTERN = (
    r"(?<=\[|, )\p{N}{1,3}|\p{N}"
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
WORDS_ZH = (
    "找到",
    "请找到",
    "定位",
    "在哪里",
    "框出",
    "的",
    "所有的",
    "图中",
    "有几个",
    "是什么",
    "颜色",
    "形状",
    "。",
    "？",
)
MORE_ANSWERS = (
    "image_1",
    "This is image_1: ",
    "yes",
    "no",
    "left",
    "right",
    "above",
    "below",
    "zero",
    "one",
    "two",
    "three",
    "none",
    "both",
)


def _corpus() -> Iterator[str]:
    """What merges are learnt from: phrases weigh more than other words, so their merges come first."""
    for phrase in questions.all_phrases():
        yield from [phrase] * 4
    yield "[[0, 0, 0, 0], [0, 0, 0, 0]]\n\n: . "
    yield from (f" {word}" for word in MORE_WORDS)
    yield from MORE_ANSWERS
    yield from (f" {row_in_words(row)}" for row in ROW_NAMES)
    # Chinese is not cut into words by spaces; each is learnt by itself so that a colour and a shape stay two.
    yield from (*COLORS_ZH.values(), *SHAPES_ZH.values(), *ANY_SHAPE_ZH, *WORDS_ZH)


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
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + limit, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(_corpus(), trainer)
    return [(left, right) for left, right in json.loads(trained.to_str())["model"]["merges"]]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer: `VOCAB_SIZE` tokens, the same on every run.

    Raises:
        RuntimeError: If two merges give the same token.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = [str(n) for n in range(10, NUM_INTEGERS)]
    limit = VOCAB_SIZE - len(alphabet) - len(numbers) - len(SPECIAL_TOKENS)
    word_merges = _word_merges(alphabet, limit)
    # Places that words leave free, so that no id moves when words are added.
    reserved = [f"<|reserved_{number}|>" for number in range(limit - len(word_merges))]
    tokens = [*alphabet, *numbers, *(left + right for left, right in word_merges), *reserved]
    if len(set(tokens)) != len(tokens):
        raise RuntimeError("two merges give the same token")
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
        # As it stands in a box; elsewhere a number is cut into digits.
        found = tokenizer.encode(f"[{number}", add_special_tokens=False)
        if len(found) != 2:
            raise ValueError(f"the tokenizer cuts [{number} into {len(found)} tokens; this is not nano's tokenizer")
        ids.append(found[1])
    return ids
