"""Alarms when routing collapses: what has gone on for a while in a layer is told once, with a remedy.

Letters: E experts, K experts per token, L MoE layers.
"""

from typing import NamedTuple

import numpy as np

PATIENCE = 100  # steps; while the rate is at its highest, sound runs do the same for half as long
FEW = 20  # copies an expert, on average: below it an expert is without one by chance


class Kind(NamedTuple):
  """A number of each layer, where it begins to be an alarm and where it ends, and the words."""

  begins: float
  ends: float
  says: str
  remedy: str


BALANCE = 'raise balance.bias_rate or a coefficient of balance.losses, or lower optim.learning_rate'
ALARM_KINDS = {
  'crowded': Kind(0.9, 0.75, 'one expert gets nearly every token', BALANCE),
  'idle': Kind(1, 1, 'experts get no token', BALANCE),
  'dropped': Kind(
    0.9,
    0.75,
    'nearly all copies find no room and are dropped',
    'raise model.moe.dispatch.capacity_factor, or use sparse_matmul, which drops nothing',
  ),
}


def measured(load: np.ndarray, dropped: np.ndarray, top_k: int) -> dict[str, np.ndarray]:
  """Load [L, E] and share dropped [L] -> of each kind [L]: share of tokens at the fullest expert, experts without a
  token, share dropped. Where nothing can be said, 0."""
  copies, experts = load.sum(axis=1), load.shape[1]
  share = (
    load.max(axis=1) * top_k / np.maximum(copies, 1) if experts > top_k else np.zeros(len(load))
  )
  idle = np.where(copies >= FEW * experts, (load == 0).sum(axis=1), 0)
  return {'crowded': share, 'idle': idle, 'dropped': dropped}


def sounding(load: np.ndarray, dropped: np.ndarray, top_k: int) -> int:
  """Over all layers, how many kinds of alarm this one step would begin."""
  return int(
    sum(
      (values >= ALARM_KINDS[name].begins).sum()
      for name, values in measured(load, dropped, top_k).items()
    )
  )


class Alarms:
  """What has been going on since when, and what of it was told. A resumed run begins anew: it tells once more."""

  def __init__(self, top_k: int) -> None:
    self._top_k = top_k
    self._since: dict[tuple[str, int], int] = {}
    self._told: set[tuple[str, int]] = set()

  def heard(self, step: int, load: np.ndarray, dropped: np.ndarray) -> list[str]:
    """A step's load [L, E] and share dropped [L] -> lines to say, most often none."""
    lines = []
    for name, values in measured(load, dropped, self._top_k).items():
      kind, new = ALARM_KINDS[name], []
      for layer, value in enumerate(values):
        key = name, layer
        if not value >= (kind.ends if key in self._since else kind.begins):
          self._since.pop(key, None)
          self._told.discard(key)
        elif step - self._since.setdefault(key, step) >= PATIENCE and key not in self._told:
          self._told.add(key)
          new.append(
            f'layer {layer} ({f"{value:.0f} of {load.shape[1]}" if name == "idle" else f"{value:.0%}"})'
          )
      if new:
        lines.append(
          f'ALARM after step {step}, for {PATIENCE} steps or more: {kind.says}: {", ".join(new)}. '
          f'Remedy: {kind.remedy}'
        )
    return lines
