"""The candidates of --plan=fit: they divide the run, should fit, and are sorted by time."""

import pytest

from moejax.model.remat import REMAT_POLICIES
from moejax.plan.memory_model import memory_by_kind, model_shapes
from moejax.plan.search import candidates, layout_variants
from moejax.train.shapes import make_run_mesh
from tests.plan.eight_devices import CONFIG, CPU_8, eight_chips


@pytest.mark.slow
def test_candidates_divide_the_run_and_should_fit() -> None:
  found = list(layout_variants(CONFIG, 8))
  assert {cfg.model.remat for cfg in found} == {*REMAT_POLICIES}
  assert max(cfg.micro_batches for cfg in found) == 16, (
    'a row on each of the two shards of fsdp 2 x tensor 4'
  )
  assert len({cfg.mesh for cfg in found}) == 19, 'of 20 meshes tensor 8 does not divide four heads'
  for cfg in found[::60]:
    make_run_mesh(cfg)
  needs = sorted(
    sum(memory_by_kind(cfg, model_shapes(cfg), eight_chips('v5e')).values()) for cfg in found
  )
  some = eight_chips('v5e', memory=needs[len(needs) // 2])
  best = candidates(CONFIG, CPU_8.devices(), some)
  assert 0 < len(best) < len(found) / 2
  assert all(sum(one.memory.values()) <= some.chip.memory for one in best)
  assert [one.seconds for one in best] == sorted(one.seconds for one in best) and best[
    0
  ].seconds > 0
  nothing = candidates(CONFIG, CPU_8.devices(), eight_chips('v5e', memory=1.0))
  assert [sum(one.memory.values()) for one in nothing] == needs[:1], (
    'the smallest, where nothing fits'
  )
