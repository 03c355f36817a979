"""A model in a directory, published files or a run's, opened: its config, tokenizer and parameters, and logits of it.

Letters: B batch, S sequence, V vocab, L layers, E experts.
"""

from collections.abc import Callable, Iterator
import contextlib
import os
from pathlib import Path

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from moejax.config import ConfigError, check
from moejax.data import Batch
from moejax.experiment import CHECKPOINTS, TOKENIZER_FILE, ExperimentConfig
from moejax.generate import read_model, run_in
from moejax.sharding import MeshConfig, make_mesh
from moejax.state import init_state
from moejax.tensors import inside
from moejax.tokenizer import Tokenizer, load_tokenizer
from moejax.transfer import Published, load, published
from moejax.transformer import Transformer

ONE_DEVICE = MeshConfig(data=1)


def model_of(workdir: str, cfg: ExperimentConfig, device: jax.Device) -> tuple[int, Transformer, Array]:
  """Step, model and router bias of the newest checkpoint of a run."""
  target = jax.eval_shape(lambda: init_state(cfg))
  home = SingleDeviceSharding(device)
  target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=home), target)
  step, model, router = read_model(workdir, target, cfg)
  return step, model, router.bias


def tokenizer_in(directory: str | os.PathLike, vocab_size: int) -> Tokenizer | None:
  """None where there is no tokenizer.json; ConfigError where it has more tokens than the model."""
  path = inside(Path(directory), TOKENIZER_FILE)
  if not path.exists():
    return None
  tokenizer = load_tokenizer(str(path))
  check(f'{path}: expected ids below vocab_size={vocab_size} of config.json, found {tokenizer.vocab_size - 1}: is it '
        'the tokenizer of this model?' if vocab_size < tokenizer.vocab_size else '')
  return tokenizer


def token_ids(path: str, vocab_size: int) -> np.ndarray:
  """[B, S] i32 from a .npy; ConfigError for anything that is not ids of the vocabulary."""
  try:
    found = np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise ConfigError(f'{path}: expected a .npy of token ids, found {error}') from error
  is_ids = isinstance(found, np.ndarray) and found.ndim == 2 and found.size and found.dtype.kind in 'iu'
  check('' if is_ids else f'{path}: expected whole numbers [B, S], one or more, found '
        + (f'{found.dtype} {list(found.shape)}' if isinstance(found, np.ndarray) else type(found).__name__))
  wrong = np.argwhere((found < 0) | (found >= vocab_size))
  check(*(f'{path}: expected ids from 0 to {vocab_size - 1}, found {found[row, column]} in row {row}, column {column}'
          for row, column in wrong[:1]))
  return found.astype(np.int32)


def read(source: Published, mesh: MeshConfig) -> tuple[Transformer, Array]:
  """The published model and its router bias, on as many devices as the mesh has."""
  devices = make_mesh(mesh)
  with progress('reading', source.nbytes) as advance:
    return load(source, devices, advance)


def write_logits(directory: str, tokens_file: str, out: str) -> None:
  """Logits [B, S, V] f32 of the token ids [B, S] in a .npy, each row by itself; of published files or of a run."""
  device = jax.local_devices()[0]
  if is_run := (Path(directory) / CHECKPOINTS).is_dir():
    cfg, _ = run_in(directory)
    vocab_size = cfg.model.vocab_size
  else:
    source = published(directory)
    vocab_size = source.cfg.vocab_size
  tokens = token_ids(tokens_file, vocab_size)
  model, bias = model_of(directory, cfg, device)[1:] if is_run else read(source, ONE_DEVICE)
  partial = Path(f'{out}.moejax-partial')
  try:
    # A row at a time: all logits of a long batch are larger than the model.
    rows = np.lib.format.open_memmap(partial, 'w+', np.float32, (*tokens.shape, vocab_size))
    for row, ids in zip(rows, tokens):
      row[...] = logits(model, bias, ids[None])[0]
    rows.flush()
    partial.replace(out)
  finally:
    partial.unlink(missing_ok=True)


@jax.jit
def logits(model: Transformer, bias: Array, tokens: Array) -> Array:
  """Of whole rows, each one document. tokens [B, S], bias [L, E] -> [B, S, V] f32."""
  ones, at = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  batch = Batch(tokens, tokens, ones > 0, ones, at, jnp.zeros_like(tokens[:, 0]))
  with jax.default_matmul_precision('highest'):
    return model.logits(model(batch, bias).hidden)


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
  """A bar of bytes on stderr; gives what to call with the bytes that are done."""
  columns = (TextColumn('{task.description}'), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
             TimeRemainingColumn(elapsed_when_finished=True))
  with Progress(*columns, console=Console(stderr=True)) as bar:
    task = bar.add_task(what, total=total)
    yield lambda count: bar.advance(task, count)
