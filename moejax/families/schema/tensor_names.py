"""Where each of our parameters lies in a published file: rows of name tables, and what they say.

  leaves(cfg) -> {path: shape} -> tensors(...) -> {path: the tensors of a file that it is made of}

A table maps the path of a parameter, within its layer or of the whole model, to a Name. Layers are
numbered as the hub does: by depth, whatever stack they are in, and then the blocks of multi-token
prediction.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from moejax.config import check
from moejax.model.config import ModelConfig
from moejax.model.layer_runs import stack_layers
from moejax.model.transformer import Transformer
from moejax.sharding.tree import flatten

Shape = tuple[int, ...]


class Name(NamedTuple):
  """A published name and how the tensor lies in the file."""

  template: str  # with {layer} and {expert}, where it has them
  # A row of FROM_FILE; or of what no file holds and import sets to zero: 'zero', which export must
  # find to be zero, or 'unread', which a single expert never looks at.
  how: str = 'same'
  # Of config.json, that says whether files hold it (then 'zero' where they do not); '': they do.
  key: str = ''


class Tensor(NamedTuple):
  """A tensor of a file: `FROM_FILE[how](file[name])` is our leaf at `index`."""

  name: str
  index: tuple[int, ...]  # of its layer and expert, as far as it has them
  how: str  # a row of FROM_FILE
  shape: Shape  # in the file


# how -> a tensor of a file to ours; 'even' and 'odd' columns are gate and up of gpt-oss's fused
# projection
FROM_FILE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
  'same': lambda a: a,
  'transposed': lambda a: a.swapaxes(-1, -2),
  'even': lambda a: a[..., ::2],
  'odd': lambda a: a[..., 1::2],
}
ABSENT = ('zero', 'unread')
# What files hold beside parameters, and no forward pass in float reads: tables that whoever loads
# them makes anew, and scales by which others quantise activations and caches.
HARMLESS = ('.rotary_emb.inv_freq', '.input_scale', '.k_scale', '.v_scale')
TIED_HEAD = 'lm_head.weight'


def to_file(parts: Mapping[str, np.ndarray]) -> np.ndarray:
  """Returns the tensor of a file, of how -> our array: the inverse of FROM_FILE.

  Of the fused 'even' and 'odd' columns both must be there.
  """
  if 'even' in parts:
    return np.stack([parts['even'], parts['odd']], axis=-1).reshape(*parts['even'].shape[:-1], -1)
  [(how, ours)] = parts.items()
  return FROM_FILE[how](ours)


def leaves(cfg: ModelConfig) -> dict[str, Shape]:
  """Returns path -> shape of all that a model learns: its parameters, and `router.bias` [L, E]."""
  model = jax.eval_shape(lambda key: Transformer(key, cfg), jax.random.key(0))
  parameters = {path.replace('/', '.'): leaf.shape for path, leaf in flatten(model).items()}
  return parameters | {'router.bias': (cfg.num_moe_layers, cfg.moe.router.num_experts)}


def tensors(
  table: Mapping[str, Name],
  cfg: ModelConfig,
  config: Mapping[str, object],
  shapes: Mapping[str, Shape],
) -> dict[str, tuple[Tensor, ...]]:
  """Returns path of each leaf -> the tensors that it is made of, by layer and expert; () for zeros.

  Args:
    table: the family's names.
    cfg: the model.
    config: config.json, which a few rows ask whether files hold them.
    shapes: from `leaves`.

  Raises:
    ConfigError: a leaf has no row: files of this family cannot hold it.
  """
  rows = {path: _row(table, path) for path in shapes}
  check(
    *(
      f'{path}{list(shapes[path])} has no place in files of model_type={config["model_type"]!r}: '
      'choose a family whose files hold it, or a config that does not make it'
      for path, row in rows.items()
      if row is None
    )
  )
  made_of: dict[str, tuple[Tensor, ...]] = {}
  for path, row in rows.items():
    is_held = not is_absent(row, config)
    made_of[path] = tuple(_tensors(path, row, cfg, shapes[path])) if is_held else ()
  return made_of


def is_absent(row: Name, config: Mapping[str, object]) -> bool:
  """Returns whether files hold nothing of this row."""
  return row.how in ABSENT or bool(row.key and not (row.key in config and config[row.key]))


def must_be_zero(table: Mapping[str, Name], config: Mapping[str, object]) -> set[str]:
  """Returns the paths of rows that files do not hold and readers take for zero."""
  return {path for path, row in table.items() if is_absent(row, config) and row.how != 'unread'}


def _row(table: Mapping[str, Name], path: str) -> Name | None:
  """The row of a parameter, whichever stack of layers it is in; None without one."""
  within = re.sub(r'^(mtp\.block|blocks|dense_blocks)\.', '', path)
  return table[within] if within in table else None


def _tensors(path: str, row: Name, cfg: ModelConfig, shape: Shape) -> Iterator[Tensor]:
  """The tensors of one leaf; layers are numbered through all stacks."""
  stacks, mtp = stack_layers(cfg), range(cfg.num_layers, cfg.num_layers + cfg.mtp_depth)
  numbers = {**stacks, 'mtp': mtp, 'router': (*stacks['blocks'], *mtp)}
  top = path.split('.')[0]
  # What is transposed is a matrix by itself; the rest is whole but for its layer.
  stacked = len(shape) - 2 if row.how == 'transposed' else int('{layer}' in row.template)
  index_of, rest = shape[:stacked], shape[stacked:]
  if row.how == 'transposed':
    rest = rest[::-1]
  elif row.how in ('even', 'odd'):
    rest = (*rest[:-1], 2 * rest[-1])
  for index in itertools.product(*map(range, index_of)):
    layer, expert = (*index, 0, 0)[:2]
    number = numbers[top][layer] if top in numbers else 0
    yield Tensor(row.template.format(layer=number, expert=expert), index, row.how, rest)


def file_shapes(made_of: Mapping[str, tuple[Tensor, ...]]) -> dict[str, Shape]:
  """Returns published name -> shape of every tensor that files must hold, from `tensors`."""
  return {tensor.name: tensor.shape for parts in made_of.values() for tensor in parts}


def copies(cfg: ModelConfig, shapes: Mapping[str, Shape]) -> dict[str, str]:
  """Returns published name -> path of what layers of multi-token prediction repeat.

  Files may hold it, and publishers' do.
  """
  names = {'embed.table': 'embed_tokens', 'head.w': 'shared_head.head'}
  return {
    f'model.layers.{cfg.num_layers + k}.{name}.weight': path
    for k in range(cfg.mtp_depth)
    for path, name in names.items()
    if path in shapes
  }


def tied_head(shapes: Collection[str]) -> dict[str, str]:
  """Returns published name -> path of the embedding that a model without a head of its own repeats.

  transformers leaves it out; older releases and many that were trained on hold it.
  """
  return {} if 'head.w' in shapes else {TIED_HEAD: 'embed.table'}


def holds_mtp(cfg: ModelConfig, names: Collection[str]) -> bool:
  """Returns whether files have layers of multi-token prediction.

  transformers saves a config with them, and not the layers.
  """
  layers = tuple(f'model.layers.{cfg.num_layers + k}.' for k in range(cfg.mtp_depth))
  return any(name.startswith(layers) for name in names)
