"""Random checkpoints: layout, shards, tokenizers, interrupted runs, and a model that can be loaded and speaks."""

import json
import shutil
from functools import partial

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from small_models import VARIANTS, vl_config

from benchmarks import checkpoints
from benchmarks.bench import PICTURE_SIZE, QUESTION
from benchmarks.checkpoints import (
    RandomNumbers,
    check_disk,
    iterate_shards,
    main,
    sized_config,
    split_into_shards,
    write_checkpoint,
)
from benchmarks.sized_tokenizers import build_tokenizer
from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.models.special_tokens import ADDED_TOKENS
from deepseek_vl2.utils.checkpoint_files import INDEX_FILE, check_weight_files
from deepseek_vl2.utils.io import load_pretrained_model
from deepseek_vl2.utils.model_size import checkpoint_shapes, published_config

SHARD_BYTES = 50_000
# Like small's: bos behind the vocabulary, the rest behind it.
LANGUAGE = {"vocab_size": 420, "bos_token_id": 400, "eos_token_id": 401, "pad_token_id": 402}


# They share the checkpoint: one worker of pytest-xdist writes it once.
pytestmark = pytest.mark.xdist_group("benchmark_checkpoints")


@pytest.fixture(scope="module", autouse=True)
def small_pool():
    """Not 17 million numbers for every little shard."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "RandomNumbers", partial(RandomNumbers, pool_size=300_007))
        yield


@pytest.fixture(scope="module")
def config():
    return vl_config({**VARIANTS["base"], **LANGUAGE})


@pytest.fixture(scope="module")
def folder(small_pool, config, tmp_path_factory):
    return write_checkpoint(config, tmp_path_factory.mktemp("random"), SHARD_BYTES)


def test_shards_hold_the_published_layout_in_bfloat16(config, folder):
    found = check_weight_files(folder)
    assert found.problems == []
    assert len(found.files) > 5
    shapes = {}
    for file in found.files:
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - no mapping
                tensor = shard.get_tensor(name)
                assert tensor.dtype == torch.bfloat16
                assert tensor.isfinite().all()
                shapes[name] = tuple(tensor.shape)
    assert shapes == checkpoint_shapes(config)
    assert "language.model.layers.1.mlp.experts.11.gate_proj.weight" in shapes


def test_random_weights_have_a_sensible_size_and_are_not_alike(folder):
    _, _, model = load_pretrained_model(folder, torch.float32, "cpu")
    experts = model.language.model.layers[1].mlp.experts.gate_up_proj
    assert experts.std().item() == pytest.approx(0.02, rel=0.05)
    assert not any(torch.equal(experts[0], expert) for expert in experts[1:])
    assert (model.language.model.norm.weight == 1).all()
    assert (model.vision.blocks[0].attn.qkv.bias == 0).all()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert logits.isfinite().all() and logits.std() > 0


def test_the_same_checkpoint_twice_has_the_same_bits(config, folder, tmp_path):
    again = write_checkpoint(config, tmp_path, SHARD_BYTES)
    for file in check_weight_files(folder).files:
        assert (again / file.name).read_bytes() == file.read_bytes()


def test_an_interrupted_run_writes_only_what_is_missing(config, folder, tmp_path, monkeypatch):
    copied = shutil.copytree(folder, tmp_path / "copy")
    files = check_weight_files(copied).files
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-7])
    files[3].unlink()
    written = []
    write_shard = checkpoints.write_shard
    monkeypatch.setattr(
        checkpoints, "write_shard", lambda file, *rest: (written.append(file), write_shard(file, *rest))
    )
    write_checkpoint(config, copied, SHARD_BYTES)
    assert written == [files[1], files[3]]
    assert files[1].read_bytes() == content


def test_shards_can_be_used_and_deleted_one_by_one(config, tmp_path):
    names = set()
    for file in iterate_shards(config, tmp_path, SHARD_BYTES):
        with safe_open(file, "pt") as shard:
            names |= set(shard.keys())
        file.unlink()
    assert names == checkpoint_shapes(config).keys()
    assert [file.name for file in tmp_path.iterdir()] == [INDEX_FILE]


def test_tensors_are_dealt_in_order_and_large_ones_stand_alone():
    shapes = {"a": (10,), "b": (10,), "c": (100,), "d": (10,)}
    assert [list(shard) for shard in split_into_shards(shapes, 40)] == [["a", "b"], ["c"], ["d"]]


def test_random_numbers_begin_again_at_another_place():
    numbers = RandomNumbers(pool_size=7)
    first, second = numbers.take(10), numbers.take(4)
    assert torch.equal(first[7:], first[:3])
    assert torch.equal(second, first[3:7])


def test_another_model_in_the_folder_is_kept(config, folder):
    with pytest.raises(ValueError, match="holds another model"):
        write_checkpoint(vl_config({**VARIANTS["tiny"], **LANGUAGE}), folder, SHARD_BYTES)


def test_a_disk_without_room_is_named(tmp_path):
    with pytest.raises(OSError, match=r"takes 1000000\.0 GB and \d+\.\d GB are free"):
        check_disk(tmp_path, 10**15)


@pytest.mark.parametrize("layers", [0, 13, -1])
def test_impossible_numbers_of_layers(capsys, tmp_path, layers):
    assert main(["--size", "tiny", "--layers", str(layers), "--folder", str(tmp_path)]) == 2
    assert f"--layers {layers} must be 1 to 12 for tiny" in capsys.readouterr().err


def test_first_layers_only():
    assert sized_config("base", 4).language_config.num_hidden_layers == 4
    assert sized_config("base").language_config.num_hidden_layers == 30


def test_tokenizer_of_small_has_its_ids():
    config = published_config("small")
    processor = DeepseekVLV2Processor(build_tokenizer(config.language_config), config.candidate_resolutions, 14, 2)
    assert (processor.bos_id, processor.eos_id, processor.pad_id) == (100000, 100001, 100002)
    assert [processor.special_token_ids[token] for token in ADDED_TOKENS] == list(range(100003, 100011))
    text = "Where is the cat? 你好 a  b\n12345"
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    assert processor.tokenizer.decode(ids) == text
    assert len(ids) < 20  # words, not bytes


def test_tokenizer_of_tiny_is_the_published_one():
    tokenizer = build_tokenizer(published_config("tiny").language_config)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 128815)


def test_a_vocabulary_without_room_for_bytes_is_refused():
    config = vl_config({"bos_token_id": 100, "eos_token_id": 101}).language_config
    with pytest.raises(ValueError, match="bos_token_id 100 must be 256 to"):
        build_tokenizer(config)


def test_index_counts_its_bytes(config, folder):
    index = json.loads((folder / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == check_weight_files(folder).num_bytes


def test_the_benchmarks_question_to_tiny_has_1036_tokens():
    config = published_config("tiny")
    processor = DeepseekVLV2Processor(build_tokenizer(config.language_config), config.candidate_resolutions, 14, 2)
    picture = Image.new("RGB", PICTURE_SIZE)
    messages = [{"role": "<|User|>", "content": QUESTION}, {"role": "<|Assistant|>", "content": ""}]
    inputs = processor(conversations=messages, images=[picture])
    assert inputs.input_ids.shape == (1, 1036)
    assert inputs.images_spatial_crop.tolist() == [[[2, 2]]]
