"""A dense model to make experts of, and the models with experts that it may become."""

import dataclasses

import numpy as np

from moejax.model.config import AttentionConfig, ModelConfig
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig

RNG = np.random.default_rng
B, S, V, D, F, L = 2, 8, 32, 16, 16, 2
SOURCE = ModelConfig(
  vocab_size=V,
  d_model=D,
  num_layers=L,
  d_ff=F,
  attention=AttentionConfig(num_heads=2, num_kv_heads=1, d_head=8, qkv_bias=True, qk_norm='head'),
  moe=MoEConfig(RouterConfig(1, 1), DispatchConfig('dense_matmul'), d_expert=F),
)


def target(
  router: RouterConfig,
  d_expert: int,
  num_shared: int = 0,
  shared_gate: bool = False,
  d_shared: int = 0,
  **changes: object,
) -> ModelConfig:
  """SOURCE with these experts, and with other values of further fields."""
  moe = dataclasses.replace(
    SOURCE.moe,
    router=router,
    d_expert=d_expert,
    num_shared=num_shared,
    d_shared=d_shared,
    shared_gate=shared_gate,
  )
  return dataclasses.replace(SOURCE, moe=moe, **changes)
