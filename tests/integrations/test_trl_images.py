"""TRL's DPO on rows with images: one batch of its collator through its forward and through ours, and whole
runs of stock, patched and our own trainer."""

import copy
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastdpo.integrations import trl_forward
from tests import images
from tests.integrations.test_trl_rows import FIELDS, assert_same, both

pytestmark = pytest.mark.peer
ADDS = (trl_forward.STOCK_ADD, trl_forward.add_fused_lm_head)
FAMILIES = [family for family in images.FAMILIES if family != "paligemma"]  # TRL's collator fails with it


def row(seeds, prompt, chosen, rejected, sizes=((32, 48), (48, 32), (32, 32))):
    turn = lambda role, text: [{"role": role, "content": text}]
    pictures = [images.picture(seed, size) for seed, size in zip(seeds, sizes)]
    answers = {"chosen": turn("assistant", chosen), "rejected": turn("assistant", rejected)}
    return {"images": pictures, "prompt": turn("user", prompt), **answers}


def rows():
    """Two questions about the same image, one about another image, and one about two."""
    return [
        row([1], "what is it", "a red bird", "an old cat that sees"),
        row([1], "what is it", "the bird", "a house"),
        row([2], "what is it", "a red bird", "an old cat that sees"),
        row([3, 4], "and these", "one cat and a house", "two"),
    ]


def batch(family, data=None, **options):
    """input_ids, attention_mask, labels and all of images, as TRL's collator and loss make them."""
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    processor = copy.copy(images.processor(family))
    processor.video_processor = SimpleNamespace(num_frames=1, fps=1)  # smolvlm's template asks for them
    data = copy.deepcopy(data or rows())  # the collator changes them
    made = dict(DataCollatorForVisionPreference(processor, **options)(data))
    completion = made.pop("completion_mask")
    return made | {"labels": made["input_ids"].masked_fill(completion == 0, -100)}


def answers(model, add, batches):
    model.__dict__.pop("forward", None)
    add(model, outputs=FIELDS)
    return [model(**inputs, fused_lm_head=True, use_cache=False) for inputs in batches]


def forwards(model):
    """Counts what goes through the tower and the text model."""
    tower, seen = model.base_model.get_image_features, []
    model.base_model.get_image_features = lambda pixel_values, *a, **k: (
        seen.append(pixel_values.numel()) or tower(pixel_values, *a, **k)
    )
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_first_batch(family):
    """Every per-token field and every gradient, on shared rows (no warning says otherwise), and half the
    pixels or fewer."""
    model, grads = images.model(family).train(), []
    seen = forwards(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastdpo")
        theirs, ours = both(model, batch(family))
    assert_same(theirs, ours)
    assert theirs.log_probs[theirs.label_mask].std() > 0.1
    assert 2 * seen[-1] <= seen[0]
    for out in (theirs, ours):
        model.zero_grad()
        (out.loss + out.entropy.sum()).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    largest = max(float(g.abs().max()) for g in grads[0].values())
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], atol=1e-5 * largest, rtol=1e-4, msg=name)


def test_equal_words_about_other_images_are_not_shared():
    """Rows 0 and 1 ask the same about the same image, row 2 about another one: one tower call fewer."""
    model = images.model("llava").train()
    seen = forwards(model)
    both(model, batch("llava"))
    assert seen[0] == 10 * 3 * 32 * 32 and seen[-1] == 4 * 3 * 32 * 32


@pytest.mark.parametrize("family", ["llava", "idefics3", "qwen3_vl"])
def test_questions_about_one_image_take_it_once(family):
    model = images.model(family).train()
    seen = forwards(model)
    asked = [row([1], text, "a red bird", "a house") for text in ("what is it", "who")]
    theirs, ours = both(model, batch(family, asked))
    assert_same(theirs, ours)
    assert 4 * seen[-1] == seen[0]


def test_rows_without_an_image(monkeypatch):
    """Between others, and as a whole batch: with images and without, our forward is checked once each."""
    mixed = [row([1], "what is it", "a red bird", "a house"), row([], "who", "the old cat", "two birds")]
    model, checked = images.model("qwen2_5_vl").train(), []
    real = trl_forward.FusedForward.decide
    monkeypatch.setattr(
        trl_forward.FusedForward, "decide", lambda *a: checked.append(len(a[2][0].images)) or real(*a)
    )
    batches = [batch("qwen2_5_vl", data) for data in (mixed[1:], mixed, mixed[1:], mixed)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastdpo")
        for theirs, ours in zip(*(answers(model, add, batches) for add in ADDS)):
            assert_same(theirs, ours)
    assert checked == [0, 1]


def test_images_of_chosen_and_rejected_that_differ():
    """Not TRL's collator, but one may: equal words then stand behind other images."""
    inputs = batch("gemma3", [row([1], "what is it", "a red bird", "a house")])
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"][1] *= 0.5
    model = images.model("gemma3").train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastdpo")
        theirs, ours = both(model, inputs)
    assert_same(theirs, ours)
    same = batch("gemma3", [row([1], "what is it", "a red bird", "a house")])
    assert (both(model, same)[0].log_probs - theirs.log_probs).abs().max() > 1e-2


def stock_and_said(model, inputs, message):
    """TRL's own answer, with a word."""
    with pytest.warns(UserWarning, match=message) as seen:
        theirs, ours = both(model, inputs)
    assert_same(theirs, ours, 0.0)
    assert len([w for w in seen if "fastdpo" in str(w.message)]) == 1


def test_families_that_are_not_known_stay_stock():
    model = images.model("llava").train()
    inputs = batch("llava")
    model.config.model_type = "lava"
    stock_and_said(model, inputs, "how lava places images is not known here.*TRL's own forward runs")


def test_responses_that_see_both_ways_stay_stock():
    """PaliGemma's tokens of type 0 do. (TRL's own collator fails with its processor.)"""
    group, model = images.group(0, "paligemma", [3, 3]), images.model("paligemma").train()
    ids = torch.from_numpy(np.stack([np.concatenate([group.prompt, r.ids]) for r in group.responses]))
    behind = torch.arange(ids.shape[1]).expand_as(ids) >= len(group.prompt)
    pixels = images.processor("paligemma").image_processor([group.images[0].open()] * 2, return_tensors="pt")
    inputs = dict(pixels, input_ids=ids, labels=ids.where(behind, -100), token_type_ids=behind.long())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastdpo")
        theirs, ours = both(model, inputs)
    assert_same(theirs, ours)
    inputs["token_type_ids"] = torch.zeros_like(ids)
    stock_and_said(model, inputs, "token_type_ids are not those that paligemma is known to take")


def test_what_else_a_processor_gives_stays_stock():
    model = images.model("llava").train()
    forward = type(model.base_model).forward
    model.base_model.forward = lambda *args, image_sizes=None, **kwargs: forward(
        model.base_model, *args, **kwargs
    )
    inputs = batch("llava") | {"image_sizes": torch.tensor([[32, 48]] * 10)}
    stock_and_said(model, inputs, "the batch brings image_sizes")


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_image_tokens_that_are_cut_are_an_error_as_in_trl(family):
    """Idefics3's are those of a row: one whose images are cut has nothing to score, the others have."""
    model = images.model(family).train()
    data = [row([1], "what is it", "a red bird", "a house"), row([2, 3, 4], "and", "two", "one")]
    lengths = batch(family, data)["attention_mask"].sum(1)
    inputs = batch(family, data, max_length=int(lengths[0]))
    assert (inputs["labels"] != -100).any()
    for add in ADDS:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fastdpo: ")
            with pytest.raises(ValueError, match="mage features and image tokens do not match"):
                answers(model, add, [inputs])


def test_images_without_a_token_are_an_error_as_in_trl():
    model, inputs = images.model("llava").train(), batch("llava")
    inputs["input_ids"][inputs["input_ids"] == model.config.image_token_id] = 40
    for add in ADDS:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fastdpo: ")
            with pytest.raises(ValueError, match="mage features and image tokens do not match"):
                answers(model, add, [inputs])


def test_a_row_with_images_that_has_nothing_to_score():
    """It would not go through the tower, whose weights DDP then waits for."""
    inputs = batch("gemma3")
    inputs["labels"][2] = -100
    stock_and_said(images.model("gemma3").train(), inputs, "a row with images has nothing that is scored")


def test_the_start_check_makes_no_logits_of_prompts():
    model, seen = images.model("qwen2_5_vl").train(), []
    model.lm_head.register_forward_hook(lambda module, given, out: seen.append(out.shape[1]))
    both(model, batch("qwen2_5_vl"))
    assert seen and max(seen) < 16
