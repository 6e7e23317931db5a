"""An adapter gives the same answers trained, loaded and merged, and wrong ones are refused."""

import importlib.util
import json
import shutil

import pytest
import torch
from peft import PeftModel
from training_models import LORA_ALL, save_model, settings

from deepseek_vl2.models import DeepseekV2Config, DeepseekVLV2ForCausalLM
from deepseek_vl2.train import trainer
from deepseek_vl2.train.data import ConversationEncoder, read_samples
from deepseek_vl2.train.merge import main as merge
from deepseek_vl2.utils.io import load_pretrained_model

# Merging adds the update to the weight, in another order than beside it: float32 rounding of logits of about 10.
ROUNDING = {"atol": 1e-4, "rtol": 1e-4}
# nano's tokenizer spells the first in letters, has a token for the second, and one a byte for the third.
NEW_WORDS = ["brown", "purple", "棕"]


@pytest.fixture(scope="module")
def trained(checkpoint, train_file, tmp_path_factory):
    """Adapter folder, and the logits of the model in training as it was saved."""
    folder = tmp_path_factory.mktemp("adapter")
    kept = {}
    save = trainer.FineTuner.save_model

    def save_and_ask(self, *args, **kwargs):
        save(self, *args, **kwargs)
        kept["model"] = self.model.eval()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.FineTuner, "save_model", save_and_ask)
        parts = {"vision": "lora", "projector": "full", "new_words": NEW_WORDS}
        options = LORA_ALL | parts | {"max_steps": 3}
        trainer.train(settings(train_file, checkpoint("mla_noaux"), folder, **options))
    return folder, kept["model"]


@pytest.fixture(scope="module")
def inputs(processor, train_file):
    encoder = ConversationEncoder(processor, DeepseekV2Config(max_position_embeddings=256))
    samples = read_samples(train_file, encoder)
    batch = processor.batchify([encoder(sample.messages) for sample in samples[:2]])
    return {name: batch[name] for name in processor.model_input_names}


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def test_loaded_and_merged_give_the_same_logits(checkpoint, trained, inputs, tmp_path, capsys):
    folder, model = trained
    expected = logits(model, inputs)
    plain = load_pretrained_model(checkpoint("mla_noaux"), "float32", "cpu").model
    assert float((logits(plain, inputs) - expected).abs().max()) > 0.5  # the adapter does something
    loaded = load_pretrained_model(checkpoint("mla_noaux"), "float32", "cpu", adapter=folder).model
    assert type(loaded) is DeepseekVLV2ForCausalLM
    torch.testing.assert_close(logits(loaded, inputs), expected, **ROUNDING)

    output = tmp_path / "merged"
    command = ["--model_path", str(checkpoint("mla_noaux")), "--adapter", str(folder), "--output", str(output)]
    assert merge(command) == 0
    merged, info = DeepseekVLV2ForCausalLM.from_pretrained(output, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits(merged.eval(), inputs), logits(loaded, inputs), atol=0, rtol=0)
    assert load_pretrained_model(output, "float32", "cpu").processor.image_size == 70
    keys = [file.name for file in checkpoint("mla_noaux").iterdir()]
    assert sorted(keys) == sorted(file.name for file in output.iterdir())
    assert merge(command) == 2
    assert "must be a new or empty folder" in capsys.readouterr().err


def test_with_an_adapter_cached_steps_equal_the_whole(checkpoint, trained, inputs):
    """Latent attention reads a weight directly in cached steps."""
    model = load_pretrained_model(checkpoint("mla_noaux"), "float32", "cpu", adapter=trained[0]).model
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(**inputs, **options)
    whole = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached, whole)


def test_an_adapter_beside_the_weights_acts_in_cached_steps_too(checkpoint, trained, inputs):
    model = load_pretrained_model(checkpoint("mla_noaux"), "float32", "cpu").model
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    adapted = PeftModel.from_pretrained(model, trained[0]).eval()
    cached, whole = (
        adapted.generate(**inputs, **options, use_cache=use_cache, return_dict_in_generate=True)
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), **ROUNDING)


def test_the_adapter_names_its_model_as_it_was_given(checkpoint, trained):
    config = json.loads((trained[0] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(checkpoint("mla_noaux"))


def test_new_words_train_the_rows_of_their_tokens_and_no_other(processor, checkpoint, trained):
    encode = processor.tokenizer.encode
    ids = {number for word in NEW_WORDS for text in (word, f" {word}") for number in encode(text)}
    ids -= set(encode(" "))
    assert ids >= set(encode("purple")) | set(encode(" purple"))
    old = load_pretrained_model(checkpoint("mla_noaux"), "float32", "cpu").model
    new = load_pretrained_model(checkpoint("mla_noaux"), "float32", "cpu", adapter=trained[0]).model
    for table in ("get_input_embeddings", "get_output_embeddings"):
        changed = (getattr(old, table)().weight != getattr(new, table)().weight).any(dim=1).nonzero()[:, 0].tolist()
        # A token that no conversation holds gets no gradient on its way in, but as an answer that is wrong.
        assert changed and set(changed) <= ids
        assert table == "get_input_embeddings" or set(changed) == ids
    assert (trained[0] / "adapter_model.safetensors").stat().st_size < (
        checkpoint("mla_noaux") / "model.safetensors"
    ).stat().st_size


def test_new_words_need_an_output_layer_of_its_own(processor, train_file, tmp_path):
    model_path = save_model(tmp_path / "tied", processor, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"new_words: \['red'\] is not allowed for .*tied, whose output layer is its"):
        trainer.train(settings(train_file, model_path, tmp_path / "out", **LORA_ALL, new_words=["red"]))


def test_rows_of_tokens_that_a_model_lacks_are_refused(processor, checkpoint, trained, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    for ids in config["trainable_token_indices"].values():
        ids[-1] = len(processor.tokenizer)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the adapter in .* does not fit the model: index \d+ is out of bounds"):
        load_pretrained_model(checkpoint("mla_noaux"), "float32", "cpu", adapter=folder)


def test_an_adapter_of_another_model_is_refused(processor, checkpoint, trained, tmp_path):
    with pytest.raises(ValueError, match="belongs to another model: there is no 'language"):
        load_pretrained_model(checkpoint("mha_greedy"), "float32", "cpu", adapter=trained[0])
    other = save_model(tmp_path / "wider", processor, moe_intermediate_size=64)
    with pytest.raises(ValueError, match=r"does not fit the model: .*size mismatch"):
        load_pretrained_model(other, "float32", "cpu", adapter=trained[0])


def test_what_is_no_adapter_is_refused(checkpoint, trained, tmp_path):
    def refuse(kind, message, folder):
        with pytest.raises(kind, match=message):
            load_pretrained_model(checkpoint("mla_noaux"), adapter=folder)

    refuse(FileNotFoundError, "there is no adapter folder", tmp_path / "none")
    refuse(FileNotFoundError, "has no adapter_config.json: it is no adapter", checkpoint("mla_noaux"))
    broken = shutil.copytree(trained[0], tmp_path / "broken")
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    refuse(ValueError, "is broken or cut off", broken)
    (broken / "adapter_config.json").write_text("{")
    refuse(ValueError, "is broken or cut off", broken)


def test_without_peft_the_way_out_is_named(checkpoint, trained, train_file, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    with pytest.raises(ImportError, match="adapters need the package peft: pip install"):
        load_pretrained_model(checkpoint("mla_noaux"), adapter=trained[0])
    with pytest.raises(ImportError, match="adapters need the package peft: pip install"):
        trainer.train(settings(train_file, checkpoint("mla_noaux"), tmp_path, **LORA_ALL))
