"""The settings of a run: defaults, overrides, and the settings file in the run's folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from shlex import quote
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from torchrl.trainers import EarlyStopping

from torchrl_bcq.data import make_replay_buffer
from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation import DatasetMetrics, FQEMetrics
from torchrl_bcq.files import write_whole
from torchrl_bcq.functional import change_reward
from torchrl_bcq.runs.actions import suitable_algorithm
from torchrl_bcq.runs.algorithms import ALGORITHMS, algorithms_of, find_algorithm
from torchrl_bcq.runs.optimizers import make_optimizer, make_scheduler, optim_settings
from torchrl_bcq.runs.overrides import check_name, check_reader, read_words, set_value
from torchrl_bcq.runs.signatures import Settings, make_section, settings_of
from torchrl_bcq.trainers import KeepBest, OfflineTrainer
from torchrl_bcq.version import __version__

AUTO = "auto"  # value of algorithm: chosen by the actions of the dataset
FILE = "config.yaml"  # name of the settings file in the folder of a run
# a resumed run may change these settings, but neither the contents of the dataset nor the bounds of the actions
FREE = {"steps", "out", "resume", "progress_bar", "threads", "device", "root", "dataset", "reader", "compile",
        "precision", "cudagraph", "baseline", "evaluation", "checkpoint", "early_stopping", "logger", "logger_kwargs",
        "policy", "action_low", "action_high", "n_actions"}  # fmt: skip
_CONTINUOUS: Settings = {"action_low": (Any, None), "action_high": (Any, None), "action_clip": (bool, False)}
_DISCRETE: Settings = {"n_actions": (int | None, None)}


def default_settings(algorithm: str = "bcq") -> DictConfig:
    """Return the default settings of a run; if a setting is changed, OmegaConf checks its name and type.

    Settings of networks, loss, policy, optimizers and trainer are read from the signatures of the code that uses them.
    """
    record = find_algorithm(algorithm)
    networks = [name.removesuffix("_network") for name in record.loss.network_arguments()]
    of_loss = settings_of(record.loss)
    settings: Settings = {
        "algorithm": (str, algorithm),
        "baseline": (str | None, None),
        "dataset": (Any, MISSING),  # a name or a list of names
        "reader": (dict[str, Any], {}),
        "root": (str | None, None),
        **(_DISCRETE if record.discrete else _CONTINUOUS),
        "sampler": (str, "uniform"),
        "weights": (str | None, None),
        "reward": settings_of(change_reward),
        "stack": (int, 1),
        "n_step": (int, 1),
        "normalize": (bool, False),
        "held_out": (float, 0.0),
        "steps": (int, 1_000_000),
        **settings_of(make_replay_buffer, "batch_size"),
        "seed": (int, 0),
        "device": (str, "auto"),
        "threads": (int | str | None, "auto"),
        "average_decay": (float | None, None),
        "compile": (bool, False),
        **settings_of(OfflineTrainer, "precision", "cudagraph"),
        "network": settings_of(record.make_modules),
        "loss": {
            **settings_of(record.loss.make_value_estimator),
            **of_loss,
            **(settings_of(record.make_updater) if record.make_updater else {}),
        },
        "optim": optim_settings(networks, make_optimizer, make_scheduler) | settings_of(OfflineTrainer, "clip_norm"),
        "policy": {name: setting for name, setting in settings_of(record.policy).items() if name not in of_loss},
        "evaluation": {
            "interval": (int, 5_000),
            "env": (str | None, "auto"),
            "env_kwargs": (dict[str, Any], {}),
            "max_episode_steps": (int | None, None),
            "observation": (list[str] | None, None),
            "episodes": (int, 10),
            "seed": (int, 1_000),
            "reference_scores": (Any, "auto"),
            **settings_of(DatasetMetrics, "max_rows"),
            **settings_of(FQEMetrics, "fqe_steps"),
        },
        **settings_of(OfflineTrainer, "log_interval"),
        "logger": (list[str], ["csv"]),
        "logger_kwargs": (dict[str, Any], {}),
        "progress_bar": (bool | None, None),
        "checkpoint": {
            "interval": (int, 5_000),
            "keep": (int, 2),
            "monitor": (str | None, "auto"),
            "mode": (str, "auto"),
            **settings_of(KeepBest, "wait_for"),
        },
        "early_stopping": {
            "monitor": (str | None, None),
            "mode": (str, "auto"),
            **settings_of(EarlyStopping, "patience", "min_delta"),
            **settings_of(KeepBest, "wait_for"),
            "threshold": (float | None, None),
        },
        "out": (str, "runs/${now:%Y%m%d-%H%M%S}"),
        "init_from": (str | None, None),
        "resume": (bool, False),
    }
    made = OmegaConf.structured(make_section("Settings", settings))
    for name, value in record.defaults.items():
        OmegaConf.update(made, name, value)
    return made


def compose(overrides: Sequence[str], *, sweep: bool = False) -> list[DictConfig]:
    """Return the settings of each run, made from overrides in Hydra's syntax, such as ``"optim.lr=3e-4"``.

    With ``resume=RUN``, the settings of that run replace the defaults. If ``sweep`` is True, a setting may have several
    values, such as ``"seed=0,1"``. Then each combination of values is a run in a numbered subfolder of ``out``.

    Raises:
        RunError: if a setting is unknown, has the wrong type, or has several values although ``sweep`` is False.
        DatasetError, OSError, ImportError: if the dataset must be read to choose the algorithm, and cannot be read.
    """
    chosen = read_words(overrides, _texts(tuple(ALGORITHMS)), sweep=sweep)
    runs = [_override(values) for values in chosen]
    if sweep:
        if isinstance(resumed := chosen[0].get("resume"), str):
            raise RunError(f"resume={resumed} continues one run, so it cannot be used with -m; leave out -m.")
        out = Path(runs[0].out)
        if len({values.get("out") for values in chosen}) > 1:
            raise RunError(f"out has several values; a sweep needs one folder, such as out={out}.")
        for number, run in enumerate(runs):
            run.out = str(out / str(number))
    return runs


def _override(values: dict[str, Any]) -> DictConfig:
    """Return the default settings, or those of a resumed run, changed by the overrides ``values``."""
    resumed = values.get("resume", False)
    if resumed is None or isinstance(resumed, bool):
        name = str(values.get("algorithm", AUTO))
        settings = default_settings(suitable_algorithm(values) if name == AUTO else name)
        values.pop("algorithm", None)
    else:
        settings = load_settings(Path(str(resumed)))
        if (asked := values.pop("algorithm", AUTO)) not in (AUTO, settings.algorithm):
            raise RunError(f"{resumed} is a run of algorithm {settings.algorithm}, not {asked}; start a new run.")
        if values.get("init_from", settings.init_from) != settings.init_from:
            raise RunError(f"init_from starts a new run, but resume={resumed} continues a run; set only one of them.")
        if Path(str(values.get("out", resumed))) != Path(str(resumed)):
            raise RunError(f"resume={resumed} continues in this folder; for a new run in out, use init_from={resumed}.")
        values = {**values, "out": str(resumed), "resume": True}
    known = flat(settings)
    free = tuple(f"{name}." for name, value in known.items() if isinstance(value, dict))  # these accept any name
    for name, value in values.items():
        if not (isinstance(value, dict) or name.startswith(free)):
            _check_name(name, [*known], settings.algorithm)
        try:
            set_value(settings, name, value, merge=value != {} or f"{name}." not in free)  # {} empties it
        except (ConfigAttributeError, ConfigKeyError) as error:
            _check_name(str(error.full_key or name), [*known], settings.algorithm)
            raise
    _as_text(OmegaConf.to_container(settings))  # raises a RunError if the settings contain `_target_`
    try:
        OmegaConf.to_container(settings, resolve=True)
    except OmegaConfBaseException as error:
        found = str(error).splitlines()[0]
        raise RunError(f"{error.full_key} cannot be read: {found}; write $ as \\$ if the text has one.") from error
    if not OmegaConf.is_missing(settings, "dataset"):
        settings.reader = check_reader(settings.dataset, OmegaConf.to_container(settings.reader))  # type: ignore[arg-type]
    return settings


def _check_name(name: str, known: Sequence[str], algorithm: str) -> None:
    """Raise a RunError if a setting is unknown. The error names the algorithms that have it."""
    if name in known:
        return
    discrete = find_algorithm(algorithm).discrete
    same, others = (
        [other for other in algorithms_of(kind) if name in flat(default_settings(other))]
        for kind in (discrete, not discrete)
    )
    if same or others:
        actions = "" if same else f", for {'discrete' if discrete else 'continuous'} actions"
        raise RunError(
            f"{name} is a setting of {' and '.join(same or others)}, but this run has algorithm={algorithm}{actions}; "
            f"leave {name} out."
        )
    check_name(name, known)


@cache
def _texts(algorithms: tuple[str, ...]) -> set[str]:
    """Return the names of the algorithms' settings that are text, or text or null."""

    def names(section: Any, at: str) -> Iterator[str]:
        for field in fields(section):
            if is_dataclass(field.type):
                yield from names(field.type, f"{at}{field.name}.")
            elif field.type in (str, str | None):
                yield f"{at}{field.name}"

    return {"dataset", "resume"}.union(*(names(OmegaConf.get_type(default_settings(name)), "") for name in algorithms))


def load_settings(run: Path) -> DictConfig:
    """Read and check the settings in the folder of a run; raises a RunError if the folder is not a run."""
    file = run / FILE
    if not file.is_file():
        found = sorted(path.parent.name for path in run.glob(f"*/{FILE}"))
        inside = f" It contains the runs {found}; choose one of them." if found else ""
        raise RunError(f"{run} is not a run of torchrl-bcq train: there is no {file}.{inside}")
    try:
        plain = OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")))
    except Exception as error:  # the YAML parser and OmegaConf raise errors of many kinds
        reason = str(error).splitlines()[0]
        raise RunError(f"{file} cannot be read: {reason}; restore it, or train the run again.") from error
    return to_settings(plain, file)


def save_settings(settings: DictConfig, run: Path) -> None:
    """Write the settings into the folder of a run."""
    with write_whole(run / FILE) as file:
        file.write_text(OmegaConf.to_yaml(OmegaConf.create(to_plain(settings))), encoding="utf-8")


def to_plain(settings: DictConfig) -> dict[str, Any]:
    """Convert the settings to plain values, and add the version of this package."""
    return {"version": __version__, **OmegaConf.to_container(settings, resolve=True)}  # type: ignore[dict-item]


def to_settings(plain: Any, where: str | Path) -> DictConfig:
    """Check plain values from a file or a checkpoint (see ``to_plain``), and convert them to settings.

    Nothing in the plain values is executed, imported or resolved. ``where`` is the path of the file or the checkpoint,
    for error messages.

    Raises:
        RunError: if another version of this package made the values, if the values contain a ``_target_``, or if a name
            or a type is wrong.
    """
    if not plain or not isinstance(plain, dict):
        raise RunError(f"{where} is empty or damaged; restore it, or train the run again.")
    found, present = str(plain.get("version", "0.1")), __version__
    if found.split(".")[:2] != present.split(".")[:2]:
        raise RunError(
            f"{where} was made by torchrl-bcq {found}, but this is version {present}; use a checkout of version "
            f"{found}, or train the run again."
        )
    try:
        values = _as_text({name: value for name, value in plain.items() if name != "version"})
        settings = default_settings(str(values.get("algorithm", "bcq")))
        return OmegaConf.merge(settings, OmegaConf.create(values))  # type: ignore[return-value]
    except Exception as error:  # _as_text raises RunError; OmegaConf raises many classes of errors
        raise RunError(f"{where} cannot be read: {str(error).splitlines()[0]}") from error


def _as_text(value: Any, at: str = "") -> Any:
    """Return ``value`` with each ``${`` escaped; raise a RunError if it has keys such as ``_target_``."""
    if isinstance(value, str):
        return value.replace("${", "\\${")
    if isinstance(value, list):
        return [_as_text(item, f"{at}{number}.") for number, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if special := [name for name in value if re.fullmatch(r"_\w+_", str(name))]:
        raise RunError(f"{at}{special[0]} is refused, because names of the form _NAME_ can run code; remove it.")
    return {name: _as_text(item, f"{at}{name}.") for name, item in value.items()}


def flat(settings: DictConfig) -> dict[str, Any]:
    """Return a flat dict of the settings whose keys are dotted names, such as ``loss.gamma``."""
    leaves: dict[str, Any] = {}
    for name in settings:
        value: Any = None if OmegaConf.is_missing(settings, name) else settings[name]
        if OmegaConf.is_dict(value) and is_dataclass(OmegaConf.get_type(value)):
            leaves |= {f"{name!s}.{key}": leaf for key, leaf in flat(value).items()}
        else:
            leaves[str(name)] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return leaves


def check_resumable(now: DictConfig, saved: DictConfig, run: Path) -> None:
    """Raise a RunError that lists the changed settings, if a resumed run must not change them."""
    remedy = "start a new run in another folder with out=FOLDER"
    if now.algorithm != saved.algorithm:
        raise RunError(f"{run} is a run of algorithm {saved.algorithm}, not {now.algorithm}; {remedy}.")
    then, asked = flat(saved), flat(now)
    differing = [name for name in asked if asked[name] != then[name] and name.split(".")[0] not in FREE]
    if differing:
        changes = "; ".join(f"{name} was {then[name]!r} and is now {asked[name]!r}" for name in differing)
        found = f"{run} cannot be resumed with changed settings: {changes}"
        old = f"To resume the run with its saved settings: torchrl-bcq train {quote(f'resume={run}')}"
        raise RunError(f"{found}. {old}. Or {remedy}; add {quote(f'init_from={run}')} to start with its networks.")
