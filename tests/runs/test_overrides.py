"""Settings as a user types them: names that do not exist, and values with any character."""

from __future__ import annotations

import pytest

from torchrl_bcq.errors import RunError
from torchrl_bcq.runs.settings import compose

HYDRAS_WORDS = ("mismatched", "Lexer", "viable", "hydra", "EOF", "extraneous")


@pytest.fixture(autouse=True)
def algorithm(monkeypatch):
    """These tests name datasets that do not exist, so the algorithm cannot be chosen by their actions."""
    monkeypatch.setattr("torchrl_bcq.runs.settings.suitable_algorithm", lambda values: "bcq")


def refusal(*words: str, sweep: bool = False) -> str:
    with pytest.raises(RunError) as error:
        compose(words, sweep=sweep)
    assert not [word for word in HYDRAS_WORDS if word in str(error.value)]
    return str(error.value)


# names


@pytest.mark.parametrize("plus", ["", "+", "++"])
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("step", "steps"),
        ("optim.lrr", "optim.lr"),
        ("optim.vae.lrr", "optim.vae.lr"),
        ("optim.lr.x", "optim.lr"),
        ("env", "evaluation.env"),
        ("critics.tau", "loss.tau"),
        ("interval", "evaluation.interval or checkpoint.interval"),  # log_interval is spelled more alike
        ("network", "network.behavior or network.hidden or network.vae_hidden"),
        ("seed@x", "seed"),  # Hydra takes the part after @ for a package
    ],
)
def test_the_nearest_setting_is_named(plus, name, meant):
    assert refusal(f"{plus}{name}=200") == f"there is no setting {name}; did you mean {meant}?"


def test_a_name_that_resembles_nothing_is_refused_with_the_place_of_the_list():
    assert refusal("learning_rate=1") == "there is no setting learning_rate; see torchrl-bcq train --help."
    assert refusal("optim={lrr: 1}") == "there is no setting optim.lrr; did you mean optim.lr?"
    assert compose(["optim={lr: 0.5}", "+steps=5", "++seed=3"])[0].optim.lr == 0.5


@pytest.mark.parametrize(
    ("dataset", "word", "message"),
    [
        (
            "a.csv",
            "reader.delimeter=;",
            "there is no setting reader.delimeter for a.csv; did you mean reader.delimiter",
        ),
        ("a.csv", "+reader={rewards: r}", "there is no setting reader.rewards for a.csv; did you mean reader.reward?"),
        ("a.npz", "reader.reward=r", "there is no setting reader.reward for a.npz; expected one of ['names', 'max_epi"),
        (
            "minari:x",
            "reader.names.a=b",
            "there is no setting reader.names for minari:x; expected one of ['observation'].",
        ),
        ("a.h5", "reader.max_episode_steps=many", "reader.max_episode_steps is 'many', expected a whole number."),
        ("a.csv", "reader.names.a=b", "there is no setting reader.names for a.csv; expected one of ['observation', "),
    ],
)
def test_settings_of_the_reader_are_arguments_of_the_reader(dataset, word, message):
    assert refusal(f"dataset={dataset}", word).startswith(message)


def test_settings_of_the_reader_get_its_types():
    words = [
        "reader={observation: [x (m), 位置, 3], reward: 1, terminated: e}",
        "reader.action=u",
        "reader.delimiter=;",
    ]
    (settings,) = compose(["dataset=trips.csv", *words])
    assert settings.reader == {
        "observation": ["x (m)", "位置", "3"],
        "reward": "1",
        "terminated": "e",
        "action": ["u"],
        "delimiter": ";",
    }
    (settings,) = compose(["dataset=other:name", "reader.anything=1"])  # a loader that is registered with TorchRL
    assert settings.reader == {"anything": 1}


# values

NAMES = ["hopper (1).hdf5", "lr=0.1.hdf5", "数据.hdf5", "it's.hdf5", 'a"b.hdf5', "my file.hdf5", "{a}.hdf5", "[1].hdf5"]
NAMES += ["run#1&2.hdf5", "a+b*.hdf5", "1e3", "2024_01", "007", "true", "a\\b.hdf5", "C:\\x\\y.hdf5", "hdf5:x (1)"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("setting", ["dataset", "root", "out"])
@pytest.mark.parametrize("sweep", [False, True])
def test_a_path_is_what_was_typed(setting, name, sweep):
    (settings,) = compose([f"{setting}={name}"], sweep=sweep)
    assert settings[setting] == (f"{name}/0" if sweep and setting == "out" else name)


def test_a_path_with_commas_is_one_path_if_it_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.hdf5", "'q'.hdf5", "${seed}.hdf5", "x", "y", "x,y"):
        (tmp_path / name).touch()
        if name != "x,y":
            assert compose([f"dataset={name}"], sweep=True)[0].dataset == name
    assert compose(["dataset=x,y"])[0].dataset == "x,y"
    assert [one.dataset for one in compose(["dataset=x,y"], sweep=True)] == ["x", "y"]
    found = compose(["dataset=数 (1).hdf5, b (2).hdf5", "seed=0,1"], sweep=True)
    assert [(one.dataset, one.seed) for one in found] == [
        *(("数 (1).hdf5", 0), ("数 (1).hdf5", 1), ("b (2).hdf5", 0), ("b (2).hdf5", 1)),
    ]


def test_a_comma_that_may_mean_several_runs_is_refused_with_the_quotes_that_help():
    several = "has 2 values; add -m to make a run for each value, or"
    quotes = "write text that contains a comma in quotes, as"
    assert refusal("dataset=a,b.hdf5") == f"dataset=a,b.hdf5 {several} {quotes} 'dataset=\"a,b.hdf5\"'."
    assert compose(['dataset="a,b.hdf5"'], sweep=True)[0].dataset == "a,b.hdf5"
    assert refusal("network.hidden=4,3") == f"network.hidden=4,3 {several} write a list as network.hidden=[4,3]."
    message = refusal("dataset=a.csv", "reader.reward=a,b")
    assert "write a list as reader.reward=[a,b], or write text that contains a comma in quotes, as " in message
    assert refusal("out=a,b", sweep=True) == "out has several values; a sweep needs one folder, such as out=a."


def test_home_is_found_and_nothing_is_no_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (settings,) = compose(["dataset=~/x (1).hdf5", "out=~/läufe"])
    assert (settings.dataset, settings.out) == (f"{tmp_path}/x (1).hdf5", f"{tmp_path}/läufe")
    unknown = "~nobody-at-all/x starts with the home folder of an unknown user; write the whole path."
    for name in ("dataset", "out", "root", "resume", "init_from"):
        assert refusal(f"{name}=~nobody-at-all/x") == f"{name}: {unknown}"
    for name in ("dataset", "out", "root", "resume"):
        assert refusal(f"{name}=") == f"{name} has no value; write a setting as NAME=VALUE."


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "optim.learning_rate=1",
            "there is no setting optim.learning_rate; the settings of optim are optim.",
        ),
        ("steps=5 (x)", "steps is '5 (x)', expected a whole number."),
        ("optim.lr=1e-3,", "optim.lr is '1e-3,', expected a number."),
        ("seed==1", "seed is '=1', expected a whole number."),
        ("resume=null", "resume cannot be None: field 'resume' is not Optional"),
        ("network.hidden=8", "network.hidden cannot be 8: write a list, such as network.hidden=[8]."),
        ("logger=csv", "logger cannot be 'csv': write a list, such as logger=[csv]."),
        ("network.hidden=[8", "the value of network.hidden cannot be read: [8; write a list as [A, B], a dictionary "),
        (
            "reader={a",
            "the value of reader cannot be read: {a; write a list as [A, B], a dictionary as {NAME: ",
        ),
    ],
)
def test_values_that_cannot_be_read_are_refused_in_plain_words(word, message):
    assert refusal(word).startswith(message)


def test_hydras_syntax_is_kept():
    words = ["out=runs/${seed}", "root=null", "resume=TRUE", 'dataset="it\'s"', "evaluation.env='x, y'"]
    (settings,) = compose([*words, "optim.optimizer=Adam\\,W", "weights=NULL"])
    assert (settings.out, settings.root, settings.resume, settings.dataset) == ("runs/0", None, True, "it's")
    assert (settings.evaluation.env, settings.optim.optimizer, settings.weights) == ("x, y", "Adam,W", None)
    assert [one.seed for one in compose(["seed=range(0,3)"], sweep=True)] == [0, 1, 2]
    assert [one.sampler for one in compose(["sampler=choice(a,b)"], sweep=True)] == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["seed=${foo}"],
            "seed cannot be read: Interpolation key 'foo' not found; write $ as \\$ if the text has one.",
        ),
        (["evaluation.env_kwargs.g=${x}"], "evaluation.env_kwargs.g cannot be read: Interpolation key 'x' not found;"),
        (["seed=${oc.env:HOME}"], "seed cannot be read: While dereferencing interpolation '${oc.env:HOME}': Value '"),
        (
            ["dataset=a.csv", "reader.observation=[x]", "reader.observation.a=1"],
            "reader.observation.a=1 cannot be set: it names a part of a list; set the whole list.",
        ),
    ],
)
def test_references_and_parts_that_do_not_exist(words, message):
    assert refusal(*words).startswith(message)


def test_of_two_values_the_last_one_counts_also_among_parts_of_a_setting():
    words = ["logger_kwargs.csv.a=1", "logger_kwargs.csv={a: 3, b: 4}", "logger_kwargs.csv.a=2", "seed=1", "seed=2"]
    (settings,) = compose(words)
    assert (settings.seed, dict(settings.logger_kwargs.csv)) == (2, {"a": 2, "b": 4})
