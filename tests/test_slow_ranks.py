"""A slow rank is named also where the others wait for it in the middle of their own forward pass."""

from __future__ import annotations

import itertools
import time

import pytest

import ssl.distributed as distributed
from ssl.slow_ranks import LOGS, SlowRanks
from tests.test_trainer import GLOBAL_BATCH, make_batch, make_method, make_trainer

DELAY = 0.15  # s, many times what a step of these models takes

CASES = {
    "simclr with synchronised BatchNorm": ("simclr", "layer4", 1),
    "simclr with synchronised BatchNorm, accumulated": ("simclr", "layer4", 2),
    "mae, which waits for nobody": ("mae", "blocks.0", 1),
}


def _named(kind: str, layer: str, accumulation: int) -> list[str]:
    """What is said in a run of which the second rank is slow at a layer of the backbone."""
    method = make_method(kind, norm=layer == "layer4")
    distributed.sync_batchnorm(method)
    if distributed.rank() == 1:
        method.backbone.get_submodule(layer).register_forward_pre_hook(lambda *_: time.sleep(DELAY))
    said: list[str] = []
    trainer = make_trainer(
        method, accumulation=accumulation, log_every_steps=1, slow_ranks=SlowRanks(), warn=said.append
    )
    share = GLOBAL_BATCH // distributed.world_size()
    rows = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    batch = make_batch(method, rows=rows, num_views=2 if method.couples_images else 1)
    trainer.fit(itertools.repeat(batch), start_step=0, stop_step=LOGS, global_batch_size=GLOBAL_BATCH)
    return said


@pytest.mark.parametrize("case", CASES)
def test_a_rank_that_is_slow_in_its_forward_pass_is_named_on_all_ranks(two_ranks, case: str):
    ours, theirs = two_ranks.run(_named, *CASES[case])
    assert ours == theirs
    assert len(ours) == 1
    assert ours[0].startswith("rank 1 (")
    assert ours[0].endswith("it computes slowly")
