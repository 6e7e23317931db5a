"""Everything that the page says, in English and Chinese."""

from typing import Any

ENGLISH, CHINESE = "en", "zh"

_TEXTS: dict[str, tuple[str, str]] = {
    # labels
    "title": ("DeepSeek-VL2", "DeepSeek-VL2"),
    "subtitle": ("Ask about pictures, and see where things are.", "看图提问，并指出物体的位置。"),
    "language": ("中文", "English"),  # the button names the other language, in that language
    "theme": ("Light / dark", "浅色 / 深色"),
    "chat": ("Conversation", "对话"),
    "question": ("Your question", "您的问题"),
    "placeholder": ("Ask something; add, paste or drop pictures", "请输入问题；可添加、粘贴或拖入图片"),
    "new": ("New conversation", "新对话"),
    "examples_hint": ("Try an example, or ask your own question.", "点击示例，或直接提问。"),
    "settings": ("Settings", "设置"),
    "temperature": ("Temperature", "温度"),
    "temperature_info": ("0: always the likeliest word; best up to 0.7", "0：始终取最可能的词；建议不超过 0.7"),
    "top_p": ("Top-p", "Top-p"),
    "top_p_info": ("used with a temperature", "温度大于 0 时有效"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "repetition_penalty_info": ("above 1: fewer repetitions; harms boxes", "大于 1 可减少重复，但会影响边框"),
    "max_new_tokens": ("New tokens", "新词元数"),
    "max_new_tokens_info": ("length of an answer at most", "回答的最大长度"),
    "history_tokens": ("History tokens", "历史词元数"),
    "history_tokens_info": ("earlier turns are left out beyond this", "超出时不再保留较早的对话"),
    "use_tiling": ("Tiling", "分块"),
    "use_tiling_info": ("finer details of one or two pictures", "一两张图片时可看清更多细节"),
    "chunk_size": ("Chunk size", "分段大小"),
    "chunk_size_info": ("tokens read at once; -1: all", "一次读入的词元数；-1 为全部"),
    "seed": ("Seed", "随机种子"),
    "seed_info": ("-1: by chance", "-1 为随机"),
    # state of the model
    "model_idle": ("{model}: it is loaded with the first question", "{model}：将在第一个问题时加载"),
    "model_libraries": ("{model}: starting ({seconds} s)", "{model}：正在启动（{seconds} 秒）"),
    "model_loading": ("{model}: loading ({seconds} s)", "{model}：正在加载（{seconds} 秒）"),
    "model_weights": ("{model}: loading, {percent} % ({seconds} s)", "{model}：正在加载，{percent} %（{seconds} 秒）"),
    "model_ready": ("{model} on {device}, ready", "{model}（{device}），已就绪"),
    "model_failed": ("{model} could not be loaded: {reason}", "{model} 无法加载：{reason}"),
    # state of an answer
    "waiting_next": ("Waiting: you are next.", "等待中：下一个就是您。"),
    "waiting": ("Waiting: {place} before you.", "等待中：您前面还有 {place} 个问题。"),
    "preparing": ("Looking at it …", "正在查看……"),
    "answering": ("Answering …", "正在回答……"),
    "stopped": ("stopped", "已停止"),
    "cut_off": ("the answer is cut off at its greatest length", "回答达到最大长度，已截断"),
    "no_answer": ("(no answer)", "（没有回答）"),
    "left_out": (
        "The conversation is longer than its room: the first {count} turn(s) are left out, with their pictures.",
        "对话超出可用长度：最早的 {count} 轮及其图片已不再使用。",
    ),
    "hot": (
        "Above temperature {limit} answers get vague.",
        "温度高于 {limit} 时，回答会变得含糊。",
    ),
    "malformed": ("A box could not be read: {problem}", "有一个边框无法读取：{problem}"),
    "statistics": (
        "{prompt} prompt tokens, {image} of them for pictures, {reused} known from before · "
        "first token after {first} s · {speed} tokens/s · {new} new tokens",
        "提示 {prompt} 个词元，其中图片 {image} 个，沿用 {reused} 个 · "
        "首个词元 {first} 秒 · 每秒 {speed} 个词元 · 新词元 {new} 个",
    ),
    "box_label": ("Label", "标签"),
    "box_picture": ("Picture", "图片"),
    "boxes": ("Boxes in pixels: {count}", "边框（像素）：{count}"),
    "marked_picture": ("Picture {number} with boxes: {labels}", "带边框的图片 {number}：{labels}"),
    "enlarge": ("Enlarge", "放大"),
    "close": ("Close", "关闭"),
    "download_picture": ("Download the picture", "下载图片"),
    "download_boxes": ("Download the boxes (JSON)", "下载边框（JSON）"),
    "sent_picture": ("Picture {number} of the question", "问题的图片 {number}"),
    # what a user can mend
    "empty": ("Write a question first.", "请先输入问题。"),
    "empty_with_pictures": ("Write what you want to know about the picture(s).", "请输入想了解的内容。"),
    "busy": (
        "Your last question is still being answered. Press Stop, or wait.",
        "上一个问题仍在回答中，请等待或按“停止”。",
    ),
    "nothing_to_redo": ("There is no question yet.", "还没有问题。"),
    "too_many_pictures": (
        "{count} pictures: at most {limit} go with one question. Remove some.",
        "共 {count} 张图片：每个问题最多 {limit} 张，请删除一些。",
    ),
    "picture_too_big": (
        "{name} has {size} MB; the limit is {limit} MB. Take a smaller picture.",
        "{name} 大小为 {size} MB，上限为 {limit} MB。请换一张较小的图片。",
    ),
    "bad_picture": ("{name} cannot be used: {reason}", "{name} 无法使用：{reason}"),
    "picture_gone": ("{name} is no longer here. Upload it again.", "{name} 已不存在，请重新上传。"),
    "prompt_too_long": (
        "The question has {tokens} tokens, the model has room for {limit}. Shorten the text, take fewer pictures, "
        "or switch tiles off.",
        "问题有 {tokens} 个词元，模型最多 {limit} 个。请缩短文字、减少图片，或关闭分块。",
    ),
    "out_of_range": (
        "{name} is {value}; it must be {low} to {high}.",
        "{name} 为 {value}，应在 {low} 到 {high} 之间。",
    ),
    "chunk_of_nothing": (
        "{name} is {value}; it must be 1 to {high}, or -1 for all at once.",
        "{name} 为 {value}，应在 1 到 {high} 之间，或为 -1（全部）。",
    ),
    "not_whole": ("{name} is {value}; it must be a whole number.", "{name} 为 {value}，应为整数。"),
    "not_a_switch": ("{name} is {value}; it must be true or false.", "{name} 为 {value}，应为 true 或 false。"),
    "not_a_message": (
        "message is {value}; it must be a text, or an object with text and files.",
        "message 为 {value}，应为文字，或包含 text 与 files 的对象。",
    ),
    "address": (
        "{address} is an address, which is not fetched. Upload the picture itself.",
        "{address} 是网址，不会被下载。请上传图片。",
    ),
    "no_session": (
        "The request has no session_hash. Use gradio_client, or POST to /gradio_api/call/chat.",
        "请求缺少 session_hash。请使用 gradio_client，或 POST 到 /gradio_api/call/chat。",
    ),
    "failed": ("The question could not be answered: {reason}", "无法回答：{reason}"),
}


class UserError(ValueError):
    """Something that the user can mend. Its text is English; `describe` gives it in either language.

    Args:
        key: which text.
        values: what stands in it.
    """

    def __init__(self, key: str, **values: Any) -> None:
        super().__init__(text(key, ENGLISH, **values))
        self.key = key
        self.values = values

    def describe(self, language: str) -> str:
        """Say it in a language."""
        return text(self.key, language, **self.values)


def text(key: str, language: str, **values: Any) -> str:
    """Give a text in a language, with values in their places."""
    english, chinese = _TEXTS[key]
    return (chinese if language == CHINESE else english).format(**values)


def preferred_language(accept_language: str | None) -> str:
    """Choose by what a browser asks for in its header `Accept-Language`."""
    first = (accept_language or "").split(",")[0].strip().lower()
    return CHINESE if first.startswith("zh") else ENGLISH
