"""The logits of a model in a directory, of published files or of a run.

Letters: B batch, S sequence, V vocab, L layers, E experts.
"""

from pathlib import Path

import jax
import numpy as np
from jax import Array

from moejax.config import ConfigError, check, problem_if
from moejax.data.batch import make_batch
from moejax.hf.progress import print_note, progress_bar
from moejax.hf.safetensors.file import DTYPES, MODEL_DTYPES
from moejax.hf.weights import Published, open_published, read_weights
from moejax.model.transformer import Transformer
from moejax.moe.dispatch.dropless import dropless_note
from moejax.runtime.files import whole_path
from moejax.runtime.multiprocess import fail_together
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.train.experiment.run_dir import CHECKPOINTS, read_model_on, read_setup

ONE_DEVICE = MeshConfig(data=1)


def token_ids(path: str, vocab_size: int) -> np.ndarray:
  """Returns the token ids [B, S] i32 of a .npy.

  Raises:
    ConfigError: it holds anything but ids of the vocabulary.
  """
  try:
    ids = np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise ConfigError(f'{path}: expected a .npy of token ids, found {error}') from error
  is_array = isinstance(ids, np.ndarray)  # np.load gives an archive of a .npz under another name
  kind = f'{ids.dtype} {list(ids.shape)}' if is_array else type(ids).__name__
  is_ids = is_array and ids.ndim == 2 and ids.size and ids.dtype.kind in 'iu'
  check(problem_if(not is_ids, f'{path}: expected whole numbers [B, S], one or more, found {kind}'))
  for row, column in np.argwhere((ids < 0) | (ids >= vocab_size))[:1]:
    raise ConfigError(
      f'{path}: expected ids from 0 to {vocab_size - 1}, found {ids[row, column]} in row {row}, '
      f'column {column}'
    )
  return ids.astype(np.int32)


def read_published_model(
  source: Published, mesh: MeshConfig, dtype: str = 'float32'
) -> tuple[Transformer, Array]:
  """Returns the model and its router bias [L, E] f32, on as many devices as the mesh has.

  All processes call it, and each reads what its devices hold. dtype: a row of MODEL_DTYPES.
  """
  devices = make_mesh(mesh)
  with fail_together(ConfigError, OSError), progress_bar('reading', source.nbytes) as advance:
    return read_weights(source, devices, advance, DTYPES[MODEL_DTYPES[dtype]])


def write_logits(directory: str, tokens_file: str, out: str) -> None:
  """Writes a .npy with the logits [B, S, V] f32 of the token ids [B, S] in another one.

  Each row is a document by itself, and depends on no other: no copy is dropped, whatever capacity
  the run was trained with.

  Args:
    directory: published files, or a run, whose newest checkpoint is read.
    tokens_file: .npy of whole numbers [B, S].
    out: .npy to write; whole, or not there.

  Raises:
    ConfigError: the model or the token ids cannot be read as they are.
  """
  device = jax.local_devices()[0]
  # The ids are held against the vocabulary before the long work of reading the model.
  if (Path(directory) / CHECKPOINTS).is_dir():
    cfg = read_setup(directory).cfg
    tokens = token_ids(tokens_file, cfg.model.vocab_size)
    print_note(dropless_note(cfg.model.moe.dispatch))
    _, model, router = read_model_on(device, directory, cfg)
    bias = router.bias
  else:
    source = open_published(directory)
    tokens = token_ids(tokens_file, source.cfg.vocab_size)
    model, bias = read_published_model(source, ONE_DEVICE)
  with whole_path(Path(out)) as partial:
    # A row at a time: all logits of a long batch are larger than the model.
    shape = (*tokens.shape, model.cfg.vocab_size)
    rows = np.lib.format.open_memmap(partial, 'w+', np.float32, shape)
    for row, ids in zip(rows, tokens):
      row[...] = whole_row_logits(model, bias, ids[None])[0]
    rows.flush()


@jax.jit
def whole_row_logits(model: Transformer, bias: Array, tokens: Array) -> Array:
  """Returns the logits [B, S, V] f32 of token ids [B, S], each row one document.

  Args:
    model: the parameters.
    bias: of the routers [L, E].
    tokens: ids [B, S].
  """
  batch = make_batch(tokens)
  # On TPUs and GPUs products of float32 would otherwise be rounded to less.
  with jax.default_matmul_precision('highest'):
    return model.logits(model(batch, bias).hidden)
