"""nano's tokenizer: any text comes back, a coordinate is one token, a printed word is read letter by letter."""

import random
import re

import pytest
from programs import Program
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deepseek_vl2.models.special_tokens import ADDED_TOKENS, BOS, EOS, PAD
from deepseek_vl2.nano.layouts import ROW_NAMES
from deepseek_vl2.nano.phrases import COLORS_ZH, SHAPES_ZH, plural
from deepseek_vl2.nano.scenes import COLOR_NAMES, SHAPE_NAMES, WORDS
from deepseek_vl2.nano.several import beginning_of
from deepseek_vl2.nano.tasks import TASKS, example_at
from deepseek_vl2.nano.tokenizer import (
    MORE_ANSWERS,
    MORE_WORDS,
    VOCAB_SIZE,
    build_tokenizer,
    number_token_ids,
    save_tokenizer,
)

TEXTS = [
    "你好 a  b\n12345",
    "  two  spaces , a ,b ,\tc\r\n\r\n\n x ",
    "<|User|>: <image>\nWhere is the red star?\n\n<|Assistant|>: ",
    "[[[1, 2], [3, 4]]], 007, 1000000 [] ]][[ ...!? \u00e9\u0301 🙂🙂 \x00\x7f",
    "x, y, 3, 4 , 5,6",
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def pieces(tokenizer, text):
    return [tokenizer.decode([index]) for index in encode(tokenizer, text)]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_random_text_comes_back(tokenizer):
    rng = random.Random(5)
    alphabet = "aZ 0919,.[]<|>\n\t\r é你🙂-_'\"" + "the"
    for _ in range(500):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 30)))
        assert tokenizer.decode(encode(tokenizer, text)) == text


def test_vocabulary(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE and VOCAB_SIZE % 16 == 0
    special = (PAD, BOS, EOS, *ADDED_TOKENS)
    first = VOCAB_SIZE - len(special)
    assert tokenizer.convert_tokens_to_ids(list(special)) == list(range(first, VOCAB_SIZE))
    assert set(tokenizer.all_special_ids) >= {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == (PAD, BOS, EOS)
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length == 4096
    assert all(len(encode(tokenizer, token)) == 1 for token in special)
    assert tokenizer.decode(encode(tokenizer, f"{BOS}red{EOS}"), skip_special_tokens=True) == "red"


def test_numbers_are_one_token(tokenizer):
    ids = number_token_ids(tokenizer)
    assert len(set(ids)) == 1000
    assert [tokenizer.decode([index]) for index in ids] == [str(number) for number in range(1000)]
    for number in (7, 21, 321, 305, 999):
        assert pieces(tokenizer, f"[[{number}, {number}]]") == ["[[", str(number), ", ", str(number), "]]"]
    assert pieces(tokenizer, "[1234567") == ["[", "123", *"4567"]
    assert pieces(tokenizer, "[007") == ["[", "0", "0", "7"]


def test_numbers_outside_boxes_are_digits(tokenizer):
    """As they are printed: a number that is read is written down digit by digit."""
    for number in (7, 21, 305, 9256, 1234567):
        for before, cut in (("", []), ("\n", ["\n"]), (": ", [":", " "]), ("image_", ["image", "_"])):
            assert pieces(tokenizer, f"{before}{number}") == [*cut, *str(number)]
    # A digit is the same token inside and outside, a number of two digits has one of its own.
    assert encode(tokenizer, "7") == encode(tokenizer, "[7")[1:]
    assert not set(encode(tokenizer, "21")) & set(encode(tokenizer, "[21")[1:])


def test_answer_with_boxes_is_cut_as_meant(tokenizer):
    answer = "<|ref|>red circle<|/ref|><|det|>[[12, 345, 5, 678], [1, 20, 300, 999]]<|/det|>, <|ref|>star<|/ref|>"
    assert pieces(tokenizer, answer) == (
        "<|ref|>/red/ circle/<|/ref|>/<|det|>/[[/12/, /345/, /5/, /678/], [/1/, /20/, /300/, /999/]]/<|/det|>/, /"
        "<|ref|>/star/<|/ref|>"
    ).replace("<|/", "<|\0").replace("/", "\n").replace("\0", "/").split("\n")


def test_printed_words_are_letters(tokenizer):
    for word in WORDS:
        assert pieces(tokenizer, word) == list(word)
        assert pieces(tokenizer, f"DOG\n{word}") == [*"DOG", "\n", *word]
    assert not [token for token in tokenizer.get_vocab() if re.fullmatch("Ġ?[A-Z]{2,}.*", token)]


def test_words_of_questions_and_answers_are_one_token(tokenizer):
    for task in TASKS:
        for index in range(40):
            example = example_at("test", index, task)
            texts = [text for turn in example.turns for text in (turn.question, turn.answer)]
            for text in (*texts, beginning_of(3, is_numbered=True)):
                for word in re.findall(r" ?[A-Za-z]?[a-z]+", re.sub(r"<\|.*?\|>", "\n", text)):
                    if not re.search("[A-Z]{2}", word):
                        # Before a capital letter, as at the beginning of a sentence, the space may stand alone.
                        found = [piece for piece in pieces(tokenizer, word) if not (piece == " " and word.istitle())]
                        # Right behind a mark a plural is its noun and its ending.
                        assert len(found) == 1 or (len(found) == 2 and word == plural(found[0])), word
    for word in (*COLORS_ZH.values(), *SHAPES_ZH.values(), *(f" {row.capitalize()}" for row in ROW_NAMES)):
        assert len(encode(tokenizer, word)) == 1, word
    for word in (
        *(f" {word}" for word in (*MORE_WORDS, *SHAPE_NAMES, *COLOR_NAMES)),
        *filter(str.isalpha, MORE_ANSWERS),
        *COLOR_NAMES,
    ):
        assert len(encode(tokenizer, word)) == 1, word


def test_colour_and_shape_stay_two_tokens_in_chinese(tokenizer):
    for color in COLORS_ZH.values():
        for shape in SHAPES_ZH.values():
            assert pieces(tokenizer, f"<|ref|>{color}的{shape}<|/ref|>") == ["<|ref|>", color, "的", shape, "<|/ref|>"]


def test_free_places_come_before_the_special_tokens(tokenizer):
    """Words that come later take them, so that no other id moves."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    reserved = [index for index, token in enumerate(tokens) if token.startswith("<|reserved_")]
    last = VOCAB_SIZE - len((PAD, BOS, EOS, *ADDED_TOKENS))
    assert reserved == list(range(last - len(reserved), last)) and reserved
    assert [tokens[index] for index in reserved] == [f"<|reserved_{number}|>" for number in range(len(reserved))]
    assert not set(encode(tokenizer, "<|reserved_0|>")) & set(reserved)  # no text says them


def test_saved_tokenizer_loads_with_the_same_ids(tokenizer, tmp_path):
    save_tokenizer(tmp_path / "new" / "folder")
    for loader in (AutoTokenizer, PreTrainedTokenizerFast):
        loaded = loader.from_pretrained(tmp_path / "new" / "folder")
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert type(loaded.backend_tokenizer.pre_tokenizer).__name__ != "Metaspace"
        assert loaded.padding_side == "left" and loaded.pad_token_id == tokenizer.pad_token_id
        assert loaded.model_max_length == 4096
        for text in TEXTS:
            assert encode(loaded, text) == encode(tokenizer, text)
            assert loaded.decode(encode(loaded, text)) == text


def print_tokenizer():
    print(hash("a"), build_tokenizer().backend_tokenizer.to_str(), sep="\n", end="")


def test_every_run_builds_the_same_file(tokenizer):
    """Another process has another hash seed, so an order that came from a set or dict would show."""
    other = Program(print_tokenizer).finish()
    seed, text = other.stdout.split("\n", 1)
    assert int(seed) != hash("a")
    assert text == tokenizer.backend_tokenizer.to_str()


def test_padding_is_on_the_left(tokenizer):
    batch = tokenizer(["red", "What color is the circle?"], padding=True)
    assert batch["input_ids"][0][:-1] == [tokenizer.pad_token_id] * 5
    assert batch["attention_mask"][0] == [0] * 5 + [1]


def test_foreign_tokenizer_has_no_number_tokens(tokenizer):
    other = build_tokenizer()
    other.backend_tokenizer.add_tokens(["8"])
    with pytest.raises(ValueError, match=r"\[18 into 3"):
        number_token_ids(other)
