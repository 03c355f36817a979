"""Sets of tokens: sums over them, and what part of the whole batch a micro-batch holds."""

import numpy as np

from moejax.certify.cases import B, S
from moejax.certify.oracle import balance as oracle_balance
from moejax.moe.routing import RouterConfig
from moejax.moe.token_sets import expert_load
from tests.moe.balance.loss_cases import MAIN, cases, measured, routers


@routers(MAIN)
def test_load_counts_every_copy_of_every_token_that_counts(cfg: RouterConfig) -> None:
  for label, case in cases(cfg.num_experts).items():
    ids = measured(cfg, label)[3].expert_ids
    got = np.asarray(expert_load(ids, case.mask, cfg.num_experts))
    np.testing.assert_array_equal(got, oracle_balance.load(ids, case.mask, cfg.num_experts))
    assert got.sum() == case.mask.sum() * cfg.top_k and got.dtype == np.float32
  nobody = np.where(np.arange(2) == 1, 8, ids)
  assert expert_load(nobody, np.ones((B, S), bool), 8).sum() == B * S, "an id of E is nobody's"
