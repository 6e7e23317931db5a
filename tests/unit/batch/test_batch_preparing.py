"""Batches: of like length, the same every time, within their limits; prepared ahead, but not far."""

import random
import threading
import time

import pytest
from batch_inputs import save_pictures

from deepseek_vl2.batch.items import Item, ask_about
from deepseek_vl2.batch.preparing import BatchLimits, PlannedItem, Preparer, plan_batches, read_ahead
from deepseek_vl2.models import DeepseekV2Config
from deepseek_vl2.nano.architecture import nano_processor


def planned(*lengths):
    return [PlannedItem(Item(index, str(index)), length) for index, length in enumerate(lengths)]


def lengths_of(batches):
    return [[entry.num_tokens for entry in batch] for batch in batches]


def test_batches_are_of_like_length_and_within_the_limits():
    limits = BatchLimits(batch_size=3, token_budget=60)
    batches = plan_batches(planned(10, 50, 7, 10, 100, 8, 9, 5), limits, max_new_tokens=10)
    assert lengths_of(batches) == [[100], [50], [10, 10, 9], [8, 7, 5]]
    assert [entry.item.index for entry in batches[2]] == [0, 3, 6]  # equals in the order of the input


def test_batches_do_not_depend_on_the_order_in_which_lengths_come():
    entries = planned(*(random.Random(1).choices(range(5, 40), k=50)))
    limits = BatchLimits(batch_size=4, token_budget=150)
    batches = plan_batches(entries, limits, 5)
    assert plan_batches(random.Random(2).sample(entries, len(entries)), limits, 5) == batches
    assert sorted(entry.item.index for batch in batches for entry in batch) == list(range(50))
    assert all(len(batch) == 1 or len(batch) * (batch[0].num_tokens + 5) <= 150 for batch in batches)


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """Seven, of which 2 has a problem, 4 is broken behind its header, and 5 is too long."""
    paths = save_pictures(tmp_path_factory.mktemp("pictures"), 7)
    paths[4].write_bytes(paths[4].read_bytes()[:200])
    made = []
    for index, path in enumerate(paths):
        prompt = "word " * 5000 if index == 5 else "What?"
        made.append(Item(index, path.name, ask_about(prompt, (str(path),)), (str(path),)))
    made[2] = Item(2, "02.png", problem="known before")
    return made


def preparer(window=7, batch_size=2):
    limits = BatchLimits(batch_size=batch_size, window=window, num_readers=2)
    return Preparer(nano_processor(), DeepseekV2Config(max_position_embeddings=4096), limits, max_new_tokens=8)


def test_every_item_is_prepared_once(items):
    batches = list(preparer().batches(items, lambda index: False))
    entries = {entry.item.index: entry for batch in batches for entry in batch}
    assert sorted(entries) == list(range(7)) == sorted(entry.item.index for batch in batches for entry in batch)
    assert [sorted(entry.item.index for entry in batch) for batch in batches[:1]] == [[2, 5]]
    assert entries[2].problem == "known before"
    assert "5" in entries[5].problem and "positions" in entries[5].problem
    assert "broken or truncated" in entries[4].problem
    good = [entries[index] for index in (0, 1, 3, 6)]
    assert all(entry.encoded is not None and not entry.problem for entry in good)
    assert entries[1].sizes == ((224, 112),)
    lengths = [len(entry.encoded) for batch in batches for entry in batch if entry.encoded is not None]
    assert lengths == sorted(lengths, reverse=True)


def test_a_batch_stays_the_same_when_part_of_it_is_done(items):
    """And one of which all is done is not prepared again."""
    whole = [[e.item.index for e in batch] for batch in preparer(window=3).batches(items, lambda index: False)]
    done = {0, 1, 2, 3}
    rest = [[e.item.index for e in batch] for batch in preparer(window=3).batches(items, done.__contains__)]
    assert rest == [batch for batch in whole if not set(batch) <= done]


def test_reading_ahead_is_bounded_and_in_order():
    taken = []

    def count():
        for number in range(50):
            taken.append(number)
            yield number

    ahead = read_ahead(count(), 3)
    assert next(ahead) == 0
    time.sleep(0.3)
    assert len(taken) <= 6  # one taken, three that wait, one on its way there
    assert list(ahead) == list(range(1, 50))


def test_an_error_of_the_reader_arrives_and_nothing_is_left_running():
    closed = threading.Event()

    def fail():
        try:
            yield 1
            raise ValueError("no more")
        finally:
            closed.set()

    ahead = read_ahead(fail(), 1)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="no more"):
        next(ahead)
    assert closed.is_set()


def test_who_stops_early_stops_the_reading():
    closed = threading.Event()

    def count():
        try:
            while True:
                yield 1
        finally:
            closed.set()

    ahead = read_ahead(count(), 2)
    next(ahead)
    ahead.close()
    assert closed.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("deepseek_vl2-read-ahead")]
