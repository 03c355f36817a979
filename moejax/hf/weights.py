"""A model in published files and the same model as our parameters, streamed both ways, a layer of a leaf at a time.

published(directory) -> Published, every name and shape checked -> load(..., mesh) -> Transformer, router bias
made_of, {path: leaf} -> specs -> moejax.tensors.write_tensors

A stack of layers is never whole in NumPy: zeros lie on the mesh, and each layer is put in its place there.
Letters: L layers, E experts.
"""

import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.config import ConfigError, check
from moejax.families import model_config
from moejax.families.schema.family import Family
from moejax.families.schema.tensor_names import (
  FROM_FILE,
  HARMLESS,
  Tensor,
  copies,
  file_shapes,
  holds_mtp,
  leaves,
  must_be_zero,
  tensors,
  to_file,
)
from moejax.hf.safetensors.directory import Tensors, expect, open_tensors
from moejax.hf.safetensors.file import DTYPES, Index, Spec, slice_bounds
from moejax.model.config import ModelConfig
from moejax.model.transformer import Transformer
from moejax.runtime.files import read_json
from moejax.sharding.params import shardings

FLOATS = ('F32', 'BF16', 'F16')  # what float32 holds to the bit
SMALL = (
  1 << 24
)  # numbers: a leaf of fewer is made at once, which is quicker than a program for its layers
MadeOf = Mapping[str, tuple[Tensor, ...]]
Spans = tuple[tuple[int, int], ...]  # start and stop along each axis

# how -> where in the file lies what our tensor has at an index; see FROM_FILE
IN_FILE: dict[str, Callable[[Index], Index]] = {
  'same': lambda index: index,
  'transposed': lambda index: (*index[:-2], index[-1], index[-2]),
  'even': lambda index: (*index[:-1], slice(2 * index[-1].start, 2 * index[-1].stop)),
  'odd': lambda index: (*index[:-1], slice(2 * index[-1].start, 2 * index[-1].stop)),
}


class Published(NamedTuple):
  """A directory of a model, none of whose tensors is read yet.

  known, cfg: what its config.json says.  made_of: path of each leaf -> its tensors.  copies: what repeats another one.
  """

  directory: Path
  config: dict[str, object]
  known: Family
  cfg: ModelConfig
  tensors: Tensors
  made_of: MadeOf
  copies: dict[str, str]  # name -> name of the tensor that it must equal

  @property
  def nbytes(self) -> int:
    """Of all tensors that `load` reads, each counted once."""
    return sum(
      math.prod(shape) * DTYPES[self.tensors.dtype(name)].itemsize
      for name, shape in file_shapes(self.made_of).items()
    )


def open_published(directory: str | os.PathLike) -> Published:
  """Reads config.json and all headers.

  Raises:
    ConfigError: an unknown family, a config that contradicts itself, or tensors that it does not make.
  """
  directory = Path(directory)
  config = read_json(directory, 'config.json')
  check(
    ''
    if config
    else f'{directory} holds no config.json: name the directory that has it and safetensors'
  )
  try:
    known, cfg = model_config(config)
  except ConfigError as error:
    raise ConfigError(*(f'{directory}: {problem}' for problem in error.problems)) from error
  stored = open_tensors(directory)
  if not holds_mtp(cfg, stored.names):
    cfg = dataclasses.replace(cfg, mtp_depth=0)
  shapes = leaves(cfg)
  made_of = tensors(known.names, cfg, config, shapes)
  wanted, there = file_shapes(made_of), {*stored.names}
  again = {copy: name for copy, name in repeated(cfg, made_of).items() if copy in there}
  expect(
    stored,
    wanted
    | {copy: wanted[name] for copy, name in again.items()}
    | {name: stored.shape(name) for name in there if name.endswith(HARMLESS)},
  )
  check(
    *(
      f'{stored.path(name)}: {name!r} is {stored.dtype(name)}: convert it to one of {list(FLOATS)}'
      for name in wanted
      if stored.dtype(name) not in FLOATS
    )
  )
  return Published(directory, config, known, cfg, stored, made_of, again)


def repeated(cfg: ModelConfig, made_of: MadeOf) -> dict[str, str]:
  """Name of each tensor that repeats another in published files -> the name of that one."""
  return {copy: made_of[path][0].name for copy, path in copies(cfg, made_of).items()}


def read_weights(
  source: Published, mesh: Mesh, on_read: Callable[[int], object]
) -> tuple[Transformer, Array]:
  """The model and the router bias [L, E], in float32, on the shardings of their logical axes.

  On the host lies beside them what one layer of one leaf is made of; each process reads what its devices hold.

  Args:
    source: from `published`.
    mesh: whose axes divide the model's.
    on_read: told the bytes of each piece that is done.

  Raises:
    ConfigError: the mesh does not divide the model, or a file is damaged.
  """
  shapes = jax.eval_shape(lambda key: Transformer(key, source.cfg), jax.random.key(0))
  homes = [*jax.tree.leaves(shardings(shapes, mesh)), NamedSharding(mesh, PartitionSpec())]
  sizes = list(leaves(source.cfg).values())
  check(
    *(
      f'{path}{list(size)} does not divide over mesh {dict(mesh.shape)} as {home.spec}: use other sizes'
      for path, size, home in zip(source.made_of, sizes, homes)
      if not _divides(size, home)
    )
  )
  for copy, name in source.copies.items():
    _expect_equal(source.tensors, copy, name)
  arrays = [
    _leaf(source.tensors, parts, size, home, on_read)
    for parts, size, home in zip(source.made_of.values(), sizes, homes, strict=True)
  ]
  return jax.tree.unflatten(jax.tree.structure(shapes), arrays[:-1]), arrays[-1]


def tensor_specs(
  made_of: MadeOf,
  leaves: Mapping[str, np.ndarray],
  again: Mapping[str, str],
  dtypes: Mapping[str, str],
) -> list[Spec]:
  """All tensors of the files, in the order of their layers, each made when it is written.

  Args:
    made_of: from `families.names.tensors`.
    leaves: path -> the whole leaf, as a view of where it lies.
    again: from `repeated`, or a part of it.
    dtypes: name -> a row of tensors.DTYPES.
  """
  parts: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
  for path, pieces in made_of.items():
    for piece in pieces:
      parts.setdefault(piece.name, {})[piece.how] = path, piece.index
  shapes = file_shapes(made_of)

  def make(name: str, dtype: str) -> np.ndarray:
    ours = {how: leaves[path][index] for how, (path, index) in parts[name].items()}
    return to_file(ours).astype(DTYPES[dtype], copy=False)

  names = {name: name for name in parts} | dict(again)
  ordered = sorted(names, key=lambda name: re.sub(r'\d+', lambda number: number[0].zfill(6), name))
  return [
    Spec(
      name, shapes[names[name]], dtypes[name], functools.partial(make, names[name], dtypes[name])
    )
    for name in ordered
  ]


def lost(
  known: Family, config: Mapping[str, object], made_of: MadeOf, leaves: Mapping[str, np.ndarray]
) -> list[str]:
  """What is wrong with leaves that files do not hold, and readers take for zero: those that are not."""
  zero = tuple(must_be_zero(known.names, config))
  return [
    f'{path} is not zero, and files of model_type={config["model_type"]!r} cannot hold it: choose a family whose '
    'files do'
    for path in made_of
    if not made_of[path] and path.endswith(zero) and leaves[path].any()
  ]


def _divides(shape: tuple[int, ...], home: NamedSharding) -> bool:
  cuts = [
    math.prod(home.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
    for axes in home.spec
  ]
  return all(n % cut == 0 for n, cut in zip(shape, cuts))


def _expect_equal(stored: Tensors, copy: str, name: str) -> None:
  """Compares in pieces: embeddings are among the largest tensors."""
  rows = stored.shape(name)[0]
  step = max(1, (1 << 24) // math.prod(stored.shape(name)[1:]))
  for start in range(0, rows, step):
    one, other = (stored.read(which, (slice(start, start + step),)) for which in (copy, name))
    if one.dtype != other.dtype or one.tobytes() != other.tobytes():
      raise ConfigError(
        f'{stored.path(copy)}: expected {copy!r} to repeat {name!r}, found other numbers from row '
        f'{start}; a model with two of them is not built here'
      )


def _leaf(
  stored: Tensors,
  parts: tuple[Tensor, ...],
  shape: tuple[int, ...],
  home: NamedSharding,
  on_read: Callable[[int], object],
) -> Array:
  if math.prod(shape) <= SMALL or not parts or not parts[0].index:
    leaf = _array(stored, parts, 0, shape, np.dtype(np.float32), home)
    on_read(_nbytes(stored, parts))
    return leaf
  leaf = jnp.zeros(shape, jnp.float32, device=home)
  of_layer = NamedSharding(home.mesh, PartitionSpec(*home.spec[1:]))
  kinds = {stored.dtype(part.name) for part in parts}
  # Half the memory and the traffic, where that is enough; where the leaf lies it becomes float32.
  dtype = DTYPES[kinds.pop() if len(kinds) == 1 else 'F32']
  for (layer,), group in itertools.groupby(parts, lambda part: part.index[:1]):
    pieces = tuple(group)
    new = _array(stored, pieces, 1, shape[1:], dtype, of_layer)
    leaf = jax.block_until_ready(
      _placed(leaf, new, layer, home)
    )  # or several layers would wait in NumPy
    on_read(_nbytes(stored, pieces))
  return leaf


@functools.partial(jax.jit, static_argnames='home', donate_argnums=0)
def _placed(leaf: Array, new: Array, layer: int, home: NamedSharding) -> Array:
  updated = jax.lax.dynamic_update_index_in_dim(leaf, new.astype(leaf.dtype), layer, 0)
  return jax.lax.with_sharding_constraint(updated, home)


def _array(
  stored: Tensors,
  parts: tuple[Tensor, ...],
  outer: int,
  shape: tuple[int, ...],
  dtype: np.dtype,
  home: NamedSharding,
) -> Array:
  """What the tensors make within a leaf's first `outer` axes. Each device's part is read by itself, equal ones once."""
  made: dict[Spans, np.ndarray] = {}

  def part(index: Index) -> np.ndarray:
    spans = tuple(slice_bounds(shape, index))
    if spans not in made:
      made[spans] = _assembled(stored, parts, outer, spans, dtype)
    return made[spans]

  return jax.make_array_from_callback(shape, home, part)


def _assembled(
  stored: Tensors, parts: tuple[Tensor, ...], outer: int, spans: Spans, dtype: np.dtype
) -> np.ndarray:
  out = np.zeros([stop - start for start, stop in spans], dtype)

  def fill(tensor: Tensor) -> None:
    where = tensor.index[outer:]
    at = tuple(i - start for i, (start, _) in zip(where, spans))
    if all(0 <= i < n for i, n in zip(at, out.shape)):
      within = tuple(itertools.starmap(slice, spans[len(where) :]))
      out[at] = FROM_FILE[tensor.how](stored.read(tensor.name, IN_FILE[tensor.how](within)))

  with ThreadPoolExecutor() as pool:  # reading and casting let go of Python's lock
    list(pool.map(fill, parts))
  return out


def _nbytes(stored: Tensors, parts: Collection[Tensor]) -> int:
  # Half of a tensor that two leaves share.
  return sum(
    math.prod(part.shape)
    * DTYPES[stored.dtype(part.name)].itemsize
    // (1 + (part.how in ('even', 'odd')))
    for part in parts
  )
