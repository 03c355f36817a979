"""What a model costs, against sums done by hand on a small one."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from moejax.model.config import AttentionConfig, LatentConfig, ModelConfig
from moejax.model.transformer import Transformer
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.sharding.params import bytes_on_device
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.cost import Parameters, count_parameters, flops_per_token, mfu

CONFIG = ExperimentConfig(
  seq_len=12,
  model=ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=3,
    num_dense_layers=1,
    d_ff=20,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, d_head=8),
    moe=MoEConfig(RouterConfig(8, 2), d_expert=10, num_shared=1),
  ),
)
TIED = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, tie_embeddings=True))

# q; k and v; out; and the two norms of the block
ATTENTION = 16 * 32 + 2 * 16 * 16 + 32 * 16 + 2 * 16
DENSE = ATTENTION + 3 * 16 * 20
EXPERT = 3 * 16 * 10
MOE = ATTENTION + 16 * 8 + 8 * EXPERT + EXPERT  # the router; eight routed; one shared
EMBEDDING = 32 * 16
TOTAL = EMBEDDING + DENSE + 2 * MOE + 16 + EMBEDDING  # the last norm, and the head
IDLE = 2 * 6 * EXPERT  # six of eight experts, in each of two layers


def model_of(cfg: ExperimentConfig) -> Transformer:
  """Shapes only."""
  return jax.eval_shape(lambda key: Transformer(key, cfg.model), jax.random.key(0))


@pytest.mark.parametrize(('cfg', 'less'), [(CONFIG, 0), (TIED, EMBEDDING)], ids=['apart', 'tied'])
def test_parameters_total_and_active(cfg: ExperimentConfig, less: int) -> None:
  assert count_parameters(model_of(cfg), cfg) == Parameters(
    TOTAL - less, TOTAL - less - IDLE, EMBEDDING, 0, 0
  )


def test_noise_is_a_second_router_in_each_layer() -> None:
  router = dataclasses.replace(CONFIG.model.moe.router, noisy=True)
  moe = dataclasses.replace(CONFIG.model.moe, router=router)
  cfg = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, moe=moe))
  more = 2 * 16 * 8
  assert count_parameters(model_of(cfg), cfg) == Parameters(
    TOTAL + more, TOTAL + more - IDLE, EMBEDDING, 0, 0
  )


def test_multi_token_prediction_is_apart() -> None:
  """Each depth is a projection of two states, a block, two norms before and one after; and the head
  once more."""
  cfg = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, mtp_depth=2))
  mtp = 2 * (2 * 16 * 16 + MOE + 3 * 16)
  parameters = count_parameters(model_of(cfg), cfg)
  assert parameters == Parameters(TOTAL + mtp, TOTAL - IDLE, EMBEDDING, mtp, mtp - IDLE)
  attention = 3 * (2 * 2 * 6 * 4 * 8) * 5
  assert (
    flops_per_token(parameters, cfg)
    == 6 * (TOTAL - IDLE - EMBEDDING + mtp - IDLE + 2 * EMBEDDING) + attention
  )


def test_layers_without_experts_may_lie_between_and_shared_experts_be_of_any_width() -> None:
  """A dense layer, one with experts, a dense one, one with experts; the shared expert is 7 wide."""
  moe = dataclasses.replace(CONFIG.model.moe, d_shared=7)
  model = dataclasses.replace(CONFIG.model, num_layers=4, ffn_pattern=('moe', 'dense'), moe=moe)
  cfg = dataclasses.replace(CONFIG, model=model)
  total = TOTAL + DENSE + 2 * 3 * 16 * (7 - 10)
  parameters = count_parameters(model_of(cfg), cfg)
  assert parameters == Parameters(total, total - IDLE, EMBEDDING, 0, 0)
  attention = 3 * (2 * 2 * 6 * 4 * 8) * 4
  assert flops_per_token(parameters, cfg) == 6 * (total - IDLE - EMBEDDING) + attention


def test_latent_attention_has_wider_queries_than_values() -> None:
  latent = AttentionConfig(4, 4, 8, latent=LatentConfig(kv_rank=6, q_rank=5, d_rope=4, d_value=3))
  cfg = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, attention=latent))
  parameters = count_parameters(model_of(cfg), cfg)
  more = 16 * 5 + 5 + 5 * 4 * 12 + 16 * 10 + 6 + 6 * 4 * 11 + 4 * 3 * 16 - (ATTENTION - 2 * 16)
  assert parameters.total == TOTAL + 3 * more
  assert (
    flops_per_token(parameters, cfg)
    == 6 * (TOTAL + 3 * more - IDLE - EMBEDDING) + 3 * 12 * 4 * (12 + 3) * 3
  )


def test_flops_of_a_token() -> None:
  """Six for each active number that multiplies; a token sees six others on average, in four heads
  of eight."""
  products = TOTAL - IDLE - EMBEDDING
  attention = 3 * (2 * 2 * 6 * 4 * 8) * 3  # three passes; q k and p v; three layers
  for cfg in (CONFIG, TIED):  # tied, the table multiplies: as the head
    parameters = count_parameters(model_of(cfg), cfg)
    assert flops_per_token(parameters, cfg) == 6 * products + attention


def test_bytes_on_a_device() -> None:
  model = model_of(CONFIG)
  state = {
    'model': model,
    'count': jnp.zeros((), jnp.int32),
    'bias': jax.ShapeDtypeStruct((2, 8), jnp.bfloat16),
  }
  assert bytes_on_device(state, make_mesh(MeshConfig())) == 4 * TOTAL + 4 + 2 * 16, (
    'data parallelism holds all'
  )
  split = 4 * 2 * 8 * EXPERT * 3 // 4  # of the routed experts a quarter stays
  assert bytes_on_device(model, make_mesh(MeshConfig(2, expert=4))) == 4 * TOTAL - split
  norms = 4 * 16 * (2 * 3 + 1)
  assert (
    bytes_on_device(model, make_mesh(MeshConfig(1, fsdp=8))) == (4 * TOTAL - norms) // 8 + norms
  )


def test_mfu_is_a_share_of_the_peak_and_zero_where_that_is_unknown() -> None:
  class Device:
    def __init__(self, kind: str) -> None:
      self.device_kind = kind

  peaks = {
    'TPU v5 lite': 197e12,
    'TPU v5p': 459e12,
    'TPU v5': 459e12,
    'TPU v6e': 918e12,
    'TPU v4': 275e12,
    'NVIDIA H200': 989e12,
    'NVIDIA H100 PCIe': 756e12,
    'NVIDIA H100 80GB HBM3': 989e12,
    'NVIDIA A100-SXM4-40GB': 312e12,
    'NVIDIA L40S': 362e12,
    'NVIDIA L4': 121e12,
  }
  for kind, peak in peaks.items():
    assert mfu(1000.0, peak / 1000, [Device(kind)] * 4) == pytest.approx(1 / 4), kind
  assert mfu(1000.0, 1e9, jax.devices('cpu')) == 0
