"""docs/troubleshooting.md and the sources: what the page quotes is said, and what is said is quoted."""

import ast
import re

from fastdpo.data.report import MEANING
from tests.docs.messages import ROOT, Source, letters, printed, sources

PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
QUOTES = [printed(found[2].strip()) for found in re.finditer(r"\*\*(`+)(.+?)\1\*\*", PAGE)]
SOURCES = sources()
MESSAGES = [message for source in SOURCES for message in source.messages()]
LEAST = 9  # letters of a quote that covers a longer message
NOT_QUOTED = {  # (folder, what makes the message): why
    ("fastdpo/convert/", "refuse"): "they are the way out, after the key; the page has the commonest",
    ("fastdpo/convert/", "only"): "the same",
    ("fastdpo/data/", "expect"): "printed as `FIELD: WANTED, not VALUE`; the page explains wrong_type",
}
PASSED_ON = {  # (file, function) whose errors say what they were given: where that is found
    ("fastdpo/config/keys.py", "__post_init__"): "fastdpo.config.checks and stages",
    ("fastdpo/config/keys.py", "from_values"): "the same, and fastdpo.values",
    ("fastdpo/config/rewards.py", "check_reward_keys"): "_problems",
    ("fastdpo/config/rounds.py", "sample_spec"): "_problem",
    ("fastdpo/config/stages.py", "stages_of"): "what it found",
    ("fastdpo/convert/convert.py", "_checked"): "reasons that the tables have",
    ("fastdpo/data/formats/layouts.py", "problem"): "a RowProblem once more",
    ("fastdpo/convert/overrides.py", "without"): "what it found",
    ("fastdpo/data/chat/arguments.py", "check_row_kwargs"): "_wrong",
    ("fastdpo/data/formats/columns.py", "_ref_logps"): "calls of its `problem`",
    ("fastdpo/data/sources.py", "named"): "the same, beginning with the config's key",
    ("fastdpo/data/spans.py", "_bad_spans"): "its callers",
    ("fastdpo/data/store/worker.py", "_sendable"): "what was raised in that process",
    ("fastdpo/explanation/patch.py", "__getitem__"): "a name, as every mapping does",
    ("fastdpo/model/finding.py", "_of_hub"): "fastdpo.files.names",
    ("fastdpo/model/finding.py", "find_source"): "_no_model",
    ("fastdpo/model/source.py", "_config_of_folder"): "_unknown",
    ("fastdpo/planning/choose.py", "choose"): "_nothing_fits",
    ("fastdpo/training/checkpoint.py", "load"): "Python's own words",
    ("fastdpo/training/job.py", "resolve"): "fastdpo.config.rounds",
    ("fastdpo/training/rounds.py", "begin"): "quiet_rounds",
}


def holds(text: tuple[str, ...], quote: str) -> bool:
    """Whether the literal parts of a quote are in a text, in order, each within one of its pieces."""
    rest = list(text)
    for part in filter(None, (part.strip() for part in quote.split("..."))):
        while rest and part not in rest[0]:
            rest.pop(0)
        if not rest:
            return False
        rest[0] = rest[0].partition(part)[2]
    return True


def covers(quote: str, text: tuple[str, ...]) -> bool:
    """Whether one who searches the page for the text finds the quote: by its words, or by its key."""
    if re.fullmatch(r"\w+: \.\.\.", quote):
        return text[0].startswith(quote.removesuffix("..."))
    return letters(quote) >= min(letters(text), LEAST) and holds(text, quote)


def test_what_is_quoted_is_said():
    texts = {text for source in SOURCES for text in source.strings()}
    assert len(QUOTES) > 300 and all(map(letters, QUOTES))
    assert not [quote for quote in QUOTES if not any(holds(text, quote) for text in texts)]


def test_what_is_said_is_quoted():
    missing, used = {}, set()
    for message in MESSAGES:
        kind = next((k for k in NOT_QUOTED if message.file.startswith(k[0]) and message.maker == k[1]), None)
        used.add(kind or (message.file, message.function))
        if kind is None and message.pieces and not any(covers(quote, message.pieces) for quote in QUOTES):
            missing["...".join(message.pieces)] = f"{message.file}:{message.line}"
    assert not missing, "\n".join(f"{where}  {text}" for text, where in missing.items())
    assert NOT_QUOTED.keys() | PASSED_ON.keys() <= used


def test_no_error_is_without_a_text():
    assert {(m.file, m.function) for m in MESSAGES if not m.pieces} == PASSED_ON.keys()


def test_every_reason_and_note_of_a_data_report_is_there():
    calls = (node for source in SOURCES for node in ast.walk(source.tree) if isinstance(node, ast.Call))
    made = [call for call in calls if ast.unparse(call.func) == "RowProblem"]
    reasons = {call.args[0].value for call in made if isinstance(call.args[0], ast.Constant)}
    assert len(reasons) > 20 and MEANING.keys() | reasons <= set(QUOTES)


def test_no_quote_twice():
    assert len(QUOTES) == len(set(QUOTES))


def test_how_messages_are_found(tmp_path, monkeypatch):
    text = """
    def f(console, name, error):
        why = f"{name} is none of these: {error}"
        if name:
            raise ConfigError(why) from None
        console.print(f"[yellow]{name} was left out[/]")
        warnings.warn("an old name" if error else "a new name")
        raise ValueError(f"{error}")
    """
    (tmp_path / "fastdpo").mkdir()
    (tmp_path / "fastdpo/a.py").write_text(re.sub("(?m)^    ", "", text))
    monkeypatch.setattr("tests.docs.messages.ROOT", tmp_path)
    found = [message[2:] for message in Source(tmp_path / "fastdpo/a.py").messages()]
    assert sorted(found) == [
        ("ConfigError", "f", (" is none of these: ",)),
        ("ValueError", "f", ()),
        ("print", "f", (" was left out",)),
        ("warn", "f", ("a new name",)),
        ("warn", "f", ("an old name",)),
    ]
    text = (": ", " is not one of ", ". Take ")
    assert covers("...: ... is not one of ...", text) and covers("... is not one of .... Take ...", text)
    assert covers("beta: ...", ("beta: ", " is below ")) and not covers("beta: ...", ("alpha: ", " beta: "))
    assert not covers("...: ... is not ...", text) and not covers("Take ... is not one of ...", text)
