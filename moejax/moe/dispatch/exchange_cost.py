"""What an exchange of tokens costs in bytes, and which devices have its collectives."""

from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh

NUMBER_BYTES = 4  # of an expert id, a score, a routing weight, a count: int32 and float32


class Group(NamedTuple):
  """What an expert-parallel group is to exchange in one layer."""

  devices: int  # X
  tokens: int  # of one device
  top_k: int
  num_experts: int
  d_model: int
  itemsize: int  # bytes of a number in the compute dtype
  capacity: int  # C of one device's tokens; 0 without


def exchange_bytes(group: Group) -> dict[str, int]:
  """Returns exchange -> bytes that a device receives over `expert` in a layer's forward pass.

  It sends as many. A ragged exchange depends on the routing: 'ragged' where all experts have the
  same load, 'ragged_worst' of a device to which all tokens go. The backward pass moves as many
  again (integers have no gradient, and are not moved), and where the layer is computed again
  (remat), so is its exchange. The sum over `tensor` is not counted.
  """
  others = group.devices - 1
  num_local = group.num_experts // group.devices
  tokens, top_k = group.tokens, group.top_k
  row_bytes = group.d_model * group.itemsize
  # Every device tells every other how many copies each expert gets.
  count_bytes = others * group.num_experts * NUMBER_BYTES
  # Of an even load, all copies leave but those for a device's own experts, and as many arrive.
  num_away = tokens * top_k * others // group.devices
  # Copies that a token can have at most on one device.
  num_near = min(top_k, num_local)
  # Rows and weights of all others' tokens come in, and outputs of own copies that went elsewhere.
  worst_in = others * tokens * num_near * (row_bytes + NUMBER_BYTES)
  worst_back = tokens * (top_k - num_near) * row_bytes
  sizes = {
    # Rows and sums; each token's K ids and weights. XLA drops the scores, which only buffers need.
    'gather': others * tokens * (2 * row_bytes + 2 * NUMBER_BYTES * top_k),
    'ragged': count_bytes + num_away * (2 * row_bytes + NUMBER_BYTES),
    'ragged_worst': count_bytes + worst_in + worst_back,
  }
  if group.capacity:
    # Buffers are sent full or not, there and back.
    sizes['all_to_all'] = 2 * others * num_local * group.capacity * row_bytes
  return sizes


def lacking_ragged(mesh: AbstractMesh) -> str:
  """Returns what devices the mesh is of, where they have no `ragged_all_to_all`; else ''."""
  device = mesh.abstract_device or jax.devices()[0]
  # The TPU compiler refuses larger slices of v5e: "limited ICI routing".
  is_large_v5e = device.device_kind == 'TPU v5 lite' and mesh.size > 16
  lacks = device.platform == 'cpu' or is_large_v5e
  return f'{mesh.size} x {device.device_kind}' if lacks else ''
