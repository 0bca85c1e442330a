"""A row with images becomes the tokens that the family's own processor makes of it."""

import pickle

import numpy as np
import pytest
from PIL import Image as PIL

from fastdpo.data.groups import Limits, to_group
from fastdpo.data.images.expansion import Expander
from fastdpo.data.images.reader import ImageReader
from fastdpo.data.report import RowProblem
from fastdpo.errors import ModelError
from tests import images as tiny
from tests.images import FAMILIES, picture, processor

WIDE = Limits(4096)
SIZES = [(32, 48), (64, 32), (32, 32)]


def made(row, family, limits=WIDE):
    own = processor(family)
    return to_group(row, 3, own.tokenizer, limits, images=ImageReader(own))


def by_processor(family, messages, pictures):
    """The whole conversation's ids, by the processor's chat template and call."""
    own = processor(family)
    text = own.tokenizer.apply_chat_template(messages, tokenize=False)
    (ids,) = own(images=[pictures], text=[text], add_special_tokens=False)["input_ids"]
    return ids


def parts(text, count=1):
    return [*[{"type": "image"}] * count, {"type": "text", "text": text}]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"paligemma"}))
def test_messages_have_the_processors_tokens(family, count):
    pictures = [picture(n, SIZES[n]) for n in range(count)]
    asked = {"role": "user", "content": parts("the old cat", count)}
    answers = [{"role": "assistant", "content": [{"type": "text", "text": text}]} for text in ("red", "blue")]
    row = {"prompt": [asked], "chosen": answers[:1], "rejected": answers[1:], "images": pictures}
    group, notes = made(row, family)
    assert notes == {"images": count} and [image.size for image in group.images] == SIZES[:count]
    for response, answer in zip(group.responses, answers):
        ids = [*group.prompt.tolist(), *response.ids.tolist()]
        truth = by_processor(family, [asked, answer], pictures)
        assert (
            ids == truth[: len(ids)]
            and not tiny.processor(family).tokenizer.decode(truth[len(ids) :]).strip()
        )
        assert response.target_mask.all()
    token = Expander(processor(family)).token_id
    assert sum(image.tokens for image in group.images) == (group.prompt == token).sum() > 0


def test_paligemma_puts_its_images_first_and_ends_its_prompt():
    row = {"prompt": "the cat", "chosen": " red", "rejected": " blue", "image": picture(0)}
    group, _ = made(row, "paligemma")
    own = processor("paligemma")
    (truth,) = own(images=[[picture(0)]], text=["<image>the cat"])["input_ids"]
    assert group.prompt.tolist() == list(truth)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_row_of_such_a_model_is_as_the_template_prints_it(family):
    turn = lambda role, text: {"role": role, "content": text}
    row = {"prompt": [turn("user", "old")], "chosen": [turn("assistant", "red")]}
    row |= {"rejected": [turn("assistant", "blue")]}
    group, notes = made(row, family)
    tokenizer = processor(family).tokenizer
    whole = tokenizer.apply_chat_template([*row["prompt"], *row["chosen"]], tokenize=False).rstrip("\n")
    assert [*group.prompt, *group.responses[0].ids] == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert not notes and not group.images


@pytest.mark.parametrize("family", FAMILIES)
def test_where_images_stand_does_not_depend_on_how_the_row_says_it(family):
    say = lambda content: [{"role": "user", "content": content}]
    answers = {"chosen": [{"role": "assistant", "content": "red"}]}
    answers |= {"rejected": [{"role": "assistant", "content": "blue"}]}
    one = picture(1)
    rows = [
        {"prompt": say(parts("old cat")), "image": one},
        {"prompt": say([{"type": "image", "image": one}, {"type": "text", "text": "old cat"}])},
        {"prompt": say("<image>old cat"), "images": [one]},
        {"prompt": say("old cat"), "images": [one]},
    ]
    groups = [made(row | answers, family)[0] for row in rows]
    assert len({group.prompt.tobytes() for group in groups}) == 1
    assert len({group.images[0].key for group in groups}) == 1


def test_an_image_in_the_middle_of_a_text_stays_there():
    row = {"prompt": "cat <image> dog <image>", "images": [picture(0), picture(1)]}
    group, _ = made(row | {"chosen": " red", "rejected": " blue"}, "llava")
    text = processor("llava").tokenizer.decode(group.prompt).replace("<image>", "~")
    assert [piece for piece in text.split("~") if piece] == ["cat ", " dog "]


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end", "drop"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3", "gemma3", "internvl"])
def test_no_truncation_takes_an_image_token(family, truncation):
    """Whatever max_length is, a row that is kept has all of them."""
    draw = np.random.default_rng(0)
    token, kept, refused = Expander(processor(family)).token_id, 0, set()
    for _ in range(40):
        count = int(draw.integers(1, 3))
        pictures = [picture(n, SIZES[draw.integers(3)]) for n in range(count)]
        words = " ".join(["cat"] * int(draw.integers(1, 30)))
        text = words + " <image>" * count + " sees"
        row = {
            "prompt": text,
            "chosen": " red" * int(draw.integers(1, 9)),
            "rejected": " blue",
            "images": pictures,
        }
        group, _ = made(row, family)
        whole, limit = (group.prompt == token).sum(), int(draw.integers(4, 12 + group.input_tokens))
        try:
            cut, _ = made(row, family, Limits(limit, truncation))
        except Exception as problem:
            refused.add(problem.reason)
            continue
        kept += 1
        assert (cut.prompt == token).sum() == whole == sum(image.tokens for image in cut.images)
        assert len(cut.prompt) + max(len(r.ids) for r in cut.responses) <= limit
    assert kept and refused <= {
        "too_long",
        "prompt_too_long",
        "images_too_long",
        "response_too_long",
        "nothing_scored",
    }


PARTS = "{% for part in m.content | selectattr('type', 'equalto', 'KIND') %}BODY{% endfor %}"
LLAVA = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
LLAVA += PARTS.replace("KIND", "image").replace("BODY", "<image>\n")
LLAVA += PARTS.replace("KIND", "text").replace("BODY", "{{ part.text }}") + "<|im_end|>{% endfor %}"
SYSTEM = "{% if messages[0].role == 'system' %}<|im_start|>{{ messages[0].content | trim }}<|im_end|>"
SYSTEM += "{% set messages = messages[1:] %}{% endif %}" + tiny.CHATML.replace("IMAGE", "<image>")
STRINGS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize("template", [LLAVA, SYSTEM, STRINGS], ids=["llava", "system", "strings"])
def test_a_template_is_given_what_it_prints(template):
    """Parts where it reads only these, or an image is one; text where it prints text."""
    own = pickle.loads(pickle.dumps(processor("llava")))
    own.tokenizer.chat_template = own.chat_template = template
    say = lambda role, text: {"role": role, "content": text}
    asked = [say("user", "the old cat")] if template == LLAVA else [say("system", "good"), say("user", "cat")]
    row = {"prompt": asked, "chosen": [say("assistant", "red")], "rejected": [say("assistant", "blue")]}
    for images in ([], [picture(0)]):
        group, _ = to_group(row | {"images": images}, 0, own.tokenizer, WIDE, images=ImageReader(own))
        text = own.tokenizer.decode([*group.prompt, *group.responses[0].ids])
        assert "type" not in text and "red" in text and "cat" in text
        assert text.count("<image>") == sum(image.tokens for image in group.images) == 16 * len(images)


def test_a_template_that_prints_lists_is_refused():
    own = pickle.loads(pickle.dumps(processor("llava")))
    own.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' and m.content is not string %}"
    )
    own.tokenizer.chat_template += "{% for p in m.content %}{% if p['type'] == 'image' %}<image>{% else %}"
    own.tokenizer.chat_template += (
        "{{ p['text'] }}{% endif %}{% endfor %}{% else %}{{ m.content }}{% endif %}"
    )
    own.tokenizer.chat_template += "<|im_end|>{% endfor %}"
    row = {"prompt": [{"role": "system", "content": "<image>"}, {"role": "user", "content": "cat"}]}
    row |= {key: [{"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    with pytest.raises(RowProblem, match="prints a content's parts as a list"):
        to_group(row | {"image": picture(0)}, 0, own.tokenizer, WIDE, images=ImageReader(own))


def test_what_opens_an_image_is_never_cut_from_it():
    family = "qwen3_vl"
    for words in range(1, 12):
        row = {"prompt": [{"role": "user", "content": " cat" * words + " <image>"}], "images": [picture(0)]}
        row |= {key: [{"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
        whole, _ = made(row, family)
        longest = len(whole.prompt) + max(len(r.ids) for r in whole.responses)
        start = processor(family).tokenizer.convert_tokens_to_ids("<|vision_start|>")
        for limit in range(longest - 2 * words - 4, longest):
            try:
                cut, _ = made(row, family, Limits(limit, "keep_end"))
            except RowProblem as problem:
                assert problem.reason in ("images_too_long", "response_too_long")
                continue
            assert (cut.prompt == start).sum() == 1


def test_a_response_with_an_image_token_is_refused():
    row = {"prompt": "cat", "chosen": " <image> red", "rejected": " blue", "images": [picture(0)]}
    with pytest.raises(Exception, match="is a token for images") as caught:
        made(row, "llava")
    assert caught.value.reason == "image_in_response"


def test_the_digest_follows_what_the_processor_does():
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    own = Expander(processor("paligemma"))
    again = pickle.loads(pickle.dumps(own))
    assert own.digest == again.digest and own.of((32, 32)).text == again.of((32, 32)).text
    for family in FAMILIES:
        own = Expander(processor(family))
        assert pickle.loads(pickle.dumps(own)).digest == own.digest
    own = again
    own.processor.chat_template = "another"  # whose text is in the token ids
    assert Expander(own.processor).digest == own.digest
    changed = pickle.loads(pickle.dumps(processor("paligemma")))
    changed.image_processor = SiglipImageProcessorPil(size={"height": 32, "width": 32}, do_normalize=False)
    changed.image_processor.image_seq_length = 16
    assert Expander(changed).digest != own.digest


def test_a_processor_without_an_image_token_is_refused():
    class Plain:
        tokenizer = tiny.text_tokenizer()

    with pytest.raises(ModelError, match="names no image token"):
        Expander(Plain())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expansion_is_what_any_image_of_that_size_becomes(family):
    own, draw = Expander(processor(family)), np.random.default_rng(1)
    sizes = [*SIZES, (8, 96), (160, 16), *map(tuple, draw.integers(8, 200, (12, 2)).tolist())]
    for size in sizes:
        made, one = own.of(size), PIL.fromarray(draw.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        (truth,) = processor(family)(images=[[one]], text=[own.placeholder])["input_ids"]
        ids = np.array(own.processor.tokenizer(made.text, add_special_tokens=False)["input_ids"])
        times = np.ones(len(ids), np.int64)
        times[ids == own.token_id] = made.runs
        behind = own.processor.tokenizer("".join(own.frame), add_special_tokens=False)["input_ids"]
        assert [*np.repeat(ids, times), *behind] == list(truth)
