"""Part of line 13: activations, and the grouped FFN with every number of rows in a last block.

  sorted copies, cut into loads -> each implementation -> output and gradients | sums over copies

Letters: T tokens, D model, F FFN hidden, E experts, N copies.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from moejax.certify.cases import Plan
from moejax.certify.checks import Check, Worst
from moejax.moe.experts.ffn import ACTIVATIONS
from moejax.moe.experts.grouped_ffn import IMPLEMENTATIONS
from moejax.moe.experts.residuals import Residuals
from moejax.moe.experts.sorted_copies import Copies
from moejax.moe.experts.weights import Biases, Weights

D, F = 2, 3
ROWS = 1100  # copies of the grouped FFN: its largest blocks, of 256 rows, are used
UNASSIGNED = 40  # of them
LIMIT = 0.5  # at which 'clamped_swiglu' clamps here
ROUNDING = 2e-5  # of sums over 1100 copies in float32, as a part of the largest entry


def sigmoid(x: np.ndarray) -> np.ndarray:
  """1 / (1 + exp(-x))."""
  return 1 / (1 + np.exp(-x))


def silu(a: np.ndarray) -> np.ndarray:
  """The activation's own function."""
  return a * sigmoid(a)


def gated_silu(gate: Array, up: Array) -> Array:
  """The activation that experts have here."""
  return jax.nn.silu(gate) * up


class Copied(NamedTuple):
  """What every copy of every token would give at every expert, in float64. [E, N, ...]."""

  y: np.ndarray  # [E, N, D], weighed
  x: np.ndarray  # [E, N, D], its gradient to its token
  scale: np.ndarray  # [E, N], its gradient to its weight
  gate: np.ndarray  # [E, N, D, F]
  up: np.ndarray  # [E, N, D, F]
  down: np.ndarray  # [E, N, F, D]
  gate_bias: np.ndarray  # [E, N, F]
  up_bias: np.ndarray  # [E, N, F]
  down_bias: np.ndarray  # [E, N, D]


# What is summed over the copies of an expert.
OF_EXPERTS = ('gate', 'up', 'down', 'gate_bias', 'up_bias', 'down_bias')


def of_copies(x: np.ndarray, dy: np.ndarray, scale: np.ndarray, w: Weights) -> Copied:
  """Outputs and gradients of each copy, by the chain rule. x, dy: [N, D]; scale: [N]."""
  biases = Biases(*(0 if one is None else one[:, None] for one in w.biases))
  gate = np.einsum('nd,edf->enf', x, w.gate) + biases.gate
  up = np.einsum('nd,edf->enf', x, w.up) + biases.up
  hidden = silu(gate) * up
  d_out = scale[None, :, None] * dy
  d_hidden = np.einsum('end,efd->enf', d_out, w.down)
  slope = sigmoid(gate)
  d_gate = d_hidden * up * slope * (1 + gate * (1 - slope))
  d_up = d_hidden * silu(gate)
  out = np.einsum('enf,efd->end', hidden, w.down) + biases.down
  dx = np.einsum('enf,edf->end', d_gate, w.gate) + np.einsum('enf,edf->end', d_up, w.up)
  return Copied(
    y=scale[None, :, None] * out,
    x=dx,
    scale=(out * dy).sum(-1),
    gate=x[None, :, :, None] * d_gate[:, :, None],
    up=x[None, :, :, None] * d_up[:, :, None],
    down=hidden[..., None] * d_out[:, :, None],
    gate_bias=d_gate,
    up_bias=d_up,
    down_bias=np.broadcast_to(d_out, out.shape),
  )


def wanted_of(all_copies: Copied, tokens: np.ndarray, load: np.ndarray) -> dict[str, np.ndarray]:
  """What the grouped FFN must give where the sorted copies are cut into these loads [E]."""
  found = {name: np.zeros(one.shape[1:]) for name, one in all_copies._asdict().items()}
  for name in OF_EXPERTS:
    one = getattr(all_copies, name)
    found[name] = np.zeros((len(load), *one.shape[2:]))
  start = 0
  for e, count in enumerate(load):
    rows = slice(start, start + count)
    # Every token has one copy.
    found['y'][tokens[rows]] = all_copies.y[e, rows]
    found['x'][tokens[rows]] = all_copies.x[e, rows]
    found['scale'][rows] = all_copies.scale[e, rows]
    for name in OF_EXPERTS:
      found[name][e] = getattr(all_copies, name)[e, rows].sum(0)
    start += count
  return found


def grouped(x: Array, copies: Copies, weights: Weights, dy: Array, name: str) -> dict[str, Array]:
  """Output and gradients of a row of IMPLEMENTATIONS."""
  implementation = IMPLEMENTATIONS[name]
  y, kept = implementation.forward(x, copies, weights, gated_silu)
  found = implementation.backward(Residuals(x, copies, weights, kept), gated_silu, dy)
  w = found.weights
  of_biases = {f'{field}_bias': gradient for field, gradient in w.biases._asdict().items()}
  of_weights = {'gate': w.gate, 'up': w.up, 'down': w.down} | of_biases
  return {'y': y, 'x': found.x, 'scale': found.copy_weights} | of_weights


def clamped(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
  """gpt-oss' activation, from its published code: (up + 1) gate sigmoid(1.702 gate), clamped."""
  gate, up = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
  return (up + 1) * gate * sigmoid(1.702 * gate)


ACTIVATION_EQUATIONS = {'swiglu': lambda gate, up: silu(gate) * up, 'clamped_swiglu': clamped}


def check_activations(plan: Plan) -> Iterator[Check]:
  """Checks value and slope of every activation, at inputs of which many are beyond its limit."""
  worst = Worst('activations and their slopes', 1e-5, 'absolute; float32 against float64')
  gate, up, d_gate, d_up = plan.rng(33).normal(size=(4, 2000))
  # A difference across the kink of a clamp is no slope.
  far = np.minimum(np.abs(np.abs(gate) - LIMIT), np.abs(np.abs(up) - LIMIT)) > 1e-3
  for name, make in sorted(ACTIVATIONS.items()):
    equation, step = ACTIVATION_EQUATIONS[name], 1e-5
    floats = [a.astype(np.float32) for a in (gate, up, d_gate, d_up)]
    value, slope = jax.jit(lambda *a, f=make(LIMIT): jax.jvp(f, a[:2], a[2:]))(*floats)
    worst.see(name, np.abs(np.asarray(value) - equation(gate, up)).max())
    above = equation(gate + step * d_gate, up + step * d_up)
    below = equation(gate - step * d_gate, up - step * d_up)
    error = np.abs(np.asarray(slope) - (above - below) / (2 * step))
    worst.see(f'slope of {name}', error[far].max())
  yield worst.check()


def check_blocks(plan: Plan) -> Iterator[Check]:
  """Checks the grouped FFN with every number of copies of an expert, from none to two blocks."""
  rng = plan.rng(30)
  x, dy = rng.normal(size=(2, ROWS, D)).astype(np.float32)
  scale, tokens = rng.uniform(0.5, 1.5, ROWS).astype(np.float32), rng.permutation(ROWS)
  shapes = (3, D, F), (3, D, F), (3, F, D)
  biases = Biases(*(rng.normal(size=(3, width)).astype(np.float32) for width in (F, F, D)))
  weights = Weights(*(rng.normal(size=one).astype(np.float32) for one in shapes), biases)
  wide = jax.tree.map(lambda a: a.astype(np.float64), weights)
  sorted_x, sorted_dy = (np.asarray(a, np.float64)[tokens] for a in (x, dy))
  all_copies = of_copies(sorted_x, sorted_dy, np.asarray(scale, np.float64), wide)
  for name in sorted(IMPLEMENTATIONS):
    worst = Worst(f'{name}: blocks of every remainder', ROUNDING, 'of the largest entry; float32')
    # The loop over blocks is the one whose programs depend on the rest.
    every = 1 if name == 'blocked' else 32
    for half in range(0, 257, every):
      first = (2 * half, 2 * half + 1)  # up to two whole blocks of 256
      load = np.array([*first, ROWS - UNASSIGNED - sum(first)], np.int32)
      copies = Copies(tokens.astype(np.int32), scale, load)
      found = plan.program(grouped, name)(x, copies, weights, dy)
      for what, wanted in wanted_of(all_copies, tokens, load).items():
        error = np.abs(np.asarray(found[what]) - wanted).max() / np.abs(wanted).max()
        worst.see(f'{what}; loads {load.tolist()}', float(error))
    yield worst.check()
