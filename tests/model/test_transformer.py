"""The whole model against the oracle, layer by layer, and what a forward pass is given."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.data.batch import Batch
from moejax.model.config import (
  AttentionConfig,
  ModelConfig,
)
from moejax.model.transformer import Draws, Output, Transformer
from moejax.moe import layer as moe_layer
from moejax.moe.routing import RouterConfig, Routing
from tests.model.transformer_cases import (
  BATCH,
  CONFIG,
  POSITIONS,
  REAL,
  SEGMENTS,
  SHAPES,
  TOKENS,
  B,
  D,
  E,
  S,
  biases,
  differentiate,
  model_of,
  output_of,
  replace,
)
from tests.support import oracle
from tests.support.quick import QUICK


def w64(layer: object, *names: str) -> list[np.ndarray]:
  return [np.asarray(getattr(layer, name)[...], np.float64) for name in names]


def oracle_attention(layer: object, x: np.ndarray, cfg: AttentionConfig) -> np.ndarray:
  q, k, v = (
    (x @ w64(p, 'w')[0]).reshape(B, S, -1, cfg.d_head) for p in (layer.q, layer.k, layer.v)
  )
  q, k = (oracle.rope(a, POSITIONS, cfg.rope.theta) for a in (q, k))
  return oracle.attention(q, k, v, SEGMENTS).reshape(B, S, -1) @ w64(layer.out, 'w')[0]


def oracle_moe(layer: object, x: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  routing = oracle.route(x @ w64(layer, 'router')[0], bias, top_k=2, score_fn='softmax')
  ids, weights = (a.reshape(B * S, 2) for a in (routing.expert_ids, routing.weights))
  y = oracle.moe(
    x.reshape(B * S, D),
    ids,
    weights,
    tuple(w64(layer.experts, 'gate', 'up', 'down')),
    np.broadcast_to(REAL.reshape(-1, 1), ids.shape),
    [tuple(w64(layer.shared, 'gate', 'up', 'down'))],
  )
  return y.reshape(x.shape), oracle.load(routing.expert_ids, REAL, E)


def oracle_model(model: Transformer, cfg: ModelConfig) -> tuple[list[np.ndarray], np.ndarray]:
  """Hidden states after the final norm and each depth of MTP, and loads; by a loop over layers."""

  def norm(x: np.ndarray, this: object) -> np.ndarray:
    return oracle.rms_norm(x, this.scale[...], cfg.norm_eps)

  def post(y: np.ndarray, this: object) -> np.ndarray:
    return norm(y, this) if cfg.sandwich_norm else y

  def layers(name: str) -> Iterator[object]:
    stack = getattr(model, name, None)
    count = len(jax.tree.leaves(stack)[0]) if stack else 0
    return iter([jax.tree.map(lambda a, i=i: a[i], stack) for i in range(count)])

  def attended(x: np.ndarray, block: object) -> np.ndarray:
    y = oracle_attention(block.attention, norm(x, block.attention_norm), cfg.attention)
    return x + post(y, block.attention_post_norm)

  def dense(x: np.ndarray, block: object) -> np.ndarray:
    x = attended(x, block)
    tokens = norm(x, block.ffn_norm).reshape(B * S, D)
    ffn = w64(block.ffn, 'gate', 'up', 'down')
    y = np.stack([oracle.swiglu(t, *ffn) for t in tokens]).reshape(x.shape)
    return x + post(y, block.ffn_post_norm)

  def moe(x: np.ndarray, block: object, bias: np.ndarray) -> np.ndarray:
    x = attended(x, block)
    y, load = oracle_moe(block.moe, norm(x, block.moe_norm), bias)
    loads.append(load)
    return x + post(y, block.moe_post_norm)

  x, loads = w64(model.embed, 'table')[0][TOKENS], []
  embedded, bias = x, list(biases(cfg))
  with_experts, without = layers('blocks'), layers('dense_blocks')
  for layer in range(cfg.num_layers):
    after = layer - cfg.num_dense_layers
    if after >= 0 and cfg.ffn_pattern[after % len(cfg.ffn_pattern)] == 'moe':
      x = moe(x, next(with_experts), bias.pop(0))
    else:
      x = dense(x, next(without))
  states = [norm(x, model.norm)]
  for depth, mtp in enumerate(layers('mtp'), 1):
    ahead = np.zeros_like(embedded)
    for b, s in np.ndindex(B, S - depth):
      if SEGMENTS[b, s] == SEGMENTS[b, s + depth]:
        ahead[b, s] = embedded[b, s + depth]
    both = np.concatenate([norm(ahead, mtp.token_norm), norm(states[-1], mtp.hidden_norm)], axis=-1)
    states.append(norm(moe(both @ w64(mtp.projection, 'w')[0], mtp.block, bias.pop(0)), mtp.norm))
  return states, np.stack(loads)


@pytest.mark.parametrize('name', SHAPES)
def test_the_model_is_the_oracles(name: str) -> None:
  cfg = SHAPES[name]
  model, out = model_of(cfg), output_of(cfg)
  (hidden, *ahead), loads = oracle_model(model, cfg)
  np.testing.assert_array_equal(out.aux.load, loads)
  np.testing.assert_allclose(out.hidden[REAL], hidden[REAL], rtol=1e-4, atol=1e-4)
  for got, want in zip(out.mtp_hidden, ahead, strict=True):
    np.testing.assert_allclose(got[REAL], want[REAL], rtol=1e-4, atol=1e-4)
  assert out.hidden.shape == (B, S, D) and out.cache is None and np.isfinite(out.hidden).all()
  head = model.embed.table[...].T if cfg.tie_embeddings else model.head.w[...]
  np.testing.assert_allclose(
    jax.jit(lambda m, h: m.logits(h))(model, out.hidden)[REAL],
    (hidden @ np.asarray(head, np.float64))[REAL],
    rtol=1e-3,
    atol=1e-3,
  )


@pytest.mark.slow
def test_tied_embeddings_are_one_parameter_with_both_gradients() -> None:
  tied = replace(num_dense_layers=2, tie_embeddings=True)
  model = model_of(tied)
  assert not hasattr(model, 'head')
  np.testing.assert_array_equal(model.head_weights(), np.asarray(model.embed.table[...]).T)
  untied = dataclasses.replace(tied, tie_embeddings=False)
  apart = jax.tree.map(lambda a: a, model_of(untied))
  apart.embed.table[...], apart.head.w[...] = model.embed.table[...], model.head_weights()
  value, gradient = differentiate(model, tied)
  value2, gradient2 = differentiate(apart, untied)
  np.testing.assert_allclose(value, value2, rtol=1e-6)
  want = gradient2.embed.table[...] + gradient2.head.w[...].T
  np.testing.assert_allclose(gradient.embed.table[...], want, rtol=1e-4, atol=1e-6)


def test_bfloat16_computes_so_and_keeps_parameters_and_routing_in_float32(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  cfg, routed, original = replace(dtype='bfloat16'), [], moe_layer.route

  def spy(logits: jax.Array, bias: jax.Array, *rest: object) -> Routing:
    routed.append((logits.dtype, bias.dtype))
    return original(logits, bias, *rest)

  monkeypatch.setattr(moe_layer, 'route', spy)
  model = model_of(cfg)
  assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype('float32')}
  out = output_of(cfg)
  assert routed and {*routed} == {(jnp.dtype('float32'),) * 2}
  assert out.hidden.dtype == jnp.bfloat16 and out.aux.load.dtype == jnp.int32
  assert jax.eval_shape(model.logits, out.hidden).dtype == jnp.float32
  np.testing.assert_allclose(
    out.hidden.astype(jnp.float32)[REAL], output_of(CONFIG).hidden[REAL], atol=0.3
  )
  kinds = jax.eval_shape(functools.partial(differentiate.__wrapped__, cfg=cfg), model)
  assert {leaf.dtype for leaf in jax.tree.leaves(kinds)} == {jnp.dtype('float32')}


@functools.partial(jax.jit, compiler_options=QUICK)
def with_losses(
  model: Transformer, router: jax.Array, whole: dict[str, jax.Array], replayed: jax.Array | None
) -> tuple[Output, Transformer]:
  """A forward pass, and the gradient of the logits' squares and of the balance losses."""

  def loss(model: Transformer) -> tuple[jax.Array, Output]:
    out = model(BATCH, router, whole=whole, replayed=replayed)
    balance = sum(a.sum() for a in out.aux.losses.values())
    return jnp.square(model.logits(out.hidden)).mean() + balance, out

  gradient, out = jax.grad(loss, has_aux=True)(model)
  return out, gradient


def test_every_layer_has_its_own_losses_and_its_own_part_of_what_is_known() -> None:
  whole = {'global_batch': np.array([[8, 0, 0, 0], [2, 2, 2, 2]], np.float32)}
  forward_with = jax.jit(
    lambda model, whole: model(BATCH, biases(CONFIG), whole=whole), compiler_options=QUICK
  )
  out = forward_with(model_of(CONFIG), whole)
  shapes = {name: a.shape for name, a in out.aux.losses.items()}
  assert shapes == {'global_batch': (2,), 'sequence': (2,)}
  assert out.aux.whole['global_batch'].shape == (2, E) and set(out.aux.whole) == {'global_batch'}
  mean = out.aux.stats.probs / REAL.sum()  # P of the tokens at hand; f is what came in
  np.testing.assert_allclose(out.aux.losses['global_batch'], [4 * mean[0, 0], 1], rtol=1e-5)
  np.testing.assert_allclose(out.aux.whole['global_batch'].sum(1), 2 * REAL.sum())
  assert not output_of(CONFIG).aux.losses, 'none where nothing is trained'
  np.testing.assert_allclose(out.hidden, output_of(CONFIG).hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_recorded_experts_give_the_same_output_and_gradients() -> None:
  """Whatever the bias is then: the model is the same function as long as the choice is."""
  model, whole = model_of(CONFIG), {'global_batch': np.ones((2, E), np.float32)}
  out, gradient = with_losses(model, biases(CONFIG), whole, None)
  assert out.aux.expert_ids.shape == (2, B, S, 2)
  again, gradient2 = with_losses(model, -biases(CONFIG), whole, out.aux.expert_ids)
  np.testing.assert_array_equal(again.aux.expert_ids, out.aux.expert_ids)
  once = jax.tree.leaves((out.hidden, out.aux.losses, gradient))
  twice = jax.tree.leaves((again.hidden, again.aux.losses, gradient2))
  for a, b in zip(once, twice, strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
  other, _ = with_losses(model, -biases(CONFIG), whole, None)
  assert not np.array_equal(other.aux.expert_ids, out.aux.expert_ids), 'another bias chooses others'


def test_what_is_drawn_follows_the_row_and_the_layer_and_not_the_cut() -> None:
  """A row is routed by its number, wherever in its batch it lies and whatever lies beside it."""
  router = RouterConfig(E, 2, noisy=True, jitter=0.2, expert_dropout=0.25)
  cfg = replace(moe=dataclasses.replace(CONFIG.moe, router=router))
  model, key = model_of(cfg), jax.random.key(4)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def noisy(
    model: Transformer, rows: jax.Array, batch: Batch, key: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    out = model(batch, biases(cfg), draws=Draws(key, rows))
    return out.hidden, out.aux.load

  def of(rows: list[int], numbers: list[int], key: jax.Array = key) -> np.ndarray:
    return np.asarray(
      noisy(model, np.array(numbers), jax.tree.map(lambda a: a[np.array(rows)], BATCH), key)[0]
    )

  both, swapped = of([0, 1], [7, 3]), of([1, 0], [3, 7])
  np.testing.assert_allclose(swapped[::-1], both, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(of([0, 0], [7, 7])[1], both[0], rtol=1e-5, atol=1e-5)
  for other in (of([0, 0], [7, 3])[1], of([0, 1], [7, 3], jax.random.key(5))[0]):
    assert np.abs(other - both[0])[REAL[0]].max() > 1e-3, 'another row, or another key'
  idle = [
    np.asarray(noisy(model, np.arange(B), BATCH, jax.random.key(i))[1]) == 0 for i in range(6)
  ]
  assert all(one.any(1).all() for one in idle), 'each layer leaves an expert out'
  assert not all((one[0] == one[1]).all() for one in idle), 'not the same one in every layer'
