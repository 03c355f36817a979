"""The models that tests of the step are about, and what a batch gives with them.

Imports no test: what the files beside it share.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moejax.certify.tiny_config import LENGTH, ROWS, VOCAB
from moejax.certify.tiny_model import batch as make_batch
from moejax.config import frozendict
from moejax.model.config import AttentionConfig, LatentConfig, ModelConfig
from moejax.model.cross_entropy import LossConfig
from moejax.model.rope import RopeConfig, YarnConfig
from moejax.model.transformer import Transformer
from moejax.moe.balance.config import BalanceConfig
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.moe.statistics import token_statistics
from moejax.sharding.logical_axes import spec
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.sharding.params import shardings
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step.gradient_accumulation import gradients
from moejax.train.step.train_state import TrainState, init_state
from tests.support.quick import QUICK

# Of a gradient's largest entry: sums in another order, float32.
TOLERANCE = 1e-6
CONFIG = ExperimentConfig(
  steps=20,
  batch_size=ROWS,
  seq_len=LENGTH,
  model=ModelConfig(
    vocab_size=VOCAB,
    d_model=16,
    num_layers=2,
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, d_head=8),
    # The dispatcher that compiles fastest; the others are compared with it.
    moe=MoEConfig(
      router=RouterConfig(num_experts=4, top_k=2),
      dispatch=DispatchConfig('dense_matmul'),
      d_expert=8,
      num_shared=1,
    ),
  ),
  balance=BalanceConfig(
    losses=frozendict(sequence=0.1, ep_group=0.2, global_batch=0.3, router_z=0.01),
    bias_rule='sign',
    ep_groups=4,
  ),
)


def replace(cfg: ExperimentConfig, **changes: object) -> ExperimentConfig:
  """Fields of the model by their names, of the root otherwise."""
  model = {k: v for k, v in changes.items() if k in ModelConfig.__dataclass_fields__}
  root = {k: v for k, v in changes.items() if k not in model}
  return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **model), **root)


def with_moe(cfg: ExperimentConfig, **changes: object) -> ExperimentConfig:
  return replace(cfg, moe=dataclasses.replace(cfg.model.moe, **changes))


# What else families are made of, in two: each goes through all that must change nothing.
LATENT = replace(
  CONFIG,
  ffn_pattern=('moe', 'dense'),
  d_ff=12,
  mtp_depth=2,
  sandwich_norm=True,
  loss=LossConfig(z_coef='0.01', mtp_coef='0.5'),
  attention=AttentionConfig(
    2,
    2,
    8,
    RopeConfig(interleaved=True, yarn=YarnConfig(4.0, 8, mscale_all_dim=1.0)),
    latent=LatentConfig(kv_rank=6, q_rank=10, d_rope=4, d_value=6),
  ),
  moe=dataclasses.replace(CONFIG.model.moe, shared_gate=True, d_shared=10),
)
WINDOWED = replace(
  CONFIG,
  num_layers=4,
  ffn_pattern=('moe', 'dense'),
  d_ff=12,
  attention=AttentionConfig(
    4,
    2,
    8,
    RopeConfig(fraction=0.5),
    windows=(3, 0),
    sinks=True,
    qkv_bias=True,
    out_bias=True,
    qk_norm='head',
    clip_qkv=1.5,
  ),
  moe=dataclasses.replace(
    CONFIG.model.moe,
    expert_bias=True,
    activation='clamped_swiglu',
    activation_limit=0.5,
    router=dataclasses.replace(CONFIG.model.moe.router, logit_bias=True),
  ),
)
FEATURES = {'plain': CONFIG, 'latent': LATENT, 'windowed': WINDOWED}
features = pytest.mark.parametrize(
  'cfg',
  [
    CONFIG,
    *(pytest.param(FEATURES[name], marks=pytest.mark.slow) for name in ('latent', 'windowed')),
  ],
  ids=FEATURES,
)


@functools.cache
def parameters(cfg: ModelConfig) -> list[jax.Array]:
  """The numbers of a fresh model, leaf by leaf.

  Vectors are moved from where they start, since 1 and 0 hide what is done with them.
  """
  rng = np.random.default_rng(3)
  made = jax.jit(lambda key: Transformer(key, cfg), compiler_options=QUICK)(jax.random.key(0))
  return [
    leaf + (rng.normal(scale=0.1, size=leaf.shape).astype(np.float32) if np.ptp(leaf) == 0 else 0)
    for leaf in jax.tree.leaves(made)
  ]


def start(cfg: ExperimentConfig) -> TrainState:
  """A state with routers that choose unevenly, as trained ones do, and a bias that matters."""
  shapes = jax.eval_shape(functools.partial(init_state, cfg))
  state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
  # Whatever else the config says of how to compute with them.
  plain = dataclasses.replace(
    cfg.model,
    remat='none',
    unroll=1,
    moe=dataclasses.replace(cfg.model.moe, dispatch=CONFIG.model.moe.dispatch),
  )
  model = jax.tree.unflatten(jax.tree.structure(shapes.model), parameters(plain))
  w = model.blocks.moe.router
  w[...] = 20 * w[...]
  bias = 0.02 * jnp.arange(state.router.bias.size, dtype=jnp.float32).reshape(
    state.router.bias.shape
  )
  return state._replace(model=model, router=state.router._replace(bias=bias % 0.07))


@functools.cache
def differentiate(cfg: ExperimentConfig):
  return jax.jit(functools.partial(gradients, cfg=cfg), compiler_options=QUICK)


def flat(grads: object) -> np.ndarray:
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])


@functools.cache
def result(
  cfg: ExperimentConfig, mesh: MeshConfig | None = None, step: int = 0
) -> tuple[np.ndarray, object]:
  """(gradient as one vector, sums) of the batch."""
  state, batch, run = start(cfg)._replace(step=jnp.int32(step)), make_batch(), differentiate(cfg)
  if mesh is None:
    grads, sums, *_ = run(state, batch)
  else:
    devices = make_mesh(mesh)
    with jax.set_mesh(devices):
      state = jax.device_put(state, shardings(state, devices))
      grads, sums, *_ = run(state, jax.device_put(batch, NamedSharding(devices, spec('batch'))))
  return flat(grads), jax.device_get(sums)


def assert_same(one: tuple, other: tuple, tolerance: float = TOLERANCE) -> None:
  (grads, sums), (grads2, sums2) = one, other
  np.testing.assert_allclose(grads2, grads, rtol=0, atol=tolerance * np.abs(grads).max())
  np.testing.assert_array_equal(sums2.load, sums.load)
  np.testing.assert_allclose(sums2.loss, sums.loss, rtol=1e-6)
  for name, value in sums.terms.items():
    np.testing.assert_allclose(sums2.terms[name], value, rtol=2e-6, err_msg=name)
  statistics = token_statistics(sums2.stats)
  for name, value in token_statistics(sums.stats).items():
    np.testing.assert_allclose(statistics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
