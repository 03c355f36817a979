"""A model in published files, and the same model as our parameters.

open_published(directory) -> Published, every name and shape checked -> read_weights(..., mesh)

Letters: L layers, E experts.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.config import ConfigError, check, problem_if
from moejax.families import model_config
from moejax.families.schema.family import Family
from moejax.families.schema.tensor_names import (
  HARMLESS,
  TIED_HEAD,
  Tensor,
  copies,
  file_shapes,
  holds_mtp,
  leaves,
  tensors,
  tied_head,
)
from moejax.hf.leaf_reader import LeafReader
from moejax.hf.safetensors.directory import Tensors, open_tensors
from moejax.hf.safetensors.file import DTYPES
from moejax.hf.unexpected_tensors import expect_tensors
from moejax.model.config import ModelConfig
from moejax.model.transformer import Transformer
from moejax.runtime.files import read_json
from moejax.runtime.multiprocess import is_first_process
from moejax.sharding.params import shardings

FLOATS = ('F32', 'BF16', 'F16')  # what float32 holds to the bit
COMPARED = 1 << 24  # numbers of two tensors that are held against each other at a time
MadeOf = Mapping[str, tuple[Tensor, ...]]


class Published(NamedTuple):
  """A directory of a model, none of whose tensors is read yet."""

  directory: Path
  config: dict[str, object]  # config.json
  known: Family  # whose config.json it is
  cfg: ModelConfig  # what config.json says
  tensors: Tensors
  made_of: MadeOf  # path of each leaf -> the tensors that it is made of
  copies: dict[str, str]  # name -> name of the tensor that it must equal

  @property
  def nbytes(self) -> int:
    """Bytes of all tensors that `read_weights` reads, each counted once."""
    shapes = file_shapes(self.made_of)
    return sum(
      math.prod(shape) * DTYPES[self.tensors.dtype(name)].itemsize for name, shape in shapes.items()
    )


def open_published(directory: str | os.PathLike) -> Published:
  """Reads config.json and all headers, and no tensor.

  Raises:
    ConfigError: an unknown family, a config that contradicts itself, or tensors that it does not
      make.
  """
  directory = Path(directory)
  config = read_json(directory, 'config.json')
  check(
    problem_if(
      not config,
      f'{directory} holds no config.json: name the directory that has it and safetensors',
    )
  )
  try:
    known, cfg = model_config(config)
  except ConfigError as error:
    raise ConfigError(*(f'{directory}: {problem}' for problem in error.problems)) from error
  stored = open_tensors(directory)
  if not holds_mtp(cfg, stored.names):
    cfg = dataclasses.replace(cfg, mtp_depth=0)
  made_of = tensors(known.names, cfg, config, leaves(cfg))
  wanted = file_shapes(made_of)
  # Copies may be left out; those in the files must have the shape of what they repeat.
  copied = {copy: name for copy, name in repeated(cfg, made_of).items() if copy in stored.names}
  harmless = {name: stored.shape(name) for name in stored.names if name.endswith(HARMLESS)}
  of_copies = {copy: wanted[name] for copy, name in copied.items()}
  expect_tensors(stored, cfg, wanted | of_copies, harmless)
  check(
    *(
      f'{stored.path(name)}: {name!r} is {stored.dtype(name)}: convert it to one of {list(FLOATS)}'
      for name in wanted
      if stored.dtype(name) not in FLOATS
    )
  )
  return Published(
    directory=directory,
    config=config,
    known=known,
    cfg=cfg,
    tensors=stored,
    made_of=made_of,
    copies=copied,
  )


def repeated(cfg: ModelConfig, made_of: MadeOf) -> dict[str, str]:
  """Returns the name of each tensor that repeats another in published files -> that one's name."""
  paths = copies(cfg, made_of) | tied_head(made_of)
  return {copy: made_of[path][0].name for copy, path in paths.items()}


def read_weights(
  source: Published,
  mesh: Mesh,
  on_read: Callable[[int], object],
  dtype: np.dtype = DTYPES['F32'],
) -> tuple[Transformer, Array]:
  """Returns the model and the router bias [L, E], on the shardings of their axes.

  On the host lies beside them what one layer of one leaf is made of; each process reads what its
  devices hold.

  Args:
    source: from `open_published`.
    mesh: whose axes divide the model's.
    on_read: told the bytes of each piece that is done.
    dtype: of the parameters; the bias is in float32.

  Raises:
    ConfigError: the mesh does not divide the model, or a file is damaged.
  """
  shapes = jax.eval_shape(lambda key: Transformer(key, source.cfg), jax.random.key(0))
  # The leaves in the order of made_of: those of the model, then the router bias, which is whole.
  homes = [*jax.tree.leaves(shardings(shapes, mesh)), NamedSharding(mesh, PartitionSpec())]
  sizes = list(leaves(source.cfg).values())
  check(
    *(
      f'{path}{list(size)} does not divide over mesh {dict(mesh.shape)} as {home.spec}: use other '
      'sizes'
      for path, size, home in zip(source.made_of, sizes, homes)
      if not _divides(size, home)
    )
  )
  if is_first_process():  # for all of them
    for copy, name in source.copies.items():
      _expect_equal(source.tensors, copy, name)
  reader = LeafReader(source.tensors, on_read)
  dtypes = [*[dtype] * (len(sizes) - 1), DTYPES['F32']]
  arrays = [
    reader.read(*leaf) for leaf in zip(source.made_of.values(), sizes, homes, dtypes, strict=True)
  ]
  return jax.tree.unflatten(jax.tree.structure(shapes), arrays[:-1]), arrays[-1]


def _divides(shape: tuple[int, ...], home: NamedSharding) -> bool:
  """Whether every dimension is cut into equal parts."""
  for n, axes in zip(shape, home.spec):
    names = (axes,) if isinstance(axes, str) else axes or ()
    if n % math.prod(home.mesh.shape[axis] for axis in names):
      return False
  return True


def _expect_equal(stored: Tensors, copy: str, name: str) -> None:
  """Compares in pieces: embeddings are among the largest tensors."""
  rows, *row = stored.shape(name)
  step = max(1, COMPARED // math.prod(row))
  for start in range(0, rows, step):
    piece = (slice(start, start + step),)
    # float32 holds every number of FLOATS: the same ones may be written in two dtypes.
    one, other = (stored.read(tensor, piece).astype(np.float32) for tensor in (copy, name))
    if one.tobytes() != other.tobytes():
      remedy = (
        'config.json has tie_word_embeddings=true: set it to false if the head of the file is meant'
        if copy == TIED_HEAD
        else 'a model with two of them is not built here'
      )
      raise ConfigError(
        f'{stored.path(copy)}: expected {copy!r} to repeat {name!r}, found other numbers from row '
        f'{start}; {remedy}'
      )
