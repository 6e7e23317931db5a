"""Conversations that keep their cache: answers of a fresh start, and only the difference is read."""

import threading
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from deepseek_vl2.models import DeepseekV2Config, DeepseekVLV2ForCausalLM
from deepseek_vl2.nano.architecture import nano_config, nano_processor
from deepseek_vl2.serve.chat_session import ChatSession, ChatSessionPool
from deepseek_vl2.serve.inference import deepseek_generate, generate, sampling_options
from deepseek_vl2.serve.picture_features import PictureFeatures
from deepseek_vl2.serve.prompt_memory import PromptMemory, Reuse
from deepseek_vl2.serve.streaming import AnswerStream, stop_between_layers
from deepseek_vl2.utils.io import load_pil_images

RED, BLUE, LIME = (
    Image.new("RGB", size, color) for size, color in (((100, 80), "red"), ((250, 100), "blue"), ((90, 200), "lime"))
)
MHA = {"use_mla": False, "kv_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0}
GREEDY = {"temperature": 0.0, "repetition_penalty": 1.2}
PROMPT_PARTS = ("input_ids", "images", "images_seq_mask", "images_spatial_crop", "attention_mask")


def chat(*texts, **pictures):
    """Questions and answers in turn, the last answer open; `p0=[RED]` are the pictures of the first question."""
    messages = []
    for number, text in enumerate(texts):
        images = pictures.get(f"p{number // 2}", []) if number % 2 == 0 else []
        role = "assistant" if number % 2 else "user"
        messages.append({"role": role, "content": "<image>\n" * len(images) + text, "images": images})
    return [*messages, {"role": "assistant", "content": ""}]


FIRST = chat("What is it?", p0=[RED])
SECOND = chat("What is it?", "a red star", "Where?", p0=[RED])
CONVERSATIONS = {
    "first": FIRST,
    "follow-up": SECOND,
    "regenerated": SECOND,
    "third turn": chat("What is it?", "a red star", "Where?", "there", "And now?", p0=[RED]),
    "edited question": chat("What is it?", "a red star", "Where is the star?", p0=[RED]),
    "edited answer": chat("What is it?", "a blue star", "Where is the star?", p0=[RED]),
    "other picture": chat("What is it?", "a blue star", "Where is the star?", p0=[BLUE]),
    "second picture": chat("What is it?", "a blue star", "And here?", p0=[BLUE], p1=[LIME]),
    "three pictures, so no tiles": chat("What is it?", "a blue star", "And here?", p0=[BLUE], p1=[LIME, RED]),
    "turn removed": chat("What is it?", p0=[BLUE]),
    "same picture twice": chat("The same?", p0=[BLUE, BLUE]),
    "no picture": chat("Hello?"),
}


@pytest.fixture(scope="module")
def processor():
    return nano_processor()


def build(processor, **changes):
    """A model of nano's widths with fewer layers, in float32."""
    config = nano_config(processor.tokenizer)
    config.vision_config.layers = 2
    language = {**config.language_config.to_dict(), "num_hidden_layers": 3, "initializer_range": 0.1, **changes}
    config.language_config = DeepseekV2Config(**language)
    torch.manual_seed(3)
    model = DeepseekVLV2ForCausalLM(config).eval()
    torch.nn.init.normal_(model.language.lm_head.weight, std=0.3)
    stop_between_layers(model)
    return model


@pytest.fixture(scope="module")
def models(processor):
    return {"MLA": build(processor), "MHA": build(processor, **MHA)}


@pytest.fixture
def model(models):
    return models["MLA"]


@pytest.fixture
def session(model, processor):
    return ChatSession(model, processor)


def prepare(model, processor, conversation):
    images = load_pil_images(conversation)
    return processor(conversations=conversation, images=images).to("cpu", dtype=model.dtype)


@contextmanager
def seen_logits(model):
    """Collects the logits that each token is chosen from."""
    steps = []
    hook = model.language.lm_head.register_forward_hook(lambda _, __, logits: steps.append(logits[0, -1].clone()))
    try:
        yield steps
    finally:
        hook.remove()


def fresh(model, processor, conversation, count=5):
    """Text and logits of transformers' `generate`, with no memory of anything."""
    inputs = prepare(model, processor, conversation)
    with torch.no_grad(), seen_logits(model) as steps:
        ids = model.generate(**inputs, do_sample=False, repetition_penalty=1.2, max_new_tokens=count)
    text = processor.tokenizer.decode(ids[0, inputs.input_ids.shape[1] :])
    return text.removesuffix(processor.tokenizer.eos_token), torch.stack(steps)


def check_fresh(session, model, processor, conversation, chunk_size=-1, expected=None):
    """Checks that an answer is that of a fresh start, which may be known already."""
    expected_text, expected_logits = expected or fresh(model, processor, conversation)
    with seen_logits(model) as steps:
        stream = session.answer(conversation, max_new_tokens=5, chunk_size=chunk_size, **GREEDY)
        assert "".join(stream) == expected_text
    torch.testing.assert_close(torch.stack(steps), expected_logits, rtol=1e-4, atol=1e-4)
    assert stream.reuse == session.last_reuse
    assert sum(session.last_reuse[:2]) == stream.num_prompt_tokens


@pytest.fixture
def saying(monkeypatch):
    """Makes a model say a text, whatever it is asked."""

    def make(model, processor, text):
        ids = [*processor.tokenizer.encode(text, add_special_tokens=False), processor.eos_id]
        remaining = iter(ids)
        inner = type(model.language).forward  # not what an earlier call has made of it

        def forward(*args, **kwargs):
            outputs = inner(model.language, *args, **kwargs)
            outputs.logits = torch.full_like(outputs.logits, -100.0)
            outputs.logits[:, -1, next(remaining)] = 100.0
            return outputs

        monkeypatch.setattr(model.language, "forward", forward)
        return ids

    return make


@pytest.mark.parametrize("kind", ["MLA", "MHA"])
def test_answers_are_those_of_a_fresh_start(models, processor, kind):
    model = models[kind]
    whole, in_chunks = ChatSession(model, processor), ChatSession(model, processor)
    reuses = {}
    for name, conversation in CONVERSATIONS.items():
        expected = fresh(model, processor, conversation)
        check_fresh(whole, model, processor, conversation, -1, expected)
        check_fresh(in_chunks, model, processor, conversation, 7, expected)
        reuses[name] = whole.last_reuse
        assert in_chunks.last_reuse == whole.last_reuse
    assert reuses["first"].num_reused_tokens == 0 < reuses["first"].num_encoded_views
    for name in ("follow-up", "third turn", "edited question", "edited answer"):
        assert reuses[name].num_encoded_views == 0
        assert reuses[name].num_reused_tokens > 2 * reuses[name].num_computed_tokens
    assert reuses["regenerated"].num_computed_tokens == 1
    assert reuses["other picture"].num_reused_tokens < 10  # up to the picture
    assert reuses["second picture"].num_encoded_views > 0
    assert reuses["three pictures, so no tiles"].num_reused_tokens < 10  # the first has no tiles any more
    assert reuses["no picture"].num_reused_tokens < 10


def test_a_follow_up_reads_only_its_own_tokens(model, processor, session, saying):
    with_answer = chat("What is it?", "a red star", "Where?", p0=[RED])
    num_first, num_second = (
        prepare(model, processor, conversation).input_ids.shape[1] for conversation in (FIRST, with_answer)
    )
    ids = saying(model, processor, "a red star")
    assert "".join(session.answer(FIRST)) == "a red star"
    num_known = num_first + len(ids) - 1  # the end of the sentence was not read
    assert session.memory.num_tokens == num_known
    saying(model, processor, "there")
    assert "".join(session.answer(with_answer)) == "there"
    assert session.last_reuse == Reuse(num_known, num_second - num_known, 0)
    saying(model, processor, "here")
    assert "".join(session.answer(with_answer)) == "here"
    assert session.last_reuse == Reuse(num_second - 1, 1, 0)


def test_the_model_sees_no_more_than_what_is_counted(model, processor, session):
    list(session.answer(FIRST, max_new_tokens=3))
    lengths = []
    hook = model.language.model.layers[0].register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    views = model.vision.register_forward_hook(lambda *_: pytest.fail("a view was encoded again"))
    try:
        list(session.answer(SECOND, max_new_tokens=1))
        assert lengths == [session.last_reuse.num_computed_tokens]
        lengths.clear()
        list(session.answer(SECOND, max_new_tokens=1))
        assert lengths == [1]
    finally:
        hook.remove()
        views.remove()


def test_samples_with_a_seed_are_those_of_a_fresh_start(model, processor, session):
    options = {"temperature": 1.5, "top_p": 0.95, "repetition_penalty": 1.1, "chunk_size": -1}
    list(session.answer(FIRST, max_new_tokens=4))
    texts = set()
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        alone = "".join(deepseek_generate(SECOND, model, processor, processor.tokenizer, max_length=8, **options))
        torch.manual_seed(seed)
        assert "".join(session.answer(SECOND, max_new_tokens=8, **options)) == alone
        texts.add(alone)
    assert len(texts) == 2


def test_padding_on_the_left_changes_nothing(model, processor):
    samples = [
        processor(conversations=conversation, images=load_pil_images(conversation), force_batchify=False)
        for conversation in (FIRST, CONVERSATIONS["second picture"])
    ]
    batch = processor.batchify(samples)
    padded = {name: batch[name][:1] for name in PROMPT_PARTS}
    assert not padded["attention_mask"].all()
    memory = PromptMemory(model)
    tokenizer = processor.tokenizer
    expected, _ = fresh(model, processor, FIRST)
    for prompt, num_computed in ((padded, len(samples[0])), (padded, 1), (prepare(model, processor, FIRST), 1)):
        stream = generate(model, tokenizer, prompt, 5, 0, 1.2, chunk_size=7, memory=memory)
        assert "".join(stream) == expected
        assert stream.num_prompt_tokens == len(samples[0])
        assert stream.reuse.num_computed_tokens == num_computed
    right = processor.batchify(samples, padding="right")
    with pytest.raises(ValueError, match="padded elsewhere than on the left"):
        generate(model, tokenizer, {name: right[name][:1] for name in PROMPT_PARTS})


def test_an_answer_may_be_left_in_the_middle(model, processor, session):
    stream = session.answer(FIRST, max_new_tokens=50, **GREEDY)
    next(stream)
    stream.close()
    num_prompt = stream.num_prompt_tokens
    assert num_prompt <= session.memory.num_tokens < num_prompt + 50
    check_fresh(session, model, processor, FIRST)
    assert session.last_reuse.num_computed_tokens == 1


@pytest.mark.parametrize(("chunk_size", "num_passes", "num_kept"), [(7, 3, 14), (-1, 1, 0), (-1, 3, None)])
def test_a_stop_between_two_layers_leaves_whole_tokens(model, processor, session, chunk_size, num_passes, num_kept):
    """14 tokens end within the picture; without chunks, the third pass is that of the second new token."""
    stream = session.answer(FIRST, max_new_tokens=50, chunk_size=chunk_size, **GREEDY)
    passes = []

    def stop(*_):
        passes.append(1)
        if len(passes) == num_passes:
            stream.stop()

    hook = model.language.model.layers[1].register_forward_hook(stop)
    try:
        list(stream)
    finally:
        hook.remove()
    num_kept = stream.num_prompt_tokens + 1 if num_kept is None else num_kept
    assert session.memory.num_tokens == num_kept
    assert {layer.get_seq_length() for layer in session.memory._cache.layers} == {num_kept}
    check_fresh(session, model, processor, FIRST, chunk_size)
    assert session.last_reuse.num_reused_tokens == min(num_kept, stream.num_prompt_tokens - 1)


def test_after_an_error_nothing_is_trusted(model, processor, session, monkeypatch):
    list(session.answer(FIRST, max_new_tokens=3))

    def failing(*args, **kwargs):
        raise RuntimeError("out of order")

    with monkeypatch.context() as patched:
        patched.setattr(model.language.model.layers[1], "forward", failing)
        with pytest.raises(RuntimeError, match="out of order"):
            list(session.answer(SECOND))
    assert session.memory.num_tokens == session.num_bytes == 0
    check_fresh(session, model, processor, SECOND)
    assert session.last_reuse.num_reused_tokens == session.last_reuse.num_encoded_views == 0  # features are safe


def test_known_tokens_need_no_features(model, processor):
    """A picture whose tokens are in the cache is not encoded, though its features were given up."""
    features = PictureFeatures(model, max_bytes=1)
    session = ChatSession(model, processor, features)
    both = chat("What is it?", "a red star", "And here?", p0=[RED], p1=[LIME])
    check_fresh(session, model, processor, FIRST)
    num_first = session.last_reuse.num_encoded_views
    check_fresh(session, model, processor, both)  # LIME is the one that is remembered now
    num_second = session.last_reuse.num_encoded_views
    check_fresh(session, model, processor, SECOND)
    assert session.last_reuse.num_encoded_views == 0
    session = ChatSession(model, processor, features)
    check_fresh(session, model, processor, both)
    assert session.last_reuse == Reuse(0, session.last_reuse.num_computed_tokens, num_first)
    assert num_first > 0 < num_second


def test_one_answer_at_a_time(model, processor, session):
    first = session.answer(FIRST, max_new_tokens=400, **GREEDY)
    go_on = threading.Event()
    hook = model.language.model.layers[0].register_forward_pre_hook(lambda *_: (go_on.wait(60), None)[1])
    reader = threading.Thread(target=list, args=(first,))
    try:
        reader.start()
        while not session.memory._lock.locked():
            pass
        with pytest.raises(RuntimeError, match="has an answer under way"):
            list(session.answer(SECOND))
        with pytest.raises(RuntimeError, match="has an answer under way"):
            session.clear()
    finally:
        first.stop()
        go_on.set()
        reader.join(60)
        hook.remove()
    check_fresh(session, model, processor, SECOND)


def test_a_session_can_be_cleared(model, processor, session):
    assert session.last_reuse is None
    list(session.answer(FIRST, max_new_tokens=3))
    bytes_a_token = 3 * (96 + 16) * 4  # layers, latent and rotated key in float32
    assert session.num_bytes % bytes_a_token == 0
    num_places = session.num_bytes // bytes_a_token
    assert session.memory.num_tokens < num_places  # with the room that the cache has for more
    session.clear()
    assert session.num_bytes == session.memory.num_tokens == 0
    assert session.last_reuse is None
    check_fresh(session, model, processor, FIRST)
    assert session.last_reuse.num_reused_tokens == 0
    assert session.last_reuse.num_encoded_views > 0  # the tower's weights may be others now


def test_a_stream_without_memory_keeps_no_cache(model, processor):
    stream = AnswerStream(
        model, processor.tokenizer, prepare(model, processor, FIRST), sampling_options(2, 0, 1.0, 1.0), ()
    )
    list(stream)
    assert stream.reuse.num_reused_tokens == 0
    assert stream._speaker._memory is None


def test_beams_and_other_models_are_refused(models, processor, session, monkeypatch):
    with pytest.raises(ValueError, match="memory is that of another model"):
        deepseek_generate(FIRST, models["MHA"], processor, processor.tokenizer, memory=session.memory)
    monkeypatch.setattr(models["MLA"].generation_config, "num_beams", 3)
    with pytest.raises(ValueError, match="num_beams=3: what is streamed is one answer, without beams"):
        session.answer(FIRST)


def ask(pool, user, conversation=FIRST):
    with pool.lend(user) as session:
        list(session.answer(conversation, max_new_tokens=1))
        return session.last_reuse.num_reused_tokens


def test_users_share_memory_and_the_longest_unused_goes_first(model, processor):
    measured = ChatSessionPool(model, processor)
    ask(measured, "a")
    pool = ChatSessionPool(model, processor, max_cache_bytes=2 * measured.num_bytes)
    for user in ("a", "b"):
        assert ask(pool, user) == 0
    assert ask(pool, "a") > 0
    assert ask(pool, "c") == 0  # "b" has to go
    assert pool.num_bytes == 2 * measured.num_bytes
    assert ask(pool, "a") > 0
    assert ask(pool, "b") == 0
    pool.forget("b")
    assert pool.num_bytes == measured.num_bytes
    assert ask(pool, "b") == 0


def test_a_pool_without_memory_keeps_nothing(model, processor):
    pool = ChatSessionPool(model, processor, max_cache_bytes=0)
    assert ask(pool, "a") == ask(pool, "a") == pool.num_bytes == 0
    with pytest.raises(ValueError, match="max_cache_bytes -1 must be at least 0"):
        ChatSessionPool(model, processor, max_cache_bytes=-1)


def test_a_session_is_lent_once_and_not_taken_back_from_who_was_forgotten(model, processor):
    pool = ChatSessionPool(model, processor)
    with pool.lend("a") as first, pool.lend("a") as second:
        assert first is not second
    with pool.lend("a") as again:
        assert again is first
        pool.forget("a")
    with pool.lend("a") as anew:
        assert anew is not first
