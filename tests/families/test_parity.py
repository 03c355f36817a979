"""Families against goldens of public implementations: values, gradients, steps, text, and likely
mistakes noticed."""

import jax
import pytest

from tests.support.family_deviations import of_forward, of_steps, of_text
from tests.support.family_golden import NAMES, load
from tests.support.family_mistakes import of_mistakes
from tests.support.family_table import COLUMNS, of_mesh

# Compiling is all the time: the others come with the slow tests.
FAST = 'olmoe'
# On eight devices, too: latent attention with multi-token prediction, and sinks with windows and
# biases. `make families` measures all families there.
ON_A_MESH = ('deepseek_v3', 'gpt_oss')
# Whose mistakes are tried: these have latent attention, YaRN, groups, and what all have.
# `make families` tries those of all families.
MISTAKEN = ('deepseek_v2', 'olmoe')


def beyond(found: dict[str, float]) -> dict[str, float]:
  """What is not within the bounds of the table."""
  return {name: value for name, value in found.items() if not value <= COLUMNS[name]}


def test_every_family_has_a_golden() -> None:
  assert len(NAMES) >= 10 and FAST in NAMES, NAMES


def test_logits_weights_and_gradients_of_one_family() -> None:
  found = of_forward(load(FAST))
  assert found.keys() == {'logits', 'weights', 'loss', 'gradient'} and not beyond(found), found


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_a_family_is_its_golden_and_a_likely_mistake_shows(name: str) -> None:
  """Logits and combine weights, six AdamW steps and a greedy text; then, of some, the logits of
  models that each make one mistake.

  One test: the model is loaded once, and what is compiled for it serves all measures that can.
  """
  golden = load(name)
  found = of_forward(golden) | of_steps(golden) | of_text(golden)
  if name in ON_A_MESH:
    found |= of_mesh(golden)
  # A dense model has no choice of experts, and so no weights to compare.
  expected = {column for column in COLUMNS if name in ON_A_MESH or 'mesh' not in column}
  assert found.keys() == expected - ({'weights'} if not golden.routes else set())
  assert not beyond(found), (beyond(found), found)
  if name not in MISTAKEN:
    return
  mistakes = of_mistakes(golden)
  unseen = {what: value for what, value in mistakes.items() if not value > 10 * COLUMNS['logits']}
  assert len(mistakes) >= 4 and not unseen, unseen


def test_a_deviation_is_seen() -> None:
  """The measures themselves: of another model they are large."""
  golden = load(FAST)
  other = golden._replace(model=jax.tree.map(lambda a: a * 1.01, golden.model))
  found = of_forward(other)
  for name in ('logits', 'weights', 'loss', 'gradient'):
    assert found[name] > 10 * COLUMNS[name], found
