"""metrics.jsonl and load.jsonl: a JSON object a line, cut back where a run goes on."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jax import Array

from moejax.runtime.append_log import AppendLog
from moejax.runtime.files import write_whole


class MetricsLog:
  """A file of JSON objects, one a line, each with a `step`; see `as_json`.

  Opened at the step that a run goes on from. Lines of later steps, which the run will write again,
  are cut away, and so is what is no line: the one that a killed process was writing.
  """

  def __init__(self, path: str | os.PathLike, step: int) -> None:
    self._path = Path(path)
    lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
    earlier = [line for line in lines if line.endswith(b'\n') and _step(line) <= step]
    # Replaced as a whole and never cut in place: killed here, the file is the old one or the new.
    if earlier != lines:
      write_whole(self._path, b''.join(earlier))
    self._file = AppendLog(self._path)

  def write(self, row: Mapping[str, object]) -> None:
    """Adds a line. When it returns the line has left the process: no kill takes it back.

    On a full disk the line is lost.
    """
    self._file.write(as_json(row).encode() + b'\n')

  def rows(self) -> list[dict[str, object]]:
    """The rows of all lines, those of earlier processes too."""
    return [json.loads(line) for line in self._path.read_text(encoding='utf-8').splitlines()]

  def close(self) -> None:
    """Closes the file; every line is in it already."""
    self._file.close()


def _step(line: bytes) -> float:
  # inf, later than any step, of what is no row.
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError, TypeError):
    return math.inf


def as_json(value: object, indent: int | None = None) -> str:
  """The value as JSON. NaN and infinities are null: JSON has none. Arrays are lists."""
  return json.dumps(_finite(value), allow_nan=False, indent=indent)


def _finite(value: object) -> object:
  if isinstance(value, Mapping):
    return {key: _finite(v) for key, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(v) for v in value]
  if isinstance(value, (np.ndarray, np.generic, Array)):
    return _finite(value.tolist())
  return None if isinstance(value, float) and not math.isfinite(value) else value
