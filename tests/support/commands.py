"""Running the command line in this process: its exit status, and what it writes to which stream."""

from __future__ import annotations

from dlm_fast import cli


def run(argv, capsys) -> tuple[int, str, str]:
    status = cli.main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def error_of(argv, capsys) -> str:
    """The one line that an error is."""
    status, out, err = run(argv, capsys)
    lines = [line for line in err.splitlines() if line.startswith("dlm-fast")]
    assert status == 1 and out == "" and len(lines) == 1 and "Traceback" not in err
    return lines[0]
