"""A model in a directory, published files or a run's, opened: its config, tokenizer and parameters, and logits of it.

Letters: B batch, S sequence, V vocab, L layers, E experts.
"""

from pathlib import Path

import jax
import numpy as np
from jax import Array

from moejax.config import ConfigError, check
from moejax.data.batch import make_batch
from moejax.hf.progress import progress_bar
from moejax.hf.weights import Published, open_published, read_weights
from moejax.model.transformer import Transformer
from moejax.runtime.files import whole_path
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.train.experiment.run_dir import CHECKPOINTS, read_model_on, read_setup

ONE_DEVICE = MeshConfig(data=1)


def token_ids(path: str, vocab_size: int) -> np.ndarray:
  """[B, S] i32 from a .npy; ConfigError for anything that is not ids of the vocabulary."""
  try:
    found = np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise ConfigError(f'{path}: expected a .npy of token ids, found {error}') from error
  is_ids = (
    isinstance(found, np.ndarray) and found.ndim == 2 and found.size and found.dtype.kind in 'iu'
  )
  check(
    ''
    if is_ids
    else f'{path}: expected whole numbers [B, S], one or more, found '
    + (
      f'{found.dtype} {list(found.shape)}'
      if isinstance(found, np.ndarray)
      else type(found).__name__
    )
  )
  wrong = np.argwhere((found < 0) | (found >= vocab_size))
  check(
    *(
      f'{path}: expected ids from 0 to {vocab_size - 1}, found {found[row, column]} in row {row}, column {column}'
      for row, column in wrong[:1]
    )
  )
  return found.astype(np.int32)


def read_published_model(source: Published, mesh: MeshConfig) -> tuple[Transformer, Array]:
  """The published model and its router bias, on as many devices as the mesh has."""
  devices = make_mesh(mesh)
  with progress_bar('reading', source.nbytes) as advance:
    return read_weights(source, devices, advance)


def write_logits(directory: str, tokens_file: str, out: str) -> None:
  """Logits [B, S, V] f32 of the token ids [B, S] in a .npy, each row by itself; of published files or of a run."""
  device = jax.local_devices()[0]
  if is_run := (Path(directory) / CHECKPOINTS).is_dir():
    cfg = read_setup(directory).cfg
    vocab_size = cfg.model.vocab_size
  else:
    source = open_published(directory)
    vocab_size = source.cfg.vocab_size
  tokens = token_ids(tokens_file, vocab_size)
  if is_run:
    _, model, router = read_model_on(device, directory, cfg)
    bias = router.bias
  else:
    model, bias = read_published_model(source, ONE_DEVICE)
  with whole_path(Path(out)) as partial:
    # A row at a time: all logits of a long batch are larger than the model.
    rows = np.lib.format.open_memmap(partial, 'w+', np.float32, (*tokens.shape, vocab_size))
    for row, ids in zip(rows, tokens):
      row[...] = whole_row_logits(model, bias, ids[None])[0]
    rows.flush()


@jax.jit
def whole_row_logits(model: Transformer, bias: Array, tokens: Array) -> Array:
  """Of whole rows, each one document. tokens [B, S], bias [L, E] -> [B, S, V] f32."""
  batch = make_batch(tokens)
  with jax.default_matmul_precision('highest'):
    return model.logits(model(batch, bias).hidden)
