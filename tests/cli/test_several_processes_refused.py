"""Commands that run in one process refuse several, and say so once."""

import pytest

from slimrank.cli import main


@pytest.mark.parametrize(("rank", "told"), [("0", True), ("1", False)])
def test_other_commands_refuse_several_processes(rank, told, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as ended:
        main(["plan", "demo", "--keep", "0.8"])
    assert ended.value.code == 1
    assert ("2 processes were started, and 'plan' runs in one" in capsys.readouterr().err) is told
