"""Runs of another version, and files of strangers, are refused by each command that reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from torchrl_bcq import load_policy
from torchrl_bcq.__main__ import main
from torchrl_bcq.errors import RunError
from torchrl_bcq.runs.folder import find_checkpoint
from torchrl_bcq.runs.job import train
from torchrl_bcq.version import __version__

from ..runs.folders import contents


@pytest.fixture
def refused(words, make_settings, run, capsys):
    """Change the settings in a run's files; the message of each command, without the file that it names."""
    train(make_settings("steps=10", "evaluation.env=null"))

    def call(change) -> dict[str, str]:
        file = run / "config.yaml"
        file.write_text(yaml.safe_dump(change(yaml.safe_load(file.read_text()))))
        for manifest in run.rglob("manifest.json"):
            found: Any = json.loads(manifest.read_text())
            found["metadata"]["config"] = change(found["metadata"]["config"])
            manifest.write_text(json.dumps(found))
        before = contents(run)
        checkpoint = find_checkpoint(run)
        commands: dict[str, tuple[list[str], Path]] = {
            "resume=RUN": (["train", f"resume={run}", "steps=20"], file),
            "resume=true": (["train", *words("resume=true", "steps=20", "evaluation.env=null")], checkpoint),
            "evaluate": (["evaluate", str(run)], checkpoint),
            "record": (["record", "--env", "Swing-v0", "--policy", str(run), "--out", "new.hdf5"], checkpoint),
        }
        messages = {}
        for name, (arguments, named) in commands.items():
            capsys.readouterr()
            assert main([*arguments]) == 1, name
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert f" {named} " in error
            messages[name] = error.partition(f"{named} ")[2].rstrip("\n")
        with pytest.raises(RunError) as refusal:
            load_policy(run)
        messages["load_policy"] = str(refusal.value).removeprefix(f"{checkpoint} ")
        assert contents(run) == before
        return messages

    return call


@pytest.mark.parametrize("found", [None, "0.1", "99.0.0"])
def test_a_run_of_another_version_is_refused_with_its_version(refused, found):
    def change(settings: dict) -> dict:
        without = {name: value for name, value in settings.items() if name != "version"}
        if found != "99.0.0":
            without |= {"seeds": None}  # a setting of that version alone
        return without if found is None else {"version": found, **without}

    messages = refused(change)
    present = __version__
    assert set(messages.values()) == {
        f"was made by torchrl-bcq {found or '0.1'}, but this is version {present}; use a checkout "
        f"of version {found or '0.1'}, or train the run again."
    }


def test_a_target_in_the_files_of_a_run_is_refused(refused):
    messages = refused(lambda settings: {**settings, "network": {**settings["network"], "_target_": "os.system"}})
    assert set(messages.values()) == {
        "cannot be read: network._target_ is refused, because names of the form _NAME_ can run code; remove it."
    }
