"""Checkpoints that can be trusted: verified when read, walked back to the newest good step.

save(step, tree) -> DIR/step/{state: path -> array, by Orbax; meta: JSON} -> restore(target)
A flipped bit in an array file restores without an error, and wrong: what was not verified is not
believed.
"""

import contextlib
import dataclasses
import importlib.metadata
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import jax

from moejax.checkpoint.fingerprint import Compared, accept_problem, expect_same
from moejax.checkpoint.manifest import Meta, digests
from moejax.checkpoint.reader import NOT_DAMAGE, meta_everywhere, meta_in, read_leaves
from moejax.checkpoint.saved_dtypes import as_saved, as_wanted
from moejax.checkpoint.steps import Steps, steps_to_keep
from moejax.checkpoint.stored_leaves import StoredLeaves, open_leaves
from moejax.checkpoint.writer import Writer
from moejax.config import ConfigError, check
from moejax.runtime.multiprocess import broadcast_from_first
from moejax.sharding.tree import flatten, kinds

T = TypeVar('T')
R = TypeVar('R')
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When to save, and which steps to keep."""

  every: int = 100  # steps
  keep_latest: int = 2  # two, so that one damaged file costs few steps
  keep_every: int = 0  # also every step divisible by this; 0: none
  keep_best: bool = True  # also the step of the lowest metric
  accept: str = ''  # what may differ from the checkpoint's, such as data,seed; see fingerprint.py

  def __post_init__(self) -> None:
    lowest = {'every': 1, 'keep_latest': 1, 'keep_every': 0}
    values = {name: getattr(self, name) for name in lowest}
    check(
      accept_problem(self.accept),
      *(
        f'{name}={value} is below {lowest[name]}; give {lowest[name]} or more'
        for name, value in values.items()
        if value < lowest[name]
      ),
    )


class NoLoadableCheckpoint(RuntimeError):
  """There are checkpoints and none can be loaded: starting from scratch would bury them."""


class Restored(NamedTuple, Generic[T]):
  """What comes of a checkpoint."""

  step: int
  tree: T  # with the structure and the shardings of the target
  meta: Meta


class Checkpoints:
  """The checkpoints in a directory, for one writer or any number of readers.

  The writer holds the lock of the run directory, see `lock.py`. A reader makes and deletes nothing.
  """

  def __init__(
    self, directory: str | os.PathLike, cfg: CheckpointConfig, readonly: bool = False
  ) -> None:
    """Opens the directory, which a writer makes and cleans up.

    Args:
      directory: of the steps.
      cfg: which steps to keep, and what may differ from a checkpoint.
      readonly: whether this is a reader, which must not save.
    """
    self.steps = Steps(directory, ('state', 'meta'))
    self._cfg = cfg
    self._metrics: dict[int, float] = {}  # step -> metric of the steps on the disk
    self._bad: list[int] = []  # steps that `restore` passed over, the newest first
    if not readonly:
      self.steps.directory.mkdir(parents=True, exist_ok=True)
      self._writer = Writer(self.steps)

  def save(
    self, step: int, tree: object, fingerprint: Mapping[str, str], metric: float = math.inf
  ) -> None:
    """Starts a save, and returns when the arrays may be donated.

    How the save ended, the next call tells of `save`, `check` or `close`.

    Args:
      step: of the run; it must be newer than all steps on the disk but the bad ones.
      tree: of jax.Arrays; its paths are stored, see `flatten`.
      fingerprint: of data and model, see fingerprint.py.
      metric: lower is better; inf: not measured.

    Raises:
      SaveFailed: the save before this one failed.
    """
    self.check(wait=True)
    newest = max(set(self.steps.all()) - set(self._bad), default=-1)
    if newest >= step:
      raise ValueError(f'step={step} is not after {newest}, the newest in {self.steps.directory}')
    while self._bad:  # only now: a run that dies before its first save leaves the evidence
      self.steps.delete(self._bad.pop())
    leaves = flatten(tree)
    meta = Meta(
      metric=metric,
      fingerprint=dict(fingerprint),
      versions={name: importlib.metadata.version(name) for name in ('jax', 'orbax-checkpoint')},
      kinds=kinds(leaves),
      digests=digests(leaves),
    )
    self._writer.start(step, leaves, meta)

  def check(self, wait: bool = False) -> None:
    """Raises SaveFailed, once, if the last save failed; deletes the steps that need not be kept.

    wait: whether to wait for the save in flight.
    """
    self._writer.check(wait)
    steps = [step for step in self.steps.all() if step not in self._bad]
    known = self._metrics
    self._metrics = {step: known[step] if step in known else self._metric(step) for step in steps}
    cfg = self._cfg
    keep = steps_to_keep(self._metrics, cfg.keep_latest, cfg.keep_every, cfg.keep_best)
    for step in set(steps) - keep:
      self.steps.delete(step)

  def close(self) -> None:
    """Waits for the save in flight and ends its threads; raises SaveFailed as `check` does."""
    self.check(wait=True)
    self._writer.close()

  def expect_same_run(self, target: object, fingerprint: Mapping[str, str]) -> int:
    """Returns the newest step, good or bad, and -1 where there is none.

    All processes call it, before they compile: it reads no array, and tells in a second what
    `restore` would tell in the end. Damage is left for `restore` to find.

    Args:
      target: arrays or ShapeDtypeStructs, as for `restore`.
      fingerprint: of this run.

    Raises:
      ConfigError: the step is of another config.
    """
    step = broadcast_from_first(max(self.steps.all(), default=-1))
    if step >= 0:
      path = self.steps.path(step)
      try:
        meta = meta_everywhere(path)
      except Exception:  # damage may raise anything
        return step
      self._compare(path, meta, flatten(target), fingerprint)
    return step

  def restore(
    self,
    target: T,
    fingerprint: Mapping[str, str],
    only: tuple[str, ...] = ('',),
    keep_dtypes: bool = False,
  ) -> Restored[T] | None:
    """Returns the newest step that verifies, or None where there is no checkpoint at all.

    All processes call it, and restore the same step.

    Args:
      target: arrays or ShapeDtypeStructs, with the shardings that the arrays are to have.
      fingerprint: of this run; {}: not compared.
      only: what the paths of the wanted leaves begin with, all of which the target has.
      keep_dtypes: whether parameters that were saved in bfloat16 stay in it.

    Raises:
      ConfigError: the checkpoint is of another config. That is no reason to walk back.
      NoLoadableCheckpoint: there are steps, and none verifies.
    """

    def read(step: int) -> Restored[T]:
      wanted = flatten(target)
      leaves, meta = self._read(step, wanted, fingerprint, only)
      if not keep_dtypes:
        leaves = [as_wanted(leaf, like.dtype) for leaf, like in zip(leaves, wanted.values())]
      return Restored(step, jax.tree.unflatten(jax.tree.structure(target), leaves), meta)

    return self._newest_good(read)

  def read_in_parts(self, target: object, use: Callable[[int, StoredLeaves], R]) -> R | None:
    """Returns what `use` makes of the newest step that verifies; None where there is none at all.

    All processes call it.

    Args:
      target: ShapeDtypeStructs of the leaves that may be read.
      use: of the step and its leaves, which it verifies; called again of an older step where that
        raises Damaged.

    Raises:
      ConfigError: the checkpoint is of another config, or `use` raised it.
      NoLoadableCheckpoint: there are steps, and none verifies.
    """
    wanted = flatten(target)

    def read(step: int) -> R:
      path = self.steps.path(step)
      meta = meta_everywhere(path)
      saved = {leaf: kind for leaf, kind in meta.kinds.items() if leaf in wanted}
      found, _ = self._compare(path, meta._replace(kinds=saved), wanted, {})
      with open_leaves(path / 'state', kinds(found), meta.digests) as leaves:
        return use(step, leaves)

    return self._newest_good(read)

  def _newest_good(self, read: Callable[[int], R]) -> R | None:
    """Returns what comes of the newest step that can be read, see `restore`."""
    bad: list[int] = []
    while True:
      # The first process decides: others might see a step that it does not.
      step = broadcast_from_first(max(set(self.steps.all()) - set(bad), default=-1))
      if step < 0:
        break
      try:
        result = read(step)
      except (ConfigError, *NOT_DAMAGE):
        raise  # an older step would not help
      except Exception as error:  # Orbax raises anything
        # A step that is gone was deleted by the writer while we read: there are newer ones.
        if broadcast_from_first(self.steps.path(step).exists()):
          kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
          log.warning('checkpoint %d is damaged, trying an older one: %s%s', step, kind, error)
          bad.append(step)
      else:
        self._bad = bad
        return result
    if bad:
      raise NoLoadableCheckpoint(
        f'{self.steps.directory}: none of {bad} loads; mend one, or move all away'
      )
    return None

  def _read(
    self,
    step: int,
    wanted: Mapping[str, jax.Array],
    fingerprint: Mapping[str, str],
    only: tuple[str, ...],
  ) -> tuple[list[jax.Array], Meta]:
    """Returns the wanted leaves of a step; raises some exception or other where it is damaged."""
    path = self.steps.path(step)
    meta = meta_everywhere(path)
    saved = {leaf: kind for leaf, kind in meta.kinds.items() if leaf.startswith(only)}
    found, accepted = self._compare(path, meta._replace(kinds=saved), wanted, fingerprint)
    leaves = read_leaves(path / 'state', found, meta.digests)
    for line in accepted:  # only now: a step that is damaged is not gone on from
      log.warning('accepted: %s', line)
    return leaves, meta

  def _compare(
    self,
    path: Path,
    meta: Meta,
    wanted: Mapping[str, jax.Array],
    fingerprint: Mapping[str, str],
  ) -> tuple[dict[str, jax.ShapeDtypeStruct], list[str]]:
    """Returns what to read, and what was accepted; raises ConfigError for all else that differs."""
    found = as_saved(wanted, meta.kinds)
    accepted = expect_same(
      str(path),
      Compared(meta.kinds, kinds(found)),  # Orbax would silently cast to another dtype
      Compared(meta.fingerprint, fingerprint or meta.fingerprint),
      self._cfg.accept,
    )
    return found, accepted

  def _metric(self, step: int) -> float:
    """Returns the metric of a step on the disk, inf where it cannot be read."""
    with contextlib.suppress(Exception):  # damage is for restore to tell
      return meta_in(self.steps.path(step)).metric
    return math.inf
