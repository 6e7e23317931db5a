"""Several devices: which map of them is made, and what is on the CPU and the disk gives the same tokens."""

import accelerate
import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from small_models import IMAGE_ID, SIDE, VARIANTS, vl_config
from transformers.integrations.accelerate import infer_auto_device_map

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.device_placement import place_view_embeddings

PARTS = ("image_newline", "view_seperator", "vision", "projector", "language")
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def meta_model():
    with torch.device("meta"):
        return DeepseekVLV2ForCausalLM(vl_config())


def size(module):
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def device_of(name, device_map):
    while name not in device_map:
        name = name.rpartition(".")[0]
    return device_map[name]


@pytest.mark.parametrize("share", [0.45, 0.6, 0.8])
def test_automatic_maps_of_two_devices_keep_tower_and_layers_whole(meta_model, share):
    memory = {0: int(share * size(meta_model)), 1: int(share * size(meta_model)), "cpu": 10**9}
    device_map = infer_auto_device_map(meta_model, memory, meta_model._no_split_modules)
    place_view_embeddings(device_map, PARTS)
    assert len(set(device_map.values())) > 1
    wholes = {"vision", *(f"language.model.layers.{index}" for index in range(3))}
    for whole in wholes:
        devices = {device_of(name, device_map) for name, _ in meta_model.named_parameters() if name.startswith(whole)}
        assert len(devices) == 1
    embeddings = device_of("language.model.embed_tokens", device_map)
    assert device_map["image_newline"] == device_map["view_seperator"] == embeddings


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [
        ({"": 0}, {"": 0}),
        ({"": "disk"}, dict.fromkeys(PARTS, "disk") | {"image_newline": "cpu", "view_seperator": "cpu"}),
        ({"": 0, "language": 1}, {"vision": 0, "projector": 0} | dict.fromkeys(PARTS[:2] + PARTS[4:], 1)),
        (
            {"vision": 0, "projector": 0, "language.model": 1, "language.lm_head": 0, "image_newline": 0},
            {"vision": 0, "projector": 0, "language.model": 1, "language.lm_head": 0}
            | {"image_newline": 1, "view_seperator": 1},
        ),
    ],
)
def test_view_embeddings_lie_beside_the_token_embeddings(device_map, expected):
    place_view_embeddings(device_map, PARTS)
    assert device_map == expected


@pytest.fixture(scope="module", params=["tiny", "base"])
def saved(request, tmp_path_factory):
    torch.manual_seed(0)
    model = DeepseekVLV2ForCausalLM(vl_config(VARIANTS[request.param])).eval()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def prompt():
    num_image_tokens = 3 * 4 + 1 + 3 * (2 * 3 + 1)  # two tiles side by side
    ids = torch.tensor([[2, *[IMAGE_ID] * num_image_tokens, 7, 8, 9]])
    return {
        "input_ids": ids,
        "images": torch.randn(1, 3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)),
        "images_seq_mask": ids == IMAGE_ID,
        "images_spatial_crop": torch.tensor([[[2, 1]]]),
        "attention_mask": torch.ones_like(ids),
    }


MIXED = {
    "vision": "disk",
    "projector": "cpu",
    "image_newline": "disk",
    "view_seperator": "cpu",
    "language.model.embed_tokens": "disk",
    "language.model.layers.0": "cpu",
    "language.model.layers.1": "disk",
    "language.model.layers.2": "cpu",
    "language.model.norm": "disk",
    "language.lm_head": "cpu",
}


@pytest.mark.parametrize("device_map", [{"": "disk"}, MIXED], ids=["disk", "mixed"])
def test_weights_on_cpu_and_disk_give_the_same_tokens(saved, tmp_path, device_map):
    model, folder = saved
    inputs = prompt()
    expected = model.generate(**inputs, **GREEDY).tolist()
    loaded = DeepseekVLV2ForCausalLM.from_pretrained(folder, device_map=dict(device_map), offload_folder=tmp_path)
    assert loaded.language.model.layers[1].input_layernorm.weight.is_meta
    assert not loaded.image_newline.is_meta
    assert loaded.generate(**inputs, **GREEDY).tolist() == expected
    embeds, cache = loaded.incremental_prefilling(**inputs, chunk_size=7)
    assert loaded.generate(inputs_embeds=embeds, past_key_values=cache, **inputs, **GREEDY).tolist() == expected


def dispatched(parts_on_meta):
    """A model with some parts on the meta device, which stands for a second GPU.

    An operation on tensors of both fails as on two GPUs. There is no way back from it, so it gets the last parts.
    """
    # Its layers are dense, as routers ask for autocast, which the meta device has none of.
    model = DeepseekVLV2ForCausalLM(vl_config({"first_k_dense_replace": 3})).eval()
    names = [*PARTS[:4], "language.model.embed_tokens", *(f"language.model.layers.{index}" for index in range(3))]
    names += ["language.model.norm", "language.lm_head"]
    device_map = {name: "meta" if name.startswith(parts_on_meta) else "cpu" for name in names}
    place_view_embeddings(device_map, PARTS)
    accelerate.dispatch_model(model, device_map, main_device="cpu", skip_keys=model._skip_keys_device_placement)
    for name in PARTS[:2]:  # accelerate puts parameters of the whole model on its main device
        set_module_tensor_to_device(model, name, device_map[name])
    return model


@pytest.mark.parametrize("parts_on_meta", [("projector", "language"), ("language",)])
def test_image_tokens_follow_to_the_device_of_the_token_embeddings(parts_on_meta):
    model = dispatched(parts_on_meta)
    assert not model.vision.pos_embed.is_meta
    with torch.no_grad():
        embeds = model.prepare_inputs_embeds(**prompt())
    assert embeds.is_meta
    assert embeds.shape == (1, 38, 48)


def test_prompts_follow_from_layer_to_layer_and_leave_their_cache_there():
    last_parts = [f"language.{name}" for name in ("model.layers.1", "model.layers.2", "model.norm", "lm_head")]
    model = dispatched(tuple(last_parts))
    with torch.no_grad():
        embeds, cache = model.incremental_prefilling(**prompt(), chunk_size=7)
    assert not embeds.is_meta
    assert [layer.keys.is_meta for layer in cache.layers] == [False, True, True]
