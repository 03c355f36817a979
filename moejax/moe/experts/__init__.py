"""The experts' weights, and the ways to compute their FFNs on the tokens routed to them."""

from moejax.moe.experts.ffn import ACTIVATIONS, SwiGLU
from moejax.moe.experts.weights import Experts, Weights

__all__ = ['ACTIVATIONS', 'Experts', 'SwiGLU', 'Weights']
