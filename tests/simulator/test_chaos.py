"""Faults by chance, as a person asks for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from openweights_prefect.cli.main import main
from openweights_prefect.errors import ConfigurationError
from openweights_prefect.simulator.chaos import PREFIX, parse_chaos, set_chaos
from openweights_prefect.simulator.config import load_config
from openweights_prefect.simulator.faults import Faults


def test_faults_and_probabilities_are_read() -> None:
    """Spaces and an empty text do no harm."""
    assert parse_chaos("preempt=0.2, capacity=0.3") == {"preempt": 0.2, "capacity": 0.3}
    assert parse_chaos("") == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("meteorite=0.1", "'meteorite' is not a fault. Write one of .*capacity.*preempt"),
        ("preempt=2", "'2' of 'preempt' is not between 0 and 1. Write 'preempt=0.2'"),
        ("preempt", "'' of 'preempt' is not between"),
    ],
)
def test_a_mistake_is_named(text: str, words: str) -> None:
    """By the function and by `ow up`, which starts nothing then."""
    with pytest.raises(ConfigurationError, match=words):
        parse_chaos(text)
    refused = CliRunner().invoke(main, ["up", "--chaos", text])
    assert refused.exit_code == 1
    assert text.partition("=")[0] in refused.output


def test_new_chaos_replaces_the_old_and_nothing_else() -> None:
    """A pod that was spared is spared for good; other rules stay."""
    faults = Faults(seed=0)
    faults.add({"name": "hang"})
    set_chaos(faults, {"preempt": 0.5, "capacity": 0.5})
    set_chaos(faults, {"freeze": 0.5})
    assert [rule.id for rule in faults.rules()] == ["f1", f"{PREFIX}freeze"]
    pods = [{"podId": f"pod{number}"} for number in range(100)]
    struck = sum(faults.take("process", pod) is not None for pod in pods)
    assert 30 < struck < 70
    assert not any(faults.take("process", pod) for pod in pods)


def test_a_configuration_with_unknown_chaos_is_refused(tmp_path: Path) -> None:
    """Before the simulator starts."""
    file = tmp_path / "config.json"
    file.write_text('{"chaos": {"meteorite": 1}}')
    with pytest.raises(ConfigurationError, match="meteorite"):
        load_config(file)
