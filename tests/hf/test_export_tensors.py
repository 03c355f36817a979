"""The tensors of an export: what files cannot hold is told, and each layer is read once."""

from pathlib import Path

import numpy as np
import pytest

from moejax.families.schema.tensor_names import leaves
from moejax.hf.export_plan import origin_of, plan_export
from moejax.hf.export_tensors import StoredParts, by_number, lost_leaves, tensor_specs
from moejax.hf.import_model import run_config
from moejax.hf.weights import open_published
from tests.hf.round_trip import reader
from tests.support.published_models import NAMES, copied


def test_a_router_bias_that_files_cannot_hold_is_no_silent_loss(tmp_path: Path) -> None:
  source = open_published(copied('mixtral', tmp_path / 'm'))
  numbers = {path: np.zeros(2, np.float32) for path in source.made_of}
  assert not lost_leaves(source.known, source.config, source.made_of, reader(numbers))
  numbers['router.bias'] = np.ones(2, np.float32)
  [problem] = lost_leaves(source.known, source.config, source.made_of, reader(numbers))
  assert problem.startswith(
    "router.bias is not zero, and files of model_type='mixtral' cannot hold it"
  )


def test_layers_are_sorted_by_their_number() -> None:
  names = ['layers.10.a', 'layers.9.b', 'layers.9.a', 'head']
  assert sorted(names, key=by_number) == ['head', 'layers.9.a', 'layers.9.b', 'layers.10.a']


class Log:
  """In the place of StoredLeaves: keeps which layers are read, and how often each counts."""

  def __init__(self, leaves: dict[str, tuple[int, ...]]) -> None:
    self.leaves, self.read_layers, self.counted = leaves, [], []

  def read(self, path: str, layer: int, counts: bool) -> np.ndarray:
    self.read_layers.append((path, layer))
    if counts:
      self.counted.append((path, layer))
    shape = self.leaves[path]
    return np.zeros(shape if layer < 0 else shape[1:], np.float32)


@pytest.mark.parametrize('name', NAMES)
def test_a_layer_of_a_leaf_is_read_once_and_counts_once(name: str, tmp_path: Path) -> None:
  """Whatever the order of names: the experts of a layer, fused tensors, and copies of others."""
  source = open_published(copied(name, tmp_path / 'm'))
  how = plan_export(run_config(source.cfg, 'run'), origin_of(source), {}, '', '')
  shapes = leaves(source.cfg)
  log = Log(shapes)
  parts = StoredParts(log, {path: path for path in shapes})
  for spec in tensor_specs(how.made_of, parts.read, how.copies, how.dtypes):
    assert spec.load().shape == spec.shape
  wanted: list[tuple[str, int]] = []
  for path, pieces in how.made_of.items():
    wanted += {(path, piece.index[0] if piece.index else -1) for piece in pieces}
  assert sorted(log.counted) == sorted(wanted)
  # Only what is written a second time, under another name, may be read a second time.
  assert len(log.read_layers) <= len(wanted) + len(how.copies)
