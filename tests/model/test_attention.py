"""Attention layers against the oracle; what each field changes; decoding from a cache is the same attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.model import attention_cores as attend
from moejax.model.attention import Attention, LatentAttention, make_attention
from moejax.model.config import AttentionConfig, LatentConfig
from moejax.model.kv_cache import AHEAD, KVCache, empty_cache
from moejax.model.rope import RopeConfig, YarnConfig, attention_factor, softmax_factor
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.sharding.params import is_param, shardings
from tests.support import oracle
from tests.support.quick import QUICK

B, S, WIDTH, H, D = 2, 36, 16, 4, 6
EPS = 0.5  # of the model's norms: large enough to be seen
# Row 0: two documents and padding behind; row 1: padding in front, and one document.
SEGMENTS = np.array([[1] * 15 + [2] * 18 + [0] * 3, [0] * 3 + [1] * 33], np.int32)
REAL = SEGMENTS > 0
YARN = YarnConfig(4.0, 64, mscale=0.7, mscale_all_dim=1.0)
# Every field is somewhere other than its default; together they are what the published families are made of.
CONFIGS = {
  'grouped': AttentionConfig(H, 2, D, RopeConfig(100.0)),
  'multi-query, norm of heads': AttentionConfig(
    H, 1, 8, RopeConfig(100.0, 0.5, interleaved=True), windows=(4,), qk_norm='head', qkv_bias=True
  ),
  'norm of projections, clip': AttentionConfig(
    2, 2, D, RopeConfig(100.0), qk_norm='projection', clip_qkv=0.8
  ),
  'sinks': AttentionConfig(
    H,
    2,
    D,
    RopeConfig(100.0, yarn=dataclasses.replace(YARN, truncate=False)),
    windows=(3,),
    qkv_bias=True,
    out_bias=True,
    sinks=True,
  ),
  'latent': AttentionConfig(
    H, H, D, RopeConfig(100.0), windows=(5,), latent=LatentConfig(10, 0, 4, 3, 0.2)
  ),
  'latent queries': AttentionConfig(
    2,
    2,
    D,
    RopeConfig(100.0, interleaved=True, yarn=YARN),
    qkv_bias=True,
    out_bias=True,
    latent=LatentConfig(10, 8, 4, 8, 0.2),
  ),
}
RNG = np.random.default_rng(0)
X, DY = (RNG.normal(size=(B, S, WIDTH)).astype(np.float32) for _ in range(2))
DY *= REAL[..., None]


def positions_of(segments: np.ndarray) -> np.ndarray:
  positions = np.zeros_like(segments)
  for i in range(1, segments.shape[1]):
    positions[:, i] = np.where(segments[:, i] == segments[:, i - 1], positions[:, i - 1] + 1, 0)
  return positions


POSITIONS = positions_of(SEGMENTS)


@functools.cache
def layer(name: str) -> Attention | LatentAttention:
  """Norms, biases and sinks drawn as well: where they start, nobody would see them."""
  shapes = jax.eval_shape(
    lambda key: make_attention(key, WIDTH, CONFIGS[name], EPS, 1.0, 1.0), jax.random.key(0)
  )
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda a: rng.normal(1.0 if a.ndim == 1 else 0.0, 0.5, a.shape).astype(np.float32), shapes
  )


def window(name: str) -> int:
  return CONFIGS[name].windows[0]


def weights(layer: Attention | LatentAttention) -> dict[str, np.ndarray]:
  """The parameters by their paths, as the oracle names them."""
  found = jax.tree_util.tree_flatten_with_path(layer, is_leaf=is_param)[0]
  return {
    '.'.join(str(key.key if hasattr(key, 'key') else key.name) for key in path): np.asarray(
      p[...], np.float64
    )
    for path, p in found
  }


def oracle_layer(
  w: dict[str, np.ndarray], x: np.ndarray, cfg: AttentionConfig, eps: float = EPS
) -> np.ndarray:
  latent, rope = cfg.latent, cfg.rope
  turned = latent.d_rope if latent.kv_rank else round(cfg.d_head * rope.fraction)
  yarn = rope.yarn
  frequencies = (
    None
    if yarn.factor == 1
    else oracle.yarn_frequencies(
      turned,
      rope.theta,
      yarn.factor,
      yarn.original_length,
      yarn.beta_fast,
      yarn.beta_slow,
      yarn.truncate,
    )
  )

  def turn(a: np.ndarray) -> np.ndarray:
    return oracle.rope(
      a,
      POSITIONS,
      rope.theta,
      rotated=turned,
      interleaved=rope.interleaved,
      frequencies=frequencies,
      magnitude=attention_factor(rope),
    )

  common = {'turn': turn, 'window': cfg.windows[0]}
  if latent.kv_rank:
    return oracle.latent_attention(
      x,
      w,
      SEGMENTS,
      heads=cfg.num_heads,
      d_head=cfg.d_head,
      eps=latent.norm_eps,
      scale=(cfg.d_head + latent.d_rope) ** -0.5 * softmax_factor(rope),
      **common,
    )
  return oracle.grouped_attention(
    x,
    w,
    SEGMENTS,
    d_head=cfg.d_head,
    eps=eps,
    qk_norm=cfg.qk_norm,
    clip=cfg.clip_qkv,
    scale=cfg.d_head**-0.5 * softmax_factor(rope),
    **common,
  )


@functools.partial(jax.jit, static_argnums=3, compiler_options=QUICK)
def run(
  layer: Attention | LatentAttention, x: jax.Array, dy: jax.Array, window: int
) -> tuple[jax.Array, tuple[Attention | LatentAttention, jax.Array]]:
  """y, and the gradients of y · dy to the layer and to x."""
  y, back = jax.vjp(lambda layer, x: layer(x, SEGMENTS, POSITIONS, window)[0], layer, x)
  return y, back(dy)


@functools.cache
def ran(name: str) -> np.ndarray:
  return np.asarray(run(layer(name), X, DY, window(name))[0])


@pytest.mark.parametrize('name', CONFIGS)
def test_values_and_gradients_are_the_oracles(name: str) -> None:
  cfg, this = CONFIGS[name], layer(name)
  w = weights(this)
  np.testing.assert_allclose(ran(name)[REAL], oracle_layer(w, X, cfg)[REAL], rtol=1e-4, atol=1e-4)
  gradient, to_x = run(this, X, DY, window(name))[1]
  gradients = {**weights(gradient), 'x': np.asarray(to_x)}
  # Along one direction of everything, and one of all vectors, whose part in it would be small.
  for part in (list(gradients), [path for path in w if w[path].ndim == 1]):
    moved = {path: np.random.default_rng(2).normal(size=gradients[path].shape) for path in part}

    def f(eps: np.ndarray, moved: dict[str, np.ndarray] = moved) -> float:
      at = {
        path: a + eps * moved[path] if path in moved else a for path, a in {**w, 'x': X}.items()
      }
      return float((oracle_layer(at, at.pop('x'), cfg) * DY).sum())

    slope = oracle.slope(f, np.zeros(()), np.ones(()))
    ours = sum((gradients[path] * moved[path]).sum() for path in part)
    np.testing.assert_allclose(ours, slope, rtol=1e-4, atol=1e-3, err_msg=str(part))


# Fields, or parameters that are left out, each of which alone must be seen.
MATTERS = [
  *(
    ('multi-query, norm of heads', change)
    for change in (
      {'windows': (3,)},
      {'windows': (5,)},
      {'windows': (0,)},
      {'qk_norm': ''},
      {'eps': 1e-6},
      {'rope.theta': 200.0},
      {'rope.fraction': 1.0},
      {'rope.interleaved': False},
      'q.b',
      'k.b',
      'v.b',
    )
  ),
  *(
    ('norm of projections, clip', change)
    for change in (
      {'clip_qkv': 0.0},
      {'clip_qkv': 0.85},
      {'qk_norm': ''},
      {'eps': 1e-6},
      {'rope.interleaved': True},
    )
  ),
  *(
    ('sinks', change)
    for change in (
      {'windows': (2,)},
      {'windows': (4,)},
      {'rope.yarn.factor': 1.0},
      {'rope.yarn.factor': 5.0},
      {'rope.yarn.truncate': True},
      {'rope.yarn.mscale': 0.0},
      {'rope.yarn.mscale_all_dim': 0.0},
      'sinks',
      'out.b',
    )
  ),
  *(
    ('latent', change)
    for change in (
      {'windows': (4,)},
      {'windows': (6,)},
      {'latent.norm_eps': 0.1},
      {'rope.interleaved': True},
    )
  ),
  *(
    ('latent queries', change)
    for change in (
      {'latent.norm_eps': 0.1},
      {'rope.interleaved': False},
      {'rope.yarn.factor': 1.0},
      {'rope.yarn.mscale': 0.0},
      {'rope.yarn.mscale_all_dim': 0.0},
      {'windows': (30,)},
      'q_a.b',
      'kv_a.b',
      'out.b',
    )
  ),
]


def changed(cfg: object, path: str, value: object) -> object:
  name, _, rest = path.partition('.')
  return dataclasses.replace(
    cfg, **{name: changed(getattr(cfg, name), rest, value) if rest else value}
  )


@pytest.mark.parametrize(('name', 'change'), MATTERS, ids=str)
def test_every_field_is_seen_to_matter(name: str, change: dict[str, object] | str) -> None:
  cfg, w, eps = CONFIGS[name], weights(layer(name)), EPS
  if isinstance(change, str):
    del w[change]
  else:
    ((path, value),) = change.items()
    cfg, eps = (cfg, value) if path == 'eps' else (changed(cfg, path, value), EPS)
  assert np.abs(oracle_layer(w, X, cfg, eps) - ran(name))[REAL].max() > 0.01


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def decoded(
  cfg: AttentionConfig, pieces: tuple[int, ...], layer: Attention | LatentAttention, cache: KVCache
) -> tuple[jax.Array, KVCache]:
  """y of all tokens from a cache: these pieces at once, then one by one."""
  done, at = [], 0

  def step(cache: KVCache, rows: tuple[jax.Array, ...]) -> tuple[KVCache, jax.Array]:
    y, cache = layer(*rows, cfg.windows[0], cache)
    return cache, y

  for size in pieces:
    cache, y = step(cache, tuple(a[:, at : at + size] for a in (X, SEGMENTS, POSITIONS)))
    done, at = [*done, y], at + size
  cache, ones = jax.lax.scan(
    step, cache, tuple(a[:, at:].swapaxes(0, 1)[:, :, None] for a in (X, SEGMENTS, POSITIONS))
  )
  return jnp.concatenate([*done, ones[:, :, 0].swapaxes(0, 1)], 1), cache


@pytest.mark.parametrize('name', CONFIGS)
def test_decoding_from_the_cache_is_attending_at_once(name: str) -> None:
  """A prompt longer than a ring, a second longer than what a ring takes at once, and one by one: three times round it.

  What is in the places of an empty cache is never seen.
  """
  cfg = CONFIGS[name]
  pieces = (14, 10) if window(name) else (14,)
  cache = empty_cache(1, B, S + 4, cfg, cfg.windows[0], jnp.float32)
  y, filled = decoded(cfg, pieces, layer(name), cache)
  np.testing.assert_allclose(y[REAL], ran(name)[REAL], rtol=1e-4, atol=1e-4)
  assert (filled.length == S).all() and jax.tree.map(jnp.shape, filled) == jax.tree.map(
    jnp.shape, cache
  )
  rubbish = cache._replace(
    entries=tuple(a + 1e4 for a in cache.entries), segments=cache.segments + 1
  )
  again, _ = decoded(cfg, pieces, layer(name), rubbish)
  np.testing.assert_array_equal(np.asarray(y)[REAL], np.asarray(again)[REAL])


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def drafted(
  cfg: AttentionConfig, layer: Attention | LatentAttention, cache: KVCache, accepted: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Each turn writes AHEAD tokens, takes all back but a row's first `accepted` [turns, B], and writes one more.

  Those taken back are rubbish. -> y and slots of the others and of the one, [turns, B, AHEAD + 1, ...].
  """
  x, segments, positions = (
    jnp.pad(a, ((0, 0), (0, 2 * AHEAD), *((0, 0),) * (a.ndim - 2)))
    for a in (X, SEGMENTS, POSITIONS)
  )

  def run(cache: KVCache, size: int, right: jax.Array) -> tuple[jax.Array, KVCache, jax.Array]:
    slots = cache.length[0][:, None] + jnp.arange(size)
    rows = [jax.vmap(lambda a, at: a[at])(a, slots) for a in (x, segments, positions)]
    wrong = jnp.arange(size) >= right[:, None]
    return *layer(
      jnp.where(wrong[..., None], 100.0, rows[0]), *rows[1:], cfg.windows[0], cache
    ), slots

  def turn(cache: KVCache, accepted: jax.Array) -> tuple[KVCache, tuple[jax.Array, jax.Array]]:
    y, after, slots = run(cache, AHEAD, accepted)
    one, after, slot = run(after._replace(length=cache.length + accepted), 1, accepted)
    return after, (jnp.concatenate([y, one], 1), jnp.concatenate([slots, slot], 1))

  return jax.lax.scan(turn, cache, accepted)[1]


@pytest.mark.parametrize('name', ['grouped', 'sinks', 'latent'])
def test_tokens_taken_back_were_never_there(name: str) -> None:
  """Rows of one batch keep from 1 to all of what is written, over and over, also where a ring begins anew."""
  cfg = CONFIGS[name]
  cache = empty_cache(1, B, S + 2 * AHEAD, cfg, cfg.windows[0], jnp.float32)
  accepted = np.array([[1, 8], [4, 3], [7, 2], [2, 1], [5, 4], [8, 7], [3, 6]])
  y, slots = drafted(cfg, layer(name), cache, accepted)
  seen = 0
  for turn, b, i in np.ndindex(*slots.shape):
    s = int(slots[turn, b, i])
    if (i < accepted[turn, b] or i == AHEAD) and s < S and REAL[b, s]:
      seen += 1
      np.testing.assert_allclose(
        y[turn, b, i], ran(name)[b, s], rtol=1e-4, atol=1e-4, err_msg=f'{turn=} {b=} {s=}'
      )
  assert seen == REAL.sum()


def test_a_cache_holds_what_its_kind_needs_and_no_more() -> None:
  def shapes(name: str, length: int, window: int) -> list[tuple[int, ...]]:
    cache = empty_cache(2, 3, length, CONFIGS[name], window, jnp.bfloat16)
    assert all(a.dtype == jnp.bfloat16 for a in cache.entries)
    assert cache.segments.shape == (2, 3, cache.entries[0].shape[3]) and cache.length.shape == (
      2,
      3,
    )
    return [a.shape for a in cache.entries]

  assert shapes('grouped', 40, 0) == [(2, 3, 2, 40, D)] * 2
  assert (
    shapes('sinks', 40, 3) == [(2, 3, 2, 3 + AHEAD, D)] * 2
    and shapes('sinks', 5, 3) == [(2, 3, 2, 5, D)] * 2
  )
  assert shapes('latent queries', 40, 0) == [(2, 3, 1, 40, 10 + 4)], 'nothing for each head'


def test_latent_decoding_never_makes_keys_or_values() -> None:
  """No array has both the cache's places and the heads' keys or values: only latents, scores and probabilities."""
  cfg = AttentionConfig(3, 3, 5, latent=LatentConfig(16, 0, 4, 7))
  this = jax.eval_shape(
    lambda key: make_attention(key, WIDTH, cfg, EPS, 1.0, 1.0), jax.random.key(0)
  )
  cache = empty_cache(1, B, 29, cfg, 0, jnp.float32)
  program = str(
    jax.make_jaxpr(lambda layer: layer(X[:, :1], SEGMENTS[:, :1], POSITIONS[:, :1], 0, cache))(this)
  )
  assert '2,1,29,20' in program, 'the cache, as one key-value head'
  for wide in ('29,3,5', '29,3,7', '29,3,9', '29,3,12', '3,29,5', '3,29,7', '3,29,9', '3,29,12'):
    assert wide not in program, program


def test_parameters_by_their_published_names_and_where_they_lie() -> None:
  def axes(name: str) -> dict[str, tuple[str, ...]]:
    this = jax.eval_shape(
      lambda key: make_attention(key, WIDTH, CONFIGS[name], EPS, 1.0, 1.0), jax.random.key(0)
    )
    found = jax.tree_util.tree_flatten_with_path(this, is_leaf=is_param)[0]
    return dict(zip(weights(layer(name)), (p.get_metadata('axes') for _, p in found), strict=True))

  grouped = {
    **dict.fromkeys(('q.w', 'k.w', 'v.w'), ('embed', 'heads')),
    'out.w': ('heads', 'embed'),
  }
  norms = {'q_norm.scale': ('norm',), 'k_norm.scale': ('norm',)}
  biases = {'q.b': ('norm',), 'k.b': ('norm',), 'v.b': ('norm',)}
  assert axes('grouped') == grouped
  assert axes('multi-query, norm of heads') == grouped | norms | biases
  assert axes('norm of projections, clip') == grouped | norms
  assert axes('sinks') == grouped | biases | {'out.b': ('norm',), 'sinks': ('norm',)}
  latent = {
    'kv_a.w': ('embed', ''),
    'kv_a_norm.scale': ('norm',),
    'kv_b.w': ('embed', 'heads'),
    'out.w': ('heads', 'embed'),
  }
  assert axes('latent') == latent | {'q.w': ('embed', 'heads')}
  assert axes('latent queries') == latent | {
    'q_a.w': ('embed', ''),
    'q_a_norm.scale': ('norm',),
    'q_b.w': ('embed', 'heads'),
    'q_a.b': ('norm',),
    'kv_a.b': ('norm',),
    'out.b': ('norm',),
  }


@pytest.mark.parametrize('name', ['sinks', 'latent queries'])
def test_what_it_starts_from(name: str) -> None:
  make = jax.jit(
    lambda key: make_attention(key, WIDTH, CONFIGS[name], EPS, 0.5, 0.1), compiler_options=QUICK
  )
  for path, w in weights(make(jax.random.key(0))).items():
    if w.ndim == 1:
      assert (w == path.endswith('scale')).all(), path
    else:
      assert np.std(w) == pytest.approx(0.1 if path == 'out.w' else 0.5, rel=0.2), path


@pytest.mark.slow
@pytest.mark.parametrize(
  'name', ['grouped', 'norm of projections, clip', 'sinks', 'latent', 'latent queries']
)
def test_a_mesh_changes_nothing(name: str) -> None:
  """Rows over two devices, parameters over two, heads over two; with and without a cache."""
  mesh, cfg = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2)), CONFIGS[name]
  rows = [np.concatenate([a, a]) for a in (X, SEGMENTS, POSITIONS)]

  def both(layer: Attention | LatentAttention) -> tuple[jax.Array, jax.Array]:
    cache = empty_cache(1, 2 * B, S, cfg, cfg.windows[0], jnp.float32)
    first, cache = layer(*(a[:, :30] for a in rows), cfg.windows[0], cache)
    rest, _ = layer(*(a[:, 30:] for a in rows), cfg.windows[0], cache)
    return layer(*rows, cfg.windows[0])[0], jnp.concatenate([first, rest], 1)

  with jax.set_mesh(mesh):
    there = jax.tree.map(jax.device_put, layer(name), shardings(layer(name), mesh))
    for y in jax.jit(both, compiler_options=QUICK)(there):
      for half in (y[:B], y[B:]):
        np.testing.assert_allclose(half[REAL], ran(name)[REAL], rtol=1e-4, atol=1e-4)


def test_auto_is_the_platforms_best() -> None:
  assert AttentionConfig().implementation == 'auto'
  for base in (CONFIGS['grouped'], CONFIGS['latent']):

    def program(name: str, base: AttentionConfig = base) -> str:
      cfg = dataclasses.replace(base, implementation=name)
      this = jax.eval_shape(
        lambda key: make_attention(key, WIDTH, cfg, EPS, 1.0, 1.0), jax.random.key(0)
      )
      return str(jax.make_jaxpr(lambda layer: layer(X, SEGMENTS, POSITIONS))(this))

    programs = {name: program(name) for name in ('auto', 'chunked', 'xla')}
    assert (
      programs['auto']
      == programs[attend.BEST_CORES['cpu']]
      == programs['chunked']
      != programs['xla']
    )


def problems(cfg: type, **fields: object) -> list[str]:
  with pytest.raises(ConfigError) as error:
    cfg(**fields)
  return [problem.split(':')[0] for problem in error.value.problems]


def test_a_config_that_cannot_be_is_one_clear_error() -> None:
  assert problems(
    AttentionConfig,
    num_heads=3,
    num_kv_heads=2,
    d_head=5,
    implementation='flash',
    windows=(4, -1),
    qk_norm='all',
    clip_qkv=-1.0,
  ) == [
    'num_kv_heads=2 does not divide num_heads=3',
    "implementation='flash' is not one of ['auto', 'chunked', 'cudnn', 'splash', 'xla']",
    'windows=(4, -1)',
    "qk_norm='all' is not one of ['', 'head', 'projection']",
    'clip_qkv=-1.0',
    'd_head=5 * rope.fraction=1.0 = 5 channels to rotate',
  ]
  assert problems(AttentionConfig, num_kv_heads=0, windows=()) == ['num_kv_heads=0', 'windows=()']
  assert problems(AttentionConfig, d_head=6, rope=RopeConfig(fraction=0.5)) == [
    'd_head=6 * rope.fraction=0.5 = 3 channels to rotate'
  ]
  assert problems(LatentConfig, kv_rank=-1, q_rank=-2, d_rope=3, d_value=0, norm_eps=0.0) == [
    'kv_rank=-1',
    'q_rank=-2',
    'd_rope=3',
    'd_value=0',
    'norm_eps=0.0',
  ]


def test_latent_attention_refuses_what_it_has_no_equation_for() -> None:
  AttentionConfig(d_head=5, latent=LatentConfig(8))  # its d_head is not rotated
  assert problems(
    AttentionConfig,
    num_kv_heads=2,
    rope=RopeConfig(fraction=0.5),
    qk_norm='head',
    clip_qkv=8.0,
    sinks=True,
    latent=LatentConfig(8),
  ) == ['num_kv_heads=2', "qk_norm='head'", 'clip_qkv=8.0', 'sinks=True', 'rope.fraction=0.5']
