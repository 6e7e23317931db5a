"""Many users in the queue: nothing is lost, nothing mixed up, and memory comes back to its start."""

import gc
import os
import threading
from pathlib import Path

from browsing import TIMEOUT, wait_until
from gradio_client import Client, handle_file
from PIL import Image, ImageDraw

NUM_USERS = 20
NUM_TURNS = 3
MEGABYTE = 2**20


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def picture_of(number, folder):
    """Each user's picture has another size, which the boxes in pixels and the counts of image tokens tell."""
    width, height = 240 + 10 * number, 200
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).ellipse((20, 20, 120, 120), fill=(0, 60, 10 * number % 256))
    path = folder / f"user_{number}.png"
    picture.save(path)
    return path


class User(threading.Thread):
    """Asks three questions in a row, each naming its user."""

    def __init__(self, address, number, folder):
        super().__init__(name=f"user-{number}")
        self.address, self.number, self.picture = address, number, picture_of(number, folder)
        self.results = []

    def run(self):
        client = Client(self.address, verbose=False, httpx_kwargs={"timeout": TIMEOUT})
        for turn in range(NUM_TURNS):
            files = [handle_file(str(self.picture))] if turn == 0 else []
            text = "Describe the picture. " + "red " * self.number  # its length tells the user
            message = {"text": text, "files": files}
            result = client.submit(message, max_new_tokens=6, api_name="/chat").result(timeout=10 * TIMEOUT)
            self.results.append(result)
        client.close()


def crowd(demo, folder):
    users = [User(demo.address, number, folder) for number in range(NUM_USERS)]
    for user in users:
        user.start()
    for user in users:
        user.join(20 * TIMEOUT)
    wait_until(lambda: demo.engine.num_running == demo.engine.num_waiting == 0)
    return users


def test_a_crowd_of_users(demo, tmp_path, monkeypatch):
    # What each question had in front of it is looked at where the model is asked: an own conversation, complete.
    asked = []
    answerer = demo.engine.start_loading().result(TIMEOUT)
    answer = type(answerer).answer

    def noted(self, request, job):
        asked.append(request)
        return answer(self, request, job)

    monkeypatch.setattr(type(answerer), "answer", noted)
    crowd(demo, tmp_path)  # what libraries allocate once
    wait_until(lambda: len(demo.sessions) == 0)
    asked.clear()
    gc.collect()
    before = resident_bytes()
    users = crowd(demo, tmp_path)
    assert [len(user.results) for user in users] == [NUM_TURNS] * NUM_USERS
    assert len(asked) == NUM_USERS * NUM_TURNS
    for user in users:
        own = [request for request in asked if request.question.text.count("red ") == user.number]
        assert [len(request.turns) for request in own] == list(range(NUM_TURNS))
        for request in own:
            texts = {turn.question.text for turn in request.turns} | {request.question.text}
            assert len(texts) == 1, "a conversation holds somebody else's question"
            pictures = [path for turn in request.turns for path in turn.question.pictures] or request.question.pictures
            assert {Path(path).name for path in pictures} == {user.picture.name}
        assert all(result["is_final"] for result in user.results)
        answers = [turn.answer.text for turn in own[-1].turns]
        assert answers == [result["text"] for result in user.results[:-1]]
    wait_until(lambda: len(demo.sessions) == 0)
    asked.clear()
    gc.collect()
    grown = resident_bytes() - before
    print(f"{NUM_USERS} users, {NUM_TURNS} turns: memory grew by {grown / MEGABYTE:.1f} MB")
    assert grown < 60 * MEGABYTE
