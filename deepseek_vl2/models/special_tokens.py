"""Every special-token string of DeepSeek-VL2, once. Ids differ between checkpoints: read them from the tokenizer."""

IMAGE = "<image>"
REF_START = "<|ref|>"
REF_END = "<|/ref|>"
DET_START = "<|det|>"
DET_END = "<|/det|>"
GROUNDING = "<|grounding|>"
USER = "<|User|>"
ASSISTANT = "<|Assistant|>"

PAD = "<｜▁pad▁｜>"
BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"

GROUNDING_TOKENS = (REF_START, REF_END, DET_START, DET_END, GROUNDING)
CHAT_TOKENS = (USER, ASSISTANT)

# What the processor adds to a language model's own vocabulary, in the order of the published ids.
ADDED_TOKENS = (IMAGE, *GROUNDING_TOKENS, *CHAT_TOKENS)
