"""Learning rates that go on until the best is inside, and seconds to a target."""

import pytest

from benchmarks import finetune_llm
from benchmarks.rates import best_rate, next_rates


@pytest.mark.parametrize("best", [0.125, 0.5, 1.0, 2.0, 16.0])
def test_the_best_rate_is_found_wherever_it_lies(best):
    losses = {}
    while rates := next_rates(losses, (1.0, 2.0, 0.5)):
        losses |= {rate: abs(rate - best) for rate in rates}
    assert best_rate(losses) == best and {best / 2, 2 * best} <= losses.keys()


def test_seconds_to_a_target_count_what_is_frozen_once():
    record = {"model": "minilm", "forward_ms": 12.0}
    record["arms"] = {"full": {"ms": 30.0, "of_full": 1.0}, "suffix:2": {"of_full": 1 / 3}}
    line = {
        "key": {"arm": "full, then suffix:2", "rows": 64},
        "steps": 9,
        "curve": [{"step": 0, "loss": 4.0}, {"step": 3, "loss": 2.0}, {"step": 9, "loss": 1.0}],
    }
    seconds = lambda target: finetune_llm.seconds_to(target, line, record)  # noqa: E731
    assert seconds(5.0) == 0 and seconds(0.5) is None
    assert seconds(3.0) == pytest.approx(1.5 * 0.03)  # halfway between two evaluations
    # Two batches through four of six blocks, once.
    assert seconds(1.5) == pytest.approx(3 * 0.03 + 2 * 0.012 * 4 / 6 + 3 * 0.01)
    # A run that is looked at when it ends alone is there when it ends.
    del line["curve"][:2]
    assert seconds(1.5) == pytest.approx(3 * 0.03 + 2 * 0.012 * 4 / 6 + 6 * 0.01)
