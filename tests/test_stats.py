"""Histograms, and what the engine counts for those who watch it."""

from mlx_mcp.stats import Distribution, Histogram
from tests.engine.house import House


def test_a_value_counts_at_the_first_bound_that_it_does_not_exceed():
    histogram = Histogram((1, 5))
    for value in (0.5, 1, 3, 5, 5.1):
        histogram.observe(value)
    assert histogram.snapshot == Distribution((1, 5), (2, 2, 1), 14.6)


def test_a_snapshot_stays_as_it_was():
    histogram = Histogram((1,))
    before = histogram.snapshot
    histogram.observe(1)
    assert before.counts == (0, 0)
    assert histogram.snapshot.counts == (1, 0)
    assert histogram.snapshot is histogram.snapshot


def test_the_engine_counts_what_it_computes_and_draws():
    house = House()
    house.say("hello|abc", max_tokens=3)
    house.say("hello|abc", max_tokens=3)
    house.run()
    stats = house.engine.stats
    assert (stats.prompt_tokens, stats.output_tokens) == (18, 6)
    assert stats.computed_tokens == stats.prompt_tokens - stats.cached_tokens
    assert sum(stats.queue_s.counts) == 2
    assert stats.batch_rows.counts[:2] == (2, 2)  # one reads the shared beginning before the other begins
