"""Replays the recorded models of the reference implementation: embeddings, logits, tokens, losses and gradients."""

import copy

import pytest
import torch

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": 1, "bos_token_id": 0}


def test_embeds(golden, case):
    embeds = golden.model.prepare_inputs_embeds(**case.inputs)
    torch.testing.assert_close(embeds[0, case.recorded["positions"]], case.embeds, atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits(golden, case, attention):
    golden.model.set_attn_implementation(attention)
    with torch.no_grad():
        logits = golden.model(**case.inputs).logits
    torch.testing.assert_close(logits[0, case.recorded["positions"]], case.logits, atol=2e-4, rtol=0)


def test_tokens(golden, case):
    embeds = golden.model.prepare_inputs_embeds(**case.inputs)
    output = golden.model.generate(inputs_embeds=embeds, **case.inputs, **GREEDY)
    num_prompt = case.recorded["seq_len"]
    assert output[0, :num_prompt].tolist() == case.inputs["input_ids"][0].tolist()
    assert output[0, num_prompt:].tolist() == case.recorded["tokens"]


def test_language_generate(golden, case):
    embeds = golden.model.prepare_inputs_embeds(**case.inputs)
    output = golden.model.language.generate(
        inputs_embeds=embeds, attention_mask=case.inputs["attention_mask"], **GREEDY
    )
    assert output[0].tolist() == case.recorded["language_generate"]


@pytest.mark.parametrize("chunk_size", [64, 512])
def test_incremental(golden, case, chunk_size):
    embeds, cache = golden.model.incremental_prefilling(**case.inputs, chunk_size=chunk_size)
    assert cache.get_seq_length() == case.recorded["seq_len"] - 1
    layer = cache.layers[0]
    assert [list(layer.keys.shape), list(layer.values.shape)] == case.recorded["cache_shapes"]
    output = golden.model.generate(inputs_embeds=embeds, **case.inputs, past_key_values=cache, **GREEDY)
    assert output[0, case.recorded["seq_len"] :].tolist() == case.recorded["incremental"]


def test_repetition_penalty(golden, case):
    embeds = golden.model.prepare_inputs_embeds(**case.inputs)
    output = golden.model.generate(inputs_embeds=embeds, **case.inputs, repetition_penalty=1.1, **GREEDY)
    assert output[0, case.recorded["seq_len"] :].tolist() == case.recorded["repetition_penalty_1_1"]


def test_eval_loss(golden, case):
    with torch.no_grad():
        loss = golden.model(**case.inputs, labels=case.labels).loss
    assert loss.item() == pytest.approx(case.recorded["eval_loss"], abs=1e-3)


def gradient_norm(model, name: str) -> float:
    """Norm of a gradient by its checkpoint name, experts being fused in the model."""
    if ".experts." in name:
        prefix, expert, _ = name.removesuffix(".weight").rsplit(".", 2)
        return model.get_parameter(f"{prefix}.down_proj").grad[int(expert)].norm().item()
    return model.get_parameter(name).grad.norm().item()


def test_training_step(golden, case):
    if golden.variant == "base":
        assert "train_loss" not in case.recorded, "the reference refuses to train this router"
    model = copy.deepcopy(golden.model).train()
    loss = model(**case.inputs, labels=case.labels).loss
    loss.backward()
    # The auxiliary loss acts on gradients only, so the reported loss is that of evaluation.
    assert loss.item() == pytest.approx(case.recorded.get("train_loss", case.recorded["eval_loss"]), abs=1e-3)
    for name, norm in case.recorded.get("grad_norms", {}).items():
        assert gradient_norm(model, name) == pytest.approx(norm, rel=1e-3, abs=1e-5), name
    gate_gradient = model.get_parameter("language.model.layers.1.mlp.gate.weight").grad
    assert gate_gradient.norm() > 0


@pytest.mark.parametrize("chunk_size", [None, 64, 512, -1])
def test_padded_batch_gives_each_row_its_own_tokens(golden, chunk_size):
    batch = golden.batch()
    if chunk_size is None:
        embeds, cache = golden.model.prepare_inputs_embeds(**batch), None
    else:
        embeds, cache = golden.model.incremental_prefilling(**batch, chunk_size=chunk_size)
    output = golden.model.generate(inputs_embeds=embeds, **batch, past_key_values=cache, **GREEDY)
    new_tokens = output[:, batch["input_ids"].shape[1] :].tolist()
    assert new_tokens == [case.recorded["tokens"] for case in golden.cases.values()]


def test_padded_batch_by_language_generate(golden):
    batch = golden.batch()
    embeds = golden.model.prepare_inputs_embeds(**batch)
    output = golden.model.language.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **GREEDY)
    assert output.tolist() == [case.recorded["language_generate"] for case in golden.cases.values()]
