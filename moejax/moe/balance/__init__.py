"""How unevenly experts are used: the losses that push against it, and the config that switches them on."""

from moejax.moe.balance.config import BalanceConfig
from moejax.moe.balance.losses import BALANCE_LOSSES, convert_coefficient

__all__ = ['BALANCE_LOSSES', 'BalanceConfig', 'convert_coefficient']
