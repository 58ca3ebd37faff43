"""The loss law against its papers, and what a size reaches against the run that was measured."""

import numpy as np
import pytest

from hamner.plan.loss import BESIROGLU, HOFFMANN, KNOWN_RUN, compute_optimal_tokens, reached_loss


def test_published_laws():
    """The papers' own figures: Chinchilla, 70B parameters on 1.4T tokens."""
    assert HOFFMANN.loss(70e9, 1.4e12) == pytest.approx(1.69 + 0.083 + 0.163, abs=2e-3)
    assert BESIROGLU.loss(70e9, 1.4e12) == pytest.approx(1.8172 + 0.081 + 0.075, abs=2e-3)


@pytest.mark.parametrize(("law", "low", "high"), [(BESIROGLU, 15, 30), (HOFFMANN, 50, 100)])
def test_tokens_per_parameter_at_chinchillas_compute(law, low, high):
    """Minimised numerically at 6 N D = Gopher's 5.76e23 FLOPs: why the re-fit is the default."""
    parameters = np.geomspace(1e9, 1e12, 20_001)
    tokens = 5.76e23 / 6 / parameters
    losses = law.irreducible + law.a / parameters**law.alpha + law.b / tokens**law.beta
    best = losses.argmin()
    assert low < tokens[best] / parameters[best] < high


def test_tokens_to_reach_inverts_the_law():
    assert BESIROGLU.tokens_to_reach(BESIROGLU.loss(3e8, 5e9), 3e8) == pytest.approx(5e9)
    assert BESIROGLU.tokens_to_reach(1.9, 3e8) is None


def test_shifted_law_passes_through_the_run_and_keeps_differences():
    law = BESIROGLU.through(*KNOWN_RUN)
    assert law.loss(*KNOWN_RUN[:2]) == pytest.approx(3.41)
    difference = BESIROGLU.loss(3e8, 1e10) - BESIROGLU.loss(1e8, 1e10)
    assert law.loss(3e8, 1e10) - law.loss(1e8, 1e10) == pytest.approx(difference)


def test_compute_optimal_tokens_of_option_a():
    assert compute_optimal_tokens(320_914_432) == 6_418_288_640


def test_what_a_size_reaches():
    """The measured run reaches its own losses; another size is the law's difference away."""
    size = KNOWN_RUN[0]
    assert reached_loss(size, 98e6) == pytest.approx(4.46)
    assert reached_loss(*KNOWN_RUN[:2]) == pytest.approx(KNOWN_RUN[2])
    assert 3.67 < reached_loss(size, 2e8) < 4.46
    larger = BESIROGLU.loss(3e8, 1e10) - BESIROGLU.loss(size, 2.45e9)
    assert reached_loss(3e8, 1e10) == pytest.approx(3.41 + larger)
    # That run was still warming up.
    assert reached_loss(size, 2e7) is None
