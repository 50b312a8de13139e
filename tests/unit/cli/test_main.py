"""The command itself: help, speed of start, unknown words, exit statuses."""

from __future__ import annotations

import subprocess
import sys

import pytest

from chulengo.cli.main import VERBS, main


def chulengo(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "chulengo", *words], capture_output=True, text=True, timeout=120, check=False
    )


def test_overview_names_every_verb() -> None:
    done = chulengo("--help")
    assert done.returncode == 0
    assert all(f"  {verb} " in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert f"chulengo {verb}" in capsys.readouterr().out


def test_unknown_verb_and_option_name_the_nearest() -> None:
    done = chulengo("trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert "chulengo train --help" in done.stderr
    done = chulengo("inspect", "--jsn")
    assert done.returncode == 2
    assert "--json" in done.stderr
    assert "Traceback" not in done.stderr


def test_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m chulengo --help | true", shell=True, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
