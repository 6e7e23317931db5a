"""Conversations to learn: what counts in the loss, and how bad lines are told."""

import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_models import SIDE

from deepseek_vl2.models import DeepseekV2Config
from deepseek_vl2.train.collator import TrainingCollator
from deepseek_vl2.train.data import (
    ConversationDataset,
    ConversationEncoder,
    Sample,
    read_samples,
    split_samples,
)


@pytest.fixture
def encoder(processor):
    return ConversationEncoder(processor, DeepseekV2Config(max_position_embeddings=120))


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (SIDE, SIDE), "red").save(tmp_path / "a.png")
    Image.new("RGB", (SIDE, 2 * SIDE), "blue").save(tmp_path / "b.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    return tmp_path


def dialogue(*texts, images=()):
    roles = ("<|User|>", "<|Assistant|>")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
    messages[0]["images"] = list(images)
    return {"conversations": messages}


def write(folder: Path, *documents) -> Path:
    path = folder / "data.jsonl"
    lines = [document if isinstance(document, str) else json.dumps(document) for document in documents]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


GOOD = dialogue("<image>\nWhat color?", "red", images=["a.png"])


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_only_answers_and_their_ends_are_learnt(processor, folder, mask_prompt):
    """Also with the published processors' `mask_prompt: false`."""
    processor.mask_prompt = mask_prompt
    document = dialogue("<image>\nWhat color?", "red", "And now?", "blue one", images=["a.png"])
    encoder = ConversationEncoder(processor, DeepseekV2Config(max_position_embeddings=200))
    samples = read_samples(write(folder, document), encoder)
    batch = TrainingCollator(processor)([encoder(samples[0].messages)])
    assert processor.mask_prompt is mask_prompt
    processor.mask_prompt = True
    learnt = batch["labels"][0] != -100
    expected = [*processor.encode("red", bos=False), processor.eos_id]
    expected += [*processor.encode("blue one", bos=False), processor.eos_id]
    assert batch["labels"][0][learnt].tolist() == expected
    assert torch.equal(batch["input_ids"][0][learnt], batch["labels"][0][learnt])


def test_batches_are_padded_on_the_right_and_views_stacked(processor, encoder, folder):
    documents = [
        dialogue("<image>\nWhat color?", "blue", images=["b.png"]),
        dialogue("How many?", "1"),
        dialogue("<image>\nWhat color?", "red", images=["a.png"]),
    ]
    samples = read_samples(write(folder, *documents), encoder)
    dataset = ConversationDataset(samples, encoder)
    rows = [dataset[index] for index in range(3)]
    batch = TrainingCollator(processor)(rows)
    assert set(batch) == {*processor.model_input_names, "labels"}
    lengths = [len(row) for row in rows]
    assert len(set(lengths)) == 3
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert bool(batch["attention_mask"][:, 0].all())
    # b.png has a global view and two tiles, a.png one of each.
    assert batch["images"].shape == (3, 3, 3, SIDE, SIDE)
    assert torch.equal(batch["images"][0], rows[0].images)
    assert torch.equal(batch["images"][2, :2], rows[2].images)
    assert batch["images_spatial_crop"].tolist() == [[[1, 2]], [[0, 0]], [[1, 1]]]
    assert bool((batch["labels"][batch["attention_mask"] == 0] == -100).all())


def test_openai_parts_mean_the_same(encoder, folder):
    parts = {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "a.png"}},
                    {"type": "text", "text": "What color?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ]
    }
    own, other = (encoder(sample.messages) for sample in read_samples(write(folder, GOOD, parts), encoder))
    assert torch.equal(own.input_ids, other.input_ids)
    assert torch.equal(own.target_ids, other.target_ids)
    assert torch.equal(own.images, other.images)


BAD = [
    ('{"conversations": [', "not JSON: Expecting value at line 1, column 20"),
    ("[1, 2]", "the line must hold an object with one of the keys conversations, messages"),
    ({"conversations": []}, "'conversations' must be a list of messages with role and content"),
    ({"conversations": ["hello"]}, "message 0 has to be a dictionary with role and content"),
    ({"conversations": [{"role": "robot", "content": "hi"}]}, "unknown role 'robot'"),
    ({"conversations": [{"role": "user", "content": 5}]}, "a message's content is text or a list of parts, got int"),
    (dialogue("What?"), "the conversation has no answer to learn"),
    (dialogue("What?", " "), "message 1 is an answer with no text"),
    (dialogue("What?", "a", "And?", ""), "message 3 is an answer with no text"),
    (dialogue("<image>\nWhat?", "red", images=["none.png"]), "there is no picture 'none.png'"),
    (dialogue("<image>\nWhat?", "red", images=[7]), "a picture is given by its path, not by 7"),
    (dialogue("<image>\n<image>\nWhat?", "red", images=["a.png"]), "1 picture(s) given for 2 <image> mark(s)"),
    (dialogue("<image>\nWhat?", "red", images=["broken.png"]), "broken.png"),
    (
        dialogue("Where?", "<|ref|>star<|/ref|><|det|>[[1, 2, 3, 1000]]<|/det|>"),
        "the answer in message 1 has malformed boxes: <|det|> at character 19: the box '[1, 2, 3, 1000]' leaves the "
        "range 0..999",
    ),
    (dialogue("Where?", "<|ref|>star<|/ref|><|det|>[[1, 2, 3]]<|/det|>"), "has 3 values, not 4"),
    (dialogue("word " * 200, "red"), "tokens, the model has 120 positions"),
]


@pytest.mark.parametrize(("document", "reason"), BAD)
def test_a_bad_line_is_told_with_number_and_reason(encoder, folder, document, reason):
    path = write(folder, GOOD, document)
    with pytest.raises(ValueError) as caught:
        read_samples(path, encoder)
    first, count = str(caught.value).split("\n")
    assert first.startswith(f"{path}:2: ")
    assert reason in first
    assert count == (
        f"1 of 2 lines of {path} cannot be used; mend them, or go on without them: skip_bad: true (--skip-bad)"
    )


def test_skipping_goes_on_with_the_rest_and_says_so(encoder, folder, caplog):
    path = write(folder, *(document for document, _ in BAD), GOOD, "", GOOD)
    with caplog.at_level(logging.WARNING, "deepseek_vl2.train.data"):
        samples = read_samples(path, encoder, skip_bad=True)
    assert [sample.source for sample in samples] == [f"{path}:{len(BAD) + 1}", f"{path}:{len(BAD) + 3}"]
    lines = caplog.messages[0].split("\n")
    assert [line.split(": ")[0] for line in lines[:-1]] == [f"{path}:{number + 1}" for number in range(len(BAD))]
    assert lines[-1] == f"{len(BAD)} of {len(BAD) + 2} lines of {path} cannot be used; going on with the rest"


def test_many_bad_lines_are_all_named_and_counted(encoder, folder):
    with pytest.raises(ValueError) as caught:
        read_samples(write(folder, GOOD, *["no"] * 50), encoder)
    lines = str(caught.value).split("\n")
    assert [line.split(": ")[0].rpartition(":")[2] for line in lines[:-1]] == [str(number) for number in range(2, 52)]
    assert lines[-1].startswith("50 of 51 lines")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file(encoder, tmp_path, content):
    (tmp_path / "e.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"e\.jsonl is empty: it holds no conversations"):
        read_samples(tmp_path / "e.jsonl", encoder, skip_bad=True)


def test_nothing_left_is_an_error_even_when_skipping(encoder, folder):
    with pytest.raises(ValueError, match=r"2 of 2 lines of .* cannot be used; mend them$"):
        read_samples(write(folder, "no", "no"), encoder, skip_bad=True)


def test_without_the_check_a_broken_picture_is_named_when_it_is_met(encoder, folder):
    path = write(folder, dialogue("<image>\nWhat?", "red", images=["broken.png"]))
    dataset = ConversationDataset(read_samples(path, encoder, check_samples=False), encoder)
    with pytest.raises(ValueError, match=r"data\.jsonl:1: .*broken\.png"):
        dataset[0]


def test_other_encodings_are_told(encoder, folder):
    path = folder / "latin.jsonl"
    path.write_bytes('{"conversations": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl:1: not UTF-8 text"):
        read_samples(path, encoder)


def test_splitting_deals_out_each_sample_once():
    samples = [Sample(str(number), []) for number in range(20)]
    learned, measured = split_samples(samples, 0.25, seed=3)
    assert len(measured) == 5
    assert sorted(int(sample.source) for sample in learned + measured) == list(range(20))
    assert split_samples(samples, 0.25, seed=3) == (learned, measured)
    assert split_samples(samples, 0.25, seed=4) != (learned, measured)
    with pytest.raises(ValueError, match=r"1 conversation\(s\) cannot be split with eval_share: 0\.5"):
        split_samples(samples[:1], 0.5, seed=0)
