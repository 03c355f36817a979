"""Small models of drawn parameters, and the batch that their tests run."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import frozendict
from moejax.data.batch import Batch
from moejax.model.config import AttentionConfig, InitConfig, ModelConfig
from moejax.model.transformer import Output, Transformer
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.moe.token_sets import Scope
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
# Its one shared expert has a width of its own.
ODD_SHARED = dataclasses.replace(CONFIG.moe, d_shared=11)
# A token each, so that a row of the table is one place; row 0 ends in padding, row 1 begins in it.
TOKENS = RNG(0).permutation(V)[: B * S].reshape(B, S).astype(np.int32)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 0, 0], [0, 1, 1, 1, 1, 2, 3, 3]], np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 0, 1], [0, 0, 1, 2, 3, 0, 0, 1]], np.int32)
REAL = SEGMENTS > 0
BATCH = Batch(TOKENS, TOKENS, REAL, SEGMENTS, POSITIONS, np.zeros(B, np.int32))


def replace(**changes: object) -> ModelConfig:
  """CONFIG with other values of these fields."""
  return dataclasses.replace(CONFIG, **changes)


# Two turns of a dense layer and one with experts, after a run of one dense layer.
INTERLEAVED = replace(
  num_layers=5, num_dense_layers=2, ffn_pattern=('moe', 'dense'), moe=ODD_SHARED, mtp_depth=1
)
# A set of twice as many rows, and documents.
SCOPES = frozendict(global_batch=Scope(2 * B), sequence=Scope())
SHAPES = {
  'mixed': CONFIG,
  'experts everywhere': replace(num_dense_layers=0),
  'one with experts, tied': replace(num_dense_layers=2, tie_embeddings=True),
  'sandwich norm': replace(sandwich_norm=True),
  'three tokens predicted': replace(mtp_depth=2),
  'experts between dense layers': INTERLEAVED,
}


@functools.cache
def model_of(cfg: ModelConfig) -> Transformer:
  """A model of random numbers that follow from a parameter's name.

  Each norm has a scale of its own, so that another's shows. The numbers are not those of an
  initialised model, which would have to be compiled for each config.
  """

  def draw(path: tuple, a: jax.ShapeDtypeStruct) -> np.ndarray:
    name = jax.tree_util.keystr(path)
    rng = RNG(zlib.crc32(name.encode()))
    if 'scale' in name:
      return rng.uniform(0.5, 2, a.shape).astype(a.dtype)
    return rng.normal(scale=0.3, size=a.shape).astype(a.dtype)

  shapes = jax.eval_shape(lambda: Transformer(jax.random.key(0), cfg, SCOPES))
  return jax.tree_util.tree_map_with_path(draw, shapes)


def biases(cfg: ModelConfig) -> np.ndarray:
  """The router bias of each layer, large enough to decide something."""
  return RNG(1).normal(scale=0.2, size=(cfg.num_moe_layers, E)).astype(np.float32)


forward = jax.jit(lambda model, batch, router: model(batch, router), compiler_options=QUICK)


@functools.cache
def output_of(cfg: ModelConfig) -> Output:
  """What the model of a config gives for BATCH."""
  return forward(model_of(cfg), BATCH, biases(cfg))


@functools.partial(jax.jit, static_argnums=1, compiler_options=QUICK)
def differentiate(model: Transformer, cfg: ModelConfig) -> tuple[jax.Array, Transformer]:
  """The remat policy is the model's own: `cfg` is what tells the programs apart."""
  assert model.cfg == cfg

  def loss(model: Transformer) -> jax.Array:
    return jnp.square(model.logits(model(BATCH, biases(cfg)).hidden)).mean()

  return jax.value_and_grad(loss)(model)
