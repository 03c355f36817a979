"""What a run says of itself before it is paid for."""

import pytest

from moejax.config import ConfigError
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.layer import MoEConfig, causality
from moejax.moe.routing import RouterConfig
from moejax.moe.selection import SELECTIONS
from moejax.train.experiment.summary import human


@pytest.mark.parametrize(
  ('number', 'base', 'told'),
  [
    (0, 1000, '0 '),
    (999, 1000, '999 '),
    (1000, 1000, '1 k'),
    (12_345_678, 1000, '12.3 M'),
    (12_345_678, 1024, '11.8 Mi'),
    (1023, 1024, '1.02e+03 '),
    (5e9, 1000, '5 G'),
    (7e15, 1000, '7 P'),
    (2.5e18, 1000, '2.5e+03 P'),
  ],
)
def test_numbers_for_people(number: float, base: int, told: str) -> None:
  assert human(number, base) == told


@pytest.mark.parametrize('selection', SELECTIONS)
def test_a_run_says_where_its_causality_ends(selection: str) -> None:
  router = RouterConfig(8, 2, selection=selection)
  of_router = causality(MoEConfig(router))
  assert [line.startswith('no') for line in of_router] == [True] * (
    not SELECTIONS[selection].causal
  )
  assert all(selection in line for line in of_router)
  if selection == 'expert_choice':
    with pytest.raises(
      ConfigError, match='capacity_factor=1.25 limits experts that .* has already filled'
    ):
      MoEConfig(router, DispatchConfig('dense_matmul', 1.25))
    return
  for drop_by, word in (
    ('probs', 'no: full experts'),
    ('position', 'yes within a row: full experts'),
  ):
    *others, last = causality(MoEConfig(router, DispatchConfig('dense_matmul', 1.25, drop_by)))
    assert others == of_router and last.startswith(word)
