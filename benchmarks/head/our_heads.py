"""fastdpo's ways through the head, as contenders of `benchmarks.head.run`."""

from fastdpo_kernels import MEMORY_BUDGET, backend, linear_dpo, linear_logp, plan

from benchmarks.head.inputs import BETA, Inputs


def _sizes(inputs: Inputs) -> tuple[int, int, int]:
    return inputs.shape.M, inputs.shape.V, inputs.shape.D


def room_to_keep(inputs: Inputs) -> int:
    """A budget at which the [M, V] matrix is kept."""
    return inputs.shape.M * inputs.shape.V * inputs.hidden.element_size() + MEMORY_BUDGET


def by_logp(budget_of):
    """linear_logp and the loss in torch: any loss."""

    def run(inputs):
        memory = budget_of(inputs)
        args = (inputs.hidden, inputs.weight, inputs.target)
        logp = linear_logp(*args, softcap=inputs.shape.softcap, memory_budget=memory)
        return inputs.loss_of(logp), logp

    return run


def by_dpo(inputs):
    """linear_dpo: the loss too, by whole groups."""
    args = (inputs.hidden, inputs.weight, inputs.target, inputs.cu_resp, inputs.pairs, inputs.ref)
    options = dict(softcap=inputs.shape.softcap, groups=inputs.groups, memory_budget=inputs.shape.budget)
    loss, stats = linear_dpo(*args, beta=BETA, **options)
    return loss, stats.token_logp


def told(name: str, mode: str, inputs: Inputs) -> dict:
    """The plan of a contender: {"plan", "flops", "promised_bytes" with the gradients}."""
    dpo = name == "linear_dpo"
    how = plan(
        *_sizes(inputs),
        dtype=inputs.hidden.dtype,
        train_weight=mode == "trained",
        need_grad=mode != "forward",
        groups=inputs.groups if dpo else None,
        memory_budget=room_to_keep(inputs) if "room" in name else inputs.shape.budget,
        backend=backend(inputs.hidden.device, inputs.hidden.dtype),
    )
    gradients = (inputs.hidden.nbytes if mode != "forward" else 0) + inputs.shape.M * 4
    if mode == "trained":
        gradients += inputs.weight.nbytes
    return {"plan": how.name, "flops": how.flops, "promised_bytes": how.peak_bytes + gradients}


CONTENDERS = {
    "linear_logp": (by_logp(lambda inputs: inputs.shape.budget), ("forward", "frozen", "trained")),
    "linear_logp with room": (by_logp(room_to_keep), ("trained",)),
    "linear_dpo": (by_dpo, ("forward", "frozen", "trained")),
}
