"""A data.limit above the number of images is said, by a run and by its plan."""

from __future__ import annotations

import logging

import pytest
from hydra.core.global_hydra import GlobalHydra

from ssl.pretrain import make_method, run
from ssl.run_plan import plan_run
from tests.test_pretrain import SHORT, TINY_RESNET, composed

SAID = "data.limit=1,281,167, but there are 120 images: all are taken"
WORDS = ["method=simclr", *TINY_RESNET, *SHORT, "data.source.num_train=120", "data.source.num_test=36"]


@pytest.mark.parametrize(("limit", "said"), [(1281167, [SAID]), (120, []), (60, []), ("null", [])])
def test_a_plan_notes_a_limit_above_the_number_of_images(tmp_path, limit, said):
    GlobalHydra.instance().clear()
    config = composed(*WORDS, f"data.limit={limit}")
    assert plan_run(config, out=tmp_path, make_method=make_method).notes == said


def test_a_run_warns_of_a_limit_above_the_number_of_images(tmp_path, caplog):
    GlobalHydra.instance().clear()
    with caplog.at_level(logging.WARNING):
        run(composed(*WORDS, "data.limit=1281167", "trainer.steps=1"), out=tmp_path)
    assert [record.getMessage() for record in caplog.records].count(SAID) == 1
