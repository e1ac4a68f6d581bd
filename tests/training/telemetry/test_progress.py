"""Tests of the progress of a training run."""

import logging

from qi2_jax.training.telemetry import progress


def test_time_left_follows_the_latest_steps(monkeypatch, caplog):
    """A run that becomes ten times slower in a later phase says so, and a resumed run counts its own steps only."""
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    caplog.set_level(logging.INFO)
    shown = progress.Progress("run", start=100, total=400)
    shown._lines = True  # even if a terminal shows the tests
    for step in range(101, 301):
        shown.samples(8)
        now += 1.0 if step <= 200 else 10.0
        shown.advance()
        if step % 10 == 0:
            shown.show(step, loss=0.5)
    shown.close()
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "run 110/400: loss 0.5000, 8.0 samples/s, 1 s/step, 04:50 left"
    assert lines[9] == "run 200/400: loss 0.5000, 8.0 samples/s, 1 s/step, 03:20 left"
    assert lines[14] == "run 250/400: loss 0.5000, 1.5 samples/s, 5.5 s/step, 13:45 left"
    assert lines[19] == "run 300/400: loss 0.5000, 0.8 samples/s, 10 s/step, 16:40 left"
