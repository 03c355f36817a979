"""The parameters of a model as the tensors of published files, each made when it is written.

plan_export(...).made_of, a way to read leaves -> tensor_specs(...) -> safetensors.directory
"""

import functools
import re
from collections.abc import Callable, Mapping

import numpy as np

from moejax.checkpoint.stored_leaves import WHOLE, StoredLeaves
from moejax.families.schema.family import Family
from moejax.families.schema.tensor_names import file_shapes, must_be_zero, to_file
from moejax.hf.safetensors.file import DTYPES, Spec
from moejax.hf.weights import MadeOf
from moejax.runtime.multiprocess import is_first_process

# Path of a leaf, index of its first axes, and whether this is the one time that this part is read
# which counts for the leaf's digest -> the part.
ReadPart = Callable[[str, tuple[int, ...], bool], np.ndarray]


class StoredParts:
  """Reads parts of leaves of a checkpoint, a layer of a leaf at a time.

  The layer that was read last is kept: the next expert is usually of the same.
  """

  def __init__(self, stored: StoredLeaves, stored_paths: Mapping[str, str]) -> None:
    """`stored_paths` says under which path of the checkpoint each leaf lies."""
    self._stored, self._stored_paths = stored, stored_paths
    self._kept: tuple[str, int, np.ndarray] = '', WHOLE, np.empty(0)

  def read(self, path: str, index: tuple[int, ...], counts: bool) -> np.ndarray:
    """Returns the part of a leaf at an index, see ReadPart; () is the whole leaf."""
    layer, within = (index[0], index[1:]) if index else (WHOLE, ())
    # The layer is counted once, with its first expert.
    is_counted = counts and not any(within)
    if is_counted or self._kept[:2] != (path, layer):
      self._kept = '', WHOLE, np.empty(0)  # or two layers would be in memory
      part = self._stored.read(self._stored_paths[path], layer, is_counted)
      self._kept = path, layer, part
    return self._kept[2][within]


def tensor_specs(
  made_of: MadeOf, read: ReadPart, again: Mapping[str, str], dtypes: Mapping[str, str]
) -> list[Spec]:
  """Returns all tensors of the files, in the order of their layers, and in each of our leaves.

  Args:
    made_of: from `families.schema.tensor_names.tensors`.
    read: gives parts of leaves.
    again: from `repeated`, or a part of it.
    dtypes: name -> a row of safetensors.file.DTYPES.
  """
  # Name -> how -> (path, index): a tensor is made of one leaf, or of the two that share it.
  parts: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
  for path, pieces in made_of.items():
    for piece in pieces:
      parts.setdefault(piece.name, {})[piece.how] = path, piece.index
  shapes = file_shapes(made_of)

  def make(name: str, dtype: str, counts: bool) -> np.ndarray:
    ours = {how: read(path, index, counts) for how, (path, index) in parts[name].items()}
    return to_file(ours).astype(DTYPES[dtype], copy=False)

  def place(name: str) -> tuple[object, ...]:
    # All experts of a leaf's layer one after another: a layer of a leaf is read once.
    return (by_number(layer_prefix(name)), *parts[sources[name]].values())

  sources = {name: name for name in parts} | dict(again)
  specs: list[Spec] = []
  for name in sorted(sources, key=place):
    source, dtype = sources[name], dtypes[name]
    load = functools.partial(make, source, dtype, name == source)
    specs.append(Spec(name, shapes[source], dtype, load))
  return specs


def layer_prefix(name: str) -> str:
  """Returns the beginning of a tensor's name that all tensors of its layer share, or the name."""
  numbered = re.match(r'model\.layers\.\d+\.', name)
  return numbered[0] if numbered else name


def by_number(name: str) -> str:
  """Returns a key that sorts 'layers.10' behind 'layers.9', so that a shard has whole layers."""
  return re.sub(r'\d+', lambda number: number[0].zfill(6), name)


def lost_leaves(
  known: Family, config: Mapping[str, object], made_of: MadeOf, read: ReadPart
) -> list[str]:
  """Returns a problem for each leaf that an export would lose without a word.

  Files do not hold it, readers take it for zero, and it is not zero.
  """
  zero = tuple(must_be_zero(known.names, config))
  return [
    f'{path} is not zero, and files of model_type={config["model_type"]!r} cannot hold it: '
    'choose a family whose files do'
    for path in made_of
    if not made_of[path] and path.endswith(zero) and read(path, (), is_first_process()).any()
  ]
