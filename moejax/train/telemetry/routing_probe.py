"""Do routers still change their minds? The experts of one fixed batch of held-out text, and how far two such agree.

Letters: B batch, S sequence, E experts, K experts per token, L MoE layers, T tokens of the probe.
"""

import contextlib
import logging
import os
import pathlib

import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.runtime.append_log import warn_once
from moejax.runtime.files import whole_file

TOKENS = (
  4096  # of the batch's first rows, one row at least: of a large run a batch would fill the disk
)
NOBODY = 2**16 - 1  # in place of an expert


def compact(expert_ids: Array, mask: Array, num_experts: int) -> Array:
  """[L, B, S, K] as a model gave them, and [B, S], tokens that count -> the probe [L, T, K] u16."""
  rows = max(1, TOKENS // mask.shape[1])
  ids = expert_ids[:, :rows]
  ids = jnp.where(mask[:rows, :, None] & (ids < num_experts), ids, NOBODY)
  return ids.reshape(len(ids), -1, ids.shape[-1]).astype(jnp.uint16)


def agreement(probe: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Of the probe's copies, the share whose expert is one of the same token's experts in the other. [L, T, K] -> [L]."""
  experts = 1 + int(max(np.max(ids, where=ids != NOBODY, initial=0) for ids in (probe, other)))
  shares = []
  for ids, others in zip(np.minimum(probe, experts), np.minimum(other, experts), strict=True):
    among = np.zeros(
      (len(others), experts + 1), bool
    )  # NOBODY is now the column after the last expert
    np.put_along_axis(among, others.astype(int), True, axis=1)
    among[:, experts] = False
    copies = (ids < experts).sum()
    shares.append(
      np.take_along_axis(among, ids.astype(int), axis=1).sum() / copies if copies else 1.0
    )
  return np.array(shares)


log = logging.getLogger(__name__)


class Probes:
  """One file a validation, DIRECTORY/STEP.npz. Opened at the step that a run goes on from: later ones are deleted, and
  those that cannot be read."""

  def __init__(self, directory: str | os.PathLike, step: int) -> None:
    self._directory = pathlib.Path(directory)
    self._directory.mkdir(parents=True, exist_ok=True)
    for path in [
      *self._directory.glob('*.tmp'),
      *(self._path(later) for later in self.steps() if later > step),
    ]:
      path.unlink()
    for damaged in [earlier for earlier in self.steps() if not self._is_whole(earlier)]:
      log.warning(
        '%s is damaged: deleted, and what it told of this step is lost', self._path(damaged)
      )
      self._path(damaged).unlink()

  def steps(self) -> list[int]:
    """Of which there is a probe, oldest first."""
    return sorted(int(path.stem) for path in self._directory.glob('*.npz') if path.stem.isdecimal())

  def record(self, step: int, probe: np.ndarray) -> dict[str, np.ndarray]:
    """Keeps a probe [L, T, K]. -> churn [L], the share of copies whose expert the token did not have in the probe
    before this one, as a dict; the first probe has none."""
    with warn_once(self._directory), whole_file(self._path(step)) as file:
      np.savez_compressed(file, expert_ids=probe)
    before = [earlier for earlier in self.steps() if earlier < step]
    return {'churn': 1 - agreement(probe, self._read(before[-1]))} if before else {}

  def saturation(self) -> dict[int, np.ndarray]:
    """Of each probe but the last, the share of copies that already went where the last one's go. step -> [L]."""
    *earlier, last = self.steps() or [0]
    return {step: agreement(self._read(step), self._read(last)) for step in earlier}

  def _path(self, step: int) -> pathlib.Path:
    return self._directory / f'{step}.npz'

  def _is_whole(self, step: int) -> bool:
    with contextlib.suppress(Exception):  # of a damaged archive anything may come
      return self._read(step).ndim == 3
    return False

  def _read(self, step: int) -> np.ndarray:
    with np.load(self._path(step)) as file:
      return file['expert_ids']
