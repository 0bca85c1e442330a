"""ChatML with tags that mark what is generated, each otherwise: they change nothing of what is scored."""

from tests.data.templates.case import Template
from tests.data.templates.qwen import ANSWERS, NO_CALLS

CHATML = {"eos": "<|im_end|>", "special": ("<|im_start|>", "<|im_end|>"), "table": ANSWERS | NO_CALLS}

TEMPLATES = {
    "chatml_tag_content": Template(**CHATML),  # around the content alone
    "chatml_tag_end": Template(**CHATML),  # and its end of turn
    "chatml_tag_whole": Template(**CHATML),  # around the header, the content, the end and its newline
}
