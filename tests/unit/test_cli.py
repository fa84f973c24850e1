"""The command line: help, and how a run says that it is continued."""

import sys

import pytest

from moetrain.cli import PATIENCE_S, VERBS, main
from moetrain.observe.run_log import _this_command

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_does_nothing(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert capsys.readouterr().out.strip() == VERBS[verb].__doc__.strip()


@pytest.mark.parametrize("resume", ["never", "runs/a/checkpoints/step_00000010"])
def test_the_printed_command_continues_rather_than_begins_again(resume, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moetrain", "train", f"run.resume={resume}", "run.dir=here"])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert _this_command() == "python -m moetrain train run.dir=here"


def test_a_refusal_of_one_rank_is_told_after_rank_0_had_its_turn(monkeypatch, capsys):
    told = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", lambda s: told.append((s, capsys.readouterr().err)))
    assert main(["report"]) == 2
    assert told == [(PATIENCE_S, "")]
    assert "report takes one run directory" in capsys.readouterr().err
