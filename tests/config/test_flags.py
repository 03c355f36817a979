"""The command line: what it sets, and that everything wrong with one is told at once, without a traceback."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from moejax.config import ConfigError, check, flags, frozendict
from moejax.moe.balance.config import BalanceConfig
from moejax.train.experiment.config import ExperimentConfig


@dataclasses.dataclass(frozen=True)
class Router:
  top_k: int = 2
  scale: float = 1.0

  def __post_init__(self) -> None:
    check()


@dataclasses.dataclass(frozen=True)
class Model:
  d_model: int = 64
  tied: bool = False
  layers: tuple[int, ...] = (1, 2)
  router: Router = Router()

  def __post_init__(self) -> None:
    check(f'd_model={self.d_model} is odd' if self.d_model % 2 else '')


@dataclasses.dataclass(frozen=True)
class Root:
  steps: int = 10
  workdir: str = ''
  model: Model = Model()
  losses: frozendict = frozendict(sequence=0.01)

  def __post_init__(self) -> None:
    check(f'steps={self.steps} is not positive' if self.steps < 1 else '')


FILE = """
import sys
from moejax.config import to_config_dict
def get_config():
  config = to_config_dict(sys.modules['test_flags'].Root())
  config.steps = 5
  return config
"""


@pytest.fixture
def default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
  monkeypatch.setitem(sys.modules, 'test_flags', sys.modules[__name__])
  path = tmp_path / 'base.py'
  path.write_text(FILE)
  return str(path)


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
    '--config.stesp: no such field; did you mean --config.steps=?',
    '--config.modle.d_model: no such field; did you mean --config.model.d_model=?',
    '--config.topk: no such field; did you mean --config.model.router.top_k=?',
    '--config.steps=many: give int, such as --config.steps=5',
    '--config.model.tied=maybe: give bool, such as --config.model.tied=False',
    '--config.qqqqqq: no such field; --help lists all',
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


@pytest.fixture
def stub(default: str, monkeypatch: pytest.MonkeyPatch) -> list[Root]:
  """train.py with a small config and a trainer that only keeps what it is given."""
  seen: list[Root] = []
  monkeypatch.setattr('moejax.train.experiment.config.ExperimentConfig', Root)
  monkeypatch.setattr('moejax.train.trainer.train', lambda config: seen.append(config) or 4)
  return seen


VARIANTS = """
import sys
from typing import Literal
from moejax.config import to_config_dict
def get_config(variant: Literal['', 'tiny', 'big'] = ''):
  return to_config_dict(sys.modules['test_flags'].Root(5 + len(variant)))
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
    f"--config={path}: ConfigError: it has no variant 'tinny'; use {path} or {path}:tiny or {path}:big",
    'config: steps=0 is not positive',
  )
  assert problems_of([f'--config={default}:tiny'], default) == (
    f"--config={default}: ConfigError: it has no variant 'tiny'; use {default}",
  )


def test_a_file_whose_variants_are_any_text_decides_itself(tmp_path: Path, default: str) -> None:
  path = tmp_path / 'variants.py'
  path.write_text(VARIANTS.replace("Literal['', 'tiny', 'big']", 'str'))
  assert flags.parse_flags([f'--config={path}:three'], Root, default).steps == 10


def test_train_gives_the_config_to_the_trainer_and_returns_its_status(
  stub: list[Root], default: str
) -> None:
  assert train.main([f'--config={default}', '--workdir=w', '--config.steps=3']) == 4
  assert stub == [Root(steps=3, workdir='w')]


def test_train_tells_problems_on_stderr_and_returns_2(
  stub: list[Root], default: str, capsys: pytest.CaptureFixture[str]
) -> None:
  assert train.main([f'--config={default}', 'steps=9', '--config.steps=0']) == 2
  out, err = capsys.readouterr()
  assert not out and not stub and 'Traceback' not in err
  assert (
    'steps=9: no such flag; did you mean --config.steps=9?' in err
    and 'steps=0 is not positive' in err
  )


def test_help_shows_usage_and_every_field_with_its_value(
  stub: list[Root], default: str, capsys: pytest.CaptureFixture[str]
) -> None:
  assert train.main([f'--config={default}', '--help']) == 0
  out = capsys.readouterr().out
  assert (
    'python train.py' in out
    and '--config.steps=5\n' in out
    and '--config.losses.sequence=0.01' in out
  )
  assert '--config.model.router.top_k=2' in out and not stub


def test_train_starts_again_once_with_huge_pages_and_keeps_the_process() -> None:
  code = """
import os, runpy, sys
sys.platform, sys.argv = 'linux', ['train.py']
os.execv = lambda program, argv: (print(os.getpid(), argv[1:], os.environ['GLIBC_TUNABLES']), sys.exit(0))
runpy.run_path('train.py', run_name='__main__')
"""
  env = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'}
  root = Path(train.__file__).parent
  done = subprocess.Popen(
    [sys.executable, '-c', code], env=env, cwd=root, stdout=subprocess.PIPE, text=True
  )
  out = done.communicate()[0]
  assert out.startswith(f"{done.pid} ['-c'") and out.strip().endswith('glibc.malloc.hugetlb=1')


REAL = (
  'from moejax import config\nfrom moejax.train.experiment import config as experiment\n\n\n'
  'def get_config():\n  return config.to_config_dict(experiment.ExperimentConfig())\n'
)


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


def test_a_real_process_tells_all_problems_and_exits_2_before_anything_runs(tmp_path: Path) -> None:
  path = tmp_path / 'real.py'
  path.write_text(REAL)
  argv = [
    f'--config={path}',
    f'--workdir={tmp_path / "run"}',
    'steps=9',
    '--config.model.d_modle=3',
    '--config.steps=x',
    '--config.batch_size=8',
    '--config.micro_batches=3',
    '--config.balance.bias_rule=sign',
    '--config.model.moe.router.selection=hash',
    '--config.balance.losses.global_batch=0.1',
  ]
  root = Path(train.__file__).parent
  done = subprocess.run(
    [sys.executable, 'train.py', *argv], cwd=root, capture_output=True, text=True
  )
  assert done.returncode == 2 and not done.stdout and 'Traceback' not in done.stderr
  for part in (
    'steps=9',
    'd_modle',
    'config.model.d_model',
    '--config.steps=x',
    'micro_batches=3',
    'size=8',
    "bias_rule='sign' would move a bias that selection='hash' ignores: use selection='top_k'",
  ):
    assert part in done.stderr
  assert not (tmp_path / 'run').exists()
