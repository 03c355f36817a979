"""What a checkpoint says of its arrays, sealed: names (ours, not Flax's), kinds, digests."""

import functools
import hashlib
import json
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.sharding.tree import flatten, kinds

POSITIONS = np.arange(1, (1 << 18) + 1, dtype=np.uint32)  # so many words stay in a core's cache


class Meta(NamedTuple):
  """All of a checkpoint but the arrays."""

  metric: float  # lower is better; inf: not measured, or not finite
  fingerprint: dict[str, str]  # of data and model, see fingerprint.py
  versions: dict[str, str]  # of the packages that wrote it
  kinds: dict[str, str]  # path -> 'float32[4, 8]'
  digests: dict[str, str]  # path -> digest of the bits, see `digests`


def digests(tree: object) -> dict[str, str]:
  """Returns path -> digest of the leaf's bits (its kind is not in it), the same on every mesh."""
  # One program at a time: dozens of them, each with a collective, fill XLA's queue, and virtual
  # devices wait forever.
  sums = {path: jax.device_get(_sums(leaf)) for path, leaf in flatten(tree).items()}
  return {path: digest_of_sums(*both) for path, both in sums.items()}


def digest_of_sums(plain: int, weighted: int) -> str:
  """Returns the digest of a leaf of these two sums, see `sums_of_part`."""
  return f'{int(plain):08x}{int(weighted):08x}'


def sums_of_part(part: np.ndarray, words_before: int) -> np.ndarray:
  """Returns what a part of a leaf adds to its two sums, mod 2^32: those of all its parts add up.

  Args:
    part: numbers that lie together in the leaf.
    words_before: of 32 bits, or numbers where they have fewer, that lie before it.
  """
  plain = weighted = 0
  bits = part.reshape(-1).view(f'u{min(part.itemsize, 4)}')  # 64 bits become two words
  for start in range(0, bits.size, len(POSITIONS)):
    words = bits[start : start + len(POSITIONS)].astype(np.uint32)
    sum_of_words = int(words.sum(dtype=np.uint32))
    plain += sum_of_words
    weighted += int(np.dot(words, POSITIONS[: words.size])) + (words_before + start) * sum_of_words
  return np.array([plain % 2**32, weighted % 2**32], np.uint32)


def digest(tree: object) -> str:
  """Returns one digest of names, kinds and bits: equal for two runs that end in the same state."""
  return _sha256([kinds(tree), digests(tree)])


def seal(meta: Meta) -> dict[str, object]:
  """Returns a JSON object of the record with a digest of itself.

  Without one, damage in a dtype or in the fingerprint would pass for another config.
  """
  metric = meta.metric if math.isfinite(meta.metric) else None  # JSON has no inf
  body = meta._asdict() | {'metric': metric}
  return {'sha256': _sha256(body), 'meta': body}


def unseal(text: str) -> Meta:
  """Returns the record of the text of a sealed JSON object.

  Raises:
    ValueError: the text is damaged.
  """
  try:
    sealed = json.loads(text)
    body, sha256 = sealed['meta'], sealed['sha256']
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'meta/metadata is not JSON of ours ({type(error).__name__})') from None
  if _sha256(body) != sha256:
    raise ValueError('meta/metadata does not match its digest')
  metric = math.inf if body['metric'] is None else body['metric']
  return Meta(**body | {'metric': metric})


def _sha256(value: object) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@functools.partial(jax.jit, static_argnums=1)
def _sums(x: jax.Array, stacked: bool = True) -> jax.Array:  # [2] u32
  """Plain and position-weighted sum of the bits mod 2^32.

  In integers no mesh and no order of summation shows. The plain sum sees any flipped bit; the
  weighted one what moved: a swapped block, a repeated one.
  """
  if x.dtype.itemsize == 2:  # of a loop over bfloat16 XLA's CPU backend makes one over float32
    x = jax.lax.bitcast_convert_type(x, jnp.uint16)
  if stacked and x.ndim > 2:  # a layer at a time: XLA's CPU backend copies all that it sums
    plain, weighted = jax.lax.map(lambda layer: _sums(layer, False), x).T
    words_of_layer = x[0].size * max(1, x.dtype.itemsize // 4)
    before = np.arange(len(x), dtype=np.uint32) * np.uint32(words_of_layer % 2**32)
    weighted = weighted + before * plain  # a layer counts its positions from 1, the array goes on
    return jnp.stack([plain.sum(dtype=jnp.uint32), weighted.sum(dtype=jnp.uint32)])
  if x.dtype.name in ('bool', 'int4', 'uint4', 'int2', 'uint2'):
    x = x.astype(jnp.int8)
  # 64 bits become two words in a last axis.
  words = jnp.dtype(f'uint{min(8 * x.dtype.itemsize, 32)}')
  bits = jax.lax.bitcast_convert_type(x, words).astype(jnp.uint32)
  position, stride = jnp.ones(bits.shape, jnp.uint32), 1
  for axis in reversed(range(bits.ndim)):  # an arange reshaped would gather a sharded array
    position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
    stride *= bits.shape[axis]
  return jnp.stack([bits.sum(dtype=jnp.uint32), (bits * position).sum(dtype=jnp.uint32)])
