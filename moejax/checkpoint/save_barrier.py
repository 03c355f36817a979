"""Where the processes of a run meet while they save in the background.

A process that cannot come says so, and the others do not wait for it.
"""

import itertools

import jax
from jax._src import distributed

FAILED_WAIT_MS = (
  600_000  # milliseconds that a process which failed waits for others, which still write
)
_count = itertools.count(1)  # of saves; alike in all processes, because they save alike


class Barrier:
  """The two barriers of a save: after all files are written, and after the rename.

  With one process neither waits.
  """

  def __init__(self) -> None:
    self._name = ''  # of the save in flight
    self._meetings_left = 0  # of the save in flight; 0: there is none, or it is called off
    self._client = distributed.global_state.client  # None where the process is alone

  def begin(self) -> None:
    """Begins a save; every process calls it."""
    self._name = f'moejax/save/{next(_count)}'
    self._meetings_left = 2

  def meet(self, key: str, timeout_ms: int) -> None:
    """Waits for the other processes; Orbax calls it in a thread of its own.

    Args:
      key: Orbax's name of the meeting, which a process that fails before it does not know.
      timeout_ms: how long to wait.

    Raises:
      RuntimeError: another process has failed.
    """
    del key  # ours are numbered instead
    self._arrive(timeout_ms)
    if self._client.key_value_dir_get(f'{self._name}/failed/'):
      self._meetings_left = 0
      raise RuntimeError('another process failed')

  def call_off(self) -> None:
    """Tells the processes that wait for this one that it has failed.

    Not to be called while Orbax's thread runs.
    """
    if self._meetings_left and self._client:
      # Before it arrives: whoever is let through must see it.
      self._client.key_value_set(f'{self._name}/failed/{jax.process_index()}', '')
      self._arrive(FAILED_WAIT_MS)
    self._meetings_left = 0

  def _arrive(self, timeout_ms: int) -> None:
    """Waits at the next meeting until all processes have come."""
    self._meetings_left -= 1
    self._client.wait_at_barrier(f'{self._name}/{self._meetings_left}', timeout_ms)
