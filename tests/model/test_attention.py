"""Attention layers against the oracle, what each field changes, and where their parameters lie."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.model import attention_cores
from moejax.model.attention import Attention, LatentAttention, make_attention
from moejax.model.config import (
  AttentionConfig,
  LatentConfig,
)
from moejax.model.kv_cache import empty_cache
from moejax.model.rope import attention_factor, softmax_factor
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.sharding.params import is_param, shardings
from tests.model.attention_cases import (
  CONFIGS,
  DY,
  EPS,
  POSITIONS,
  REAL,
  SEGMENTS,
  WIDTH,
  B,
  S,
  X,
  layer,
  layer_shapes,
  output_of,
  run,
  weights,
  window,
)
from tests.support import oracle
from tests.support.quick import QUICK


def oracle_layer(
  w: dict[str, np.ndarray], x: np.ndarray, cfg: AttentionConfig, eps: float = EPS
) -> np.ndarray:
  latent, rope = cfg.latent, cfg.rope
  turned = latent.d_rope if latent.kv_rank else round(cfg.d_head * rope.fraction)
  yarn = rope.yarn
  frequencies = None
  if yarn.factor != 1:
    ramp = yarn.original_length, yarn.beta_fast, yarn.beta_slow, yarn.truncate
    frequencies = oracle.yarn_frequencies(turned, rope.theta, yarn.factor, *ramp)

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


@pytest.mark.parametrize('name', CONFIGS)
def test_values_and_gradients_are_the_oracles(name: str) -> None:
  cfg, this = CONFIGS[name], layer(name)
  w = weights(this)
  np.testing.assert_allclose(
    output_of(name)[REAL], oracle_layer(w, X, cfg)[REAL], rtol=1e-4, atol=1e-4
  )
  gradient, to_x = run(this, X, DY, window(name))[1]
  gradients = {**weights(gradient), 'x': np.asarray(to_x)}
  # Along one direction of everything, and one of all vectors, whose part in it would be small.
  for part in (list(gradients), [path for path in w if w[path].ndim == 1]):
    direction = {path: np.random.default_rng(2).normal(size=gradients[path].shape) for path in part}

    def f(eps: np.ndarray, direction: dict[str, np.ndarray] = direction) -> float:
      inputs = {**w, 'x': X}
      for path, d in direction.items():
        inputs[path] = inputs[path] + eps * d
      return float((oracle_layer(inputs, inputs.pop('x'), cfg) * DY).sum())

    slope = oracle.slope(f, np.zeros(()), np.ones(()))
    ours = sum((gradients[path] * direction[path]).sum() for path in part)
    np.testing.assert_allclose(ours, slope, rtol=1e-4, atol=1e-3, err_msg=str(part))


# Fields, or parameters that are left out, each of which alone must be seen.
MATTERS: dict[str, list[dict[str, object] | str]] = {
  'multi-query, norm of heads': [
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
  ],
  'norm of projections, clip': [
    {'clip_qkv': 0.0},
    {'clip_qkv': 0.85},
    {'qk_norm': ''},
    {'eps': 1e-6},
    {'rope.interleaved': True},
  ],
  'sinks': [
    {'windows': (2,)},
    {'windows': (4,)},
    {'rope.yarn.factor': 1.0},
    {'rope.yarn.factor': 5.0},
    {'rope.yarn.truncate': True},
    {'rope.yarn.mscale': 0.0},
    {'rope.yarn.mscale_all_dim': 0.0},
    'sinks',
    'out.b',
  ],
  'latent': [
    {'windows': (4,)},
    {'windows': (6,)},
    {'latent.norm_eps': 0.1},
    {'rope.interleaved': True},
  ],
  'latent queries': [
    {'latent.norm_eps': 0.1},
    {'rope.interleaved': False},
    {'rope.yarn.factor': 1.0},
    {'rope.yarn.mscale': 0.0},
    {'rope.yarn.mscale_all_dim': 0.0},
    {'windows': (30,)},
    'q_a.b',
    'kv_a.b',
    'out.b',
  ],
}


def with_field(cfg: object, path: str, value: object) -> object:
  """A config with another value of the field at a dotted path."""
  name, _, rest = path.partition('.')
  if rest:
    value = with_field(getattr(cfg, name), rest, value)
  return dataclasses.replace(cfg, **{name: value})


@pytest.mark.parametrize(
  ('name', 'change'), [(name, change) for name in MATTERS for change in MATTERS[name]], ids=str
)
def test_every_field_is_seen_to_matter(name: str, change: dict[str, object] | str) -> None:
  cfg, w, eps = CONFIGS[name], weights(layer(name)), EPS
  if isinstance(change, str):
    del w[change]
  else:
    ((path, value),) = change.items()
    if path == 'eps':
      eps = value
    else:
      cfg = with_field(cfg, path, value)
  assert np.abs(oracle_layer(w, X, cfg, eps) - output_of(name))[REAL].max() > 0.01


def test_latent_decoding_never_makes_keys_or_values() -> None:
  """No array has both the cache's places and the heads' keys or values.

  What there is, is latents, scores and probabilities.
  """
  cfg = AttentionConfig(3, 3, 5, latent=LatentConfig(16, 0, 4, 7))
  this = layer_shapes(cfg)
  cache = empty_cache(1, B, 29, cfg, 0, jnp.float32)
  program = str(
    jax.make_jaxpr(lambda layer: layer(X[:, :1], SEGMENTS[:, :1], POSITIONS[:, :1], 0, cache))(this)
  )
  assert '2,1,29,20' in program, 'the cache, as one key-value head'
  for wide in ('29,3,5', '29,3,7', '29,3,9', '29,3,12', '3,29,5', '3,29,7', '3,29,9', '3,29,12'):
    assert wide not in program, program


def test_parameters_by_their_published_names_and_where_they_lie() -> None:
  def axes(name: str) -> dict[str, tuple[str, ...]]:
    parameters = jax.tree.leaves(layer_shapes(CONFIGS[name]), is_leaf=is_param)
    axes_of = [p.get_metadata('axes') for p in parameters]
    return dict(zip(weights(layer(name)), axes_of, strict=True))

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
        np.testing.assert_allclose(half[REAL], output_of(name)[REAL], rtol=1e-4, atol=1e-4)


def test_auto_is_the_platforms_best() -> None:
  assert AttentionConfig().implementation == 'auto'
  for base in (CONFIGS['grouped'], CONFIGS['latent']):

    def program(name: str, base: AttentionConfig = base) -> str:
      this = layer_shapes(dataclasses.replace(base, implementation=name))
      return str(jax.make_jaxpr(lambda layer: layer(X, SEGMENTS, POSITIONS))(this))

    programs = {name: program(name) for name in ('auto', 'chunked', 'xla')}
    best = attention_cores.BEST_CORES['cpu']
    assert programs['auto'] == programs[best] == programs['chunked'] != programs['xla']
