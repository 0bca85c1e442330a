"""The commands of a shell script as words, with its own variables put in; nothing of it is run."""

import re

from fastdpo.convert.draft import Unresolved
from fastdpo.errors import ConfigError

_TOKEN = re.compile(
    r"""
    (?P<join> \\\n )
  | (?P<space> [ \t\r]+ | (?<![^\s;&|(])\#[^\n]* )
  | <<-?[ ]*(?P<quote>['"]?)(?P<mark>\w+)(?P=quote)                  # a heredoc, whose body is below
  | (?P<redirect> (\d|&)?[<>]{1,3}(&\d?-?)? )
  | (?P<end> [;&|\n]+ )
  | (?P<bracket> [()] )
  | '(?P<single> [^']* )'
  | \$'(?P<ansi> (?: \\. | [^\\'] )* )'
  | "(?P<double> (?: \$\([^()]*\) | \\. | [^"\\] )* )"
  | (?P<bare> (?: \$\(\( [^\n]*? \)\) | \$\( (?: [^()\n] | \([^()\n]*\) )* \) | \$\{[^}\n]*\} | `[^`]*` )
            | (?: \\. | [^\s;&|()<>'"\\$`] )+ | [$`\\'"] )
    """,
    re.X | re.S,
)
_VALUE = re.compile(
    r"""
    \\(?P<escaped> . )
  | \$\(\((?P<sum> [^\n]*? )\)\) | \$\(\s*expr\s+(?P<expr> [^()`]* )\)
  | \$\{(?P<name> \w+ )(?: :?[-=](?P<default> [^}]* ))?\} | \$(?P<short> \d | [A-Za-z_]\w* )
  | (?P<unknown> \$\(.*\) | `[^`]*` | \$\{[^}]*\} | \$[@*\#?!$-] | \$\(.* )
    """,
    re.X | re.S,
)
_KEYWORDS = "if then else elif fi for while until do done case esac ! { }".split()
_SETS = re.compile(r"(?s)([A-Za-z_]\w*)(\+?)=(.*)")
_EXPORTED = ("NPROC_PER_NODE", "NNODES", "MAX_PIXELS")
_OPEN = "\0"  # behind what cannot be told in a value
_SPACE = "\1"  # where a variable's value falls apart into words


class Script:
    """commands: each as words, the script's variables put in; a word that only running would tell is
    Unresolved. What those of _EXPORTED are set to before a command stands ahead of it, too."""

    def __init__(self, text: str):
        self.variables: dict[str, str] = {}
        self.lists: dict[str, list[str]] = {}
        self.commands: list[list[str]] = []
        self.depth = 0  # within how many ifs and loops: what is set there may not be
        for words, is_surely in _statements(text):
            self._read(words, is_surely)

    def _read(self, words: list, is_surely: bool) -> None:
        bodies = [word for word in words if isinstance(word, _Heredoc)]
        while words and words[0] in [[("bare", word)] for word in _KEYWORDS]:
            word = words.pop(0)[0][1]
            self.depth += (word in ("if", "for", "while", "until", "case")) - (word in ("fi", "done", "esac"))
            if word == "for" and words:
                self.variables[words[0][0][1]] = f"${words[0][0][1]}{_OPEN}"
        spoken = [self._words(word) for word in words if not isinstance(word, _Heredoc | _List)]
        flat = [word for some in spoken for word in some]
        if bodies and flat[:1] == ["read"]:
            body = bodies[0].text if bodies[0].is_quoted else self._fill(bodies[0].text)
            self._set(flat[-1], body, is_surely)
            return
        sets = [word for word in flat if _SETS.fullmatch(word)]
        rest = [word for word in flat if word not in sets and not word.startswith("-")]
        for word in words:
            if isinstance(word, _List):
                values = [value for one in word.words for value in self._words(one)]
                self.lists[word.name] = (self.lists.get(word.name, []) if word.adds else []) + values
        if rest in ([], ["export"], ["readonly"], ["declare"], ["local"]):
            for word in sets:
                name, adds, value = _SETS.fullmatch(word).groups()  # type: ignore[union-attr]
                value = value + _OPEN if isinstance(word, Unresolved) else value
                self._set(name, self.variables.get(name, "") + value if adds else value, is_surely)
        elif flat:
            if flat[0].startswith("--"):
                raise ConfigError(f"{flat[0]}: the line before it does not end with \\, so no command has it")
            exported = [f"{name}={self.variables[name]}" for name in _EXPORTED if name in self.variables]
            self.commands.append(exported + flat)

    def _set(self, name: str, value: str, is_surely: bool) -> None:
        if (self.depth or not is_surely) and self.variables.get(name, value) != value:
            value = f"${name}{_OPEN}"
        self.variables[name] = value

    def _words(self, word: list[tuple[str, str]]) -> list[str]:
        """What a word becomes: of "${X[@]}" and of a bare $X several, or none."""
        whole = "".join(text for _, text in word)
        if named := re.fullmatch(r"\$\{(\w+)\[[@*]\]\}", whole):
            return self.lists.get(named[1], [Unresolved(whole)])
        if whole in ("$@", "$*"):
            return []  # the script's own arguments: it is read without any
        text, splits = "", not _SETS.match(whole)
        for kind, part in word:
            filled = part if kind == "single" else self._fill(part, kind)
            text += re.sub(r"\s+", _SPACE, filled) if splits and kind == "bare" and "$" in part else filled
        parts = [part for part in text.split(_SPACE) if part] if _SPACE in text else [text]
        parts = parts if text or any(kind != "bare" for kind, _ in word) else []
        return [Unresolved(part.replace(_OPEN, "")) if _OPEN in part else part for part in parts]

    def _fill(self, text: str, kind: str = "double") -> str:
        """The text with variables, sums and escapes put in; _OPEN behind what is not known."""
        return _VALUE.sub(lambda match: self._one(match, kind), text.replace("\\\n", ""))

    def _one(self, match: re.Match, kind: str) -> str:
        if (escaped := match["escaped"]) is not None:
            known = {"ansi": {"n": "\n", "t": "\t"}, "double": {c: c for c in '$`"\\'}}.get(kind)
            return escaped if known is None else known.get(escaped, match[0])
        if kind == "ansi":
            return match[0]
        sum_of = match["sum"] or match["expr"]
        if sum_of is not None:
            result = _result(self._fill(re.sub(r"(?<![$\w{])[A-Za-z_]\w*", r"$\g<0>", sum_of)))
            return match[0] + _OPEN if result is None else str(result)
        name = match["name"] or match["short"]
        if name in self.variables and not (match["default"] and not self.variables[name]):
            return self.variables[name]
        return match[0] + _OPEN if match["default"] is None else self._fill(match["default"])


class _Heredoc:
    def __init__(self, text: str, is_quoted: bool):
        self.text, self.is_quoted = text, is_quoted


class _List:
    """NAME=( words ) or NAME+=( words )."""

    def __init__(self, name: str, adds: bool):
        self.name, self.adds, self.words = name, adds, []  # type: ignore[var-annotated]


def _result(text: str) -> int | None:
    """Of whole numbers with * / % or + - between them, from left to right."""
    numbers = re.split(r"\s*[-+*/%]\s*", text.strip())
    signs = re.findall(r"[-+*/%]", text)
    if not all(number.isdecimal() for number in numbers) or ({*"+-"} & {*signs} and {*"*/%"} & {*signs}):
        return None
    result = int(numbers[0])
    for sign, number in zip(signs, map(int, numbers[1:])):
        if sign in "/%" and number == 0:
            return None
        ways = {"+": result + number, "-": result - number, "*": result * number}
        result = ways[sign] if sign in ways else result // number if sign == "/" else result % number
    return result


def _statements(text: str):
    """(words, whether no && or || is before them) of each command; a word is its parts (kind, text), and a
    heredoc and a list are words, too."""
    words: list = []
    word: list[tuple[str, str]] = []
    inside: _List | None = None
    at, is_target = 0, False  # of > or <
    is_surely = True
    while at < len(text):
        token = _TOKEN.match(text, at)
        assert token  # the last alternative takes any character
        at = token.end()
        kind = token.lastgroup
        if kind == "join":
            continue
        if kind in ("single", "ansi", "double", "bare"):
            before = word.pop()[1] if word and kind == word[-1][0] == "bare" else ""
            word.append((kind, before + token[kind]))
            continue
        named = re.fullmatch(r"([A-Za-z_]\w*)(\+?)=", word[0][1]) if len(word) == 1 else None
        if token["bracket"] == "(" and named and inside is None:
            inside, word = _List(named[1], bool(named[2])), []
            continue
        if word:
            if not is_target:
                (words if inside is None else inside.words).append(word)
            word, is_target = [], False
        is_target = is_target or (kind == "redirect" and "&" not in token[0][1:])
        if token["mark"]:
            line = text.find("\n", at) + 1 or len(text)
            body = re.compile(rf"(?m)^[ \t]*{token['mark']}[ \t]*$").search(text, line)
            end = body.start() if body else len(text)
            words.append(_Heredoc(text[line:end], bool(token["quote"])))
            text = text[:line] + text[body.end() + 1 if body else len(text) :]
        elif token["bracket"] == ")" and inside is not None:
            words.append(inside)
            inside = None
        elif kind in ("end", "bracket") and inside is None:
            yield words, is_surely
            words, is_surely = [], token[0] not in ("&&", "||")
    yield [*words, *([word] if word else [])], is_surely
