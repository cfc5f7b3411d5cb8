"""What several test files need."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def refused(capsys, command, *argv) -> str:
    """Exit code 2 and one line on stderr: that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command.main([str(word) for word in argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert err.count("\n") == 1, err
    return err
