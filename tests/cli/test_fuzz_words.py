"""Malformed words of the command line: each ends with a message of one paragraph, and leaves no file but a log."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings as profile, strategies as st
from omegaconf import OmegaConf

from torchrl_bcq.__main__ import main
from torchrl_bcq.errors import DatasetError, RunError
from torchrl_bcq.runs.settings import compose, flat

COUNTS: Counter[str] = Counter()
NAMES = {name: {*flat(compose([f"algorithm={name}"])[0])} for name in ("bcq", "cloning")}
TEXTS = [
    "", "x", "[", "]", "{", "}", "'", '"', "${", "${x}", "${x:y}", "$", "\\", "(", "a(", ":", "a: b", "%", "*x", "&x",
    "!!python/object:os.system", "@x", "1,2", "[1,[2]]", "{a: {b: c}}", "{1: 2}", "null", "true", "nan", "-1", "1e999",
    "_target_", "{_target_: os.system}", "ä", "\U0001f600", "\u202e", "\udcff", "???", "--", "=", "==", " ", "a\tb",
    "[]", "{}", "[null]", "[[]]", "~nobody-at-all", "choice(1,2)", "range(1,3)", "int(x)", "glob(*)", "0x10", "1_000",
    "a\nb",
]  # fmt: skip
near = st.sampled_from(sorted(NAMES["bcq"] | NAMES["cloning"])).flatmap(lambda name: st.sampled_from([
    name, name[:-1], name + "s", name.upper(), name.replace(".", "_"), name.rpartition(".")[2], f"{name}.x", f".{name}",
    f"{name}.", name.replace(".", ".."), f"{name}[0]", f"~{name}",
    f"+{name}", f"++{name}", f" {name}", f"{name}@x", f"-{name}",
]))  # fmt: skip
word = st.tuples(
    near | st.text(max_size=5), st.sampled_from(["=", "=", "=", "", "==", ":"]), st.sampled_from(TEXTS) | st.text()
)


def check_message(message: str) -> None:
    assert len(message) > 15
    assert "Traceback" not in message
    assert "Error:" not in message.split(" ")[0]
    assert not {"mismatched", "Lexer", "extraneous", "EOF"} & {*message.split()}


@profile(max_examples=300, deadline=None, derandomize=True, database=None)
@given(words=st.lists(word.map("".join), min_size=1, max_size=2), sweep=st.booleans())
def test_words_of_settings(words, sweep):
    """Each setting is refused with a sentence, or is complete and can be written to a file."""
    COUNTS["settings"] += 1
    try:
        runs = compose(words, sweep=sweep)
    except (RunError, DatasetError, OSError) as error:
        return check_message(str(error))
    for run in runs:
        plain = OmegaConf.to_container(run, resolve=True)
        assert '"_target_":' not in json.dumps(plain)
        assert {*flat(run)} == NAMES[run.algorithm]


@pytest.fixture
def end(capsys, tmp_path, monkeypatch):
    """Runs a command that must be refused; returns its message."""
    monkeypatch.chdir(tmp_path)

    def call(kind: str, *words: str) -> str:
        COUNTS[kind] += 1
        capsys.readouterr()
        before = contents(tmp_path)
        try:
            code = main([*words])
        except SystemExit as error:  # argparse
            code = error.code
        message = capsys.readouterr().err
        assert code in (1, 2), (words, message)
        assert "Traceback" not in message
        lines = [line for line in message.splitlines() if line]
        assert lines[-1].startswith("torchrl-bcq") or "[ERROR] - " in message, message
        assert len(message.split("torchrl-bcq: ")[-1]) > 15
        assert contents(tmp_path) == before, words
        return message

    return call


def contents(folder: Path) -> set[Path]:
    """The files in a folder except logs and locks."""
    return {path for path in folder.rglob("*") if path.is_file() and not path.name.endswith((".lock", ".log"))}


READER = [
    "reader=1", "reader=null", "reader=[1]", "reader={1: 2}", "reader=x", "reader..x=1", "reader.=1",
    "reader.nmes.x=1", "reader.names=x", "reader.names=[x]", "reader.names={", "reader.names=", "reader.names=null.",
    "reader.path=x", "reader.names.rewards.x=y", "reader.names.rewards=", "reader.names.rewards=${x}",
    "reader.names.rewards=[rewards].", "reader.max_episode_steps=x", "reader.max_episode_steps=${x}",
    "reader.max_episode_steps=0", "reader.root=x", "reader.max_episode_steps=1,2", "reader.max_episode_steps=[1]",
    "reader.max_episode_steps=true", "reader._target_=x", "reader.names._target_=os.system",
    "reader={_target_: os.system}", "reader.names={1: 2}", "reader.strict=false",
    "reader.names.observations=[observations,observations]", "reader.names.observations=[observations,/observations]",
    "reader.names.observations=[[observations]]", "reader.names.observations=null", "reader.names.observations={a: b}",
    "reader.names.observations=1", "reader.names.observations=[]", "reader.names.lengths=rewards",
    "reader.delimiter=;",
]  # fmt: skip
SOURCES = [
    "", "  ", "nope", "nope.hdf5", "*.nope", "[", ":", "hdf5:", "csv:d.hdf5", "npz:d.hdf5", "foo:bar", "memmap:d.hdf5",
    "memmap:", "d4rl:x", "~nobody-at-all/d.hdf5", "memmap:~nobody-at-all", "hdf5:hdf5:d.hdf5",
    "d.hdf5:",
]  # fmt: skip


@pytest.mark.parametrize("command", ["train", "describe", "convert"])
def test_words_of_readers_and_names_of_datasets(end, file, command):
    file.rename("d.hdf5")

    def start(source: str) -> list[str]:
        if command == "train":
            return ["train", f"dataset={source}", "out=run"]
        return [command, source, "copies"] if command == "convert" else [command, source, "--out", "x.png"]

    for reader in READER:
        end("readers", *start("d.hdf5"), reader)
    for source in SOURCES:
        end("datasets", *start(source))


NAMED = [
    "observations", "observations=", "=obs", "x=y", "observations=nope", "", "=", "rewards=rewards=1",
    "observations=${x}", "observations=[a,b]", "observations=/", " observations=observations",
    "rewards=???", "Rewards=x",
]  # fmt: skip
OPTIONS = [
    ["reader.names.observations=[observations,/observations]"], ["reader.names"], ["--foo"],
    ["reader.max_episode_steps=0"], ["reader.max_episode_steps=x"], ["reader.max_episode_steps=1.5"],
    ["--env", ""], ["--env", "Foo-v1"], ["--env", "a:b"],
    ["--env", ":"], ["--env", "CartPole-v1"], ["--env", "../x"], ["--action-low", "nan"], ["--action-low", "1", "2"],
    ["--action-low", "x"], ["--action-low", "5", "--action-high", "1"], ["--out", "."], ["--out", ""],
    ["--out", "d.hdf5"], ["--out", "x.pdf"], ["--root", "d.hdf5"], ["--root", "~nobody-at-all"],
    ["reader.observation=x"], ["reader.names.rewards=rewards", "reader.names.rewards.x=1"],
]  # fmt: skip


def test_options_of_describe(end, file):
    content = file.rename("d.hdf5").read_bytes()
    for words in [*([f"reader.names.{name}"] for name in NAMED), *OPTIONS]:
        end("options", "describe", "d.hdf5", *words)
    assert Path("d.hdf5").read_bytes() == content, "a picture replaced the dataset"


ENV_KWARGS = [
    "g", "=1", "g=[", "g={", "g=${x}", "g=${", "g='", "g=a: b: c", "[=1", "g=@x", "g=*x", "g=%", "g=\t",
    "g=!!python/object:os.system", "foo=1", "id=x", "g=x", "g=null", "g=", "g=a:b", "g.x=1", "max_episode_steps=x",
    "max_episode_steps=1.5", "max_episode_steps=[1]", "_target_=x", ".=1", "ä=1", "", "=", "max_episode_steps=-5",
]  # fmt: skip


def test_options_of_evaluate_and_record(end, words):
    assert main(["train", *words("steps=10", "evaluation.env=Pendulum-v1", "evaluation.max_episode_steps=3")]) == 0
    for kwargs in ENV_KWARGS:
        end("environments", "evaluate", "run", "--env-kwargs", kwargs)
        end("environments", "record", "--env", "Pendulum-v1", "--steps", "5", "--out", "x.hdf5", "--env-kwargs", kwargs)
    for more in (
        ["--seed", "-1"],
        ["--seed", str(2**70)],
        ["--episodes", "0"],
        ["--out", ""],
        ["--out", "run/config.yaml"],
    ):
        end("environments", "evaluate", "run", *more)
    for env in ("", "a:b", "Foo-v1", "CartPole-v1", ":", "../x"):
        end("environments", "evaluate", "run", "--env", env)
    for env in ("", "a:b", "Foo-v1", "FrozenLake-v1", ":", "../x"):
        end("environments", "record", "--env", env)
    for more in (
        ["--env", "Pendulum-v1", "--observation", "x"],
        ["--observation", "x"],
        ["--env-kwargs", "g=1"],
        ["--policy", ""],
    ):
        end("environments", "record", *more)
    for run in ("nope", "~nobody-at-all", "run/log"):
        end("environments", "evaluate", run)
        end("environments", "plot", run)


VALUES = [
    "network.hidden=[[8]]", "network.hidden=[0]", "network.latent_dim=-1", "network.latent_clip=nan", "seed=-1",
    "evaluation.seed=-1", "policy.seed=99999999999999999999999", "stack=1000", "evaluation.env_kwargs.g=x",
    "device=foo", "evaluation.env_kwargs.g=null", "loss.gamma=nan", "optim.optimizer=__doc__", "optim.kwargs.foo=1",
    "logger=[foo]", "optim.scheduler=StepLR", "action_low=[1,2]", "action_low=nan", "held_out=nan",
    "evaluation.reference_scores=[2,1]", "root=~nobody-at-all/x", "out=~nobody-at-all", "init_from=~nobody-at-all",
    "init_from=nope", "resume=nope", "sampler=x",
]  # fmt: skip


def test_values_that_a_run_refuses(end, words):
    for value in VALUES:
        end("values", "train", *words("evaluation.env=Pendulum-v1", "evaluation.max_episode_steps=3", value))


def test_names_that_are_not_utf_8_are_logged(words, run, monkeypatch):
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # a report of pytest cannot hold such a name
    assert main(["train", *words("dataset=\udcff.hdf5", "algorithm=bcq")]) == 1
    assert "Logging error" not in shown.getvalue()
    assert "there is no file \\udcff.hdf5 in /" in (run / "train.log").read_text()


def test_how_many_were_malformed(check_count):
    check_count(COUNTS, ["settings", "readers", "datasets", "options", "environments", "values"], at_least=600)
