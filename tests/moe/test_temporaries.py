"""What counting, balancing and dispatching take besides their arguments, in compiled programs.

A bound is a multiple of the logits' bytes, [B, S, E] f32. XLA's CPU backend really allocates what
is written as [B, S, K, E], and would be caught here.

Letters: B batch, S sequence, D model, F FFN hidden, E experts, K experts per token.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax import Array

from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.bias_quantile import above_the_line
from moejax.moe.dispatch.dispatchers import DISPATCHERS, DispatchConfig
from moejax.moe.layer import MoE, MoEConfig
from moejax.moe.routing import RouterConfig, Routing
from moejax.moe.selection import margin
from moejax.moe.statistics import observe
from moejax.moe.token_sets import Scope, expert_load

B, S, E, K = 2, 512, 64, 8
LOGITS = jax.ShapeDtypeStruct((B, S, E), jnp.float32)
SEGMENTS = jax.ShapeDtypeStruct((B, S), jnp.int32)


def ids_of(places: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((B, S, places), jnp.int32)


def temporaries(function: Callable[..., object], *arguments: jax.ShapeDtypeStruct) -> float:
  """Bytes of the compiled function's temporaries, of which the logits' are 1."""
  compiled = jax.jit(function).lower(*arguments).compile()
  return compiled.memory_analysis().temp_size_in_bytes / (4 * B * S * E)


def routed(logits: Array, ids: Array) -> Routing:
  """A routing by softmax, without a search for the best experts, which takes room of its own."""
  probs = jax.nn.softmax(logits)
  weights = jnp.take_along_axis(probs, ids, axis=-1)
  nothing = jnp.zeros((0, E))
  return Routing(logits, probs, probs, ids, weights, ids, logits[..., 0], probs, nothing)


@pytest.mark.parametrize('name', sorted(BALANCE_LOSSES))
def test_a_loss_and_its_gradient_need_few_arrays_of_the_logits_size(name: str) -> None:
  """Of them one is P. A sequence loss adds the counts of all documents that there can be, twice:

  by document, and by token. Importance adds the weights' way back into P.
  """

  def value(logits: Array, ids: Array, segments: Array) -> Array:
    loss = BALANCE_LOSSES[name].value
    return loss(routed(logits, ids), segments > 0, segments, Scope())

  most = {'sequence': 3.3, 'importance': 2.6}.get(name, 1.3)
  assert temporaries(jax.value_and_grad(value), LOGITS, ids_of(K), SEGMENTS) < most


def test_counting_needs_no_more_than_statistics_of_each_token_do() -> None:
  def load(ids: Array, segments: Array) -> Array:
    return expert_load(ids, segments > 0, E)

  def statistics(logits: Array, ids: Array, segments: Array) -> tuple:
    return observe(routed(logits, ids), ids, segments > 0)

  assert temporaries(load, ids_of(K), SEGMENTS) < 0.5  # three indices for each copy
  assert temporaries(statistics, LOGITS, ids_of(K), SEGMENTS) < 3.4
  for function in (margin, above_the_line):
    # As many places as experts, as expert choice has them.
    assert temporaries(function, LOGITS, ids_of(E)) < 2.5


@pytest.mark.slow
def test_expert_choice_dispatches_as_many_copies_as_token_choice() -> None:
  """E C of them, about T K, and not the T E places that its routing has."""
  x = jax.ShapeDtypeStruct((B, S, 64), jnp.float32)

  def of_layer(selection: str, dispatcher: str) -> float:
    cfg = MoEConfig(RouterConfig(E, 2, selection=selection), DispatchConfig(dispatcher), 64)
    layer = jax.eval_shape(lambda: MoE(jax.random.key(0), 64, cfg))

    def value(layer: MoE, x: Array) -> Array:
      return jnp.square(layer(x, whole=None)[0]).sum()

    return temporaries(jax.grad(value, argnums=(0, 1)), layer, x)

  token_choice = of_layer('top_k', 'sparse_matmul')
  # Routing itself has more arrays of [B, S, E]: an order of tokens for each expert, and weights.
  for dispatcher in DISPATCHERS:
    assert of_layer('expert_choice', dispatcher) < 3 * token_choice
