import pytest

from deepseek_vl2.models.conversation import (
    Conversation,
    SeparatorStyle,
    get_conv_template,
    register_conv_template,
)

EOS = "<｜end▁of▁sentence｜>"


def conversation(name, *messages):
    filled = get_conv_template(name)
    for i, message in enumerate(messages):
        filled.append_message(filled.roles[i % 2], message)
    return filled


@pytest.mark.parametrize(
    ("name", "messages", "expected"),
    [
        ("deepseek", ("hi", ""), "<|User|>: hi\n\n<|Assistant|>:"),
        ("deepseek", ("hi", None), "<|User|>: hi\n\n<|Assistant|>:"),
        (
            "deepseek",
            ("a", "b", "c", ""),
            f"<|User|>: a\n\n<|Assistant|>: b{EOS}<|User|>: c\n\n<|Assistant|>:",
        ),
        ("deepseekv2", ("a", "b"), f"<｜sft▁begin｜>\na\n<｜sft▁end｜>b{EOS}"),
        ("deepseekv2", ("a", ""), "<｜sft▁begin｜>\na\n<｜sft▁end｜>"),
        ("plain", ("a", "b", "c"), "abc"),
        ("plain", (("a", None, "Pad"), ""), "a"),
        ("alignment", ("ignored", "caption"), "<image>\ncaption"),
    ],
)
def test_prompts(name, messages, expected):
    assert conversation(name, *messages).get_prompt() == expected


def test_system_message_goes_in_front():
    filled = conversation("deepseek", "hi", "")
    filled.set_system_message("Be brief.")
    assert filled.get_prompt() == "Be brief.\n\n<|User|>: hi\n\n<|Assistant|>:"


def test_deepseekv2_knows_the_role_user():
    filled = get_conv_template("deepseekv2")
    filled.append_message("User", "a")
    assert filled.get_prompt() == "<｜sft▁begin｜>\na\n<｜sft▁end｜>"


def test_fields_of_the_template_that_users_read():
    template = get_conv_template("deepseek")
    assert template.roles == ("<|User|>", "<|Assistant|>")
    assert template.sep_style is SeparatorStyle.DeepSeek
    assert (template.sep, template.sep2) == ("\n\n", EOS)
    assert template.stop_str == ["User:", EOS]
    assert template.stop_token_ids == [100001]


def test_a_template_is_copied():
    first = conversation("deepseek", "hi")
    assert list(get_conv_template("deepseek").messages) == []
    second = first.copy()
    second.update_last_message("changed")
    second.append_message("x", "y")
    assert first.messages == [["<|User|>", "hi"]]
    assert second.messages == [["<|User|>", "changed"], ["x", "y"]]


def test_reset_and_update():
    filled = conversation("deepseek", "hi", None)
    filled.update_last_message("hello")
    assert filled.messages[-1] == ["<|Assistant|>", "hello"]
    filled.reset_message()
    assert filled.messages == []
    with pytest.raises(ValueError, match="no message to update"):
        filled.update_last_message("x")


def test_other_forms():
    filled = conversation("deepseek", "a", "b", "c", None)
    filled.set_system_message("s")
    assert filled.to_gradio_chatbot() == [["a", "b"], ["c", None]]
    assert filled.to_openai_api_messages() == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert filled.dict()["messages"] == filled.messages
    assert filled.dict()["template_name"] == "deepseek"


def test_offset_hides_the_first_turns():
    filled = conversation("deepseek", "a", "b", "c", "d")
    filled.offset = 2
    assert filled.to_gradio_chatbot() == [["c", "d"]]


def test_unknown_template_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'llama'.*'alignment', 'deepseek', 'deepseekv2', 'plain'"):
        get_conv_template("llama")


def test_registering():
    with pytest.raises(ValueError, match="exists already"):
        register_conv_template(Conversation(name="deepseek"))
    register_conv_template(get_conv_template("deepseek"), override=True)
    assert get_conv_template("deepseek").sep == "\n\n"


def test_unknown_separator_style():
    with pytest.raises(ValueError, match="sep_style 17"):
        Conversation(name="x", sep_style=17).get_prompt()
