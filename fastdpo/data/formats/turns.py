"""Any tool's turns as messages: {from, value}, names for the roles, contents in parts, tool calls as text."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from fastdpo.data.images.given import COLUMNS, IMAGE, is_image, is_nothing, of_part
from fastdpo.data.report import RowProblem, expect, kind

_NAMES = {  # the roles in ShareGPT, LLaMA-Factory, Axolotl, ms-swift, OpenAI before tools, Llama, Gemma
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai"),
    "tool": ("tool", "observation", "function", "function_response", "tool_response", "ipython"),
    "call": ("function_call", "tool_call"),
}
_ROLES = {theirs: ours for ours, names in _NAMES.items() for theirs in names}
_TEXT_PARTS = ("text", "input_text", "output_text")  # of a content that is a list; the last two are OpenAI's
_MEDIA = re.compile("image|video|audio|^file")  # in keys of a part
MEDIA_NAMES = ("images", "image", "videos", "video", "audios", "audio")  # of columns, and of a message's keys
_HUMAN_OR_ASSISTANT = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Tags:
    """How a source names the parts of a message."""

    role: tuple[str, ...] = ("role", "from")
    content: tuple[str, ...] = ("content", "value")
    roles: dict[str, str] = field(default_factory=lambda: _ROLES)  # theirs -> ours; "call" is a tool call
    images: bool = False  # parts may be images: the turn then has them under "images", and IMAGE in its text


def tags_of(named: dict) -> Tags:
    """The tags of a LLaMA-Factory data set; those it does not name keep their usual names."""
    ours = {"observation": "tool", "function": "call"}
    tags = ("user", "assistant", "observation", "function", "system")
    roles = {named[f"{tag}_tag"]: ours.get(tag, tag) for tag in tags if named.get(f"{tag}_tag")}
    keys: dict[str, Any] = {
        key: (named[f"{key}_tag"],) for key in ("role", "content") if named.get(f"{key}_tag")
    }
    return Tags(**keys, roles=_ROLES | roles)


def text_or_turns(value, field: str, tags: Tags) -> str | list[dict]:
    expect(value, str | list | dict, field, "text or a list of messages")
    return value if isinstance(value, str) else turns(value, field, tags)


def turns(value, field: str, tags: Tags) -> list[dict]:
    """One message or several as messages with our roles, their contents text, the arguments of tool calls
    objects; all other keys stay, but those that are null. A tool call that is written as text becomes an
    assistant's `tool_calls`, and calls that follow each other one turn."""
    if isinstance(value, dict):
        value = [value]
    out: list[dict] = []
    before = None
    for i, given in enumerate(expect(value, list, field, "a message or a list of messages")):
        where = f"{field}[{i}]"
        expect(given, dict, where, "a message has a role and a content")
        rest = {key: value for key, value in given.items() if value is not None}
        if not rest.keys().isdisjoint(MEDIA_NAMES):
            for key in MEDIA_NAMES:
                refuse_media(rest.get(key), f"{where}.{key}", tags.images)
        role_key, content_key = _keys(rest, where, tags)
        role = _role(rest.pop(role_key), f"{where}.{role_key}", tags)
        content, said_in = rest.pop(content_key, None), f"{where}.{content_key}"
        if role == "call":
            calls = _calls(content, said_in)
            if before == (role, rest):
                out[-1]["tool_calls"] += calls
            else:
                out.append(rest | {"role": "assistant", "content": "", "tool_calls": calls})
        else:
            calls = []
            for key in ("tool_calls", "function_call"):  # the second is OpenAI's older form
                if written := rest.pop(key, None):
                    calls += _calls(written, f"{where}.{key}")
            if content is None and calls:
                content = ""  # many templates would print "None"
            said, images = _said(content, said_in, tags)
            out.append(rest | {"role": role, "content": said} | ({"images": images} if images else {}))
            if calls:
                out[-1]["tool_calls"] = calls
        before = role, rest
    return out


def refuse_media(value, field: str, images_read: bool = False) -> None:
    """Raises RowProblem, unless there is nothing in it."""
    if is_nothing(value):
        return
    if images_read and field.rpartition(".")[2] in COLUMNS:
        message = "images are read from the row's own column and from parts of a content; put them there"
        raise RowProblem("media", field, message)
    raise RowProblem("media", field, f"it is not empty; {not_read(field)}")


def not_read(what: str) -> str:
    """Why media are refused that are named so."""
    return "this model reads text only" if "image" in what else "sound and video are not read"


def starts_with(messages: list) -> str | None:
    """Whose the first message is, as far as it says: the assistant's where it names nobody."""
    first, tags = messages[0], Tags()
    if not isinstance(first, dict):
        return None
    theirs = next((first[key] for key in tags.role if first.get(key) is not None), "assistant")
    role = tags.roles.get(theirs) if isinstance(theirs, str) else None
    return "assistant" if role == "call" else role


def _role(theirs, field: str, tags: Tags) -> str:
    expect(theirs, str, field, "a role in text")
    if theirs not in tags.roles:
        message = f"unknown role {theirs!r}; known are {', '.join(tags.roles)}"
        raise RowProblem("unknown_role", field, message)
    return tags.roles[theirs]


def _keys(message: dict, where: str, tags: Tags) -> tuple[str, str]:
    role = [key for key in tags.role if key in message]
    content = [key for key in tags.content if key in message] or tags.content[:1]
    if not role:
        has = ", ".join(map(str, message)) or "nothing"
        raise RowProblem("wrong_type", where, f"a message has a {' or '.join(tags.role)}; this has {has}")
    if len(role) > 1 or len(content) > 1:
        both = " and ".join(role if len(role) > 1 else content)
        raise RowProblem("ambiguous_row", where, f"the message has both {both}")
    return role[0], content[0]


def _said(content, field: str, tags: Tags) -> tuple[str, list]:
    """(a message's content, the images in it): a list of parts is what templates print of it, one after the
    other, with IMAGE where a part is one."""
    if not isinstance(content, list):
        return expect(content, str, field, "text"), []
    said, images = [], []
    for i, part in enumerate(content):
        where = f"{field}[{i}]"
        expect(part, dict, where, "a part of the content, {type: text, text: ...}")
        if tags.images and is_image(part):
            said.append(IMAGE)
            images.append(of_part(part))
            continue
        names = {key for key, value in part.items() if value is not None} - {"type", "text"}
        is_text = part.get("type", "text") in _TEXT_PARTS
        if not is_text or any(_MEDIA.search(str(name)) for name in names):
            what = " and ".join(sorted(map(str, names))) if is_text else str(part["type"])[:40]
            raise RowProblem("media", where, f"a part of the content is {what!r}; {not_read(what)}")
        said.append(expect(part.get("text"), str, f"{where}.text", "text"))
    return "".join(said), images


def _calls(value, field: str) -> list[dict]:
    """Tool calls as chat templates take them: functions whose arguments are an object, not its text."""
    value = _parsed(value, field)
    calls = []
    for i, call in enumerate(value if isinstance(value, list) else [value]):
        where = f"{field}[{i}]" if isinstance(value, list) else field
        outer = {k: v for k, v in call.items() if v is not None} if isinstance(call, dict) else {}
        function = outer.get("function")
        if function is None:  # {name, arguments, ...} alone
            function = {key: outer.pop(key) for key in ("name", "arguments", "parameters") if key in outer}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowProblem("wrong_type", where, f"a tool call has a name and arguments, not {kind(call)}")
        inner = {key: value for key, value in function.items() if value is not None}
        if "arguments" not in inner:
            inner["arguments"] = inner.pop("parameters", None)
        arguments = _parsed(inner["arguments"], f"{where}.arguments")
        empty = arguments is None or arguments == []
        inner["arguments"] = expect({} if empty else arguments, dict, f"{where}.arguments", "an object")
        if "type" not in outer:
            outer = {k: v for k, v in outer.items() if k != "function"} | {"type": "function"}
        calls.append(outer | {"function": inner})  # in the row's own order, which tojson prints
    return calls


def _parsed(value, field: str):
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise RowProblem("wrong_type", field, f"a tool call's text must be JSON: {error}") from None


def from_human_and_assistant(text: str, field: str) -> list[dict] | str:
    """The turns of a "\\n\\nHuman: ...\\n\\nAssistant: ..." prompt; a text without them as it is."""
    if not text.startswith("\n\nHuman:"):
        return text
    _, *parts = _HUMAN_OR_ASSISTANT.split(text)
    found = [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2])
    ]
    if found[-1] != {"role": "assistant", "content": ""}:
        raise RowProblem("prompt_end", field, "it does not end with an open Assistant: turn")
    return found[:-1]


def past_turns(history, field: str) -> list[dict]:
    """[[question, answer], ...] as messages."""
    out = []
    for i, pair in enumerate(expect(history, list, field, "a list of [question, answer]")):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(t, str) for t in pair):
            raise RowProblem("wrong_type", f"{field}[{i}]", f"[question, answer] in text, not {kind(pair)}")
        out += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return out
