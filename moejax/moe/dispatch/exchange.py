"""Exchanges: tokens to the devices of their experts and back, over the `expert` mesh axis.

  a device's own tokens -> exchange around a local dispatcher, under `shard_map` -> their y

- gather: each device sees the tokens of its whole group and adds up what its own experts give; a
  reduce-scatter brings the sums back. Works everywhere.
- ragged: each copy goes to the device of its expert alone, and its output comes back.
- all_to_all: each device fills buffers for all experts from its own tokens, and the buffers travel.

Letters: X devices in an expert-parallel group, E experts of the group, L = E / X local experts of a
device, T tokens of a device, K experts per token, N = T * K copies, R rows of a buffer that holds
whatever may come, C capacity, D model, F FFN hidden.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from moejax.moe.dispatch.expert_rows import most_copies, sort_view
from moejax.moe.dispatch.local_view import LocalView, RoutedTokens
from moejax.moe.experts.weights import NARROW_AXES, WIDE_AXES, Biases, Weights
from moejax.sharding.logical_axes import RULES, param_spec
from moejax.sharding.mesh import MESH_AXES

# view -> y [T, D], copies dropped: a scalar f32
LocalDispatcher = Callable[[LocalView], tuple[Array, Array]]
# (local dispatcher, a device's own tokens) -> y [T, D] of these tokens, copies dropped
Exchange = Callable[[LocalDispatcher, LocalView], tuple[Array, Array]]


def no_exchange(local: LocalDispatcher, view: LocalView) -> tuple[Array, Array]:
  """Runs the dispatcher as it is: all experts are local, or `ffn_at_experts` sends its buffers."""
  return local(view)


def gather(local: LocalDispatcher, view: LocalView) -> tuple[Array, Array]:
  """Brings the whole group's tokens to each device, and the summed outputs back."""
  num_local = view.experts.gate.shape[0]
  group_tokens = jax.tree.map(
    lambda a: jax.lax.all_gather(a, 'expert', axis=0, tiled=True), view.tokens
  )
  # Ids from the first local expert on: those of other devices' experts fall outside [0, L).
  ids = group_tokens.expert_ids - jax.lax.axis_index('expert') * num_local
  group_view = view._replace(tokens=group_tokens._replace(expert_ids=ids), num_experts=num_local)
  y, dropped = local(group_view)
  return jax.lax.psum_scatter(y, 'expert', scatter_dimension=0, tiled=True), dropped


def ragged(local: LocalDispatcher, view: LocalView) -> tuple[Array, Array]:
  """Sends each copy to its expert's device, as a token of one expert there, and its output back.

  Nothing is dropped: there is room for all copies that can come, R = X * T * min(K, L). The weights
  travel too, so that an expert's output need not be kept for their gradient.
  """
  tokens, num_local = view.tokens, view.experts.gate.shape[0]
  group_size = jax.lax.axis_size('expert')
  # Sorted by expert is sorted by device: experts lie on the devices in order.
  copies, beyond_quota = sort_view(view)
  # Copies from which device, to which device, for which of its experts.
  counts_XXL = jax.lax.all_gather(copies.load, 'expert').reshape(group_size, group_size, num_local)
  sent_XX = counts_XXL.sum(-1)
  room = group_size * most_copies(view, num_local)
  x_ND, weights_N1 = tokens.x[copies.tokens], copies.weights[:, None]
  x_RD = send_rows(x_ND, sent_XX, room)
  weights_R1 = send_rows(weights_N1, sent_XX, room)
  # What arrives is a run for each source, each sorted by expert.
  run_lengths = counts_XXL[:, jax.lax.axis_index('expert')].reshape(-1)  # [X * L]
  run_ids = jnp.tile(jnp.arange(num_local), group_size)  # [X * L]
  ids_R = jnp.repeat(run_ids, run_lengths, total_repeat_length=room)
  # Rows past the last run are no copies: unassigned.
  ids_R1 = jnp.where(jnp.arange(room) < run_lengths.sum(), ids_R, num_local)[:, None]
  received = RoutedTokens(x_RD, ids_R1, jnp.zeros_like(weights_R1), weights_R1)
  arrived = view._replace(tokens=received, num_experts=num_local, quota=None)
  y_RD, dropped = local(arrived)
  y_ND = send_rows(y_RD, sent_XX.T, copies.tokens.size)
  return jnp.zeros_like(tokens.x).at[copies.tokens].add(y_ND), dropped + beyond_quota


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def send_rows(rows_ND: Array, sent_XX: Array, room: int) -> Array:
  """Sends runs of rows to every device of the group. [N, D] -> [room, D].

  Args:
    rows_ND: in the order of their receivers; rows past the last run go nowhere.
    sent_XX: [X, X] i32, the same on all devices: how many rows each one (first axis) sends to each
      (second axis).
    room: rows of the result, static; no device may receive more.

  Returns:
    What this device receives in the order of its sources, then zeros.
  """
  starts_at_source_XX = jnp.cumsum(sent_XX, 1) - sent_XX
  starts_at_receiver_XX = jnp.cumsum(sent_XX, 0) - sent_XX
  me = jax.lax.axis_index('expert')
  # Not jnp.zeros: the output must vary over the same mesh axes as the rows, and full_like's does.
  zeros_RD = jax.lax.full_like(rows_ND, 0, shape=(room, *rows_ND.shape[1:]))
  return jax.lax.ragged_all_to_all(
    rows_ND,
    zeros_RD,
    input_offsets=starts_at_source_XX[me],
    send_sizes=sent_XX[me],
    output_offsets=starts_at_receiver_XX[me],
    recv_sizes=sent_XX[:, me],
    axis_name='expert',
  )


class SentRows(NamedTuple):
  """What the way back needs to know of the rows that were sent."""

  sent_XX: Array  # how many rows each device sent to each
  # As many rows as were given, without columns: residuals are arrays, and this one carries N.
  rows_N0: Array


def send_rows_fwd(rows_ND: Array, sent_XX: Array, room: int) -> tuple[Array, SentRows]:
  """Sends the rows, and keeps none of them."""
  return send_rows(rows_ND, sent_XX, room), SentRows(sent_XX, rows_ND[:, :0])


def send_rows_bwd(room: int, residuals: SentRows, d_RD: Array) -> tuple[Array, None]:
  """Sends the cotangents back to where the rows came from.

  By hand: the transpose that JAX has makes zeros that vary over no mesh axis.
  """
  del room
  return send_rows(d_RD, residuals.sent_XX.T, residuals.rows_N0.shape[0]), None


send_rows.defvjp(send_rows_fwd, send_rows_bwd)


def ffn_at_experts(ffn: Callable[[Array], Array], buffers_ECD: Array, num_local: int) -> Array:
  """Returns `ffn` of the buffers of all experts, computed on the experts' devices. [E, C, D].

  Args:
    ffn: of [L, X * C, D], the buffers that the whole group has for the local experts.
    buffers_ECD: this device's buffers, for all experts of the group.
    num_local: L; E where nothing has to travel.
  """
  if num_local == buffers_ECD.shape[0]:
    return ffn(buffers_ECD)
  # Cut along experts, a part for each device, and joined along capacity; then the other way round.
  # [L, X * C, D]
  received = jax.lax.all_to_all(buffers_ECD, 'expert', split_axis=0, concat_axis=1, tiled=True)
  out = ffn(received)
  return jax.lax.all_to_all(out, 'expert', split_axis=1, concat_axis=0, tiled=True)


def expert_specs(experts: Weights) -> Weights:
  """Returns how the experts' arrays lie on the mesh.

  Experts over `expert`, their hidden layer over `tensor`, and matrices over `fsdp` as `param_spec`
  says. That is how the parameters themselves lie: nothing is moved.

  Args:
    experts: global arrays, of which only the shapes matter.
  """
  sizes = jax.sharding.get_abstract_mesh().shape
  wide = param_spec(WIDE_AXES, experts.gate.shape, sizes)
  narrow = param_spec(NARROW_AXES, experts.down.shape, sizes)
  if experts.biases.down is None:
    return Weights(wide, wide, narrow)
  hidden = PartitionSpec('expert', 'tensor')
  # The output's bias is whole on every device; `gather_local_experts` says which of them adds it.
  out = PartitionSpec('expert', None)
  return Weights(wide, wide, narrow, Biases(hidden, hidden, out))


def expert_parallel(
  run: Callable[[RoutedTokens, Weights], tuple[Array, Array]], specs: Weights
) -> Callable[[RoutedTokens, Weights], tuple[Array, Array]]:
  """Returns `run` under `shard_map`: on each device's own tokens and experts, summed over `tensor`.

  Args:
    run: (tokens, experts) of a device -> its y, and how many copies it dropped.
    specs: how the experts lie, see `expert_specs`.

  Returns:
    The same of global arrays; drops are summed over all devices.
  """

  def run_on_device(tokens: RoutedTokens, experts: Weights) -> tuple[Array, Array]:
    tokens = jax.tree.map(lambda a: jax.lax.pcast(a, 'tensor', to='varying'), tokens)
    y, dropped = run(tokens, gather_local_experts(experts, specs))
    y = jax.lax.psum(y, 'tensor')
    # All devices along `tensor` see the same tokens, and count the same drops.
    num_dropped = jax.lax.psum(dropped, MESH_AXES) / jax.lax.axis_size('tensor')
    return y, num_dropped

  rows = PartitionSpec(RULES['batch'])
  return jax.shard_map(run_on_device, in_specs=(rows, specs), out_specs=(rows, PartitionSpec()))


def gather_local_experts(experts: Weights, specs: Weights) -> Weights:
  """Returns a device's own experts: gathered over `fsdp`, the hidden layer split over `tensor`.

  Token shards add to gradients: to vary over an axis makes the transpose a sum, and to be gathered,
  a split one.

  Args:
    experts: the device's part of them.
    specs: how they lie.
  """

  def gathered(w: Array, spec: PartitionSpec) -> Array:
    (axis,) = (i for i, names in enumerate(spec) if names is not None and 'fsdp' in names)
    return jax.lax.all_gather(w, 'fsdp', axis=axis, tiled=True)

  biases = jax.lax.pcast(experts.biases, 'fsdp', to='varying')
  # Outputs are summed over `tensor`: one of its devices adds the bias of the whole sum.
  down_bias = jax.tree.map(
    lambda b: jnp.where(jax.lax.axis_index('tensor') == 0, b, 0), biases.down
  )
  whole = Weights(
    gate=gathered(experts.gate, specs.gate),
    up=gathered(experts.up, specs.up),
    down=gathered(experts.down, specs.down),
    biases=biases._replace(down=down_bias),
  )
  return jax.lax.pcast(whole, 'data', to='varying')


EXCHANGES: dict[str, Exchange] = {'all_to_all': no_exchange, 'gather': gather, 'ragged': ragged}
