"""An explanation, top to bottom: both models, the rows; the model before, after, and before again, patched;
what they say of each other; explain.json, explain.html and neurons.parquet."""

import dataclasses
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape

from fastdpo.data.packing import in_row_order
from fastdpo.data.sources import NumberedRows
from fastdpo.evaluation.answers import Sampling
from fastdpo.evaluation.models import Named, check_same_tokens
from fastdpo.explanation import attribute, probe, weights
from fastdpo.explanation.behaviour import behaviour
from fastdpo.explanation.causes import Causes, Plan, part_plans, plans, within_room
from fastdpo.explanation.changes import unknown
from fastdpo.explanation.look import Look, look, nearest_tokens, state_of_texts, unit, written
from fastdpo.explanation.models import Two, data_of, named_models, rows_of, source_of
from fastdpo.explanation.page import page
from fastdpo.explanation.parts import direction_part, where_part
from fastdpo.explanation.patch import bytes_a_token
from fastdpo.explanation.places import Places, check_sum, find_places
from fastdpo.explanation.result import NEURONS, Settings, folder_of, opened, plain, write
from fastdpo.explanation.rows import Rows
from fastdpo.explanation.shares import shares, tabled
from fastdpo.explanation.show import show
from fastdpo.files.installed import versions
from fastdpo.model.loading import load_model_config, load_tokenizer
from fastdpo.model.policy import Policy
from fastdpo.model.processors import load_processor
from fastdpo.sampling.generate import positions_of
from fastdpo.sampling.scorers import Scorer, make_scorer
from fastdpo.training.run import device_name, spread

_PACKAGES = "fastdpo torch transformers datasets peft".split()
_OWN = (
    "the direction's before and after, where, neurons, and so the groups and means of the causes are of each "
    "model's own 20 greedy tokens; behaviour and the causes' numbers are of the given text"
)
_APART = "one of the two is an adapter that is not on the other, and is not merged to compare them"


def explain(settings: Settings, output: str | None, overwrite: bool, console: Console) -> dict[str, Any]:
    """As fastdpo.api.explain."""
    before, after = named_models(settings)
    asked = _asked(settings, load_model_config(after.spec).get_text_config().hidden_size)
    folder = folder_of(output, settings.after, after.run)
    with opened(folder, settings, overwrite) as work:
        made, table = _explained(settings, before, after, asked, work, console)
        show(made, console)
        (folder / NEURONS).unlink(missing_ok=True)  # of another explanation
        if table is not None:
            attribute.to_parquet(table, folder / NEURONS, settings.towards, settings.groups)
        write(folder, made, page(made), "explain")
    where = escape(f"{folder}/explain.json; open {folder}/explain.html to see it")
    console.print(f"[bold]written:[/] {where}", soft_wrap=True)
    return made


def _explained(settings: Settings, before: Named, after: Named, asked, work: Path, console: Console):
    """(explain.json's content, the neurons' table or None)."""
    spec, held_out = data_of(after, settings)
    given = NumberedRows(spec.data, spec.data_format)
    scorer = make_scorer(settings.scorer, rows=given) if settings.scorer else None
    tokenizer = load_tokenizer(after.spec, console)
    theirs = load_tokenizer(before.spec)
    processor = load_processor(after.spec, tokenizer)
    groups, notes = rows_of(spec, held_out, settings, tokenizer, processor, console)
    check_same_tokens(tokenizer, theirs, groups, (after.name, before.name))
    found = Explanation(settings, Two(before, after, groups, console), asked, tokenizer, work, console)
    made = found.run(scorer)
    made |= {
        "settings": dataclasses.asdict(settings),
        "names": {"before": before.name, "after": after.name},
        "data": made["data"] | {"source": source_of(spec, held_out)},
        "notes": [*notes, *found.notes],
        "versions": {"python": platform.python_version(), **versions(*_PACKAGES)},
        "device": device_name(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": found.seconds,
    }
    return plain(made), found.table


def _asked(settings: Settings, width: int):
    """What a file says of the direction: read before any work. None: it comes from the rows' pairs."""
    if settings.probe == "pairs":
        return None
    if settings.probe.endswith(".safetensors"):
        return probe.from_vector(Path(settings.probe), width)
    return probe.read_labels(Path(settings.probe))


class Explanation:
    """The part that needs weights: one model's at a time."""

    def __init__(self, settings: Settings, two: Two, asked, tokenizer, work: Path, console: Console) -> None:
        self.settings, self.two, self.asked = settings, two, asked
        self.tokenizer, self.work, self.console = tokenizer, work, console
        self.rows = Rows(two.groups)
        self.notes, self.seconds = [_OWN] if settings.text == "own" else [], dict[str, float]()
        self.table: attribute.Table | None = None
        self.causes: Causes | None = None
        self.max_tokens, self.share = two.max_tokens, True
        if asked is None:  # what is wrong with the pairs is told before any work
            rows, matched = self.rows, settings.match_length
            self.asked = probe.deal(rows.pairs, rows.prompt, rows.lengths, settings.seed, matched)

    def run(self, scorer: Scorer | None) -> dict[str, Any]:
        """All parts of explain.json that the models say."""
        self._timed("before", self._see_before)
        self._timed("after", self._see_after)
        ends = (self.before.captured, self.after.captured, self.u)
        parts: dict[str, Any] = {"weights": self.weights, "changed": self.changed, "data": self._data()}
        parts |= {
            "direction": direction_part(self.direction, self.settings, *ends),
            "where": None,
            "neurons": None,
            "causes": None,
        }
        parts["behaviour"] = self._timed("behaviour", self._behaviour)
        if self.looks_inside:
            parts |= {"where": where_part(*ends), "neurons": self._neurons()}
            parts["causes"] = self._timed("causes", lambda: self._causes(parts["neurons"], scorer))
        return parts

    def _timed(self, name: str, call):
        began = time.perf_counter()
        out = call()
        self.seconds[name] = round(time.perf_counter() - began, 1)
        return out

    @property
    def looks_inside(self) -> bool:
        return self.direction.found or self.settings.force

    def _look(self, policy: Policy, places: Places, label: str) -> Look:
        own = self.tokenizer if self.settings.text == "own" else None
        how: dict[str, Any] = dict(max_tokens=self.max_tokens, console=self.console)
        return look(policy, places, self.two.groups, own=own, label=label, **how)

    def _shared(self, policy: Policy) -> None:
        """Both models are packed alike: with shared prompts where both can."""
        self.share = self.share and policy.share
        if policy.share != self.share:
            policy.set_sharing(self.share)

    def _see_before(self) -> None:
        with self.two.before() as policy:
            self._shared(policy)
            places = find_places(policy)
            first = in_row_order(self.two.groups, self.max_tokens, policy.share)[0]
            check_sum(policy, places, policy.pack(first))
            self.before = self._look(policy, places, "before")
            self.experts = places.experts
            self.direction = self._probe(policy, places)
            self.u = unit(places, self.direction.p, self.settings.plain)
            self.written_before = [] if places.experts else written(places, self.u)
            if not (self.two.is_one or self.two.adapted):
                weights.dump(policy.model, self.work / "before.safetensors")

    def _probe(self, policy: Policy, places: Places) -> probe.Direction:
        seen, rows = self.before.seen, self.rows
        if isinstance(self.asked, probe.Dealt):
            return probe.from_pairs(seen.state, self.asked, rows.lengths)
        if isinstance(self.asked, probe.Direction):
            return self.asked
        texts, labels = zip(*self.asked)
        how: dict[str, Any] = dict(max_tokens=self.max_tokens, console=self.console, label="labels")
        limit = positions_of(policy) or self.max_tokens
        state, lengths = state_of_texts(policy, places, texts, self.tokenizer, limit, **how)
        return probe.from_labels(state, torch.tensor(labels), lengths, seed=self.settings.seed)

    def _see_after(self) -> None:
        with self.two.after() as policy:
            self._shared(policy)
            places = find_places(policy)
            self.after = self._look(policy, places, "after")
            self.weights = self._weights(policy)
            if not self.looks_inside:
                return
            self.written_after = [] if places.experts else written(places, self.u)
            if self.settings.causes and self.changed and not places.experts:
                self.causes = self._prepared(policy, places)
                self._timed("recording", lambda: self.causes.see_after(policy, places))

    def _prepared(self, policy: Policy, places: Places) -> Causes:
        """On as many prompts as were asked for, or as there is room for the records of."""
        each = bytes_a_token(places, policy)
        some, note = within_room(self.two.groups, self.settings.causes, each, self.work, policy.share)
        self.notes += filter(None, [note])
        sampling = None
        if self.settings.scorer:
            prompts = spread(self.two.groups, self.settings.samples)
            numbers = np.arange(len(prompts))
            sampling = Sampling(prompts, numbers, 1, self.settings.max_new_tokens, self.settings.seed)
        how: dict[str, Any] = dict(tokenizer=self.tokenizer, sampling=sampling, seed=self.settings.seed)
        how |= dict(console=self.console, max_tokens=self.max_tokens, folder=self.work)
        return Causes(Rows(some), self.u, **how)

    def _weights(self, policy: Policy) -> dict[str, Any]:
        if self.two.is_one:
            return weights.of_lora(policy.model)
        if self.two.adapted:
            return unknown(_APART, "lora", "float32")
        return weights.compare(self.work / "before.safetensors", policy.model, self.console)

    @property
    def changed(self) -> bool:
        if (moved := self.weights["relative"]) is not None:
            return moved > 0
        return not torch.equal(self.before.seen.token_logp, self.after.seen.token_logp)

    def _behaviour(self) -> dict[str, Any]:
        heads = (self.before.head, self.after.head)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        how: dict[str, Any] = dict(device=device, seed=self.settings.seed)
        told = behaviour(self.rows, self.before.seen, self.after.seen, heads, self.tokenizer, **how)
        self.before, self.after = self.before.without_states(), self.after.without_states()
        return told

    def _neurons(self) -> dict[str, Any]:
        if self.experts:
            return {"reason": "its MLPs are mixtures of experts, whose neurons are not looked at one by one"}
        old, new = self.before.captured, self.after.captured
        assert old.neurons is not None and new.neurons is not None
        wrote = zip(self.written_before, self.written_after)
        both = enumerate(zip(old.neurons, new.neurons, wrote))
        self.table = attribute.joined([attribute.of_layer(i, m, m2, *v) for i, (m, m2, v) in both])
        bias = -self.sign * float(((new.bias - old.bias) @ self.u).sum())
        return attribute.summary(self.table, self.settings.towards, self.settings.groups, bias=bias)

    def _causes(self, neurons: dict[str, Any], scorer: Scorer | None) -> dict[str, Any]:
        """The patches, on the model before; and, while it is there, the tokens of top neurons."""
        if self.table is None:
            return {"reason": neurons["reason"]}
        planned = [*plans(self.table, self._members(), self.sign, self.settings), *part_plans()]
        found = self._passes(planned, neurons["top"])
        if self.causes is None:
            asked = "the weights are the same, so there is no effect to recover"
            return {"reason": asked if self.settings.causes else "none were asked for (--causes 0)"}
        self.two.release()
        if scorer is not None:
            for name, some in self.causes.judge(scorer, str(self.settings.scorer)).items():
                for columns, score in zip(found[name], some):
                    columns["score"] = score
        rows = self.causes.rows
        counts = {"pairs": len(rows.pairs), "prompts": len(rows.prompt.unique())}
        return counts | {"kl_tokens": len(self.causes.at)} | shares(planned, found)

    def _passes(self, planned: list[Plan], top: dict[str, list[dict]]):
        """What the table of causes is made of; none without causes. Tokens are put into `top`."""
        with self.two.before() as policy:
            self._shared(policy)
            places = find_places(policy)
            self._name_tokens(policy, places, top)
            if self.causes is None:
                return {}
            return tabled(self.causes, policy, planned, self.causes.run(policy, places, planned))

    def _members(self) -> dict[str, np.ndarray]:
        """The four groups that lower what shall fall."""
        assert self.table is not None
        towards = self.settings.towards
        place = attribute.classes(self.table, towards, self.settings.groups)
        return {name: place == i for i, name in enumerate(attribute.class_names(towards)[:4])}

    def _name_tokens(self, policy: Policy, places: Places, top: dict[str, list[dict]]) -> None:
        listed = [one for some in top.values() for one in some]
        named = nearest_tokens(policy, places, [(n["layer"], n["neuron"]) for n in listed], self.tokenizer)
        for one, tokens in zip(listed, named):
            one["tokens"] = tokens

    def _data(self) -> dict[str, Any]:
        rows, tried = self.rows, self.causes
        return {
            "rows": len(rows.groups),
            "prompts": len(rows.prompt.unique()),
            "pairs": len(rows.pairs),
            "tokens": len(rows.response),
            "causes_pairs": len(tried.rows.pairs) if tried else 0,
        }

    @property
    def sign(self) -> int:
        """Of the direction that shall fall, on u."""
        return 1 if self.settings.towards == "down" else -1
