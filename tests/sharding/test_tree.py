"""Names and kinds of the leaves of a tree, as checkpoints store them."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.sharding.tree import flatten, kinds
from tests.checkpoint.saved_steps import Layer, state


def test_names_are_ours_and_not_flaxs() -> None:
  assert list(flatten(state())) == ['step', 'model/blocks/gate', 'model/blocks/up', 'router']
  assert set(flatten({'model': Layer()})) == {'model/value', 'model/parts/0'}
  assert kinds(state())['model/blocks/up'] == 'bfloat16[64, 40]'


def test_leaves_of_one_name_and_leaves_not_of_jax_are_refused() -> None:
  with pytest.raises(TypeError, match='a/b: two leaves'):
    flatten({'a/b': jnp.ones(1), 'a': {'b': jnp.ones(1)}})
  with pytest.raises(TypeError, match='a is ndarray'):
    flatten({'a': np.ones(1)})
