"""The save in flight: leaves are written while training goes on, and get their name at the end.

It uses Orbax's AsyncCheckpointer and not its CheckpointManager. That one believes any directory
with an integer name, lets a NaN be the best, and deletes in place: when it is killed there, half a
step stays.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping

import jax

from moejax.checkpoint.manifest import Meta, seal
from moejax.checkpoint.orbax_path import plain_path
from moejax.checkpoint.reader import expect_readable
from moejax.checkpoint.save_barrier import Barrier
from moejax.checkpoint.steps import Steps
from moejax.runtime.faults import fault_point
from moejax.runtime.multiprocess import fail_together

CHUNK_BYTES = 1 << 26  # at most
SMALL_CHUNK_BYTES = 1 << 20  # smaller ones cost more than they are worth


class SaveFailed(RuntimeError):
  """The save of `step` did not reach the disk.

  What it left is removed, and the next save may go well.
  """

  def __init__(self, reason: str, step: int = 0) -> None:
    """Makes the error.

    Args:
      reason: the message.
      step: that was not saved; 0 where that is not known.
    """
    super().__init__(reason)
    self.step = step


class Writer:
  """Writes steps, one at a time. Every process calls it alike."""

  def __init__(self, steps: Steps) -> None:
    """Removes what earlier processes left in the directory, and starts Orbax's threads."""
    # Not at the top: it is a quarter of the time that importing moejax may take.
    import orbax.checkpoint as ocp

    self._orbax = ocp
    self._steps = steps
    self._step = 0  # the last that was begun
    self._leaves: tuple[str, ...] = ()  # paths of those that it was given
    self._held = contextlib.ExitStack()
    self._directory = self._held.enter_context(plain_path(steps.directory))
    self._alone = jax.process_count() == 1
    self._barrier = Barrier()
    self._failures: list[Exception] = []  # that `check` has seen and not yet raised
    logging.getLogger('absl').addFilter(_is_news)
    options = ocp.AsyncOptions(
      post_finalization_callback=self._before_the_rename, barrier_sync_fn=self._barrier.meet
    )
    self._saver = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
    steps.clean()

  def start(self, step: int, leaves: Mapping[str, jax.Array], meta: Meta) -> None:
    """Starts a save, and returns when the arrays may be donated.

    Not to be called while another save is in flight.

    Args:
      step: of the run.
      leaves: path -> array.
      meta: all else of the checkpoint.

    Raises:
      SaveFailed: it could not be started.
    """
    self._steps.clean()  # what a failed save still wrote after it was reported
    args = self._orbax.args
    full = {path: leaf for path, leaf in leaves.items() if leaf.size}  # Orbax refuses empty arrays
    self._step, self._leaves = step, tuple(full)
    # Without a size Orbax encodes large leaves whole.
    save_args = {
      path: self._orbax.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=layer_axes(leaf))
      for path, leaf in full.items()
    }
    state = args.PyTreeSave(full, save_args, ocdbt_target_data_file_size=1 << 27)
    content = args.Composite(state=state, meta=args.JsonSave(seal(meta)))
    self._barrier.begin()
    with self._save_errors():
      self._saver.save(self._directory / f'{step}', args=content)
      fault_point('save')

  def check(self, wait: bool) -> None:
    """Raises SaveFailed, once, if the last save failed.

    Of several processes it raises in all of them alike, and so only when all wait.

    Args:
      wait: whether to wait for the save in flight.
    """
    if wait or self._alone:
      with self._save_errors():
        if self._failures:
          raise self._failures.pop()
        if wait:
          self._saver.wait_until_finished()
        else:
          self._saver.check_for_errors()
    else:
      try:
        self._saver.check_for_errors()
      except Exception as error:
        # Kept for the next call that waits; the others are told now, or they would wait in vain.
        self._failures.append(error)
        self._barrier.call_off()

  def close(self) -> None:
    """Ends Orbax's threads; nothing is left to be written."""
    self._saver.close()
    self._held.close()

  def _before_the_rename(self) -> None:
    """Reads back what was written; Orbax calls it in its thread, in the first process alone.

    What a reader would not find never gets the name of a step.
    """
    for written in self._steps.unnamed(self._step):
      expect_readable(written, self._leaves)
    fault_point('commit')

  @contextlib.contextmanager
  def _save_errors(self) -> Iterator[None]:
    """Turns any error in the block, in any process, into a SaveFailed in all of them."""
    try:
      with fail_together(Exception):
        try:
          yield
        except Exception:
          # Orbax's thread must have ended before the barrier is called off.
          with contextlib.suppress(Exception):
            self._saver.wait_until_finished()
          self._barrier.call_off()
          raise
    except Exception as error:
      self._steps.clean()
      reason = error.strerror if isinstance(error, OSError) else ''
      if not reason:
        # TensorStore's text: what it did, the reason after a colon, and details in brackets.
        reason = f'{error}'.partition(' [os_error_code')[0].rpartition(': ')[2]
      raise SaveFailed(f'{self._steps.path(self._step)}: {reason}', self._step) from error


def layer_axes(leaf: jax.Array) -> tuple[int, ...]:
  """Returns the axes along which each index has chunks of its own.

  That is the first, of layers, where a stack of matrices is large: whoever reads a layer, as an
  export does, would otherwise read and decode all.
  """
  is_large_stack = leaf.ndim > 2 and leaf.nbytes // leaf.shape[0] >= SMALL_CHUNK_BYTES
  return (0,) if is_large_stack else ()


def _is_news(record: logging.LogRecord) -> bool:
  """Tells whether to log a record; errors of Orbax's threads come out of `check`, in one line."""
  return not (record.exc_info and 'orbax' in record.pathname)
