"""The newest checkpoint of a run to a directory of published files."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from moejax.config import check
from moejax.data.published_tokenizer import published_json, tokenizer_config_json
from moejax.data.special_tokens import (
  GENERATION_FILE,
  ORIGIN_FILE,
  SIDE_FILES,
  TOKENIZER_CONFIG,
  read_special_tokens,
)
from moejax.hf.export_plan import Origin, plan_export, special_keys
from moejax.hf.export_tensors import lost_leaves, tensor_specs
from moejax.hf.progress import print_note, progress_bar, say
from moejax.hf.safetensors.directory import write_tensors
from moejax.hf.safetensors.file import Spec
from moejax.moe.dispatch.dropless import dropless_note
from moejax.runtime.files import expect_room, read_json
from moejax.sharding.tree import flatten
from moejax.train.experiment.run_dir import CONFIG_FILE, TOKENIZER_FILE, read_model_on, read_setup

# Families whose tokenizer class transformers 5 takes, whatever tokenizer_config.json names.
OWN_RULES = ('qwen2',)


def export_model(workdir: str, out: str, wanted: str = '', dtype: str = '') -> None:
  """Writes the newest checkpoint of a run as files that transformers loads: whole, or nothing.

  Args:
    workdir: the directory of the run.
    out: the directory to make.
    wanted: model_type of the family, see `plan_export`.
    dtype: of the tensors, see `plan_export`.

  Raises:
    ConfigError: `out` holds something, or no files can hold the model.
  """
  expect_room(Path(out))
  start = time.monotonic()
  cfg, tokenizer = read_setup(workdir)
  kept = read_json(Path(workdir), ORIGIN_FILE)
  origin = Origin(**kept) if kept else None  # a run that was not imported has none
  # Published models have no capacity.
  print_note(dropless_note(cfg.model.moe.dispatch))
  special = tokenizer.special if tokenizer else read_special_tokens(workdir)
  said = special_keys(special, tokenizer.eod_id if tokenizer else -1)
  plan = plan_export(cfg, origin, said, wanted, dtype)
  step, model, router = read_model_on(jax.local_devices(backend='cpu')[0], workdir, cfg)
  # On the CPU these are views, not copies.
  arrays = map(np.asarray, [*flatten(model).values(), router.bias])
  leaves = dict(zip(plan.made_of, arrays, strict=True))
  check(*lost_leaves(plan.known, plan.config, plan.made_of, leaves))
  # Everything has been checked: from here on only the disk can fail.
  files = {CONFIG_FILE: plan.config, GENERATION_FILE: plan.generation_config}
  texts = {name: json.dumps(content, indent=2) + '\n' for name, content in files.items()}
  texts |= {name: special.files[name] for name in SIDE_FILES if name in special.files}
  if tokenizer:
    texts[TOKENIZER_FILE] = published_json(tokenizer)
    texts[TOKENIZER_CONFIG] = tokenizer_config_json(
      tokenizer, special.context_length or cfg.seq_len
    )
  specs = tensor_specs(plan.made_of, leaves, plan.copies, plan.dtypes)
  with progress_bar('writing', sum(spec.nbytes for spec in specs)) as advance:
    write_tensors(out, [with_progress(spec, advance) for spec in specs], texts)
  seconds = time.monotonic() - start
  kind = plan.config['model_type']
  if tokenizer and kind in OWN_RULES and TOKENIZER_CONFIG not in special.files:
    print_note(
      f'transformers 5 puts rules of its own over the tokenizer of model_type={kind!r}, whatever '
      f'its files say: load it with PreTrainedTokenizerFast.from_pretrained({out!r})'
    )
  say(f'exported step {step} of {workdir} to {out} as {kind} in {seconds:.1f} s')


def with_progress(spec: Spec, advance: Callable[[int], object]) -> Spec:
  """Returns the tensor, whose `load` calls `advance` with its bytes when it is written."""

  def load() -> np.ndarray:
    advance(spec.nbytes)
    return spec.load()

  return spec._replace(load=load)
