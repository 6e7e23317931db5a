"""The page: what is on it, and what happens when it is used."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from deepseek_vl2.serve.app_modules import rendering
from deepseek_vl2.serve.app_modules.conversation import Answer, Question, Turn
from deepseek_vl2.serve.app_modules.engine import EXPECTED_ERRORS, FAILED, READY, Engine, Job, Request
from deepseek_vl2.serve.app_modules.incoming import GuardedBlocks
from deepseek_vl2.serve.app_modules.limits import UploadLimits
from deepseek_vl2.serve.app_modules.logs import LOGGER_NAME
from deepseek_vl2.serve.app_modules.sessions import Session, Sessions
from deepseek_vl2.serve.app_modules.settings import NAMES, RANGES, Settings
from deepseek_vl2.serve.app_modules.texts import CHINESE, ENGLISH, UserError, preferred_language, text
from deepseek_vl2.serve.examples import ExampleQuestion, available_examples

logger = logging.getLogger(LOGGER_NAME)

_POLL = 0.08  # seconds between looks at an answer
_HEARTBEAT = 1.0  # at least so often something is sent, so that a user who left is noticed
_HOT = 0.7
_FILES_LIVE = 24 * 3600  # seconds
_KEEP_PLAIN = 10**9  # the text box would turn longer pasted text into a file


@dataclass(frozen=True)
class _Replaced:
    """Turns that another one stands in for, until it is known whether that gets an answer.

    Attributes:
        turns: in their order.
        num_left_out: of the session when they were taken out.
    """

    turns: tuple[Turn, ...] = ()
    num_left_out: int = 0

    @classmethod
    def of(cls, session: Session, start: int | None) -> "_Replaced":
        """Take the turns from a place on out of a conversation; their files stay."""
        num_left_out = session.num_left_out
        return cls(() if start is None else tuple(session.take_out(start)), num_left_out)

    def put_back(self, session: Session) -> None:
        """Continue as if nothing had been asked."""
        if self.turns:
            session.turns.extend(self.turns)
            session.num_left_out = self.num_left_out

    def delete_files(self) -> None:
        """Delete what was made for their answers."""
        for turn in self.turns:
            turn.delete_files()


class Demo:
    """The web demo: its page, its endpoint for programs, and the sessions of its users.

    Args:
        engine: the model.
        model_name: what the page calls it.
        limits: of uploads.
        pictures: folder of the example pictures.
        defaults: what the settings begin with.
        log_content: whether questions and answers go to the log.

    Attributes:
        root_path: path in front of the page, behind a proxy.
    """

    def __init__(
        self,
        engine: Engine,
        model_name: str,
        limits: UploadLimits,
        pictures: Path,
        defaults: Settings | None = None,
        log_content: bool = False,
    ) -> None:
        self.engine = engine
        self.model_name = model_name
        self.limits = limits
        self.defaults = defaults or Settings()
        self.root_path = ""
        self.sessions = Sessions(self._forget)
        self._pictures = pictures  # where the page may show them from
        self._examples = list(available_examples(pictures))
        self._log_content = log_content

    # -- what is on the page --------------------------------------------------------------------------------------

    def build(self) -> gr.Blocks:
        """Lay the page out."""
        with GuardedBlocks(
            title=text("title", ENGLISH), analytics_enabled=False, delete_cache=(3600, _FILES_LIVE), fill_height=True
        ) as blocks:
            with gr.Row(elem_id="head"):
                self.heading = gr.HTML(self._heading(ENGLISH), elem_id="heading")
                self.new = gr.Button(text("new", ENGLISH), elem_id="new", size="sm", variant="primary")
                self.language = gr.Button(text("language", ENGLISH), elem_id="language", size="sm")
                self.theme = gr.Button(text("theme", ENGLISH), elem_id="theme", size="sm")
            self.model_state = gr.HTML(self._model_line(ENGLISH), elem_id="model-state")
            self.chat = gr.Chatbot(**self._chat_options(ENGLISH), **_CHAT)
            self.chat.keep_in_cache |= self.chat.temp_files  # the examples' pictures; gradio would delete them in a day
            with gr.Column(elem_id="ask"):
                self.status = gr.HTML("", elem_id="status")
                self.question = gr.MultimodalTextbox(**self._question_options(ENGLISH), **_QUESTION)
            with gr.Accordion(text("settings", ENGLISH), open=False, elem_id="settings") as self.accordion:
                self.settings = self._build_settings()
            self.timer = gr.Timer(1.0)
            self._connect(blocks)
            self._build_api()
        return blocks

    def _build_settings(self) -> dict[str, Any]:
        made: dict[str, Any] = {}
        with gr.Row():
            for name in ("temperature", "top_p", "repetition_penalty", "max_new_tokens", "history_tokens"):
                low, high, step = RANGES[name]
                made[name] = gr.Slider(
                    low,
                    high,
                    value=getattr(self.defaults, name),
                    step=step,
                    min_width=220,
                    elem_id=f"setting-{name}",
                    **self._setting_labels(name, ENGLISH),
                )
            for name in ("chunk_size", "seed"):
                made[name] = gr.Number(
                    getattr(self.defaults, name),
                    precision=0,
                    min_width=220,
                    elem_id=f"setting-{name}",
                    **self._setting_labels(name, ENGLISH),
                )
            made["use_tiling"] = gr.Checkbox(
                self.defaults.use_tiling,
                min_width=220,
                elem_id="setting-use_tiling",
                **self._setting_labels("use_tiling", ENGLISH),
            )
        return {name: made[name] for name in NAMES}

    def _setting_labels(self, name: str, language: str) -> dict[str, Any]:
        return {"label": text(name, language), "info": text(f"{name}_info", language)}

    def _heading(self, language: str) -> str:
        return f"<h1 lang='{language}'>{text('title', language)}</h1><p>{text('subtitle', language)}</p>"

    def _model_line(self, language: str) -> str:
        return rendering.model_line(self.engine.load_state, self.model_name, language)

    def _chat_options(self, language: str) -> dict[str, Any]:
        return {
            "label": text("chat", language),
            "placeholder": text("examples_hint", language),
            "examples": [self._example(example, language) for example in self._examples],
        }

    def _example(self, example: ExampleQuestion, language: str) -> dict[str, Any]:
        files = [str(self._pictures / name) for name in example.pictures]
        title = example.title if language == ENGLISH else example.title_zh
        return {"display_text": title, "text": example.prompt, "files": files, "icon": files[-1]}

    def _question_options(self, language: str) -> dict[str, Any]:
        return {"label": text("question", language), "placeholder": text("placeholder", language)}

    # -- what happens ---------------------------------------------------------------------------------------------

    def _connect(self, blocks: gr.Blocks) -> None:
        private: dict[str, Any] = {"api_visibility": "private"}
        answering: dict[str, Any] = {
            **private,
            "outputs": [self.chat, self.status, self.question, self.model_state],
            "concurrency_limit": None,  # the engine has the queue
            "show_progress": "hidden",
        }
        values = list(self.settings.values())
        at_once: dict[str, Any] = {**private, "queue": False, "show_progress": "hidden"}
        give_back: dict[str, Any] = {**at_once, "fn": self.give_back, "inputs": self.question, "outputs": self.question}
        self.question.submit(self.ask, [self.question, *values], **answering).then(**give_back)
        self.chat.example_select(self.ask_example, values, **answering)
        self.chat.retry(self.regenerate, values, **answering)
        self.chat.edit(self.ask_edited, values, **answering).then(**give_back)
        self.question.stop(self.stop, None, None, **at_once)
        # Through the queue, as the answers: what it sends arrives in the order in which it was sent.
        in_turn: dict[str, Any] = {**answering, "outputs": [self.chat, self.status, self.question]}
        self.chat.undo(self.take_back, self.question, **in_turn)
        gr.on([self.new.click, self.chat.clear], self.start_anew, None, **in_turn)
        labelled = [self.heading, self.new, self.language, self.theme, self.model_state, self.chat, self.question]
        labelled += [self.accordion, *values]
        set_language: dict[str, Any] = {**private, "fn": None, "js": _SET_LANGUAGE}
        self.language.click(self.switch_language, None, labelled, **at_once).then(**set_language)
        blocks.load(self.greet, None, labelled, **at_once).then(**set_language)
        self.theme.click(None, None, None, js=_SWITCH_THEME, **private)
        self.timer.tick(self.look_at_model, None, [self.model_state, self.timer], **at_once)
        blocks.unload(self.leave)

    def greet(self, request: gr.Request) -> list[Any]:
        """Begin a page in the language that the browser asks for."""
        session = self._session(request)
        session.language = preferred_language(request.headers.get("accept-language"))
        return self._labels(session)

    def switch_language(self, request: gr.Request) -> list[Any]:
        """Label the page in the other language."""
        session = self._session(request)
        session.language = ENGLISH if session.language == CHINESE else CHINESE
        return self._labels(session)

    def _labels(self, session: Session) -> list[Any]:
        language = session.language
        fields = [gr.update(**self._setting_labels(name, language)) for name in NAMES]
        return [
            self._heading(language),
            gr.update(value=text("new", language)),
            gr.update(value=text("language", language)),
            gr.update(value=text("theme", language)),
            self._model_line(language),
            gr.update(value=rendering.chat_messages(session), **self._chat_options(language)),
            gr.update(**self._question_options(language)),
            gr.update(label=text("settings", language)),
            *fields,
        ]

    def look_at_model(self, request: gr.Request) -> tuple[str, Any]:
        """Show how far the model is; looks no more once that does not change by itself."""
        is_over = self.engine.load_state.phase in (READY, FAILED)
        return self._model_line(self._session(request).language), gr.Timer(active=not is_over)

    def leave(self, request: gr.Request) -> None:
        """End what a user who closed the page has begun."""
        self.sessions.drop(str(request.session_hash))

    def stop(self, request: gr.Request) -> None:
        """End the answer; what was said until now stays."""
        job = self._session(request).job
        if job is not None:
            self.engine.cancel(job)

    async def start_anew(self, request: gr.Request) -> tuple[Any, str, Any]:
        """Begin a new conversation."""
        session = self._session(request)
        self._forget(session)
        await session.all_is_shown.wait()
        return rendering.chat_messages(session), "", _idle_box(value=None)

    async def take_back(self, request: gr.Request, draft: Any) -> tuple[Any, str, Any]:
        """Remove the last turn and give its question back, to be changed; what somebody is writing stays below it."""
        session = self._session(request)
        self._end(session)
        turn = session.remove_last()
        await session.all_is_shown.wait()
        box = _idle_box(value=_before_draft(turn.question, draft)) if turn else gr.update()
        return rendering.chat_messages(session), "", box

    def give_back(self, request: gr.Request, draft: Any) -> Any:
        """Put a question that got no answer into the text box again, above what was written there meanwhile."""
        session = self._session(request)
        question, session.unanswered = session.unanswered, None
        return gr.skip() if question is None else _before_draft(question, draft)

    async def ask(self, request: gr.Request, message: Any, *values: Any) -> AsyncIterator[Any]:
        """Answer what is in the text box."""
        async for output in self._converse(_question(message), values, request, is_draft=True, gives_back=True):
            yield output

    async def ask_example(self, request: gr.Request, event: gr.SelectData, *values: Any) -> AsyncIterator[Any]:
        """Answer an example."""
        example = self._examples[int(event.index)]
        files = tuple(str(self._pictures / name) for name in example.pictures)
        async for output in self._converse(Question(example.prompt, files), values, request):
            yield output

    async def regenerate(self, request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        """Answer the last question again."""
        session = self._session(request)
        question = session.turns[-1].question if session.turns else None
        async for output in self._converse(question, values, request, start=len(session.turns) - 1):
            yield output

    async def ask_edited(self, request: gr.Request, event: gr.EditData, *values: Any) -> AsyncIterator[Any]:
        """Answer a question that was changed in its place; what came after it goes."""
        session = self._session(request)
        number = _message_number(event.index) // 2
        question = None
        if 0 <= number < len(session.turns):
            pictures = session.turns[number].question.pictures
            question = Question(rendering.from_markup(str(event.value)), pictures)
        async for output in self._converse(question, values, request, start=number, gives_back=True):
            yield output

    async def _converse(
        self,
        question: Question | None,
        values: tuple[Any, ...],
        request: gr.Request,
        *,
        start: int | None = None,
        is_draft: bool = False,
        gives_back: bool = False,
    ) -> AsyncIterator[tuple[Any, Any, Any, Any]]:
        """Answer a question in a session's conversation, and show how it goes.

        Args:
            question: what is asked, `None` if there is nothing.
            values: of the settings.
            request: who asks.
            start: the turns from there on give way to this one; they come back if it gets no answer.
            is_draft: whether the question is the one in the text box, which is emptied; what somebody is writing there
                stays otherwise.
            gives_back: whether `give_back` is to put a question without an answer into the text box, not to be lost.
        """
        session = self._session(request)

        def shown(status: str, box: Any) -> tuple[Any, Any, Any, Any]:
            return rendering.chat_messages(session), status, box, self._model_line(session.language)

        try:
            settings = self._check(session, question, values)
        except UserError as error:
            yield shown(rendering.error_line(error.describe(session.language)), gr.update())
            yield _NOTHING_NEW
            return
        turn = Turn(question)  # type: ignore[arg-type]
        replaced = _Replaced.of(session, start)
        job = self._submit(session, turn, settings)
        is_shown = session.all_is_shown = asyncio.Event()
        try:
            yield shown(self._job_line(job, session), _busy_box(value=None) if is_draft else _busy_box())
            try:
                async for _ in self._watch(session, job):
                    yield shown(self._job_line(job, session), gr.update())
                failure = _failure(job)
            finally:  # also when the user has gone
                is_withdrawn = self._finish(session, turn, job, replaced)
            if is_withdrawn and gives_back:
                session.unanswered = question
            notice = ""
            if failure is not None:
                notice = rendering.error_line(self._describe(failure, session.language))
            elif settings.temperature > _HOT:
                notice = rendering.notice_line(text("hot", session.language, limit=_HOT))
            yield shown(notice, _idle_box())
            yield _NOTHING_NEW
        finally:
            is_shown.set()

    def _check(self, session: Session, question: Question | None, values: tuple[Any, ...]) -> Settings:
        """Refuse what cannot be answered, before it waits in the queue.

        Raises:
            UserError: no question, too many pictures, a setting out of range, or an answer is under way.
        """
        if session.job is not None:
            raise UserError("busy")
        if question is None:
            raise UserError("nothing_to_redo")
        self._check_question(question)
        return Settings.checked(**dict(zip(NAMES, values, strict=True)))

    def _check_question(self, question: Question) -> None:
        self.limits.check_number(len(question.pictures))
        if not question.text.strip():
            raise UserError("empty_with_pictures" if question.pictures else "empty")
        for path in question.pictures:
            self.limits.check_bytes(path)

    def _submit(self, session: Session, turn: Turn, settings: Settings) -> Job:
        earlier = tuple(session.turns)
        session.turns.append(turn)
        session.job = self.engine.submit(session.key, Request(earlier, turn.question, settings, session.num_left_out))
        return session.job

    async def _watch(self, session: Session, job: Job) -> AsyncIterator[None]:
        """Wait until an answer is over or a session lets go of it; gives a sign at every change, and now and then."""
        shown: Any = None
        sent = time.monotonic()
        while session.job is job and not job.future.done():
            await asyncio.sleep(_POLL)
            now = (job.words, job.phase, self.engine.place(job), self.engine.load_state.phase)
            if now != shown or time.monotonic() - sent > _HEARTBEAT:
                shown, sent = now, time.monotonic()
                yield

    def _job_line(self, job: Job, session: Session) -> str:
        if self.engine.load_state.phase != READY:
            return self._model_line(session.language)
        return rendering.job_line(job, self.engine.place(job), session.language)

    def _finish(self, session: Session, turn: Turn, job: Job, replaced: _Replaced) -> bool:
        """Put an answer into the conversation, or take its question out if there is none; ends one that goes on.

        Returns:
            Whether the question was taken out here.
        """
        self.engine.cancel(job)
        if session.job is job:
            session.job = None
        answer = _result(job.future)
        is_there = turn in session.turns
        if is_there and answer is not None and answer.has_begun:
            turn.answer = answer
            session.num_left_out = answer.num_left_out
            self._log(turn.question, answer)
            replaced.delete_files()
            return False
        job.future.add_done_callback(_delete_files)  # of an answer that nobody waited for
        if is_there:
            session.turns.remove(turn)
            replaced.put_back(session)
        else:
            replaced.delete_files()
        return is_there

    def _log(self, question: Question, answer: Answer) -> None:
        statistics = answer.statistics
        logger.info(
            "answered: %d picture(s), %d prompt tokens, %d new tokens, %.2f s",
            len(question.pictures),
            statistics.num_prompt_tokens,
            statistics.num_new_tokens,
            statistics.seconds,
        )
        if self._log_content:
            logger.info("question %r, answer %r", question.text, answer.text)

    def _describe(self, error: BaseException, language: str) -> str:
        if isinstance(error, UserError):
            return error.describe(language)
        if self.engine.load_state.phase == FAILED:
            return text("model_failed", language, model=self.model_name, reason=self.engine.load_state.reason)
        reason = " ".join(str(error).split()) or type(error).__name__
        logger.warning("a question failed: %s: %s", type(error).__name__, reason if self._log_content else "")
        return text("failed", language, reason=reason)

    def _session(self, request: gr.Request) -> Session:
        if not request.session_hash:  # all who have none would share one conversation
            raise gr.Error(text("no_session", ENGLISH), print_exception=False)
        session = self.sessions.get(str(request.session_hash))
        if self.root_path:
            session.file_address = f"{self.root_path.rstrip('/')}/gradio_api/file="
        return session

    def _forget(self, session: Session) -> None:
        """Let go of a conversation, and of all that was kept for it."""
        self._end(session)
        session.clear()
        self.engine.forget(session.key)

    def _end(self, session: Session) -> None:
        job, session.job = session.job, None
        if job is not None:
            self.engine.cancel(job)

    # -- for programs ---------------------------------------------------------------------------------------------

    def _build_api(self) -> None:
        message = gr.MultimodalTextbox(visible=False, file_count="multiple", label="message")
        new = gr.Checkbox(False, visible=False, label="new_conversation")
        # Not the page's own sliders: what is out of range is to be named by `Settings.checked`.
        values = [
            gr.Checkbox(default, visible=False, label=name)
            if isinstance(default, bool)
            else gr.Number(default, visible=False, label=name)
            for name, default in asdict(self.defaults).items()
        ]
        result = gr.JSON(visible=False, label="result")
        gr.Button(visible=False).click(
            self.chat_endpoint,
            [message, new, *values],
            result,
            api_name="chat",
            api_description="Answer a question about pictures. Each client has a conversation of its own.",
            concurrency_limit=None,
        )

    async def chat_endpoint(
        self,
        message: Any,
        new_conversation: bool,
        temperature: float,
        top_p: float,
        repetition_penalty: float,
        max_new_tokens: int,
        history_tokens: int,
        use_tiling: bool,
        chunk_size: int,
        seed: int,
        request: gr.Request,
    ) -> AsyncIterator[dict[str, Any]]:
        """Answer a question for a program: first the words as they come, in the end everything."""
        session = self._session(request)
        question = _question(message)
        values = (
            temperature,
            top_p,
            repetition_penalty,
            max_new_tokens,
            history_tokens,
            use_tiling,
            chunk_size,
            seed,
        )
        try:
            settings = self._check(session, question, values)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        if new_conversation:
            session.clear()
        turn = Turn(question)
        job = self._submit(session, turn, settings)
        try:
            async for _ in self._watch(session, job):
                yield {"answer": job.words, "place": self.engine.place(job), "is_final": False}
            failure = _failure(job)
        finally:
            self._finish(session, turn, job, _Replaced())
        if failure is not None:
            raise gr.Error(self._describe(failure, ENGLISH), print_exception=False)
        if turn.answer is None:
            raise gr.Error(text("stopped", ENGLISH), print_exception=False)
        yield {**turn.answer.to_dict(), "is_final": True}


_CHAT: dict[str, Any] = {
    "elem_id": "chat",
    "show_label": False,
    "height": None,
    "min_height": 320,
    "render_markdown": False,
    "sanitize_html": True,
    "allow_tags": False,
    "latex_delimiters": [],
    "editable": "user",
    "buttons": ["copy"],
    "feedback_options": None,
    "allow_file_downloads": True,
    "group_consecutive_messages": False,
    "layout": "bubble",
    "scale": 1,
}
_QUESTION: dict[str, Any] = {
    "elem_id": "question",
    "file_count": "multiple",
    "file_types": ["image"],
    "sources": ["upload"],
    "show_label": False,
    "submit_btn": True,
    "stop_btn": False,
    "max_plain_text_length": _KEEP_PLAIN,
    "autofocus": True,
}
# Last of what an answer sends: gradio ends with a message that repeats it, which would undo what has come since.
_NOTHING_NEW = tuple(gr.skip() for _ in range(4))
_SET_LANGUAGE = "() => { document.documentElement.lang = document.querySelector('#heading h1').lang; }"
_SWITCH_THEME = "() => { document.body.classList.toggle('dark'); }"


def _busy_box(**changes: Any) -> Any:
    return gr.update(submit_btn=False, stop_btn=True, **changes)


def _idle_box(**changes: Any) -> Any:
    return gr.update(submit_btn=True, stop_btn=False, **changes)


def _question(message: Any) -> Question:
    """What stands in a text box."""
    message = message or {}
    return Question(message.get("text") or "", tuple(message.get("files") or ()))


def _before_draft(question: Question, draft: Any) -> dict[str, Any]:
    """Content of a text box: a question, and below it what stands there already."""
    written = _question(draft)
    texts = [part for part in (question.text, written.text) if part]
    return {"text": "\n".join(texts), "files": [*question.pictures, *written.pictures]}


def _message_number(index: Any) -> int:
    return int(index[0] if isinstance(index, (list, tuple)) else index)


def _failure(job: Job) -> BaseException | None:
    """What a job failed with, if it is something that can happen; anything else is raised."""
    if not job.future.done() or job.future.cancelled():
        return None
    error = job.future.exception()
    if isinstance(error, InterruptedError):
        return None
    if error is not None and not isinstance(error, EXPECTED_ERRORS):
        raise error
    return error


def _result(answering: Future[Answer]) -> Answer | None:
    """What came of it, if it is over and neither cancelled nor failed."""
    if not answering.done() or answering.cancelled() or answering.exception() is not None:
        return None
    return answering.result()


def _delete_files(answering: Future[Answer]) -> None:
    answer = _result(answering)
    if answer is not None:
        answer.delete_files()
