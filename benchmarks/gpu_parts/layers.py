"""The experts of published layers, forward and both passes, beside torch's grouped matmul."""

import importlib.util
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.gpu_parts.timing import (
  CALLS,
  EVEN,
  ROUNDS,
  SHAPES,
  TINY,
  ZIPF,
  Shape,
  dense_ceiling,
  draw,
  routing,
  say,
  seconds,
)
from moejax.moe.experts.ffn import ACTIVATIONS
from moejax.moe.experts.grouped_ffn import grouped_ffn
from moejax.moe.experts.sorted_copies import sort_copies
from moejax.moe.experts.weights import Weights


def ours(shape: Shape, exponent: float, quick: bool) -> tuple[float, float]:
  """Seconds of the forward pass and of both, sorting and summing included."""
  x, dy, w, weights = draw(shape, jnp.bfloat16)
  ids = jnp.asarray(routing(shape, exponent))

  def forward(x: Array, w: Array, weights: Weights) -> Array:
    copies = sort_copies(ids, w, shape.E)
    return grouped_ffn(x, copies, weights, ACTIVATIONS['swiglu'](0.0))

  def both(x: Array, w: Array, weights: Weights, dy: Array) -> tuple[Array, tuple]:
    y, pull = jax.vjp(forward, x, w, weights)
    return y, pull(dy)

  return (
    seconds(forward, x, w, weights, quick=quick),
    seconds(both, x, w, weights, dy, quick=quick),
  )


def torchs(shape: Shape, exponent: float) -> tuple[float, float] | None:
  """The same by torch's grouped matmul, and its autograd; None without torch or its GPU."""
  if importlib.util.find_spec('torch') is None:
    return None
  import torch

  if not torch.cuda.is_available():
    return None
  ids = routing(shape, exponent).reshape(-1)
  order = np.argsort(ids, kind='stable')
  tokens = torch.tensor(order // shape.K, device='cuda')
  ends = torch.tensor(np.cumsum(np.bincount(ids, minlength=shape.E)), device='cuda')
  offsets = ends.to(torch.int32)

  def normal(*dims: int) -> 'torch.Tensor':
    a = torch.randn(dims, device='cuda', dtype=torch.bfloat16) * dims[-2] ** -0.5
    return a.requires_grad_()

  x = normal(shape.T, shape.D)
  gate, up = (normal(shape.E, shape.D, shape.F) for _ in range(2))
  down, w = normal(shape.E, shape.F, shape.D), torch.rand(len(order), 1, device='cuda')
  w = w.to(torch.bfloat16).requires_grad_()
  dy = torch.randn_like(x)

  def forward() -> 'torch.Tensor':
    rows = x[tokens]
    left = torch.nn.functional.silu(torch._grouped_mm(rows, gate, offs=offsets))
    hidden = left * torch._grouped_mm(rows, up, offs=offsets)
    out = torch._grouped_mm(hidden, down, offs=offsets) * w
    return torch.zeros_like(x).index_add(0, tokens, out)

  def both() -> None:
    torch.autograd.grad(forward(), (x, w, gate, up, down), dy)

  def forward_only() -> None:
    with torch.no_grad():
      forward()

  def median(run: Callable[[], None]) -> float:
    taken = []
    for _ in range(ROUNDS + 2):
      torch.cuda.synchronize()
      start = time.perf_counter()
      for _ in range(CALLS):
        run()
      torch.cuda.synchronize()
      taken.append((time.perf_counter() - start) / CALLS)
    return statistics.median(taken[2:])

  return median(forward_only), median(both)


def main(quick: bool) -> None:
  """Prints a line for each layer and load."""
  ceiling = dense_ceiling(quick)
  for shape in TINY if quick else SHAPES:
    for load, exponent in (('even', EVEN), ('Zipf', ZIPF)):
      found = {'moejax': ours(shape, exponent, quick), 'torch': torchs(shape, exponent)}
      for name, times in found.items():
        if times is None:
          continue
        speeds = shape.forward_flops / times[0], 3 * shape.forward_flops / times[1]
        told = ', '.join(
          f'{way} {1e3 * took:.2f} ms {speed / 1e12:.3g} TFLOP/s {speed / ceiling:.0%}'
          for way, took, speed in zip(('forward', 'both'), times, speeds)
        )
        say(f'layer     {shape.name:21} {load}  {name:7} {told}')
