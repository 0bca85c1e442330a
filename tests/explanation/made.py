"""A made-up explanation, such as explain.json holds one: its parts agree with each other."""

import itertools

import numpy as np

LAYERS, NEURONS = 8, 96
_KINDS = {"q_proj": 1.0, "k_proj": 0.9, "v_proj": 1.6, "o_proj": 1.8, "gate_proj": 1.2, "up_proj": 1.5}
_KINDS |= {"down_proj": 2.4}
_NAMES = {"RP-": "TP-", "RN+": "TN+", "CP+": "AP+", "CN-": "AN-"}
_NAMES |= {"RP+": "TP+", "RN-": "TN-", "CP-": "AP-", "CN+": "AN+"}
_TOKENS = (" sorry", " I", "ĠI", "\n", "\u202e", "<script>", "", "\x1b[31m", " of", "cannot")


def made(*without, **parts):
    """The result, without the parts that are named (they are null), with others in place of its own."""
    rng = np.random.default_rng(5)
    neurons = _neurons(rng)
    where = _where(rng, neurons)
    result = {
        "settings": {"model": "runs/first", "data": None, "probe": "pairs", "definition": "v1", "seed": 0},
        "names": {"before": "models/tiny-llama", "after": "runs/first/model"},
        "data": dict(rows=512, prompts=500, pairs=512, tokens=61234, causes_pairs=128, source="eval.jsonl"),
        "notes": ["The causes are looked at on 128 of the 512 pairs."],
        "changed": True,
        "versions": {"python": "3.12.3", "fastdpo": "0.1.0", "torch": "2.13.0"},
        "device": "cpu",
        "time": "2026-11-30T05:20:00+00:00",
        "seconds": {"weights": 1.2, "capture": 44.0, "causes": 190.5},
        "weights": _weights(rng),
        "behaviour": _behaviour(rng),
        "direction": dict(
            kind="pairs", towards="up", space="folded", found=True, forced=False, accuracy=0.712,
            interval=[0.655, 0.763], tested=250, fitted=250, length_correlation=-0.61,
            before=where["before"], after=where["after"],
        ),
        "where": where,
        "neurons": neurons,
        "causes": _causes(rng, neurons, where),
    }  # fmt: skip
    return result | dict.fromkeys(without) | parts


def nothing_changed():
    """BEFORE = AFTER: no difference, no effect."""
    result = made()
    numbers, causes = result["behaviour"]["numbers"], result["causes"]
    for name in numbers:
        own = numbers.get(name.replace("/after", "/before"), numbers[name])
        numbers[name] = dict(own) if "/after" in name or "/before" in name else {"value": 0.0, "error": 0.0}
    for row in causes["rows"]:
        for column in causes["columns"]:
            row[column] = causes["rows"][0][column] | {"share": None, "share_error": None}
    for one in causes["effect"].values():
        one |= {"value": 0.0, "error": 0.0, "told": False}
    result["direction"]["after"] = result["direction"]["before"]
    for part in ("weights", "where", "neurons"):
        result[part] = _zeros(result[part])
    result["neurons"] |= {"still": result["neurons"]["neurons"], "concentration": [], "top": {}}
    for group in result["neurons"]["groups"]:
        group |= {"count": 0, "share": None}
    for part in ("by_position", "tokens"):
        result["behaviour"][part] = _zeros(result["behaviour"][part])
    return result | {"changed": False}


def no_direction(forced=False):
    """What fitted tells chosen and rejected no better than a coin."""
    result = made()
    result["direction"] |= dict(found=False, forced=forced, accuracy=0.516, interval=[0.454, 0.577])
    return result if forced else result | dict.fromkeys(("where", "neurons", "causes"))


def _zeros(value):
    """The same with 0 for every number that is no count."""
    if isinstance(value, dict):
        return {name: one if name == "share" else _zeros(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_zeros(one) for one in value]
    return 0.0 if isinstance(value, float) else value


def _weights(rng):
    modules = []
    for layer in range(LAYERS):
        for kind, size in _KINDS.items():
            where = "self_attn" if kind[0] in "qkvo" else "mlp"
            relative = size * 1e-4 * (0.4 + 1.6 * np.exp(-((layer - 5) ** 2) / 6)) * rng.uniform(0.8, 1.2)
            of = dict(name=f"layers.{layer}.{where}.{kind}", layer=layer, kind=kind, changed=0.4 + layer / 50)
            modules.append(of | dict(relative=relative, norm=45 * relative, stable_rank=rng.uniform(2, 9)))
        of = dict(name=f"layers.{layer}.input_layernorm", layer=layer, kind="input_layernorm", changed=0.02)
        modules.append(of | dict(relative=2e-6, norm=1e-5, stable_rank=None))
    for name, relative in (("embed_tokens", 6e-6), ("norm", 1e-6), ("lm_head", 3e-5)):
        rank = None if name == "norm" else 3.3
        of = dict(name=name, layer=None, kind=name, changed=0.11)
        modules.append(of | dict(relative=relative, norm=90 * relative, stable_rank=rank))
    squared = sum(module["norm"] ** 2 for module in modules)
    for module in modules:
        module["share"] = module["norm"] ** 2 / squared
    return dict(reason=None, kind="whole", dtype="bfloat16", relative=1.7e-4, changed=0.43, modules=modules)


def _behaviour(rng):
    numbers = {
        "log_ratio/chosen": (-3.1, 0.31), "log_ratio/rejected": (-8.42, 0.44), "margins": (5.32, 0.29),
        "accuracies": (0.793, 0.018), "logps/accuracies/before": (0.547, 0.022),
        "logps/accuracies/after": (0.672, 0.021), "kl/forward": (0.0312, 0.0011),
        "kl/reverse": (0.0291, 0.0010), "perplexity/before": (8.213, 0.21), "perplexity/after": (8.611, 0.23),
    }  # fmt: skip
    edges = [1, 2, 3, 5, 9, 17, 33, 65, 129, 257]
    bins = []
    for first, following in itertools.pairwise(edges):
        kl = 0.02 + 0.25 / first**0.8
        part = dict(tokens=900 * (following - first) // (1 + first // 60), margin_part=0.02 + 0.3 / first)
        bins.append(dict(first=first, last=following - 1, kl=kl, **part))
    tokens = [
        dict(token=token, count=int(count), change=change, total=change * int(count))
        for token, count, change in zip(_TOKENS, rng.integers(20, 900, 10), np.linspace(0.8, -1.1, 10))
    ]
    numbers = {name: dict(value=value, error=error) for name, (value, error) in numbers.items()}
    return dict(numbers=numbers, by_position=bins, kl_tokens=20000, tokens=tokens)


def _neurons(rng):
    """The arithmetic of the classes, for a direction that shall rise: d = -u."""
    shape = (LAYERS, NEURONS)
    before, q = rng.normal(-0.1, 0.3, shape), rng.normal(0, 0.4, shape)
    after = before + 0.05 * rng.normal(0, 1, shape) + 0.02 * np.sign(q)
    q_after = q + 0.004 * rng.normal(0, 1, shape)
    activation, value = (after - before) * (q + q_after) / 2, (before + after) / 2 * (q_after - q)
    change = activation + value  # along u: what the reduction along d is
    groups, top = [], {}
    for name, paper in _NAMES.items():
        along, positive, rises = name[0] == "R", name[1] == "P", (name[1] == "P") == (name[2] == "+")
        member = ((q < 0) == along) & ((before >= 0) == positive) & ((after > before) == rises)
        of = dict(name=name, paper=paper, toward="T" if along else "A", lowers=along != rises)
        sums = {"sum": change, "activation": activation, "value": value}
        sums = {key: float(some[member].sum()) for key, some in sums.items()}
        groups.append(of | dict(count=int(member.sum())) | sums)
        most = sorted(np.argwhere(member), key=lambda at: -abs(change[tuple(at)]))[:5]
        top[name] = [
            dict(layer=int(l), neuron=int(n), cos=float(q[l, n] / 2), before=float(before[l, n]),
                 after=float(after[l, n]), change=float(change[l, n]), firing_before=0.31, firing_after=0.36,
                 tokens=list(rng.permutation(_TOKENS)[:5]))
            for l, n in most
        ]  # fmt: skip
    gross, raised = (sum(g["sum"] for g in groups if g["lowers"] == lowers) for lowers in (True, False))
    for group in groups:
        group["share"] = group["sum"] / (gross if group["lowers"] else raised)
    falling = np.sort(np.maximum(change, 0).ravel())[::-1].cumsum()
    concentration = [
        dict(share=share, neurons=int(np.searchsorted(falling, share * falling[-1]) + 1))
        for share in (0.5, 0.75, 0.99)
    ]
    by_layer = [
        dict(layer=l, lowered=float(np.maximum(c, 0).sum()), raised=float(np.minimum(c, 0).sum()))
        for l, c in enumerate(change)
    ]
    sums = dict(
        lowering=sum(g["count"] for g in groups if g["lowers"]),
        gross=gross,
        raised=raised,
        net=gross + raised,
        bias=0.0,
    )
    sums |= dict(activation=float(activation.sum()), value=float(value.sum()))
    return dict(
        definition="v1", towards="up", neurons=change.size, still=0, groups=groups, top=top,
        concentration=concentration, by_layer=by_layer, **sums,
    )  # fmt: skip


def _where(rng, neurons):
    mlp = [one["lowered"] + one["raised"] for one in neurons["by_layer"]]
    attention = [float(a) for a in rng.normal(0.25, 0.3, LAYERS)]
    total = 0.03 + sum(mlp) + sum(attention)
    parts = dict(embedding=0.03, attention=attention, mlp=mlp, sum=total, total=total, exact=2e-13)
    return parts | dict(before=-1.25, after=-1.25 + total)


def _causes(rng, neurons, where):
    size = {group["name"]: group["count"] for group in neurons["groups"]}
    four = sum(group["count"] for group in neurons["groups"] if group["lowers"])
    plan = [("before training", "before", "before", 0, 0.0)]
    plan += [(f"{n} most along it, at 0", "ablated", f"{n} most", n, 0.001 * n) for n in (10, 50)]
    for what, gain in (("constant", 0.55), ("token", 0.81)):
        for name in ("RP-", "RN+", "CP+", "CN-"):
            plan.append((f"{name}, {what}", what, name, size[name], gain * size[name] / four))
        plan.append((f"all four, {what}", what, "all four", four, gain))
        plan.append((f"random like all four, {what}", f"random {what}", "all four", four, 0.12))
    plan += [("everything", "parts", "everything", 0, 0.997), ("after training", "after", "after", 0, 1.0)]
    change = where["after"] - where["before"]
    effects = {
        "projection": (where["before"], change, 0.05), "margins": (0.0, 5.2, 0.3), "kl": (0.0, 0.0291, 0.001),
        "perplexity": (8.2, 0.2, 0.3), "logps/accuracies": (0.5, 0.29, 0.03), "score": (-41.0, 7.0, 1.1),
    }  # fmt: skip
    rows = []
    for name, what, group, n, share in plan:
        what, how = what.split()[0], what.split()[-1]
        seeds = 3 if what == "random" else None
        row = dict(name=name, what=what, how=how, group=group, size=n, seeds=seeds)
        for column, (start, effect, error) in effects.items():
            own = share if what in ("before", "after", "parts") else share + float(rng.normal(0, 0.02))
            told = abs(effect) > 2 * error
            row[column] = dict(value=start + own * effect, error=error * max(own, 0.1))
            row[column] |= dict(share=own if told else None, share_error=0.04 if told else None)
            row[column]["spread"] = 0.02 * abs(effect) if what == "random" else None
        rows.append(row)
    effect = {
        column: dict(value=value, error=error, told=abs(value) > 2 * error)
        for column, (_, value, error) in effects.items()
    }
    return dict(pairs=128, prompts=125, columns=list(effects), rows=rows, effect=effect, reason=None)
