"""Large numbers as a person reads them."""

import pytest

from moejax.runtime.units import human


@pytest.mark.parametrize(
  ('number', 'decimal', 'binary'),
  [
    (0, '0 ', '0 '),
    (7, '7 ', '7 '),
    (0.5, '0.5 ', '0.5 '),
    (999, '999 ', '999 '),
    (1000, '1 k', '1e+03 '),
    (1023, '1.02 k', '1.02e+03 '),
    (1024, '1.02 k', '1 ki'),
    (12_345_678, '12.3 M', '11.8 Mi'),
    (-5_000_000, '-5 M', '-4.77 Mi'),
    (2**40, '1.1 T', '1 Ti'),
    (1e18, '1e+03 P', '888 Pi'),
    (2e21, '2e+06 P', '1.78e+06 Pi'),
  ],
)
def test_three_digits_and_a_prefix(number: float, decimal: str, binary: str) -> None:
  assert human(number) == decimal
  assert human(number, 1024) == binary


def test_every_prefix_is_reached_at_its_power_of_the_base() -> None:
  assert [human(1000**i) for i in range(6)] == ['1 ', '1 k', '1 M', '1 G', '1 T', '1 P']
  assert [human(1024**i, 1024) for i in range(1, 6)] == ['1 ki', '1 Mi', '1 Gi', '1 Ti', '1 Pi']
