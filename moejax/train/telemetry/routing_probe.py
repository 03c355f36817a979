"""Do routers still change their minds? The experts of one fixed batch of held-out text, and how far
two such probes agree.

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

# Of the batch's first rows, one row at least: of a large run a batch would fill the disk.
TOKENS = 4096
UNASSIGNED = 2**16 - 1  # in place of an expert: a copy of padding, or one that no expert took

log = logging.getLogger(__name__)


def probe_rows(length: int) -> int:
  """Returns of how many rows of `length` tokens a probe is made, where a batch has as many."""
  return max(1, TOKENS // length)


def make_probe(expert_ids: Array, mask: Array, num_experts: int) -> Array:
  """The probe of one batch. [L, T, K] u16, UNASSIGNED where a copy has no expert.

  Args:
    expert_ids: [L, rows, S, K], as a model gave them; an id of E is no expert. Of `probe_rows`, or
      more: the others are not looked at.
    mask: [B, S] bool, the tokens that count.
  """
  rows = probe_rows(mask.shape[1])
  ids = expert_ids[:, :rows]
  ids = jnp.where(mask[:rows, :, None] & (ids < num_experts), ids, UNASSIGNED)
  return ids.reshape(len(ids), -1, ids.shape[-1]).astype(jnp.uint16)


def agreement(probe: np.ndarray, other: np.ndarray) -> np.ndarray:
  """The share of the probe's copies whose expert the same token also has in the other.

  Neither the order of a token's experts counts, nor copies without an expert; 1 where no copy has
  one. [L, T, K] u16 each -> [L].
  """
  layers = zip(probe, other, strict=True)
  return np.array([layer_agreement(ids, others) for ids, others in layers])


def layer_agreement(ids: np.ndarray, others: np.ndarray) -> float:
  """The same for one layer. [T, K] u16 each."""
  experts = 1 + max(largest_expert(ids), largest_expert(others))
  # UNASSIGNED becomes the column after the last expert, which is never among a token's experts.
  ids, others = np.minimum(ids, experts).astype(int), np.minimum(others, experts).astype(int)
  is_expert_of = np.zeros((len(others), experts + 1), bool)
  np.put_along_axis(is_expert_of, others, True, axis=1)
  is_expert_of[:, experts] = False
  copies = (ids < experts).sum()
  agreeing = np.take_along_axis(is_expert_of, ids, axis=1).sum()
  return agreeing / copies if copies else 1.0


def largest_expert(ids: np.ndarray) -> int:
  """The largest expert id; 0 where no copy has an expert."""
  return int(np.max(ids, where=ids != UNASSIGNED, initial=0))


class Probes:
  """The probes of a run, one file a validation: DIRECTORY/STEP.npz.

  Opened at the step that a run goes on from: later ones are deleted, and so are those that cannot
  be read.
  """

  def __init__(self, directory: str | os.PathLike, step: int) -> None:
    self._directory = pathlib.Path(directory)
    self._directory.mkdir(parents=True, exist_ok=True)
    # What a killed process was writing.
    for unfinished in self._directory.glob('*.tmp'):
      unfinished.unlink()
    for recorded in self.steps():
      if recorded > step:
        self._path(recorded).unlink()
      elif not self._is_whole(recorded):
        path = self._path(recorded)
        log.warning('%s is damaged: deleted, and what it told of this step is lost', path)
        path.unlink()

  def steps(self) -> list[int]:
    """The steps of which there is a probe, oldest first."""
    return sorted(int(path.stem) for path in self._directory.glob('*.npz') if path.stem.isdecimal())

  def record(self, step: int, probe: np.ndarray) -> dict[str, np.ndarray]:
    """Writes a probe [L, T, K], and compares it with the one before.

    Returns:
      churn: [L], the share of copies whose expert the token did not have in the probe before this
      one; the first probe has none, and the dict is empty.
    """
    with warn_once(self._directory), whole_file(self._path(step)) as file:
      np.savez_compressed(file, expert_ids=probe)
    before = [earlier for earlier in self.steps() if earlier < step]
    if not before:
      return {}
    return {'churn': 1 - agreement(probe, self._read(before[-1]))}

  def saturation(self) -> dict[int, np.ndarray]:
    """How far routing already was where it ended, at each probe but the last.

    It is the share of that probe's copies that went where the last one's go. step -> [L].
    """
    steps = self.steps()
    if not steps:
      return {}
    *earlier, last = steps
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
