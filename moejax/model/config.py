"""The config of a model: attention, how parameters start, and all the rest of a transformer.

Each dataclass checks itself where it is made, and tells all of its problems at once.

Letters: D model, L layers.
"""

import dataclasses
from collections.abc import Callable

from moejax.config import above_zero, at_least, check, not_finite, not_one_of, problem_if
from moejax.model.attention_cores import ATTENTIONS
from moejax.model.layer_pattern import layers_with_experts, pattern_problem
from moejax.model.remat import REMAT_POLICIES
from moejax.model.rope import RopeConfig, rotated_width
from moejax.moe.layer import MoEConfig


def constant_stds(std: float, d_model: int, layers: int) -> tuple[float, float]:
  """Gives `std` to every matrix, whatever the size of the model."""
  return std, std


def depth_scaled_stds(std: float, d_model: int, layers: int) -> tuple[float, float]:
  """Narrows what writes to the residual, of which there are 2 L terms (GPT-2, Megatron-LM)."""
  return std, std * (2 * layers) ** -0.5


def tiny_stds(std: float, d_model: int, layers: int) -> tuple[float, float]:
  """TinyInit (2504.07866): one value that follows from the size of the model; `std` is not read."""
  std = (2 * d_model * layers) ** -0.5
  return std, std


# rule -> (std, d_model, num_layers) to the standard deviation of what reads the residual, and of
# what writes to it
INIT_RULES: dict[str, Callable[[float, int, int], tuple[float, float]]] = {
  'normal': constant_stds,
  'depth': depth_scaled_stds,
  'tiny': tiny_stds,
}


@dataclasses.dataclass(frozen=True)
class InitConfig:
  """How parameters start: matrices normal with mean 0, biases and sinks at 0, norms at 1.

  std: what INIT_RULES make the standard deviations of matrices from.
  rule: a row of INIT_RULES.
  embed_std: standard deviation of the embedding; 0: as other matrices that read the residual.
  attention_gain, ffn_gain: c of depth-scaled sandwich norm (2504.07866): the norm of a branch's
    output starts at c / sqrt(L) instead of 1; 0: at 1.
  """

  std: float = 0.02
  rule: str = 'normal'
  embed_std: float = 0.0
  attention_gain: float = 0.0
  ffn_gain: float = 0.0

  def __post_init__(self) -> None:
    check(*not_finite(self))
    check(
      *above_zero(self, 'std'),
      not_one_of('rule', self.rule, INIT_RULES),
      *at_least(0, self, 'embed_std', 'attention_gain', 'ffn_gain', meaning='off'),
    )


# '': none; 'head': each head by itself; 'projection': all heads at once
QK_NORMS = ('', 'head', 'projection')


@dataclasses.dataclass(frozen=True)
class LatentConfig:
  """Multi-head latent attention: all heads' keys and values are made from one vector a token.

  That vector, with the channels that carry position, is all that a cache holds.

  kv_rank: width of that vector; 0: no latent attention.
  q_rank: width of the vector that queries are made from; 0: a projection of full rank.
  d_rope: channels of a query or key that carry position, beside the d_head that do not.
  d_value: width of a value.
  norm_eps: epsilon of the norms of both latent vectors, whatever the model's is.
  """

  kv_rank: int = 0
  q_rank: int = 0
  d_rope: int = 64
  d_value: int = 128
  norm_eps: float = 1e-6

  def __post_init__(self) -> None:
    check(*not_finite(self))
    check(
      *at_least(0, self, 'kv_rank', 'q_rank', meaning='off'),
      problem_if(
        self.d_rope < 2 or self.d_rope % 2, f'd_rope={self.d_rope}: use an even number, 2 or more'
      ),
      *at_least(1, self, 'd_value'),
      *above_zero(self, 'norm_eps'),
    )


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Grouped-query attention, or latent attention where `latent.kv_rank` is set.

  num_heads: of queries.
  d_head: width of a head.
  qkv_bias, out_bias: whether the projections before and after attention have a bias.
  num_kv_heads: each serves num_heads / num_kv_heads query heads.
  implementation: a row of ATTENTIONS, or 'auto' for the best of the platform.
  windows: layer l of the model sees itself and the `windows[l % len] - 1` tokens before it; 0:
    everything before it.
  qk_norm: a norm of q and k before rope: a value of QK_NORMS.
  clip_qkv: q, k and v are clipped to +-clip_qkv, after their norms and before rope; 0: off.
  sinks: a learnt logit for each query head, of a key without a value, so that a head can leave
    part of its softmax unused.
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

  @property
  def output_width(self) -> int:
    """The channels of all heads together that the output projection reads."""
    return self.num_heads * (self.latent.d_value if self.latent.kv_rank else self.d_head)

  def __post_init__(self) -> None:
    check(*not_finite(self))
    # 0 has a problem of its own, and would be an error to divide by.
    undivided = self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads
    implementations = ['auto', *sorted(ATTENTIONS)]
    check(
      *at_least(1, self, 'num_heads', 'num_kv_heads', 'd_head'),
      problem_if(
        undivided,
        f'num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: '
        'use a divisor of it',
      ),
      problem_if(
        self.implementation not in implementations,
        f'implementation={self.implementation!r} is not one of {implementations}',
      ),
      problem_if(
        not self.windows or min(self.windows) < 0,
        f'windows={self.windows}: use one number or more, each 0 (all) or more',
      ),
      not_one_of('qk_norm', self.qk_norm, QK_NORMS),
      *at_least(0, self, 'clip_qkv', meaning='off'),
      *(self.latent_problems() if self.latent.kv_rank else self.grouped_problems()),
    )

  def grouped_problems(self) -> list[str]:
    """Says what only grouped-query attention cannot do."""
    width = rotated_width(self.d_head, self.rope)  # in pairs
    return [
      problem_if(
        width < 2 or width % 2,
        f'd_head={self.d_head} * rope.fraction={self.rope.fraction} = {width} channels to rotate: '
        'use an even number, 2 or more',
      )
    ]

  def latent_problems(self) -> list[str]:
    """Says what only latent attention cannot do."""
    # Fields that its equations have no place for, with the value that is off.
    unused = {'qk_norm': '', 'clip_qkv': 0.0, 'sinks': False}
    values = {name: getattr(self, name) for name in unused}
    return [
      problem_if(
        self.num_kv_heads != self.num_heads,
        f'num_kv_heads={self.num_kv_heads}: use num_heads={self.num_heads} with latent attention',
      ),
      *(
        f'{name}={value!r}: use {unused[name]!r} with latent attention'
        for name, value in values.items()
        if value
      ),
      problem_if(
        self.rope.fraction != 1,
        f'rope.fraction={self.rope.fraction}: use 1 with latent attention, '
        'where latent.d_rope is what is rotated',
      ),
    ]


COMPUTE_DTYPES = ('bfloat16', 'float32')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder, whose layers have either experts or a SwiGLU of width `d_ff`, see `has_experts`.

  vocab_size: 0 takes the tokenizer's.
  d_model: width of the residual stream.
  num_layers: dense ones and those with experts.
  num_dense_layers: of them, the first, that have no experts.
  ffn_pattern: what the layers after these have, 'moe' or 'dense', the first of them 'moe'; repeated
    down to the last layer. Layers 1, 3, 5 ... of Qwen's decoder_sparse_step=2 have experts with
    num_dense_layers=1, ffn_pattern=('moe', 'dense').
  d_ff: hidden width of the FFN of a dense layer.
  norm_eps: what RMSNorm adds to the mean square.
  tie_embeddings: whether the head is the embedding, transposed.
  dtype: of computation, a value of COMPUTE_DTYPES; parameters are float32.
  sandwich_norm: a norm on the output of attention and FFN, too, before it is added (Pangu Ultra,
    2504.07866).
  mtp_depth: tokens predicted beyond the next one; each depth is one more MoE block, last in all
    that is [L, ...].
  remat: what a layer keeps of its forward pass, a row of REMAT_POLICIES in model/remat.
  unroll: layers in one iteration of the scan.
  """

  vocab_size: int = 0
  d_model: int = 256
  num_layers: int = 4
  num_dense_layers: int = 0
  ffn_pattern: tuple[str, ...] = ('moe',)
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
    check(*not_finite(self))
    # Without sandwich norm nothing reads these gains.
    gains = {'attention_gain': self.init.attention_gain, 'ffn_gain': self.init.ffn_gain}
    check(
      problem_if(
        self.vocab_size < 0, f"vocab_size={self.vocab_size}: use 0 (the tokenizer's) or more"
      ),
      *at_least(1, self, 'd_model', 'num_layers', 'd_ff'),
      *at_least(1, self, 'unroll'),
      # max: where num_layers is itself wrong, 0 dense layers are not also told to be wrong.
      problem_if(
        not 0 <= self.num_dense_layers < max(1, self.num_layers),
        f'num_dense_layers={self.num_dense_layers}: use 0 to num_layers - 1 = '
        f'{self.num_layers - 1}, so that one layer at least has experts',
      ),
      pattern_problem(self.ffn_pattern, self.num_dense_layers),
      *above_zero(self, 'norm_eps'),
      *at_least(0, self, 'mtp_depth', meaning='the next token only'),
      *(
        f"init.{name}={gain} is for the norm of a branch's output: use sandwich_norm=True, or 0"
        for name, gain in gains.items()
        if gain and not self.sandwich_norm
      ),
      not_one_of('dtype', self.dtype, COMPUTE_DTYPES),
      not_one_of('remat', self.remat, REMAT_POLICIES),
    )

  @property
  def has_experts(self) -> tuple[bool, ...]:
    """Whether each layer has experts, by depth, without the blocks of multi-token prediction."""
    return layers_with_experts(self.num_layers, self.num_dense_layers, self.ffn_pattern)

  @property
  def num_moe_layers(self) -> int:
    """How many layers have experts, the blocks of multi-token prediction among them."""
    return sum(self.has_experts) + self.mtp_depth

  @property
  def stds(self) -> tuple[float, float]:
    """Standard deviations of the initial weights that read the residual, and that write to it."""
    return INIT_RULES[self.init.rule](self.init.std, self.d_model, self.num_layers)
