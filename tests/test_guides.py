"""What README and guides show runs as printed; commands run on small data, with small networks and few steps."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
import torch

from torchrl_bcq.__main__ import main
from torchrl_bcq.evaluation import recording
from torchrl_bcq.runs.algorithms import ALGORITHMS
from torchrl_bcq.runs.settings import load_settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "examples" / "guides").glob("*.md"))]
BLOCKS = {page.stem: re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE) for page in PAGES}
OUTPUTS = {"text", "bibtex", "mermaid"}
FAST = ["steps=4", "log_interval=2", "evaluation.interval=4", "evaluation.episodes=1", "checkpoint.interval=4"]
SMALL = ["network.hidden=[8]", "network.vae_hidden=[8]", "baseline=null", "checkpoint.wait_for=0"]


def python_of(name: str) -> list[str]:
    return [code for kind, code in BLOCKS[name] if kind == "python"]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with the files that the pages name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setitem(ALGORITHMS, "absolute", ALGORITHMS["cloning"])  # a page sets it; the test deletes it
    rng = np.random.default_rng(0)
    for name, width in (("hopper", 3), ("trips", 2), ("first", 3), ("second", 3)):
        with h5py.File(f"{name}.hdf5", "w") as file:
            file["observations"], file["next_observations"] = rng.normal(size=(2, 60, width))
            file["actions"], file["rewards"] = rng.uniform(-1, 1, (60, 1)), rng.normal(size=60)
            file["terminals"], file["timeouts"] = np.zeros(60), np.arange(60) % 10 == 9
    with h5py.File("choices.hdf5", "w") as file:
        file["observations"], file["next_observations"] = rng.normal(size=(2, 60, 4))
        file["actions"], file["rewards"] = np.arange(60) % 2, rng.normal(size=60)
        file["terminals"], file["timeouts"] = np.arange(60) % 10 == 9, np.zeros(60)
    with h5py.File("game.hdf5", "w") as file:
        file["observations"] = rng.integers(0, 256, (60, 36, 36), dtype=np.uint8)
        file["actions"], file["rewards"] = np.arange(60) % 3, rng.normal(size=60)
        file["terminals"], file["timeouts"] = np.arange(60) % 10 == 9, np.zeros(60)
    rows = [",".join(map(str, [*rng.uniform(size=4).round(3), int(i % 10 == 9), i // 10])) for i in range(60)]
    Path("trips.csv").write_text("\n".join(["x,v,force,r,crashed,trip", *rows]))
    return tmp_path


def test_every_block_is_of_a_kind_that_is_tested():
    assert len(PAGES) == 13
    assert {kind for blocks in BLOCKS.values() for kind, _ in blocks} <= {"python", "bash"} | OUTPUTS


def commands_of(name: str) -> list[list[str]]:
    text = "\n".join(code for kind, code in BLOCKS[name] if kind == "bash").replace("\\\n", " ")
    lines = [part for line in text.splitlines() for part in line.split(" && ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # PyTorch's, 2.13
@pytest.mark.parametrize("name", BLOCKS)
def test_commands(name, place, monkeypatch, capsys):
    whole = recording.record_swing_up
    monkeypatch.setattr(recording, "record_swing_up", lambda: whole(600))
    recording.record_default()
    if name in ("training", "use_the_policy"):  # their commands use the run of the README
        assert main(["train", "out=runs/first", "dataset=hopper.hdf5", "evaluation.env=null", *FAST, *SMALL]) == 0
    for number, (program, *words) in enumerate(commands_of(name)):
        if program == "python":
            file = words[0]
            assert file == "-m" or (ROOT / file).is_file(), f"there is no {file}"
            continue
        assert program == "torchrl-bcq"
        if words[0] == "train" and not {"--help", "--cfg"} & set(words):
            if not any(word.startswith(("out=", "resume=")) for word in words):
                words.append(f"out=runs/{number}")  # the default is the time in seconds, and tests are fast
            discrete = name == "discrete_actions"
            small = [word for word in SMALL if not (discrete and "vae" in word)]
            small += ["evaluation.fqe_steps=4"] if "checkpoint.monitor=fqe" in words else []
            no_download = ["--cfg", "algorithm=bcq"]
            words += no_download if "mujoco" in str(words) else [*FAST, *small]
        has_env = name not in ("training", "use_the_policy")
        words += ["--episodes", "2"] if words[0] == "rank" or (words[0] == "evaluate" and has_env) else []
        words += ["--steps", "2"] if words[0] == "rank" else []
        words += ["--steps", "200", "--overwrite"] if words[0] == "record" else []
        assert main(words) == 0, (words, capsys.readouterr().err)


def run(name: str, **namespace) -> dict:
    """Run the Python of a page, one block after another."""
    for code in python_of(name):
        exec(compile(code, f"{name}.md", "exec"), namespace)
    return namespace


def test_python_of_the_readme(place):
    found = run("README")
    assert found["action"].shape == (1,)
    assert abs(found["action"]) <= 2
    assert len(found["loss"].qvalue_network.critics) == 4


def test_a_trainer_with_checkpoints(place):
    trainer = run("training")["trainer"]
    assert trainer.collected_frames == 100
    assert {"held_out_td_error", "held_out_loss_vae", "initial_value", "success"} <= trainer.metrics.keys()
    assert len(list((place / "run" / "best").glob("checkpoint-*"))) == 1
    trainer.load_from_file("run/checkpoints/checkpoint-000000000100")


@pytest.mark.filterwarnings(
    "ignore:'observation'.*training data", "ignore:.torch.jit::torch", "ignore::torch.jit.TracerWarning"
)
def test_use_of_a_policy(place):
    assert main(["train", "out=runs/first", "dataset=hopper.hdf5", "evaluation.env=null", *FAST, *SMALL]) == 0
    assert main(["export", "runs/first", "policy.onnx"]) == 0
    found = run("use_the_policy")
    assert (found["actions"].shape, found["rollout"].batch_size) == ((64, 1), (100,))
    assert found["exported"].contract["dataset"] == "hopper.hdf5"
    assert (found["full"].num_action_samples, found["fewer"].num_action_samples) == (100, 10)
    torch.testing.assert_close(found["traced"](torch.zeros(7, 3))[0], found["action"])


def test_discrete_actions(place):
    found = run("discrete_actions")
    assert found["trainer"].collected_frames == 100
    assert found["rollout"]["action"].dtype == torch.int64
    assert found["chosen"]["candidates"].shape == (2,)


def test_an_estimate_without_an_environment(place):
    assert run("no_simulator")["estimate"].verdict


def test_parts_of_ones_own(place):
    """200 steps with another VAE, other critics, own keys, a plain loop: the critics' error on the data has shrunk."""
    own_loop, *_ = python_of("own_parts")
    assert (ROOT / "examples" / "own_loop.py").read_text() == own_loop
    assert own_loop.count("\n") <= 60
    found: dict = {}
    exec(compile(own_loop, "own_loop.py", "exec"), found)
    late = found["loss"].qvalue_loss(found["data"])[0]
    found["critics"].reset_parameters_recursive()
    assert late < found["loss"].qvalue_loss(found["data"])[0] / 3
    assert found["torque"].abs().max() <= 2


def test_an_objective_of_ones_own(place):
    _, slices, code, registration = python_of("own_parts")
    found: dict = {}
    exec(compile(slices, "own_parts.md", "exec"), found)
    assert found["trainer"].collected_frames == 2
    exec(compile(code, "own_parts.md", "exec"), found)
    assert found["policy"](torch.tensor([1.0, 0.0, 0.0])).shape == (1,)
    exec(compile(registration, "own_parts.md", "exec"), found)
    words = ["dataset=hopper.hdf5", "algorithm=absolute", "loss.scale=2", "network.hidden=[8]", "out=run", *FAST]
    assert main(["train", *words]) == 0
    assert load_settings(Path("run")).loss.scale == 2
    assert main(["evaluate", "run"]) == 0


def test_hydra(place):
    found = run("command_line")
    assert found["env"].action_spec.is_in(found["rollout"]["action"])
    assert found["trainer"].loss_module.lmbda == 0.5
    assert found["trainer"].collected_frames == 100


def test_batches_of_your_data(place):
    """The recipes for d3rlpy and Tianshou are tested with the readers."""
    imports, *_, code = python_of("your_data")
    found: dict = {}
    exec(compile(imports + code, "your_data.md", "exec"), found)
    assert len(found["rest"]) == 10  # one of the six episodes
    assert not found["held_out"][found["buffer"].sample()["index"]].any()
    assert found["three"]["steps_to_next_obs"].unique().tolist() == [1, 2, 3]


def test_training_on_your_data(place):
    imports, training, *_ = python_of("your_data")
    found: dict = {}
    exec(compile(imports + training, "your_data.md", "exec"), found)
    assert found["actions"].shape == (5, 1)


def test_a_recording_of_a_vector_environment_of_your_data():
    """Within an episode, each next observation is the observation of the next row; the rows of the resets are gone."""
    imports, *codes = python_of("your_data")
    (code,) = [code for code in codes if "swapaxes" in code]
    envs, fields = gymnasium.make_vec("CartPole-v1", 3, max_episode_steps=15), defaultdict(list)
    state, _ = envs.reset(seed=0)
    envs.action_space.seed(0)
    for _ in range(80):
        action = envs.action_space.sample()
        following, reward, terminated, truncated, _ = envs.step(action)
        steps = (state, action, reward, terminated, truncated, following)
        names = ("observations", "actions", "rewards", "terminated", "truncated", "next_observations")
        for name, value in zip(names, steps, strict=True):
            fields[name].append(np.array(value))
        state = following
    found = {name: np.stack(values) for name, values in fields.items()}  # [T, E, ...]
    resets = (found["terminated"] | found["truncated"])[:-1].sum()
    assert min(found["terminated"].sum(), found["truncated"].sum()) > 0
    exec(compile(imports + code, "your_data.md", "exec"), found)
    rows = found["transitions"]
    assert len(rows) == 240 - resets
    inside = ~rows["next", "done"][:-1, 0]
    assert torch.equal(rows["next", "observation"][:-1][inside], rows["observation"][1:][inside])
    assert not torch.equal(rows["next", "observation"][:-1], rows["observation"][1:])


def test_frames_of_your_data():
    imports, *codes = python_of("your_data")
    (code,) = [code for code in codes if "film" in code]
    found: dict = {}
    exec(compile(imports + code, "your_data.md", "exec"), found)
    assert found["batch"]["observation"].shape == (8, 4, 48, 48)
    assert found["actor"](found["batch"])["action"].shape == (8, 1)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
