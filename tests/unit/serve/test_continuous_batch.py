"""Rows that decode together get the tokens that they get alone, on nano's architecture with random weights."""

import pytest
import torch
from PIL import Image

from deepseek_vl2.nano.architecture import nano_processor, untrained_nano
from deepseek_vl2.serve.continuous_batch import ContinuousBatch, read_prompts
from deepseek_vl2.serve.inference import deepseek_generate
from deepseek_vl2.serve.row_sampling import RowSampler, Sampling, choose_tokens

RED, BLUE = Image.new("RGB", (100, 80), "red"), Image.new("RGB", (250, 100), "blue")
QUESTIONS = [("Where?", (RED,)), ("And a longer question, with no picture", ()), ("Both?", (RED, BLUE)), ("x", (BLUE,))]
NUM_NEW = 12


def messages(text, images):
    return [
        {"role": "<|User|>", "content": "<image>\n" * len(images) + text, "images": list(images)},
        {"role": "<|Assistant|>", "content": ""},
    ]


@pytest.fixture(scope="module")
def parts():
    processor = nano_processor()
    model = untrained_nano(processor.tokenizer, seed=3).eval()
    torch.nn.init.normal_(model.language.lm_head.weight, std=0.3, generator=torch.Generator().manual_seed(5))
    return model, processor


def read(parts, question, chunk_size=-1):
    model, processor = parts
    text, images = question
    inputs = processor(conversations=messages(text, images), images=list(images)).to("cpu", dtype=model.dtype)
    with torch.no_grad():
        return read_prompts(model, model.prepare_inputs_embeds(**inputs), inputs.attention_mask, chunk_size)


def greedy_ids(parts, question):
    model, processor = parts
    text, images = question
    inputs = processor(conversations=messages(text, images), images=list(images)).to("cpu", dtype=model.dtype)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW)
    return ids[0, inputs.input_ids.shape[1] :].tolist()


@pytest.mark.parametrize("chunk_size", [-1, 7])
def test_rows_that_join_and_leave_at_any_time_get_the_tokens_they_get_alone(parts, chunk_size):
    """Question i joins before step 2i and leaves with its last token; row 1 is taken out halfway."""
    batch = ContinuousBatch(parts[0])
    expected = [greedy_ids(parts, question) for question in QUESTIONS]
    assert len({tuple(ids) for ids in expected}) == len(QUESTIONS)
    got: list[list[int]] = [[] for _ in QUESTIONS]
    running: list[int] = []
    eos = parts[1].eos_id
    for step in range(2 * len(QUESTIONS) + NUM_NEW):
        if step % 2 == 0 and step // 2 < len(QUESTIONS):
            number = step // 2
            prompt = read(parts, QUESTIONS[number], chunk_size)
            got[number].append(choose(prompt.logits, eos)[0])
            batch.join(prompt)
            running.append(number)
        for number, token in zip(running, choose(batch.step([got[n][-1] for n in running]), eos), strict=True):
            got[number].append(token)
        done = [row for row, number in enumerate(running) if len(got[number]) == NUM_NEW or (number == 1 and step == 8)]
        batch.leave(done)
        running = [number for row, number in enumerate(running) if row not in done]
        assert len(batch) == len(running)
        if not running:
            break
    assert got[0] == expected[0]
    assert got[1] == expected[1][: len(got[1])]
    assert 2 < len(got[1]) < NUM_NEW
    assert got[2:] == expected[2:]
    assert batch.num_positions == 0


def choose(logits, eos):
    """As `min_new_tokens` of `generate` does: never the end."""
    logits = logits.clone()
    logits[:, eos] = -torch.inf
    return logits.argmax(dim=-1).tolist()


def test_padding_leaves_with_the_row_that_needed_it(parts):
    batch = ContinuousBatch(parts[0])
    short, long = read(parts, QUESTIONS[3]), read(parts, QUESTIONS[2])
    lengths = short.cache.get_seq_length(), long.cache.get_seq_length()
    batch.join(short)
    batch.join(long)
    assert batch.num_positions == lengths[1] > lengths[0]
    batch.leave([1])
    assert batch.num_positions == lengths[0] == batch._cache.get_seq_length()


def test_a_prompt_that_cannot_join_leaves_the_others_as_they_were(parts, monkeypatch):
    batch = ContinuousBatch(parts[0])
    expected = greedy_ids(parts, QUESTIONS[3])
    short, long = read(parts, QUESTIONS[3]), read(parts, QUESTIONS[2])
    tokens = choose(short.logits, parts[1].eos_id)
    batch.join(short)
    real, num_calls = torch.cat, []

    def cat(*arguments, **options):
        num_calls.append(1)
        if len(num_calls) > 3:  # in the second layer
            raise RuntimeError("can't allocate memory")
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr("deepseek_vl2.serve.continuous_batch.torch.cat", cat)
        with pytest.raises(RuntimeError, match="allocate"):
            batch.join(long)
    assert len(batch) == 1
    assert {tuple(layer.keys.shape[i] for i in (0, 2)) for layer in batch._cache.layers} == {(1, batch.num_positions)}
    while len(tokens) < NUM_NEW:
        tokens += choose(batch.step(tokens[-1:]), parts[1].eos_id)
    assert tokens == expected


def test_a_temperature_near_0_is_greedy():
    logits = torch.tensor([[-3.0, 5.0, 4.0]])
    for temperature in (1e-300, 6e-38, 1e-6):
        sampler = RowSampler(Sampling(temperature=temperature), torch.tensor([0]), torch.device("cpu"))
        assert choose_tokens(logits, [sampler]) == [1]
    sampler = RowSampler(Sampling(temperature=1e-4), torch.tensor([0]), torch.device("cpu"))
    assert not sampler.is_greedy
    assert choose_tokens(logits, [sampler]) == [1]


@pytest.mark.parametrize(("temperature", "penalty"), [(0.0, 1.3), (0.7, 1.3), (1.0, 1.0)])
def test_a_seed_gives_what_the_library_gives_with_it(parts, temperature, penalty):
    model, processor = parts
    text, images = QUESTIONS[0]
    torch.manual_seed(11)
    expected = "".join(
        deepseek_generate(
            messages(text, images), model, processor, processor.tokenizer,
            max_length=NUM_NEW, temperature=temperature, top_p=0.8, repetition_penalty=penalty,
        )
    )  # fmt: skip
    inputs = processor(conversations=messages(text, images), images=list(images)).to("cpu", dtype=model.dtype)
    sampling = Sampling(temperature=temperature, top_p=0.8, repetition_penalty=penalty, seed=11)
    row = RowSampler(sampling, inputs.input_ids[0], torch.device("cpu"))
    neighbour = RowSampler(Sampling(temperature=1, seed=5), inputs.input_ids[0], torch.device("cpu"))
    batch, ids = ContinuousBatch(model), []
    prompt, other = read(parts, QUESTIONS[0]), read(parts, QUESTIONS[1])
    tokens = [*choose_tokens(prompt.logits, [row]), *choose_tokens(other.logits, [neighbour])]
    batch.join(prompt)
    batch.join(other)
    while len(ids) < NUM_NEW and tokens[0] != processor.eos_id:
        ids.append(tokens[0])
        tokens = choose_tokens(batch.step(tokens), [row, neighbour])
    assert processor.decode(ids) == expected
    assert expected
