"""A run that goes on with other devices, another mesh and another dispatcher is the run that never
changed."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.checkpoint.checkpoints import Checkpoints
from moejax.checkpoint.manifest import digests
from moejax.train.experiment.config import ExperimentConfig, with_vocabulary
from moejax.train.shapes import make_run_mesh, sharded_state_shapes
from moejax.train.trainer import train
from tests.support.emulated_exchange import emulate
from tests.support.tiny_run import CONFIG, config
from tests.support.unoptimised import compile_step_unoptimised

EVERY = 2  # steps between changes
# One after the other: the mesh, and how experts are reached. Batch and model are the same; its
# vocabulary is even.
PLACES = (
  {'mesh__data': 8, 'model__moe__dispatch__dispatcher': 'sparse_matmul'},
  {
    'mesh__data': 1,
    'mesh__fsdp': 2,
    'mesh__expert': 2,
    'mesh__tensor': 2,
    'micro_batches': 2,
    'model__moe__dispatch__dispatcher': 'dense_matmul',
    'model__moe__dispatch__capacity_factor': 2.0,
  },
  {'mesh__data': 1, 'mesh__expert': 4, 'model__moe__dispatch__exchange': 'ragged'},
  {'mesh__data': 1, 'model__moe__dispatch__dispatcher': 'dense_matmul'},
)
COMMON = {
  'model__vocab_size': 258,
  'model__num_layers': 1,
  'model__num_dense_layers': 0,
  'log_every': 1,
  'eval__every': 0,
}


def place(workdir: Path, at: int, steps: int) -> ExperimentConfig:
  return config(workdir, **COMMON, **PLACES[at], stop_after=steps, checkpoint__every=EVERY)


def rows(workdir: Path, name: str) -> list[dict[str, object]]:
  return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


@pytest.mark.slow
def test_a_run_goes_on_on_any_mesh_by_any_dispatcher(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  emulate(monkeypatch)
  monkeypatch.setattr('moejax.train.compile.compile_step', compile_step_unoptimised)
  monkeypatch.setattr(
    'moejax.train.experiment.cost.lacking_ragged', lambda mesh: ''
  )  # the summary, too, asks what there is
  whole, moved = tmp_path / 'whole', tmp_path / 'moved'
  end = EVERY * len(PLACES)
  assert CONFIG.steps > end
  assert train(place(whole, -1, end)) == 0
  for at in range(len(PLACES)):
    assert train(place(moved, at, EVERY * (at + 1))) == 0
  losses, alone = (
    [row for row in rows(workdir, 'metrics.jsonl') if 'loss' in row] for workdir in (moved, whole)
  )
  assert [row['step'] for row in losses] == [row['step'] for row in alone] == [*range(1, end + 1)]
  for name in ('loss', 'lm_loss', 'balance/sequence', 'grad_norm', 'max_vio'):
    np.testing.assert_allclose(
      [row[name] for row in losses], [row[name] for row in alone], rtol=1e-5, err_msg=name
    )
  assert rows(moved, 'load.jsonl') == rows(whole, 'load.jsonl'), 'the same experts for every token'
  # What the last place wrote, one device, is on all of them as the second has them, bit for bit.
  cfg = with_vocabulary(place(moved, 1, end), 257)
  mesh = make_run_mesh(cfg)
  with jax.set_mesh(mesh):
    target = sharded_state_shapes(cfg, mesh)
    step, state, meta = Checkpoints(moved / 'checkpoints', cfg.checkpoint, readonly=True).restore(
      target, {}
    )
    assert step == end and digests(state) == meta.digests
  for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
    assert leaf.sharding == wanted.sharding
