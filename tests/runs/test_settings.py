"""Settings: those of the signatures, the commented ones of ``train.yaml``, overrides, and the file of a run."""

from __future__ import annotations

import importlib
from dataclasses import fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from torchrl_bcq.errors import RunError
from torchrl_bcq.objectives import BCQLoss
from torchrl_bcq.runs import settings as module
from torchrl_bcq.runs.algorithms import ALGORITHMS
from torchrl_bcq.runs.settings import (
    FILE,
    check_resumable,
    compose,
    default_settings,
    flat,
    load_settings,
    save_settings,
    to_plain,
    to_settings,
)

YAML = (files("torchrl_bcq.cli") / "train.yaml").read_text(encoding="utf-8")
PLAIN = yaml.safe_load(YAML)
DISCRETE = yaml.safe_load((files("torchrl_bcq.cli") / "train_discrete.yaml").read_text(encoding="utf-8"))


def leaves(settings: DictConfig, prefix: str = "") -> dict[str, Any]:
    """Type of each setting by dotted name."""
    found: dict[str, Any] = {}
    for field in fields(OmegaConf.get_type(settings)):
        name = f"{prefix}{field.name}"
        inner = is_dataclass(field.type)
        found |= leaves(settings[field.name], f"{name}.") if inner else {name: field.type}
    return found


def plain(settings: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(settings, resolve=False)


DEFAULTS = default_settings()
TYPES = leaves(DEFAULTS)
OPTIONAL = [name for name, kind in TYPES.items() if NoneType in get_args(kind)]


# the commented settings


def test_each_setting_is_listed_with_the_value_of_its_signature():
    assert plain(DEFAULTS) == PLAIN
    assert len(TYPES) > 80


def test_the_second_list_has_exactly_the_settings_of_discrete_bcq_that_differ():
    def flat(plain, prefix=""):
        found = {}
        for name, value in plain.items():
            section = isinstance(value, dict) and value
            found |= flat(value, f"{prefix}{name}.") if section else {f"{prefix}{name}": value}
        return found

    main, other = (flat(plain(default_settings(name))) for name in ("bcq", "discrete_bcq"))
    assert flat(DISCRETE) == {name: value for name, value in other.items() if (name, value) not in main.items()}


def test_the_list_has_the_order_of_the_signatures():
    def names(plain, prefix=""):
        for name, value in plain.items():
            here = f"{prefix}{name}"
            yield from [here] if here in TYPES else names(value, f"{here}.")

    assert list(names(PLAIN)) == list(TYPES)


def test_each_line_is_explained():
    lines = [line for line in YAML.splitlines() if ":" in line and not line.lstrip().startswith("#")]
    values = [line for line in lines if line.split("  #")[0].split(":", 1)[1].strip()]
    assert len(values) > 65
    assert [line for line in values if not line.partition("  # ")[2].strip()] == []


def test_values_are_the_papers():
    """arXiv:1812.02900, appendix D, and the author's code."""
    settings = plain(DEFAULTS)
    loss, optim = settings["loss"], settings["optim"]
    assert (settings["steps"], settings["batch_size"], settings["policy"]["num_action_samples"]) == (
        1_000_000,
        100,
        100,
    )
    of_paper = {"gamma": 0.99, "lmbda": 0.75, "tau": 0.005, "num_target_samples": 10, "loss_function": "l2"}
    of_paper |= {"delay_actor": True, "delay_qvalue": True, "reduction": "mean"}
    assert {name: loss[name] for name in of_paper} == of_paper
    assert (optim["optimizer"], optim["lr"], optim["kwargs"], optim["clip_norm"]) == ("Adam", 1e-3, {}, None)
    network = {"hidden": [400, 300], "vae_hidden": [750, 750], "latent_dim": None, "latent_clip": 0.5}
    network |= {"behavior": "vae", "kl_weight": 0.5, "num_critics": 2, "layer_norm": False, "phi": 0.05}
    assert {name: settings["network"][name] for name in network} == network
    of_others = {"num_components", "noise_clip", "flow_steps"}  # not of the VAE
    assert settings["network"].keys() - network.keys() == of_others
    assert settings["policy"]["choose_by"] == "first"
    own = {"optimizer": None, "lr": None, "kwargs": {}, "scheduler": None, "scheduler_kwargs": {}}
    own |= {"start_after": 0, "stop_after": None, "every": 1}
    assert [optim[name] for name in ("vae", "actor", "qvalue")] == [own] * 3
    same = {name: settings[name] for name in ("sampler", "weights", "n_step", "normalize", "held_out")}
    assert same == {"sampler": "uniform", "weights": None, "n_step": 1, "normalize": False, "held_out": 0.0}


def test_the_dataset_is_the_only_setting_without_a_value():
    settings = default_settings()
    settings.out = "run"
    assert OmegaConf.missing_keys(settings) == {"dataset"}
    with pytest.raises(MissingMandatoryValue):
        _ = settings.dataset


# algorithms


def test_an_algorithm_has_the_settings_of_its_own_parts():
    settings = default_settings("cloning")
    assert settings.algorithm == "cloning"
    assert OmegaConf.to_container(settings.network) == {"hidden": [400, 300]}
    assert OmegaConf.to_container(settings.loss) == {"reduction": "mean", "use_prioritized_weights": "auto"}
    assert OmegaConf.to_container(settings.policy) == {}
    assert [name for name in settings.optim if OmegaConf.is_dict(settings.optim[name])] == [
        *("kwargs", "scheduler_kwargs", "actor")
    ]
    with pytest.raises(RunError, match=r"algorithm is 'bqc', expected one of \['bcq', 'cloning', "):
        default_settings("bqc")


class Weighted(BCQLoss):
    """An objective with settings that nothing else has."""

    def __init__(self, vae_network, qvalue_network, *, temperature: float = 2.0, cut: int | None = None, **settings):
        super().__init__(vae_network, None, qvalue_network, **settings)
        self.temperature, self.cut = temperature, cut


def test_a_setting_of_a_new_objective_is_found_nowhere_but_in_its_constructor(monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "weighted", replace(ALGORITHMS["bcq"], loss=Weighted))
    (settings,) = compose(["algorithm=weighted", "loss.temperature=0.5", "loss.tau=0.25", "optim.qvalue.lr=1"])
    assert OmegaConf.to_container(settings.loss) == {"gamma": 0.99, "temperature": 0.5, "cut": None, "tau": 0.25}
    assert "actor" not in settings.optim
    for wrong in ("loss.temperature=hot", "loss.cut=low", "loss.cut=1.5"):
        with pytest.raises(RunError, match=f"{wrong.split('=')[0]} is "):
            compose(["algorithm=weighted", wrong])
    with pytest.raises(RunError, match=r"there is no setting loss\.temprature; did you mean loss\.temperature\?"):
        compose(["algorithm=weighted", "loss.temprature=1"])
    with pytest.raises(RunError, match=r"loss\.temperature is a setting of weighted, but this run has algorithm=bcq"):
        compose(["loss.temperature=1"])


# overrides


def test_overrides_are_read_as_hydra_reads_them():
    words = ["optim.vae.lr=3e-4", "network.hidden=[8,7]", "reader={names: {actions: x}}", "optim.kwargs.eps=1e-3"]
    words += ["logger_kwargs.wandb.project=bcq", "threads=null", "dataset='my file.hdf5'", "loss.reduction=sum"]
    words += ["loss.use_prioritized_weights=false"]
    (settings,) = compose([*words, "+reader.names.rewards=r", "algorithm=bcq", "seed=1", "seed=2"])
    assert settings.optim.vae.lr == 3e-4
    assert OmegaConf.to_container(settings.optim.kwargs) == {"eps": 1e-3}
    assert OmegaConf.to_container(settings.reader) == {"names": {"actions": "x", "rewards": "r"}}
    assert (settings.network.hidden, settings.dataset, settings.loss.reduction) == ([8, 7], "my file.hdf5", "sum")
    assert (settings.loss.use_prioritized_weights, settings.seed, settings.threads) == (False, 2, None)
    assert settings.logger_kwargs.wandb.project == "bcq"


def test_a_sweep_makes_all_combinations_in_numbered_folders():
    found = compose(["seed=0,1", "algorithm=bcq,cloning", "out=runs/x", "network.hidden=[4]"], sweep=True)
    assert [(one.seed, one.algorithm, one.out) for one in found] == [
        (0, "bcq", "runs/x/0"),
        (0, "cloning", "runs/x/1"),
        (1, "bcq", "runs/x/2"),
        (1, "cloning", "runs/x/3"),
    ]
    assert [one.network.hidden for one in found] == [[4]] * 4
    folders = {Path(one.out).parent for one in compose(["seed=range(0,3)"], sweep=True)}
    assert len(folders) == 1
    assert str(folders.pop()).startswith("runs/20")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sed=1"], "there is no setting sed; did you mean seed?"),
        (["optim.vae.learning_rate=1"], "there is no setting optim.vae.learning_rate"),
        (["network.normalization=true"], "there is no setting network.normalization"),
        (
            ["seed=0,1"],
            "seed=0,1 has 2 values; add -m to make a run for each value, or write a list as seed=[0,1].",
        ),
        (["steps=many"], "steps is 'many', expected a whole number."),
        (["network.hidden=[a]"], "network.hidden cannot be ['a']: "),
        (["reader=[1"], "the value of reader cannot be read: "),
        (["~seed"], "~seed is not a setting; write a setting as NAME=VALUE."),
        (["_target_=os.system"], "there is no setting _target_"),
        (
            ["reader._target_=os.system"],
            "reader._target_ is refused, because names of the form _NAME_ can run code; remove it.",
        ),
        (
            ["optim.vae.kwargs={a: [{_target_: os.system}]}"],
            "optim.vae.kwargs.a.0._target_ is refused, because names of",
        ),
        (["logger_kwargs={wandb: {_partial_: true}}"], "logger_kwargs.wandb._partial_ is refused, because names of"),
    ],
)
def test_overrides_that_are_refused(words, message):
    with pytest.raises(RunError) as error:
        compose(words)
    assert str(error.value).startswith(message)


def test_a_group_of_the_same_name_is_no_obstacle():
    """TorchRL's groups and those of torchrl_bcq.conf are in one store of Hydra's."""
    importlib.import_module("torchrl_bcq.conf")  # a part of [test]: its absence is a failure
    (settings,) = compose(["logger=[]", "sampler=prioritized", "dataset=hdf5", "algorithm=bcq"])
    assert (settings.logger, settings.sampler, settings.dataset) == ([], "prioritized", "hdf5")


# types


WRONG = {int: [1.5, "many", [1]], float: ["high", [1]], bool: ["maybe", [1]], str: [[1], {"a": 1}], list: [3, "a"]}


def kinds_of(kind) -> list:
    """The plain types of a type that may be null."""
    members = [member for member in get_args(kind) if member is not NoneType]
    return members if NoneType in get_args(kind) else [kind]


def test_there_are_optional_settings_of_each_kind():
    kinds = {kind for name in OPTIONAL for kind in kinds_of(TYPES[name])}
    assert {int, float, bool, str} <= kinds
    assert len(OPTIONAL) > 20


@pytest.mark.parametrize("name", [name for name in TYPES if TYPES[name] is not Any and "kwargs" not in name])
def test_wrong_types_are_refused(name):
    kinds = [getattr(kind, "__origin__", kind) for kind in kinds_of(TYPES[name])]
    wrong = [value for value in WRONG.get(kinds[0], [3]) if type(value) not in kinds]
    assert wrong
    if name not in OPTIONAL:
        wrong.append(None)
    for value in wrong:
        with pytest.raises(OmegaConfBaseException):
            OmegaConf.update(DEFAULTS, name, value)
    assert plain(DEFAULTS) == PLAIN


# in the folder of a run


def test_settings_come_back_from_a_folder(make_settings, tmp_path):
    words = ["optim.kwargs.betas=[0.5,0.9]", "reader.names.rewards=r", "weights=episode", "threads=3", "algorithm=bcq"]
    settings = make_settings(*words)
    settings.out = "runs/${seed}"
    save_settings(settings, tmp_path)
    again = load_settings(tmp_path)
    assert again.out == "runs/0"
    settings.out = "runs/0"
    assert again == settings
    save_settings(again, tmp_path)
    assert load_settings(tmp_path) == again


def test_the_settings_of_each_algorithm_come_back(make_settings, tmp_path):
    settings = make_settings("algorithm=cloning", "optim.actor.every=2")
    save_settings(settings, tmp_path)
    assert load_settings(tmp_path) == settings


def test_a_resumed_run_has_the_settings_that_it_had(make_settings, tmp_path):
    save_settings(make_settings("seed=7", "algorithm=cloning"), tmp_path / "old")
    (settings,) = compose([f"resume={tmp_path / 'old'}", "steps=50"])
    assert (settings.seed, settings.algorithm, settings.steps, settings.resume) == (7, "cloning", 50, True)
    assert settings.out == str(tmp_path / "old")


def test_settings_that_cannot_be_written_leave_the_old_ones(make_settings, tmp_path, monkeypatch):
    save_settings(make_settings("seed=1"), tmp_path)

    def half(path, text, **settings):
        with open(path, "w") as file:
            file.write(text[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        save_settings(make_settings("seed=2"), tmp_path)
    assert load_settings(tmp_path).seed == 1
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".yaml"] == [FILE]


def test_nothing_in_a_strangers_settings_is_looked_up(make_settings, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "swordfish")
    text = OmegaConf.to_yaml(OmegaConf.create(to_plain(make_settings())))
    text = text.replace("reader: {}", "reader:\n  names: {rewards: '${oc.env:SECRET}'}\n  list: ['${seed}']")
    (tmp_path / FILE).write_text(text.replace("sampler: uniform", "sampler: ${oc.env:SECRET}"))
    settings = load_settings(tmp_path)
    resolved = OmegaConf.to_container(settings, resolve=True)
    assert resolved["sampler"] == settings.sampler == "${oc.env:SECRET}"
    assert resolved["reader"] == {"names": {"rewards": "${oc.env:SECRET}"}, "list": ["${seed}"]}
    save_settings(settings, tmp_path)
    assert load_settings(tmp_path) == settings
    assert "swordfish" not in (tmp_path / FILE).read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sed": 1}, "cannot be read: Key 'sed' not in 'Settings'"),
        ({"steps": "many"}, "cannot be read: Value 'many'"),
        ({"threads": 1.5}, "cannot be read: Value '1.5'"),
        ({"algorithm": "bqc"}, "cannot be read: algorithm is 'bqc', expected one of "),
        ({"algorithm": ["bcq"]}, "cannot be read: algorithm is "),
        ({"optim": 3}, "cannot be read: "),
        ({"_target_": "os.system"}, "cannot be read: _target_ is refused, because names of"),
        ({"network": {"_target_": "os.system"}}, "cannot be read: network._target_ is refused, because names of"),
        (
            {"optim": {"vae": {"kwargs": {"_target_": "x"}}}},
            "cannot be read: optim.vae.kwargs._target_ is refused, because names of",
        ),
        ({"reader": {"names": [{"_args_": []}]}}, "cannot be read: reader.names.0._args_ is refused, because names of"),
    ],
)
def test_a_damaged_file_is_refused(make_settings, tmp_path, change, message):
    (tmp_path / FILE).write_text(yaml.safe_dump({**to_plain(make_settings()), **change}))
    with pytest.raises(RunError) as error:
        load_settings(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / FILE} {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: [", "config.yaml cannot be read: "),
        ("a: !!python/object/apply:os.getcwd []", "config.yaml cannot be read: could not determine a constructor"),
        ("- 1", "config.yaml is empty or damaged; restore it, or train the run again."),
    ],
)
def test_what_is_no_settings_file_is_refused(tmp_path, text, message):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(RunError) as error:
        load_settings(tmp_path)
    assert message in str(error.value)


def test_a_run_of_another_version_is_refused_with_its_version(make_settings, monkeypatch):
    monkeypatch.setattr(module, "__version__", "0.2.1")
    plain = to_plain(make_settings())
    assert plain["version"] == "0.2.1"
    assert to_settings({**plain, "version": "0.2.0"}, "run") == make_settings()
    without = {name: value for name, value in plain.items() if name != "version"}
    for other, found in (({**without, "seeds": None}, "0.1"), ({**plain, "version": "0.3.0"}, "0.3.0")):
        with pytest.raises(RunError) as error:
            to_settings(other, "run/config.yaml")
        assert str(error.value) == (
            f"run/config.yaml was made by torchrl-bcq {found}, but this is version 0.2.1; use a checkout of version "
            f"{found}, or train the run again."
        )


def test_what_is_no_run_is_refused_and_what_it_holds_is_named(make_settings, tmp_path):
    with pytest.raises(RunError, match=r"/none is not a run of torchrl-bcq train: there is no .*/none/config.yaml\.$"):
        load_settings(tmp_path / "none")
    for seed in ("1", "0"):
        save_settings(make_settings(), tmp_path / "sweep" / seed)
    with pytest.raises(RunError, match=r"It contains the runs \['0', '1'\]; choose one of them\.$"):
        load_settings(tmp_path / "sweep")


# what a resumed run may change


MAY_DIFFER = ["steps=40", "out=elsewhere", "resume=true", "progress_bar=true", "threads=2", "device=cpu", "root=copies"]
MAY_DIFFER += ["evaluation.env=null", "checkpoint.keep=9", "early_stopping.patience=1", "policy.num_action_samples=9"]
MAY_DIFFER += ["algorithm=bcq", "dataset=moved.hdf5", "reader.names.rewards=r"]  # it is known by its content
MAY_DIFFER += ["compile=true", "precision=high", "cudagraph=true", "baseline=cloning"]
MAY_DIFFER += ["logger=[]", "logger_kwargs.wandb.project=bcq", "evaluation.reference_scores=[0,1]"]


def test_what_does_not_change_the_networks_may_differ(make_settings):
    check_resumable(make_settings(*MAY_DIFFER), make_settings(), Path("run"))


def test_all_that_differs_is_named_and_nothing_else(make_settings):
    differing = ["seed=1", "network.hidden=[9]", "optim.vae.lr=0.5", *MAY_DIFFER]
    with pytest.raises(RunError) as error:
        check_resumable(make_settings(*differing), make_settings(), Path("run"))
    assert str(error.value) == (
        "run cannot be resumed with changed settings: seed was 0 and is now 1; network.hidden was [8] and is now [9]; "
        "optim.vae.lr was None and is now 0.5. To resume the run with its saved settings: torchrl-bcq train "
        "resume=run. Or start a new run in another folder with out=FOLDER; add init_from=run to start with its "
        "networks."
    )


def test_a_run_keeps_its_algorithm(make_settings):
    with pytest.raises(RunError, match=r"run is a run of algorithm bcq, not cloning; .*out=FOLDER"):
        check_resumable(make_settings("algorithm=cloning"), make_settings(), Path("run"))


@pytest.mark.parametrize("name", [name for name in TYPES if name.split(".")[0] in ("network", "loss", "optim")])
def test_each_setting_of_what_learns_must_stay(name):
    saved, now = DEFAULTS.copy(), DEFAULTS.copy()
    saved.dataset = now.dataset = saved.out = now.out = "same"
    value = flat(now)[name]
    others = {bool: not value, int: 7, float: 0.125, str: "other", list: [3], dict: {"eps": 0.5}}
    of_null = "9" if name.endswith(("optimizer", "scheduler")) else 9
    OmegaConf.update(now, name, of_null if value is None else others[type(value)])
    with pytest.raises(RunError, match=rf"changed settings: {name} was "):
        check_resumable(now, saved, Path("run"))


@pytest.mark.parametrize("text", ["", "{}", "- 1"])
def test_an_empty_settings_file_is_damaged(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(RunError, match="config.yaml is empty or damaged; restore it, or train the run again"):
        load_settings(tmp_path)


def test_a_resumed_run_keeps_its_folder(make_settings, tmp_path):
    save_settings(make_settings(f"out={tmp_path / 'run'}"), tmp_path / "run")
    resume = f"resume={tmp_path / 'run'}"
    assert compose([resume, f"out={tmp_path / 'run'}/"])[0].out == str(tmp_path / "run")
    with pytest.raises(RunError, match=r"continues in this folder; for a new run in out, use init_from="):
        compose([resume, f"out={tmp_path / 'other'}"])
    with pytest.raises(RunError, match="continues one run, so it cannot be used with -m"):
        compose([resume, "steps=300,400"], sweep=True)
