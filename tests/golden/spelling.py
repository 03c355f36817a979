"""config.json as this transformers writes it, and the same as hub files of before have it."""

import json
from pathlib import Path

from models import Family

Config = dict[str, object]


def both(path: Path, family: Family) -> dict[str, Config]:
  """File name -> config, from the one that save_pretrained wrote at `path`.

  A family that transformers has not is in its own names in config.json, and in transformers' names
  in the other.
  """
  config = json.loads(path.read_text())
  hub = older(config, family)
  if not family.names:
    return {'config.json': config, 'config_hub.json': hub}
  hub = {k: v for k, v in hub.items() if k not in ('n_group', 'topk_group', 'rope_scaling')}
  own = {family.names[k] if k in family.names else k: v for k, v in hub.items()}
  return {'config.json': own, 'config_hub.json': hub}


def older(config: Config, family: Family) -> Config:
  """rope_theta and rope_scaling instead of rope_parameters, torch_dtype of dtype, keys of then."""
  new = ('rope_parameters', 'dtype', 'rope_interleave', 'head_dim', 'qk_head_dim')
  out = {k: v for k, v in config.items() if k not in new}
  scaling = dict(config['rope_parameters'])
  out['rope_theta'] = scaling.pop('rope_theta')
  if 'partial_rotary_factor' in scaling:
    out['partial_rotary_factor'] = scaling.pop('partial_rotary_factor')
  if (
    'head_dim' in family.config
  ):  # others derive it; transformers writes there the rope part of a latent head
    out['head_dim'] = config['head_dim']
  scaling['type'] = scaling.pop('rope_type')
  out['rope_scaling'] = None if scaling['type'] == 'default' else scaling
  return out | {'torch_dtype': config['dtype'], 'transformers_version': '4.46.0'} | family.hub
