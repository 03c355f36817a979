"""Published models: config.json as the hub has it, and the parameters that their publishers count.

Key: (model_type, preset). Values were compared with copies in public repositories where there is
one.
"""

from tests.support.published_deepseek_configs import DEEPSEEK_LIKE
from tests.support.published_llama_configs import LLAMA_LIKE

PUBLISHED: dict[tuple[str, str], dict[str, object]] = DEEPSEEK_LIKE | LLAMA_LIKE

# Parameters in billions, as their publishers say: total and active. What each of them counts: 'all'
# everything that the main model has; 'embed' all but the embedding; 'both' neither embedding nor
# head. Without multi-token prediction, but for GLM-4.5, whose report counts it, and neither
# embedding nor head.
# fmt: off
FIGURES: dict[tuple[str, str], tuple[float, str, float, str]] = {
  # 36.6 in its README_WEIGHTS, without the embedding
  ('deepseek_v3', 'full'): (671.0, 'all', 37.6, 'all'),
  # its README: 718, and 39 without the embedding
  ('pangu_ultra_moe', 'full'): (719.1, 'all', 40.4, 'all'),
  ('deepseek_v2', 'full'): (236, 'all', 21, 'all'),
  # 2.4 in its README, cut off and not rounded
  ('deepseek_v2', 'lite'): (15.7, 'all', 2.45, 'embed'),
  ('glm4_moe', 'full'): (355, 'both+mtp', 32, 'both'),
  ('glm4_moe', 'air'): (106, 'both', 12, 'both'),  # 108.0 with its layer of multi-token prediction
  ('gpt_oss', 'full'): (116.8, 'all', 5.1, 'embed'),
  ('gpt_oss', '20b'): (20.9, 'all', 3.6, 'embed'),
  ('mixtral', 'full'): (46.7, 'all', 12.9, 'all'),
  ('mixtral', '8x22b'): (141, 'all', 39, 'all'),
  ('olmoe', 'full'): (6.9, 'all', 1.3, 'all'),
  ('qwen2_moe', 'full'): (14.3, 'all', 2.7, 'all'),
  ('qwen2_moe', '57b_a14b'): (57.4, 'all', 14.2, 'all'),
  ('qwen3_moe', 'full'): (30.5, 'all', 3.35, 'all'),  # 3.3 on its card, cut off and not rounded
  ('qwen3_moe', '235b_a22b'): (235, 'all', 22, 'all'),
  ('llama', 'full'): (6.74, 'all', 6.74, 'all'),
  ('mistral', 'full'): (7.24, 'all', 7.24, 'all'),
  ('qwen2', 'full'): (7.62, 'all', 7.62, 'all'),  # 6.53 without embedding and head
  ('qwen3', 'full'): (8.2, 'all', 8.2, 'all'),
}
# fmt: on
