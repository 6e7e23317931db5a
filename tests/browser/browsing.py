"""A user with a browser, as tests of the page need one."""

import time
from pathlib import Path

from playwright.sync_api import TimeoutError as PlaywrightTimeoutError

ARTIFACTS = Path(__file__).parent / "artifacts"
TIMEOUT = 120.0  # seconds; generous, for machines that do other work too
CLICK_TIMEOUT = 20.0  # seconds until a click that has done nothing is taken for lost
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
ANSWER = "#chat .bot .answer-details"
WORDS = "#chat .message.bot:not(.html)"


def wait_until(condition, timeout=TIMEOUT):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


class Visitor:
    """A user with a browser of their own."""

    def __init__(self, browser, address, **options):
        self.context = browser.new_context(**{"viewport": DESKTOP, "accept_downloads": True, **options})
        self.context.set_default_timeout(TIMEOUT * 1000)
        self.address = address
        self.outside_requests: list[str] = []
        self.errors: list[str] = []
        self.context.on("request", self._note_request)
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.open()

    def _note_request(self, request):
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.outside_requests.append(request.url)

    def open(self):
        self.page.goto(self.address)
        self.page.wait_for_selector("#question textarea:enabled")
        self.page.wait_for_function("document.documentElement.lang === document.querySelector('#heading h1').lang")
        self.page.wait_for_function("document.querySelector('#model-state .ready, #model-state .failed')")

    @property
    def textarea(self):
        return self.page.locator("#question textarea")

    @property
    def answers(self):
        return self.page.locator(ANSWER)

    @property
    def last_words(self):
        """The words of the last answer, without pictures and figures."""
        return self.page.locator(WORDS).last.inner_text().strip()

    def add_pictures(self, *paths):
        count = self.thumbnails.count()
        with self.page.expect_file_chooser() as chooser:
            self.page.locator("#question .upload-button").click()
        chooser.value.set_files([str(path) for path in paths])
        self.page.wait_for_function(
            "count => document.querySelectorAll('#question .thumbnail-item').length >= count", arg=count + len(paths)
        )

    @property
    def thumbnails(self):
        return self.page.locator("#question .thumbnail-item")

    def send(self, text, *pictures):
        """Asks, and does not wait for the answer."""
        if pictures:
            self.add_pictures(*pictures)
        self.textarea.fill(text)
        self.textarea.press("Enter")

    def ask(self, text, *pictures):
        """Asks, and waits for the whole answer."""
        before = self.answers.count()
        self.send(text, *pictures)
        self.wait_for_answers(before + 1)

    def click_example(self, number):
        """Clicks an example, again if the page has not been listening yet, as a user would."""
        example = self.page.locator("#chat button.example").nth(number)
        example.click()
        try:
            self.page.wait_for_selector("#chat .message.user", timeout=CLICK_TIMEOUT * 1000)
        except PlaywrightTimeoutError:
            example.click()

    def wait_for_answers(self, count):
        try:
            self.page.wait_for_function(
                "([where, count]) => document.querySelectorAll(where).length === count", arg=[ANSWER, count]
            )
            self.page.wait_for_selector("#question .submit-button")
        except PlaywrightTimeoutError as error:
            shown = self.page.locator("#chat").inner_text()
            raise AssertionError(f"no answer {count} in time; shown: {shown!r}; errors: {self.errors}") from error

    def open_settings(self):
        self.page.locator("#settings button").first.click()
        self.page.wait_for_selector("#setting-seed input")
        self.page.wait_for_timeout(500)  # gradio fills fields in after it has shown them

    def set_number(self, name, value):
        """Changes a number of the settings."""
        field = self.page.locator(f"#setting-{name} input[type=number]")
        field.fill(str(value))
        field.press("Tab")
        assert field.input_value() == str(value)

    def wait_for_words(self, words):
        """Waits for an answer that is just these words."""
        self.page.wait_for_function(
            "([where, words]) => [...document.querySelectorAll(where)].at(-1)?.innerText.trim() === words",
            arg=[WORDS, words],
        )

    def button(self, name):
        """The last of gradio's own buttons of that name in the conversation."""
        return self.page.locator(f'#chat button[aria-label="{name}"]:visible').last

    def start_anew(self):
        """Begins a new conversation."""
        self.page.locator("#new").click()
        self.page.wait_for_selector("#chat button.example")
        assert self.answers.count() == 0

    def message(self):
        """What the page says about the last question."""
        self.page.wait_for_selector("#status [role=alert]")
        return self.page.locator("#status [role=alert]").inner_text()

    def wait_for_draft(self, text):
        """Waits for the text box to hold a text: a question comes back some time after what the page says about it."""
        self.page.wait_for_function("text => document.querySelector('#question textarea').value === text", arg=text)

    def shoot(self, name):
        """Keeps a picture of the window."""
        ARTIFACTS.mkdir(exist_ok=True)
        self.page.screenshot(path=ARTIFACTS / f"{name}.png")
