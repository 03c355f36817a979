"""The config of a model: attention, how parameters start, and all the rest of a transformer.

Letters: D model, L layers.
"""

import dataclasses
from collections.abc import Callable

import jax

from moejax.config import check
from moejax.model.attention_cores import ATTENTIONS
from moejax.model.rope import RopeConfig
from moejax.moe.layer import MoEConfig

# rule -> (std, d_model, num_layers) to the standard deviation of what reads the residual, and of what writes to it
INIT_RULES: dict[str, Callable[[float, int, int], tuple[float, float]]] = {
  'normal': lambda std, d_model, layers: (std, std),
  'depth': lambda std, d_model, layers: (std, std * (2 * layers) ** -0.5),  # GPT-2, Megatron-LM
  'tiny': lambda std, d_model, layers: (
    2 * ((2 * d_model * layers) ** -0.5,)
  ),  # TinyInit (2504.07866); std is not read
}


@dataclasses.dataclass(frozen=True)
class InitConfig:
  """How parameters start: matrices normal with mean 0, biases and sinks at 0, norms at 1.

  rule: a row of INIT_RULES.  embed_std: of the embedding; 0: as the rest.
  attention_gain, ffn_gain: c of depth-scaled sandwich norm (2504.07866): the norm of a branch's output starts at
    c / sqrt(L) instead of 1; 0: at 1.
  """

  std: float = 0.02
  rule: str = 'normal'
  embed_std: float = 0.0
  attention_gain: float = 0.0
  ffn_gain: float = 0.0

  def __post_init__(self) -> None:
    check(
      f'std={self.std}: use a number above 0' if not self.std > 0 else '',
      f'rule={self.rule!r} is not one of {sorted(INIT_RULES)}'
      if self.rule not in INIT_RULES
      else '',
      *(
        f'{name}={value}: use 0 (off) or more'
        for name, value in (
          ('embed_std', self.embed_std),
          ('attention_gain', self.attention_gain),
          ('ffn_gain', self.ffn_gain),
        )
        if not value >= 0
      ),
    )


QK_NORMS = ('', 'head', 'projection')


@dataclasses.dataclass(frozen=True)
class LatentConfig:
  """Multi-head latent attention: all heads' keys and values are made from one vector a token: that is cached.

  kv_rank: width of that vector; 0: no latent attention.  q_rank: of queries' own; 0: a projection of full rank.
  d_rope: the part of a query or key that carries position, beside the d_head that do not.  d_value: of a value.
  norm_eps: of the norms of both latent vectors, whatever the model's is.
  """

  kv_rank: int = 0
  q_rank: int = 0
  d_rope: int = 64
  d_value: int = 128
  norm_eps: float = 1e-6

  def __post_init__(self) -> None:
    check(
      *(
        f'{name}={value}: use 0 (off) or more'
        for name, value in (('kv_rank', self.kv_rank), ('q_rank', self.q_rank))
        if value < 0
      ),
      f'd_rope={self.d_rope}: use an even number, 2 or more'
      if self.d_rope < 2 or self.d_rope % 2
      else '',
      f'd_value={self.d_value}: use 1 or more' if self.d_value < 1 else '',
      f'norm_eps={self.norm_eps}: use a number above 0' if not self.norm_eps > 0 else '',
    )


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Grouped-query attention: each of `num_kv_heads` serves num_heads / num_kv_heads query heads. Or latent attention.

  implementation: a row of ATTENTIONS, or 'auto' for the best of the platform.
  windows: layer l of the model sees itself and the `windows[l % len] - 1` tokens before it; 0: everything before it.
  qk_norm: a norm of q and k before rope: 'head' (each head by itself) or 'projection' (all heads at once).
  clip_qkv: q, k and v are clipped to +-clip_qkv, after their norms and before rope; 0: off.
  sinks: a learnt logit for each query head, of a key without a value: what of the softmax may go to nothing.
  """

  num_heads: int = 4
  num_kv_heads: int = 4
  d_head: int = 64
  rope: RopeConfig = RopeConfig()
  implementation: str = 'auto'
  windows: tuple[int, ...] = (0,)
  qk_norm: str = ''
  qkv_bias: bool = False
  out_bias: bool = False
  clip_qkv: float = 0.0
  sinks: bool = False
  latent: LatentConfig = LatentConfig()

  def __post_init__(self) -> None:
    check(
      *(
        f'{name}={value}: use 1 or more'
        for name, value in (
          ('num_heads', self.num_heads),
          ('num_kv_heads', self.num_kv_heads),
          ('d_head', self.d_head),
        )
        if value < 1
      ),
      f'num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: use a divisor of it'
      if self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads
      else '',
      f'implementation={self.implementation!r} is not one of {["auto", *sorted(ATTENTIONS)]}'
      if self.implementation not in ('auto', *ATTENTIONS)
      else '',
      f'windows={self.windows}: use one number or more, each 0 (all) or more'
      if not self.windows or min(self.windows) < 0
      else '',
      f'qk_norm={self.qk_norm!r} is not one of {list(QK_NORMS)}'
      if self.qk_norm not in QK_NORMS
      else '',
      f'clip_qkv={self.clip_qkv}: use 0 (off) or more' if not self.clip_qkv >= 0 else '',
      *(self.latent_problems() if self.latent.kv_rank else self.grouped_problems()),
    )

  def grouped_problems(self) -> list[str]:
    """What only grouped-query attention cannot do."""
    width = int(self.d_head * self.rope.fraction)
    return [
      f'd_head={self.d_head} * rope.fraction={self.rope.fraction} = {width} channels to rotate: '
      'use an even number, 2 or more'
      if width < 2 or width % 2
      else ''
    ]

  def latent_problems(self) -> list[str]:
    """What only latent attention cannot do."""
    return [
      f'num_kv_heads={self.num_kv_heads}: use num_heads={self.num_heads} with latent attention'
      if self.num_kv_heads != self.num_heads
      else '',
      *(
        f'{name}={value!r}: use {off!r} with latent attention'
        for name, value, off in (
          ('qk_norm', self.qk_norm, ''),
          ('clip_qkv', self.clip_qkv, 0.0),
          ('sinks', self.sinks, False),
        )
        if value
      ),
      f'rope.fraction={self.rope.fraction}: use 1 with latent attention, where latent.d_rope is what is rotated'
      if self.rope.fraction != 1
      else '',
    ]


COMPUTE_DTYPES = ('bfloat16', 'float32')

# name -> what a block keeps of its forward pass for its backward pass
REMAT_POLICIES: dict[str, Callable[..., bool]] = {
  'none': jax.checkpoint_policies.everything_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder. The first `num_dense_layers` have a SwiGLU of width `d_ff`, the others an MoE layer.

  vocab_size: 0 takes the tokenizer's.  dtype: of computation; parameters are float32.
  sandwich_norm: a norm on the output of attention and FFN, too, before it is added (Pangu Ultra, 2504.07866).
  mtp_depth: tokens predicted beyond the next one; each depth is one more MoE block, last in all that is [L, ...].
  remat: a row of REMAT_POLICIES.  unroll: layers in one iteration of the scan.
  """

  vocab_size: int = 0
  d_model: int = 256
  num_layers: int = 4
  num_dense_layers: int = 0
  d_ff: int = 1024
  attention: AttentionConfig = AttentionConfig()
  moe: MoEConfig = MoEConfig()
  norm_eps: float = 1e-6
  init: InitConfig = InitConfig()
  tie_embeddings: bool = False
  sandwich_norm: bool = False
  mtp_depth: int = 0
  dtype: str = 'float32'
  remat: str = 'none'
  unroll: int = 1

  def __post_init__(self) -> None:
    check(
      f"vocab_size={self.vocab_size}: use 0 (the tokenizer's) or more"
      if self.vocab_size < 0
      else '',
      *(
        f'{name}={value}: use 1 or more'
        for name, value in (
          ('d_model', self.d_model),
          ('num_layers', self.num_layers),
          ('d_ff', self.d_ff),
          ('unroll', self.unroll),
        )
        if value < 1
      ),
      f'num_dense_layers={self.num_dense_layers}: use 0 to num_layers - 1 = {self.num_layers - 1}, '
      'so that one layer at least has experts'
      if not 0 <= self.num_dense_layers < max(1, self.num_layers)
      else '',
      f'norm_eps={self.norm_eps}: use a number above 0' if self.norm_eps <= 0 else '',
      f'mtp_depth={self.mtp_depth}: use 0 (the next token only) or more'
      if self.mtp_depth < 0
      else '',
      *(
        f"init.{name}={gain} is for the norm of a branch's output: use sandwich_norm=True, or 0"
        for name, gain in (
          ('attention_gain', self.init.attention_gain),
          ('ffn_gain', self.init.ffn_gain),
        )
        if gain and not self.sandwich_norm
      ),
      f'dtype={self.dtype!r} is not one of {sorted(COMPUTE_DTYPES)}'
      if self.dtype not in COMPUTE_DTYPES
      else '',
      f'remat={self.remat!r} is not one of {sorted(REMAT_POLICIES)}'
      if self.remat not in REMAT_POLICIES
      else '',
    )

  @property
  def num_moe_layers(self) -> int:
    """Layers with experts, the blocks of multi-token prediction among them."""
    return self.num_layers - self.num_dense_layers + self.mtp_depth

  @property
  def stds(self) -> tuple[float, float]:
    """Of the initial weights that read the residual, and of those that write to it."""
    return INIT_RULES[self.init.rule](self.init.std, self.d_model, self.num_layers)
