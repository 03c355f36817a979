"""The whole model against the oracle, layer by layer; who reaches whom in it; the same by scan, loop and remat."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError, frozendict
from moejax.data.batch import Batch
from moejax.model.blocks import Route
from moejax.model.config import REMAT_POLICIES, AttentionConfig, InitConfig, ModelConfig
from moejax.model.transformer import Draws, Output, Transformer, empty_caches, turn_windows
from moejax.moe import layer as moe_layer
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig, Routing
from moejax.moe.selection import Tokens
from moejax.moe.token_sets import Scope
from tests.support import oracle
from tests.support.quick import QUICK

RNG = np.random.default_rng
B, S, V, D, E = 2, 8, 32, 16, 4
CONFIG = ModelConfig(
  vocab_size=V,
  d_model=D,
  num_layers=3,
  num_dense_layers=1,
  d_ff=20,
  init=InitConfig(0.3),
  attention=AttentionConfig(num_heads=2, num_kv_heads=1, d_head=8),
  moe=MoEConfig(RouterConfig(E, 2), DispatchConfig('dense_matmul'), d_expert=8, num_shared=1),
)
# A token each, so that a row of the table is one place; row 0 ends in padding, row 1 begins in it.
TOKENS = RNG(0).permutation(V)[: B * S].reshape(B, S).astype(np.int32)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 0, 0], [0, 1, 1, 1, 1, 2, 3, 3]], np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 0, 1], [0, 0, 1, 2, 3, 0, 0, 1]], np.int32)
REAL = SEGMENTS > 0
BATCH = Batch(TOKENS, TOKENS, REAL, SEGMENTS, POSITIONS, np.zeros(B, np.int32))


def replace(**changes: object) -> ModelConfig:
  return dataclasses.replace(CONFIG, **changes)


SCOPES = frozendict(
  global_batch=Scope(2 * B), sequence=Scope()
)  # a set of twice as many rows, and documents
SHAPES = {
  'mixed': CONFIG,
  'experts everywhere': replace(num_dense_layers=0),
  'one with experts, tied': replace(num_dense_layers=2, tie_embeddings=True),
  'sandwich norm': replace(sandwich_norm=True),
  'three tokens predicted': replace(mtp_depth=2),
}


@functools.cache
def model_of(cfg: ModelConfig) -> Transformer:
  """Of random numbers that follow from a parameter's name; each norm has a scale of its own: another's shows.

  Not as initialised, which would have to be compiled for each config.
  """

  def drawn(path: tuple, a: jax.ShapeDtypeStruct) -> np.ndarray:
    name = jax.tree_util.keystr(path)
    rng = RNG(zlib.crc32(name.encode()))
    return (
      rng.uniform(0.5, 2, a.shape) if 'scale' in name else rng.normal(scale=0.3, size=a.shape)
    ).astype(a.dtype)

  return jax.tree_util.tree_map_with_path(
    drawn, jax.eval_shape(lambda: Transformer(jax.random.key(0), cfg, SCOPES))
  )


def biases(cfg: ModelConfig) -> np.ndarray:
  """Of each layer its own, and large enough to decide something."""
  return RNG(1).normal(scale=0.2, size=(cfg.num_moe_layers, E)).astype(np.float32)


forward = jax.jit(lambda model, batch, router: model(batch, router), compiler_options=QUICK)


@functools.cache
def ran(cfg: ModelConfig) -> Output:
  return forward(model_of(cfg), BATCH, biases(cfg))


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
  """Hidden states after the final norm, and after each depth of MTP; the load of each MoE layer; a loop over layers."""

  def norm(x: np.ndarray, this: object) -> np.ndarray:
    return oracle.rms_norm(x, this.scale[...], cfg.norm_eps)

  def post(y: np.ndarray, this: object) -> np.ndarray:
    return norm(y, this) if cfg.sandwich_norm else y

  def layers(stack: object, count: int) -> list[object]:
    return [jax.tree.map(lambda a, i=i: a[i], stack) for i in range(count)]

  def attended(x: np.ndarray, block: object) -> np.ndarray:
    y = oracle_attention(block.attention, norm(x, block.attention_norm), cfg.attention)
    return x + post(y, block.attention_post_norm)

  def moe(x: np.ndarray, block: object, bias: np.ndarray) -> np.ndarray:
    x = attended(x, block)
    y, load = oracle_moe(block.moe, norm(x, block.moe_norm), bias)
    loads.append(load)
    return x + post(y, block.moe_post_norm)

  x, loads = w64(model.embed, 'table')[0][TOKENS], []
  embedded, bias = x, list(biases(cfg))
  for block in layers(model.dense_blocks, cfg.num_dense_layers) if cfg.num_dense_layers else []:
    x = attended(x, block)
    tokens = norm(x, block.ffn_norm).reshape(B * S, D)
    y = np.stack([oracle.swiglu(t, *w64(block.ffn, 'gate', 'up', 'down')) for t in tokens]).reshape(
      x.shape
    )
    x = x + post(y, block.ffn_post_norm)
  for block in layers(model.blocks, cfg.num_layers - cfg.num_dense_layers):
    x = moe(x, block, bias.pop(0))
  states = [norm(x, model.norm)]
  for depth, mtp in enumerate(layers(model.mtp, cfg.mtp_depth) if cfg.mtp_depth else [], 1):
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
  model, out = model_of(cfg), ran(cfg)
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


def test_scan_is_a_loop_over_the_layers() -> None:
  model, cfg = model_of(CONFIG), CONFIG

  @functools.partial(jax.jit, compiler_options=QUICK)
  def loop(model: Transformer) -> tuple[jax.Array, list[jax.Array]]:
    x, loads = model.embed(TOKENS, jnp.float32), []
    for i in range(cfg.num_dense_layers):
      x, _ = jax.tree.map(lambda a, i=i: a[i], model.dense_blocks)(x, BATCH, 0, None)
    for i in range(cfg.num_moe_layers):
      block = jax.tree.map(lambda a, i=i: a[i], model.blocks)
      tokens = Tokens(TOKENS, REAL, SEGMENTS, jnp.arange(B))
      x, _, aux = block(x, BATCH, 0, None, Route(biases(cfg)[i], tokens, None))
      loads.append(aux.load)
    return model.norm(x), loads

  hidden, loads = loop(model)
  np.testing.assert_allclose(hidden, ran(cfg).hidden, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(loads, ran(cfg).aux.load)
  np.testing.assert_allclose(ran(replace(unroll=2)).hidden, hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_windows_alternate_by_layer_whatever_a_turn_of_the_scan_holds() -> None:
  """The period divides the stack (a turn of two layers), or does not (one turn of all), and starts in the dense one."""

  def windowed(windows: tuple[int, ...], layers: int) -> ModelConfig:
    return replace(
      num_layers=layers, attention=dataclasses.replace(CONFIG.attention, windows=windows)
    )

  assert [turn_windows(stack, windowed((1, 2), 5)) for stack in ('dense_blocks', 'blocks')] == [
    (1,),
    (2, 1),
  ]
  assert [turn_windows(stack, windowed((1, 2), 4)) for stack in ('dense_blocks', 'blocks')] == [
    (1,),
    (2, 1, 2),
  ]
  model, hidden = model_of(CONFIG), {}
  for windows in ((2, 0), (2, 0, 2), (0, 2), (0,)):
    cfg = windowed(windows, 3)
    this = jax.tree.unflatten(jax.tree.structure(model_of(cfg)), jax.tree.leaves(model))
    hidden[windows] = np.asarray(forward(this, BATCH, biases(cfg)).hidden)
  np.testing.assert_allclose(
    hidden[2, 0], hidden[2, 0, 2], rtol=1e-5, atol=1e-5
  )  # two turns' worth, and one turn
  for windows in ((0, 2), (0,)):
    assert np.abs(hidden[windows] - hidden[2, 0])[REAL].max() > 1e-3


@pytest.mark.slow
def test_depth_scaled_norms_and_tiny_weights_at_the_start() -> None:
  """Post-norms at c / sqrt(L), weights of TinyInit, and what writes to the residual narrower by sqrt(2 L)."""

  def made(init: InitConfig, **changes: object) -> Transformer:
    cfg = replace(d_model=64, init=init, **changes)
    return jax.jit(lambda key: Transformer(key, cfg), compiler_options=QUICK)(jax.random.key(0))

  tiny = made(
    InitConfig(rule='tiny', embed_std=0.5, attention_gain=0.283, ffn_gain=0.432), sandwich_norm=True
  )
  for block, ffn in ((tiny.dense_blocks, 'ffn_post_norm'), (tiny.blocks, 'moe_post_norm')):
    np.testing.assert_allclose(block.attention_post_norm.scale[...], 0.283 / 3**0.5, rtol=1e-6)
    np.testing.assert_allclose(getattr(block, ffn).scale[...], 0.432 / 3**0.5, rtol=1e-6)
  for w in (tiny.blocks.moe.experts.down, tiny.blocks.attention.q.w, tiny.head.w):
    np.testing.assert_allclose(np.std(w), (2 * 64 * 3) ** -0.5, rtol=0.1)
  np.testing.assert_allclose(np.std(tiny.embed.table), 0.5, rtol=0.1)
  deep = made(InitConfig(0.3, 'depth'))
  for narrow, wide in (
    (deep.blocks.attention.out.w, deep.blocks.attention.q.w),
    (deep.dense_blocks.ffn.down, deep.dense_blocks.ffn.up),
    (deep.blocks.moe.shared.down, deep.blocks.moe.shared.up),
    (deep.blocks.moe.experts.down, deep.blocks.moe.experts.up),
  ):
    np.testing.assert_allclose(np.std(narrow) * 6**0.5, 0.3, rtol=0.15)
    np.testing.assert_allclose(np.std(wide), 0.3, rtol=0.15)


def test_layers_differ_from_each_other() -> None:
  made = jax.jit(lambda key: Transformer(key, CONFIG), compiler_options=QUICK)(jax.random.key(0))
  for w in (made.blocks.moe.experts.gate, made.blocks.attention.q.w):
    assert not np.allclose(w[0], w[1]) and abs(np.std(w) - CONFIG.init.std) < 0.05


@pytest.mark.parametrize(
  'dispatcher', ['dense_matmul', pytest.param('sparse_matmul', marks=pytest.mark.slow)]
)
def test_a_token_reaches_later_ones_of_its_document_and_nobody_else(dispatcher: str) -> None:
  """By gradient, exactly 0 or not: of each place's output to the row of the table that each place reads."""
  cfg = replace(moe=dataclasses.replace(CONFIG.moe, dispatch=DispatchConfig(dispatcher)))
  direction = RNG(2).normal(size=(B, S, D)).astype(np.float32)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def reach(model: Transformer) -> jax.Array:
    def one(place: jax.Array) -> jax.Array:
      def output(table: jax.Array) -> jax.Array:
        moved = jax.tree.map(lambda a: a, model)
        moved.embed.table[...] = table
        return (moved(BATCH, biases(cfg)).hidden * direction).reshape(B * S, D)[place].sum()

      return jax.grad(output)(model.embed.table[...])[TOKENS.ravel()].any(-1)

    return jax.lax.map(one, jnp.arange(B * S))

  found = np.asarray(reach(model_of(cfg))).reshape(B, S, B, S)
  want = np.zeros_like(found)
  for b, s, at in np.ndindex(B, S, S):
    want[b, s, b, at] = at <= s and SEGMENTS[b, s] == SEGMENTS[b, at]
  np.testing.assert_array_equal(found[REAL], want[REAL])


@pytest.mark.parametrize('dispatcher', ['dense_matmul', 'sparse_matmul'])
def test_other_tokens_later_or_in_other_documents_change_nothing(dispatcher: str) -> None:
  """By perturbation: it also sees a leak through the choice of experts, which has no gradient."""
  cfg = replace(moe=dataclasses.replace(CONFIG.moe, dispatch=DispatchConfig(dispatcher)))
  before = np.asarray(ran(cfg).hidden)
  for b, at in np.ndindex(B, S):
    tokens = TOKENS.copy()
    tokens[b, at] = (tokens[b, at] + 7) % V
    after = forward(model_of(cfg), BATCH._replace(tokens=tokens), biases(cfg)).hidden
    moved = np.abs(np.asarray(after) - before).max(-1) > 1e-5
    want = np.zeros_like(moved)
    want[b, at:] = SEGMENTS[b, at:] == SEGMENTS[b, at]
    np.testing.assert_array_equal(moved[REAL], want[REAL], err_msg=f'{b=} {at=}')


@functools.partial(jax.jit, static_argnums=1, compiler_options=QUICK)
def differentiate(model: Transformer, cfg: ModelConfig) -> tuple[jax.Array, Transformer]:
  """The remat policy is the model's own: `cfg` is what tells the programs apart."""
  assert model.cfg == cfg

  def loss(model: Transformer) -> jax.Array:
    return jnp.square(model.logits(model(BATCH, biases(cfg)).hidden)).mean()

  return jax.value_and_grad(loss)(model)


@pytest.mark.slow
@pytest.mark.parametrize('remat', sorted(set(REMAT_POLICIES) - {'none'}))
def test_remat_changes_nothing(remat: str) -> None:
  cfg = replace(remat=remat)
  (value, gradient), (value2, gradient2) = (differentiate(model_of(c), c) for c in (CONFIG, cfg))
  np.testing.assert_allclose(value2, value, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient2), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)


def test_remat_recomputes() -> None:
  """The more products in the program, the fewer kept for its backward pass."""
  products = {}
  for remat in REMAT_POLICIES:
    cfg = replace(remat=remat)
    products[remat] = str(differentiate.trace(model_of(cfg), cfg).jaxpr).count('dot_general')
  assert products['none'] < products['dots'] < products['full'], products


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
  out = ran(cfg)
  assert routed and {*routed} == {(jnp.dtype('float32'),) * 2}
  assert out.hidden.dtype == jnp.bfloat16 and out.aux.load.dtype == jnp.float32
  assert jax.eval_shape(model.logits, out.hidden).dtype == jnp.float32
  np.testing.assert_allclose(
    out.hidden.astype(jnp.float32)[REAL], ran(CONFIG).hidden[REAL], atol=0.3
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
    return jnp.square(model.logits(out.hidden)).mean() + sum(
      a.sum() for a in out.aux.losses.values()
    ), out

  gradient, out = jax.grad(loss, has_aux=True)(model)
  return out, gradient


def test_every_layer_has_its_own_losses_and_its_own_part_of_what_is_known() -> None:
  model, whole = (
    model_of(CONFIG),
    {'global_batch': np.array([[8, 0, 0, 0], [2, 2, 2, 2]], np.float32)},
  )
  known = jax.jit(
    lambda model, whole: model(BATCH, biases(CONFIG), whole=whole), compiler_options=QUICK
  )
  out = known(model, whole)
  assert {name: a.shape for name, a in out.aux.losses.items()} == {
    'global_batch': (2,),
    'sequence': (2,),
  }
  assert out.aux.whole['global_batch'].shape == (2, E) and set(out.aux.whole) == {'global_batch'}
  mean = out.aux.stats.probs / REAL.sum()  # P of the tokens at hand; f is what came in
  np.testing.assert_allclose(out.aux.losses['global_batch'], [4 * mean[0, 0], 1], rtol=1e-5)
  np.testing.assert_allclose(out.aux.whole['global_batch'].sum(1), 2 * REAL.sum())
  assert not ran(CONFIG).aux.losses, 'none where nothing is trained'
  np.testing.assert_allclose(out.hidden, ran(CONFIG).hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_recorded_experts_give_the_same_output_and_gradients() -> None:
  """Whatever the bias is then: the model is the same function as long as the choice is."""
  model, whole = model_of(CONFIG), {'global_batch': np.ones((2, E), np.float32)}
  out, gradient = with_losses(model, biases(CONFIG), whole, None)
  assert out.aux.expert_ids.shape == (2, B, S, 2)
  again, gradient2 = with_losses(model, -biases(CONFIG), whole, out.aux.expert_ids)
  np.testing.assert_array_equal(again.aux.expert_ids, out.aux.expert_ids)
  for a, b in zip(
    jax.tree.leaves((out.hidden, out.aux.losses, gradient)),
    jax.tree.leaves((again.hidden, again.aux.losses, gradient2)),
    strict=True,
  ):
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


def test_caches_have_room_for_each_layer_in_the_compute_dtype() -> None:
  caches = jax.eval_shape(lambda: empty_caches(B, 5, replace(dtype='bfloat16')))
  assert {name: [cache.entries[0].shape for cache in turn] for name, turn in caches.items()} == {
    'dense_blocks': [(1, B, 1, 5, 8)],
    'blocks': [(2, B, 1, 5, 8)],
  }
  assert caches['blocks'][0].entries[1].dtype == jnp.bfloat16
  assert set(jax.eval_shape(lambda: empty_caches(B, 5, replace(num_dense_layers=0)))) == {'blocks'}


def test_a_config_that_cannot_be_is_one_clear_error() -> None:
  with pytest.raises(ConfigError) as error:
    ModelConfig(
      vocab_size=-1,
      d_model=0,
      num_layers=2,
      num_dense_layers=2,
      d_ff=0,
      norm_eps=0.0,
      mtp_depth=-1,
      init=InitConfig(ffn_gain=0.4),
      dtype='float16',
      remat='some',
      unroll=0,
    )
  assert [problem.split(':')[0] for problem in error.value.problems] == [
    'vocab_size=-1',
    'd_model=0',
    'd_ff=0',
    'unroll=0',
    'num_dense_layers=2',
    'norm_eps=0.0',
    'mtp_depth=-1',
    "init.ffn_gain=0.4 is for the norm of a branch's output",
    "dtype='float16' is not one of ['bfloat16', 'float32']",
    "remat='some' is not one of ['dots', 'full', 'none']",
  ]
