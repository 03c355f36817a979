"""The model and the router before the first step: their shapes, and what their numbers follow
from."""

from pathlib import Path

import jax
import numpy as np

from moejax.train.experiment.initial_model import (
  build_model,
  build_model_and_router,
  build_router_state,
  model_and_router_shapes,
)
from tests.support.quick import QUICK
from tests.support.tiny_run import config


def test_the_router_begins_at_zero_in_every_moe_layer(tmp_path: Path) -> None:
  for pattern, layers in ((('moe',), 3), (('moe', 'dense'), 2)):
    cfg = config(
      tmp_path, model__num_layers=4, model__num_dense_layers=1, model__ffn_pattern=pattern
    )
    for leaf in build_router_state(cfg):
      assert leaf.shape == (layers, 4) and leaf.dtype == np.float32 and not leaf.any()


def test_shapes_are_those_of_what_is_built_and_numbers_follow_from_the_seed(
  tmp_path: Path,
) -> None:
  cfg = config(tmp_path, model__vocab_size=64, seed=3)
  build = jax.jit(lambda: build_model_and_router(cfg), compiler_options=QUICK)
  built, again = build(), build()
  alone = jax.jit(lambda key: build_model(key, cfg), compiler_options=QUICK)
  other = alone(jax.random.key(4))
  shapes = model_and_router_shapes(cfg)
  assert jax.tree.structure(shapes) == jax.tree.structure(built)
  leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(built), strict=True)
  assert all(shape.shape == a.shape and shape.dtype == a.dtype for shape, a in leaves)
  jax.tree.map(np.testing.assert_array_equal, built, again)
  jax.tree.map(np.testing.assert_array_equal, built.model, alone(jax.random.key(3)))
  table, other_table = (model.embed.table[...] for model in (built.model, other))
  assert np.abs(table - other_table).max() > 0


def test_a_model_computes_the_balance_losses_of_its_config(tmp_path: Path) -> None:
  """As many as are active, and as the rows of the config's batch make sets of them."""
  cfg = config(tmp_path, model__vocab_size=64)
  model = model_and_router_shapes(cfg).model
  assert model.blocks.moe.scopes == cfg.balance.scopes(cfg.batch_size, cfg.micro_batches)
