"""moejax: Mixture-of-Experts pretraining in JAX, balance losses checked against their equations.

A package imports only from those listed before it. What each is for:

  config       text, dataclasses and flags: how a config is written, checked and overridden
  runtime      the process that a run lives in: files, signals, faults, other processes
  sharding     where arrays lie: the device mesh, logical axes, parameters
  data         text to batches: sources, mixture, tokenizer, token cache, pipeline
  moe          the heart: router, selection, dispatch, experts, balance losses, bias rules
  checkpoint   saved while training goes on, verified bit by bit, restored on any mesh
  model        attention, blocks, multi-token prediction, the transformer
  inference    decoding with a KV cache, drafts, sampling
  families     published architectures, as data
  train        the experiment, the pure step, the loop around it, and what it records
  plan         what a run would take on other chips
  hf           published checkpoints, imported and exported: `python -m moejax.hf`
  generate     text from a run: `python -m moejax.generate`
  certify      the proof that routing and balance are right: `python -m moejax.certify`; its
               `check` certifies functions of other codebases
  __main__     all commands under one name: `moejax train`, `python -m moejax train`

configs/ is a link to the configs of the repository, so that an installed moejax has them, too.

To read the code, begin with moe/layer.py, then model/transformer.py, then train/step/train_step.py.
"""

__version__ = '0.1.0'
