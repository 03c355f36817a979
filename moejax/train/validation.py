"""Validation: held-out text through the model, a fixed batch of it for the probe, and a sample."""

import jax

from moejax.inference.sampling import NonFiniteLogits, SampleConfig, sample
from moejax.runtime.faults import inject
from moejax.runtime.watchdog import beat
from moejax.train.run_parts import Run
from moejax.train.step.train_state import TrainState
from moejax.train.step.train_step import Metrics
from moejax.train.telemetry.metric_rows import add_sums, sum_by_document


def validate(run: Run, state: TrainState, batches: int) -> float:
  """Bits per byte of the held-out text; also writes all that a validation tells.

  batches: how many of the text are read; 0: all of them.
  """
  programs, step = run.programs, int(state.step)
  sums = probe = None
  # A named beat: what is called first now is compiled first, and may take its time.
  beat('validation')
  held_out = run.data.validation(batches, programs.rows)
  # Of all rows, as the losses of a batch come back from the devices, whichever process read them.
  for batch, documents in zip(held_out, run.data.validation_documents(batches), strict=True):
    result = jax.device_get(programs.evaluate(state.model, state.router, programs.put(batch)))
    batch_probe = result.pop('probe')
    # Of the first batch, which is the same in every validation.
    if sums is None:
      probe = batch_probe
    nll = result.pop('nll')
    result['document_nll'] = sum_by_document(nll, documents, len(run.data.documents.num_bytes))
    sums = add_sums(sums, result)
    beat()
  sums['task_nll'] = inject('validation', sums['task_nll'], step)
  text = draw_sample(run, state) if run.cfg.eval.sample_tokens else ''
  interference: Metrics = {}
  if run.cfg.eval.interference:
    next_batch = programs.put(run.data.batch(step, programs.rows))
    interference = programs.interfere(state, next_batch)
  return run.journal.validation(step, sums, probe, interference, text)


def draw_sample(run: Run, state: TrainState) -> str:
  """The prompt of samples, and what the model makes of it."""
  beat('sample')
  prompt = run.cfg.sample_prompt
  sampling = SampleConfig(max_tokens=run.cfg.eval.sample_tokens, seed=run.cfg.seed)
  try:
    pieces = list(sample(state.model, state.router.bias, run.data.tokenizer, prompt, sampling))
  except NonFiniteLogits as error:  # the validation is not finite either, and is told as such
    pieces = [f' ({error})']
  return ''.join([prompt, *pieces])
