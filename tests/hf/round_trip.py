"""Published tensors to parameters, and what an export of these would write."""

import json

import jax
import numpy as np

from moejax.hf.export_plan import ExportPlan, Origin, origin_of, plan_export
from moejax.hf.export_tensors import ReadPart, lost_leaves, tensor_specs
from moejax.hf.import_model import run_config
from moejax.hf.safetensors.file import Spec
from moejax.hf.weights import Published, read_weights
from moejax.model.transformer import Transformer
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.sharding.tree import flatten


def loaded(source: Published, mesh: MeshConfig | None = None) -> dict[str, jax.Array]:
  """Path -> leaf; on one device unless there is a mesh."""
  devices = make_mesh(mesh) if mesh else make_mesh(MeshConfig(data=1), jax.devices()[:1])
  model, bias = read_weights(source, devices, lambda count: None)
  assert isinstance(model, Transformer) and model.cfg == source.cfg
  return dict(zip(source.made_of, [*flatten(model).values(), bias], strict=True))


def given_back(
  source: Published, leaves: dict[str, jax.Array], dtype: str = ''
) -> tuple[ExportPlan, list[Spec]]:
  """What an export of the import would write."""
  origin = Origin(**json.loads(json.dumps(origin_of(source)._asdict())))
  how = plan_export(run_config(source.cfg, 'run'), origin, {}, '', dtype)
  read = reader({path: np.asarray(leaf) for path, leaf in leaves.items()})
  assert not lost_leaves(how.known, how.config, how.made_of, read)
  return how, tensor_specs(how.made_of, read, how.copies, how.dtypes)


def reader(leaves: dict[str, np.ndarray]) -> ReadPart:
  """Reads parts of leaves that are in memory."""
  return lambda path, index, counts: leaves[path][index]
