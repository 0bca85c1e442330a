"""Small random image-text models of nine families, their real processors, and groups with images."""

import functools
import hashlib

import numpy as np
import torch
from PIL import Image as PIL
from transformers import AutoConfig, AutoModelForImageTextToText, ProcessorMixin

from fastdpo.data.images.expansion import Expander
from fastdpo.model.loading import switch_off_dropout
from fastdpo.model.policy import Policy
from fastdpo.model.processors import without_video
from fastdpo.preferences import Image, Pair, PreferenceGroup, Response
from tests.tiny import tokenizer as text_tokenizer

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3", "llava", "internvl", "gemma3")
FAMILIES += ("paligemma",)
SPLIT = {"smolvlm", "idefics3"}  # images in tiles, with a token in words before each

_QWEN = dict(image_token="<|image_pad|>", video_token="<|video_pad|>")
_QWEN |= dict(vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>")
_IDEFICS = dict(image_token="<image>", fake_image_token="<fake_token_around_image>")
_IDEFICS |= dict(global_image_token="<global-img>", end_of_utterance_token="<end_of_utterance>")
_IDEFICS |= dict(video_token="<video>")
_IDEFICS |= {f"tile_{r}_{c}": f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)}
_INTERN = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>")
_INTERN |= dict(video_token="<video>")
_GEMMA = dict(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
TOKENS = dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), _QWEN) | dict.fromkeys(SPLIT, _IDEFICS)
TOKENS |= dict(llava=dict(image_token="<image>"), internvl=_INTERN, gemma3=_GEMMA)
TOKENS |= dict(paligemma=dict(image_token="<image>"))
# what a chat template writes in an image's place
PLACEHOLDER = dict.fromkeys(FAMILIES, "<image>") | dict(internvl="<IMG_CONTEXT>", gemma3="<start_of_image>")
PLACEHOLDER |= {
    f: "<|vision_start|><|image_pad|><|vision_end|>" for f in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(family):
    """Byte-level BPE with the family's tokens around images."""
    tok = text_tokenizer(chat=False)
    tok.bos_token = "<|endoftext|>"
    names = TOKENS[family]
    tok.add_tokens(list(names.values()), special_tokens=True)
    tok._set_model_specific_special_tokens(names)
    tok.chat_template = CHATML.replace("IMAGE", PLACEHOLDER[family])
    return tok


@functools.cache
def processor(family) -> ProcessorMixin:
    """The family's own processor, with image processors that need no torchvision; images are 32 pixels wide
    and high, or (Qwen) multiples of 16."""
    import transformers as t
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    tok = tokenizer(family)
    square = {"height": 32, "width": 32}
    tiles = dict(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    both = dict(tokenizer=tok, chat_template=tok.chat_template)
    no_video = dict(video_processor=None) | both
    if family.startswith("qwen"):
        cls = {"qwen2_vl": t.Qwen2VLProcessor, "qwen2_5_vl": t.Qwen2_5_VLProcessor}.get(
            family, t.Qwen3VLProcessor
        )
        sizes = dict(size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}, patch_size=8)
        return without_video(cls)(image_processor=Qwen2VLImageProcessorPil(**sizes), **no_video)
    match family:
        case "smolvlm":
            images = SmolVLMImageProcessorPil(**tiles)
            return without_video(t.SmolVLMProcessor)(image_processor=images, image_seq_len=4, **no_video)
        case "idefics3":
            return t.Idefics3Processor(Idefics3ImageProcessorPil(**tiles), image_seq_len=4, **both)
        case "llava":
            images = LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size=square)
            options = dict(patch_size=8, vision_feature_select_strategy="default")
            return t.LlavaProcessor(images, num_additional_image_tokens=1, **options, **both)
        case "internvl":
            images = GotOcr2ImageProcessorPil(size=square, crop_to_patches=True, max_patches=2)
            return without_video(t.InternVLProcessor)(image_processor=images, image_seq_length=4, **no_video)
        case "gemma3":
            return t.Gemma3Processor(Gemma3ImageProcessorPil(size=square), image_seq_length=16, **both)
        case "paligemma":
            images = SiglipImageProcessorPil(size=square)
            images.image_seq_length = 16
            return t.PaliGemmaProcessor(images, **both)


def config(family, **text):
    """Two layers (gemma3: one of them with a window shorter than an image), grouped queries, no dropout;
    token ids are the processor's."""
    tok = processor(family).tokenizer
    ids = {name: tok.convert_tokens_to_ids(token) for name, token in TOKENS[family].items()}
    text = dict(
        vocab_size=len(tok), hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0,
        bos_token_id=0, eos_token_id=tok.eos_token_id, tie_word_embeddings=False,
    ) | text  # fmt: skip
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    vision |= dict(image_size=32, patch_size=8)
    options = {"image_token_id": ids.get("context_image_token", ids.get("image_token"))}
    if family.startswith("qwen"):
        text["rope_parameters"] = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
        vision = dict(depth=2, num_heads=2, patch_size=8, hidden_size=32, out_hidden_size=64)
        names = ("video_token", "vision_start_token", "vision_end_token")
        options |= {f"{name}_id": ids[name] for name in names}
    match family:
        case "qwen2_vl":
            del text["head_dim"]
            vision |= dict(embed_dim=32, hidden_size=64, mlp_ratio=2)
            del vision["out_hidden_size"]
        case "qwen2_5_vl":
            del text["head_dim"]
            vision |= dict(intermediate_size=48, window_size=32, fullatt_block_indexes=[1])
        case "qwen3_vl":
            text["rope_parameters"] |= dict(mrope_interleaved=True)
            vision |= dict(intermediate_size=48, num_position_embeddings=16, deepstack_visual_indexes=[0])
        case "smolvlm" | "idefics3":
            text |= dict(model_type="llama")
            options |= dict(scale_factor=2)
        case "llava":
            text |= dict(model_type="llama")
            vision |= dict(model_type="clip_vision_model")
            options = dict(image_token_index=ids["image_token"], vision_feature_layer=-1)
        case "internvl":
            text |= dict(model_type="qwen2")
            options |= dict(tie_word_embeddings=False)
        case "gemma3":
            text |= dict(sliding_window=12, query_pre_attn_scalar=16)
            text |= dict(layer_types=["sliding_attention", "full_attention"])
            vision |= dict(model_type="siglip_vision_model", patch_size=4, vision_use_head=False)
            options = dict(image_token_index=ids["image_token"], boi_token_index=ids["boi_token"])
            options |= dict(eoi_token_index=ids["eoi_token"], mm_tokens_per_image=16)
        case "paligemma":
            text |= dict(model_type="gemma")
            vision |= dict(model_type="siglip_vision_model", vision_use_head=False)
            options = dict(image_token_index=ids["image_token"], projection_dim=64, hidden_size=64)
            options |= dict(vocab_size=len(tok))
    found = AutoConfig.for_model(family, text_config=text, vision_config=vision, **options)
    switch_off_dropout(found)
    return found


def model(family, dtype=torch.float32, **text):
    """With weights so large that a wrong mask, position or pixel shows in the first digits."""
    torch.manual_seed(0)
    made = AutoModelForImageTextToText.from_config(config(family, **text))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.dim() > 1 or name.endswith("bias"):
                weight.normal_(0, 0.12)
    return made.to(dtype)


def policy(family, dtype=torch.float32, **text):
    """A random policy with its processor whose prompts are not shared yet."""
    made = Policy(model(family, dtype, **text).train(), dtype)
    made.processor = processor(family)
    return made


def save(folder, family, **text):
    """A random model and its processor in a folder, as a user would have them."""
    model(family, **text).save_pretrained(folder)
    processor(family).save_pretrained(folder)
    return str(folder)


def picture(seed, size=(32, 48)):
    """A random image, RGB, in coarse blocks that resizing leaves different."""
    coarse = np.random.default_rng(seed).integers(1, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return PIL.fromarray(coarse).resize(size, PIL.Resampling.NEAREST)


def image(seed, size=(32, 48), family=None):
    made = picture(seed, size)
    tokens = int(Expander(processor(family)).of(size).runs.sum()) if family else 0
    return Image(hashlib.md5(made.tobytes()).digest(), size, lambda: made, tokens)


def group(row, family, lengths, sizes=((32, 48),), seed=0, images=None):
    """A prompt with an image of each of these sizes (or these images) between words, and random responses;
    the longer ones have two tokens that are not scored."""
    made, draw = processor(family), np.random.default_rng([seed, row])
    if images is None:
        images = tuple(image([seed, row, n], size, family) for n, size in enumerate(sizes))
    words = ["the old cat", *("sees a red bird" for _ in images)]
    text = words[0] + "".join(f" {PLACEHOLDER[family]} {more}" for more in words[1:])
    if images:
        found = made(images=[[one.open() for one in images]], text=[text])
        prompt = np.array(found["input_ids"][0], np.int64)
    else:
        prompt = np.array(made.tokenizer(text)["input_ids"], np.int64)
    responses = []
    for n in lengths:
        mask = np.ones(n, bool)
        if n > 3:
            mask[[0, 2]] = False
        responses.append(Response(draw.integers(3, 256, n), mask))
    pairs = tuple(Pair(0, j) for j in range(1, len(lengths)))
    return PreferenceGroup(row, prompt, tuple(responses), pairs, images=images)


def groups(family):
    """One and two images with 2 to 4 responses, and one prompt of words alone."""
    shapes = [([5, 9, 4], [(32, 48)]), ([6, 1, 4, 11], [(48, 32), (32, 32)]), ([3, 8], [])]
    return [group(row, family, *shape) for row, shape in enumerate(shapes)]
