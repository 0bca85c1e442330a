"""How prompts with their responses are packed: made-up groups through the functions that pack real ones."""

import numpy as np

from docs.pictures.canvas import MARGIN, PALE, PAPER, RIGHT, SMALL, SOFT, Canvas
from fastdpo.data.packing import pack, split_step
from fastdpo.records import PackedGroups, Pair, PreferenceGroup, Response
from fastdpo.report.plots import COLOURS

LENGTHS = ((6, (5, 3)), (4, (6, 3, 2)), (3, (2, 8)), (7, (3, 2)))  # tokens of a prompt, of its responses
MAX_TOKENS = 24
PROMPT = "#77808c"
COLOUR_OF = {"prompt": PROMPT, "best response": COLOURS["train"], "other response": COLOURS["held-out"]}
LEFT, CELL, ROW = MARGIN + 16, 18, 14


def groups() -> list[PreferenceGroup]:
    """A token's id says where it belongs: 10 times its group and its part, 0 for the prompt."""
    out = []
    for number, (n_prompt, lengths) in enumerate(LENGTHS):
        ids = [np.full(n, 10 * number + part) for part, n in enumerate((n_prompt, *lengths))]
        responses = tuple(Response(own, np.ones(len(own), bool)) for own in ids[1:])
        pairs = tuple(Pair(w, l) for l in range(len(lengths)) for w in range(l))
        out.append(PreferenceGroup(number, ids[0], responses, pairs))
    return out


def colour(token: int) -> str:
    return list(COLOUR_OF.values())[min(token % 10, 2)]


def draw() -> str:
    padded = pack(groups(), share=False)
    packed = [pack(part) for part in split_step(groups(), MAX_TOKENS)]
    places, tokens = padded.input_ids.numel(), sum(batch.input_tokens for batch in packed)
    scored = sum(len(batch.score_row) for batch in packed)
    canvas = Canvas("Each prompt once, and no padding", 510)
    canvas.legend(54, COLOUR_OF | {"padding": PALE}, columns=4)
    canvas.words(MARGIN, 88, "A padded row for each response", bold=True)
    canvas.words(RIGHT, 88, f"{places} places computed", bold=True, anchor="end")
    draw_padded(canvas, 100, padded)
    canvas.words(MARGIN, 266, "fastdpo", bold=True)
    canvas.words(MARGIN + 68, 266, f"{len(packed)} microbatches, max_tokens: {MAX_TOKENS}", SMALL, SOFT)
    canvas.words(RIGHT, 266, f"{tokens} tokens computed", bold=True, anchor="end")
    for number, batch in enumerate(packed):
        draw_packed(canvas, 278 + 82 * number, batch)
    notes = [
        f"Dots: what reaches the lm_head, {scored} predictions of response tokens.",
        "Bars: positions. A response goes on where its prompt ends, and",
        "attends to its prompt and itself alone.",
    ]
    canvas.notes(MARGIN, 458, notes)
    return canvas.svg(
        f"{len(LENGTHS)} prompts with {len(padded.input_ids)} responses. As a padded row for each response "
        f"they take {places} places, with each prompt repeated and padding. fastdpo packs them into "
        f"{len(packed)} rows of {' and '.join(str(batch.input_tokens) for batch in packed)} tokens: each "
        "prompt once, its responses after it, group after group without padding, and only the "
        f"{scored} predictions of response tokens reach the lm_head."
    )


def draw_padded(canvas: Canvas, y: float, batch: PackedGroups) -> None:
    ids, mask = batch.input_ids, batch.attention_mask.bool()
    for row, (tokens, real) in enumerate(zip(ids.tolist(), mask.tolist())):
        top = y + ROW * row
        canvas.words(MARGIN, top + 11, letter(tokens[0]), SMALL, SOFT)
        for place, (token, here) in enumerate(zip(tokens, real)):
            canvas.box(LEFT + CELL * place, top, CELL - 1.5, ROW - 1.5, colour(token) if here else PALE)
    prompts = int((ids % 10 == 0)[mask].sum())
    notes = [
        "A prompt again with each response:",
        f"{prompts - sum(n for n, _ in LENGTHS)} tokens more.",
        "",
        "Rows as long as the longest:",
        f"{int((~mask).sum())} places of padding.",
        "",
        f"Plain transformers: {ids.numel()} rows of logits.",
    ]
    canvas.notes(LEFT + CELL * ids.shape[1] + 14, y + 11, notes)


def draw_packed(canvas: Canvas, y: float, batch: PackedGroups) -> None:
    """A microbatch's one row; dots where hidden states reach the lm_head, as often as they do."""
    tokens, positions = batch.input_ids[0].tolist(), batch.position_ids[0].tolist()
    times = np.bincount(batch.score_row, minlength=len(tokens))
    for place, (token, before) in enumerate(zip(tokens, [-1, *tokens])):
        x, gap = LEFT + CELL * place, 3 if place and token != before else 0
        if token // 10 != before // 10:
            canvas.words(x + gap, y + 11, letter(token), SMALL, SOFT)
        canvas.box(x + gap, y + 16, CELL - 1.5 - gap, 20, colour(token))
        canvas.box(x + gap, y + 39, CELL - 1.5 - gap, 2 + 2.4 * positions[place], "#c3c9d1")
        for dot in range(times[place]):
            canvas.dot(x + (CELL - 1.5 + gap) / 2 + 5 * (dot - (times[place] - 1) / 2), y + 26, PAPER)


def letter(token: int) -> str:
    return "ABCD"[token // 10]
