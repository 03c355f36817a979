"""The goldens in tests/golden: checkpoints of public implementations, and what those make of them.

tests/golden/NAME -> our config, model and router bias; recorded rows as a batch
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from moejax.data.batch import IGNORE, Batch
from moejax.families.schema.tensor_names import to_file
from moejax.hf import weights as transfer
from moejax.model.config import ModelConfig
from moejax.model.transformer import Transformer
from moejax.sharding.mesh import MeshConfig, make_mesh

GOLDEN = Path(__file__).parents[1] / 'golden'
NAMES = sorted(path.parent.name for path in GOLDEN.glob('*/about.json'))
CASES = ('', 'left_', 'right_')  # how rows are padded: not at all, on the left, on the right
Tree = dict[str, np.ndarray]


class Golden(NamedTuple):
  """A checkpoint as ours, and how its tensors are spelt."""

  directory: Path
  about: dict
  cfg: ModelConfig
  model: Transformer  # NumPy
  router: np.ndarray  # [L, E] f32
  made_of: dict  # path of a leaf -> the tensors of the file that it is made of

  def recorded(self, name: str) -> Tree:
    """The arrays of one .npz file."""
    return dict(np.load(self.directory / f'{name}.npz'))

  @property
  def routes(self) -> bool:
    """A dense model has no choice of experts to compare."""
    return self.cfg.moe.router.num_experts > 1


def load(name: str) -> Golden:
  """The golden checkpoint as an import reads it."""
  source = transfer.open_published(GOLDEN / name)
  model, router = jax.device_get(
    transfer.read_weights(source, make_mesh(MeshConfig(), jax.devices()[:1]), lambda nbytes: None)
  )
  about = json.loads((source.directory / 'about.json').read_text())
  return Golden(source.directory, about, source.cfg, model, router, source.made_of)


def published(golden: Golden, tree: Transformer) -> Tree:
  """Leaves in the model's structure, under the names and in the layout of the file."""
  paths = [path for path in golden.made_of if path != 'router.bias']
  parts: dict[str, dict[str, np.ndarray]] = {}
  for path, leaf in zip(paths, jax.tree.leaves(tree), strict=True):
    for tensor in golden.made_of[path]:
      parts.setdefault(tensor.name, {})[tensor.how] = np.asarray(leaf)[tensor.index]
  return {name: to_file(halves) for name, halves in parts.items()}


def batch_of(recorded: Tree, cases: tuple[str, ...]) -> Batch:
  """The recorded rows of some cases, one under another, as training would see them."""
  tokens = np.concatenate([recorded[f'{case}tokens'] for case in cases]).astype(np.int32)
  mask = np.concatenate([recorded[f'{case}mask'] for case in cases]).astype(np.int32)
  # A target counts where it and the token before it are real.
  pairs = np.pad(mask[:, :-1] * mask[:, 1:], [(0, 0), (0, 1)]) > 0
  targets = np.where(pairs, np.roll(tokens, -1, axis=1), IGNORE).astype(np.int32)
  positions = np.maximum(mask.cumsum(1) - 1, 0).astype(np.int32)
  return Batch(
    tokens=tokens,
    targets=targets,
    mask=targets != IGNORE,
    segment_ids=mask,
    positions=positions,
    task_ids=np.zeros(len(tokens), np.int32),
  )
