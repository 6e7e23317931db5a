"""A growing cache gives what transformers' own gives, without copying itself for each token."""

import copy

import pytest
import torch
from small_models import VARIANTS, language_config, make_inputs, seeded, vl_config
from transformers import DynamicCache, StaticCache

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.growing_cache import GROWTH_DIVISOR, MIN_ROOM, GrowingCache
from deepseek_vl2.models.modeling_deepseek import DeepseekV2ForCausalLM


def states(num_tokens: int, seed: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, 3, num_tokens, width, generator=generator) for width in (8, 5))  # type: ignore


def feed(cache: DynamicCache, num_tokens: int, seed: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return cache.update(*states(num_tokens, seed, rows), 0)


def same(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


CHANGES = {
    "nothing": lambda cache: None,
    "crop": lambda cache: cache.crop(-4),
    "crop to nothing": lambda cache: cache.crop(-7),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeat and select": lambda cache: (
        cache.batch_repeat_interleave(2),
        cache.batch_select_indices(torch.tensor([3, 0])),
    ),
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_holds_what_the_default_cache_holds(change):
    ours, theirs = GrowingCache(1), DynamicCache()
    for cache in (ours, theirs):
        feed(cache, 6, 0)
        feed(cache, 1, 1)
        CHANGES[change](cache)
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert same(feed(ours, 3, 2), feed(theirs, 3, 2))
    assert same(feed(ours, 1, 3), feed(theirs, 1, 3))
    assert ours.get_mask_sizes(2, 0) == theirs.get_mask_sizes(2, 0)


def test_new_tokens_are_written_in_place():
    cache = GrowingCache(1)
    keys, values = feed(cache, 10, 0)
    places = keys.data_ptr(), values.data_ptr()
    for seed in range(MIN_ROOM):
        keys, values = feed(cache, 1, seed)
        assert (keys.data_ptr(), values.data_ptr()) == places
    keys, _ = feed(cache, 1, 0)  # the room is used up
    assert keys.data_ptr() != places[0] and keys.shape[2] == MIN_ROOM + 11


def test_it_grows_by_a_part_of_itself():
    cache = GrowingCache(1)
    feed(cache, 4000, 0)
    assert cache.layers[0]._buffers[0].shape[2] == 4000 + 4000 // GROWTH_DIVISOR


def test_expected_tokens_have_room_from_the_start():
    cache = GrowingCache(1, num_expected=3000)
    place = feed(cache, 7, 0)[0].data_ptr()
    assert feed(cache, 2993, 1)[0].data_ptr() == place


def test_a_copy_goes_its_own_way():
    cache = GrowingCache(1)
    feed(cache, 5, 0)
    other = copy.deepcopy(cache)
    before = cache.layers[0].keys.clone()
    keys, _ = feed(other, 1, 1)
    different, _ = feed(cache, 1, 2)
    assert torch.equal(cache.layers[0].keys[:, :, :5], before) and torch.equal(keys[:, :, :5], before)
    assert not torch.equal(keys[:, :, 5:], different[:, :, 5:])
    assert torch.equal(other.layers[0].keys[:, :, 5:], states(1, 1)[0])


def test_gradients_pass_through():
    cache = GrowingCache(1)
    feed(cache, 4, 0)
    keys, values = states(2, 1)
    keys.requires_grad_()
    cache.update(keys, values, 0)[0].sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))
    assert same(feed(cache, 1, 2), (cache.layers[0].keys, cache.layers[0].values))
    assert cache.get_seq_length() == 7


@pytest.mark.parametrize("variant", ["tiny", "small"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_generate_uses_it_and_answers_the_same(variant, options):
    model = seeded(DeepseekV2ForCausalLM, language_config(**VARIANTS[variant]))
    ids = make_inputs([])["input_ids"].repeat(2, 1)
    kwargs = {"max_new_tokens": 12, "return_dict_in_generate": True, **options}
    torch.manual_seed(0)
    ours = model.generate(ids, **kwargs)
    assert type(ours.past_key_values) is GrowingCache
    torch.manual_seed(0)
    theirs = model.generate(ids, past_key_values=DynamicCache(), **kwargs)
    assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_caches_stay_what_they_are(variant):
    model = seeded(DeepseekV2ForCausalLM, language_config(**VARIANTS[variant]))
    ids = make_inputs([])["input_ids"]
    kwargs = {"max_new_tokens": 4, "return_dict_in_generate": True, "do_sample": False}
    static = model.generate(ids, cache_implementation="static", **kwargs)
    assert not isinstance(static.past_key_values, DynamicCache)
    assert torch.equal(static.sequences, model.generate(ids, **kwargs).sequences)
    assert model.generate(ids, use_cache=False, **kwargs).past_key_values is None


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("step", [1, 2, 5, 41])
@torch.no_grad()
def test_a_preallocated_cache_in_chunks(variant, step):
    """Few new tokens at once: absorbed, in models with a latent; the first of them beside empty places."""
    model = seeded(DeepseekV2ForCausalLM, language_config(**VARIANTS[variant]))
    ids = torch.randint(4, 100, (2, 50), generator=torch.Generator().manual_seed(3))
    cache = StaticCache(config=model.config, max_cache_len=70)
    parts = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split(step, 1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_prefilling_makes_room_for_the_prompt_and_an_answer():
    model = seeded(DeepseekVLV2ForCausalLM, vl_config())
    inputs = make_inputs([(2, 1)])
    embeds, cache = model.incremental_prefilling(**inputs, chunk_size=5)
    place = cache.layers[1].keys.data_ptr()
    model.generate(
        inputs_embeds=embeds, past_key_values=cache, attention_mask=inputs["attention_mask"], max_new_tokens=9
    )
    assert cache.layers[1].keys.data_ptr() == place
