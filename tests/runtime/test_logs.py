"""Messages go to stderr with time and process number; other libraries report warnings only."""

import logging
import re

import pytest

from qi2_jax.runtime import logs


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    root, levels = logging.getLogger(), {name: logging.getLogger(name).level for name in logs._OURS}
    before = list(root.handlers)
    monkeypatch.setattr(logs, "_process", "")
    yield
    root.handlers[:] = before
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_messages_have_a_time_and_libraries_report_warnings_only(capsys):
    for _ in range(2):  # setting up twice prints nothing twice
        logs.set_up("info")
    logging.getLogger("qi2_jax.training").info("step %d", 3)
    logging.getLogger("qi2_jax.training").debug("not shown")
    logging.getLogger("orbax").info("not shown")
    logging.getLogger("orbax").warning("slow disk")
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"\d\d:\d\d:\d\d step 3\n\d\d:\d\d:\d\d warning: slow disk\n", err)


def test_a_handler_of_a_library_that_was_imported_first_prints_nothing_twice(capsys):
    logging.getLogger().addHandler(logging.StreamHandler())  # as absl does
    logs.set_up("info")
    logging.getLogger("qi2_jax.training").info("step 3")
    assert capsys.readouterr().err.count("step 3") == 1


def test_of_several_processes_each_names_itself_and_only_the_first_informs(capsys):
    for index in (1, 0):
        logs.set_up("info")
        logs.name_process(index, 2)
        logging.getLogger("qi2_jax.x").info("loaded")
        logging.getLogger("qi2_jax.x").warning("odd")
    lines = [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["[1] warning: odd", "[0] loaded", "[0] warning: odd"]


def test_the_environment_chooses_the_level(monkeypatch, capsys):
    monkeypatch.setenv(logs.LEVEL, "WARNING")
    logs.set_up()
    logging.getLogger("qi2_jax").info("not shown")
    monkeypatch.setenv(logs.LEVEL, "loud")
    with pytest.raises(ValueError, match="QI2_LOG is 'loud'; choose one of debug, info, warning, error"):
        logs.set_up()
    assert capsys.readouterr().err == ""


def test_what_takes_time_is_said_before_and_after(capsys):
    logs.set_up("info")
    with logs.loading(logging.getLogger("qi2_jax"), "text_encoder", 1234567):
        assert "loading the text encoder (1,234,567 parameters) ...\n" in capsys.readouterr().err
    assert re.search(r"loading the text encoder \(1,234,567 parameters\): 0\.0 s\n", capsys.readouterr().err)


def test_a_failure_is_not_reported_as_done(capsys):
    logs.set_up("info")
    with pytest.raises(OSError), logs.timed(logging.getLogger("qi2_jax"), "reading"):
        raise OSError
    assert capsys.readouterr().err.count("reading") == 1
