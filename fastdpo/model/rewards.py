"""A reward model as a policy: a transformers sequence classifier of one output, whose rewards stand where a
policy has log-probs."""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.errors import ModelError
from fastdpo.model.lm_head import Head
from fastdpo.model.policy import Policy, WithStats
from fastdpo.records import PackedGroups, PreferenceGroup


class RewardPolicy(Policy):
    """Backbone and a linear head, read once a response: of groups as data.reading_end makes them."""

    of_rewards = True
    gives, head_name = "rewards", "head"

    def __init__(
        self, model: torch.nn.Module, dtype: torch.dtype, dropout: dict[str, float] | None, pad: int | None
    ) -> None:
        super().__init__(model, dtype, dropout)
        score = getattr(self.core, "score", None)
        if score is None:
            name = type(self.core).__name__
            raise ModelError(f"{name}: a reward model's head is called score, and there is none")
        self.head = Head(score, 1.0, None)
        text = self.core.config.get_text_config()
        text.pad_token_id = self.core.config.pad_token_id = pad  # by which it finds a row's end

    @staticmethod
    def apart(difference: float) -> str:
        return f"{difference:.2g}"

    @property
    def head_size(self) -> tuple[int, int]:
        D: int = self._weight().shape[1]
        return 1, D

    def _weight(self) -> Tensor:
        """[1, D]; of a LoRA peft's own copy, which trains."""
        module: Any = self.head.module
        if hasattr(module, "modules_to_save"):
            module = module.modules_to_save[module.active_adapters[0]]
        if getattr(module, "bias", None) is not None:
            raise ModelError(f"{type(self.core).__name__}: its head has a bias, which is not known here")
        weight: Tensor = module.weight
        return weight

    def _token_logp(self, batch: PackedGroups, stats: tuple[str, ...]) -> Tensor | WithStats:
        """The reward of each response, f32[M], M = R."""
        hidden = self.hidden(batch)[batch.score_row]
        with torch.autocast(self.device.type, enabled=False):
            wide = torch.promote_types(hidden.dtype, torch.float32)
            rewards = F.linear(hidden.to(wide), self._weight().to(wide))[:, 0]
        return (rewards, {}) if stats else rewards

    def default_budget(self) -> int:
        return 1  # its head needs none

    @cached_property
    def max_scored(self) -> int | None:
        return None

    def head_plan(self, batches: list[PackedGroups]) -> str:
        return "one reward a response"

    def stock_reward(self, group: PreferenceGroup, place: int) -> tuple[Tensor, float]:
        """(the classifier's own reward of a response on a row of its own, f32[1]; how far rounding takes
        one)."""
        response = group.responses[place]
        ids = torch.tensor([[*group.prompt, *response.ids[:-1]]], device=self.device)
        seen: list[Tensor] = []
        hook = self.head.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            with self.autocast():
                call = lambda: self.model(input_ids=ids, use_cache=False)
                reward = self.inside(call).logits[0].float()
                size = self.inside(lambda: self._weight().float().norm())
        finally:
            hook.remove()
        share = 2**-10 if self.dtype.itemsize >= 4 else 0.25
        rms = seen[0].detach().float().square().mean().sqrt()
        return reward, share * float(rms * size + reward.abs())
