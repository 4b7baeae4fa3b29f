"""What the README shows runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
USAGE, WATCHED, *_RECIPES, OWN_LOOP, HYDRA = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(snippet: str, monkeypatch, tmp_path) -> dict:
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(compile(snippet, "README.md", "exec"), namespace)
    return namespace


def test_usage_snippet(monkeypatch, tmp_path):
    namespace = run(USAGE, monkeypatch, tmp_path)
    rollout = namespace["rollout"]
    assert rollout.batch_size == (200,)
    assert namespace["env"].action_spec.is_in(rollout["action"])
    assert namespace["trainer"].collected_frames == namespace["trainer"].total_frames


@pytest.mark.no_cover  # gradient steps of the author's networks
def test_watched_snippet_goes_on_from_the_first(monkeypatch, tmp_path):
    namespace = run(USAGE + WATCHED, monkeypatch, tmp_path)
    assert namespace["trainer"].collected_frames == 100
    assert {"held_out_td_error", "held_out_loss_vae", "initial_value"} <= namespace["trainer"].metrics.keys()
    assert len(list((tmp_path / "run" / "best").glob("checkpoint-*"))) == 1
    namespace["trainer"].load_from_file("run/checkpoints/checkpoint-000000000100")


def test_parts_of_ones_own_in_sixty_lines(monkeypatch, tmp_path):
    """200 steps with another VAE, other critics, own keys, a plain loop: the critics' error on the data has shrunk."""
    assert (ROOT / "examples" / "own_loop.py").read_text() == OWN_LOOP
    assert OWN_LOOP.count("\n") <= 60
    assert "BCQTrainer" not in OWN_LOOP
    namespace = run(OWN_LOOP, monkeypatch, tmp_path)
    loss, data = namespace["loss"], namespace["data"]
    late = loss.qvalue_loss(data)[0]
    namespace["critics"].reset_parameters_recursive()
    assert late < loss.qvalue_loss(data)[0] / 3
    assert namespace["torque"].abs().max() <= 2


def test_hydra_snippet(monkeypatch, tmp_path):
    namespace = run(HYDRA, monkeypatch, tmp_path)
    trainer = namespace["trainer"]
    assert namespace["env"].action_spec.is_in(namespace["rollout"]["action"])
    assert trainer.loss_module.lmbda == 0.5
    assert trainer.collected_frames == 100


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []
