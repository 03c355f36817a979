"""The tensors of an export: what files cannot hold is told."""

from pathlib import Path

import numpy as np

from moejax.hf.export_tensors import by_number, lost_leaves
from moejax.hf.weights import open_published
from tests.support.published_models import copied


def test_a_router_bias_that_files_cannot_hold_is_no_silent_loss(tmp_path: Path) -> None:
  source = open_published(copied('mixtral', tmp_path / 'm'))
  leaves = {path: np.zeros(2, np.float32) for path in source.made_of}
  assert not lost_leaves(source.known, source.config, source.made_of, leaves)
  leaves['router.bias'] = np.ones(2, np.float32)
  [problem] = lost_leaves(source.known, source.config, source.made_of, leaves)
  assert problem.startswith(
    "router.bias is not zero, and files of model_type='mixtral' cannot hold it"
  )


def test_layers_are_sorted_by_their_number() -> None:
  names = ['layers.10.a', 'layers.9.b', 'layers.9.a', 'head']
  assert sorted(names, key=by_number) == ['head', 'layers.9.a', 'layers.9.b', 'layers.10.a']
