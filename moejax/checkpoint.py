"""Checkpoints that can be trusted: verified when read, walked back to the newest good step.

save(step, tree) -> DIR/step/{state: path -> array, by Orbax; meta: JSON} -> restore(target)
A flipped bit in an array file restores without an error and wrong: believe nothing that was not verified.
"""
import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
import jax.numpy as jnp

from moejax.config import ConfigError, check
from moejax.faults import pass_by
from moejax.manifest import Meta, differences, digest, digests, flatten, kinds, seal, unseal
from moejax.rundir import RunInUse, Steps, kept, lock

__all__ = ['CheckpointConfig', 'Checkpoints', 'Meta', 'NoLoadableCheckpoint', 'RunInUse', 'SaveFailed',
           'digest', 'digests', 'lock']
T = TypeVar('T')
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When to save and what to keep: two at least of the latest, so that one damaged file costs few steps."""
  every: int = 100
  keep_latest: int = 2
  keep_every: int = 0  # also every step divisible by this; 0: none
  keep_best: bool = True

  def __post_init__(self) -> None:
    check(*(f'{name}={vars(self)[name]} is below {n}; give {n} or more'
            for name, n in {'every': 1, 'keep_latest': 1, 'keep_every': 0}.items() if vars(self)[name] < n))


class NoLoadableCheckpoint(RuntimeError):
  """Checkpoints exist and none can be loaded: starting from scratch would bury them."""


class SaveFailed(RuntimeError):
  """A save did not reach the disk; what it left is removed, and the next one may go well."""


class Checkpoints:
  """The checkpoints in a directory. The writer holds `lock`; a reader (readonly) makes and deletes nothing.

  On Orbax's AsyncCheckpointer, not its CheckpointManager: that one believes any directory with an integer
  name, lets a NaN be the best, and deletes in place, so that half a step stays when it is killed there.
  """

  def __init__(self, directory: str | os.PathLike, cfg: CheckpointConfig, readonly: bool = False) -> None:
    import orbax.checkpoint  # here: it is a quarter of the time that importing moejax may take
    self._orbax, self.steps = orbax.checkpoint, Steps(directory, ('state', 'meta'))
    self._keep = cfg.keep_latest, cfg.keep_every, cfg.keep_best
    self._metrics: dict[int, float] = {}
    self._bad: list[int] = []
    if not readonly:
      self.steps.directory.mkdir(parents=True, exist_ok=True)
      self._saver = orbax.checkpoint.AsyncCheckpointer(orbax.checkpoint.CompositeCheckpointHandler())
      self.steps.clean()

  def meta(self, step: int) -> Meta:
    """What is known of a step without its arrays; some exception or other where that is damaged."""
    return unseal((self.steps.path(step) / 'meta' / 'metadata').read_text())

  def save(self, step: int, tree: object, fingerprint: Mapping[str, str], metric: float = math.inf) -> None:
    """Starts a save and returns when the arrays may be donated; `check` and `close` tell how it ended."""
    self.check(wait=True)
    if (newest := max({*self.steps.all()} - {*self._bad}, default=-1)) >= step:
      raise ValueError(f'step={step} is not after {newest}, the newest in {self.steps.directory}')
    while self._bad:  # only now: a run that dies before its first save leaves the evidence
      self.steps.delete(self._bad.pop())
    leaves, args = flatten(tree), self._orbax.args
    versions = {'jax': jax.__version__, 'orbax': self._orbax.__version__}
    meta = Meta(metric, dict(fingerprint), versions, kinds(leaves), digests(leaves))
    full = {path: leaf for path, leaf in leaves.items() if leaf.size}  # Orbax refuses empty arrays
    pieces = dict.fromkeys(full, self._orbax.SaveArgs(chunk_byte_size=1 << 26))  # or Orbax encodes large leaves whole
    with self._save_errors():
      self._saver.save(self.steps.path(step), args=args.Composite(
        state=args.PyTreeSave(full, pieces, ocdbt_target_data_file_size=1 << 27), meta=args.JsonSave(seal(meta))))
      pass_by('save')

  def check(self, wait: bool = False) -> None:
    """Raises SaveFailed, once, if the last save failed; deletes what need not be kept."""
    with self._save_errors():
      (self._saver.wait_until_finished if wait else self._saver.check_for_errors)()
    steps = [step for step in self.steps.all() if step not in self._bad]
    self._metrics = {s: self._metrics[s] if s in self._metrics else self._metric(s) for s in steps}
    for step in set(steps) - kept(self._metrics, *self._keep):
      self.steps.delete(step)

  def close(self) -> None:
    """Waits for the save in flight; raises SaveFailed as `check` does."""
    self.check(wait=True)
    self._saver.close()

  def restore(self, target: T, fingerprint: Mapping[str, str], only: tuple[str, ...] = ('',)
              ) -> tuple[int, T, Meta] | None:
    """The newest step that verifies, with the target's shardings; None where there is no checkpoint at all.

    `target`: arrays or ShapeDtypeStructs, of the paths that begin with one of `only`. An empty fingerprint is
    not compared. ConfigError where it is of another config: no reason to walk back. NoLoadableCheckpoint.
    """
    wanted, bad = flatten(target), []
    for step in reversed(self.steps.all()):
      try:
        meta = self.meta(step)
        old = {path: kind for path, kind in meta.kinds.items() if path.startswith(only)}
        problems = differences('', old, kinds(wanted))  # Orbax would cast to another dtype without a word
        problems += differences('data ', meta.fingerprint, fingerprint) if fingerprint else []
        if problems:
          raise ConfigError(f'{self.steps.path(step)}: another config; give it or a new workdir', *problems)
        leaves = self._load(step, wanted, meta)
      except (ConfigError, MemoryError, jax.errors.JaxRuntimeError):
        raise  # not the checkpoint's fault
      except Exception as error:
        reason = f'{type(error).__name__}: {" ".join(str(error.__cause__ or error).split())[:300]}'
        log.warning('checkpoint %d is damaged, trying an older one: %s', step, reason)
        bad.append(step)
      else:
        self._bad = bad
        return step, jax.tree.unflatten(jax.tree.structure(target), leaves), meta
    if bad:
      raise NoLoadableCheckpoint(f'{self.steps.directory}: none of {bad} loads; mend one, or move all away')
    return None

  def _load(self, step: int, wanted: Mapping[str, jax.Array], meta: Meta) -> list[jax.Array]:
    home = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    item = {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or home) for p, x in wanted.items()}

    def load(path: str) -> jax.Array:
      x, only = item[path], {path: item[path]}
      if not x.size:
        return jnp.zeros(x.shape, x.dtype, device=x.sharding)
      how = self._orbax.checkpoint_utils.construct_restore_args(only)
      args = self._orbax.args.PyTreeRestore(only, how, partial_restore=True)
      return self._orbax.PyTreeCheckpointHandler().restore(self.steps.path(step) / 'state', args=args)[path]

    with ThreadPoolExecutor() as pool:  # Orbax is loud of the others when one fails
      loaded = dict(zip(item, pool.map(load, item)))
    if wrong := [path for path, value in digests(loaded).items() if value != meta.digests[path]]:
      raise ValueError(f'leaf {", ".join(wrong)} does not match its digest')
    return [*loaded.values()]

  def _metric(self, step: int) -> float:
    with contextlib.suppress(Exception):  # damage is for restore to tell
      return self.meta(step).metric
    return math.inf

  @contextlib.contextmanager
  def _save_errors(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      self.steps.clean()
      raise SaveFailed(f'{self.steps.directory}: {type(error).__name__}: {error}') from error
