"""Batches on nano's architecture with random weights: each answer is that of its question alone."""

import random

import pytest
import torch

from deepseek_vl2.nano.architecture import nano_processor, untrained_nano
from deepseek_vl2.nano.scenes import random_scene
from deepseek_vl2.serve import batch_generation
from deepseek_vl2.serve.batch_generation import answer_batch
from deepseek_vl2.serve.continuous_batch import ContinuousBatch
from deepseek_vl2.serve.row_sampling import Sampling
from deepseek_vl2.utils.io import LoadedModel

SIZES = [(112, 112), (224, 112), (150, 130)]


@pytest.fixture(scope="module")
def loaded():
    processor = nano_processor()
    model = untrained_nano(processor.tokenizer, seed=2).eval()
    return LoadedModel(processor.tokenizer, processor, model)


@pytest.fixture(scope="module")
def prompts(loaded):
    made = []
    for number, size in enumerate(SIZES):
        picture = random_scene(random.Random(number), size=size).draw()
        question = "<image>\n" + " ".join(["What is it?"] * (number + 1))
        made.append(
            loaded.processor.process_one(conversations=[{"role": "user", "content": question}], images=[picture])
        )
    return made


def ask(loaded, prompts, max_new_tokens=6, **options):
    return answer_batch(loaded.model, loaded.processor, prompts, max_new_tokens, **options)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 7}, {"samplings": [Sampling(repetition_penalty=1.3)]}])
def test_a_batch_gives_each_questions_own_answer(loaded, prompts, options):
    alone = [ask(loaded, [prompt], **options)[0] for prompt in prompts]
    assert len({answer.text for answer in alone}) > 1
    if "samplings" in options:
        options = {"samplings": options["samplings"] * len(prompts)}
    assert ask(loaded, prompts, **options) == alone
    assert ask(loaded, prompts[::-1], **options) == alone[::-1]


def test_answers_are_those_of_generate(loaded, prompts):
    for prompt in prompts:
        inputs = loaded.processor.batchify([prompt])
        output = loaded.model.generate(
            **inputs, max_new_tokens=6, do_sample=False, eos_token_id=loaded.processor.eos_id
        )
        (answer,) = ask(loaded, [prompt])
        assert answer.text == loaded.processor.decode(output[0, len(prompt) :].tolist())
        assert answer.is_cut_off and answer.num_new_tokens == 6


def test_rows_that_are_done_leave_and_the_others_go_on(loaded, prompts, monkeypatch):
    """Each question has another room for its answer: three rows are done at first, then three more, then the rest."""
    many = [prompts[number % 3] for number in range(8)]
    lengths = [len(prompt) for prompt in many]
    monkeypatch.setattr(loaded.model.config.language_config, "max_position_embeddings", max(lengths) + 3)
    monkeypatch.setattr(type(loaded.processor), "eos_id", -1)
    limits = [max(lengths) + 4 - length for length in lengths]
    alone = [ask(loaded, [prompt], max_new_tokens=100)[0] for prompt in many]
    widths, real = [], ContinuousBatch.step

    def step(batch, tokens):
        widths.append(len(batch))
        return real(batch, tokens)

    monkeypatch.setattr(ContinuousBatch, "step", step)
    assert ask(loaded, many, max_new_tokens=100) == alone
    assert [answer.num_new_tokens for answer in alone] == limits
    # The last token of a row needs no step.
    assert widths == [sum(step < limit for limit in limits) for step in range(1, max(limits))]
    assert len(set(widths)) == 3


def test_a_seed_draws_the_same_answer_in_every_batch(loaded, prompts):
    def draw(prompts, seeds):
        return ask(loaded, prompts, samplings=[Sampling(1.5, 0.9, seed=seed) for seed in seeds])

    alone = [draw([prompt], (seed,))[0] for prompt, seed in zip(prompts, (3, 4, 5), strict=True)]
    assert draw(prompts, (3, 4, 5)) == alone
    assert draw(prompts, (6, 7, 8)) != alone
    assert alone != ask(loaded, prompts)
    torch.manual_seed(1)  # what others draw has no part in it
    assert draw(prompts[:2], (3, 4)) == alone[:2]


def test_an_answer_has_the_room_that_its_own_question_leaves(loaded, prompts, monkeypatch):
    """Beside a longer question, too."""
    longest = max(len(prompt) for prompt in prompts)
    monkeypatch.setattr(loaded.model.config.language_config, "max_position_embeddings", longest + 1)
    monkeypatch.setattr(type(loaded.processor), "eos_id", -1)
    answers = ask(loaded, prompts, max_new_tokens=500)
    assert [answer.num_new_tokens for answer in answers] == [longest + 2 - len(prompt) for prompt in prompts]
    assert all(answer.is_cut_off for answer in answers)
    assert answers[0] == ask(loaded, prompts[:1], max_new_tokens=500)[0]


def test_an_answer_ends_before_eos(loaded, prompts, monkeypatch):
    ids = loaded.processor.encode("<|ref|>red<|/ref|>", bos=False, eos=True)
    wanted = iter(ids)
    monkeypatch.setattr(batch_generation, "choose_tokens", lambda logits, samplers: [next(wanted)])
    (answer,) = ask(loaded, prompts[:1], max_new_tokens=len(ids))
    assert answer == ("<|ref|>red<|/ref|>", len(ids) - 1, False)
    assert next(wanted, None) is None
