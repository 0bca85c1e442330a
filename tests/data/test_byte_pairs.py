"""tiktoken's ids are those of the tokenizer whose pieces and merges it is given, and where that is not known
it is not asked."""

import json
import random
import unicodedata
import warnings
from itertools import islice

import pytest
import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastdpo.data import byte_pairs, tokenizing
from fastdpo.data.byte_pairs import PATTERNS, BytePairs
from fastdpo.data.store.key import tokenizer_digest
from fastdpo.data.tokenizing import Encoder
from tests.data.shared_data import SHARED

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
NO_REGEX = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
EACH_DIGIT = pre_tokenizers.Digits(individual_digits=True)


def split(pattern: str, **how):
    cut = pre_tokenizers.Split(Regex(pattern), **({"behavior": "isolated"} | how))
    return pre_tokenizers.Sequence([cut, NO_REGEX])


CUTS = {
    "GPT-2": BYTES,
    "SmolLM": pre_tokenizers.Sequence([EACH_DIGIT, BYTES]),
    **{name: split(pattern) for name, pattern in PATTERNS.items()},
}
CORPUS = [
    "It's a fine day, isn't it? They'LL say: we'd been there by 10:45, 1234567 times.\n\n  Then\twhat?",
    "naïve café, Ελληνικά, русский язык, 中文的句子。日本語です, العربية, हिन्दी 😀👩‍🚀 x²+½ — “quoted”…",
    "def f(x):\n    return [x ** 2 for x in range(10)]  # and so on\r\n\r\n" * 2,
]


def trained(cut, **settings) -> Tokenizer:
    """A tokenizer of a few merges, of such pieces."""
    backend = Tokenizer(models.BPE(**settings))
    backend.pre_tokenizer = cut
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def ids_of(backend: Tokenizer, texts: list[str]) -> dict[str, list[int]]:
    return {text: backend.encode(text, add_special_tokens=False).ids for text in texts}


def batched(items, size: int):
    items = iter(items)
    while some := list(islice(items, size)):
        yield some


def texts_around(characters) -> list[str]:
    """Each of them between others of every kind."""
    around = [
        "a{}b",
        "A{}b",
        "1{}2",
        " {}",
        "x {} y",
        "  {}",
        "{}\n",
        ".{}.",
        "'{}",
        "{}'s",
        "{}{}",
        "\n{} \n",
    ]
    return [form.replace("{}", character) for character in characters for form in around]


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("step", [61, pytest.param(1, marks=pytest.mark.slow)])
def test_pieces_are_the_same_around_every_character(name, step):
    """Each piece of the pre-tokenizer is a token of an encoding with its pattern and no other merges, which
    comes to these tokens only where it cuts as the pre-tokenizer does."""
    backend = trained(CUTS[name])
    pattern = byte_pairs._pattern(json.loads(backend.to_str())["pre_tokenizer"])
    letters = str.maketrans(byte_pairs._letters())
    settled = [c for c in map(chr, range(0x110000)) if byte_pairs._is_settled(c)]
    some = sorted({*settled[::step], *map(chr, range(0x300)), *"ſKß\u2028\u2029\u3000\u200b\ufeff😀"})
    for characters in batched((c for c in some if byte_pairs._is_settled(c)), 5000):
        texts = texts_around(characters)
        pieces = {
            text: [
                p.translate(letters).encode("latin-1")
                for p, _ in backend.pre_tokenizer.pre_tokenize_str(text)
            ]
            for text in texts
        }
        ranks = {bytes([byte]): byte for byte in range(256)}
        for piece in {p for some in pieces.values() for p in some}:
            ranks.setdefault(piece, len(ranks))
        cut = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        for text in texts:
            assert cut.encode_ordinary(text) == [ranks[piece] for piece in pieces[text]], ascii(text)


def odd_texts(count: int) -> list[str]:
    """Parts of the corpus and odd characters, put together by chance."""
    chance = random.Random(0)
    parts = [
        *"".join(CORPUS),
        *" \n\t\r'",
        "'s",
        "  ",
        "\r\n",
        "e\u0301",
        "\u212b",
        "😀",
        "ſ",
        "\u0085",
        "\u2028",
    ]
    return ["".join(chance.choices(parts, k=chance.randrange(60))) for _ in range(count)]


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
@pytest.mark.parametrize("name", CUTS)
def test_ids_are_the_same(name, normalizer):
    backend = trained(CUTS[name])
    if normalizer:
        backend.normalizer = normalizer
    texts = [*CORPUS, *odd_texts(3000), ""]
    assert BytePairs.of(backend).encode(texts) == ids_of(backend, texts)


@pytest.mark.parametrize("name", ["gpt2", "qwen2.5"])
def test_ids_are_the_same_of_known_tokenizers_and_real_text(name):
    if not SHARED.exists():
        pytest.skip("needs ../shared")
    backend = AutoTokenizer.from_pretrained(SHARED / "data" / "tokenizers" / name).backend_tokenizer
    texts = [*CORPUS, *odd_texts(2000)]
    texts += (SHARED / "data" / "pref" / "hh_rlhf_test.jsonl").read_text(encoding="utf-8").splitlines()
    found = BytePairs.of(backend).encode(texts)
    assert list(found) == list(dict.fromkeys(texts)) and found == ids_of(backend, texts)


def test_a_piece_that_is_a_token_is_it_where_merges_are_ignored():
    """Llama 3's way: all tokens can be merged here, so nothing differs but the order of the work."""
    backend = trained(CUTS["cl100k, Llama 3"])
    backend.model.ignore_merges = True
    texts = [*CORPUS, *odd_texts(500)]
    assert BytePairs.of(backend).encode(texts) == ids_of(backend, texts)


def test_tokens_that_no_merge_makes_are_not_made():
    told = json.loads(trained(BYTES).to_str())
    ids = told["model"]["vocab"]
    ids |= {"zqzq": 600, "zq": 601, "<|end|>": 602}
    backend = Tokenizer.from_str(json.dumps(told))
    texts = ["zqzq zq a<|end|>b", *CORPUS]
    assert BytePairs.of(backend).encode(texts) == ids_of(backend, texts)
    told["model"]["ignore_merges"] = True  # they are, of whole pieces
    assert BytePairs.of(Tokenizer.from_str(json.dumps(told))) is None


def with_merges(change):
    told = json.loads(trained(BYTES).to_str())
    change(told["model"])
    return Tokenizer.from_str(json.dumps(told))


def swap_two(model):
    model["merges"][3], model["merges"][9] = model["merges"][9], model["merges"][3]


def exchange_ids(model):
    """A merge makes a token of a lower id than one of its parts."""
    (a, b), ids = model["merges"][-1], model["vocab"]
    ids[a + b], ids[a] = ids[a], ids[a + b]


def lose_a_byte(model):
    del model["vocab"]["Ā"]


REFUSED = {
    "another pattern": trained(split(r"\s+|\S+")),
    "pieces that are taken away": trained(split(PATTERNS["Qwen 2"], behavior="removed")),
    "pieces that are between": trained(split(PATTERNS["Qwen 2"], invert=True)),
    "text, no pattern": trained(pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "isolated"), NO_REGEX])),
    "digits together": trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(), BYTES])),
    "two cuts": trained(pre_tokenizers.Sequence([EACH_DIGIT, EACH_DIGIT, BYTES])),
    "a space in front": trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "no pieces": trained(NO_REGEX),
    "no bytes": trained(pre_tokenizers.Whitespace()),
    "dropout": trained(BYTES, dropout=0.1),
    "ends of words": with_merges(lambda model: model.update(end_of_word_suffix="</w>")),
    "merges in another order": with_merges(swap_two),
    "ids in another order": with_merges(exchange_ids),
    "a byte without a token": with_merges(lose_a_byte),
    "no BPE": Tokenizer(models.Unigram([("a", 0.0)])),
}


@pytest.mark.parametrize("backend", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_known_to_be_the_same_is_not_asked(backend):
    assert BytePairs.of(backend) is None


class Whole:
    """A pre-tokenizer in Python, which cuts nothing."""

    def pre_tokenize(self, _):
        pass


def test_a_part_in_python_is_not_known():
    backend = trained(NO_REGEX)
    backend.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Whole())
    assert BytePairs.of(backend) is None
    assert tokenizer_digest(PreTrainedTokenizerFast(tokenizer_object=trained(NO_REGEX))) is not None
    encoder = encoder_of(trained(NO_REGEX))
    encoder.tokenizer.backend_tokenizer.pre_tokenizer = backend.pre_tokenizer
    assert tokenizer_digest(encoder.tokenizer) is None


def test_a_normalizer_that_is_not_nfc_is_not_asked():
    backend = trained(BYTES)
    backend.normalizer = normalizers.Lowercase()
    assert BytePairs.of(backend) is None


def test_texts_that_are_not_known_are_left_out():
    backend = trained(BYTES)
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("≯x")])
    new = next(c for c in map(chr, range(0x20000)) if unicodedata.category(c) == "Lo" and not _old(c))
    left = ["a <think> b", ">\u0338x", "≯x", f"a{new}", "\u0378", " " * 100_001]
    known = ["<thin k>", ">\u0338 x", "a\u0338", " " * 100_000, "\n \t" * 33_000 + "a", "a" * 99_999]
    assert BytePairs.of(backend).encode([*left, *known]) == ids_of(backend, known)


def _old(character: str) -> bool:
    return unicodedata.ucd_3_2_0.category(character) == unicodedata.category(character)


def encoder_of(backend: Tokenizer) -> Encoder:
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=backend), many=True)


def test_an_encoder_asks_it_after_a_trial(monkeypatch):
    encoder, asked = encoder_of(trained(BYTES)), []
    library = Encoder._by_library
    monkeypatch.setattr(
        Encoder, "_by_library", lambda self, texts: asked.extend(texts) or library(self, texts)
    )
    plain = Encoder(encoder.tokenizer)
    texts = odd_texts(3 * tokenizing._TRIAL)
    for some in batched(dict.fromkeys(texts), tokenizing._TRIAL):
        asked.clear()
        found = encoder.encode(some)
        last, wanted = {*asked}, plain.encode(some)
        assert all((found[text] == wanted[text]).all() for text in some)
    assert not last


def test_an_encoder_that_is_told_other_ids_says_so_and_believes_the_tokenizer(monkeypatch):
    encoder = encoder_of(trained(BYTES))
    plain = Encoder(encoder.tokenizer)
    monkeypatch.setattr(BytePairs, "encode", lambda self, texts: {text: [0] for text in texts})
    with pytest.warns(UserWarning, match="^tiktoken gives other token ids than the tokenizer"):
        found = encoder.encode(CORPUS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found |= encoder.encode(["another"])
    assert all((found[text] == plain.encode([text])[text]).all() for text in found)
