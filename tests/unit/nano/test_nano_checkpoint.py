"""The shipped nano: complete, small, and as good as it is meant to be."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoProcessor

from deepseek_vl2 import nano
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.special_tokens import ADDED_TOKENS, BOS, EOS, PAD
from deepseek_vl2.nano.evaluate import answer_examples, evaluate_task, judge, summarize
from deepseek_vl2.nano.questions import EVAL_SPLIT, example_at
from deepseek_vl2.nano.tokenizer import build_tokenizer
from deepseek_vl2.utils.io import load_pretrained_model, resolve_model_path

MAX_BYTES = 12_000_000
NUM_SCENES = 40
# What a nano has to reach on the 500 scenes of its card.
GOALS = {"locate": 0.85, "count": 0.95, "color": 0.95}
# On the first 40 of them it was measured at 0.975, 0.95 and 1.0; one scene less is left to other machines' rounding.
LEAST_ACCURACY = {"locate": 0.95, "count": 0.925, "color": 0.975}


@pytest.fixture(scope="module")
def folder():
    return Path(nano.path())


@pytest.fixture(scope="module")
def loaded(folder):
    return load_pretrained_model("nano", "float32", "cpu")


def test_its_name_is_its_folder(folder):
    assert Path(resolve_model_path("nano")) == folder
    assert folder.is_dir()


def test_weights_are_bfloat16_and_small(folder):
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= MAX_BYTES
    assert [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".safetensors")] == [weights.name]
    with safe_open(weights, "pt") as tensors:
        dtypes = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118 (not a mapping)
    assert dtypes == {"BF16"}


@pytest.mark.parametrize("loader", [DeepseekVLV2ForCausalLM, AutoModelForCausalLM])
def test_it_loads_without_a_key_too_many_or_too_few(folder, loader):
    model, info = loader.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, DeepseekVLV2ForCausalLM)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_its_architecture_is_that_of_small(loaded):
    language = loaded.model.config.language_config
    assert language.use_mla and language.n_shared_experts >= 1
    assert language.n_routed_experts > language.num_experts_per_tok > 1
    assert len(loaded.processor.candidate_resolutions) > 1


def test_special_tokens(folder, loaded):
    assert isinstance(AutoProcessor.from_pretrained(folder), DeepseekVLV2Processor)
    tokenizer = loaded.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, PAD)
    for token in (BOS, EOS, PAD, *ADDED_TOKENS):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    loaded.processor.check_vocab(loaded.model.config.language_config.vocab_size)
    # A checkpoint knows words by their ids, so the recipe's tokenizer must not drift away from it.
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


@pytest.fixture(scope="module")
def published(folder):
    """The card's accuracies on 500 scenes by task, from rows such as `| locate: one object | 0.512 | 0.471 |`."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    return {task: float(number) for task, number in re.findall(r"^\| (\w+):[^|]*\| ([01]\.\d+) \|", card, re.MULTILINE)}


def test_its_card_says_what_it_can_do_and_what_not(folder, published):
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert set(LEAST_ACCURACY) <= set(published)
    for word in ("MIT", "cannot", "deepseek_vl2.nano.evaluate", "Training"):
        assert word in card


@pytest.mark.parametrize("task", list(GOALS))
def test_its_card_reaches_the_goals(published, task):
    assert published[task] >= GOALS[task]


def test_the_readme_has_the_same_figures(published, repository):
    readme = (repository / "README.md").read_text(encoding="utf-8")
    for task, accuracy in published.items():
        assert re.search(rf"^\| {task}:[^|]*\| {accuracy:.3f} \|", readme, re.MULTILINE), task


@pytest.mark.parametrize("task", list(LEAST_ACCURACY))
def test_accuracy_on_held_out_scenes(loaded, task):
    records = list(evaluate_task(loaded.model, loaded.processor, task, NUM_SCENES, batch_size=20))
    assert summarize(records)[task]["accuracy"] >= LEAST_ACCURACY[task]


def test_it_answers_about_a_tiled_picture(loaded):
    """A picture of two by two tiles: 21 tokens of global view and separator, 8 rows of 8 tokens and a newline."""
    examples = (example_at(EVAL_SPLIT, index, {"locate": 1.0}, {"size": (448, 336)}) for index in range(1000, 1004))
    examples = list(examples)
    sample = loaded.processor.process_one(
        conversations=[{"role": "user", "content": "<image>\nWhere?"}], images=[examples[0].scene.draw()]
    )
    assert sample.images_spatial_crop.tolist() == [[2, 2]]
    assert int(sample.images_seq_mask.sum()) == 93
    scores = [
        judge(example, answer)
        for example, answer in zip(examples, answer_examples(loaded.model, loaded.processor, examples), strict=True)
    ]
    assert max(score["iou"] for score in scores) >= 0.5
