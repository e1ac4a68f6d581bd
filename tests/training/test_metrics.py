"""What a run reports."""

import json
import math

from qi2_jax.training import metrics


def test_values_that_are_not_finite_are_null_in_the_file_and_nan_when_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics.Metrics(path, 0).write(1, {"loss": math.nan, "gradient_norm": math.inf})
    again = metrics.Metrics(path, 1)  # writes again what it keeps
    again.write(2, {"loss": 0.5})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": None, "gradient_norm": None}, {"step": 2, "loss": 0.5}]
    first, second = metrics.read(path)
    assert math.isnan(first["loss"]) and second == {"step": 2, "loss": 0.5}
