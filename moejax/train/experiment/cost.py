"""What a model costs: its parameters, total and active, the FLOPs of a token, and the bytes that
its experts exchange.

Letters: D model, L layers, H heads, d head width, S sequence, V vocab, K experts per token,
E experts.
"""

import dataclasses

import jax
from jax.sharding import AbstractMesh

from moejax.model.attention_cores import core_for
from moejax.model.blocks import MoEBlock
from moejax.model.transformer import Transformer
from moejax.moe.dispatch.dispatchers import choose_exchange, exchange_group
from moejax.moe.dispatch.exchange_cost import exchange_bytes, lacking_ragged
from moejax.runtime.chips import peak_flops
from moejax.sharding.tree import size
from moejax.train.experiment.config import ExperimentConfig


@dataclasses.dataclass(frozen=True)
class Parameters:
  """Counts of numbers. `active` are those that one token's forward pass reads: K of E routed
  experts.

  `mtp` are the blocks of multi-token prediction, in the total and not among the active: decoding
  does without them. `mtp_active` are those of them that a token reads in training.
  """

  total: int
  active: int
  embedding: int
  mtp: int
  mtp_active: int


def count_parameters(model: Transformer, cfg: ExperimentConfig) -> Parameters:
  """Counts the parameters of a model, or of its ShapeDtypeStructs."""
  router = cfg.model.moe.router

  def active_in(part: object, blocks: MoEBlock) -> int:
    # Routed experts are of one size, and a token goes through K of the E.
    routed = size(blocks.moe.experts)
    return size(part) - routed + routed * router.top_k // router.num_experts

  mtp = mtp_active = 0
  if cfg.model.mtp_depth:
    mtp, mtp_active = size(model.mtp), active_in(model.mtp, model.mtp.block)
  return Parameters(
    total=size(model),
    active=active_in(model, model.blocks) - mtp,
    embedding=size(model.embed),
    mtp=mtp,
    mtp_active=mtp_active,
  )


def flops_per_token(parameters: Parameters, cfg: ExperimentConfig) -> int:
  """FLOPs of one token, forward and backward, of matrix products only.

  They are 6 for each active number that multiplies, and causal attention. An embedding is a lookup,
  unless it is also the head; each depth of multi-token prediction runs the head once more.
  Attention's two products over half a square of S make 2 * S / 2 * H * (d of q + d of v) a layer
  forward, three times that with the backward pass. Windows are not taken off; recomputation is not
  counted.
  """
  model = cfg.model
  lookup = 0 if model.tie_embeddings else parameters.embedding
  mtp_heads = model.mtp_depth * parameters.embedding
  products = parameters.active - lookup + parameters.mtp_active + mtp_heads
  attention, latent = model.attention, model.attention.latent
  if latent.kv_rank:
    # Latent attention: the rotated part is added to q and k alone, and v has a width of its own.
    widths = attention.d_head + latent.d_rope + latent.d_value
  else:
    widths = 2 * attention.d_head
  layers = model.num_layers + model.mtp_depth
  # 6: a multiplication and an addition forward, and twice that backward, to inputs and to weights.
  return 6 * products + 3 * cfg.seq_len * attention.num_heads * widths * layers


def exchange_summary(cfg: ExperimentConfig, mesh: AbstractMesh) -> tuple[str, dict[str, int]]:
  """How tokens get to their experts, and each way's bytes, see `exchange_bytes`.

  ('', {}) where the `expert` axis is 1: every device then holds all experts.
  """
  dispatch, router, model = cfg.model.moe.dispatch, cfg.model.moe.router, cfg.model
  if mesh.shape['expert'] == 1:
    return '', {}
  group = exchange_group(
    dispatch,
    mesh,
    tokens=cfg.batch_size // cfg.micro_batches * cfg.seq_len,
    top_k=router.top_k,
    num_experts=router.num_experts,
    d_model=model.d_model,
    dtype=model.dtype,
  )
  return choose_exchange(dispatch, group, lacking_ragged(mesh)), exchange_bytes(group)


def attention_summary(cfg: ExperimentConfig) -> str:
  """The row of CORES that a training step attends by, on the mesh that is set."""
  attention, latent = cfg.model.attention, cfg.model.attention.latent
  rows = cfg.batch_size // cfg.micro_batches
  key_heads, width, v_width = attention.num_kv_heads, attention.d_head, attention.d_head
  if latent.kv_rank:
    # Each head then has its own keys, of channels without and with position.
    key_heads, width, v_width = attention.num_heads, width + latent.d_rope, latent.d_value

  def heads(number: int, width: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, cfg.seq_len, number, width), cfg.model.dtype)

  return core_for(
    attention.implementation,
    heads(attention.num_heads, width),
    heads(key_heads, width),
    heads(key_heads, v_width),
    has_sinks=attention.sinks,
  )


def mfu(tokens_per_second: float, flops_per_token: float, devices: list[jax.Device]) -> float:
  """Model FLOPs utilisation: those done over what the devices could do in bfloat16.

  0 where the peak of a device is not known, as on CPU.
  """
  peak = peak_flops(devices[0].device_kind)
  return tokens_per_second * flops_per_token / (peak * len(devices)) if peak else 0.0


def devices_at_work() -> list[jax.Device]:
  """The devices of the mesh that is set, which may leave some idle; without one, all there are."""
  mesh = jax.sharding.get_mesh()
  return jax.devices() if mesh.empty else [*mesh.devices.flat]
