"""The settings: the same in the file, in the types and in what they are for; and what is refused."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from torch.optim import Adam

import torchrl_bcq as bcq
from torchrl_bcq.cli.config import (
    FILE,
    YAML,
    TrainConfig,
    check_resumable,
    default_config,
    flat,
    load_config,
    save_config,
    to_config,
)
from torchrl_bcq.cli.errors import RunError

PLAIN = yaml.safe_load(YAML)
FREE_FORM = {"reader", "logger_kwargs", "kwargs", "scheduler_kwargs"}


def names(settings, prefix=""):
    """Dotted names in a dictionary, or in a dataclass."""
    if dataclasses.is_dataclass(settings):
        parts = {f.name: f.default_factory for f in dataclasses.fields(settings)}
        parts = {key: value if dataclasses.is_dataclass(value) else None for key, value in parts.items()}
    else:
        parts = {
            key: value if isinstance(value, dict) and key not in FREE_FORM else None for key, value in settings.items()
        }
    for key, part in parts.items():
        yield from [f"{prefix}{key}"] if part is None else names(part, f"{prefix}{key}.")


def defaults(call) -> dict:
    found = {name: parameter.default for name, parameter in inspect.signature(call).parameters.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


# what the file says


def test_file_and_types_have_the_same_names_in_the_same_order():
    assert list(names(PLAIN)) == list(names(TrainConfig))
    assert len(set(names(PLAIN))) == len(list(names(PLAIN))) > 60


def test_every_setting_is_explained():
    lines = [line for line in YAML.splitlines() if ":" in line and not line.lstrip().startswith("#")]
    setting = [line for line in lines if line.split("  #")[0].split(":", 1)[1].strip()]
    assert len(setting) > 55
    assert [line for line in setting if not line.partition("  # ")[2].strip()] == []


@pytest.mark.parametrize(
    ("section", "call"),
    [
        ("network", bcq.make_bcq_modules),
        ("loss", bcq.BCQLoss.__init__),
        ("policy", bcq.BCQPolicy.__init__),
        ("optim", bcq.BCQOptimizationStepper.__init__),
        (None, bcq.make_replay_buffer),
    ],
)
def test_values_are_the_defaults_of_what_they_are_for(section, call):
    settings = PLAIN if section is None else PLAIN[section]
    own = defaults(call)
    shared = settings.keys() & own.keys()
    not_the_command_lines = {"device", "seed"}  # auto and 0 here: a run is repeatable
    expected = {
        "network": set(settings),
        "loss": {"lmbda", "num_target_samples", "loss_function"},
        "policy": {"num_action_samples"},
        "optim": {"vae_warmup_steps", "freeze_vae_after", "actor_update_interval"},
        None: {"batch_size", "sampler", "weights", *not_the_command_lines},
    }
    assert shared == expected[section]
    shared -= not_the_command_lines if section is None else set()
    assert {name: settings[name] for name in shared} == {name: own[name] for name in shared}


def test_execution_is_the_trainers():
    own = defaults(bcq.BCQTrainer.__init__)
    names = ("compile", "precision", "cudagraph")
    assert {name: PLAIN[name] for name in names} == {name: own[name] for name in names}


def test_values_are_the_papers():
    """arXiv:1812.02900, appendix D, and the author's code."""
    loss, optim = PLAIN["loss"], PLAIN["optim"]
    assert (PLAIN["steps"], PLAIN["batch_size"]) == (1_000_000, 100)
    assert loss == {"gamma": 0.99, "lmbda": 0.75, "tau": 0.005, "num_target_samples": 10, "loss_function": "l2"}
    assert (optim["optimizer"], optim["lr"], optim["kwargs"]) == ("Adam", 1e-3, {})
    assert defaults(Adam.__init__)["lr"] == 1e-3
    network = {"hidden": [400, 300], "vae_hidden": [750, 750], "latent_dim": None, "latent_clip": 0.5}
    assert PLAIN["network"] == {**network, "kl_weight": 0.5, "num_critics": 2, "phi": 0.05}
    assert PLAIN["policy"] == {"num_action_samples": 100}
    changes_nothing = {name: PLAIN[name] for name in ("sampler", "weights", "n_step", "normalize", "held_out")}
    assert changes_nothing == {"sampler": "uniform", "weights": None, "n_step": 1, "normalize": False, "held_out": 0.0}


def test_networks_have_what_all_have_unless_told():
    own = {"optimizer": None, "lr": None, "kwargs": {}, "scheduler": None, "scheduler_kwargs": {}}
    assert [PLAIN["optim"][name] for name in ("vae", "qvalue", "actor")] == [own] * 3


def test_the_dataset_is_the_only_setting_without_a_value():
    config = default_config()
    config.out = "run"
    assert OmegaConf.missing_keys(config) == {"dataset"}
    with pytest.raises(MissingMandatoryValue):
        _ = config.dataset


# what is refused


@pytest.mark.parametrize("name", ["gama", "loss.gama", "optim.vae.learning_rate", "network.normalization", "_target_"])
def test_unknown_names_are_refused(name):
    with pytest.raises(OmegaConfBaseException, match=name.rpartition(".")[2]):
        OmegaConf.update(default_config(), name, 1)
    with pytest.raises(OmegaConfBaseException, match=name.rpartition(".")[2]):
        OmegaConf.merge(default_config(), OmegaConf.from_dotlist([f"{name}=1"]))


@pytest.mark.parametrize("name", ["reader.columns", "logger_kwargs.wandb", "optim.kwargs.eps", "optim.vae.kwargs.eps"])
def test_free_form_settings_take_any_name(name):
    config = OmegaConf.merge(default_config(), OmegaConf.from_dotlist([f"{name}=1"]))
    assert OmegaConf.select(config, name) == 1
    OmegaConf.update(config, name, 2)
    assert OmegaConf.select(config, name) == 2


@pytest.mark.parametrize(
    "setting",
    [
        "steps=many",
        "steps=1.5",
        "normalize=maybe",
        "network.hidden=[a]",
        "network.hidden=8",
        "loss.gamma=high",
        "logger=csv",
        "compile=max-autotune",
        "cudagraph=1.5",
    ],
)
def test_values_of_another_type_are_refused(setting):
    with pytest.raises(OmegaConfBaseException, match=r"type|merge"):
        OmegaConf.merge(default_config(), OmegaConf.from_dotlist([setting]))


# in the folder of a run


def test_settings_come_back_from_a_folder(make_config, tmp_path):
    config = make_config("optim.kwargs.betas=[0.5,0.9]", "reader.names.rewards=r", "weights=episode", "threads=3")
    config.out = "runs/${seed}"
    save_config(config, tmp_path)
    again = load_config(tmp_path)
    assert again == to_config(OmegaConf.to_container(config, resolve=True))
    assert (again.out, again.optim.kwargs.betas, again.threads) == ("runs/0", [0.5, 0.9], 3)
    assert [path.name for path in tmp_path.iterdir() if path.name != "swings.hdf5"] == [FILE]
    assert load_config(tmp_path) == again


def test_a_run_from_before_there_was_a_setting_has_its_value(make_config, tmp_path):
    new = ("compile", "precision", "cudagraph")
    settings = {name: value for name, value in OmegaConf.to_container(make_config()).items() if name not in new}
    (tmp_path / FILE).write_text(yaml.safe_dump(settings))
    assert load_config(tmp_path) == make_config()


def test_settings_that_cannot_be_written_leave_the_old_ones(make_config, tmp_path, monkeypatch):
    save_config(make_config("seed=1"), tmp_path)

    def half(path, text, **settings):
        with open(path, "w") as file:
            file.write(text[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        save_config(make_config("seed=2"), tmp_path)
    assert load_config(tmp_path).seed == 1
    assert [path.name for path in tmp_path.glob("*.yaml")] == [FILE]


def test_nothing_in_a_strangers_settings_is_looked_up(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "swordfish")
    text = OmegaConf.to_yaml(make_config(), resolve=True)
    text = text.replace("reader: {}", "reader:\n  names: {rewards: '${oc.env:SECRET}'}\n  list: ['${seed}']")
    (tmp_path / FILE).write_text(text.replace("sampler: uniform", "sampler: ${oc.env:SECRET}"))
    config = load_config(tmp_path)
    resolved = OmegaConf.to_container(config, resolve=True)
    assert resolved["sampler"] == config.sampler == "${oc.env:SECRET}"
    assert resolved["reader"] == {"names": {"rewards": "${oc.env:SECRET}"}, "list": ["${seed}"]}
    save_config(config, tmp_path)
    assert load_config(tmp_path) == config
    assert "swordfish" not in (tmp_path / FILE).read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: [", "config.yaml cannot be read: "),
        ("sed: 1", "config.yaml cannot be read: Key 'sed' not in 'TrainConfig'"),
        ("steps: many", "config.yaml cannot be read: Value 'many'"),
        ("_target_: os.system", "config.yaml cannot be read: Key '_target_' not in 'TrainConfig'"),
        ("a: !!python/object/apply:os.getcwd []", "config.yaml cannot be read: could not determine a constructor"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, text, message):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(RunError) as error:
        load_config(tmp_path)
    assert message in str(error.value)


def test_what_is_no_run_is_refused_and_what_it_holds_is_named(make_config, tmp_path):
    with pytest.raises(RunError, match=r"/none is no run of torchrl-bcq train: there is no .*/none/config.yaml\.$"):
        load_config(tmp_path / "none")
    for seed in ("1", "0"):
        (tmp_path / "sweep" / seed).mkdir(parents=True)
        save_config(make_config(), tmp_path / "sweep" / seed)
    with pytest.raises(RunError, match=r"It holds the runs \['0', '1'\]; name one of them\.$"):
        load_config(tmp_path / "sweep")


# what a resumed run may change


def test_flat_names_every_setting(make_config):
    assert list(flat(make_config())) == list(names(PLAIN))
    assert flat(make_config("optim.vae.kwargs.eps=1"))["optim.vae.kwargs"] == {"eps": 1}


MAY_DIFFER = ["steps=40", "out=elsewhere", "resume=true", "progress_bar=true", "threads=2", "device=cpu", "root=copies"]
MAY_DIFFER += ["evaluation.env=null", "checkpoint.keep=9", "early_stopping.patience=1", "policy.num_action_samples=9"]
MAY_DIFFER += ["dataset=moved.hdf5", "reader.names.rewards=r"]  # it is known by its content
MAY_DIFFER += ["compile=true", "precision=high", "cudagraph=true"]
MAY_DIFFER += ["logger=[]", "logger_kwargs.wandb.project=bcq", "evaluation.reference_scores=[0,1]"]


def test_what_does_not_change_the_networks_may_differ(make_config):
    check_resumable(make_config(*MAY_DIFFER), make_config(), Path("run"))


def test_all_that_differs_is_named_and_nothing_else(make_config):
    differing = ["seed=1", "network.hidden=[9]", "optim.vae.lr=0.5", *MAY_DIFFER]
    with pytest.raises(RunError) as error:
        check_resumable(make_config(*differing), make_config(), Path("run"))
    assert str(error.value) == (
        "run cannot go on with other settings: seed is 0 in it and 1 now; network.hidden is [8] in it and [9] now; "
        "optim.vae.lr is None in it and 0.5 now. Leave them as they were, or begin anew in another folder with "
        "out=FOLDER."
    )


@pytest.mark.parametrize("name", [name for name in names(PLAIN) if name.split(".")[0] in ("network", "loss", "optim")])
def test_each_setting_of_what_learns_must_stay(make_config, name):
    now = make_config()
    value = OmegaConf.select(now, name)
    kinds = {int: 7, float: 0.125, str: "other", list: [3], dict: {"eps": 0.5}, type(None): None}
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    other = kinds[type(plain)] if plain is not None else "9" if name.endswith(("optimizer", "scheduler")) else 9
    OmegaConf.update(now, name, other)
    with pytest.raises(RunError, match=rf"other settings: {name} is "):
        check_resumable(now, make_config(), Path("run"))
