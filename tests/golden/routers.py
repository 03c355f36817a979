"""Routers, watched: the combine weights of every MoE layer, and how clear each choice was.

The gap is that between the last chosen and the first one not chosen, of groups and of experts;
where it is small, float noise decides, and a golden would be a coin.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from models import Family
from torch import nn

SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
  'sigmoid': torch.sigmoid,
  'softmax': lambda x: x.softmax(-1),
  'logits': lambda x: x,
}
GROUPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
  'top2': lambda x: x.topk(2, -1).values.sum(-1),
  'max': lambda x: x.max(-1).values,
}


class Watch:
  """What the routers of one forward pass did, by layer: combine [T, E] f32 and gap [T] f32."""

  def __init__(self) -> None:
    self.combine: list[torch.Tensor] = []
    self.gap: list[torch.Tensor] = []


@contextlib.contextmanager
def watching(model: nn.Module, family: Family) -> Iterator[Watch]:
  """Hooks on every router of `model` for as long as the context lasts."""
  watch = Watch()

  def hook(
    router: nn.Module, _: tuple, out: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
  ) -> None:
    logits, weights, ids = (x.detach() for x in out)
    watch.combine.append(torch.zeros_like(logits).scatter(1, ids, weights))
    watch.gap.append(gap(logits, ids, router, family))

  routers = [m for m in model.modules() if type(m).__name__.lower().endswith('topkrouter')]
  handles = [m.register_forward_hook(hook) for m in routers]
  try:
    yield watch
  finally:
    for handle in handles:
      handle.remove()


def gap(logits: torch.Tensor, ids: torch.Tensor, router: nn.Module, family: Family) -> torch.Tensor:
  """[T] distance of each choice to the next; fails if a clear one is not the router's `ids`."""
  choice = SCORES[family.score](logits)
  biases = dict(router.named_buffers())
  if biases:
    choice = choice + biases['e_score_correction_bias']
  gaps = []
  if family.group:
    groups = choice.unflatten(-1, (router.num_group, -1))
    scores, order = GROUPS[family.group](groups).sort(-1, descending=True)
    k = router.topk_group
    gaps.append(scores[:, k - 1] - scores[:, k])
    kept = torch.zeros_like(scores).scatter(1, order[:, :k], 1.0).bool()
    choice = groups.masked_fill(~kept[..., None], -torch.inf).flatten(1)
  scores, order = choice.sort(-1, descending=True)
  gaps.append(scores[:, router.top_k - 1] - scores[:, router.top_k])
  smallest = torch.stack(gaps).amin(0)
  others = (order[:, : router.top_k].sort(-1).values != ids.sort(-1).values).any(-1)
  if (others & (smallest > 1e-6)).any():
    raise ValueError(
      f'{family.model}: score={family.score!r}, group={family.group!r} do not choose as its router '
      'does'
    )
  return smallest
