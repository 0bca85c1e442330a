"""Prompts with a picture, for every trainer: drawn files, and the model's own processor on a tokenizer whose
words are numbers of tokens, so that what one trainer reads as text is what another is given as ids."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.inputs import FIRST_ID, random_rows
from benchmarks.lengths import PairLengths
from benchmarks.models import TOKEN_IDS, BenchModel
from fastdpo.data.images.reader import ImageReader
from fastdpo.model.processors import without_video
from fastdpo.records import Pair, PreferenceGroup, Response

PROCESSORS = {"qwen3_vl": transformers.Qwen3VLProcessor, "qwen2_5_vl": transformers.Qwen2_5_VLProcessor}
WORDS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
MERGED = 2  # patches a token, in height and in width


@cache
def processor(model: BenchModel) -> transformers.ProcessorMixin:
    """The model's own, in PIL, for without torchvision there is no other; it reads no videos."""
    words = {"<pad>": 0, "<eos>": 1} | {WORDS[name]: place for name, place in TOKEN_IDS.items()}
    words |= {f"w{n}": n for n in range(FIRST_ID, model.vocab)}
    numbers = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    numbers.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=numbers, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )
    tokenizer.add_tokens(list(WORDS.values()), special_tokens=True)
    names = {name.removesuffix("_id"): word for name, word in WORDS.items()}
    tokenizer._set_model_specific_special_tokens(names)
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 4096 * 4096}  # of pictures that keep their size
    images = Qwen2VLImageProcessorPil(patch_size=model.vision["patch_size"], size=pixels)
    own = without_video(PROCESSORS[model.model_type])
    return own(image_processor=images, tokenizer=tokenizer, video_processor=None, chat_template="")


def draw_picture(path: Path, side: int, seed: int) -> None:
    """A JPEG of noise in blocks of 8 pixels."""
    coarse = np.random.default_rng(seed).integers(1, 256, (-(-side // 8), -(-side // 8), 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((side, side), Image.Resampling.NEAREST)
    picture.save(path, quality=90)


def picture_rows(
    model: BenchModel, tokens: int, text: int, response: int, shape: tuple[int, int], folder: Path, seed: int
) -> list[dict]:
    """One step: inputs.random_rows with "images", a file's path in a list. shape: prompts, and pairs of each,
    one after another, with responses of their own. A prompt is one square picture of so many tokens, two
    tokens around it, and `text` random ones, the row's prompt_ids."""
    side = round(tokens**0.5) * MERGED * model.vision["patch_size"]
    prompts, pairs = shape
    rows = random_rows([PairLengths(text, response, response)] * (prompts * pairs), model.vocab, seed)
    for number, row in enumerate(rows):
        first = rows[number - number % pairs]
        if row is first:
            path = folder / f"{seed}_{number}.jpg"
            draw_picture(path, side, hash_of(seed, number))
            row["images"] = [str(path)]
        row |= {key: first[key] for key in ("prompt_ids", "images")}
    return rows


def hash_of(*numbers: int) -> int:
    """A seed of several."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest(), "big")


def words_of(ids: Sequence[int]) -> str:
    return " ".join(f"w{n}" for n in ids)


def prompt_text(row: dict) -> str:
    start, image, end = (
        WORDS[f"{name}_id"] for name in ("vision_start_token", "image_token", "vision_end_token")
    )
    return f"{start}{image}{end} {words_of(row['prompt_ids'])}"


def text_row(row: dict) -> dict:
    """As TRL takes it."""
    responses = {key: words_of(row[f"{key}_ids"]) for key in ("chosen", "rejected")}
    return {"prompt": prompt_text(row), **responses, "images": row["images"]}


def picture_groups(model: BenchModel, rows: Sequence[dict], first: int = 0) -> list[PreferenceGroup]:
    """As fastdpo reads files; rows of one picture, which follow each other, are pairs of one prompt."""
    made, groups = processor(model), []
    reader = ImageReader(made)
    for images, same in itertools.groupby(rows, key=lambda row: row["images"]):
        same = list(same)
        folder = Path(images[0]).parent
        found = reader.read(images, folder, Counter(), []).images
        opened = [[image.open() for image in found]]
        prompt = np.array(made(images=opened, text=[prompt_text(same[0])])["input_ids"][0], np.int64)
        ids = [np.array(row[key], np.int64) for row in same for key in ("chosen_ids", "rejected_ids")]
        responses = tuple(Response(one, np.ones(len(one), bool)) for one in ids)
        pairs = tuple(Pair(2 * n, 2 * n + 1) for n in range(len(same)))
        groups.append(PreferenceGroup(first + len(groups), prompt, responses, pairs, images=found))
    return groups
