"""How unevenly experts are used: losses that push against it, and the config that sets them."""

from moejax.moe.balance.aux_loss import ASSIGNMENTS
from moejax.moe.balance.config import BalanceConfig
from moejax.moe.balance.losses import BALANCE_LOSSES, CODEBASES, convert_coefficient

__all__ = ['ASSIGNMENTS', 'BALANCE_LOSSES', 'CODEBASES', 'BalanceConfig', 'convert_coefficient']
