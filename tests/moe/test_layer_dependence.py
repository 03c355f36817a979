"""What the output of an MoE layer depends on, and what it does not."""

import itertools

import jax
import numpy as np
from jax import Array

from moejax.moe.layer import MoEConfig
from moejax.moe.selection import SELECTIONS
from tests.moe.layer_cases import (
  DY,
  FIRST,
  NOISY,
  SELECTED,
  TIGHT,
  B,
  S,
  given,
  given_to,
  key_of,
  layer,
  layers,
  output,
  ran,
  run,
  run_on,
  with_parameters,
)


@layers([*FIRST[:2], *TIGHT, *SELECTED, NOISY])
def test_causal_unless_it_drops_by_score_or_selects_by_row(cfg: MoEConfig) -> None:
  """What comes later in a row changes nothing before it.

  Unless it can evict by score, or experts choose tokens.
  """
  g, before, worst = given_to(cfg), output(cfg, given_to(cfg))[0], 0.0
  for row, begin in itertools.product(range(B), range(1, S)):
    x = g.x.copy()
    # Keener on the very experts that an earlier token wants.
    x[row, begin:] = 3 * g.x[row, begin - 1]
    worst = max(worst, np.abs(output(cfg, g._replace(x=x))[0] - before)[row, :begin].max())
  evicts = cfg in TIGHT and cfg.dispatch.drop_by == 'probs'
  if SELECTIONS[cfg.router.selection].causal and not evicts:
    assert worst < 1e-5
  else:
    assert worst > 1e-2, 'it leaks; a detector that does not see it sees nothing'


@layers(FIRST)
def test_padding_changes_nothing_and_takes_no_room(cfg: MoEConfig) -> None:
  g = given_to(cfg)
  dy = np.where(g.mask[..., None], DY, 0)
  noise = np.random.default_rng(5).normal(scale=30, size=g.x.shape)
  for garbage in (noise, np.nan, np.inf):
    y, aux, gradients = run_on(cfg, g, dy)
    padded = np.where(g.mask[..., None], g.x, garbage).astype(np.float32)
    other = run_on(cfg, g._replace(x=padded), dy)
    for a, b in zip(jax.tree.leaves((y, aux, gradients)), jax.tree.leaves(other), strict=True):
      np.testing.assert_array_equal(a, b)
    assert not np.asarray(y)[~g.mask].any(), 'padding gets 0, of shared experts, too'
    _, to_x, _ = gradients
    assert not np.asarray(to_x)[~g.mask].any()


@layers(TIGHT)
def test_padding_takes_no_room_in_a_buffer(cfg: MoEConfig) -> None:
  g = given_to(cfg)
  keen = np.where(g.mask[..., None], g.x, 30 * g.x[:1, :1])  # padding that would fill the buffers
  one, two = (output(cfg, g._replace(x=x)) for x in (g.x, keen))
  np.testing.assert_allclose(one[0][g.mask], two[0][g.mask], rtol=1e-5, atol=1e-5)
  assert one[1].dropped == two[1].dropped


@layers(FIRST)
def test_strange_batches_stay_finite(cfg: MoEConfig) -> None:
  """Nothing that counts; one token that does; all alike; all zero; logits of ±1e4."""
  g, moe, key = given_to(cfg), layer(cfg), key_of(cfg)
  steep = with_parameters(moe, lambda name, a: 1e4 * a if 'router' in name else a)
  nothing, one = np.zeros((B, S), bool), np.zeros((B, S), bool)
  one[1, 2] = True
  for label, of, strange in (
    ('nothing', moe, g._replace(mask=nothing)),
    ('one', moe, g._replace(mask=one)),
    ('alike', moe, g._replace(x=np.broadcast_to(g.x[:1, :1], g.x.shape))),
    ('zeros', moe, g._replace(x=0 * g.x)),
    ('steep', steep, g),
  ):
    y, aux, gradients = run(of, strange.x, strange.bias, strange.tokens(key), DY)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, aux, gradients))), label
    copies = strange.mask.sum() * cfg.router.top_k
    if cfg.router.selection == 'expert_choice':  # each expert takes its part of a row, rounded up
      copies = sum(-(-n * cfg.router.top_k // 4) * 4 for n in strange.mask.sum(1))
    assert aux.load.sum() == aux.seen.sum() == copies, label
    if label == 'nothing':
      simbal = aux.losses['simbal']  # which looks at no token
      assert aux.dropped == 0 and simbal > 0
      assert not any(value for name, value in aux.losses.items() if name != 'simbal')


def test_renaming_experts_renames_their_load_and_nothing_else() -> None:
  old_name = np.array([6, 4, 7, 5, 1, 2, 0, 3])  # of each new one; groups stay together

  def rename(name: str, a: Array) -> Array:
    if 'router' in name:
      return a[:, old_name]
    return a[old_name] if 'experts' in name else a

  for cfg in FIRST[:2]:
    g = given(8)
    renamed = with_parameters(layer(cfg), rename)
    y, aux, (to_moe, to_x, _) = run(renamed, g.x, g.bias[old_name], g.tokens(), DY)
    want_y, want, (want_moe, want_x, _) = ran(cfg)
    np.testing.assert_allclose(y, want_y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(to_x, want_x, rtol=1e-5, atol=1e-5)
    want_moe = with_parameters(want_moe, rename)
    for a, b in zip(jax.tree.leaves(to_moe), jax.tree.leaves(want_moe), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(aux.load, want.load[old_name])
    for name, value in want.losses.items():
      np.testing.assert_allclose(aux.losses[name], value, rtol=1e-6)
