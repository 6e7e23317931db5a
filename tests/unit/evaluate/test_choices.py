"""Which option an answer means."""

import pytest

from deepseek_vl2.evaluate.choices import choose_option

ANIMALS = {"A": "cat", "B": "black cat", "C": "dog", "D": "Vitamin C"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        (" B. ", "B"),
        ("**C**", "C"),
        ("$\\boxed{C}$", "C"),
        ("A. cat", "A"),
        ("B) black cat", "B"),
        ("(C) dog, because it barks", "C"),
        ("C: dog", "C"),
        ("The answer is C.", "C"),
        ("The answer is C", "C"),
        ("the correct answer is (A) and not another", "A"),
        ("Answer: B", "B"),
        ("The correct option is D", "D"),
        ("I would take option B", "B"),
        ("The answer is option A", "A"),
        ("答案是C", "C"),
        ("答案：B", "B"),
        ("dog", "C"),
        ("Dog.", "C"),
        ("It is a dog", "C"),
        ("It is a black cat", "B"),  # the longer text holds the shorter
        ("vitamin C", "D"),  # the text of D, though C stands in it
        ("I think B is right", "B"),
        ("A dog", "C"),  # an article
        ("I choose [D] here", "D"),
        ("Because of its tail: A", "A"),
        ("The answer is b.", "B"),
        ("A is right", "A"),
    ],
)
def test_the_option_is_found(answer, letter):
    assert choose_option(answer, ANIMALS) == letter


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I do not know",
        "E",  # no such option
        "A or B",
        "(A) or (B)",
        "The answer is A. No, the answer is B.",
        "a cat or a dog",
        "A horse",  # an article, and no option
        "I see a horse",
        "category",  # within a word
        "The answer is a horse",
        "BC",
    ],
)
def test_what_names_no_option_or_several_is_unreadable(answer):
    assert choose_option(answer, ANIMALS) is None


@pytest.mark.parametrize(
    "answer",
    [
        "A. cat\nB. black cat\nC. dog",  # the options once more
        "A) cat B) black cat",
        "A: cat, B: black cat",
        "(A) cat\n(B) black cat",
        "A. Cat or C. dog",
        "A. cat, B. black cat and C. dog",
        "It is not a dog",
    ],
)
def test_several_options_one_after_the_other_are_no_answer(answer):
    assert choose_option(answer, ANIMALS) is None


def test_one_option_with_its_text_again_and_again_is_an_answer():
    assert choose_option("C. dog, C. dog, C. dog", ANIMALS) == "C"
    assert choose_option("C. dog. It is no cat.", ANIMALS) == "C"


NUMBERS = {"A": "1", "B": "2", "C": "15"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("There are 2 of them", "B"),
        ("It costs $15.", "C"),
        ("about 15, I think", "C"),
        ("1.7", None),
        ("about 1,500", None),
        ("-2", None),
        ("2/3", None),
        ("It costs $15,000", None),
    ],
)
def test_a_number_within_another_is_no_option(answer, letter):
    assert choose_option(answer, NUMBERS) == letter


def test_what_is_denied_is_no_option():
    changes = {"A": "increase", "B": "decrease"}
    assert choose_option("It will not increase", changes) is None
    assert choose_option("It will not increase but decrease", changes) == "B"


THINGS = {"A": "cat", "B": "dog", "C": "tree", "D": "house"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [  # the letter in front goes before what the rest of the answer mentions
        ("B\nThe cat is asleep under it", "B"),
        ("B\n\nThe dog chases the cat", "B"),
        ("B, because the cat is asleep", "B"),
        ("B - the cat is absent", "B"),
        ("B\u2014the cat is absent", "B"),
        ("B because the cat is asleep", "B"),
        ("B since the cat is asleep", "B"),
        ("B as the cat is asleep", "B"),
        ("B is correct, the cat is not", "B"),
        ("B is the right answer, not the cat", "B"),
        ("**B** The cat sleeps", "B"),
        ("B, not A", "B"),
        # where it is a word, the name of a part, or one of several, it does not
        ("A dog, because it barks", "B"),
        ("I see, because a dog barks", "B"),
        ("B is the cat", "A"),
        ("A, B", None),
        ("A\nB\nC", None),
        ("A\nB", None),
        ("A - B", None),
        ("A as well as B", None),
        ("(A), (B)", None),
        ("**A** or **B**", None),
        ("A is a cat, B is a dog", None),
        ("**A** is wrong, the dog is right", "B"),
        # what is denied is not said
        ("The answer is not A", None),
        ("The answer isn't (A)", None),
        ("Neither A nor B", None),
        ("It is B, not A", "B"),
        ("Option (A) is wrong, so (B).", "B"),
        ("(A) is wrong, (B) is right", "B"),
        ("Option A isn't right, it is option B", "B"),
        # a conclusion goes before a letter in front
        ("(A) is wrong. The correct answer is (B).", "B"),
        ("(A) shows a cat, (B) shows a dog. The answer is (B).", "B"),
        ("A: wrong\nB: right\nAnswer: B", "B"),
        ("A. It has no legs.\nB. It has four.\nThe answer is B.", "B"),
        ("B, because option A is asleep", "B"),
        # "A" in a statement is the letter, but before an option's text
        ("The answer is A because it has stripes.", "A"),
        ("The answer is A because the dog is small.", "A"),
        ("The answer is A as the tree is far away", "A"),
        ("Option A shows the animal.", "A"),
        ("The answer is A dog", "B"),
        ("The answer is A, I think", "A"),
        ("The answer is A or B", None),
        ("The answer is (A) and (C)", None),
    ],
)
def test_a_letter_in_front(answer, letter):
    assert choose_option(answer, THINGS) == letter


def test_letters_up_to_the_ninth():
    options = {letter: f"value {letter}{letter}" for letter in "ABCDEFGHI"}
    assert choose_option("I", options) == "I"
    assert choose_option("The answer is I.", options) == "I"
    assert choose_option("The answer is I think F", options) == "F"
    assert choose_option("H. value HH", options) == "H"
    assert choose_option("I believe that F", options) == "F"


def test_a_letter_alone_is_the_letter_even_where_it_is_a_text():
    assert choose_option("B", {"A": "B", "B": "A"}) == "B"
