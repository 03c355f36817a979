"""The package from outside: its example, its names, and a layer with nothing but defaults."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

import moejax.moe
from moejax.config import ConfigError
from moejax.moe import (
  BALANCE_LOSSES,
  BIAS_RULES,
  DISPATCHERS,
  MoE,
  MoEAux,
  MoEConfig,
  RouterConfig,
  Scope,
  Tokens,
  route,
  whole_rows,
)

ROWS, LENGTH, WIDTH = 2, 5, 16


def some_x() -> Array:
  return jax.random.normal(jax.random.key(1), (ROWS, LENGTH, WIDTH))


def test_the_example_in_the_docstring_runs_as_it_stands() -> None:
  examples = doctest.testmod(moejax.moe)
  assert examples.failed == 0
  assert examples.attempted >= 8


def test_every_name_that_the_package_offers_is_there() -> None:
  missing = [name for name in moejax.moe.__all__ if not hasattr(moejax.moe, name)]
  assert not missing
  assert {'sequence', 'global_batch'} <= set(BALANCE_LOSSES)
  assert 'sign' in BIAS_RULES and 'dense_matmul' in DISPATCHERS
  routing = route(jnp.zeros((1, 2, 8)), jnp.zeros(8), RouterConfig())
  assert routing.expert_ids.shape == (1, 2, 2)


def test_a_layer_of_defaults_works_and_all_of_it_gets_a_gradient() -> None:
  layer, x = MoE(jax.random.key(0), WIDTH), some_x()
  assert layer.cfg == MoEConfig() and not layer.scopes and not layer.bias_rule

  def objective(layer: MoE, x: Array) -> tuple[Array, tuple[Array, MoEAux]]:
    y, aux = layer(x)
    return jnp.square(y).sum(), (y, aux)

  gradients, (y, aux) = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(layer, x)
  assert y.shape == x.shape and y.dtype == x.dtype
  assert aux.load.sum() == ROWS * LENGTH * layer.cfg.router.top_k
  np.testing.assert_array_equal(aux.seen, aux.load, err_msg='without a rule the load is seen')
  assert not aux.losses and not aux.whole and aux.dropped == 0
  leaves = jax.tree.leaves(gradients)
  assert len(leaves) == len(jax.tree.leaves(layer)) + 1
  for leaf in leaves:
    assert np.isfinite(leaf).all() and np.any(leaf)


@pytest.mark.slow
def test_none_is_a_bias_of_zeros_and_a_document_a_row_bit_for_bit() -> None:
  scopes = {name: Scope() for name in BALANCE_LOSSES if name != 'load'}  # which is for noise
  layer = MoE(jax.random.key(0), WIDTH, scopes=scopes, bias_rule='quantile')
  x, whole_row = some_x(), jnp.ones((ROWS, LENGTH), jnp.int32)
  tokens = Tokens(ids=0 * whole_row, mask=whole_row > 0, segments=whole_row, rows=jnp.arange(ROWS))
  bias = jnp.zeros(layer.cfg.router.num_experts)
  given = layer(x, bias, tokens)
  for defaulted in (layer(x), layer(x, bias), layer(x, tokens=tokens)):
    assert jax.tree.structure(defaulted) == jax.tree.structure(given)
    for one, other in zip(jax.tree.leaves(defaulted), jax.tree.leaves(given), strict=True):
      assert one.dtype == other.dtype
      np.testing.assert_array_equal(one, other)


def test_a_set_larger_than_x_must_be_given_and_the_error_says_how() -> None:
  scopes = {'global_batch': Scope(rows=4 * ROWS), 'sequence': Scope()}
  layer, x = MoE(jax.random.key(0), WIDTH, scopes=scopes), some_x()
  with pytest.raises(ValueError) as error:
    layer(x)
  told = str(error.value)
  assert "the balance loss 'global_batch' is of sets of 8 rows, and x has 2" in told
  assert "use whole={'global_batch': ...}" in told and 'whole=None' in told
  # Each remedy is one.
  assert not layer(x, whole=None)[1].losses
  counts = jnp.arange(8, dtype=jnp.float32)
  assert set(layer(x, whole={'global_batch': counts})[1].losses) == set(scopes)
  small = MoE(jax.random.key(0), WIDTH, scopes={'global_batch': Scope(rows=0)})
  assert set(small(x)[1].losses) == {'global_batch'}


@pytest.mark.parametrize(
  ('arguments', 'problem'),
  [
    ({'scopes': {'seq': Scope()}}, "scopes='seq' is not one of"),
    ({'scopes': {'sequence': 0.01}}, "scopes['sequence']=0.01: use a Scope()"),
    ({'scopes': ['sequence']}, "scopes=['sequence']: use a dict"),
    ({'bias_rule': 'sgn'}, "bias_rule='sgn' is not one of"),
    ({'cfg': RouterConfig()}, 'use an MoEConfig, which holds the RouterConfig'),
  ],
  ids=lambda value: value if isinstance(value, str) else '',
)
def test_what_a_layer_cannot_be_built_of_is_told(
  arguments: dict[str, object], problem: str
) -> None:
  with pytest.raises(ConfigError) as caught:
    MoE(jax.random.key(0), WIDTH, **arguments)
  assert problem in str(caught.value)


def test_an_input_that_is_no_batch_of_vectors_is_told() -> None:
  layer, x = MoE(jax.random.key(0), WIDTH), some_x()
  for wrong in (x[0], x[..., 1:], x.astype(jnp.int32)):
    with pytest.raises(ValueError, match=r'use \[B, S, 16\] of a floating dtype'):
      layer(wrong)
  np.testing.assert_array_equal(layer(np.asarray(x))[0], layer(x)[0])


def test_padding_is_told_by_a_mask() -> None:
  layer, x = MoE(jax.random.key(0), WIDTH), some_x()
  mask = jnp.arange(LENGTH) < jnp.array([[LENGTH], [2]])
  y, aux = layer(x, None, whole_rows(mask))
  assert aux.load.sum() == (LENGTH + 2) * 2 and not y[1, 2:].any() and y[1, :2].all()


def test_a_mesh_without_an_axis_that_the_layer_needs_is_told() -> None:
  layer, x = MoE(jax.random.key(0), WIDTH), some_x()
  with jax.set_mesh(jax.make_mesh((2,), ('data',))):
    with pytest.raises(ValueError, match='make it with moejax.sharding.make_mesh'):
      jax.jit(lambda x: layer(x)[0])(x)
