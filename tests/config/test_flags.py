"""The command line: what it sets, and that everything wrong with one is told at once."""

from pathlib import Path

import pytest

from moejax.config import ConfigError, flags, frozendict
from moejax.moe.balance.config import BalanceConfig
from moejax.train.experiment.config import ExperimentConfig
from tests.config.small_config import FILE, REAL, Model, Root, Router


def problems_of(argv: list[str], default: str) -> tuple[str, ...]:
  with pytest.raises(ConfigError) as caught:
    flags.parse_flags(argv, Root, default)
  return caught.value.problems


def test_no_argument_is_the_default_file(default: str) -> None:
  assert flags.parse_flags([], Root, default) == Root(steps=5)


def test_every_type_of_field_can_be_set(default: str) -> None:
  argv = [
    '--config.steps=7',
    '--workdir',
    'a=b',
    '--config.model.tied',
    '--config.model.layers=(3,)',
    '--config.model.router.scale=2',
    '--config.losses.sequence=0.1@0',
    '--config.losses.router_z=1e-3',
  ]
  config = flags.parse_flags(argv, Root, default)
  assert config == Root(
    7,
    'a=b',
    Model(tied=True, layers=(3,), router=Router(scale=2.0)),
    frozendict(sequence='0.1@0', router_z=0.001),
  )
  assert not flags.parse_flags(['--noconfig.model.tied'], Root, default).model.tied


def test_a_value_may_follow_its_flag_and_a_wish_is_guessed(default: str) -> None:
  argv = ['--config.steps', '7', '--config.model.tied', '--workdir', 'w', '--config.losses.z', '-1']
  config = flags.parse_flags(argv, Root, default)
  assert (config.steps, config.model.tied, config.workdir) == (7, True, 'w')
  assert config.losses == frozendict(sequence=0.01, z=-1.0)
  assert problems_of(['--steps', '100', '--config.model.router.tk=3', '--top-k=4'], default) == (
    '--steps=100: no such flag; did you mean --config.steps=100?',
    '--config.model.router.tk: no such field; did you mean --config.model.router.top_k=3?',
    '--top-k=4: no such flag; did you mean --config.model.router.top_k=4?',
  )


def test_a_config_file_may_lie_at_home(
  default: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'mine.py').write_text(Path(default).read_text())
  assert flags.parse_flags(['--config=~/mine.py'], Root, 'none') == Root(steps=5)


def test_a_config_of_ours_is_named_without_folder_and_suffix(default: str) -> None:
  tiny = flags.parse_flags(['--config=tiny'], ExperimentConfig, default)
  assert (tiny.workdir, tiny.model.moe.router.num_experts) == ('runs/tiny', 8)
  variant = flags.parse_flags(['--config=deepseek_v3:tiny'], ExperimentConfig, default)
  assert variant.workdir == 'runs/deepseek_v3_tiny'
  told = (
    'ConfigError: No such file; did you mean --config=tiny? give the path of one, or deepseek_v3'
  )
  assert told in problems_of(['--config=tinny'], default)[0]


def test_order_decides_and_another_file_can_be_named(default: str, tmp_path: Path) -> None:
  other = tmp_path / 'other.py'
  other.write_text(FILE.replace('5', '6'))
  argv = ['--config.model={"d_model": 8}', '--config.model.d_model=32', f'--config={other}']
  config = flags.parse_flags(argv, Root, default)
  assert (config.steps, config.model.d_model, config.model.layers) == (6, 32, (1, 2))


def test_all_problems_of_a_command_line_come_at_once(default: str) -> None:
  argv = [
    'steps=9',
    'config.steps=8',
    '--stesp=9',
    '--config.stesp=9',
    '--config.modle.d_model=3',
    '--config.topk=1',
    '--config.steps=many',
    '--config.model.tied=maybe',
    '--config.model.d_model=7',
    '--config.steps=0',
    '--config.qqqqqq=1',
    '--config.steps.x=1',  # steps is a number, and no section
    '--noconfig.steps',
    '--config.model.router.scale',
    '--config.losses.z=(1,2)',
    '--workdir',
  ]
  assert problems_of(argv, default) == (
    '--workdir: Missing value for flag --workdir',
    'steps=9: no such flag; did you mean --config.steps=9?',
    'config.steps=8: no such flag; did you mean --config.steps=8?',
    '--stesp=9: no such flag; did you mean --config.steps=9?',
    '--config.stesp: no such field; did you mean --config.steps=9?',
    '--config.modle.d_model: no such field; did you mean --config.model.d_model=3?',
    '--config.topk: no such field; did you mean --config.model.router.top_k=1?',
    '--config.steps=many: give int, such as --config.steps=5',
    '--config.model.tied=maybe: give bool, such as --config.model.tied=False',
    '--config.qqqqqq: no such field; --help lists all',
    '--config.steps.x: no such field; --help lists all',
    '--noconfig.steps: give int, such as --config.steps=0',
    '--config.model.router.scale: give float, such as --config.model.router.scale=1.0',
    'config.model: d_model=7 is odd',
    'config.losses.z=(1, 2) is tuple; give float',
    'config: steps=0 is not positive',
  )


@pytest.mark.parametrize(
  'text,says',
  [
    ('', "KeyError: 'get_config'"),
    ('def get_config():\n  return 3\n', 'get_config() gives int; give a ConfigDict'),
    ('x = 1\nprint(y)\n', "line 2: NameError: name 'y' is not defined"),
    ('def f(:\n', 'SyntaxError'),
    (FILE.replace('config.steps', 'config.stesp'), 'line 6: AttributeError'),
  ],
)
def test_a_bad_config_file_is_one_of_the_problems(
  text: str, says: str, tmp_path: Path, default: str
) -> None:
  bad = tmp_path / 'bad.py'
  bad.write_text(text)
  problems = problems_of([f'--config={bad}', 'stray', '--config.model.d_model=7'], default)
  assert says in problems[0] and str(bad) in problems[0]
  assert problems[1:] == ('stray: no such flag; --help lists all', 'config.model: d_model=7 is odd')


def test_a_missing_config_file_is_named(default: str) -> None:
  assert 'No such file' in problems_of(['--config=nowhere.py'], default)[0]


VARIANTS = """
from typing import Literal
from tests.config.small_config import Root
from moejax.config import to_config_dict
def get_config(variant: Literal['', 'tiny', 'big'] = ''):
  return to_config_dict(Root(5 + len(variant)))
"""


def test_a_variant_of_a_file_is_named_after_a_colon(tmp_path: Path, default: str) -> None:
  path = tmp_path / 'variants.py'
  path.write_text(VARIANTS)
  assert flags.parse_flags([f'--config={path}'], Root, default).steps == 5
  assert flags.parse_flags([f'--config={path}:tiny'], Root, default).steps == 9
  assert flags.parse_flags([f'--config={path}:tiny', '--config.steps=3'], Root, default).steps == 3
  assert flags.parse_flags([], Root, f'{path}:big').steps == 8
  assert '--config.steps=9' in flags.describe([f'--config={path}:tiny'], Root, default)


def test_a_variant_that_is_not_there_names_those_that_are(tmp_path: Path, default: str) -> None:
  path = tmp_path / 'variants.py'
  path.write_text(VARIANTS)
  assert problems_of([f'--config={path}:tinny', '--config.steps=0'], default) == (
    f"--config={path}: ConfigError: it has no variant 'tinny'; "
    f'use {path} or {path}:tiny or {path}:big',
    'config: steps=0 is not positive',
  )
  assert problems_of([f'--config={default}:tiny'], default) == (
    f"--config={default}: ConfigError: it has no variant 'tiny'; use {default}",
  )


def test_a_file_whose_variants_are_any_text_decides_itself(tmp_path: Path, default: str) -> None:
  path = tmp_path / 'variants.py'
  path.write_text(VARIANTS.replace("Literal['', 'tiny', 'big']", 'str'))
  assert flags.parse_flags([f'--config={path}:three'], Root, default).steps == 10


def test_every_switch_of_balance_can_be_set_on_the_real_tree(tmp_path: Path) -> None:
  path = tmp_path / 'real.py'
  path.write_text(REAL)
  argv = [
    'balance.losses.global_batch=0.1, 0.01@10%, 0.001@70%',
    'balance.losses.router_z=1e-3',
    'micro_batches=2',
    'balance.losses.simbal=1',
    'balance.bias_rule=quantile',
    'balance.bias_rate=0.5, 0@90%',
    'balance.partition=4',
    'balance.assignment=dispatched',
    'balance.probability=sigmoid',
    'balance.accumulation=lagged',
    'balance.ep_groups=2',
    'model.moe.router.jitter=0.01',
    'loss.z_coef=1e-4',
  ]
  cfg = flags.parse_flags([f'--config.{arg}' for arg in argv], ExperimentConfig, str(path))
  assert cfg.balance.active() == ('global_batch', 'router_z', 'simbal')
  assert cfg.balance == BalanceConfig(
    frozendict(global_batch='0.1, 0.01@10%, 0.001@70%', router_z='0.001', simbal='1.0'),
    'quantile',
    '0.5, 0@90%',
    2,
    4,
    'dispatched',
    'sigmoid',
    'lagged',
  )
  assert cfg.model.moe.router.jitter == 0.01 and cfg.loss.z_coef == '1e-4'
  with pytest.raises(ConfigError, match='losses.global_bach is not a balance loss: use one of'):
    flags.parse_flags(['--config.balance.losses.global_bach=0.1'], ExperimentConfig, str(path))
