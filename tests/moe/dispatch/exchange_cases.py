"""Models and layers that exchange tokens, for the tests of exchanges and of their cost."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.model.config import AttentionConfig, ModelConfig
from moejax.moe.dispatch.dispatchers import DISPATCHERS, DispatchConfig
from moejax.moe.dispatch.exchange import expert_specs
from moejax.moe.experts.ffn import ACTIVATIONS
from moejax.moe.experts.weights import Weights
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig, Routing
from moejax.sharding.logical_axes import RULES
from moejax.sharding.mesh import MeshConfig
from moejax.train.experiment.config import ExperimentConfig

FOUR = MeshConfig(1, fsdp=2, expert=4)
MIXED = MeshConfig(2, expert=2, tensor=2)
WAYS = [
  DispatchConfig('dense_matmul'),
  DispatchConfig('dense_matmul', 1.5),
  DispatchConfig(exchange='gather'),
  DispatchConfig(exchange='ragged'),
]
PRIME = 11  # divides the width of an expert's hidden layer, and nothing else


def name_of(cfg: DispatchConfig) -> str:
  """The id of a pytest parameter."""
  if isinstance(cfg, DispatchConfig):
    return f'{cfg.dispatcher}-{cfg.capacity_factor}-{cfg.exchange}'
  return str(cfg)


def experiment(cfg: DispatchConfig, mesh: MeshConfig) -> ExperimentConfig:
  """One layer of eight experts, each with biases."""
  model = ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=1,
    d_ff=16,
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, d_head=8),
    moe=MoEConfig(RouterConfig(8, 2), cfg, d_expert=2 * PRIME, expert_bias=True),
  )
  return ExperimentConfig(batch_size=8, seq_len=6, model=model, mesh=mesh)


def layer(
  cfg: DispatchConfig, mesh: Mesh
) -> tuple[Callable[..., Array], tuple[jax.ShapeDtypeStruct | Weights, ...]]:
  """A dispatcher on 8 x 6 tokens of 16 channels, K 2, E 8, and the shapes of its arguments."""

  def shape(spec: P, *shape: int, dtype: jnp.dtype = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  def forward(x: Array, weights: Array, stack: Weights, probs: Array, ids: Array) -> Array:
    routing = Routing(
      logits=probs,
      scores=probs,
      probs=probs,
      expert_ids=ids,
      weights=weights,
      best_ids=ids,
      margin=weights[..., 0],
      likely=probs,
      router=probs[0],
    )
    y, _ = DISPATCHERS[cfg.dispatcher](x, routing, stack, ACTIVATIONS['swiglu'](0.0), cfg)
    return y

  wide, narrow = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 16, 22), (8, 22, 16)))
  with jax.set_mesh(mesh):
    specs = expert_specs(Weights(wide, wide, narrow))
  stack = Weights(
    gate=shape(specs.gate, 8, 16, 22),
    up=shape(specs.up, 8, 16, 22),
    down=shape(specs.down, 8, 22, 16),
  )
  rows = P(RULES['batch'])
  x, weights = shape(rows, 8, 6, 16), shape(rows, 8, 6, 2)
  probs, ids = shape(rows, 8, 6, 8), shape(rows, 8, 6, 2, dtype=jnp.int32)
  return forward, (x, weights, stack, probs, ids)
