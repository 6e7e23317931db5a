"""Batches on nano's architecture with random weights: each answer is that of its question alone."""

import random

import pytest
import torch

from deepseek_vl2.nano.architecture import nano_processor, untrained_nano
from deepseek_vl2.nano.scenes import random_scene
from deepseek_vl2.serve.batch_generation import RowSeededNoise, Sampling, answer_batch
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


@pytest.mark.parametrize("options", [{}, {"chunk_size": 7}, {"repetition_penalty": 1.3}])
def test_a_batch_gives_each_questions_own_answer(loaded, prompts, options):
    alone = [ask(loaded, [prompt], **options)[0] for prompt in prompts]
    assert len({answer.text for answer in alone}) > 1
    assert ask(loaded, prompts, **options) == alone
    assert ask(loaded, prompts[::-1], **options) == alone[::-1]


def test_a_seed_draws_the_same_answer_in_every_batch(loaded, prompts):
    def draw(prompts, seeds):
        return ask(loaded, prompts, sampling=Sampling(1.5, 0.9, seeds))

    alone = [draw([prompt], (seed,))[0] for prompt, seed in zip(prompts, (3, 4, 5), strict=True)]
    assert draw(prompts, (3, 4, 5)) == alone
    assert draw(prompts, (6, 7, 8)) != alone
    assert alone != ask(loaded, prompts)
    torch.manual_seed(1)  # what others draw has no part in it
    assert draw(prompts[:2], (3, 4)) == alone[:2]


def test_noise_draws_by_the_softmax_and_never_what_is_excluded():
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    scores = torch.cat((probabilities.log(), torch.tensor([-torch.inf])))[None]
    noise = RowSeededNoise([1])
    draws = torch.cat([noise(None, scores).argmax(dim=1) for _ in range(4000)])
    counts = torch.bincount(draws, minlength=4)
    assert counts[3] == 0
    assert (counts[:3] / 4000 - probabilities).abs().max() < 0.03  # about four standard deviations


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
    processor = loaded.processor
    ids = processor.encode("<|ref|>red<|/ref|>", bos=False, eos=True)

    def generate(input_ids, **options):
        return torch.cat((input_ids, torch.tensor([[*ids, processor.pad_id]] * len(input_ids))), dim=1)

    monkeypatch.setattr(loaded.model, "generate", generate)
    (answer,) = ask(loaded, prompts[:1])
    assert answer == ("<|ref|>red<|/ref|>", len(ids) - 1, False)
