"""What a run says of itself before its first step."""

from dataclasses import replace

import pytest

from hamner.config.options import for_option
from hamner.train.loop import train
from hamner.train.messages import recipe
from tests.train.test_loop import small_config


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {},
            "recipe muon: hidden muon 0.002 decay 0.1, embedding adamw 0.006 decay 0.1, "
            "vector adamw 0.002 decay 0; warm-up 2,000 steps, linear to 0; betas 0.9 0.9875, "
            "momentum 0.95; qk-norm",
        ),
        (
            {"optimizer": "adamw", "vector_lr": 1e-3, "embedding_weight_decay": 0.0}
            | {"decay": "wsd", "decay_fraction": 0.3, "min_lr": 1e-5},
            "recipe muon: hidden adamw 0.002 decay 0.1, embedding adamw 0.006 decay 0, "
            "vector adamw 0.001 decay 0; warm-up 2,000 steps, constant, then linear over the last "
            "30%, to 1e-05; betas 0.9 0.9875; qk-norm",
        ),
    ],
    ids=["as it is", "changed"],
)
def test_a_recipe_is_said_group_by_group(changes, line):
    assert recipe(replace(for_option("a", "muon"), **changes)) == line


@pytest.mark.parametrize("warmup_steps", [19, 20])
def test_a_warm_up_that_is_the_whole_run_is_said(warmup_steps, tmp_path, capsys):
    config = replace(small_config(tmp_path), warmup_steps=warmup_steps, stop_after=1, eval_every=0)
    train(config)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{recipe(config)}" in said
    warning = "WARNING: --warmup-steps 20 is the whole run, whose learning rate never falls: "
    assert (warning + "--warmup-steps 1 is a twentieth of it" in said) == (warmup_steps == 20)
