"""A job is a docstring with its submit line and one call of the CLI: `jobs/X.py` and `softlabel X` are one thing."""

import ast
import runpy
import sys
from pathlib import Path

import pytest

import softlabel.cli
from softlabel.cli import _STORE_VERBS, _VERBS, main

REPO = Path(__file__).parents[2]
JOBS = sorted((REPO / "jobs").glob("*.py"))
each_job = pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)


def run(job, *flags, monkeypatch):
    """Run a job as `python jobs/X.py` does, and return its exit status."""
    monkeypatch.setattr(sys, "argv", [str(job), *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(job), run_name="__main__")
    return ended.value.code


def test_every_verb_is_a_job():
    assert {job.stem for job in JOBS} == {*_VERBS, *_STORE_VERBS} - {"demo"}


@each_job
def test_the_docstring_says_how_to_submit_it(job):
    docstring = ast.get_docstring(ast.parse(job.read_text()))
    works_on = "/shared/runs/demo/label-" if job.stem in _STORE_VERBS else "--config demo "
    assert f"\nray job submit --working-dir . -- python jobs/{job.name} {works_on}" in docstring


@each_job
def test_a_job_is_one_call_of_its_verb(job, monkeypatch):
    calls = []
    monkeypatch.setattr(softlabel.cli, "main", lambda argv: calls.append(argv) or 7)
    assert run(job, "--config", "a.yaml", "--set", "seed=1", monkeypatch=monkeypatch) == 7
    assert calls == [[job.stem, "--config", "a.yaml", "--set", "seed=1"]]


@each_job
def test_a_job_takes_the_flags_of_its_verb(job, monkeypatch, capsys):
    assert run(job, "--help", monkeypatch=monkeypatch) == 0
    found = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([job.stem, "--help"])
    assert found == capsys.readouterr().out
    assert ("STORE" if job.stem in _STORE_VERBS else "--run-dir") in found


@each_job
def test_importing_a_job_runs_nothing(job, monkeypatch):
    monkeypatch.setattr(softlabel.cli, "main", lambda argv: pytest.fail("ran on import"))
    assert runpy.run_path(str(job), run_name="imported")["main"] is softlabel.cli.main
