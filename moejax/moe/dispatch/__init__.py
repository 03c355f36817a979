"""How tokens reach their experts, on one device or across a mesh, and come back."""

from moejax.moe.dispatch.dispatchers import DISPATCHERS, DispatchConfig

__all__ = ['DISPATCHERS', 'DispatchConfig']
