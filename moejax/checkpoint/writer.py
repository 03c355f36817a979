"""The save in flight: leaves go to the disk while training goes on, and get their name when all of them are there.

On Orbax's AsyncCheckpointer, not its CheckpointManager: that one believes any directory with an integer name, lets a
NaN be the best, and deletes in place: half a step stays when it is killed there.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping

import jax

from moejax.checkpoint.manifest import Meta, seal
from moejax.checkpoint.save_barrier import Barrier
from moejax.checkpoint.steps import Steps
from moejax.runtime.faults import fault_point
from moejax.runtime.multiprocess import fail_together


class SaveFailed(RuntimeError):
  """The save of `step` did not reach the disk; what it left is removed, and the next one may go well."""

  def __init__(self, reason: str, step: int = 0) -> None:
    super().__init__(reason)
    self.step = step


class Writer:
  """Writes steps, one at a time. Every process calls it alike."""

  def __init__(self, steps: Steps) -> None:
    import orbax.checkpoint as ocp  # here: it is a quarter of the time that importing moejax may take

    self._orbax, self._steps, self._step, self._alone = ocp, steps, 0, jax.process_count() == 1
    self._barrier = Barrier()
    self._failures: list[Exception] = []
    logging.getLogger('absl').addFilter(_is_news)
    options = ocp.AsyncOptions(
      post_finalization_callback=lambda: fault_point('commit'), barrier_sync_fn=self._barrier.meet
    )
    self._saver = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
    steps.clean()

  def start(self, step: int, leaves: Mapping[str, jax.Array], meta: Meta) -> None:
    """Returns when the arrays may be donated; not while another save is in flight. Raises SaveFailed."""
    self._steps.clean()  # what a failed one still wrote after it was told
    self._step, args = step, self._orbax.args
    full = {path: leaf for path, leaf in leaves.items() if leaf.size}  # Orbax refuses empty arrays
    pieces = dict.fromkeys(
      full, self._orbax.SaveArgs(chunk_byte_size=1 << 26)
    )  # or Orbax encodes large leaves whole
    self._barrier.begin()
    with self._errors():
      self._saver.save(
        self._steps.path(step),
        args=args.Composite(
          state=args.PyTreeSave(full, pieces, ocdbt_target_data_file_size=1 << 27),
          meta=args.JsonSave(seal(meta)),
        ),
      )
      fault_point('save')

  def check(self, wait: bool) -> None:
    """Raises SaveFailed, once, if the last save failed; of many processes in all, when all wait."""
    if wait or self._alone:
      with self._errors():
        if self._failures:
          raise self._failures.pop()
        (self._saver.wait_until_finished if wait else self._saver.check_for_errors)()
    else:
      try:
        self._saver.check_for_errors()
      except Exception as error:
        self._failures.append(error)
        self._barrier.call_off()

  def close(self) -> None:
    """Nothing is left to be written."""
    self._saver.close()

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    try:
      with fail_together(Exception):
        try:
          yield
        except Exception:
          with contextlib.suppress(Exception):
            self._saver.wait_until_finished()
          self._barrier.call_off()
          raise
    except Exception as error:
      self._steps.clean()
      told = isinstance(error, OSError) and error.strerror
      reason = told or f'{error}'.partition(' [os_error_code')[0].rpartition(': ')[2]
      raise SaveFailed(f'{self._steps.path(self._step)}: {reason}', self._step) from error


def _is_news(record: logging.LogRecord) -> bool:
  """Not the errors of Orbax's threads: they come out of `check`, in one line."""
  return not (record.exc_info and 'orbax' in record.pathname)
