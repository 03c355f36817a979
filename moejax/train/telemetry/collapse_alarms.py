"""Alarms when routing collapses: what has gone on for a while in a layer is told once, with a
remedy.

Letters: E experts, K experts per token, L MoE layers.
"""

from typing import NamedTuple

import numpy as np

STEPS_UNTIL_ALARM = (
  100  # steps; while the rate is at its highest, sound runs do the same for half as long
)
FEW = 20  # copies an expert, on average: below it an expert is without one by chance


class Kind(NamedTuple):
  """A kind of alarm: at which value of a layer it begins and ends, and what it says.

  It ends below where it begins, so that a value that wavers there is not told again and again.
  """

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


def alarm_values(load: np.ndarray, dropped: np.ndarray, top_k: int) -> dict[str, np.ndarray]:
  """The value of each kind of alarm in each layer, 0 where nothing can be said.

  Args:
    load: [L, E], counts of one step.
    dropped: [L], share of copies dropped.

  Returns:
    Kind -> [L]. crowded: share of tokens at the fullest expert; idle: experts without a token;
    dropped: as given.
  """
  copies, experts = load.sum(axis=1), load.shape[1]
  crowded = np.zeros(len(load))
  # Where a token takes all experts, each of them gets every token.
  if experts > top_k:
    crowded = load.max(axis=1).astype(np.int64) * top_k / np.maximum(copies, 1)
  idle = np.where(copies >= FEW * experts, (load == 0).sum(axis=1), 0)
  return {'crowded': crowded, 'idle': idle, 'dropped': dropped}


def count_alarms(load: np.ndarray, dropped: np.ndarray, top_k: int) -> int:
  """How many alarms this one step would begin, over all kinds and layers.

  Args as those of `alarm_values`.
  """
  count = 0
  for name, values in alarm_values(load, dropped, top_k).items():
    count += (values >= ALARM_KINDS[name].begins).sum()
  return int(count)


class Alarms:
  """The alarms that are active, since which step each is, and which have been reported.

  A resumed run begins anew: it reports once more.
  """

  def __init__(self, top_k: int) -> None:
    self._top_k = top_k
    # (kind, layer) -> the step at which it began, of those that go on
    self._since: dict[tuple[str, int], int] = {}
    self._told: set[tuple[str, int]] = set()

  def update(self, step: int, load: np.ndarray, dropped: np.ndarray) -> list[str]:
    """Takes a step's load [L, E] and share dropped [L] in. Returns lines to say, most often none.

    Layers that collapse at the same step are one line.
    """
    lines = []
    for name, values in alarm_values(load, dropped, self._top_k).items():
      layers = []
      for layer, value in enumerate(values):
        if self._is_new(step, name, layer, value):
          amount = f'{value:.0f} of {load.shape[1]}' if name == 'idle' else f'{value:.0%}'
          layers.append(f'layer {layer} ({amount})')
      if layers:
        kind = ALARM_KINDS[name]
        lines.append(
          f'ALARM after step {step}, for {STEPS_UNTIL_ALARM} steps or more: {kind.says}: '
          f'{", ".join(layers)}. Remedy: {kind.remedy}'
        )
    return lines

  def _is_new(self, step: int, name: str, layer: int, value: float) -> bool:
    # Whether a layer's alarm has lasted, and was not told yet.
    kind, key = ALARM_KINDS[name], (name, layer)
    limit = kind.ends if key in self._since else kind.begins
    if not value >= limit:  # also of NaN, in a step without a token
      self._since.pop(key, None)
      self._told.discard(key)
      return False
    has_lasted = step - self._since.setdefault(key, step) >= STEPS_UNTIL_ALARM
    if not has_lasted or key in self._told:
      return False
    self._told.add(key)
    return True
