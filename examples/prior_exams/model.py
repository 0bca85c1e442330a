"""A LLaVA of half a million weights, made here: a CLIP tower of two layers, a Llama of two, its processor.

The tower learns to tell the findings first, as LLaVA's comes trained from CLIP. Then all of it learns from
reports as they are, priors and all: that model is the start, and the reference, of DPO.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from examples.prior_exams.pictures import SIZE

PATCH = 16
TOWER_RATE, REPORT_RATE = 2e-3, 3e-3
SPECIAL = ("<pad>", "<unk>", "<image>", "<|user|>", "<|assistant|>", "<|end|>")
WORD = r"\n| ?[^\s.,:]+|[.,:]"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_processor(texts: Iterable[str]) -> LlavaProcessor:
    """Words (each with the space before it) are its tokens; it knows those of the texts."""
    words = sorted({word for text in texts for word in re.findall(WORD, text)})
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *words))}
    by_word = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    by_word.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "isolated")
    by_word.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=by_word,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=["<image>", "<|user|>", "<|assistant|>"],
    )
    size = {"height": SIZE, "width": SIZE}
    half = [0.5, 0.5, 0.5]
    images = LlavaImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=size, image_mean=half, image_std=half
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" leaves out
        chat_template=TEMPLATE,
    )


def make_model(processor: LlavaProcessor, seed: int) -> LlavaForConditionalGeneration:
    """Random weights."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    tower = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=96,
    )
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=language,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(SIZE // PATCH) ** 2,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlavaForConditionalGeneration(config)


def learn_findings(
    model: LlavaForConditionalGeneration, pixels: Tensor, truth: Tensor, steps: int, seed: int
) -> Iterator[float]:
    """Teaches the tower alone to tell the findings, from the mean of its features: pixels [N, 3, H, W] and
    truth [N, F] of zeros and ones. Yields the loss of every step."""
    tower = model.model.vision_tower
    head = torch.nn.Linear(tower.config.hidden_size, truth.shape[1])
    weights = [*tower.parameters(), *head.parameters()]

    def loss(chosen: Tensor) -> Tensor:
        seen = tower(pixels[chosen]).last_hidden_state[:, 1:].mean(1)
        return torch.nn.functional.binary_cross_entropy_with_logits(head(seen), truth[chosen])

    yield from _train(weights, loss, len(pixels), steps, seed, 64, TOWER_RATE)


def learn_reports(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pixels: Tensor,
    texts: Sequence[tuple[str, str]],
    steps: int,
    seed: int,
) -> Iterator[float]:
    """Next-token prediction of the reports, the tower frozen: (prompt, report) in the template's words, a
    picture each. Yields the loss of every step."""
    model.model.vision_tower.requires_grad_(False)
    shown, tokenizer = "<image>" * (SIZE // PATCH) ** 2, processor.tokenizer
    asked = [tokenizer(prompt.replace("<image>", shown))["input_ids"] for prompt, _ in texts]
    said = [tokenizer(report)["input_ids"] for _, report in texts]

    def loss(chosen: Tensor) -> Tensor:
        ids = [torch.tensor(asked[i] + said[i]) for i in chosen]
        labels = [torch.tensor([-100] * len(asked[i]) + said[i]) for i in chosen]
        return model(
            input_ids=pad_sequence(ids, True, tokenizer.pad_token_id),
            labels=pad_sequence(labels, True, -100),
            pixel_values=pixels[chosen],
        ).loss

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    yield from _train(weights, loss, len(texts), steps, seed, 32, REPORT_RATE)
    model.requires_grad_(True)


def _train(
    weights: list[Tensor],
    loss: Callable[[Tensor], Tensor],
    rows: int,
    steps: int,
    seed: int,
    batch_size: int,
    rate: float,
) -> Iterator[float]:
    """AdamW, a warm-up, a cosine; `loss` is of the rows whose numbers it gets."""
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    share = lambda step: min(1, (step + 1) / 30) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    generator, waiting = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(waiting) < batch_size:
            waiting = torch.randperm(rows, generator=generator)
        chosen, waiting = waiting[:batch_size], waiting[batch_size:]
        found = loss(chosen)
        found.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield found.item()


@torch.no_grad()
def write_reports(
    model,
    processor,
    pictures: Sequence[Image.Image],
    prompts: Sequence[list[dict]],
    sample: bool = False,
    batch_size: int = 64,
) -> list[str]:
    """The report on each picture, as the model was asked for it: the greedy one, or a sample at temperature
    1, the same whenever it is asked."""
    out = []
    how = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
    torch.manual_seed(0)
    processor.tokenizer.padding_side = "left"
    for at in range(0, len(pictures), batch_size):
        texts = [
            processor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            for prompt in prompts[at : at + batch_size]
        ]
        shown = list(pictures[at : at + batch_size])
        inputs = processor(images=shown, text=texts, return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        found = model.generate(**inputs, max_new_tokens=100, **how)
        new = found[:, inputs["input_ids"].shape[1] :]
        out += processor.batch_decode(new, skip_special_tokens=True)
    return out
