"""`ragged_all_to_all` where there is none: the same by an all-gather, so that CPU devices can run what exchanges so."""

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
  """As documented in jax.lax; NaN all over if the sizes do not agree, or a run is not inside of its array."""
  me, place = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
  operands, *about = (
    jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)
  )
  begins, sizes, lands = (a[:, me] for a in about)
  good = (
    (sizes == recv_sizes)
    & (begins + sizes <= operand.shape[0])
    & (lands + sizes <= output.shape[0])
  ).all()
  for source, rows in enumerate(operands):
    here = (place >= lands[source]) & (place < lands[source] + sizes[source])
    output = jnp.where(
      here[:, None], rows[jnp.where(here, place - lands[source] + begins[source], 0)], output
    )
  return jnp.where(good, output, jnp.nan)


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
  """For what is traced from here on, as long as the test lasts."""
  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', ragged_all_to_all)
  monkeypatch.setattr('moejax.moe.dispatch.dispatchers.lacking_ragged', lambda mesh: '')
