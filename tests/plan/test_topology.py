"""Names of devices, and the flags of a plan."""

import pytest

from moejax.config import ConfigError
from moejax.plan.topology import parse_topology, read_plan_flags


@pytest.mark.parametrize(
  ('text', 'count', 'message'),
  [
    ('v5p:8x8x8', 512, ''),
    ('v6e:16x16', 256, ''),
    ('tpu7x:2x2x1', 8, ''),
    ('h200:256', 256, ''),
    ('cpu:512', 512, ''),
    ('h300:8', 0, 'topology=h300:8 is not known: use one like v5p:8x8x8 .*h200:256.*cpu:512'),
    ('v5p:64', 0, 'v5p is by 3 sizes, not 1'),
    ('h200:12', 0, 'a multiple of 8'),
    ('v5p', 0, 'not known'),
    ('v5e:8x0', 0, 'not known'),
    ('cpu:2x2', 0, 'cpu is by 1 sizes'),
  ],
)
def test_names_of_slices(text: str, count: int, message: str) -> None:
  if message:
    with pytest.raises(ConfigError, match=message):
      parse_topology(text)
    return
  topology = parse_topology(text)
  assert topology.count == count
  assert topology.compiler != 'cpu' or 'CPU' in topology.note


def test_flags_go_together() -> None:
  assert read_plan_flags(['--config.steps=3']) == ('', None, ['--config.steps=3'])
  for argv, message in (
    (['--topology=cpu:8'], 'add --plan'),
    (['--plan'], 'needs --topology'),
    (['--plan=best', '--topology=cpu:8'], '--plan=best: use --plan'),
    (['--plan', '--topology='], 'needs --topology'),
  ):
    with pytest.raises(ConfigError, match=message):
      read_plan_flags(argv)
  with pytest.raises(ConfigError, match='has 8 CPU devices: start it with XLA_FLAGS'):
    parse_topology('cpu:9').devices()
