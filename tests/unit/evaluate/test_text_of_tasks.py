"""How each benchmark is asked: the prompts of VLMEvalKit for DeepSeek-VL2, and what samples must have."""

import pytest
from PIL import Image

from deepseek_vl2.evaluate.judges import FORMULA_CATEGORY
from deepseek_vl2.evaluate.samples import Sample
from deepseek_vl2.evaluate.tasks import MAX_NEW_TOKENS, TASKS

SIZE = (200, 100)
OPTIONS = {"A": "a cat", "B": "a dog"}
SHORT = "\nAnswer the question using a single word or phrase."


def sample(**fields):
    base = {"id": "1", "where": "line 2", "question": "What is it?", "pictures": ("a.png",), "sizes": (SIZE,)}
    return Sample(**{**base, "answers": ("dog",), **fields})


def choice(**fields):
    return sample(**{"options": OPTIONS, "answers": ("B",), **fields})


@pytest.mark.parametrize(
    ("task", "asked", "prompt"),
    [
        ("refcoco", sample(question="the cat on the left"), "<image>\n<|ref|>the cat on the left<|/ref|>."),
        ("grounding_f1", sample(question="cats"), "<image>\n<|ref|>cats<|/ref|>."),
        ("docvqa", sample(), "<image>\nWhat is it?" + SHORT),
        ("infovqa", sample(), "<image>\nWhat is it?" + SHORT),
        ("chartqa", sample(), "<image>\nWhat is it?" + SHORT),
        ("textvqa", sample(), "<image>\nWhat is it?" + SHORT),
        ("ocrbench", sample(), "<image>\nWhat is it?"),
        ("exact_match", sample(), "<image>\nWhat is it?"),
        ("exact_match", sample(question="Look: <image> What?"), "Look: <image> What?"),
        (
            "mmbench",
            choice(hint="It barks."),
            "<image>\nHint: It barks.\nQuestion: What is it?\nOptions:\nA. a cat\nB. a dog\n"
            "Please select the correct answer from the options above. \n",
        ),
        (
            "mmmu",
            choice(),
            "<image>\n<image 1> What is it?\nA. a cat\nB. a dog\nAnswer with the option's letter from the given "
            "choices directly. Answer the question using a single word or phrase.\n \n",
        ),
        (
            "mmmu",
            choice(question="Compare <image 1> and <image 2>.", pictures=("a.png", "b.png"), sizes=(SIZE, SIZE)),
            "<image><image>\n Compare <image 1> and <image 2>.\nA. a cat\nB. a dog\nAnswer with the option's letter "
            "from the given choices directly. Answer the question using a single word or phrase.\n \n",
        ),
    ],
)
def test_prompts(task, asked, prompt):
    pictures = [Image.new("RGB", size) for size in asked.sizes]
    question, answer = TASKS[task].messages(asked, pictures)
    assert question == {"role": "<|User|>", "content": prompt, "images": pictures}
    assert answer == {"role": "<|Assistant|>", "content": ""}


def test_multiple_choice_of_ai2d_and_mmstar_is_asked_as_that_of_mmbench():
    assert TASKS["ai2d"].ask(choice()) == TASKS["mmstar"].ask(choice()) == TASKS["mmbench"].ask(choice())
    assert MAX_NEW_TOKENS == 512


def test_conversations_are_asked_word_for_word():
    messages = (
        {"role": "<|User|>", "content": "<image>\nFirst?", "images": ["a.png"]},
        {"role": "<|Assistant|>", "content": "One.", "images": []},
        {"role": "<|User|>", "content": "<image>\n<image>\nThen?", "images": ["b.png", "c.png"]},
    )
    pictures = [Image.new("RGB", (10 + index, 10)) for index in range(3)]
    made = TASKS["docvqa"].messages(sample(messages=messages), pictures)
    assert [message["content"] for message in made] == ["<image>\nFirst?", "One.", "<image>\n<image>\nThen?", ""]
    assert [message.get("images") for message in made] == [pictures[:1], [], pictures[1:], None]


BOX = "<|ref|>x<|/ref|><|det|>[[100, 200, 500, 600]]<|/det|>"  # pixels 20, 20, 100, 60 of 200x100
TWO = "<|ref|>x<|/ref|><|det|>[[100, 200, 500, 600], [0, 0, 50, 50]]<|/det|>"


@pytest.mark.parametrize(
    ("task", "asked", "answer", "score", "is_readable"),
    [
        ("refcoco", sample(boxes=((20, 20, 100, 60),)), BOX, 1, True),
        ("refcoco", sample(boxes=((20, 20, 100, 60),)), TWO, 1, True),  # the first counts
        ("refcoco", sample(boxes=((120, 20, 190, 60),)), BOX, 0, True),
        ("refcoco", sample(boxes=((20, 20, 100, 60),)), "on the left", 0, False),
        ("grounding_f1", sample(boxes=((20, 20, 100, 60),)), TWO, 2 / 3, True),
        ("grounding_f1", sample(boxes=((20, 20, 100, 60),)), "nothing", 0, False),
        ("grounding_f1", sample(boxes=()), "nothing", 1, True),
        ("mmbench", choice(), "The answer is B.", 1, True),
        ("mmbench", choice(), "a cat", 0, True),
        ("mmbench", choice(), "no idea", 0, False),
        ("docvqa", sample(), "Dog.", 1, True),
        ("docvqa", sample(), " ", 0, False),
        ("docvqa", sample(answers=("dogs", "dog")), "doge", 3 / 4, True),
        ("chartqa", sample(answers=("20",)), "19.5", 1, True),
        ("textvqa", sample(answers=("dog",) * 3 + ("cat",) * 7), "a dog", 0.9, True),
        ("ocrbench", sample(answers=("DOG",), category="Handwriting Recognition"), "It says dog", 1, True),
        ("ocrbench", sample(answers=("x^2",), category=FORMULA_CATEGORY), "x ^ 2", 1, True),
        ("ocrbench", sample(answers=("X^2",), category=FORMULA_CATEGORY), "x^2", 0, True),
        ("ocrbench", sample(answers=("",)), "", 0, False),
        ("ocrbench", sample(answers=("Smith Co.",)), "Smith Co.", 1, True),
        ("docvqa", sample(answers=("Philip Morris Inc.",)), "Philip Morris Inc.", 1, True),
        ("docvqa", sample(answers=("Philip Morris Inc",)), "Philip Morris Inc.", 1, True),
        ("chartqa", sample(answers=("U.S.",)), "U.S.", 1, True),
        ("exact_match", sample(), "dog.", 1, True),
        ("exact_match", sample(), "a dog", 0, True),
        ("exact_match", sample(answers=("A lamp.",)), "A lamp.", 1, True),
        ("exact_match", sample(answers=("A lamp.",)), "a lamp", 1, True),
        ("exact_match", sample(answers=("...",)), "dots", 0, True),
    ],
)
def test_judgements(task, asked, answer, score, is_readable):
    judgement = TASKS[task].judge(asked, answer)
    assert judgement.score == pytest.approx(score)
    assert judgement.is_readable is is_readable


def test_a_judgement_says_what_it_read():
    assert TASKS["mmbench"].judge(choice(), "(A) it is").understood == "A"
    judged = TASKS["refcoco"].judge(sample(boxes=((20, 20, 100, 60),)), BOX)
    assert judged.boxes == ((100 / 999 * 200, 200 / 999 * 100, 500 / 999 * 200, 600 / 999 * 100),)
    assert judged.iou == pytest.approx(0.9965, abs=1e-4)  # by hand: 3,197.6 of 3,208.8 square pixels
    judged = TASKS["grounding_f1"].judge(sample(boxes=((20, 20, 100, 60), (150, 50, 200, 100))), TWO)
    assert judged.counts == (1, 2, 2)
    assert judged.iou == pytest.approx(0.4983, abs=1e-4)  # the mean of that and of none


def test_boxes_are_not_rounded_to_pixels_before_they_are_compared():
    """On a small picture that would cost a quarter of the IoU."""
    expected = (46.71, 102.66, 55.09, 108.85)
    asked = sample(boxes=(expected,), sizes=((112, 112),))
    judged = TASKS["refcoco"].judge(asked, "<|ref|>x<|/ref|><|det|>[[416, 916, 486, 970]]<|/det|>")
    assert judged.iou == pytest.approx(0.9, abs=1e-3)  # 47.1 of 52.3 square pixels


def test_mmmu_gets_its_pictures_in_the_order_in_which_they_are_named():
    names, sizes = ("a.png", "b.png", "c.png"), ((1, 1), (2, 2), (3, 3))
    asked = choice(
        hint="See <image 2>.",
        question="Compare <image 2> with <image 1>.",
        options={"A": "<image 2>", "B": "none"},
        pictures=names,
        sizes=sizes,
    )
    arranged = TASKS["mmmu"].arrange(asked)
    assert arranged.hint == "See <image 1>." and arranged.question == "Compare <image 2> with <image 3>."
    assert arranged.options == {"A": "<image 4>", "B": "none"}
    assert arranged.pictures == ("b.png", "b.png", "a.png", "b.png")
    assert arranged.sizes == ((2, 2), (2, 2), (1, 1), (2, 2))
    unnamed = choice(pictures=names, sizes=sizes)
    assert TASKS["mmmu"].arrange(unnamed) == unnamed
    assert TASKS["mmbench"].arrange(asked) == asked
    with pytest.raises(ValueError, match=r"<image 4> is named, and there are 3 picture\(s\)"):
        TASKS["mmmu"].prepare(choice(question="What is in <image 4>?", pictures=names, sizes=sizes))
    assert TASKS["grounding_f1"].judge(sample(boxes=()), TWO).iou is None


@pytest.mark.parametrize(
    ("task", "asked", "reason"),
    [
        ("refcoco", sample(), "one expected box is needed, there are 0"),
        ("refcoco", sample(boxes=((1, 1, 2, 2), (3, 3, 4, 4))), "there are 2"),
        *[
            (
                task,
                sample(boxes=((1, 1, 2, 2),), options=OPTIONS, pictures=(), sizes=()),
                r"no picture \(image, image_p",
            )
            for task in TASKS
            if task != "exact_match"
        ],
        ("grounding_f1", sample(), "no expected boxes"),
        ("docvqa", sample(answers=()), "no answer"),
        ("docvqa", sample(answers=(" ", "")), "the answer to compare with has no text"),
        ("textvqa", sample(answers=("a", "b", "c")), "3 answers"),
        ("mmmu", sample(answers=("A",)), "0 option"),
        ("mmmu", choice(answers=("C",)), "'C' is none of the options' letters A, B"),
        ("mmmu", choice(answers=()), "no answer"),
    ],
)
def test_samples_without_what_a_task_needs_are_refused(task, asked, reason):
    with pytest.raises(ValueError, match=reason):
        TASKS[task].check(asked)


def test_samples_with_what_a_task_needs_are_taken():
    TASKS["grounding_f1"].check(sample(boxes=()))
    TASKS["refcoco"].check(sample(boxes=((1, 1, 2, 2),), answers=()))
    TASKS["mmmu"].check(choice())
    TASKS["textvqa"].check(sample(answers=("a",) * 10))
    TASKS["exact_match"].check(sample(pictures=(), sizes=()))
