"""Why published files do not hold just the tensors of their model, and what to do about it.

Names tell of the scheme or the program that made the files. Only what is certain is said.
"""

import re
from collections.abc import Iterator, Mapping

from moejax.config import check
from moejax.hf.safetensors.directory import Tensors, difference
from moejax.model.config import ModelConfig

Shape = tuple[int, ...]

WHOLE = (
  'take the files in bfloat16, or write them: load the model with transformers, then '
  'model.dequantize() and save_pretrained'
)
ADAPTER = 'merge it first: merge_and_unload() of peft, then save_pretrained'
WRAPPED = 'save the model inside of the wrapper'
PICTURES = 'only the text part is built here: save that part as a model of its own'
# A pattern of names -> what has them, and the remedy.
MAKERS: dict[str, tuple[str, str]] = {
  r'\.(qweight|qzeros|g_idx)$': ('weights quantised by GPTQ or AWQ', WHOLE),
  r'\.(absmax|quant_map|nested_absmax|SCB)$|\.quant_state\.': (
    'weights quantised by bitsandbytes',
    WHOLE,
  ),
  r'\.weight_scale_2$': ('weights quantised to NVFP4', WHOLE),
  r'\.(weight_packed|weight_shape|weight_zero_point|weight_g_idx)$': (
    'weights packed by compressed-tensors',
    WHOLE,
  ),
  r'\.weight_scale(_inv)?$': ('scales of weights that are not FP8 of two axes', WHOLE),
  r'\.lora_(A|B|embedding_A|embedding_B)\b|^base_model\.model\.': ('an adapter', ADAPTER),
  r'^_orig_mod\.|^module\.|^_fsdp_wrapped_module\.': ('a wrapped model', WRAPPED),
  r'^(model\.)?(visual|vision_tower|vision_model|multi_modal_projector|language_model)\.': (
    'a model of pictures and text',
    PICTURES,
  ),
}


def expect_tensors(
  stored: Tensors, cfg: ModelConfig, wanted: Mapping[str, Shape], harmless: Mapping[str, Shape]
) -> None:
  """Checks that files hold the tensors that are wanted, in their shapes, and no others.

  Args:
    stored: what the files hold.
    cfg: of the model.
    wanted: name -> shape.
    harmless: those that may be there and are not read.

  Raises:
    ConfigError: tells all that is missing, extra or of another shape, and what made it so.
  """
  made_by = [*_makers(stored, wanted)]
  if made_by:
    # Of such files nearly every name is unexpected: a list of them would tell nothing.
    check(*made_by)
  check(*difference(stored, wanted | harmless, '; '.join(_remedies(stored, cfg, wanted))))


def _makers(stored: Tensors, wanted: Mapping[str, Shape]) -> Iterator[str]:
  """A problem for each row of MAKERS that a name which is not wanted tells of."""
  extra = [name for name in stored.names if name not in wanted]
  for pattern, (what, remedy) in MAKERS.items():
    found = [name for name in extra if re.search(pattern, name)]
    if found:
      yield f'{stored.directory}: holds {what}, such as {found[0]!r}, not read here: {remedy}'


def _remedies(stored: Tensors, cfg: ModelConfig, wanted: Mapping[str, Shape]) -> Iterator[str]:
  """What to do, as far as the names and shapes tell; at the end what to look at in any case."""
  extra = [name for name in stored.names if name not in wanted]
  missing = [name for name in wanted if name not in stored.names]
  if extra and f'model.{extra[0]}' in missing:
    yield (
      'the names lack the first `model.`: the files are of the decoder without its head; save the '
      'model as AutoModelForCausalLM'
    )
  numbers = [re.match(r'model\.layers\.(\d+)\.', name) for name in extra]
  layers = [int(number[1]) for number in numbers if number]
  if layers and max(layers) >= cfg.num_layers:
    yield (
      f'there are layers up to {max(layers)}, and config.json has num_hidden_layers='
      f'{cfg.num_layers} and {cfg.mtp_depth} of multi-token prediction: mend the one that is wrong'
    )
  if missing == ['lm_head.weight']:
    yield 'a model without lm_head.weight is tied: set tie_word_embeddings=true in config.json'
  for name, (rows, *width) in wanted.items():
    is_padded = name in stored.names and stored.shape(name)[1:] == tuple(width)
    if rows == cfg.vocab_size and is_padded and stored.shape(name)[0] != rows:
      found = stored.shape(name)[0]
      yield (
        f'{name} has {found} rows, as vocabularies are padded: set vocab_size={found} in '
        'config.json, which adds tokens that no text has'
      )
      break
  yield 'are config.json and they of one model?'
