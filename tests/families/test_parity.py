"""Families against goldens of public implementations: values, gradients, steps, text, and likely mistakes noticed."""

import pytest

from tests.support import family_table as parity
from tests.support.family_table import (
  COLUMNS,
  NAMES,
  load,
  mesh_for,
  of_forward,
  of_mistakes,
  of_steps,
  of_text,
)

# Compiling is all the time: the others come with the slow tests.
FAST = ('olmoe',)


def within(found: dict[str, float], prefix: str = '') -> None:
  """Nothing measured is beyond the bounds of the table."""
  bad = {name: value for name, value in found.items() if not value <= COLUMNS[prefix + name]}
  assert found and not bad, (bad, found)


def test_every_family_has_a_golden() -> None:
  assert len(NAMES) >= 10 and {*NAMES} >= {*FAST}, NAMES


@pytest.mark.parametrize(
  'name', [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_logits_weights_and_gradients(name: str) -> None:
  golden = load(name)
  found = of_forward(golden)
  assert {'logits', 'loss', 'gradient'} <= set(found) and ('weights' in found) == golden.routes
  within(found)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_the_same_on_a_mesh_of_eight(name: str) -> None:
  golden = load(name)
  within(of_forward(golden, mesh_for(golden)))


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_six_steps_and_a_greedy_text(name: str) -> None:
  golden = load(name)
  within(of_steps(golden) | of_text(golden))


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_a_likely_mistake_shows(name: str) -> None:
  golden = load(name)
  found = of_mistakes(golden)
  unseen = {
    mistake: value for mistake, value in found.items() if not value > 10 * COLUMNS['logits']
  }
  assert len(found) >= 4 and not unseen, unseen


def test_a_deviation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
  """The measures themselves: of another model they are large."""
  golden = load('olmoe')
  other = golden._replace(
    cfg=golden.cfg, model=parity.jax.tree.map(lambda a: a * 1.01, golden.model)
  )
  found = of_forward(other)
  assert all(
    found[name] > 10 * COLUMNS[name] for name in ('logits', 'weights', 'loss', 'gradient')
  ), found
