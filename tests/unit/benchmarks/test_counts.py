"""FLOP and bytes, by hand and against the published figures."""

import pytest
from small_models import VARIANTS, vl_config

from benchmarks.counts import decode_bytes, prefill_flop, projector_flop, vision_flop
from deepseek_vl2.utils.model_size import active_weights_by_part, published_config


def test_vision_tower_takes_3_4_tflop_for_five_views():
    config = published_config("tiny")
    total = vision_flop(config, 5) + projector_flop(config, 5)
    assert total == pytest.approx(3.35e12, rel=2e-3)
    assert vision_flop(config, 5) == 5 * vision_flop(config, 1)


def test_vision_flop_by_hand():
    config = vl_config()  # 25 patches of 588 numbers, width 64, feed-forward 239, 2 layers
    layer = 25 * 4 * 64 * 64 + 2 * 25 * 25 * 64 + 25 * 2 * 64 * 239
    assert vision_flop(config, 1) == 2 * (25 * 588 * 64 + 2 * layer)


def test_projector_flop_by_hand():
    assert projector_flop(vl_config(), 2) == 2 * 2 * 9 * (4 * 64 * 48 + 48 * 48)


def test_prefill_flop_by_hand():
    config = vl_config(VARIANTS["tiny"])  # 3 layers, width 48, 6 heads of 8, 3 of 12 experts of width 56
    attention = 3 * 4 * 48 * 48
    feed_forward = 3 * 48 * 88 + 2 * ((3 + 2) * 3 * 48 * 56 + 12 * 48)
    scores = 3 * 6 * (8 + 8) * (1 + 2 + 3 + 4 + 5)
    assert prefill_flop(config, 5) == 2 * (5 * (attention + feed_forward) + 48 * 160 + scores)


def test_a_longer_prompt_costs_more_than_its_share():
    config = published_config("small")
    assert prefill_flop(config, 2000) > 2 * prefill_flop(config, 1000)


def test_decoding_tiny_reads_its_active_weights():
    config = published_config("tiny")
    router = active_weights_by_part(config)["router"]
    assert decode_bytes(config, 0) == 2 * (573_194_240 + router)
    # Each output has a scale: of attention, the dense layer, shared and chosen experts, and the output layer.
    num_outputs = 12 * 4 * 1280 + (2 * 6848 + 1280) + 11 * (2 * 1792 + 1280) + 11 * 6 * (2 * 896 + 1280) + 129280
    assert decode_bytes(config, 0, "int8") == 573_194_240 + 2 * router + 2 * num_outputs
    # 44 GB/s make 38 tokens/s in bfloat16 and 76 in int8.
    assert round(44e9 / decode_bytes(config, 0)) == 38
    assert round(44e9 / decode_bytes(config, 0, "int8")) == 76


def test_decoding_in_int4_reads_some_layers_in_8_bits():
    config = published_config("tiny")
    router, eight_bits = 11 * 64 * 1280, 12 * 3 * 1280**2 + 3 * 1280 * 6848  # queries, keys, outputs; the dense layer
    scales = 2 * (12 * 3 * 1280 + 2 * 6848 + 1280)
    four_bits = 573_194_240 - eight_bits
    assert decode_bytes(config, 0, "int4") == eight_bits + scales + four_bits * (4 + 32 / 64) / 8 + 2 * router


def test_decoding_reads_the_cache():
    config = published_config("small")
    assert decode_bytes(config, 1000) - decode_bytes(config, 0) == 1000 * 27 * 1152


def test_rows_read_an_expert_once():
    config = published_config("small")
    active = active_weights_by_part(config)
    others = decode_bytes(config, 0) - 2 * active["experts"]
    # Of 64 experts eight rows that choose 6 each leave 64 * (58 / 64)^8 = 29.1 out.
    assert decode_bytes(config, 0, num_rows=8) == pytest.approx(
        others + 2 * active["experts"] * (64 - 29.12) / 6, rel=1e-4
    )
    assert decode_bytes(config, 100, num_rows=8) - decode_bytes(config, 0, num_rows=8) == 8 * 100 * 27 * 1152
