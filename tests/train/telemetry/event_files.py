"""What TensorBoard itself reads of a directory of event files."""

from pathlib import Path


def events(directory: Path) -> object:
  # The server's reader; `event_accumulator` beside it is for scripts.
  from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

  found = EventAccumulator(str(directory), tensor_size_guidance={'scalars': 0})
  found.Reload()
  return found


def series(found: object, tag: str) -> list[tuple[int, float]]:
  from tensorboard.util.tensor_util import make_ndarray

  return [(e.step, float(make_ndarray(e.tensor_proto))) for e in found.Tensors(tag)]
