"""What a call must look like; every refusal repeats the shapes, dtypes and devices it got."""

import torch


def told(**tensors: torch.Tensor | None) -> str:
    """'hidden (4, 3) torch.float32 cpu, ...' of those that are there."""
    there = [(name, t) for name, t in tensors.items() if t is not None]
    return ", ".join(f"{name} {tuple(t.shape)} {t.dtype} {t.device}" for name, t in there)


def operands(op: str, hidden, target, weight, bias, lora, whole: bool = True) -> list:
    """[hidden, target, weight, bias, A, B] as the kernels take them: frozen DTensors gathered, float tensors
    in autocast's dtype where it is on, but for float64 (as torch's linear). ValueError for other DTensors,
    for all of a head that is not `whole`, and for what check_head refuses."""
    tensors = [hidden, target, weight, bias, *(lora or (None, None))[:2]]
    for i, name in enumerate(("hidden", "target", "weight", "bias", "lora A", "lora B")):
        t = tensors[i]
        if not hasattr(t, "full_tensor"):  # a DTensor has; asking for its class would import its package
            continue
        if i < 2 or not whole or (t.requires_grad and torch.is_grad_enabled()):
            raise ValueError(
                f"{op} needs a plain tensor for {name}, got a DTensor of placements {t.placements}: "
                "unshard its module first, or pass to_local() or full_tensor(grad_placements=...)"
            )
        tensors[i] = t.full_tensor()
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        cast = lambda t: t is not None and t.is_floating_point() and t.dtype != torch.float64
        tensors = [t.to(dtype) if cast(t) else t for t in tensors]
    check_head(op, *tensors)
    tensors[3] = None if tensors[3] is None else tensors[3].contiguous()
    return tensors


def check_head(op: str, hidden, target, weight, bias, a, b) -> None:
    """ValueError unless hidden [..., D], weight [V, D], target i64[...], bias [V], A [r, D] and B [V, r] are
    of one device, and of one float dtype but for the target. Looks at no value."""
    named = {"hidden": hidden, "weight": weight, "bias": bias, "lora A": a, "lora B": b}
    floats = [t for t in named.values() if t is not None]
    shapes_fit = (
        hidden.ndim > 0
        and weight.ndim == 2
        and len(weight) > 0
        and hidden.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and (a is None or (a.ndim == b.ndim == 2 and len(a) == b.shape[1]))
        and (a is None or (a.shape[1] == weight.shape[1] and len(b) == len(weight)))
    )
    if not shapes_fit:
        wanted = "hidden [..., D], weight [V, D], bias [V], lora A [r, D], lora B [V, r]"
        raise ValueError(f"{op} needs {wanted}, got {told(**named)}")
    if not hidden.dtype.is_floating_point or any(t.dtype != hidden.dtype for t in floats):
        raise ValueError(f"{op} needs one float dtype: cast hidden or the head first, got {told(**named)}")
    if any(t.device != hidden.device for t in floats):
        raise ValueError(f"{op} needs one device, got {told(**named)}")
    rows, device = list(hidden.shape[:-1]), hidden.device
    if list(target.shape) != rows or target.dtype != torch.int64 or target.device != device:
        got = told(hidden=hidden, target=target)
        raise ValueError(f"{op} needs target int64 {rows} on {device}, one per row of hidden, got {got}")


def check_grad_into(weight: torch.Tensor, into: torch.Tensor) -> None:
    """ValueError unless weight's gradient can be added to `into`."""
    wanted = torch.promote_types(weight.dtype, torch.float32), weight.shape, weight.device
    unfit = not into.is_contiguous() or into.requires_grad or hasattr(into, "full_tensor")
    if (into.dtype, into.shape, into.device) != wanted or unfit:
        needs = f"{wanted[0]} {tuple(weight.shape)} on {weight.device}, contiguous, without requires_grad"
        got = f"{type(into).__name__} {told(grad_into=into)}, {into.stride()}"
        raise ValueError(f"linear_logp needs grad_into {needs}, got {got}")


def check_softcap(softcap: float | None) -> float | None:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive (or None), got {softcap}")
    return None if softcap is None else float(softcap)


def check_pairs(hidden, cu_resp, pairs, by_row: dict, by_pair: dict) -> None:
    """ValueError unless cu_resp is int [R+1] and pairs int [P, 2], and the tensors by row and by pair are
    float [M] and [P] that want no gradient, all on hidden's device. Looks at no value."""
    got = lambda: told(hidden=hidden, cu_resp=cu_resp, pairs=pairs, **by_row, **by_pair)
    integers = (torch.int32, torch.int64)
    if hidden.ndim != 2:
        raise ValueError(f"linear_dpo needs hidden [M, D], got {got()}")
    if cu_resp.ndim != 1 or len(cu_resp) < 1 or cu_resp.dtype not in integers:
        raise ValueError(f"linear_dpo needs cu_resp int32 or int64 [R+1], got {got()}")
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype not in integers:
        raise ValueError(f"linear_dpo needs pairs int32 or int64 [P, 2], got {got()}")
    for group, length, letter in ((by_row, len(hidden), "M"), (by_pair, len(pairs), "P")):
        for name, t in group.items():
            if t is not None and (t.shape != (length,) or not t.dtype.is_floating_point):
                raise ValueError(f"linear_dpo needs {name} float [{letter}={length}], got {got()}")
            if t is not None and t.requires_grad:
                raise ValueError(f"linear_dpo has no gradient for {name}: detach it, got {got()}")
    every = (cu_resp, pairs, *by_row.values(), *by_pair.values())
    if any(t is not None and t.device != hidden.device for t in every):
        raise ValueError(f"linear_dpo needs one device, got {got()}")


def check_target_values(target: torch.Tensor, V: int) -> None:
    """ValueError for a target outside [0, V). Waits for the device."""
    if len(target):
        low, high = target.min().item(), target.max().item()
        if low < 0 or high >= V:
            raise ValueError(f"target must be in [0, {V}) or ignore_index: got {low} to {high}")


def check_owners(owners: torch.Tensor, alike: torch.Tensor) -> None:
    """ValueError for a target that not exactly one rank has, and for ranks that are not alike. Waits for the
    device."""
    if not alike.all():
        raise ValueError("the head is frozen on some ranks of process_group and trained on others")
    if lost := int((owners != 1).sum()):
        raise ValueError(f"each target must be in one rank's slice of the vocabulary, {lost} are not")


def check_pair_values(M: int, cu_resp: torch.Tensor, pairs: torch.Tensor) -> None:
    """ValueError unless cu_resp rises from 0 to M and pairs name responses. Waits for the device."""
    R = len(cu_resp) - 1
    if cu_resp[0] != 0 or cu_resp[-1] != M or (cu_resp.diff() < 0).any():
        raise ValueError(f"cu_resp must rise from 0 to the {M} rows of hidden, got {cu_resp.tolist()[:8]}...")
    if len(pairs):
        low, high = pairs.min().item(), pairs.max().item()
        if low < 0 or high >= R:
            raise ValueError(f"pairs must name responses 0 to {R - 1}, got {low} to {high}")
