"""The commands of docs/pod.md that start with `qi2 launch` are accepted as they stand."""

import pathlib
import re
import shlex

import pytest

from qi2_jax.cli import main
from qi2_jax.launching.submission import Submission

GUIDE = (pathlib.Path(__file__).parents[2] / "docs" / "pod.md").read_text(encoding="utf-8")
LINES = [
    line
    for block in re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("qi2 launch")
]


@pytest.mark.parametrize("line", LINES)
def test_a_command_of_the_guide_is_accepted(line, monkeypatch, capsys):
    applied = []
    monkeypatch.setattr(Submission, "apply", lambda submission: applied.append(submission))
    main.main(shlex.split(line)[1:])
    assert capsys.readouterr().out and len(applied) == ("--dry-run" not in line)


def test_the_guide_has_a_command_for_every_target():
    assert {re.search(r"--on (\S+)", line)[1] for line in LINES} == {"gke", "queued-resources", "slurm", "dataflow"}
