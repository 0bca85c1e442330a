"""A language whose sentiment is known: reviews, their reward, a small Llama, and samples with their exact KL.

As the controlled-sentiment task of the DPO paper (Rafailov et al. 2023, section 6.1), small enough for a CPU:
the reward is a rule, so there is no reward model and no error in it, and the vocabulary is small, so the KL
of each sampled step to the reference is a sum over all of it. No text, model or network from outside.
"""

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fastdpo.model.policy import Policy
from fastdpo.records import Pair, PreferenceGroup, Response

NOUNS = "film acting story music ending cast plot camera pacing dialogue".split()
VERBS = "was felt looked seemed".split()
# (valence, its words): 0 is as bad and 1 as good as it gets; the ends are rarer than the middle.
SENTIMENT = {
    0.0: "awful dreadful hideous unbearable".split(),
    0.2: "bad tedious clumsy silly sloppy".split(),
    0.4: "dull bland slow thin plain uneven".split(),
    0.6: "fine decent pleasant neat fair solid".split(),
    0.8: "good lively clever warm funny".split(),
    1.0: "superb brilliant stunning wonderful".split(),
}
WEIGHT = {0.0: 1, 0.2: 2, 0.4: 3, 0.6: 3, 0.8: 2, 1.0: 1}  # how often a clause is of this valence
WORDS = ["<pad>", "<bos>", "<eos>", ".", "and", "but", "the", *NOUNS, *VERBS]
WORDS += [word for words in SENTIMENT.values() for word in words]
ID = {word: i for i, word in enumerate(WORDS)}
PAD, BOS, EOS = 0, 1, 2
VALENCE = np.full(len(WORDS), np.nan)  # of each id; NaN: it says nothing
for _valence, _words in SENTIMENT.items():
    VALENCE[[ID[word] for word in _words]] = _valence

PROMPT = 6  # tokens: <bos> the NOUN VERB ADJECTIVE and|but
LONGEST = 24  # tokens of a completion
TONES = (0.15, 0.5, 0.85)  # how likely a review's clauses are to be positive


def review(draw: np.random.Generator) -> list[int]:
    """<bos> clause (and|but clause)* . <eos>, two to five clauses; `but` mostly turns the sentiment."""
    tone, ids = draw.choice(TONES), [BOS]
    good = draw.random(draw.integers(2, 6)) < tone
    for i, is_good in enumerate(good):
        if i:
            turns = (is_good != good[i - 1]) == (draw.random() < 0.9)
            ids.append(ID["but" if turns else "and"])
        values = [v for v in SENTIMENT if (v > 0.5) == is_good]
        weights = np.array([WEIGHT[v] for v in values], float)
        adjective = draw.choice(SENTIMENT[draw.choice(values, p=weights / weights.sum())])
        ids += [ID[word] for word in ("the", draw.choice(NOUNS), draw.choice(VERBS), adjective)]
    return [*ids, ID["."], EOS]


def reviews(n: int, seed: int) -> list[np.ndarray]:
    draw = np.random.default_rng([seed, 0])
    return [np.array(review(draw)) for _ in range(n)]


def reward(completion: np.ndarray) -> float:
    """The mean valence of a completion's sentiment words, in [0, 1]; 0.5 where it has none."""
    valence = VALENCE[completion]
    said = valence[~np.isnan(valence)]
    return float(said.mean()) if len(said) else 0.5


def score(completion: np.ndarray) -> float:
    """The reward as ODPO's sentiment scores are made (Amini et al. 2024): 1 + p where the text is positive,
    p where not, so that log(gap) > 0 between a positive and a negative text, and mostly below 0 else."""
    p = reward(completion)
    return p + (p > 0.5)


def sft_groups(texts: list[np.ndarray]) -> list[PreferenceGroup]:
    """Reviews as rows of one response each."""
    responses = [Response(text[PROMPT:], np.ones(len(text) - PROMPT, bool)) for text in texts]
    return [PreferenceGroup(i, t[:PROMPT], (r,), ()) for i, (t, r) in enumerate(zip(texts, responses))]


def ranked_group(row: int, prompt: np.ndarray, completions: list[np.ndarray]) -> PreferenceGroup:
    """A row of completions with their scores; each better one is preferred to each worse one."""
    responses = [Response(ids, np.ones(len(ids), bool), score=score(ids)) for ids in completions]
    better = lambda i, j: responses[i].score > responses[j].score
    places = range(len(responses))
    pairs = tuple(Pair(i, j) for i in places for j in places if better(i, j))
    return PreferenceGroup(row, prompt, tuple(responses), pairs)


def make_policy(seed: int) -> Policy:
    """A random Llama of 87 thousand parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=True,
    )
    return Policy(LlamaForCausalLM(config).train(), torch.float32)


@torch.no_grad()
def sample(policy: Policy, prompts: np.ndarray, seed: int) -> tuple[list[np.ndarray], Tensor]:
    """A completion of each prompt [B, PROMPT] at temperature 1, and the log-probs of all words at each step,
    f32[B, LONGEST, V]. The random numbers are the seed's and the place's, whatever the policy: two policies
    are compared on common random numbers."""
    uniform = torch.rand(len(prompts), LONGEST, generator=torch.Generator().manual_seed(seed))
    ids, cache = torch.from_numpy(prompts), None
    words, logps = [], []
    going = torch.ones(len(prompts), dtype=torch.bool)
    policy.model.eval()
    with policy.stock() as model:
        for t in range(LONGEST):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logp = out.past_key_values, out.logits[:, -1].log_softmax(-1)
            drawn = torch.searchsorted(logp.exp().cumsum(-1), uniform[:, t, None].contiguous())
            ids = drawn.clamp(max=len(WORDS) - 1).where(going[:, None], PAD)
            words.append(ids)
            logps.append(logp)
            going &= ids[:, 0] != EOS
            if not going.any():
                break
    policy.model.train()
    words = torch.cat(words, 1).numpy()
    ends = [np.flatnonzero(row == EOS) for row in words]
    completions = [row[: end[0] + 1] if len(end) else row for row, end in zip(words, ends)]
    return completions, torch.stack(logps, 1)


@torch.no_grad()
def sequence_kl(
    logps: Tensor, prompts: np.ndarray, completions: list[np.ndarray], reference: Policy
) -> np.ndarray:
    """Per sample the sum over its steps of KL(policy || reference), each over the whole vocabulary, f64[B]:
    an unbiased estimate of the KL of whole completions from the policy's own samples."""
    steps, lengths = logps.shape[1], np.array([len(ids) for ids in completions])
    rows = np.full((len(prompts), PROMPT + steps), PAD)
    rows[:, :PROMPT] = prompts
    for row, ids in zip(rows, completions):
        row[PROMPT : PROMPT + len(ids)] = ids
    with reference.stock() as model:
        logits = model(input_ids=torch.from_numpy(rows[:, :-1]), logits_to_keep=steps).logits
    kl = (logps.exp() * (logps - logits.log_softmax(-1))).sum(-1).double().numpy()
    return np.where(np.arange(steps) < lengths[:, None], kl, 0).sum(1)
