"""The probe: churn and saturation are their formulas, and its files survive a kill and a resume."""

from pathlib import Path

import numpy as np
import pytest

from moejax.train.telemetry.routing_probe import TOKENS, UNASSIGNED, Probes, agreement, make_probe

L, B, S, K, E = 2, 4, 5, 2, 6


def random_ids(seed: int, experts: int = E) -> np.ndarray:
  """[L, B, S, K], distinct experts for each token."""
  return np.argsort(np.random.default_rng(seed).random((L, B, S, experts)), axis=-1)[
    ..., :K
  ].astype(np.int32)


def by_the_formula(ids: np.ndarray, other: np.ndarray, mask: np.ndarray) -> list[float]:
  shares = []
  for layer in range(L):
    kept = copies = 0
    for t in np.ndindex(mask.shape):
      for e in ids[layer][t] if mask[t] else []:
        copies += e < E
        kept += e < E and e in other[layer][t]
    shares.append(kept / copies)
  return shares


def test_agreement_is_its_formula() -> None:
  """Order within a token does not count, padding and nobody do not; positions of experts do."""
  ids, other = random_ids(0), random_ids(1)
  ids[:, 0, :2, 1] = other[:, 0, 1:3, 1] = E  # nobody, and nobody is no expert in common
  mask = np.random.default_rng(2).random((B, S)) < 0.7
  a, b = make_probe(ids, mask, E), make_probe(other, mask, E)
  assert (
    a.shape == (L, B * S, K)
    and a.dtype == np.uint16
    and (a[:, ~mask.reshape(-1)] == UNASSIGNED).all()
  )
  wanted = by_the_formula(ids, other, mask)
  np.testing.assert_allclose(agreement(a, b), wanted, rtol=1e-12)
  assert 0.1 < min(wanted) < max(wanted) < 0.9 and wanted[0] != wanted[1]
  assert (agreement(a, a[..., ::-1]) == 1).all()
  assert (agreement(a, np.full_like(a, UNASSIGNED)) == 0).all() and (
    agreement(np.full_like(a, UNASSIGNED), a) == 1
  ).all()


def test_a_large_batch_is_probed_in_part() -> None:
  ids = np.zeros((L, 10, 1000, K), np.int32)
  assert make_probe(ids, np.ones((10, 1000), bool), E).shape == (L, TOKENS // 1000 * 1000, K)
  assert make_probe(np.zeros((L, 3, 9000, K), np.int32), np.ones((3, 9000), bool), E).shape == (
    L,
    9000,
    K,
  )


def test_churn_is_since_the_one_before_and_saturation_by_the_last(tmp_path: Path) -> None:
  mask = np.ones((B, S), bool)
  probes = {step: make_probe(random_ids(step), mask, E) for step in (100, 200, 1000)}
  kept = Probes(tmp_path / 'probes', 0)
  assert kept.saturation() == {} and kept.record(100, probes[100]) == {} and kept.saturation() == {}
  np.testing.assert_array_equal(
    kept.record(200, probes[200])['churn'], 1 - agreement(probes[200], probes[100])
  )
  churn = kept.record(1000, probes[1000])['churn']
  assert sorted(path.name for path in (tmp_path / 'probes').iterdir()) == [
    '100.npz',
    '1000.npz',
    '200.npz',
  ]
  np.testing.assert_array_equal(churn, 1 - agreement(probes[1000], probes[200]))
  again = Probes(tmp_path / 'probes', 1000)  # another process; 1000 comes after 200 and not before
  assert again.steps() == [100, 200, 1000]
  found = again.saturation()
  assert list(found) == [100, 200]
  for step, share in found.items():
    np.testing.assert_array_equal(share, agreement(probes[step], probes[1000]))
  np.testing.assert_array_equal(
    again.record(1000, probes[1000])['churn'], churn
  )  # a finished run says so again


def test_a_resumed_run_forgets_later_probes_and_what_was_half_written(tmp_path: Path) -> None:
  mask = np.ones((B, S), bool)
  straight = Probes(tmp_path / 'a', 0)
  wanted = [straight.record(step, make_probe(random_ids(step), mask, E)) for step in (10, 20, 30)]
  killed = Probes(tmp_path / 'b', 0)
  for step in (10, 20, 30):
    killed.record(step, make_probe(random_ids(step if step == 10 else -step % 7), mask, E))
  (tmp_path / 'b' / '40.npz.0f.tmp').write_bytes(b'half')
  resumed = Probes(tmp_path / 'b', 10)
  assert [path.name for path in (tmp_path / 'b').iterdir()] == ['10.npz']
  found = [resumed.record(step, make_probe(random_ids(step), mask, E)) for step in (20, 30)]
  for now, then in zip(found, wanted[1:], strict=True):
    np.testing.assert_array_equal(now['churn'], then['churn'])
  for step in (10, 20, 30):
    assert (tmp_path / 'a' / f'{step}.npz').read_bytes() == (
      tmp_path / 'b' / f'{step}.npz'
    ).read_bytes()


def test_a_probe_appears_whole_or_not_at_all(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  probes = Probes(tmp_path, 0)

  def killed(file: object, **arrays: np.ndarray) -> None:
    file.write(b'PK half of it')
    raise KeyboardInterrupt

  monkeypatch.setattr(np, 'savez_compressed', killed)
  with pytest.raises(KeyboardInterrupt):
    probes.record(10, make_probe(random_ids(0), np.ones((B, S), bool), E))
  assert Probes(tmp_path, 10).steps() == [] and not list(tmp_path.iterdir())


def test_a_damaged_probe_is_deleted_and_the_others_stay(
  tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
  probes, mask = Probes(tmp_path, 0), np.ones((B, S), bool)
  for step in (10, 20, 30):
    probes.record(step, make_probe(random_ids(step), mask, E))
  (tmp_path / '10.npz').write_bytes((tmp_path / '10.npz').read_bytes()[:-40])
  np.savez(tmp_path / '30.npz', expert_ids=np.array([object()]))  # a pickle
  caplog.clear()
  resumed = Probes(tmp_path, 30)
  assert resumed.steps() == [20] and [record.args[0].name for record in caplog.records] == [
    '10.npz',
    '30.npz',
  ]
  assert 'churn' in resumed.record(40, make_probe(random_ids(40), mask, E)) and list(
    resumed.saturation()
  ) == [20]
