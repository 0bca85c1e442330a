"""What people read of a prompt's tokens: its text, and the turns of a conversation."""

import itertools
from typing import Any

from fastdpo.data.images import shown
from fastdpo.data.images.expansion import Expander
from fastdpo.data.images.given import PLACEHOLDER
from fastdpo.records import PreferenceGroup

_ROLES = {"system", "developer", "user", "assistant", "model", "tool", "ipython"}
_BY_TOKEN = {"[INST]": "user", "[/INST]": "assistant", "[SYSTEM_PROMPT]": "system"}


def said(tokenizer, group: PreferenceGroup, expander: Expander | None = None) -> dict[str, Any]:
    """{"prompt", "turns"}: what people read of a prompt, without special tokens, <image> for each image."""
    if not group.images or expander is None:
        ids = group.prompt.tolist()
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        return {"prompt": text, "turns": turns_of(tokenizer, ids)}
    ids, token = shown.one_token_each(group, expander), expander.token
    special = special_ids(tokenizer) - {expander.token_id}
    text = tokenizer.decode([i for i in ids if i not in special]).strip()
    turns = turns_of(tokenizer, ids, special) or []
    for turn in turns:
        turn["content"] = turn["content"].replace(token, PLACEHOLDER)
    return {"prompt": text.replace(token, PLACEHOLDER), "turns": turns or None}


def special_ids(tokenizer) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def turns_of(tokenizer, ids: list[int], special: set[int] | None = None) -> list[dict] | None:
    """A prompt's [{"role", "content"}], as its special tokens part it: the role is such a token (<|user|>,
    [INST]), or the line behind one (<|im_start|>user). None where text comes before any role."""
    special = special_ids(tokenizer) if special is None else special
    turns: list[dict] = []
    role = opens = last = None  # role: of the next text; opens: the token that roles follow
    for is_special, run in itertools.groupby(ids, special.__contains__):
        if is_special:
            for last in tokenizer.convert_ids_to_tokens(list(run)):
                name = _BY_TOKEN.get(last, last.strip("<|｜>").lower())
                role = name if name in _ROLES else role
            continue
        text = tokenizer.decode(list(run)).strip()
        first, _, rest = text.partition("\n")
        if first.strip() in _ROLES and (last == opens if opens else not role):
            role, text, opens = first.strip(), rest.strip(), last
        if text and role:
            turns.append({"role": role, "content": text})
            role = None
        elif text and turns:  # behind a special token inside a turn
            turns[-1]["content"] += f"\n{text}"
        elif text:
            return None
    return turns or None
