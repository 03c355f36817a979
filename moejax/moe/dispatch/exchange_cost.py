"""What an exchange of tokens between devices costs in bytes, and where its collectives are to be had."""

from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh


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
  """Exchange -> bytes that a device receives in one layer's forward pass over `expert`; it sends as many.

  A ragged exchange depends on the routing: 'ragged' where all experts have the same load, 'ragged_worst' of a device
  to which all tokens go. The backward pass moves as many again (integers have no gradient, and are not moved), and
  where the layer is computed again (remat), so is its exchange. The sum over `tensor` is not counted.
  """
  devices, tokens, top_k, num_experts, d_model, itemsize, capacity = group
  others, here, row, number = devices - 1, num_experts // devices, d_model * itemsize, 4
  near = min(top_k, here)
  counts, away = others * num_experts * number, tokens * top_k * others // devices
  found = {
    'gather': others * tokens * (2 * row + 2 * number * top_k),
    'ragged': counts + away * (2 * row + number),
    'ragged_worst': counts
    + others * tokens * near * (row + number)
    + tokens * (top_k - near) * row,
  }
  return found | ({'all_to_all': 2 * others * here * capacity * row} if capacity else {})


def lacking_ragged(mesh: AbstractMesh) -> str:
  """What the mesh is of, where there is no `ragged_all_to_all` on it; else ''."""
  device = mesh.abstract_device or jax.devices()[0]
  # The TPU compiler refuses larger slices of v5e: "limited ICI routing".
  lacks = device.platform == 'cpu' or device.device_kind == 'TPU v5 lite' and mesh.size > 16
  return f'{mesh.size} x {device.device_kind}' if lacks else ''
