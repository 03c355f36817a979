"""The replica groups of a collective, as XLA writes them, and the mesh axes that they go along."""

import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

# XLA's ways of writing groups: pairs, lists, an iota that is reshaped, and axes of a named mesh.
PAIRS = re.compile(r'source_target_pairs=\{(.*?)\}(?:,|$)')
LISTS = re.compile(r'replica_groups=\{(.+?)\}(?:,|$)')
IOTA = re.compile(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
MESH = re.compile(
  r'replica_groups=mesh\[([^\]]*)\]'
  r'(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}'
)


def groups_of(rest: str, devices: int) -> np.ndarray:
  """Returns the device numbers of each group [groups, n]; of a permute, its pairs [pairs, 2].

  Args:
    rest: operands and attributes of the collective.
    devices: all there are; they are one group where the text has none.
  """
  one_line = rest.replace('},{', ';')  # so that the first '}' is the last of all groups
  if match := PAIRS.search(one_line) or LISTS.search(one_line):
    return number_rows(match[1])
  if match := IOTA.search(rest):
    shape, sizes, order = match.groups()
    return transposed_ids(sizes, order).reshape(integers(shape))
  if match := MESH.search(rest):
    mesh, sizes, order, axes = match.groups()
    groups = mesh_groups(
      re.findall(r"'(\w+)'=(\d+)", mesh), re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)
    )
    # Without device_ids the devices of the mesh are numbered in order.
    return transposed_ids(sizes, order).reshape(-1)[groups] if sizes else groups
  return np.arange(devices)[None]


def mesh_groups(mesh: list[tuple[str, str]], axes: list[tuple[str, str, str]]) -> np.ndarray:
  """Returns the groups over some axes of a mesh, [groups, n] places in the mesh.

  Args:
    mesh: (name, size) of each axis.
    axes: (name, '', '') of a whole axis; or, of an axis in three factors, (name, first, middle),
      written 'x':(first)middle, of which the middle one is meant.
  """
  cuts: dict[str, tuple[int, int]] = {}  # name -> first and middle factor; middle 0: all the rest
  for name, first, middle in axes:
    cuts[name] = (int(first), int(middle)) if middle else (1, 0)
  # Every axis becomes three, whose middle one is inside the groups or has size 1.
  sizes: list[int] = []
  inside: list[int] = []
  for name, text in mesh:
    size = int(text)
    first, middle = size, 1
    if name in cuts:
      first, middle = cuts[name]
      middle = middle or size
      inside.append(len(sizes) + 1)
    sizes += [first, middle, size // first // middle]
  outside = [axis for axis in range(len(sizes)) if axis not in inside]
  ids = np.arange(math.prod(sizes)).reshape(sizes)
  return ids.transpose(*outside, *inside).reshape(-1, math.prod(sizes[axis] for axis in inside))


def transposed_ids(sizes: str, order: str | None) -> np.ndarray:
  """Returns device numbers in an array of sizes '2,4', its dimensions in the order '1,0'."""
  ids = np.arange(math.prod(integers(sizes))).reshape(integers(sizes))
  return ids.transpose(integers(order)) if order else ids


def number_rows(groups: str) -> np.ndarray:
  """Returns [[0, 2], [1, 3]] of '0,2;1,3'."""
  return np.array([integers(group) for group in groups.strip('{}').split(';')])


def integers(text: str) -> list[int]:
  """Returns [0, 2] of '0,2'."""
  return [int(n) for n in text.split(',')]


def axes_of(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
  """Returns the mesh axes along which the devices of a group differ.

  Args:
    groups: device numbers [groups, n].
    mesh: axis -> size, in the order in which the devices are numbered.
  """
  places = np.stack(np.unravel_index(groups, tuple(mesh.values())))  # [axes, groups, n]
  differs = (places != places[:, :, :1]).any(axis=(1, 2))
  return tuple(itertools.compress(mesh, differs))
