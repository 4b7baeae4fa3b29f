"""Several loggers at a time, and the log of a resumed run."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from torchrl.record.loggers import mlflow as mlflow_logger

from torchrl_bcq.errors import RunError
from torchrl_bcq.runs import loggers as module
from torchrl_bcq.runs.loggers import Loggers, make_loggers, trim_log


class Notebook:
    """A logger that remembers its arguments and all calls."""

    def __init__(self, *arguments, **settings):
        self.made_with, self.lines, self.closed = (arguments, settings), [], False
        self.loaded = None

    def log_scalar(self, name, value, step=None):
        self.lines.append((name, value, step))

    def log_hparams(self, settings):
        self.lines.append(settings)

    def state_dict(self):
        return {"id": self.made_with[0]}

    def load_state_dict(self, state):
        self.loaded = state

    def close(self):
        self.closed = True


def read(file) -> list[tuple[int, float]]:
    return [(int(step), float(value)) for step, value in (line.split(",") for line in file.read_text().splitlines())]


def test_scalars_are_lines_of_a_file(tmp_path):
    loggers = make_loggers(["csv"], tmp_path, {})
    for step in (5, 10):
        loggers.log_scalar("loss_vae", step / 4, step=step)
    loggers.log_scalar("return", -1.0, step=10)
    loggers.close()
    assert (tmp_path / "log/scalars/loss_vae.csv").read_text() == "5,1.25\n10,2.5\n"
    assert (tmp_path / "log/scalars/return.csv").read_text() == "10,-1.0\n"


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:google")
def test_csv_and_tensorboard_log_the_same(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = make_loggers(["csv", "tensorboard"], tmp_path, {})
    for step in range(5, 50, 5):
        loggers.log_scalar("loss_vae", step / 3, step=step)
    loggers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss_vae")
    written = read(tmp_path / "log/scalars/loss_vae.csv")
    assert [event.step for event in events] == [step for step, _ in written]
    assert [event.value for event in events] == pytest.approx([value for _, value in written], rel=1e-6)  # float32


def test_without_a_kind_there_is_no_logger(tmp_path):
    assert make_loggers([], tmp_path, {}) is None
    assert list(tmp_path.iterdir()) == []


def test_the_same_kind_is_made_once(tmp_path):
    assert list(make_loggers(["csv", "csv"], tmp_path, {}).loggers) == ["csv"]


UNKNOWN = "there is no logger 'disk'; choose from ['csv', 'tensorboard', 'wandb', 'mlflow', 'trackio']."


@pytest.mark.parametrize(
    ("kinds", "settings", "message"),
    [
        (["csv", "disk"], {}, UNKNOWN),
        ([], {"disk": {}}, UNKNOWN),
        (["csv"], {"csv": {"x": 1}}, "logger_kwargs.csv is {'x': 1}, expected no arguments."),
        (["csv"], {"wandb": 1}, "logger_kwargs.wandb is 1, expected arguments as logger_kwargs.wandb.NAME=VALUE."),
    ],
)
def test_an_unknown_logger_is_refused(tmp_path, kinds, settings, message):
    with pytest.raises(RunError) as error:
        make_loggers(kinds, tmp_path, settings)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (ImportError("no module"), "the package of logger wandb is missing (no module); run pip install wandb."),
        (TypeError("unexpected 'projct'"), "logger wandb rejects the arguments {'projct': 1}: unexpected 'projct'"),
    ],
)
def test_the_reason_why_a_logger_cannot_be_made_is_given(tmp_path, monkeypatch, raised, message):
    def fail(*arguments, **settings):
        raise raised

    monkeypatch.setattr(module, "get_logger", fail)
    with pytest.raises(RunError) as error:
        make_loggers(["wandb"], tmp_path, {"wandb": {"projct": 1}})
    assert str(error.value) == message


@pytest.mark.parametrize("missing", ["wandb", "mlflow", "trackio"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed, whether it is or not
    with pytest.raises(
        RunError, match=rf"^the package of logger {missing} is missing .*; run pip install {missing}\.$"
    ):
        make_loggers([missing], tmp_path, {})


def test_a_resumed_run_appends_to_its_wandb_run(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "get_logger", Notebook)

    def settings(folder, **own):
        made = make_loggers(["wandb"], folder, {"wandb": own}).loggers["wandb"].made_with
        assert made[0] == ("wandb", str(folder / "wandb"), folder.name)
        return made[1]["wandb_kwargs"]

    first = settings(tmp_path / "a", project="bcq")
    assert first["project"] == "bcq"
    assert first["resume"] == "allow"
    assert first["id"].startswith("a-")
    monkeypatch.chdir(tmp_path)
    assert settings(tmp_path / "a", project="bcq") == first
    (tmp_path / "sweep").mkdir()
    assert settings(tmp_path / "sweep" / "a")["id"] != first["id"]
    assert settings(tmp_path / "a", id="mine", resume="never") == {"id": "mine", "resume": "never"}


def test_all_loggers_get_all_scalars_and_some_the_settings():
    loggers = Loggers({"csv": Notebook(), "wandb": Notebook(), "tensorboard": Notebook()})
    loggers.log_scalar("return", 1.5, step=5)
    loggers.log_hparams({"seed": 0})
    loggers.close()
    lines = {kind: logger.lines for kind, logger in loggers.loggers.items()}
    scalar = ("return", 1.5, 5)
    assert lines == {"csv": [scalar], "tensorboard": [scalar], "wandb": [scalar, {"seed": 0}]}
    assert all(logger.closed for logger in loggers.loggers.values())


def test_a_service_that_fails_is_reported_once_and_does_not_end_the_run(caplog):
    local, service = Mock(), Mock()
    for name in ("log_scalar", "log_hparams", "close"):
        getattr(service, name).side_effect = ConnectionError("no route")
    loggers = Loggers({"mlflow": service, "csv": local})
    loggers.log_hparams({"seed": 0})
    for step in (1, 2):
        loggers.log_scalar("loss", 1.0, step)
    loggers.close()
    assert [call.args[0] for call in local.log_scalar.call_args_list] == ["loss", "loss"]
    local.close.assert_called_once()
    assert caplog.messages == ["logger mlflow fails, so its log has gaps: ConnectionError('no route')"]
    local.log_scalar.side_effect = OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        loggers.log_scalar("loss", 1.0, 3)


def test_loggers_are_closed_if_a_later_one_cannot_be_made(tmp_path, monkeypatch):
    first = Mock()
    made = iter([first])
    monkeypatch.setattr("torchrl_bcq.runs.loggers._make_logger", lambda *_: next(made, None) or int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        make_loggers(["wandb", "mlflow"], tmp_path, {})
    first.close.assert_called_once()


def test_state_is_restored_by_kind_of_logger():
    first = Loggers({"csv": Notebook("a"), "wandb": Notebook("b"), "mlflow": Notebook("c")})
    state = first.state_dict()
    assert set(state) == {"wandb", "mlflow"}
    second = Loggers({"csv": Notebook(), "wandb": Notebook(), "trackio": Notebook()})
    second.load_state_dict({**state, "local": {}})
    assert [logger.loaded for logger in second.loggers.values()] == [None, {"id": ("b",)}, None]


def test_another_run_of_a_service_is_told(caplog):
    """TorchRL's logger of W&B refuses the state of a run with another id, such as that of a folder that was moved."""

    class Refuses(Notebook):
        def load_state_dict(self, state):
            raise RuntimeError("another run")

    Loggers({"wandb": Refuses("new")}).load_state_dict({"wandb": {"id": "old"}})
    (message,) = caplog.messages
    assert message.startswith("wandb continues in another run of its service (another run); ")
    assert message.endswith("set logger_kwargs.wandb.id=old")
    with pytest.raises(RuntimeError, match="another run"):
        Loggers({"wandb": Refuses("new")}).load_state_dict({"wandb": {}})


def test_the_csv_log_does_not_grow_in_memory(tmp_path):
    logger = make_loggers(["csv"], tmp_path, {}).loggers["csv"]
    for step in range(1000):
        logger.log_scalar("loss_vae", step, step=step)
    assert [len(values) for values in logger.experiment.scalars.values()] == [0]
    assert sys.getsizeof(logger.experiment.scalars["loss_vae"]) < 1000
    assert len(read(tmp_path / "log/scalars/loss_vae.csv")) == 1000
    logger.close()


# the log of a resumed run


@pytest.fixture
def scalars(tmp_path):
    folder = tmp_path / "log" / "scalars"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("text", "step", "expected"),
    [
        ("5,1.5\n10,2.5\n15,3.5\n", 10, "5,1.5\n10,2.5\n"),
        ("5,1.5\n10,2.5\n15,3.5\n", 12, "5,1.5\n10,2.5\n"),
        ("5,1.5\n10,2.5\n1", 10, "5,1.5\n10,2.5\n"),  # cut off within a line: it could be any step
        ("5,1.5\n10,2.5\n15,", 20, "5,1.5\n10,2.5\n"),
        ("5,1.5\n10,2", 20, "5,1.5\n"),
        ("0,-1e-05\n5,nan\n", 5, "0,-1e-05\n5,nan\n"),
        ("0,1.5\n5,1.5\n", -1, ""),
        ("15,1.5\n", 10, ""),
        ("", 10, ""),
    ],
)
def test_lines_after_the_checkpoint_and_cut_off_lines_are_removed(scalars, tmp_path, text, step, expected):
    (scalars / "loss_vae.csv").write_text(text)
    (scalars / "return.csv").write_text("0,1.0\n")
    trim_log(tmp_path, step)
    assert (scalars / "loss_vae.csv").read_text() == expected
    assert (scalars / "return.csv").read_text() == ("0,1.0\n" if step >= 0 else "")
    assert sorted(path.name for path in scalars.iterdir()) == ["loss_vae.csv", "return.csv"]


def test_a_complete_log_is_not_touched(scalars, tmp_path):
    file = scalars / "return.csv"
    file.write_text("0,1.0\n5,1.0\n")
    file.chmod(0o444)
    before = file.stat()
    trim_log(tmp_path, 5)
    trim_log(tmp_path / "none", 5)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_later_lines_are_appended(scalars, tmp_path):
    (scalars / "return.csv").write_text("0,1.0\n5,2.0\n10,3")
    trim_log(tmp_path, 0)
    loggers = make_loggers(["csv"], tmp_path, {})
    loggers.log_scalar("return", 4.0, step=5)
    loggers.close()
    assert (scalars / "return.csv").read_text() == "0,1.0\n5,4.0\n"


def test_a_line_that_is_no_step_and_value_is_refused(scalars, tmp_path):
    (scalars / "return.csv").write_text("0,1.0\nabc,def\n")
    with pytest.raises(RunError, match=r"line 2 of .*return.csv is 'abc,def', expected STEP,VALUE; remove this line"):
        trim_log(tmp_path, 5)


@pytest.mark.parametrize("settings", [{}, {"tracking_uri": "http://server"}])
def test_mlflow_writes_to_a_database_and_its_run_ends(tmp_path, monkeypatch, settings):
    """New versions of MLflow refuse plain files, and a second run in one process while a run is active."""
    calls = []
    fake = SimpleNamespace(
        set_tracking_uri=calls.append,
        get_experiment_by_name=lambda name: None,
        create_experiment=lambda **experiment: calls.append(experiment) or "1",
        start_run=lambda experiment_id: SimpleNamespace(),
        end_run=lambda: calls.append("ended"),
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setattr(mlflow_logger, "_has_mlflow", True)
    make_loggers(["mlflow"], tmp_path, {"mlflow": settings}).close()
    uri, experiment, *rest = calls
    assert uri == settings.get("tracking_uri", f"sqlite:///{tmp_path}/mlflow.db")
    assert experiment == {"name": tmp_path.name, "artifact_location": f"file://{tmp_path}/mlflow", "tags": None}
    assert rest == ["ended"]
