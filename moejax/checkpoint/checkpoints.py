"""Checkpoints that can be trusted: verified when read, walked back to the newest good step.

save(step, tree) -> DIR/step/{state: path -> array, by Orbax; meta: JSON} -> restore(target)
A flipped bit in an array file restores without an error and wrong: believe nothing that was not verified.
"""

import contextlib
import dataclasses
import importlib.metadata
import logging
import math
import os
from collections.abc import Mapping
from typing import TypeVar

import jax

from moejax.checkpoint.fingerprint import accept_problem, expect_same
from moejax.checkpoint.manifest import Meta, digests
from moejax.checkpoint.reader import NOT_DAMAGE, meta_everywhere, meta_in, read_leaves
from moejax.checkpoint.steps import Steps, steps_to_keep
from moejax.checkpoint.writer import Writer
from moejax.config import ConfigError, check
from moejax.runtime.multiprocess import broadcast_from_first
from moejax.sharding.tree import flatten, kinds

T = TypeVar('T')
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When to save and what to keep: two at least of the latest, so that one damaged file costs few steps."""

  every: int = 100
  keep_latest: int = 2
  keep_every: int = 0  # also every step divisible by this; 0: none
  keep_best: bool = True
  accept: str = ''  # what may differ from the checkpoint's, such as data,seed; see fingerprint.py

  def __post_init__(self) -> None:
    check(
      accept_problem(self.accept),
      *(
        f'{name}={vars(self)[name]} is below {n}; give {n} or more'
        for name, n in {'every': 1, 'keep_latest': 1, 'keep_every': 0}.items()
        if vars(self)[name] < n
      ),
    )


class NoLoadableCheckpoint(RuntimeError):
  """Checkpoints exist and none can be loaded: starting from scratch would bury them."""


class Checkpoints:
  """The checkpoints in a directory. The writer holds `lock`; a reader (readonly) makes and deletes nothing."""

  def __init__(
    self, directory: str | os.PathLike, cfg: CheckpointConfig, readonly: bool = False
  ) -> None:
    self.steps = Steps(directory, ('state', 'meta'))
    self._keep, self._accept = (cfg.keep_latest, cfg.keep_every, cfg.keep_best), cfg.accept
    self._metrics: dict[int, float] = {}
    self._bad: list[int] = []
    if not readonly:
      self.steps.directory.mkdir(parents=True, exist_ok=True)
      self._writer = Writer(self.steps)

  def save(
    self, step: int, tree: object, fingerprint: Mapping[str, str], metric: float = math.inf
  ) -> None:
    """Starts a save and returns when the arrays may be donated; `check` and `close` tell how it ended."""
    self.check(wait=True)
    if (newest := max({*self.steps.all()} - {*self._bad}, default=-1)) >= step:
      raise ValueError(f'step={step} is not after {newest}, the newest in {self.steps.directory}')
    while self._bad:  # only now: a run that dies before its first save leaves the evidence
      self.steps.delete(self._bad.pop())
    leaves = flatten(tree)
    versions = {name: importlib.metadata.version(name) for name in ('jax', 'orbax-checkpoint')}
    self._writer.start(
      step, leaves, Meta(metric, dict(fingerprint), versions, kinds(leaves), digests(leaves))
    )

  def check(self, wait: bool = False) -> None:
    """Raises SaveFailed, once, if the last save failed; deletes what need not be kept."""
    self._writer.check(wait)
    steps = [step for step in self.steps.all() if step not in self._bad]
    self._metrics = {s: self._metrics[s] if s in self._metrics else self._metric(s) for s in steps}
    for step in set(steps) - steps_to_keep(self._metrics, *self._keep):
      self.steps.delete(step)

  def close(self) -> None:
    """Waits for the save in flight; raises SaveFailed as `check` does."""
    self.check(wait=True)
    self._writer.close()

  def restore(
    self, target: T, fingerprint: Mapping[str, str], only: tuple[str, ...] = ('',)
  ) -> tuple[int, T, Meta] | None:
    """The newest step that verifies, with the target's shardings; None where there is no checkpoint at all.

    `target`: arrays or ShapeDtypeStructs, of the paths that begin with one of `only`. An empty fingerprint is
    not compared. ConfigError where it is of another config: no reason to walk back. NoLoadableCheckpoint.
    """
    bad: list[int] = []
    while (step := broadcast_from_first(max({*self.steps.all()} - {*bad}, default=-1))) >= 0:
      try:
        leaves, meta = self._read(step, flatten(target), fingerprint, only)
      except (ConfigError, *NOT_DAMAGE):
        raise  # not the checkpoint's fault
      except Exception as error:
        if broadcast_from_first(
          self.steps.path(step).exists()
        ):  # else deleted under a reader: there are newer ones
          reason = (
            f'{error}' if isinstance(error, ValueError) else f'{type(error).__name__}: {error}'
          )
          log.warning('checkpoint %d is damaged, trying an older one: %s', step, reason)
          bad.append(step)
      else:
        self._bad = bad
        return step, jax.tree.unflatten(jax.tree.structure(target), leaves), meta
    if bad:
      raise NoLoadableCheckpoint(
        f'{self.steps.directory}: none of {bad} loads; mend one, or move all away'
      )
    return None

  def _read(
    self,
    step: int,
    target: Mapping[str, jax.Array],
    fingerprint: Mapping[str, str],
    only: tuple[str, ...],
  ) -> tuple[list[jax.Array], Meta]:
    path = self.steps.path(step)
    meta = meta_everywhere(path)
    old = {leaf: kind for leaf, kind in meta.kinds.items() if leaf.startswith(only)}
    accepted = expect_same(
      str(path),
      (old, kinds(target)),  # Orbax would cast to another dtype without a word
      (meta.fingerprint, fingerprint or meta.fingerprint),
      self._accept,
    )
    leaves = read_leaves(path / 'state', target, meta.digests)
    for line in accepted:
      log.warning('accepted: %s', line)
    return leaves, meta

  def _metric(self, step: int) -> float:
    with contextlib.suppress(Exception):  # damage is for restore to tell
      return meta_in(self.steps.path(step)).metric
    return math.inf
