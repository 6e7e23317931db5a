"""nano grown from an earlier, smaller edition: it first answers as that one did."""

import pytest
import torch

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.nano import architecture, tokenizer
from deepseek_vl2.nano.growth import TOKEN_TABLES, grow_from

EARLIER_VOCAB_SIZE = 1600


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """An edition with fewer tokens and layers, a narrower tower and projector: its tokenizer, model and folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "VOCAB_SIZE", EARLIER_VOCAB_SIZE)
        words = tokenizer.build_tokenizer()
    config = architecture.nano_config(words)
    config.language_config.num_hidden_layers -= 2
    config.vision_config.mlp_ratio = 2.5
    config.projector_config.mlp_ratio = 1
    torch.manual_seed(3)
    model = DeepseekVLV2ForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("earlier")
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return words, model, folder


@pytest.fixture(scope="module")
def grown(earlier):
    words = tokenizer.build_tokenizer()
    model = architecture.untrained_nano(words, seed=0).eval()
    grow_from(model, words, earlier[2])
    return words, model


@torch.no_grad()
def test_it_computes_what_the_earlier_one_did(earlier, grown):
    words_before, before = earlier[:2]
    words, model = grown
    shared = sorted(words_before.get_vocab().keys() & words.get_vocab().keys())
    assert len(shared) > 1500
    tokens = shared[::50]
    found = model(torch.tensor([words.convert_tokens_to_ids(tokens)])).logits[0]
    expected = before(torch.tensor([words_before.convert_tokens_to_ids(tokens)])).logits[0]
    torch.testing.assert_close(
        found[:, words.convert_tokens_to_ids(shared)], expected[:, words_before.convert_tokens_to_ids(shared)]
    )


@torch.no_grad()
def test_the_wider_tower_and_projector_see_the_same(earlier, grown):
    views = torch.rand(2, 3, 112, 112)
    patches = grown[1].vision(views)
    torch.testing.assert_close(patches, earlier[1].vision(views))
    torch.testing.assert_close(grown[1].projector(patches), earlier[1].projector(patches))


def test_a_text_that_was_several_tokens_begins_as_their_mean(earlier, grown):
    new = [token for token in grown[0].get_vocab() if token not in earlier[0].get_vocab() and "reserved" not in token]
    assert new
    text = grown[0].convert_tokens_to_string(new[:1])
    parts = earlier[0](text, add_special_tokens=False)["input_ids"]
    assert len(parts) > 1
    for name in TOKEN_TABLES:
        row = grown[1].state_dict()[name][grown[0].convert_tokens_to_ids(new[0])]
        torch.testing.assert_close(row, earlier[1].state_dict()[name][parts].mean(dim=0))


def test_new_layers_learn(grown):
    words, model = grown
    model.zero_grad()
    model(torch.tensor([words("[[1, 2", add_special_tokens=False)["input_ids"]])).logits.sum().backward()
    layer = model.language.model.layers[-1]
    assert layer.self_attn.o_proj.weight.grad.any()
    assert layer.mlp.shared_experts.down_proj.weight.grad.any()


def test_a_larger_model_is_no_earlier_edition(tmp_path, earlier):
    words, _, _ = earlier
    config = architecture.nano_config(words)
    config.vision_config.mlp_ratio = 6.0
    DeepseekVLV2ForCausalLM(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    untrained = architecture.untrained_nano(tokenizer.build_tokenizer(), seed=0)
    with pytest.raises(ValueError, match=r"fc1.weight' is \(1152, 192\) .* and \(768, 192\) in nano: .* only grow"):
        grow_from(untrained, tokenizer.build_tokenizer(), tmp_path)
    config.vision_config.layers = 7
    config.vision_config.mlp_ratio = 4.0
    DeepseekVLV2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has the weight 'vision\.blocks\.6.*no earlier edition"):
        grow_from(untrained, tokenizer.build_tokenizer(), tmp_path)
