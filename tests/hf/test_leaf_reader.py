"""Leaves of a model, read onto a mesh: the same numbers, each byte once, a layer at a time."""

from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from moejax.hf import leaf_reader
from moejax.hf.safetensors.directory import Tensors
from moejax.hf.weights import open_published, read_weights
from moejax.model.transformer import Transformer
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.sharding.params import shardings
from tests.hf.round_trip import loaded
from tests.support.published_models import NAMES, copied, random_model, written

MESH = MeshConfig(data=2, fsdp=2, expert=2)
QUICK_NAMES = ['mixtral', 'gpt_oss']
SLOW_NAMES = [name for name in NAMES if name not in QUICK_NAMES]


@pytest.mark.parametrize(
  'name', [*QUICK_NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_NAMES)]
)
def test_a_mesh_and_layers_make_the_same_leaves(
  name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """On the shardings of the mesh, each part read once for all devices that hold it."""
  source = open_published(copied(name, tmp_path / name))
  want = loaded(source)
  pieces: list[np.ndarray] = []
  read = Tensors.read
  monkeypatch.setattr(
    Tensors, 'read', lambda self, *args: pieces.append(read(self, *args)) or pieces[-1]
  )
  monkeypatch.setattr(leaf_reader, 'SMALL', 0)
  mesh = MESH if name != 'llama' else MeshConfig(data=4, fsdp=2)  # one expert
  got = loaded(source, mesh)
  shapes = jax.eval_shape(lambda key: Transformer(key, source.cfg), jax.random.key(0))
  homes = jax.tree.leaves(shardings(shapes, make_mesh(mesh)))
  for (path, leaf), home in zip(got.items(), [*homes, got['router.bias'].sharding]):
    assert leaf.sharding == home and leaf.dtype == np.float32, path
    assert np.asarray(leaf).tobytes() == np.asarray(want[path]).tobytes(), path
  # What gate and up share is read by each; what is there twice is compared.
  once = sum(4 * int(np.prod(part.shape)) for parts in source.made_of.values() for part in parts)
  twice = sum(
    4 * int(np.prod(source.tensors.shape(name))) for pair in source.copies.items() for name in pair
  )
  assert sum(piece.nbytes for piece in pieces) == once + twice


def test_a_stack_is_never_whole_in_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """At most a layer in the dtype of the file, and one tensor of it; progress tells all bytes."""
  config, arrays = random_model('mixtral', 'BF16', num_layers=6)
  source, sizes, done = open_published(written(tmp_path / 'm', arrays, config)), [], []
  assembled = leaf_reader.assemble
  monkeypatch.setattr(leaf_reader, 'SMALL', 0)
  monkeypatch.setattr(
    leaf_reader, 'assemble', lambda *args: sizes.append(assembled(*args)) or sizes[-1]
  )
  read_weights(source, make_mesh(MeshConfig(data=1), jax.devices()[:1]), done.append)
  largest = {
    path: max(2 * np.prod(arrays[part.name].shape) for part in parts)
    for path, parts in source.made_of.items()
    if parts
  }
  experts = 4
  stacks = [array for array in sizes if array.ndim > 2]
  gate = largest['blocks.moe.experts.gate']
  assert max(array.nbytes for array in stacks) == experts * gate
  assert all(array.dtype == ml_dtypes.bfloat16 for array in stacks)
  assert sum(done) == source.nbytes == sum(array.nbytes for array in arrays.values())
