"""The hooks of pre-commit run exactly what `make test` runs."""

import pathlib
import re

import yaml

ROOT = pathlib.Path(__file__).parents[2]


def test_hooks_run_the_commands_of_make_test():
    makefile = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(r"^test: install\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    entries = [hook["entry"].replace(".venv/bin/", "$(BIN)/") for hook in repository["hooks"]]
    assert entries == recipe.replace("\t", "").splitlines()
    for hook in repository["hooks"]:
        assert hook["language"] == "system" and hook["pass_filenames"] is False
