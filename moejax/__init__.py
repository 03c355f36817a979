"""moejax: Mixture-of-Experts pretraining in JAX, whose load balance is the equation in the paper."""

__version__ = '0.1.0'
