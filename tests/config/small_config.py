"""Config dataclasses of three levels, and the text of config files that give them."""

import dataclasses

from moejax.config import check, frozendict


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
from tests.config.small_config import Root
from moejax.config import to_config_dict
def get_config():
  config = to_config_dict(Root())
  config.steps = 5
  return config
"""

REAL = (
  'from moejax import config\nfrom moejax.train.experiment import config as experiment\n\n\n'
  'def get_config():\n  return config.to_config_dict(experiment.ExperimentConfig())\n'
)
