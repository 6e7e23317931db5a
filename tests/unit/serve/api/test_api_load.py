"""Many clients at once: everybody gets the answer that the question has alone."""

import base64
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from PIL import Image, ImageDraw

from deepseek_vl2.serve.api.errors import ApiError
from deepseek_vl2.serve.api.places import Places

NUM_CLIENTS = 20
COLOURS = ("red", "blue", "green", "yellow")


def scene(colour):
    picture = Image.new("RGB", (120, 120), "white")
    ImageDraw.Draw(picture).ellipse((30, 30, 90, 90), fill=colour)
    packed = io.BytesIO()
    picture.save(packed, "PNG")
    return f"data:image/png;base64,{base64.b64encode(packed.getvalue()).decode()}"


def test_parallel_clients_get_the_answers_of_single_ones(nano, serve, ask):
    questions = [
        ask(f"What color is the circle?{'?' * (number % 3)}", scene(colour)) for number, colour in enumerate(COLOURS)
    ]
    questions += [ask("<|ref|>The circle.<|/ref|>.", scene(colour)) for colour in COLOURS]
    with serve(nano, max_batch=6) as running:
        sizes: list[int] = []

        def answer(question, **options):
            options = {"temperature": 0, **options}
            got = running.client.chat.completions.create(model="nano", messages=question, max_tokens=40, **options)
            return got.choices[0].message.content

        alone = [answer(question) for question in questions]
        by_chance = answer(questions[0], temperature=2, seed=3)
        assert len(set(alone)) >= len(COLOURS)
        running.service.engine._on_step = sizes.append

        def client(number):
            first, second = number % len(questions), (7 * number + 3) % len(questions)
            got = [answer(questions[first]), answer(questions[second])]
            expected = [alone[first], alone[second]]
            if number % 5 == 0:  # neighbours that draw by chance change nothing, and nobody changes their chance
                got.append(answer(questions[0], temperature=2, seed=3))
                expected.append(by_chance)
            return got == expected

        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            assert all(pool.map(client, range(NUM_CLIENTS)))
        assert max(sizes) == 6
        assert running.service.places.num_open == 0


def test_nobody_waits_behind_many_questions_of_one_client(endless, serve):
    """Two clients, told apart by their keys: the second question served is that of the second client."""
    with serve(endless, max_batch=1, api_keys=("many", "one")) as running:
        running.service.engine._on_step = lambda num_rows: time.sleep(0.005)
        done: list[str] = []

        def question(key):
            client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0)
            messages = [{"role": "user", "content": "Hello"}]
            client.chat.completions.create(model="nano", messages=messages, max_tokens=60)
            done.append(key)

        threads = [threading.Thread(target=question, args=("many",)) for _ in range(4)]
        for thread in threads:
            thread.start()
        running.wait_until(lambda: running.service.engine.num_waiting == 3 or done, 60)
        threads.append(threading.Thread(target=question, args=("one",)))
        threads[-1].start()
        for thread in threads:
            thread.join()
        assert "one" in done[:3]
        assert len(done) == 5


def test_places_of_one_client_are_limited():
    places = Places(4, 2)
    with places.taken("a", 2), places.taken("b", 1):
        with pytest.raises(ApiError, match="requests of yours"), places.taken("a", 1):
            pass
        with pytest.raises(ApiError, match="server is busy"), places.taken("b", 2):
            pass
        with places.taken("c", 1):
            assert places.num_open == 4
    assert places.num_open == 0
