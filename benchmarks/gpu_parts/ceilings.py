"""What the card gives at best: bytes a second of a copy, FLOP/s of a dense product."""

import jax
import jax.numpy as jnp

from benchmarks.gpu_parts.timing import dense_ceiling, say, seconds


def main(quick: bool) -> None:
  """Prints the card and its two ceilings."""
  device = jax.local_devices()[0]
  say(f'card      {device.device_kind}, JAX {jax.__version__}')
  numbers = 2**16 if quick else 2**30
  a = jnp.ones(numbers, jnp.bfloat16)
  moved = 2 * a.nbytes / seconds(lambda a: a + 1, a, quick=quick)
  say(f'copy      {moved / 1e12:.3g} TB/s, read and written')
  say(f'product   {dense_ceiling(quick) / 1e12:.4g} TFLOP/s, dense bfloat16, random numbers')
