"""Generation: the flows of the README, chunked prefill, beams, sampling, streaming, stopping."""

import copy
import threading

import pytest
import torch
from small_models import BOS_ID, EOS_ID, PAD_ID, join, make_inputs, seeded, vl_config
from tokenizers import Tokenizer, decoders, models
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, TextIteratorStreamer

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.generation import DEFAULT_CHUNK_SIZE, check_chunk_size

GREEDY = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": PAD_ID, "eos_token_id": EOS_ID}
ROWS = [make_inputs([(2, 1)], seed=1), make_inputs([(1, 1), (1, 2)], seed=2), make_inputs([], num_text=9, seed=3)]
BATCH = join(ROWS)
LENGTH = BATCH["input_ids"].shape[1]


def new_tokens(output: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """Ids behind the prompt; a row that ended early is cut at its end."""
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(EOS_ID) + 1] if EOS_ID in row else row for row in rows]


def token_by_token(model, inputs: dict[str, torch.Tensor], count: int = 8) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens of one prompt and the logits they come from, without cache or generate."""
    embeds, ids, steps = model.prepare_inputs_embeds(**inputs), [], []
    for _ in range(count):
        steps.append(model.language(inputs_embeds=embeds).logits[0, -1])
        ids.append(steps[-1].argmax().item())
        if ids[-1] == EOS_ID:
            break
        embeds = torch.cat((embeds, model.get_input_embeddings()(torch.tensor([[ids[-1]]]))), dim=1)
    return ids, torch.stack(steps)


@pytest.fixture(scope="module")
def expected(vl_model) -> list[list[int]]:
    """What each prompt gives alone, token by token."""
    with torch.no_grad():
        return [token_by_token(vl_model, row)[0] for row in ROWS]


def test_whole_prompt(vl_model, expected):
    embeds = vl_model.prepare_inputs_embeds(**BATCH)
    output = vl_model.generate(inputs_embeds=embeds, **BATCH, **GREEDY)
    assert torch.equal(output[:, :LENGTH], BATCH["input_ids"])
    assert new_tokens(output, BATCH) == expected


def test_language_model_alone_returns_new_ids_only(vl_model, expected):
    embeds = vl_model.prepare_inputs_embeds(**BATCH)
    output = vl_model.language.generate(inputs_embeds=embeds, attention_mask=BATCH["attention_mask"], **GREEDY)
    assert output.shape == (3, 8)
    assert new_tokens(output, {"input_ids": output[:, :0]}) == expected


@pytest.mark.parametrize("chunk_size", [1, 3, 64, LENGTH - 1, LENGTH, LENGTH + 5, -1])
def test_prompt_in_chunks(vl_model, expected, chunk_size):
    embeds, cache = vl_model.incremental_prefilling(**BATCH, chunk_size=chunk_size)
    assert cache.get_seq_length() == LENGTH - 1
    output = vl_model.generate(inputs_embeds=embeds, **BATCH, past_key_values=cache, **GREEDY)
    assert torch.equal(output[:, :LENGTH], BATCH["input_ids"])
    assert new_tokens(output, BATCH) == expected


def test_a_chunk_larger_than_the_context_is_refused(vl_model):
    limit = vl_model.config.language_config.max_position_embeddings
    for chunk_size in (100_000, limit + 1):
        with pytest.raises(ValueError, match=f"chunk_size {chunk_size} is larger than the context of {limit} tokens"):
            vl_model.incremental_prefilling(**BATCH, chunk_size=chunk_size)
    vl_model.incremental_prefilling(**BATCH, chunk_size=limit)
    with pytest.raises(ValueError, match="chunk_size 51 is larger than the context of 50 tokens"):
        check_chunk_size(51, 50)
    check_chunk_size(DEFAULT_CHUNK_SIZE, 50)


@pytest.mark.parametrize("chunk_size", [4, -1])
def test_a_cache_that_was_cut_back_is_read_on_from_there(vl_model, expected, chunk_size):
    _, cache = vl_model.incremental_prefilling(**BATCH, chunk_size=9)
    cache.crop(-(LENGTH // 2))
    kept = [layer.keys.clone() for layer in cache.layers]
    embeds, same = vl_model.incremental_prefilling(**BATCH, chunk_size=chunk_size, past_key_values=cache)
    assert same is cache
    assert cache.get_seq_length() == LENGTH - 1
    for keys, layer in zip(kept, cache.layers, strict=True):
        assert torch.equal(layer.keys[:, :, : keys.shape[2]], keys)
    output = vl_model.generate(inputs_embeds=embeds, **BATCH, past_key_values=cache, **GREEDY)
    assert new_tokens(output, BATCH) == expected
    with pytest.raises(ValueError, match="used before or belongs to another prompt"):
        vl_model.incremental_prefilling(**BATCH, past_key_values=cache)


@pytest.mark.parametrize("row", range(3))
def test_rows_alone_in_every_flow(vl_model, expected, row):
    inputs = ROWS[row]
    embeds, cache = vl_model.incremental_prefilling(**inputs, chunk_size=5)
    again = copy.deepcopy(cache)
    mask = inputs["attention_mask"]
    outputs = [
        vl_model.generate(**inputs, **GREEDY),
        vl_model.generate(inputs["input_ids"], **{k: v for k, v in inputs.items() if k != "input_ids"}, **GREEDY),
        vl_model.generate(inputs_embeds=embeds, **inputs, **GREEDY),
        vl_model.generate(inputs_embeds=embeds, **inputs, past_key_values=cache, **GREEDY),
    ]
    assert [new_tokens(output, inputs)[0] for output in outputs] == [expected[row]] * 4
    for kwargs in ({}, {"past_key_values": again}):
        output = vl_model.language.generate(inputs_embeds=embeds, attention_mask=mask, **kwargs, **GREEDY)
        assert output[0].tolist() == expected[row]


def test_pictures_straight_into_generate(vl_model, expected):
    output = vl_model.generate(**BATCH, **GREEDY)
    assert torch.equal(output[:, :LENGTH], BATCH["input_ids"])
    assert new_tokens(output, BATCH) == expected


def test_every_output_of_the_processor_may_be_passed(mla_model):
    inputs = ROWS[0]
    plain = mla_model.generate(**inputs, **GREEDY)
    more = {"labels": inputs["input_ids"], "sft_format": ["text"], "seq_lens": [LENGTH]}
    assert torch.equal(mla_model.generate(**inputs, **more, **GREEDY), plain)
    embeds, cache = mla_model.incremental_prefilling(**inputs, **more)
    assert torch.equal(
        mla_model.generate(inputs_embeds=embeds, **inputs, **more, past_key_values=cache, **GREEDY), plain
    )


def test_text_only(vl_model, expected):
    ids = ROWS[2]["input_ids"]
    for inputs in ({}, {"images": None, "images_seq_mask": None, "images_spatial_crop": None}):
        assert new_tokens(vl_model.generate(input_ids=ids, **inputs, **GREEDY), ROWS[2]) == [expected[2]]
        embeds, cache = vl_model.incremental_prefilling(input_ids=ids, **inputs, chunk_size=4)
        output = vl_model.generate(input_ids=ids, inputs_embeds=embeds, past_key_values=cache, **GREEDY)
        assert new_tokens(output, ROWS[2]) == [expected[2]]


def test_prefill_from_embeddings(mla_model):
    embeds = mla_model.prepare_inputs_embeds(**BATCH)
    again, cache = mla_model.incremental_prefilling(
        inputs_embeds=embeds, attention_mask=BATCH["attention_mask"], chunk_size=7
    )
    assert again is embeds
    _, expected = mla_model.incremental_prefilling(**BATCH, chunk_size=7)
    assert all(
        torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
        for a, b in zip(cache.layers, expected.layers, strict=True)
    )


def test_prompt_of_one_token(mla_model):
    ids = torch.tensor([[BOS_ID]])
    expected = mla_model.generate(input_ids=ids, **GREEDY)
    for chunk_size in (-1, 1, 4):
        embeds, cache = mla_model.incremental_prefilling(input_ids=ids, chunk_size=chunk_size)
        assert cache.get_seq_length() == 0
        output = mla_model.generate(inputs_embeds=embeds, input_ids=ids, past_key_values=cache, **GREEDY)
        assert torch.equal(output, expected)


@torch.no_grad()
def test_cached_logits_equal_uncached(vl_model):
    """At every step, whole or in chunks, from prompts with and without padding."""
    for row, inputs in enumerate(ROWS):
        ids, steps = token_by_token(vl_model, inputs)
        embeds, cache = vl_model.incremental_prefilling(**BATCH, chunk_size=13)
        settings = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
        output = vl_model.generate(inputs_embeds=embeds, **BATCH, past_key_values=cache, **settings)
        logits = torch.stack(output.logits, dim=1)[row, : len(ids)]
        torch.testing.assert_close(logits, steps, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk_size", [0, -2, -512])
def test_chunk_sizes_there_are_not(mla_model, chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size {chunk_size} must be at least 1, or -1"):
        mla_model.incremental_prefilling(**ROWS[0], chunk_size=chunk_size)


def test_used_caches_are_refused(vl_model):
    inputs = ROWS[0]
    embeds, cache = vl_model.incremental_prefilling(**inputs)
    kept = copy.deepcopy(cache)
    first = vl_model.generate(inputs_embeds=embeds, **inputs, past_key_values=cache, **GREEDY)
    mask = inputs["attention_mask"]
    with pytest.raises(ValueError, match=r"used before or belongs to another prompt.*copy.deepcopy"):
        vl_model.generate(inputs_embeds=embeds, **inputs, past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match="used before"):
        vl_model.language.generate(inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, **GREEDY)
    again = vl_model.generate(inputs_embeds=embeds, **inputs, past_key_values=kept, **GREEDY)
    assert torch.equal(again, first)


def test_a_cache_used_for_one_token_is_refused(mla_model):
    embeds, cache = mla_model.incremental_prefilling(**ROWS[0])
    settings = {**GREEDY, "max_new_tokens": 1}
    mla_model.generate(inputs_embeds=embeds, **ROWS[0], past_key_values=cache, **settings)
    with pytest.raises(ValueError, match="used before"):
        mla_model.generate(inputs_embeds=embeds, **ROWS[0], past_key_values=cache, **settings)


def test_a_cache_of_other_rows_is_refused(mla_model):
    _, cache = mla_model.incremental_prefilling(**ROWS[0])
    embeds = mla_model.prepare_inputs_embeds(**BATCH)
    with pytest.raises(ValueError, match=r"1 row.*prompt has 3"):
        mla_model.generate(inputs_embeds=embeds, **BATCH, past_key_values=cache, **GREEDY)


def test_a_cache_in_another_form_is_refused(mla_model):
    pairs = [(torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8))]
    embeds = mla_model.prepare_inputs_embeds(**ROWS[0])
    for use in (mla_model.generate, mla_model.incremental_prefilling):
        with pytest.raises(ValueError, match=r"past_key_values is a list, not a transformers\.Cache"):
            use(inputs_embeds=embeds, attention_mask=ROWS[0]["attention_mask"], past_key_values=pairs)


def test_a_cache_made_in_inference_mode_can_be_used_outside_it(mla_model):
    expected = mla_model.generate(**ROWS[0], **GREEDY)
    with torch.inference_mode():
        embeds, cache = mla_model.incremental_prefilling(**ROWS[0], chunk_size=5)
    assert torch.equal(mla_model.generate(inputs_embeds=embeds, **ROWS[0], past_key_values=cache, **GREEDY), expected)


def test_settings_may_be_given_by_position(mla_model):
    config = GenerationConfig(**GREEDY)
    ids, mask = ROWS[2]["input_ids"], ROWS[2]["attention_mask"]
    expected = mla_model.generate(ids, attention_mask=mask, generation_config=config)
    for part in (mla_model, mla_model.language):
        assert torch.equal(part.generate(ids, config, attention_mask=mask), expected)


def test_image_tokens_without_pictures_are_refused(mla_model):
    inputs = {name: value for name, value in ROWS[0].items() if name != "images"}
    with pytest.raises(ValueError, match="no pictures are given"):
        mla_model.generate(**inputs, **GREEDY)


def test_an_empty_cache_may_be_passed(mla_model):
    expected = mla_model.generate(**ROWS[0], **GREEDY)
    cache = DynamicCache(config=mla_model.config.language_config)
    assert torch.equal(mla_model.generate(**ROWS[0], past_key_values=cache, **GREEDY), expected)


@pytest.mark.parametrize("chunk_size", [3, -1])
def test_beam_search(vl_model, chunk_size):
    settings = {**GREEDY, "num_beams": 3}
    embeds, cache = vl_model.incremental_prefilling(**BATCH, chunk_size=chunk_size)
    whole = vl_model.generate(**BATCH, **settings)
    chunked = vl_model.generate(inputs_embeds=embeds, **BATCH, past_key_values=cache, **settings)
    assert torch.equal(whole, chunked)
    alone = [vl_model.generate(**row, **settings) for row in ROWS]
    assert new_tokens(whole, BATCH) == [new_tokens(a, row)[0] for a, row in zip(alone, ROWS, strict=True)]


def test_several_beams_returned(mla_model):
    settings = GenerationConfig(**GREEDY, num_beams=4, num_return_sequences=2)
    embeds, cache = mla_model.incremental_prefilling(**BATCH, chunk_size=20)
    whole = mla_model.generate(**BATCH, generation_config=settings)
    assert whole.shape[0] == 6
    chunked = mla_model.generate(inputs_embeds=embeds, **BATCH, past_key_values=cache, generation_config=settings)
    assert torch.equal(whole, chunked)


def test_sampling_several_answers_by_seed(mla_model):
    settings = {
        **GREEDY,
        "do_sample": True,
        "temperature": 2.0,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "num_return_sequences": 3,
    }

    def sample(seed: int, chunk_size: int | None = None) -> torch.Tensor:
        inputs = dict(ROWS[1])
        if chunk_size is not None:
            inputs["inputs_embeds"], inputs["past_key_values"] = mla_model.incremental_prefilling(
                **inputs, chunk_size=chunk_size
            )
        torch.manual_seed(seed)
        return mla_model.generate(**inputs, **settings)

    with torch.random.fork_rng():
        first = sample(0)
        assert first.shape[0] == 3
        assert len({tuple(row) for row in first.tolist()}) == 3
        assert torch.equal(sample(0), first)
        assert torch.equal(sample(0, chunk_size=9), first)
        assert not torch.equal(sample(1), first)


def test_pictures_are_encoded_once(mla_model, monkeypatch):
    calls = []
    original = mla_model.vision.forward
    monkeypatch.setattr(mla_model.vision, "forward", lambda views: calls.append(len(views)) or original(views))
    mla_model.generate(**BATCH, **GREEDY, num_beams=3)
    mla_model.generate(**BATCH, **{**GREEDY, "do_sample": True}, num_return_sequences=4)
    assert calls == [8, 8]


def test_decoding_feeds_one_token_a_step(mla_model, monkeypatch):
    lengths = []
    hook = mla_model.language.model.layers[0].register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[1])
    )
    embeds, cache = mla_model.incremental_prefilling(**ROWS[0], chunk_size=-1)
    num_prompt = ROWS[0]["input_ids"].shape[1]
    mla_model.generate(inputs_embeds=embeds, **ROWS[0], past_key_values=cache, **{**GREEDY, "max_new_tokens": 3})
    hook.remove()
    assert lengths == [num_prompt - 1, 1, 1, 1]


@pytest.mark.parametrize("count", [1, 5])
def test_max_new_tokens(mla_model, count):
    settings = {**GREEDY, "max_new_tokens": count, "eos_token_id": None}
    num_prompt = ROWS[0]["input_ids"].shape[1]
    assert mla_model.generate(**ROWS[0], **settings).shape == (1, num_prompt + count)
    embeds, cache = mla_model.incremental_prefilling(**ROWS[0])
    output = mla_model.generate(inputs_embeds=embeds, **ROWS[0], past_key_values=cache, **settings)
    assert output.shape == (1, num_prompt + count)


def test_end_of_sentence_stops_each_row(mla_model):
    free = new_tokens(mla_model.generate(**BATCH, **{**GREEDY, "eos_token_id": None}), BATCH)
    end = free[1][3]
    output = mla_model.generate(**BATCH, **{**GREEDY, "eos_token_id": end})[:, LENGTH:].tolist()
    for row, tokens in zip(free, output, strict=True):
        stop = row.index(end) + 1 if end in row else len(row)
        assert tokens[:stop] == row[:stop]
        assert set(tokens[stop:]) <= {PAD_ID}


def test_repetition_penalty_sees_the_prompt(mla_model):
    settings = {**GREEDY, "repetition_penalty": 3.0}
    embeds, cache = mla_model.incremental_prefilling(**BATCH)
    whole = mla_model.generate(**BATCH, **settings)
    assert torch.equal(whole, mla_model.generate(inputs_embeds=embeds, **BATCH, past_key_values=cache, **settings))
    assert not torch.equal(whole, mla_model.generate(**BATCH, **GREEDY))


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One letter for each id: a to z, then Chinese ones."""
    letters = {chr(ord("a") + i) if i < 26 else chr(0x4E00 + i): i for i in range(160)}
    backend = Tokenizer(models.BPE(letters, []))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_streaming(mla_model, is_chunked):
    tokenizer, inputs = letter_tokenizer(), dict(ROWS[0])
    expected = tokenizer.decode(new_tokens(mla_model.generate(**inputs, **GREEDY), inputs)[0])
    if is_chunked:
        inputs["inputs_embeds"], inputs["past_key_values"] = mla_model.incremental_prefilling(**inputs, chunk_size=10)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    thread = threading.Thread(target=mla_model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected
    assert len([piece for piece in pieces if piece]) > 3, "in pieces, not at once"


def test_streaming_from_the_language_model(mla_model):
    tokenizer, inputs = letter_tokenizer(), ROWS[0]
    expected = tokenizer.decode(new_tokens(mla_model.generate(**inputs, **GREEDY), inputs)[0])
    embeds = mla_model.prepare_inputs_embeds(**inputs).detach()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    kwargs = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "streamer": streamer, **GREEDY}
    thread = threading.Thread(target=mla_model.language.generate, kwargs=kwargs)
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


@pytest.mark.parametrize("is_chunked", [False, True])
def test_stop_strings(mla_model, is_chunked):
    tokenizer, inputs = letter_tokenizer(), dict(ROWS[0])
    free = new_tokens(mla_model.generate(**inputs, **GREEDY), inputs)[0]
    assert free.index(free[3]) == 3
    if is_chunked:
        inputs["inputs_embeds"], inputs["past_key_values"] = mla_model.incremental_prefilling(**inputs, chunk_size=10)
    output = mla_model.generate(**inputs, **GREEDY, stop_strings=[tokenizer.decode(free[3])], tokenizer=tokenizer)
    assert new_tokens(output, ROWS[0])[0] == free[:4]


@pytest.mark.parametrize("part", ["whole", "language"])
def test_prompts_longer_than_the_positions(part):
    model = seeded(DeepseekVLV2ForCausalLM, vl_config({"max_position_embeddings": 30}))
    generate = model.generate if part == "whole" else model.language.generate
    calls = [
        {"inputs": torch.full((1, 31), 5)},
        {"input_ids": torch.full((1, 31), 5)},
        {"inputs_embeds": torch.zeros(1, 31, 48)},
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"31 tokens, the model has 30 positions.*fewer pictures, no tiling"):
            generate(**call, **GREEDY)
    with pytest.raises(ValueError, match="31 tokens"):
        model.incremental_prefilling(inputs_embeds=torch.zeros(1, 31, 48))
    assert generate(input_ids=torch.full((1, 30), 5), **{**GREEDY, "max_new_tokens": 1}).shape == (1, 31)


def test_settings_of_a_checkpoint_are_used(mla_model, tmp_path):
    model = copy.deepcopy(mla_model)
    model.generation_config = GenerationConfig(max_new_tokens=3, pad_token_id=PAD_ID, eos_token_id=None)
    model.save_pretrained(tmp_path)
    loaded = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path)
    assert loaded.generate(**ROWS[0]).shape[1] == ROWS[0]["input_ids"].shape[1] + 3


def test_inputs_are_left_as_they_were(mla_model):
    inputs = join(ROWS)
    embeds, cache = mla_model.incremental_prefilling(**inputs, chunk_size=7)
    kept = embeds.clone()
    mla_model.generate(inputs_embeds=embeds, **inputs, past_key_values=cache, **GREEDY)
    assert torch.equal(embeds, kept)
    assert all(torch.equal(inputs[name], BATCH[name]) for name in BATCH)
