"""Validation: the held-out text through the model, one fixed batch of it for the probe, and a sample."""

import jax

from moejax.data.pipeline import Data
from moejax.inference.sampling import SampleConfig, sample
from moejax.runtime.faults import inject
from moejax.runtime.watchdog import beat
from moejax.train.compile import Programs
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.journal import Journal, NullJournal
from moejax.train.step.train_state import TrainState
from moejax.train.telemetry.metric_rows import add_sums

SAMPLE_TOKENS = 96


def validate(
  cfg: ExperimentConfig,
  data: Data,
  programs: Programs,
  state: TrainState,
  journal: Journal | NullJournal,
  batches: int,
) -> float:
  """Bits per byte of the held-out text, 0 for all of its batches; also has the model write something."""
  sums, probe, step = None, None, int(state.step)
  beat('validation')
  for batch in data.validation(batches, programs.rows):
    result = jax.device_get(programs.evaluate(state.model, state.router, programs.put(batch)))
    first = result.pop('probe')
    probe, sums = first if sums is None else probe, add_sums(sums, result)
    beat()
  sums['task_nll'] = inject('validation', sums['task_nll'], step)
  beat('sample')
  text = ''.join(
    sample(
      state.model,
      state.router.bias,
      data.tokenizer,
      cfg.sample_prompt,
      SampleConfig(max_tokens=SAMPLE_TOKENS, seed=cfg.seed),
    )
  )
  found = (
    programs.interfere(state, programs.put(data.batch(step, programs.rows)))
    if cfg.eval.interference
    else {}
  )
  return journal.validation(step, sums, probe, found, cfg.sample_prompt + text)
