"""The parameters of a model as the tensors of published files, each made when it is written.

plan_export(...).made_of, {path: leaf} -> tensor_specs(...) -> safetensors.directory.write_tensors
"""

import functools
import re
from collections.abc import Mapping

import numpy as np

from moejax.families.schema.family import Family
from moejax.families.schema.tensor_names import file_shapes, must_be_zero, to_file
from moejax.hf.safetensors.file import DTYPES, Spec
from moejax.hf.weights import MadeOf


def tensor_specs(
  made_of: MadeOf,
  leaves: Mapping[str, np.ndarray],
  again: Mapping[str, str],
  dtypes: Mapping[str, str],
) -> list[Spec]:
  """Returns all tensors of the files, in the order of their layers.

  Args:
    made_of: from `families.schema.tensor_names.tensors`.
    leaves: path -> the whole leaf, as a view of where it lies.
    again: from `repeated`, or a part of it.
    dtypes: name -> a row of safetensors.file.DTYPES.
  """
  # Name -> how -> (path, index): a tensor is made of one leaf, or of the two that share it.
  parts: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
  for path, pieces in made_of.items():
    for piece in pieces:
      parts.setdefault(piece.name, {})[piece.how] = path, piece.index
  shapes = file_shapes(made_of)

  def make(name: str, dtype: str) -> np.ndarray:
    ours = {how: leaves[path][index] for how, (path, index) in parts[name].items()}
    return to_file(ours).astype(DTYPES[dtype], copy=False)

  sources = {name: name for name in parts} | dict(again)
  specs: list[Spec] = []
  for name in sorted(sources, key=by_number):
    source, dtype = sources[name], dtypes[name]
    specs.append(Spec(name, shapes[source], dtype, functools.partial(make, source, dtype)))
  return specs


def by_number(name: str) -> str:
  """Returns a key that sorts 'layers.10' behind 'layers.9', so that a shard has whole layers."""
  return re.sub(r'\d+', lambda number: number[0].zfill(6), name)


def lost_leaves(
  known: Family, config: Mapping[str, object], made_of: MadeOf, leaves: Mapping[str, np.ndarray]
) -> list[str]:
  """Returns a problem for each leaf that an export would lose without a word.

  Files do not hold it, readers take it for zero, and it is not zero.
  """
  zero = tuple(must_be_zero(known.names, config))
  return [
    f'{path} is not zero, and files of model_type={config["model_type"]!r} cannot hold it: '
    'choose a family whose files do'
    for path in made_of
    if not made_of[path] and path.endswith(zero) and leaves[path].any()
  ]
