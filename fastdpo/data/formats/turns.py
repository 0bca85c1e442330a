"""Other tools' turns as messages: {from, value}, their names for the roles, tool calls written as text."""

import json
import re
from dataclasses import dataclass, field

from fastdpo.data.report import RowProblem, expect, kind

_NAMES = {  # ShareGPT's, LLaMA-Factory's, Axolotl's and ms-swift's names for the roles
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "bot"),
    "tool": ("tool", "observation", "function_response", "tool_response"),
    "call": ("function_call", "tool_call"),
}
_ROLES = {theirs: ours for ours, names in _NAMES.items() for theirs in names}
_HUMAN_OR_ASSISTANT = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Tags:
    """How a source names the parts of a message."""

    role: tuple[str, ...] = ("role", "from")
    content: tuple[str, ...] = ("content", "value")
    roles: dict[str, str] = field(default_factory=lambda: _ROLES)  # theirs -> ours; "call" is a tool call


def tags_of(named: dict) -> Tags:
    """The tags of a LLaMA-Factory data set; those it does not name keep their usual names."""
    ours = {"observation": "tool", "function": "call"}
    tags = ("user", "assistant", "observation", "function", "system")
    roles = {named[f"{tag}_tag"]: ours.get(tag, tag) for tag in tags if named.get(f"{tag}_tag")}
    keys = {key: (named[f"{key}_tag"],) for key in ("role", "content") if named.get(f"{key}_tag")}
    return Tags(**keys, roles=_ROLES | roles)


def text_or_turns(value, field: str, tags: Tags) -> str | list[dict]:
    return value if isinstance(value, str) else turns(value, field, tags)


def turns(value, field: str, tags: Tags) -> list[dict]:
    """One message or several as messages with our roles. A tool call that is written as text becomes an
    assistant's `tool_calls`, and calls that follow each other one turn."""
    if isinstance(value, dict):
        value = [value]
    out = []
    for i, message in enumerate(expect(value, list, field, "a message or a list of messages")):
        where = f"{field}[{i}]"
        role_key, content_key = _keys(message, where, tags)
        theirs = message[role_key]
        if theirs not in tags.roles:
            message = f"unknown role {theirs!r}; known are {', '.join(tags.roles)}"
            raise RowProblem("unknown_role", f"{where}.{role_key}", message)
        role, content = tags.roles[theirs], message.get(content_key)
        rest = {k: v for k, v in message.items() if k not in (role_key, content_key) and v is not None}
        if role != "call":
            if calls := rest.pop("tool_calls", None):
                rest["tool_calls"] = _calls(calls, f"{where}.tool_calls")
            out.append({"role": role, "content": content} | rest)
            continue
        calls = _calls(content, f"{where}.{content_key}")
        if out and tags.roles.get(value[i - 1].get(role_key)) == "call":
            out[-1]["tool_calls"] += calls
        else:
            out.append({"role": "assistant", "content": "", "tool_calls": calls})
    return out


def _keys(message, where: str, tags: Tags) -> tuple[str, str]:
    expect(message, dict, where, "a message")
    role = [key for key in tags.role if key in message]
    content = [key for key in tags.content if key in message] or tags.content[:1]
    if not role:
        has = ", ".join(map(str, message)) or "nothing"
        raise RowProblem("wrong_type", where, f"a message has a {' or '.join(tags.role)}; this has {has}")
    if len(role) > 1 or len(content) > 1:
        both = " and ".join(role if len(role) > 1 else content)
        raise RowProblem("ambiguous_row", where, f"the message has both {both}")
    return role[0], content[0]


def _calls(value, field: str) -> list[dict]:
    """Tool calls as chat templates take them: functions whose arguments are an object, not its text."""
    value = _parsed(value, field)
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowProblem("wrong_type", field, f"a tool call has a name and arguments, not {kind(call)}")
        arguments = function.get("arguments", function.get("parameters"))
        function = {"name": function["name"], "arguments": _parsed(arguments, f"{field}.arguments") or {}}
        about = {} if call.get("id") is None else {"id": call["id"]}
        calls.append(about | {"type": "function", "function": function})
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
