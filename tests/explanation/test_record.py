"""Records of a model's values on disk: what is in them, how large they are, how much of them is read."""

from collections.abc import Mapping

import pytest
import torch

from fastdpo.explanation.patch import Patch, bytes_a_token, record, recorded
from fastdpo.explanation.places import find_places
from fastdpo.model.policy import Policy
from tests import tiny
from tests.explanation.families import FAMILIES, policy_of
from tests.explanation.test_patch import parts_of, states, the_record


class Read(Mapping):
    """A record that remembers what was read."""

    def __init__(self, inside):
        self.inside, self.read = inside, []

    def __getitem__(self, name):
        self.read.append(name)
        return self.inside[name]

    def __iter__(self):
        return iter(self.inside)

    def __len__(self):
        return len(self.inside)

    def __contains__(self, name):
        return name in list(self.inside)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_records_hold_each_pack(family, dtype, tmp_path):
    policy, places = policy_of(family, dtype=dtype)
    parts = parts_of(policy, 30)
    paths = record(policy, places, parts, tmp_path / "new" / "folder")
    assert len(paths) == len(parts) > 1 and paths == sorted(paths)
    names = [f"{part}.{layer}" for part in ("attention", "mlp", "neurons") for layer in range(2)]
    for path, part in zip(paths, parts):
        held, T = recorded(path), policy.pack(part).input_ids.numel()
        assert sorted(held) == sorted([*names, "embedding"]) and len(held) == 7
        assert all(tensor.shape[0] == T and tensor.dtype == dtype for tensor in held.values())
        assert sum(tensor.nbytes for tensor in held.values()) == T * bytes_a_token(places, policy)
        assert "neurons.2" not in held
    with pytest.raises(KeyError):
        held["neurons.2"]


def test_a_patch_reads_no_more_than_it_needs(tmp_path):
    policy, places = policy_of("llama")
    own = Read(the_record(policy, places, tmp_path))
    none = torch.empty(0, dtype=torch.int64)
    states(policy, places, Patch((none, torch.tensor([1]))), recorded=own)
    assert own.read == ["neurons.1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_they_are_no_larger_than_foretold(family, tmp_path):
    """fp32 weights and a bf16 computation: some norms give fp32 then (GLM 4), and some bf16."""
    policy = Policy(tiny.policy(family, **FAMILIES[family]).model, torch.bfloat16)
    policy.set_sharing(True)
    places = find_places(policy)
    held = the_record(policy, places, tmp_path)
    assert {t.dtype for name, t in held.items() if "neurons" in name} == {torch.bfloat16}
    size = sum(tensor.nbytes for tensor in held.values()) / len(held["embedding"])
    foretold = bytes_a_token(places, policy)
    assert size == foretold or (
        family in ("gemma2", "gemma3_text", "olmo2") and foretold / 1.5 < size < foretold
    )
