"""An estimate of the memory that a training step takes on one device, without compiling it.

It orders the candidates of --plan=fit; the compiler then decides. A factor below is a count of
arrays of a shape that the code of the model makes, assumed to be alive at once, unless its comment
names another source.

Letters: T tokens of one device in one micro-batch, S sequence, D model, F FFN hidden, K experts per
  token.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import AbstractDevice, AbstractMesh

from moejax.model.transformer import Transformer
from moejax.moe.dispatch.dispatchers import choose_exchange
from moejax.moe.dispatch.exchange_cost import Group, exchange_bytes, lacking_ragged
from moejax.plan.topology import Topology
from moejax.sharding.logical_axes import RULES
from moejax.sharding.mesh import MeshConfig
from moejax.sharding.params import is_param, param_axes
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.shapes import state_shapes

FLOAT32_BYTES = 4  # parameters, gradients and both moments of the optimiser are float32

# Of the forward pass, kept for the backward pass: arrays a token and layer.
HEAD_ARRAYS = 4  # q, k, v and what attention gives, of the width of a head; k and v as many as q
ROTARY_ARRAYS = 2  # the rotated channels of q and k in latent attention
FFN_ARRAYS = 2  # gate x and up x
ATTENTION_SCORES = 2  # [S, S] of a head before and after the softmax, where no kernel avoids them
DOT_COPIES = 2  # the result of a product, and what follows from it element by element
RESIDUAL_ARRAYS = 6  # [T, D] that remat='none' keeps beside the residual and the products

# Of the backward pass of one block. moe/experts/ragged_dot_ffn.py, window_size: a quarter more rows
# than an even routing gives a device.
TPU_WINDOW_MARGIN = 1.25
# model/attention_cores.py, chunked: a float32 score and its gradient, over 5/8 of the square in
# four chunks of queries.
CHUNKED_SCORE_BYTES = 8 * 5 / 8
# The next two TPU terms were set from two compiled programs; without them guesses were half of the
# truth.
TPU_COPY_ARRAYS = 4  # [copies, D] of the grouped products
TPU_WEIGHT_FORMS = 8  # as below, most of them laid out anew for the grouped products
WEIGHT_FORMS = 3  # gathered over fsdp, cast, and their gradient
COPY_HIDDEN_ARRAYS = 4  # [copies, F]: gate x, up x and their gradients
ROOM_ARRAYS = 3  # [room, D]
BLOCK_ARRAYS = 12  # [T, D]
LOGIT_BYTES = 8  # a float32 logit and its gradient


class ParameterShape(NamedTuple):
  """A parameter of a model, of which a stack of layers is one."""

  size: int  # numbers
  axes: tuple[str, ...]  # the logical axis of each dimension
  stack: str  # of the layers that its first axis is of; '' of a parameter that is in no layer
  layers: int  # in that stack; 1 in none


class ModelShapes(NamedTuple):
  """The ShapeDtypeStructs of a model, and what the estimates need to know of its parameters."""

  model: Transformer
  parameters: tuple[ParameterShape, ...]

  def count(self, mesh: MeshConfig, *whole: str) -> float:
    """Returns how many numbers one device holds; over the mesh axes `whole` they are not split."""
    return sum(each.size / shards(mesh, each.axes, whole) for each in self.parameters)


def model_shapes(cfg: ExperimentConfig) -> ModelShapes:
  """Returns the shapes of the model of a config; nothing is allocated."""
  model = state_shapes(cfg).model
  parameters = []
  for path, leaf in jax.tree.leaves_with_path(model, is_leaf=is_param):
    if is_param(leaf):
      axes, size = param_axes(leaf), math.prod(leaf.shape)
      stack, layers = '', 1
      if axes[0] == 'layer':
        stack, layers = jax.tree_util.keystr(path[:1], simple=True), leaf.shape[0]
      parameters.append(ParameterShape(size, axes, stack, layers))
  return ModelShapes(model, tuple(parameters))


def shards(mesh: MeshConfig, axes: Sequence[str], whole: Sequence[str]) -> int:
  """Returns into how many parts an array of these logical axes is cut.

  Args:
    mesh: the size of each mesh axis.
    axes: the logical axis of each dimension; '' for one that is never split.
    whole: mesh axes that are left out, as those over which an array has been gathered.
  """
  count = 1
  for axis in filter(None, axes):
    count *= math.prod(getattr(mesh, name) for name in RULES[axis] if name not in whole)
  return count


def tokens_per_device(cfg: ExperimentConfig, mesh: MeshConfig) -> int:
  """Returns T, the tokens of one device in one micro-batch."""
  return cfg.batch_size // cfg.micro_batches * cfg.seq_len // (mesh.data * mesh.fsdp * mesh.expert)


def itemsize_of(cfg: ExperimentConfig) -> int:
  """Returns the bytes of a number in the compute dtype."""
  return FLOAT32_BYTES if cfg.model.dtype == 'float32' else 2


class ExchangeSizes(NamedTuple):
  """What the exchange of tokens in one layer takes of a device."""

  sent: float  # bytes over `expert` in the forward pass
  room: float  # rows [D] that may arrive
  copies: float  # rows that the experts' products hold at once


def exchange_sizes(cfg: ExperimentConfig, mesh: MeshConfig, topology: Topology) -> ExchangeSizes:
  """Returns the sizes of the exchange that the dispatcher would choose on these devices.

  TPUs take the copies a window at a time, see moejax/moe/experts/ragged_dot_ffn.py; on others there
  is room for all that may come.
  """
  model, tokens = cfg.model, tokens_per_device(cfg, mesh)
  router, dispatch = model.moe.router, model.moe.dispatch
  if mesh.expert == 1:
    return ExchangeSizes(0.0, tokens, tokens * router.top_k)
  group = Group(
    devices=mesh.expert,
    tokens=tokens,
    top_k=router.top_k,
    num_experts=router.num_experts,
    d_model=model.d_model,
    itemsize=itemsize_of(cfg),
    capacity=0,
  )
  # Buffers of a fixed capacity are counted like a gather.
  is_dropless = not dispatch.capacity_factor
  name = choose_exchange(dispatch, group, no_ragged_on(topology)) if is_dropless else 'gather'
  rows, copies_per_token = tokens, router.top_k
  if name == 'ragged':
    # A device is sent a copy of a token for each chosen expert that it has, and it may have fewer
    # than K.
    copies_per_token = min(router.top_k, router.num_experts // mesh.expert)
    rows = tokens * copies_per_token
  held = TPU_WINDOW_MARGIN if topology.compiler == 'tpu' else mesh.expert
  return ExchangeSizes(
    exchange_bytes(group)[name], mesh.expert * rows, tokens * copies_per_token * held
  )


def no_ragged_on(topology: Topology) -> str:
  """Returns what the devices are, where they have no `ragged_all_to_all`; else ''."""
  kind = topology.chip.kind if topology.chip else 'cpu'
  device = AbstractDevice(kind, None, platform=topology.compiler)
  return lacking_ragged(AbstractMesh((topology.count,), ('expert',), abstract_device=device))


def is_in_windows(cfg: ExperimentConfig, topology: Topology) -> bool:
  """Whether copies are taken a window at a time: gate x and up x are then kept by no policy."""
  return topology.compiler == 'tpu' and cfg.mesh.expert > 1


def saved_activation_bytes(
  cfg: ExperimentConfig, exchange: ExchangeSizes, topology: Topology
) -> float:
  """Returns the bytes that the forward pass of one micro-batch keeps for the backward pass."""
  model, tokens = cfg.model, tokens_per_device(cfg, cfg.mesh)
  layers, moe_layers = model.num_layers + model.mtp_depth, model.num_moe_layers
  itemsize = itemsize_of(cfg)
  # Every policy keeps the input of each layer; these are what a row of model/remat adds to it.
  inputs = layers * tokens * model.d_model * itemsize
  experts = ffn_numbers(cfg, exchange, topology) * itemsize
  if model.sandwich_norm:  # the output of an FFN is kept only where it is read
    experts += layers * tokens * model.d_model * itemsize
  router = moe_layers * tokens * model.moe.router.num_experts * FLOAT32_BYTES
  attention = layers * tokens * model.attention.output_width / cfg.mesh.tensor * itemsize
  if topology.compiler != 'cpu':  # a kernel's logsumexp
    attention += layers * tokens * model.attention.num_heads / cfg.mesh.tensor * FLOAT32_BYTES
  residual = layers * tokens * model.d_model * itemsize
  more = {
    'full': 0.0,
    'attention': attention,
    'experts': experts,
    'dots': dot_numbers(cfg) * itemsize,
    'all_but_attention': experts + router + residual,
    'none': everything_bytes(cfg, exchange, topology) - inputs,
  }
  return inputs + more[model.remat]


def ffn_numbers(cfg: ExperimentConfig, exchange: ExchangeSizes, topology: Topology) -> float:
  """Returns how many numbers gate x and up x of all FFNs are, on one device."""
  model, moe_layers = cfg.model, cfg.model.num_moe_layers
  dense_layers = model.num_layers + model.mtp_depth - moe_layers
  width = moe_layers * model.moe.shared_width + dense_layers * model.d_ff
  numbers = tokens_per_device(cfg, cfg.mesh) * width
  if not is_in_windows(cfg, topology):
    numbers += moe_layers * exchange.copies * model.moe.d_expert
  return FFN_ARRAYS * numbers / cfg.mesh.tensor


def dot_numbers(cfg: ExperimentConfig) -> float:
  """Returns how many numbers the products of tokens and matrices give, but of routed experts."""
  model, attention, latent = cfg.model, cfg.model.attention, cfg.model.attention.latent
  layers, moe_layers = model.num_layers + model.mtp_depth, model.num_moe_layers
  low_rank = d_rope = 0
  if latent.kv_rank:
    low_rank, d_rope = latent.kv_rank + latent.q_rank, latent.d_rope
  head_width = HEAD_ARRAYS * attention.d_head + ROTARY_ARRAYS * d_rope
  heads = attention.num_heads * head_width / cfg.mesh.tensor
  ffn_units = moe_layers * model.moe.shared_width + (layers - moe_layers) * model.d_ff
  width = layers * (heads + low_rank + model.d_model) + FFN_ARRAYS * ffn_units / cfg.mesh.tensor
  return tokens_per_device(cfg, cfg.mesh) * width


def everything_bytes(cfg: ExperimentConfig, exchange: ExchangeSizes, topology: Topology) -> float:
  """Returns the bytes that remat='none' keeps, the inputs of the layers among them."""
  model, mesh, tokens = cfg.model, cfg.mesh, tokens_per_device(cfg, cfg.mesh)
  attention, moe = model.attention, model.moe
  layers, moe_layers = model.num_layers + model.mtp_depth, model.num_moe_layers
  residual = tokens * model.d_model
  scores = hidden = 0.0
  if topology.compiler == 'cpu':
    scores = ATTENTION_SCORES * tokens * cfg.seq_len * attention.num_heads / mesh.tensor
  if not is_in_windows(cfg, topology):
    hidden = exchange.copies * FFN_ARRAYS * moe.d_expert / mesh.tensor
  layer = residual + scores + RESIDUAL_ARRAYS * residual
  experts = moe_layers * (exchange.room * model.d_model + hidden)
  return (layers * layer + experts + DOT_COPIES * dot_numbers(cfg)) * itemsize_of(cfg)


def peak_temporary_bytes(
  cfg: ExperimentConfig, exchange: ExchangeSizes, shapes: ModelShapes, topology: Topology
) -> float:
  """Returns the bytes of the backward pass of one block, or of the head, whichever takes more.

  A block holds weights gathered over fsdp, and either the rows of experts or the scores of
  attention.
  """
  model, mesh, tokens = cfg.model, cfg.mesh, tokens_per_device(cfg, cfg.mesh)
  itemsize, d_expert = itemsize_of(cfg), model.moe.d_expert
  scores = copy_width = 0.0
  weight_forms = WEIGHT_FORMS
  if topology.compiler == 'cpu':
    # The chips have kernels that never hold the scores.
    heads = model.attention.num_heads / mesh.tensor
    scores = heads * tokens * cfg.seq_len * CHUNKED_SCORE_BYTES
  if topology.compiler == 'tpu':
    copy_width, weight_forms = TPU_COPY_ARRAYS * model.d_model, TPU_WEIGHT_FORMS
  copies = exchange.copies * (copy_width + COPY_HIDDEN_ARRAYS * d_expert / mesh.tensor)
  experts = copies + exchange.room * ROOM_ARRAYS * model.d_model
  weights = gathered_layer_size(cfg, shapes)
  arrays = weights * weight_forms + BLOCK_ARRAYS * tokens * model.d_model
  block = arrays * itemsize + max(scores, experts * itemsize)
  vocab = model.vocab_size / mesh.tensor
  # The head's weights gathered, and cast, in the compute dtype; their gradient in float32.
  head_weights = model.d_model * vocab * (itemsize * 2 + FLOAT32_BYTES)
  chunk_tokens = tokens / cfg.seq_len * math.ceil(cfg.seq_len / cfg.loss.chunks)
  head = chunk_tokens * vocab * LOGIT_BYTES + head_weights
  # XLA casts the stacks of all layers at once, before the loop over them. Where everything is kept
  # of the forward pass, so are the weights that it gathered.
  cast = shapes.count(mesh) * itemsize if itemsize < FLOAT32_BYTES else 0.0
  if model.remat == 'none' and mesh.fsdp > 1:
    cast += shapes.count(mesh, 'fsdp') * itemsize
  return cast + max(block, head)


def gathered_layer_size(cfg: ExperimentConfig, shapes: ModelShapes) -> float:
  """Returns the numbers of the largest layer's weights on a device, once gathered over fsdp."""
  sizes: dict[str, float] = {}
  for each in shapes.parameters:
    if each.stack:
      size = each.size / each.layers / shards(cfg.mesh, each.axes, ('fsdp',))
      sizes.setdefault(each.stack, 0.0)
      sizes[each.stack] += size
  return max(sizes.values())


def memory_by_kind(
  cfg: ExperimentConfig, shapes: ModelShapes, topology: Topology
) -> dict[str, float]:
  """Returns kind -> bytes on one device, at the fullest moment of a step."""
  own = FLOAT32_BYTES * shapes.count(cfg.mesh)
  exchange = exchange_sizes(cfg, cfg.mesh, topology)
  # With micro-batches there are two sets: the sum so far, and what is to be added to it.
  gradient_sets = 2 if cfg.micro_batches > 1 else 1
  return {
    'parameters': own,
    'optimiser': 2 * own,
    'gradients': own * gradient_sets,
    'activations': saved_activation_bytes(cfg, exchange, topology),
    'other temporaries': peak_temporary_bytes(cfg, exchange, shapes, topology),
  }
