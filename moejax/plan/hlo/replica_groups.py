"""Which devices speak with each other in a collective, as XLA writes it, and over which axes of the mesh that is."""

import itertools
import math
import re
from collections.abc import Mapping

import numpy as np


def groups_of(rest: str, devices: int) -> np.ndarray:
  """Who speaks with whom: [groups, n] device numbers; of a permute, its pairs."""
  if found := re.search(r'source_target_pairs=\{(.*?)\}(?:,|$)', rest.replace('},{', ';')):
    return numbers(found[1])
  if found := re.search(r'replica_groups=\{(.+?)\}(?:,|$)', rest.replace('},{', ';')):
    return numbers(found[1])
  if found := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', rest):
    return transposed(found[2], found[3]).reshape(integers(found[1]))
  if found := re.search(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? '
    r'\{([^}]*)\}',
    rest,
  ):
    groups = of_axes(
      re.findall(r"'(\w+)'=(\d+)", found[1]), re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[4])
    )
    return transposed(found[2], found[3]).reshape(-1)[groups] if found[2] else groups
  return np.arange(devices)[None]


def of_axes(mesh: list[tuple[str, str]], axes: list[tuple[str, str, str]]) -> np.ndarray:
  """Groups over some axes of a mesh, 'x' or, of an axis x in three factors, the middle one: 'x':(first)middle."""
  cuts = {name: (int(first), int(middle)) if middle else (1, 0) for name, first, middle in axes}
  sizes, inside = [], []
  for name, size in mesh:
    first, middle = cuts[name] if name in cuts else (int(size), 1)
    middle = middle or int(size)
    inside += [len(sizes) + 1] if name in cuts else []
    sizes += [first, middle, int(size) // first // middle]
  outside = [i for i in range(len(sizes)) if i not in inside]
  ids = np.arange(math.prod(sizes)).reshape(sizes)
  return ids.transpose(*outside, *inside).reshape(-1, math.prod(sizes[i] for i in inside))


def transposed(sizes: str, order: str | None) -> np.ndarray:
  """Device numbers in an array of these sizes, its dimensions in another order: '2,4', '1,0'."""
  ids = np.arange(math.prod(integers(sizes))).reshape(integers(sizes))
  return ids.transpose(integers(order)) if order else ids


def numbers(groups: str) -> np.ndarray:
  """'0,2;1,3' -> [[0, 2], [1, 3]]."""
  return np.array([integers(group) for group in groups.strip('{}').split(';')])


def integers(text: str) -> list[int]:
  """'0,2' -> [0, 2]."""
  return [int(n) for n in text.split(',')]


def axes_of(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
  """The mesh axes along which the devices of a group differ; () where groups are only a part of that."""
  places = np.stack(np.unravel_index(groups, tuple(mesh.values())))  # [axes, groups, n]
  differs = (places != places[:, :, :1]).any(axis=(1, 2))
  return tuple(itertools.compress(mesh, differs))
