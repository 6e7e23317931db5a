"""Numbers of a run."""

import pytest

from deepseek_vl2.evaluate.results import format_table, summarize, summarize_run


def record(score, category="", is_readable=True, **more):
    return {"id": "x", "category": category, "is_readable": is_readable, "score": score, **more}


def test_right_and_wrong_answers():
    summary = summarize([record(1.0), record(0.0), record(1.0), record(0.0, is_readable=False)])
    # Wilson by hand for 2 of 4: middle 0.5, half 1.96 * sqrt(1/16 + 3.8416/64) / (1 + 3.8416/4) = 0.35
    assert summary == {
        "score": 50.0,
        "interval": {"low": 15.0, "high": 85.0, "method": "wilson"},
        "num_samples": 4,
        "num_unreadable": 1,
        "num_right": 2,
    }


def test_scores_between_take_the_bootstrap():
    summary = summarize([record(0.3), record(0.9), record(1.0)])
    assert summary["score"] == 73.33
    assert summary["interval"]["method"] == "bootstrap"
    assert 30 <= summary["interval"]["low"] < 73.33 < summary["interval"]["high"] <= 100
    assert "num_right" not in summary


def test_mean_iou():
    assert summarize([record(1.0, iou=0.8), record(0.0, iou=0.1)])["mean_iou"] == 45.0


def test_f1_counts_all_boxes_together():
    summary = summarize([record(1.0, counts=[1, 1, 1]), record(0.4, counts=[1, 2, 3])])
    # by hand: 2 of 3 found are right, 2 of 4 expected are found, F1 = 4/7
    assert (summary["score"], summary["precision"], summary["recall"]) == (57.14, 66.67, 50.0)
    assert summary["interval"]["method"] == "bootstrap"


def test_mean_iou_of_several_boxes_is_that_over_all_of_them():
    records = [
        record(1.0, "a", iou=0.9, counts=[1, 1, 1]),
        record(0.4, "a", iou=0.3, counts=[1, 2, 3]),
        record(0.0, "b", counts=[0, 1, 0]),  # nothing was to be found
    ]
    results = summarize_run(records)
    assert results["overall"]["mean_iou"] == 45.0  # by hand: (1 * 0.9 + 3 * 0.3) / 4
    assert "mean_iou" not in results["by_category"]["b"]
    assert [line.split()[6:8] for line in format_table(results).splitlines()[2:]] == [["45.00", "66.67"], ["-", "0.00"]]


def test_categories_and_table():
    results = summarize_run([record(1.0, "b"), record(0.0, "a"), record(1.0, "a"), record(1.0)])
    assert list(results["by_category"]) == ["a", "b"]
    assert [part["score"] for part in results["by_category"].values()] == [50.0, 100.0]
    assert results["overall"]["score"] == 75.0
    rows = [line.split()[:3] for line in format_table(results).splitlines()]
    assert rows == [["category", "samples", "score"], ["all", "4", "75.00"], ["a", "2", "50.00"], ["b", "1", "100.00"]]


def test_a_circular_question_is_right_if_it_is_in_every_order():
    scores = {"1": 1.0, "1000001": 0.0, "2": 1.0, "2000002": 1.0, "name": 1.0}
    records = [record(score, "a") | {"id": name} for name, score in scores.items()]
    assert summarize_run(records)["overall"]["num_samples"] == 5
    results = summarize_run(records, is_circular=True)
    assert (results["overall"]["num_samples"], results["overall"]["num_right"]) == (3, 2)
    assert results["by_category"]["a"] == results["overall"]


def test_numbers_by_split():
    results = summarize_run([record(1.0, split="dev"), record(0.0, split="validation"), record(1.0)])
    assert {name: part["score"] for name, part in results["by_split"].items()} == {"dev": 100.0, "validation": 0.0}
    assert "split validation" in format_table(results)


def test_no_categories():
    assert summarize_run([record(1.0)])["by_category"] == {}


@pytest.mark.parametrize(("extra", "head"), [({"iou": 0.5}, "mean iou"), ({"counts": [1, 1, 2]}, "recall")])
def test_the_table_has_the_tasks_own_columns(extra, head):
    assert head in format_table(summarize_run([record(1.0, **extra)])).splitlines()[0]
