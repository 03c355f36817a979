"""The probes of a run, kept at every validation.

  probe of the step -> its file -> churn since the one before, saturation by the last

Letters: K experts per token, L MoE layers, T tokens of the probe.
"""

import contextlib
import logging
import os
import pathlib

import numpy as np

from moejax.appended import spared
from moejax.probe import agreement

log = logging.getLogger(__name__)


class Probes:
  """One file a validation, DIRECTORY/STEP.npz. Opened at the step that a run goes on from: later ones are deleted, and
  those that cannot be read."""

  def __init__(self, directory: str | os.PathLike, step: int) -> None:
    self._directory = pathlib.Path(directory)
    self._directory.mkdir(parents=True, exist_ok=True)
    for path in [*self._directory.glob('*.new'), *(self._path(later) for later in self.steps() if later > step)]:
      path.unlink()
    for damaged in [earlier for earlier in self.steps() if not self._is_whole(earlier)]:
      log.warning('%s is damaged: deleted, and what it told of this step is lost', self._path(damaged))
      self._path(damaged).unlink()

  def steps(self) -> list[int]:
    """Of which there is a probe, oldest first."""
    return sorted(int(path.stem) for path in self._directory.glob('*.npz') if path.stem.isdecimal())

  def record(self, step: int, probe: np.ndarray) -> dict[str, np.ndarray]:
    """Keeps a probe [L, T, K]. -> churn [L], the share of copies whose expert the token did not have in the probe
    before this one, as a dict; the first probe has none."""
    new = self._path(step).with_suffix('.new')
    with spared(self._directory):
      with open(new, 'wb') as file:
        np.savez_compressed(file, expert_ids=probe)
        file.flush()
        os.fsync(file.fileno())
      new.replace(self._path(step))
    new.unlink(missing_ok=True)   # there was no room for it
    before = [earlier for earlier in self.steps() if earlier < step]
    return {'churn': 1 - agreement(probe, self._read(before[-1]))} if before else {}

  def saturation(self) -> dict[int, np.ndarray]:
    """Of each probe but the last, the share of copies that already went where the last one's go. step -> [L]."""
    *earlier, last = self.steps() or [0]
    return {step: agreement(self._read(step), self._read(last)) for step in earlier}

  def _path(self, step: int) -> pathlib.Path:
    return self._directory / f'{step}.npz'

  def _is_whole(self, step: int) -> bool:
    with contextlib.suppress(Exception):   # of a damaged archive anything may come
      return self._read(step).ndim == 3
    return False

  def _read(self, step: int) -> np.ndarray:
    with np.load(self._path(step)) as file:
      return file['expert_ids']
