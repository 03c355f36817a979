"""Dispatch where nothing is trained: no capacity, whatever the model was trained with.

With a capacity, what a token gives depends on the tokens beside it: rows of a batch change each
other, a prompt its own continuation, and the number of devices all of them. Training takes that for
even work. An evaluation, decoding or logits that are written must not: they are of the text alone.
"""

from moejax.moe.dispatch.dispatchers import DispatchConfig


def dropless(cfg: DispatchConfig) -> DispatchConfig:
  """Returns how to dispatch where nothing is trained: as in training, but that nothing is dropped.

  With a capacity it is by `sparse_matmul`: a dense product of all experts with all tokens needs E/K
  times the work and memory that training was set up for.
  """
  return DispatchConfig('sparse_matmul') if cfg.capacity_factor > 0 else cfg


def dropless_note(cfg: DispatchConfig) -> str:
  """Says what training dropped and a model alone does not; '' for training that drops nothing."""
  if not cfg.capacity_factor:
    return ''
  return (
    f'trained with dispatch.capacity_factor={cfg.capacity_factor}, where full experts drop copies; '
    'here none are dropped, and no row depends on the others'
  )
