"""`ragged_all_to_all` by an all-gather, so that CPU devices can run a ragged exchange, too."""

import jax
import jax.numpy as jnp
import pytest
from jax import Array


def ragged_all_to_all(
  operand: Array,
  output: Array,
  input_offsets: Array,
  send_sizes: Array,
  output_offsets: Array,
  recv_sizes: Array,
  *,
  axis_name: str,
) -> Array:
  """As documented in jax.lax.

  NaN all over if the sizes do not agree, or a run does not lie inside of its array: a real device
  would read or write past it, and a test must not pass by luck.
  """
  me = jax.lax.axis_index(axis_name)
  place = jnp.arange(output.shape[0])
  operands, all_begins, all_sizes, all_lands = (
    jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)
  )
  # What each source sends to this device: from which row, how many, to which row.
  begins, sizes, lands = all_begins[:, me], all_sizes[:, me], all_lands[:, me]
  sizes_agree = sizes == recv_sizes
  is_inside = (begins + sizes <= operand.shape[0]) & (lands + sizes <= output.shape[0])
  for source, rows in enumerate(operands):
    is_landing = (place >= lands[source]) & (place < lands[source] + sizes[source])
    taken = jnp.where(is_landing, place - lands[source] + begins[source], 0)
    output = jnp.where(is_landing[:, None], rows[taken], output)
  return jnp.where((sizes_agree & is_inside).all(), output, jnp.nan)


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
  """Replaces the collective for what is traced from now on, as long as the test lasts."""
  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', ragged_all_to_all)
  monkeypatch.setattr('moejax.moe.dispatch.dispatchers.lacking_ragged', lambda mesh: '')
