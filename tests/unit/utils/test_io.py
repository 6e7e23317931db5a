"""The loader of model and processor, its choices of device and dtype, and JSON files."""

import json
import shutil
import sys
import time
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_vl2.doctor import check_model
from deepseek_vl2.models import WeightOnlyConfig
from deepseek_vl2.utils import io
from deepseek_vl2.utils.hardware import Choice
from deepseek_vl2.utils.io import (
    dtype_name,
    load_json,
    load_pretrained_model,
    resolve_device,
    resolve_dtype,
    resolve_model_path,
)


def test_load_json_gives_attributes_of_nested_objects(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"a": {"b": {"c": 3}}, "名": "值", "list": [{"d": 4}]}), encoding="utf-8")
    loaded = load_json(file)
    assert loaded.a.b.c == 3 and loaded["a"]["b"]["c"] == 3
    assert loaded["名"] == "值" and loaded.list[0].d == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b": }', r"bad\.json is not valid JSON: line 2, column 7"),
        (b"", r"bad\.json is not valid JSON: line 1"),
        (b"[1, 2]", r"bad\.json must hold a JSON object, it holds list"),
        (b"\xff\xfe\x00", r"bad\.json is not UTF-8"),
    ],
)
def test_bad_json_is_named(tmp_path, content, message):
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_json(file)


def test_missing_json_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        load_json(tmp_path / "gone.json")


def test_model_path_of_a_folder_and_of_a_hub_name(tmp_path):
    assert resolve_model_path(tmp_path) == str(tmp_path)
    assert resolve_model_path("deepseek-ai/deepseek-vl2-tiny") == "deepseek-ai/deepseek-vl2-tiny"


def test_nano_is_the_bundled_model_even_beside_a_folder_of_that_name(tmp_path, monkeypatch):
    bundled = types.ModuleType("deepseek_vl2.nano")
    bundled.path = lambda: "/bundled/checkpoint"
    monkeypatch.setitem(sys.modules, "deepseek_vl2.nano", bundled)
    monkeypatch.setattr("deepseek_vl2.nano", bundled, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    assert resolve_model_path("nano") == "/bundled/checkpoint"
    assert resolve_model_path("./nano") == "nano"


@pytest.mark.parametrize("name", ["./gone", "/gone/away", "a/b/c", "~/no-such-folder-here", ""])
def test_a_missing_folder_is_named(name):
    with pytest.raises(FileNotFoundError, match=f"no model folder '{name}'"):
        resolve_model_path(name)


def test_a_file_is_no_model_folder(tmp_path):
    file = tmp_path / "config.json"
    file.touch()
    with pytest.raises(NotADirectoryError, match="give the folder"):
        resolve_model_path(str(file))


def _machine(monkeypatch, cuda, mps):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("asked", "cuda", "mps", "chosen"),
    [
        ("auto", 0, False, "cpu"),
        ("auto", 0, True, "mps"),
        ("auto", 2, True, "cuda"),
        ("cpu", 2, True, "cpu"),
        ("cuda", 1, False, "cuda"),
        ("cuda:1", 2, False, "cuda:1"),
        (torch.device("mps"), 0, True, "mps"),
    ],
)
def test_device_choice(monkeypatch, asked, cuda, mps, chosen):
    _machine(monkeypatch, cuda, mps)
    assert resolve_device(asked) == torch.device(chosen)


@pytest.mark.parametrize(
    ("asked", "cuda", "mps", "message"),
    [
        ("cuda", 0, False, r"'cuda' is not available here \(there is: cpu\); use --device cpu"),
        ("cuda:2", 2, False, r"'cuda:2' is not available here \(there is: cpu, cuda:0, cuda:1\)"),
        ("mps", 1, False, r"'mps' is not available here \(there is: cpu, cuda:0\); use --device cpu"),
        ("gpu", 1, True, "unknown device 'gpu': take auto, cpu, cuda, cuda:N or mps"),
        ("meta", 0, False, "unknown device 'meta'"),
        ("", 0, False, "unknown device ''"),
    ],
)
def test_a_device_that_is_not_there(monkeypatch, asked, cuda, mps, message):
    _machine(monkeypatch, cuda, mps)
    with pytest.raises(ValueError, match=message):
        resolve_device(asked)


def test_dtype_choice():
    assert resolve_dtype("auto") == "auto"
    assert resolve_dtype("bfloat16") is torch.bfloat16
    assert resolve_dtype("float16") is torch.float16
    assert resolve_dtype(torch.float32) is torch.float32


@pytest.mark.parametrize("name", ["int8", "fp32", torch.int8])
def test_unknown_dtype(name):
    with pytest.raises(ValueError, match="take one of auto, bfloat16, float16, float32"):
        resolve_dtype(name)


class FakeProcessor:
    """Stands for the processor: remembers what it is asked."""

    tokenizer = "the tokenizer"
    checked_vocab = None

    @classmethod
    def from_pretrained(cls, folder):
        return cls()

    def check_vocab(self, vocab_size):
        self.checked_vocab = vocab_size


class FakeModel(torch.nn.Linear):
    """Stands for the model."""

    info: dict = {}  # noqa: RUF012 - set by the tests
    options: dict = {}  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, folder, **options):
        cls.options = options
        return cls(2, 3).to(options["dtype"]), cls.info

    class config_class:
        language_config = types.SimpleNamespace(vocab_size=123)

        @classmethod
        def from_pretrained(cls, folder):
            return cls


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A folder with the files of a checkpoint, and a models package that pretends to load it."""
    fake = types.ModuleType("deepseek_vl2.models")
    fake.DeepseekVLV2Processor, fake.DeepseekVLV2ForCausalLM = FakeProcessor, FakeModel
    fake.DeepseekVLV2Config = FakeModel.config_class
    fake.check_memory, fake.choose_quantization = lambda *args: None, lambda *args: args
    fake.check_quantization = lambda *args: None
    fake.read_quantization, fake.needed_quantization = lambda given: given, lambda given, config: given
    fake.checkpoint_bytes, fake.own_quantization = lambda folder: 7, lambda config: None
    fake.WeightOnlyConfig = WeightOnlyConfig
    fake.narrower_stored_dtype, fake.widen = lambda folder, dtype: None, None
    monkeypatch.setitem(sys.modules, "deepseek_vl2.models", fake)
    monkeypatch.setattr(FakeModel, "info", {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()})
    for name in ("config.json", "processor_config.json", "tokenizer.json"):
        (tmp_path / name).write_text('{"model_type": "deepseek_vl_v2"}')
    return tmp_path


def test_loader_returns_tokenizer_processor_model(checkpoint):
    tokenizer, processor, model = load_pretrained_model(checkpoint, "float32", "cpu", attn_implementation="eager")
    assert tokenizer == "the tokenizer"
    assert processor.checked_vocab == 123
    assert not model.training and model.weight.dtype == torch.float32
    assert FakeModel.options["attn_implementation"] == "eager"
    assert FakeModel.options["device_map"] == {"": torch.device("cpu")}


def test_the_type_of_weights_is_chosen_by_hardware_unless_given(checkpoint, monkeypatch):
    asked = []

    def choose(device, num_bytes, quantize):
        asked.append((device, num_bytes, quantize))
        return Choice(torch.float16, "a test")

    monkeypatch.setattr(io, "choose_dtype", choose)
    assert load_pretrained_model(checkpoint, device="cpu").model.weight.dtype == torch.float16
    assert asked == [(torch.device("cpu"), 7, None)]
    assert dtype_name(checkpoint, "cpu", "int8") == "float16"
    assert asked.pop() == (torch.device("cpu"), 7, "int8")
    monkeypatch.setattr(io, "_download", lambda name: str(checkpoint))
    assert dtype_name("someone/model", "cpu") == "float16"
    assert asked.pop() == (torch.device("cpu"), 7, None)
    monkeypatch.setattr(sys.modules["deepseek_vl2.models"], "own_quantization", lambda config: "int4")
    dtype_name(checkpoint, "cpu")
    assert asked.pop() == (torch.device("cpu"), 7, "int4")  # the folder holds such weights
    assert load_pretrained_model(checkpoint, torch.bfloat16, "cpu").model.weight.dtype == torch.bfloat16
    assert load_pretrained_model(checkpoint, "float32", "cpu").model.weight.dtype == torch.float32
    assert len(asked) == 1


def test_loader_takes_a_device_map_instead_of_a_device(checkpoint):
    load_pretrained_model(checkpoint, device_map="auto")
    assert FakeModel.options["device_map"] == "auto"
    with pytest.raises(ValueError, match="give device='cpu' or device_map='auto', not both"):
        load_pretrained_model(checkpoint, device="cpu", device_map="auto")


@pytest.mark.parametrize("kind", ["missing_keys", "unexpected_keys", "mismatched_keys"])
def test_weights_that_do_not_fit_are_refused(checkpoint, monkeypatch, kind):
    monkeypatch.setattr(FakeModel, "info", {kind: [f"layer.{index}" for index in range(7)]})
    with pytest.raises(ValueError, match=rf"do not fit its config\.json: 7 {kind.replace('_', ' ')} \(layer\.0, layer"):
        load_pretrained_model(checkpoint, device="cpu")


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("config.json", r"no config\.json: it is not a model folder"),
        ("processor_config.json", r"no processor_config\.json: the model's processor is missing"),
        ("tokenizer.json", r"no tokenizer\.json: the model's processor is missing"),
    ],
)
def test_a_missing_file_of_the_folder_is_named(checkpoint, gone, message):
    (checkpoint / gone).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        load_pretrained_model(checkpoint, device="cpu")


def test_bad_choices_are_refused_before_anything_is_loaded(checkpoint, monkeypatch):
    _machine(monkeypatch, 0, False)
    for options in ({"device": "cuda"}, {"dtype": "int4"}):
        with pytest.raises(ValueError, match=r"not available|unknown dtype"):
            load_pretrained_model("some/model", **options)


@pytest.fixture
def no_network(checkpoint, monkeypatch, tmp_path):
    """A hub address at which nobody listens, and an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    download = io.snapshot_download
    monkeypatch.setattr(
        io,
        "snapshot_download",
        lambda name, **options: download(
            name, **options, endpoint="http://127.0.0.1:9", cache_dir=tmp_path / "empty cache"
        ),
    )


def test_a_hub_name_without_network_says_so_within_seconds(no_network):
    started = time.monotonic()
    with pytest.raises(
        ConnectionError, match=r"hub cannot be reached .* no complete copy .* bundled model works: 'nano'"
    ):
        load_pretrained_model("deepseek-ai/deepseek-vl2-tiny", device="cpu")
    assert time.monotonic() - started < 8


def test_offline_mode_says_so(no_network, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="offline mode"):
        load_pretrained_model("deepseek-ai/deepseek-vl2-tiny", device="cpu")


def test_an_impossible_hub_name(no_network):
    with pytest.raises(ValueError, match="'bad name' is neither a folder here nor a possible name on the hub"):
        load_pretrained_model("bad name", device="cpu")


def test_a_model_in_the_cache_works_without_network(checkpoint, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    repository = cache / "models--someone--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for name in ("config.json", "processor_config.json", "tokenizer.json"):
        (snapshot / name).write_text('{"model_type": "deepseek_vl_v2"}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    download = io.snapshot_download
    monkeypatch.setattr(
        io,
        "snapshot_download",
        lambda name, **options: download(name, **options, endpoint="http://127.0.0.1:9", cache_dir=cache),
    )
    assert load_pretrained_model("someone/model", device="cpu").tokenizer == "the tokenizer"


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory):
    """A real checkpoint folder with random weights."""
    from deepseek_vl2.nano.architecture import nano_processor, untrained_nano

    folder = tmp_path_factory.mktemp("small checkpoint")
    processor = nano_processor()
    processor.save_pretrained(folder)
    untrained_nano(processor.tokenizer, seed=3).save_pretrained(folder)
    return folder


def test_a_real_checkpoint_loads_and_runs(small_checkpoint):
    tokenizer, processor, model = load_pretrained_model(str(small_checkpoint), "float32", "cpu")
    assert tokenizer is processor.tokenizer and not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    inputs = processor(prompt="Hello", force_batchify=True)
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


@torch.no_grad()
def test_a_packed_model_gives_the_same_logits(small_checkpoint):
    _, processor, plain = load_pretrained_model(small_checkpoint, "float32", "cpu")
    packed = load_pretrained_model(small_checkpoint, "float32", "cpu", pack=True).model
    assert type(packed.language.lm_head) is not type(plain.language.lm_head)
    inputs = processor(prompt="Hello", force_batchify=True)
    torch.testing.assert_close(packed(**inputs).logits, plain(**inputs).logits)


def test_what_cannot_be_quantised_or_compiled_is_said_before_anything_is_downloaded(monkeypatch):
    downloads = []
    monkeypatch.setattr(io, "snapshot_download", lambda name, **options: downloads.append(name))
    monkeypatch.setattr("deepseek_vl2.models.compiling.shutil.which", lambda name: None)
    with pytest.raises(ValueError, match="unknown quantisation 'int3'"):
        load_pretrained_model("someone/model", device="cpu", quantize="int3")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        load_pretrained_model("someone/model", device="cpu", compile=True)
    _machine(monkeypatch, 0, True)
    with pytest.raises(ValueError, match="not possible on 'mps'"):
        load_pretrained_model("someone/model", device="mps", quantize="int8")
    assert downloads == []


def test_the_type_of_weights_suits_the_device_map(small_checkpoint, monkeypatch):
    """int8 on the CPU of a machine whose GPU has no bfloat16."""
    monkeypatch.setattr(io, "resolve_device", lambda device: torch.device("cuda" if device == "auto" else device))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    model = load_pretrained_model(small_checkpoint, device_map="cpu", quantize="int8").model
    assert (model.device.type, model.dtype) == ("cpu", torch.bfloat16)


def test_a_model_is_packed_or_compiled(small_checkpoint, monkeypatch):
    compiled = []
    monkeypatch.setattr("deepseek_vl2.models.compiling.compile_towers", compiled.append)
    monkeypatch.setattr("deepseek_vl2.models.compiling.check_compiler", lambda device_type: None)
    with pytest.raises(ValueError, match="give pack=True or compile=True, not both"):
        load_pretrained_model(small_checkpoint, "float32", "cpu", pack=True, compile=True)
    assert compiled == [load_pretrained_model(small_checkpoint, "float32", "cpu", compile=True).model]


def _copy_with_weights(folder, target, change):
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("view_seperator"), r"1 missing keys \(view_seperator\)"),
        (lambda weights: weights.update(extra=torch.zeros(2)), r"1 unexpected keys \(extra\)"),
        (lambda weights: weights.update(image_newline=torch.zeros(5)), r"1 mismatched keys \(.*image_newline"),
    ],
)
def test_a_real_checkpoint_that_does_not_fit_is_refused(small_checkpoint, tmp_path, change, message):
    folder = _copy_with_weights(small_checkpoint, tmp_path / "changed", change)
    with pytest.raises(ValueError, match=message):
        load_pretrained_model(folder, "float32", "cpu")


EXPERT = "language.model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_checkpoint_without_one_expert_is_refused(small_checkpoint, tmp_path, quantize):
    folder = _copy_with_weights(small_checkpoint, tmp_path / "changed", lambda weights: weights.pop(EXPERT))
    with pytest.raises(ValueError, match="a part of them is missing, has another shape"):
        load_pretrained_model(folder, "float32", "cpu", quantize=quantize)


def test_a_weight_that_is_no_number_is_not_quantised(small_checkpoint, tmp_path):
    folder = _copy_with_weights(
        small_checkpoint, tmp_path / "changed", lambda weights: weights[EXPERT].fill_(torch.nan)
    )
    with pytest.raises(ValueError, match="a part of them is missing, has another shape"):
        load_pretrained_model(folder, "float32", "cpu", quantize="int8")


@pytest.mark.parametrize("content", ["{}", "[]", '{"meta', '{"weight_map": 5}', '{"weight_map": {}, "metadata": {}}'])
def test_a_broken_index_is_named(small_checkpoint, tmp_path, content):
    folder = tmp_path / "changed"
    shutil.copytree(small_checkpoint, folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is broken"):
        load_pretrained_model(folder, "float32", "cpu")


def test_a_quantization_config_counts_like_the_name(small_checkpoint, monkeypatch):
    config = WeightOnlyConfig(bits=8)
    checked = []
    monkeypatch.setattr("deepseek_vl2.models.check_memory", lambda folder, quantize, dtype: checked.append(quantize))
    by_config = load_pretrained_model(small_checkpoint, device="cpu", quantization_config=config, pack=True).model
    by_name = load_pretrained_model(small_checkpoint, device="cpu", quantize="int8").model
    assert checked == [config, "int8"]
    assert by_config.dtype == by_name.dtype
    assert all(map(torch.equal, by_config.state_dict().values(), by_name.state_dict().values()))
    with pytest.raises(ValueError, match="quantize='int8' or a quantization_config, not both"):
        load_pretrained_model(small_checkpoint, device="cpu", quantize="int8", quantization_config=config)


def test_a_quantization_config_may_be_given_by_its_fields(small_checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "deepseek_vl2.models.check_memory", lambda folder, held_as, dtype: asked.append(held_as.to_dict())
    )
    fields = {"quant_method": "deepseek_vl2_weight_only", "bits": 4, "group_size": 32}
    model = load_pretrained_model(small_checkpoint, device="cpu", quantization_config=fields).model
    assert model.dtype == torch.bfloat16  # as with quantize="int4"
    assert model.config.quantization_config.to_dict() == WeightOnlyConfig(bits=4, group_size=32).to_dict() == asked[0]
    with pytest.raises(ValueError, match="quantization_config has no 'bit'"):
        load_pretrained_model(small_checkpoint, quantization_config={"quant_method": fields["quant_method"], "bit": 4})
    with pytest.raises(ValueError, match="give quantize='int8' to load_pretrained_model"):
        load_pretrained_model(small_checkpoint, quantization_config="int8")


def test_quantised_weights_are_not_loaded_as_others(small_checkpoint, tmp_path):
    config = WeightOnlyConfig(bits=4)
    _, processor, model = load_pretrained_model(small_checkpoint, device="cpu", quantization_config=config)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = load_pretrained_model(tmp_path, device="cpu", quantization_config=WeightOnlyConfig(bits=4)).model
    assert again.config.quantization_config.to_dict() == config.to_dict()
    for other in (WeightOnlyConfig(bits=8), WeightOnlyConfig(bits=4, group_size=32)):
        with pytest.raises(ValueError, match=r"quantised already .*'bits': 4, 'group_size': 64"):
            load_pretrained_model(tmp_path, device="cpu", quantization_config=other)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"bits": 3}, "bits 3 must be 8 or 4"), ({"foo": 1}, "has no 'foo'"), ({"layout_version": 1}, "have layout 1")],
)
def test_a_damaged_quantization_config_is_refused(small_checkpoint, tmp_path, change, message):
    folder = tmp_path / "int8"
    loaded = load_pretrained_model(small_checkpoint, device="cpu", quantize="int8")
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_pretrained_model(folder, device="cpu")
    with pytest.raises(ValueError, match=message):
        check_model(str(folder), torch.device("cpu"), 10**10)


def test_weights_that_are_cut_off_are_refused(small_checkpoint, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(small_checkpoint, folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="are broken or cut off"):
        load_pretrained_model(folder, "float32", "cpu")


def test_a_model_without_rows_for_the_special_tokens_is_refused(small_checkpoint, tmp_path):
    folder = tmp_path / "smaller"
    shutil.copytree(small_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["language_config"]["vocab_size"] = 100
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="100"):
        load_pretrained_model(folder, "float32", "cpu")


def test_another_kind_of_model_is_refused(checkpoint):
    (checkpoint / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="a model of type 'llama'; this library loads 'deepseek_vl_v2'"):
        load_pretrained_model(checkpoint, device="cpu")
