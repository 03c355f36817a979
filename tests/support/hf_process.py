"""An import and then an export, as one of several processes: one start for both.

python -m tests.support.hf_process SOURCE RUN OUT --coordinator=HOST:PORT ...
"""

import functools
import sys
from unittest import mock

from moejax.hf.export_model import export_model
from moejax.hf.import_model import import_model
from moejax.hf.safetensors.directory import write_tensors
from moejax.runtime.launch import connect, read_launch_flags
from moejax.sharding.mesh import MeshConfig

if __name__ == '__main__':
  launch, (source, run, out) = read_launch_flags(sys.argv[1:])
  connect(launch)
  import_model(source, run, MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
  # Small shards: each process has some to write.
  small = functools.partial(write_tensors, max_shard_bytes=20_000)
  with mock.patch('moejax.hf.export_model.write_tensors', small):
    export_model(run, out)
