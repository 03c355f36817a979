"""Where arrays lie: the device mesh, logical axes, and parameters that know theirs."""

from moejax.sharding.logical_axes import RULES, constrain, spec
from moejax.sharding.mesh import MESH_AXES, MeshConfig, make_mesh
from moejax.sharding.params import shardings

__all__ = ['MESH_AXES', 'RULES', 'MeshConfig', 'constrain', 'make_mesh', 'shardings', 'spec']
