"""The engine behind the page: one model, fair order, stop at once, errors only to whom they belong."""

import threading
import time

import pytest
from page_answers import said

from deepseek_vl2.serve.app_modules.conversation import Question, Turn
from deepseek_vl2.serve.app_modules.engine import (
    FAILED,
    IDLE,
    LIBRARIES,
    READY,
    WAITING,
    WEIGHTS,
    Engine,
    LoadState,
    Request,
)
from deepseek_vl2.serve.app_modules.sessions import Session, Sessions
from deepseek_vl2.serve.app_modules.settings import Settings
from deepseek_vl2.serve.fair_queue import FairQueue

TIMEOUT = 60


def request(text):
    return Request((), Question(text), Settings())


class Slow:
    """Answers when it is told to, and notes in which order it was asked."""

    device = "cpu"

    def __init__(self):
        self.go_on = threading.Event()
        self.asked = []
        self.forgotten = []

    def forget(self, user):
        self.forgotten.append(user)

    def answer(self, request, job):
        self.asked.append(request.question.text)
        if request.question.text == "bad":
            raise ValueError("no such thing")
        stopped = threading.Event()
        job.call_on_stop(stopped.set)
        while not (self.go_on.is_set() or stopped.is_set()):
            time.sleep(0.005)
        return said(request.question.text, was_stopped=job.is_stopped)


@pytest.fixture
def slow():
    return Slow()


@pytest.fixture
def engine(slow):
    engine = Engine(lambda set_state: slow)
    yield engine
    slow.go_on.set()
    engine.close()


def test_forgetting_a_user_reaches_the_model_once_it_is_there(engine, slow):
    engine.forget("a")  # there is nothing to forget
    job = engine.submit("b", request("b1"))
    assert job.user == "b"
    slow.go_on.set()
    job.future.result(TIMEOUT)
    engine.forget("b")
    assert slow.forgotten == ["b"]


def wait_for(condition):
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_everybody_gets_a_turn_before_anybody_gets_two():
    queue = FairQueue()
    for user, item in [("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"), ("b", "b2")]:
        queue.push(user, item)
    items = queue.in_turn()
    assert items == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert [queue.place(item) for item in items] == [0, 1, 2, 3, 4, 5]
    assert queue.remove("c1")
    assert not queue.remove("c1")
    assert queue.place("c1") is None
    assert queue.pop() == "a1"
    queue.push("d", "d1")  # still in the first round
    queue.push("a", "a4")
    assert [queue.pop() for _ in range(len(queue))] == ["b1", "d1", "a2", "b2", "a3", "a4"]
    with pytest.raises(IndexError):
        queue.pop()


def test_questions_wait_in_fair_order_and_see_their_place(engine, slow):
    first = engine.submit("a", request("a1"))
    wait_for(lambda: slow.asked == ["a1"])
    jobs = [engine.submit(user, request(text)) for user, text in [("a", "a2"), ("a", "a3"), ("b", "b1")]]
    assert [engine.place(job) for job in (first, *jobs)] == [None, 1, 2, 0]
    assert {job.phase for job in jobs} == {WAITING}
    assert (engine.num_running, engine.num_waiting) == (1, 3)
    slow.go_on.set()
    assert [job.future.result(TIMEOUT).text for job in jobs] == ["a2", "a3", "b1"]
    assert slow.asked == ["a1", "b1", "a2", "a3"]
    wait_for(lambda: engine.num_running == 0)


def test_stop_ends_a_running_and_a_waiting_answer(engine, slow):
    running, waiting, last = (engine.submit(user, request(user)) for user in "abc")
    wait_for(lambda: slow.asked == ["a"])
    engine.cancel(waiting)
    assert waiting.future.cancelled()
    engine.cancel(running)
    assert running.future.result(TIMEOUT).was_stopped
    slow.go_on.set()
    assert last.future.result(TIMEOUT).text == "c"
    assert slow.asked == ["a", "c"]


def test_an_error_reaches_only_its_question(engine, slow):
    slow.go_on.set()
    jobs = [engine.submit(user, request(text)) for user, text in [("a", "x"), ("b", "bad"), ("c", "y")]]
    assert jobs[0].future.result(TIMEOUT).text == "x"
    with pytest.raises(ValueError, match="no such thing"):
        jobs[1].future.result(TIMEOUT)
    assert jobs[2].future.result(TIMEOUT).text == "y"


def test_several_answers_at_once_if_asked_for(slow):
    engine = Engine(lambda set_state: slow, concurrency=2)
    jobs = [engine.submit(user, request(user)) for user in "abc"]
    wait_for(lambda: len(slow.asked) == 2)
    assert (engine.num_running, engine.num_waiting) == (2, 1)
    slow.go_on.set()
    assert [job.future.result(TIMEOUT).text for job in jobs] == ["a", "b", "c"]
    engine.close()


def test_the_model_is_loaded_once_and_progress_is_told(slow):
    may_end, loads = threading.Event(), []

    def load(set_state):
        loads.append(1)
        set_state(LoadState(WEIGHTS, 0.4))
        assert may_end.wait(TIMEOUT)
        return slow

    engine = Engine(load)
    assert engine.load_state.phase == IDLE
    jobs = [engine.submit(user, request(user)) for user in "ab"]
    wait_for(lambda: engine.load_state.phase == WEIGHTS)
    assert engine.load_state.fraction == 0.4
    engine.cancel(jobs[0])  # a user who leaves while it loads
    with pytest.raises(InterruptedError):
        jobs[0].future.result(TIMEOUT)
    may_end.set()
    slow.go_on.set()
    assert jobs[1].future.result(TIMEOUT).text == "b"
    assert engine.load_state.phase == READY
    assert loads == [1]
    engine.close()


def test_a_failed_load_says_why_and_is_tried_again(slow):
    slow.go_on.set()
    outcomes = [OSError("no such folder"), KeyError("weights"), None]

    def load(set_state):
        error = outcomes.pop(0)
        if error is not None:
            raise error
        return slow

    engine = Engine(load)
    for reason in ("no such folder", "'weights'"):
        job = engine.submit("a", request("a"))
        with pytest.raises((OSError, KeyError)):
            job.future.result(TIMEOUT)
        assert engine.load_state == LoadState(FAILED, reason=reason)
    assert engine.submit("a", request("a")).future.result(TIMEOUT).text == "a"
    assert engine.load_state.phase not in (FAILED, LIBRARIES)
    engine.close()


def test_sessions_are_apart_and_the_oldest_are_forgotten():
    dropped = []
    sessions = Sessions(dropped.append, capacity=2)
    first = sessions.get("a")
    first.turns.append(Turn(Question("secret")))
    assert sessions.get("b").turns == []
    assert sessions.get("a") is first
    sessions.get("c")  # "b" is the one not used for longest
    assert len(sessions) == 2
    assert len(dropped) == 1
    assert sessions.get("a") is first
    sessions.drop("a")
    sessions.drop("a")
    assert dropped[-1] is first
    assert sessions.get("a").turns == []


def test_turns_that_had_no_room_beside_a_removed_one_are_read_again():
    turns = [Turn(Question(str(number)), said("yes", num_left_out=number)) for number in range(3)]
    session = Session([*turns, Turn(Question("waits"))], num_left_out=2)
    for text, num_left_out in (("waits", 2), ("2", 1), ("1", 0), ("0", 0)):
        assert session.remove_last().question.text == text
        assert session.num_left_out == num_left_out
    assert session.remove_last() is None
