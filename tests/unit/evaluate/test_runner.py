"""Asking a model: batches, the way through the cache, and runs that go on. The model has learnt nothing."""

import json
import random
from dataclasses import replace

import pytest
import torch

from deepseek_vl2.evaluate import runner
from deepseek_vl2.evaluate.predictions import PREDICTIONS_FILE
from deepseek_vl2.evaluate.runner import Asker, find_too_long, run
from deepseek_vl2.evaluate.samples import Sample
from deepseek_vl2.evaluate.tasks import TASKS
from deepseek_vl2.nano.architecture import nano_processor, untrained_nano
from deepseek_vl2.nano.scenes import random_scene
from deepseek_vl2.serve import batch_generation
from deepseek_vl2.utils.io import LoadedModel


@pytest.fixture(scope="module")
def loaded():
    processor = nano_processor()
    return LoadedModel(processor.tokenizer, processor, untrained_nano(processor.tokenizer, seed=2).eval())


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    made = []
    for number, size in enumerate([(112, 112), (224, 112), (112, 224), (150, 130), (112, 112)]):
        path = folder / f"{number}.png"
        random_scene(random.Random(number), size=size).draw().save(path)
        question = " ".join(["What is it?"] * (number + 1))
        made.append(Sample(str(number), f"line {number}", question, (str(path),), (size,), ("x",), category="c"))
    return made


def asker(loaded, task="exact_match", max_new_tokens=4, chunk_size=-1, use_tiling=True):
    model = loaded.model
    return Asker(loaded.processor, model.config, lambda: model, TASKS[task], max_new_tokens, chunk_size, use_tiling)


def test_a_batch_gives_each_samples_own_answer(loaded, samples):
    alone = [asker(loaded).answer([sample])[0] for sample in samples]
    assert len(set(alone)) > 1
    assert asker(loaded).answer(samples) == alone


def test_chunks_do_not_change_the_answers(loaded, samples):
    assert asker(loaded, chunk_size=7).answer(samples) == asker(loaded).answer(samples)


def test_max_new_tokens_limits_the_answer(loaded, samples):
    (short,), (longer,) = (asker(loaded, max_new_tokens=n).answer(samples[:1]) for n in (1, 6))
    assert longer.startswith(short) and len(longer) > len(short)


def test_an_answer_ends_at_eos_and_keeps_grounding_marks(loaded, samples, monkeypatch):
    processor = loaded.processor
    tokens = iter(processor.encode("<|ref|>red<|/ref|>", bos=False, eos=True))

    def choose_tokens(logits, samplers):
        return [next(tokens)] * len(samplers)

    monkeypatch.setattr(batch_generation, "choose_tokens", choose_tokens)
    assert asker(loaded).answer(samples[:2]) == ["<|ref|>red<|/ref|>"] * 2
    assert next(tokens, None) is None


def test_mmmu_doubles_its_first_picture(loaded, samples):
    choice = Sample(
        "m", "line 1", "Which?", samples[0].pictures, samples[0].sizes, ("A",), options={"A": "x", "B": "y"}
    )
    assert asker(loaded, "mmbench").encode(choice).images_spatial_crop.tolist() == [[1, 1]]
    assert asker(loaded, "mmmu").encode(choice).images_spatial_crop.tolist() == [[2, 2]]


def test_without_tiling_a_picture_is_one_view_and_the_answer_another(loaded, samples):
    """The picture is 224x112: two tiles, and a question that is the same but for them."""
    tiled, plain = asker(loaded), asker(loaded, use_tiling=False)
    assert tiled.encode(samples[1]).images_spatial_crop.tolist() == [[2, 1]]
    encoded = plain.encode(samples[1])
    assert encoded.images_spatial_crop.tolist() == [[1, 1]]
    assert len(encoded.images) == 2
    assert torch.equal(encoded.images[0], tiled.encode(samples[1]).images[0])
    assert torch.equal(encoded.images[0], encoded.images[1])  # no more is seen than in the global view
    # The processor of the model is left as it is.
    assert asker(loaded).encode(samples[1]).images_spatial_crop.tolist() == [[2, 1]]


def test_questions_without_room_are_found_before_the_first_is_asked(loaded, samples):
    long = Sample("long", "line 9", "word " * 5000, answers=("x",))
    (problem,) = find_too_long(asker(loaded), [*samples[:2], long])
    assert problem.where == "line 9"
    assert "positions" in problem.reason


@pytest.mark.parametrize(("room", "num_problems"), [(0, 0), (1, 1)])
@pytest.mark.parametrize("task", ["exact_match", "mmmu"])
def test_lengths_are_those_that_are_asked_and_need_no_picture(loaded, samples, monkeypatch, room, num_problems, task):
    """Also of pictures that a task enlarges, and of those that are not tiled."""
    options = {"A": "x", "B": "y"}
    asked = replace(samples[1], answers=("A",), options=options)
    for use_tiling in (True, False):
        tested = asker(loaded, task, use_tiling=use_tiling)
        length = len(tested.encode(asked))
        with monkeypatch.context() as patch:
            patch.setattr(loaded.model.config.language_config, "max_position_embeddings", length - room)
            patch.setattr(runner, "load_image", None)
            assert len(find_too_long(tested, [asked])) == num_problems


class Stopped(Exception):
    pass


@pytest.mark.parametrize("num_written", [0, 1, 2, 3, 4])
def test_a_stopped_run_gives_the_file_of_one_that_was_not(loaded, samples, tmp_path, monkeypatch, num_written):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir(), stopped.mkdir()
    records = run(asker(loaded), samples, whole, batch_size=2)
    lines = (whole / PREDICTIONS_FILE).read_bytes().splitlines(keepends=True)
    assert [json.loads(line) for line in lines] == json.loads(json.dumps(records))
    assert [record["id"] for record in records] == [sample.id for sample in samples]
    (stopped / PREDICTIONS_FILE).write_bytes(b"".join(lines[:num_written]) + lines[num_written][:9])
    asked = []
    answer = Asker.answer
    monkeypatch.setattr(Asker, "answer", lambda self, batch: asked.append(len(batch)) or answer(self, batch))
    assert json.loads(json.dumps(run(asker(loaded), samples, stopped, batch_size=2))) == json.loads(json.dumps(records))
    assert (stopped / PREDICTIONS_FILE).read_bytes() == (whole / PREDICTIONS_FILE).read_bytes()
    assert sum(asked) == len(samples) - num_written + num_written % 2  # a batch is asked whole


def test_every_answer_is_in_the_file_at_once(loaded, samples, tmp_path, monkeypatch):
    seen = []

    def answer(self, batch):
        path = tmp_path / PREDICTIONS_FILE
        seen.append(len(path.read_text(encoding="utf-8").splitlines()))
        if len(seen) == 3:
            raise Stopped
        return ["x"] * len(batch)

    monkeypatch.setattr(runner.Asker, "answer", answer)
    with pytest.raises(Stopped):
        run(asker(loaded), samples, tmp_path, batch_size=2)
    assert seen == [0, 2, 4]


def test_a_record_holds_answer_and_score(samples):
    assert runner.make_record(samples[0], " X.", TASKS["exact_match"]) == {
        "id": "0",
        "category": "c",
        "answer": " X.",
        "understood": "X",
        "is_readable": True,
        "score": 1.0,
    }
