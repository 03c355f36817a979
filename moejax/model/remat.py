"""What a layer keeps of its forward pass for its backward pass, and what it computes again.

Kernels and grouped products are no dots, so that a policy which keeps dots runs attention and
experts twice. The other policies go by what is named where it is made, with `checkpoint_name`. What
has a name and is not read by the backward pass is not kept.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax.extend.core import Primitive

from moejax.moe.saved_names import EXPERTS, ROUTER

ATTENTION = 'attention'  # the output of softmax attention, and its logsumexp from a kernel
RESIDUAL = 'residual'  # between the two halves of a block

# cuDNN's forward pass, whose residuals are made inside of JAX, where nothing names them. It gives
# two arrays, the output and the logsumexp.
CUDNN_FORWARD = 'dot_product_attention_fwd_wrapper'

Body = TypeVar('Body', bound=Callable)
# (primitive, shapes, parameters) -> whether its results are kept
Policy = Callable[..., bool]
named = jax.checkpoint_policies.save_only_these_names


def is_cudnn_forward(primitive: Primitive, *_: object, **__: object) -> bool:
  """Whether the primitive is cuDNN's attention, forward."""
  return primitive.name == CUDNN_FORWARD


# name -> what a layer keeps of its forward pass, besides its input
REMAT_POLICIES: dict[str, Policy] = {
  'none': jax.checkpoint_policies.everything_saveable,
  # The most memory of these, and only attention is computed again: its projections and its kernel.
  'all_but_attention': named(EXPERTS, ROUTER, RESIDUAL),
  # Of every FFN, routed, shared or dense, the pre-activations gate x and up x.
  'experts': named(EXPERTS),
  # Every product of tokens and a matrix that is none of grouped experts: the projections of
  # attention, the router, shared experts and dense layers. Attention and experts are run twice.
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  # Of softmax attention what its kernel gives. The longer the rows, the more it is worth.
  'attention': jax.checkpoint_policies.save_from_both_policies(named(ATTENTION), is_cudnn_forward),
  'full': jax.checkpoint_policies.nothing_saveable,
}


def checkpointed(body: Body, remat: str) -> Body:
  """Returns a function that keeps of its forward pass what a row of REMAT_POLICIES says."""
  return body if remat == 'none' else jax.checkpoint(body, policy=REMAT_POLICIES[remat])
