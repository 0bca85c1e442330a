"""Prompts with images, encoded once, give what the model gives on separate rows with an image each."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from fastdpo.data.packing import pack
from fastdpo.errors import DataError
from fastdpo.model import support, vision
from fastdpo.model.activations import decoder_layers, set_up_activations, towers_layers
from fastdpo.model.spec import ModelSpec
from fastdpo.preferences import Image
from tests import images
from tests.images import FAMILIES
from tests.model.test_shared_prompt import assert_gradients_close, gradients, separate

WIDE = torch.float64


def upstream(groups, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(sum(g.scored_tokens for g in groups), dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_nine_families_equal_their_own_forward(family):
    """One and two images, 2 to 4 responses, and words alone, in one microbatch; shared and separate."""
    p, groups = images.policy(family), images.groups(family)
    weights = upstream(groups)
    truth, truth_grads = separate(p, groups, weights)
    assert truth.std() > 0.5
    for share in (True, False):
        p.set_sharing(share)
        batch = p.pack(groups)
        assert (batch.layout is not None) == share
        ours = p.token_logp(batch)
        torch.testing.assert_close(ours.detach(), truth, rtol=0, atol=1e-5)
        (ours * weights).sum().backward()
        assert_gradients_close(gradients(p.model), truth_grads, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_group_alone_gives_the_same(family):
    p, groups = images.policy(family), images.groups(family)
    p.set_sharing(True)
    with torch.no_grad():
        alone = torch.cat([p.token_logp(p.pack([g])) for g in groups])
        together = p.token_logp(p.pack(groups))
        turned = p.token_logp(p.pack(groups[::-1]))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    sizes = [g.scored_tokens for g in groups[::-1]]
    torch.testing.assert_close(torch.cat(turned.split(sizes)[::-1]), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_check_shares_without_a_word(family, capsys):
    p = images.policy(family)
    support.prepare(p, images.groups(family), Console(width=1000))
    assert p.share and capsys.readouterr().out == ""


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "gemma3", "paligemma"])
def test_in_fp64_only_the_order_of_sums_is_left(family):
    """As far as the models themselves compute in fp64 (norms, softmax and rotations are in fp32)."""
    p, groups = images.policy(family, WIDE), images.groups(family)
    truth = torch.cat([support.stock_logp(p, g) for g in groups]).detach()
    p.set_sharing(True)
    with torch.no_grad():
        ours = p.token_logp(p.pack(groups))
    torch.testing.assert_close(ours.float(), truth.float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_is_encoded_once(family):
    """Tiles or patches that go through the tower: as many as the prompts have, not the responses."""
    p, groups = images.policy(family), images.groups(family)
    made = images.processor(family)
    pictures = [[image.open() for g in groups for image in g.images]]
    once = made(images=pictures, text=[made.image_token * 3], return_tensors="pt")["pixel_values"]
    p.set_sharing(True)
    shared = p.pack(groups).images["pixel_values"]
    assert torch.equal(shared, once)
    p.set_sharing(False)
    assert p.pack(groups).images["pixel_values"].numel() > 3 * once.numel()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_of_several_prompts_is_encoded_once(family):
    """And trains as one image a prompt does: in other places, beside another one, twice in a prompt."""
    p = images.policy(family)
    one, other = images.image(1, (32, 48), family), images.image(2, (48, 32), family)
    shapes = [([5, 4], (one,)), ([3, 6, 4], (other, one)), ([4, 3], ()), ([7, 2], (one, other, one))]
    groups = [images.group(row, family, shape, images=some) for row, (shape, some) in enumerate(shapes)]
    weights = upstream(groups)
    truth, truth_grads = separate(p, groups, weights)
    p.set_sharing(True)
    batch, alone = p.pack(groups), p.pack(groups[1:2])
    assert batch.features is not None and alone.features is None
    assert batch.images["pixel_values"].numel() == alone.images["pixel_values"].numel()
    ours = p.token_logp(batch.to("cpu"))
    torch.testing.assert_close(ours.detach(), truth, rtol=0, atol=1e-5)
    (ours * weights).sum().backward()
    assert_gradients_close(gradients(p.model), truth_grads, 1e-5)
    assert "get_image_features" not in vars(p.core.base_model)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_image_is_another_answer(family):
    p, (first, *_) = images.policy(family), images.groups(family)
    p.set_sharing(True)
    with torch.no_grad():
        logp = p.token_logp(p.pack([first]))
        changed = p.token_logp(p.pack([replace(first, images=(images.image(77),))]))
    assert (logp - changed).abs().max() > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_words_alone_are_packed_as_ever(family):
    p, groups = images.policy(family), [images.groups(family)[2]]
    p.set_sharing(True)
    ours, plain = p.pack(groups), pack(groups)
    assert not ours.images
    if family != "paligemma":  # whose prompts see both ways, whatever is in them
        for one, other in zip(ours._tensors(), plain._tensors(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_look_to_the_model_as_from_its_processor(family):
    """token_type_ids, mm_token_type_ids and pixels of the start check's own rows."""
    p, group = images.policy(family), images.groups(family)[1]
    text = p.processor.tokenizer.decode(group.prompt[:0])
    words = ["the old cat", *("sees a red bird" for _ in group.images)]
    text += words[0] + "".join(f" {images.PLACEHOLDER[family]} {more}" for more in words[1:])
    found = p.processor(images=[[i.open() for i in group.images]], text=[text], return_tensors="pt")
    assert np.array_equal(found["input_ids"][0], group.prompt)
    ours = vision.row_inputs(p.core, p.processor, group, 2)
    for name, tensor in ours.items():
        given = found[name]
        if name in vision.TYPES:
            later = 1 if family == "paligemma" else 0
            given = torch.cat([given, torch.full((1, 2), later)], 1)
        assert torch.equal(tensor, given.to(tensor.dtype)), name


def test_plain_positions_are_caught(monkeypatch, capsys):
    monkeypatch.setattr(vision, "IN_HEIGHT_AND_WIDTH", set())
    p = images.policy("qwen2_5_vl")
    support.prepare(p, images.groups("qwen2_5_vl"), Console(width=1000))
    assert not p.share and "would be off by" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_causal_images_are_caught(family, monkeypatch, capsys):
    p, blocks_of = images.policy(family), vision.blocks_of
    monkeypatch.setattr(vision, "blocks_of", lambda *given: () if p.share else blocks_of(*given))
    support.prepare(p, images.groups(family), Console(width=1000))
    assert not p.share and "would be off by" in capsys.readouterr().out


def test_the_start_check_keeps_prompts_with_images_whole():
    family = "llava"
    long = [images.group(row, family, [300, 280], seed=row) for row in range(3)]
    words = images.group(3, family, [5, 4], sizes=())
    probe = support._probe([words, *long])
    assert [len(g.images) for g in probe] == [1, 1, 0]
    assert all(np.array_equal(g.prompt, long[g.row].prompt) for g in probe[:2])
    assert max(len(r.ids) for r in probe[0].responses) <= support._PROBE_TOKENS // 2


def test_other_families_have_separate_rows_and_say_so(monkeypatch, capsys):
    """With what the processor gives repeated a response: here of families that are known otherwise."""
    for family in ("qwen2_5_vl", "smolvlm", "gemma3", "paligemma", "llava"):
        with monkeypatch.context() as patch:
            patch.setattr(vision, "SHARED", set())
            patch.setattr(vision, "IN_HEIGHT_AND_WIDTH", set())
            patch.setattr(vision, "DROPS_BLACK", set())
            p, groups = images.policy(family), images.groups(family)[:2]
            weights = upstream(groups)
            truth, grads = separate(p, groups, weights)
            support.prepare(p, groups, Console(width=1000))
            said = capsys.readouterr().out
            assert not p.share and said.count("prompts are not shared") == 1 and family in said
            ours = p.token_logp(p.pack(groups))
            torch.testing.assert_close(ours.detach(), truth, rtol=0, atol=1e-5)
            (ours * weights).sum().backward()
            assert_gradients_close(gradients(p.model), grads, 1e-5)


@pytest.mark.parametrize("level", [True, 2, "selective"])
@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_what_is_computed_again_is_the_same(family, level):
    p, groups = images.policy(family), images.groups(family)
    p.set_sharing(True)
    weights, results = upstream(groups), []
    for wanted in (False, level):
        set_up_activations(p.model, ModelSpec("any", gradient_checkpointing=wanted))
        ours = p.token_logp(p.pack(groups))
        (ours * weights).sum().backward()
        results.append((ours.detach(), gradients(p.model)))
    (plain, grads), (ours, again) = results
    assert torch.equal(plain, ours) and all(torch.equal(grads[name], again[name]) for name in grads)


@pytest.mark.parametrize("family", FAMILIES)
def test_towers_layers_are_not_the_decoders(family):
    model = images.model(family)
    layers, towers = decoder_layers(model), towers_layers(model)
    assert len(layers) == 2 and not set(layers) & set(towers)
    assert {type(layer) for layer in layers}.isdisjoint(map(type, towers))


def test_a_black_image_is_an_error_that_names_its_row():
    """Grey to a processor that takes the mean off; but 0 all over is what counts as padding."""
    p = images.policy("smolvlm")
    group = images.group(6, "smolvlm", [3, 2], sizes=((32, 32), (32, 32)))
    black = images.picture(1, (32, 32)).point(lambda value: 0)
    group = replace(group, images=(group.images[0], Image(b"0" * 16, (32, 32), lambda: black)))
    p.set_sharing(True)
    p.pack([group])  # normalised, black is -1
    normalise, p.processor.image_processor.do_normalize = p.processor.image_processor.do_normalize, False
    try:
        with pytest.raises(DataError, match=r"row 6: image 2 is all black, which SmolVLM\w+ drops"):
            p.pack([group])
    finally:
        p.processor.image_processor.do_normalize = normalise


def test_stock_is_the_model_as_it_was_loaded():
    p = images.policy("gemma3")
    attentions = lambda: [c._attn_implementation for c in (p.core.config, p.core.config.vision_config)]
    before = attentions()
    p.set_sharing(True)
    assert p.core.config.text_config._attn_implementation == "fastdpo_prefix" and attentions() == before
    with p.stock():
        assert p.core.config.text_config._attn_implementation == before[0] and attentions() == before


def test_shards_are_refused_by_name():
    class Sharded:
        sharded = True

    p = images.policy("llava")
    p.world = Sharded()
    with pytest.raises(support.ModelError, match="shard: LlavaForConditionalGeneration sees images"):
        support.prepare(p, images.groups("llava"), Console())
