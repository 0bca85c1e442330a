"""All that tokenised rows depend on is in the key, and nothing else is."""

import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from benchmarks.process import python_path
from fastdpo.data.chat.arguments import Chat
from fastdpo.data.groups import Limits
from fastdpo.data.store import key
from fastdpo.data.store.key import key_of, tokenizer_digest
from tests.data.shared_data import CHATML, needs_shared, real_tokenizer, small_tokenizer

ROOT = Path(__file__).resolve().parents[3]
NOON = datetime(2026, 11, 28, 12)
SAID = dict(identity="i", tokenizer="t", limits=Limits(64), chat=Chat(None, NOON), rows=2048, template=CHATML)


def told(**changes) -> str | None:
    return key_of(**SAID | changes)


def test_each_thing_changes_it():
    asking = CHATML + "{{ strftime_now('%d') }}"
    chats = [
        None,
        {"a": 1},
        {"a": 1.0},
        {"a": True},
        {"a": "1"},
        {"a": [1]},
        {"b": 1, "a": 1},
        {"a": 1, "b": 1},
    ]
    keys = [told(chat=Chat(kwargs, NOON)) for kwargs in chats]
    keys += [told(identity="j"), told(tokenizer="u"), told(rows=1024), told(prompts_only=True)]
    keys += [told(limits=Limits(65)), told(limits=Limits(64, "keep_end")), told(limits=Limits(64, "drop"))]
    keys += [told(template=asking), told(template={"default": CHATML, "tools": asking}, identity="j")]
    keys += [told(template=asking, chat=Chat(None, NOON.replace(day=29)))]
    assert len({*keys}) == len(keys) and None not in keys
    assert told() == told(chat=Chat({}, NOON)) == keys[0]


def test_the_day_is_in_it_where_it_is_asked_for():
    asking, dated = CHATML + "{{ strftime_now('%d') }}", {"date_string": "28 Nov 2026"}
    on = lambda day, **more: told(chat=Chat(more, NOON.replace(day=day)), template=asking)
    assert on(28) != on(29) and on(28, **dated) == on(29, **dated)
    assert told(chat=Chat(None, NOON.replace(day=29))) == told()
    assert on(28) == told(chat=Chat(None, NOON.replace(hour=1)), template=asking)


def test_what_no_repr_tells_is_in_no_key():
    for value in (object(), {1, 2}, NOON, type("Text", (str,), {})("a")):
        assert told(chat=Chat({"a": [value]}, NOON)) is None


def test_versions_and_code_are_in_it(monkeypatch):
    theirs, known = key._versions(), {told()}
    for name in ("transformers", "tokenizers", "jinja2", "python"):
        assert f'"{name}": "' in theirs
        other = theirs.replace(f'"{name}": "', f'"{name}": "9')
        monkeypatch.setattr(key, "_versions", lambda other=other: other)
        known.add(told())
    monkeypatch.setattr(key, "_code", lambda: "other code")
    known.add(told())
    assert len(known) == 6


def test_code_is_told_by_its_files(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "fastdpo", tmp_path / "fastdpo", ignore=shutil.ignore_patterns("__pycache__"))
    package = tmp_path / "fastdpo"
    monkeypatch.setattr(key, "__file__", str(package / "data/store/key.py"))
    code = key._code.__wrapped__
    known = {code()}
    for name in (
        "data/groups.py",
        "preferences.py",
        "console/formatting.py",
        "data/chat/templates/new.jinja",
    ):
        with (package / name).open("a") as file:
            file.write("# more")
        known.add(code())
    (package / "data/rows.py").rename(package / "data/lines.py")
    known.add(code())
    assert len(known) == 6
    (package / "training/run.py").unlink()
    (package / "data/__pycache__").mkdir()
    (package / "data/__pycache__/rows.pyc").touch()
    assert code() in known


def test_all_code_that_makes_tokens_is_in_it():
    script = "import sys, fastdpo.data.store.worker, fastdpo.data.store.work; "
    script += "print(*[m.__file__ for n, m in sys.modules.items() if n.startswith('fastdpo')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, **IN_A_CHILD)
    package = ROOT / "fastdpo"
    keyed = {file for name in key._OF_THE_CODE for file in key._files(package, name)}
    loaded = {*map(Path, done.stdout.split())}
    assert package / "data/groups.py" in loaded and loaded <= keyed


IN_A_CHILD = dict(env=os.environ | python_path(ROOT, ROOT / "kernels"), cwd=ROOT)


def test_a_tokenizer_is_told_by_all_that_it_does():
    def changed(change=lambda tokenizer: None, **how) -> str | None:
        tokenizer = small_tokenizer(**how)
        change(tokenizer)
        return tokenizer_digest(tokenizer)

    def lower(tokenizer):
        from tokenizers import normalizers

        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()

    digests = [
        changed(),
        changed(bos=False),
        changed(eos=False),
        changed(chat_template=None),
        changed(chat_template=CHATML + " "),
        changed(chat_template={"default": CHATML}),
        changed(lower),
        changed(lambda t: t.add_tokens(["gold"])),
        changed(lambda t: t.add_tokens([AddedToken("gold", lstrip=True)])),
        changed(lambda t: t.add_special_tokens({"additional_special_tokens": ["gold"]})),
        changed(lambda t: setattr(t, "eos_token", "<|im_end|>")),
        changed(lambda t: setattr(t, "split_special_tokens", True)),
    ]
    assert None not in digests and len({*digests}) == len(digests)
    same = small_tokenizer()
    same("good morning", truncation=True, max_length=2, padding="max_length")
    same.name_or_path = "elsewhere"
    assert tokenizer_digest(same) == digests[0]


def test_what_a_tokenizer_does_besides_cannot_be_told():
    class Own(PreTrainedTokenizerFast):
        """Anything may be in it."""

    assert tokenizer_digest(Own(tokenizer_object=small_tokenizer().backend_tokenizer)) is None
    patched = small_tokenizer()
    patched.apply_chat_template = lambda *args, **kwargs: "the same to all"
    assert tokenizer_digest(patched) is None


def test_a_slow_tokenizer_is_told_by_what_it_saves():
    digests = [tokenizer_digest(ByT5Tokenizer(extra_ids=n)) for n in (125, 125, 100)]
    assert digests[0] == digests[1] != digests[2] and None not in digests
    templated = ByT5Tokenizer()
    templated.chat_template = CHATML
    assert tokenizer_digest(templated) not in (*digests, None)

    class Own(ByT5Tokenizer):
        """Its code is saved nowhere."""

    assert tokenizer_digest(Own()) is None


def test_the_code_that_a_model_brings_is_told(tmp_path, monkeypatch):
    digests = []
    for number, more in enumerate(("", "", "\n    lower = True\n")):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        (folder / "theirs.py").write_text(f"{THEIRS}{more}")
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "theirs", raising=False)
        from theirs import Theirs

        Theirs._auto_class = "AutoTokenizer"  # as from_pretrained sets it where code is trusted
        digests.append(tokenizer_digest(Theirs()))
    assert digests[0] == digests[1] != digests[2] and None not in digests


THEIRS = """from transformers import ByT5Tokenizer


class Theirs(ByT5Tokenizer):
    \"\"\"What a model's folder brings.\"\"\"
"""


def test_every_process_says_the_same():
    script = "from tests.data.store.test_key import *; from fastdpo.data.store.key import *; "
    script += "print(tokenizer_digest(small_tokenizer()), tokenizer_digest(ByT5Tokenizer()), told())"
    said = []
    for seed in ("1", "2"):
        environment = IN_A_CHILD["env"] | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", script]
        said.append(subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True).stdout)
    assert said[0] == said[1]
    assert said[0].split() == [tokenizer_digest(small_tokenizer()), tokenizer_digest(ByT5Tokenizer()), told()]


@needs_shared
@pytest.mark.parametrize("name", ["gpt2", "qwen2.5", "stories260K"])
def test_real_tokenizers_are_told(name):
    first, second = tokenizer_digest(real_tokenizer(name)), tokenizer_digest(real_tokenizer(name))
    assert first == second is not None
