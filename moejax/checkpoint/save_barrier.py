"""Where the processes of a run meet while they save in the background. One that cannot come says so: nobody waits."""

import itertools

import jax
from jax._src import distributed

PATIENCE = 600_000  # milliseconds; others still write
_count = itertools.count(1)


class Barrier:
  """Orbax meets twice in a save: when all is written, and when all has its name. Alone, nobody is met."""

  def __init__(self) -> None:
    self._name, self._left, self._client = '', 0, distributed.global_state.client

  def begin(self) -> None:
    """A save begins, in every process."""
    self._name, self._left = f'moejax/save/{next(_count)}', 2

  def meet(self, key: str, timeout_ms: int) -> None:
    """Waits for the others, as Orbax asks, in its thread. Raises RuntimeError where one of them has failed."""
    del key  # Orbax's own, which only those know who come
    self._arrive(timeout_ms)
    if self._client.key_value_dir_get(f'{self._name}/failed/'):
      self._left = 0
      raise RuntimeError('another process failed')

  def call_off(self) -> None:
    """This process has failed: whoever waits for it hears so. Not while Orbax's thread runs."""
    if self._left and self._client:
      self._client.key_value_set(f'{self._name}/failed/{jax.process_index()}', '')
      self._arrive(PATIENCE)
    self._left = 0

  def _arrive(self, timeout_ms: int) -> None:
    self._left -= 1
    self._client.wait_at_barrier(f'{self._name}/{self._left}', timeout_ms)
