# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#     name: moejax quickstart
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: accelerator,colab
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # moejax: the first run
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/moejax/moejax/blob/main/notebooks/quickstart.ipynb)
#
# Train a small Mixture-of-Experts language model on the sources of Python's standard library, on
# whatever device is here (a laptop's CPU will do), look at what its experts do, stop and resume,
# and have it write something.

# %% [markdown]
# ## Install
#
# Colab's TPU runtime has JAX, but not all that moejax stands on. If a package that is already
# loaded has to change, the runtime restarts once: then run the cells again from the top. This cell
# may run in the clone, in its `notebooks` folder, or where the clone is or shall be.

# %%
import glob
import os
import subprocess
import sys

REPOSITORY = 'https://github.com/moejax/moejax.git'
if os.path.exists('../moejax/__init__.py'):
  os.chdir('..')
elif not os.path.exists('moejax/__init__.py'):
  if not os.path.exists('moejax/pyproject.toml'):
    subprocess.run(['git', 'clone', '--quiet', REPOSITORY], check=True)
  os.chdir('moejax')

# -P: the clone itself, which may lie on Drive, does not count as installed in this runtime.
pip = [sys.executable, '-P', '-m', 'pip']
if subprocess.run([*pip, 'show', 'moejax'], capture_output=True).returncode:
  # Device files of TPUs; jax is not imported before it is what it will be.
  on_tpu = bool(glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*'))
  freeze = [*pip, 'freeze']
  before = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout.splitlines()
  target = '.[tpu]' if on_tpu else '.'
  subprocess.run([*pip, 'install', '--quiet', '-e', target], check=True)
  after = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout.splitlines()
  changed = {line for line in {*before} ^ {*after} if line.startswith(('jax', 'numpy'))}
  if 'google.colab' in sys.modules and changed:
    os.kill(os.getpid(), 9)  # Colab starts the runtime anew, with the new packages

# %% [markdown]
# What a Colab runtime has on its disk is lost with it. To keep the run, mount Drive and set
# `QUICKSTART_WORKDIR` before the next cell; the same cells then go on with it in another runtime:
#
#     from google.colab import drive
#     drive.mount('/content/drive')
#     os.environ['QUICKSTART_WORKDIR'] = '/content/drive/MyDrive/moejax/quickstart'

# %%
import jax

STEPS = int(os.environ.get('QUICKSTART_STEPS', '200'))
WORKDIR = os.environ.get('QUICKSTART_WORKDIR', 'runs/quickstart')
print(len(jax.devices()), 'x', jax.devices()[0].device_kind)

# %% [markdown]
# ## Train
#
# The same as `python train.py --workdir=...` in a shell: `configs/tiny.py`, with a few fields
# changed. We stop half-way on purpose: `stop_after` steps are done, a checkpoint is written, and
# the process ends as if it had been told to.

# %%
from configs.tiny import get_config
from moejax.config import from_config_dict
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.trainer import train

config = get_config()
config.workdir = WORKDIR
config.steps = STEPS
config.stop_after = STEPS // 2
config.log_every = max(1, STEPS // 40)
config.checkpoint.every = max(1, STEPS // 4)
config.eval.every = max(1, STEPS // 4)
config.eval.batches = 2
if jax.default_backend() == 'tpu':
  config.model.dtype = 'bfloat16'  # what its matrix units compute in; parameters stay in float32
status = train(from_config_dict(ExperimentConfig, config))
print('exit status', status)

# %% [markdown]
# ## What the experts do
#
# Each picture is a layer: time to the right, an expert a row. White is a fair share, red too much,
# blue too little.

# %%
import json

import numpy as np
from IPython.display import Image, display

from moejax.train.telemetry.load_plots import load_image, png

with open(f'{WORKDIR}/load.jsonl') as file:
  history = np.array([json.loads(line)['load'] for line in file])  # [steps logged, L, E]
for layer in range(history.shape[1]):
  print(f'layer {layer}')
  display(Image(png(load_image(history[:, layer]))))

# %% [markdown]
# ## Resume
#
# The same call again goes on from the checkpoint, to the same numbers that a run without the stop
# would have had.

# %%
config.stop_after = 0
status = train(from_config_dict(ExperimentConfig, config))
print('exit status', status)

# %% [markdown]
# ## Sample

# %%
from moejax.inference.sampling import SampleConfig, sample
from moejax.train.experiment.run_dir import open_run

_, tokenizer, step, model, router = open_run(WORKDIR)
print(f'step {step}:')
print('def ' + ''.join(sample(model, router, tokenizer, 'def ', SampleConfig(max_tokens=120))))
