"""The newest checkpoint of a run to a directory of published files."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from moejax.checkpoint.stored_leaves import StoredLeaves
from moejax.config import ConfigError, check
from moejax.data.published_tokenizer import published_json, tokenizer_config_json
from moejax.data.special_tokens import (
  GENERATION_FILE,
  ORIGIN_FILE,
  SIDE_FILES,
  TOKENIZER_CONFIG,
  SpecialTokens,
  read_special_tokens,
)
from moejax.data.tokenizer import Tokenizer
from moejax.hf.export_plan import ExportPlan, Origin, plan_export, special_keys
from moejax.hf.export_tensors import StoredParts, lost_leaves, tensor_specs
from moejax.hf.progress import print_note, progress_bar, say
from moejax.hf.safetensors.directory import write_tensors
from moejax.hf.safetensors.file import Spec
from moejax.moe.dispatch.dropless import dropless_note
from moejax.runtime.files import expect_room, read_json
from moejax.runtime.multiprocess import fail_together
from moejax.train.experiment.run_dir import (
  CONFIG_FILE,
  TOKENIZER_FILE,
  read_model_in_parts,
  read_setup,
)

# Families whose tokenizer class transformers 5 takes, whatever tokenizer_config.json names.
OWN_RULES = ('qwen2',)


def export_model(workdir: str, out: str, wanted: str = '', dtype: str = '') -> None:
  """Writes the newest checkpoint of a run as files that transformers loads: whole, or nothing.

  A layer of a leaf is in memory at a time. Of several processes, all of which call this, each
  writes a part of the files.

  Args:
    workdir: the directory of the run.
    out: the directory to make.
    wanted: model_type of the family, see `plan_export`.
    dtype: of the tensors, see `plan_export`.

  Raises:
    ConfigError: `out` holds something, or no files can hold the model.
  """
  start = time.monotonic()
  with fail_together(ConfigError, OSError):
    expect_room(Path(out))
    cfg, tokenizer = read_setup(workdir)
    kept = read_json(Path(workdir), ORIGIN_FILE)
    origin = Origin(**kept) if kept else None  # a run that was not imported has none
    special = tokenizer.special if tokenizer else read_special_tokens(workdir)
    said = special_keys(special, tokenizer.eod_id if tokenizer else -1)
    plan = plan_export(cfg, origin, said, wanted, dtype)
    texts = side_files(plan, special, tokenizer, cfg.seq_len)
  # Published models have no capacity.
  print_note(dropless_note(cfg.model.moe.dispatch))

  def write(step: int, stored: StoredLeaves) -> int:
    parts = StoredParts(stored, {path: stored_path(path) for path in plan.made_of})
    with fail_together(ConfigError, ValueError):
      check(*lost_leaves(plan.known, plan.config, plan.made_of, parts.read))
    specs = tensor_specs(plan.made_of, parts.read, plan.copies, plan.dtypes)
    share = sum(spec.nbytes for spec in specs) // jax.process_count()
    with progress_bar('writing', share) as advance:
      told = [with_progress(spec, advance) for spec in specs]
      write_tensors(out, told, texts, verify=stored.verify)
    return step

  step = read_model_in_parts(workdir, cfg, write)
  kind = plan.config['model_type']
  if tokenizer and kind in OWN_RULES and TOKENIZER_CONFIG not in special.files:
    print_note(
      f'transformers 5 puts rules of its own over the tokenizer of model_type={kind!r}, whatever '
      f'its files say: load it with PreTrainedTokenizerFast.from_pretrained({out!r})'
    )
  seconds = time.monotonic() - start
  say(f'exported step {step} of {workdir} to {out} as {kind} in {seconds:.1f} s')


def side_files(
  plan: ExportPlan, special: SpecialTokens, tokenizer: Tokenizer | None, seq_len: int
) -> dict[str, str]:
  """Returns name -> text of all published files but those of tensors.

  seq_len: the context length where the publisher says none.
  """
  files = {CONFIG_FILE: plan.config, GENERATION_FILE: plan.generation_config}
  texts = {name: json.dumps(content, indent=2) + '\n' for name, content in files.items()}
  texts |= {name: special.files[name] for name in SIDE_FILES if name in special.files}
  if tokenizer:
    texts[TOKENIZER_FILE] = published_json(tokenizer)
    texts[TOKENIZER_CONFIG] = tokenizer_config_json(tokenizer, special.context_length or seq_len)
  return texts


def stored_path(path: str) -> str:
  """Returns the path that a leaf of `families.schema.tensor_names.leaves` has in a checkpoint."""
  below = path.replace('.', '/')
  return below if path == 'router.bias' else f'model/{below}'


def with_progress(spec: Spec, advance: Callable[[int], object]) -> Spec:
  """Returns the tensor, whose `load` calls `advance` with its bytes when it is written."""

  def load() -> np.ndarray:
    advance(spec.nbytes)
    return spec.load()

  return spec._replace(load=load)
