"""``torchrl-bcq export``: what it writes, prints and refuses."""

from __future__ import annotations

import numpy as np
import pytest

from torchrl_bcq import ExportedPolicy, load_hdf5, load_policy
from torchrl_bcq.__main__ import main

from ..small_runs import ROWS


def test_export_of_a_run(words, run, file, tmp_path, capsys):
    assert main(["train", *words("normalize=true")]) == 0
    capsys.readouterr()
    out = tmp_path / "robot" / "policy.onnx"
    assert main(["export", str(run), str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"20 gradient steps on {file}" in printed
    assert "input   observation: float32 [batch, 3]" in printed
    assert "output  action: float32 [batch, 1], from [-2.0] to [2.0]" in printed
    assert "checked with 1, 3 and 257 states of the dataset: largest difference from the policy " in printed
    assert f"The policy is in {out} (" in printed
    exported, rows = ExportedPolicy(out), load_hdf5(file)["observation"]
    contract = exported.contract
    assert (contract["algorithm"], contract["dataset"], contract["step"]) == ("BCQ", str(file), 20)
    for end, values in (("low", rows.amin(0)), ("high", rows.amax(0))):
        np.testing.assert_array_equal(np.float32(contract["inputs"][0][end]), values)
    found, expected = exported.act(rows), load_policy(run).act(rows)
    assert found.shape == (ROWS, 1)
    assert np.isclose(found, expected, atol=1e-4).mean() > 0.98  # rounding may choose another candidate


def test_options(words, run, tmp_path, capsys):
    assert main(["train", *words()]) == 0
    out = tmp_path / "policy.onnx"
    assert main(["export", str(run), str(out), "--value", "--candidates", "--latents", "--checkpoint", "last"]) == 0
    outputs = ExportedPolicy(out)(np.zeros((2, 3)))
    shapes = {name: value.shape for name, value in outputs.items()}
    candidates = {"candidates": (2, 5, 1), "action_value": (2, 5)}
    assert shapes == {"action": (2, 1), "chosen_action_value": (2, 1), **candidates}
    assert "input   latents: float32 [batch, 5, 2]" in capsys.readouterr().out


@pytest.mark.parametrize("algorithm", ["cloning"])
def test_options_that_a_policy_lacks(words, run, tmp_path, capsys, algorithm):
    assert main(["train", *words(algorithm=algorithm)]) == 0
    for option, message in (
        ("--value", "a policy of cloning has no values or candidates; leave out these options."),
        ("--latents", "a policy of cloning has no latents; leave out --latents."),
    ):
        assert main(["export", str(run), str(tmp_path / "policy.onnx"), option]) == 1
        assert message in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "policy.onnx")]) == 0


def test_history(words, run, file, tmp_path):
    assert main(["train", *words("stack=3")]) == 0
    out = tmp_path / "policy.onnx"
    assert main(["export", str(run), str(out)]) == 0
    exported, policy = ExportedPolicy(out), load_policy(run)
    rows = load_hdf5(file)["observation"][:3].numpy()
    for number, row in enumerate(rows):
        last = rows[[max(0, number - 2), max(0, number - 1), number]]
        np.testing.assert_allclose(exported.act(row), policy.act(last.flatten()), atol=1e-4)


def test_joined_entries(words, run, make_file, tmp_path):
    """A Dict observation is joined in the order of the run."""
    rows = np.random.default_rng(0).uniform(-1, 1, (2, ROWS, 6))
    file = make_file(env_id="Goal-v0", observations=rows[0], next_observations=rows[1])
    joined = "evaluation.observation=[place,goal]"
    assert main(["train", *words(f"dataset={file}", joined)]) == 0
    out = tmp_path / "policy.onnx"
    assert main(["export", str(run), str(out)]) == 0
    exported, row = ExportedPolicy(out), rows[0, 0]
    np.testing.assert_array_equal(exported.act({"goal": row[3:], "place": row[:3]}), exported.act(row))
    with pytest.raises(ValueError, match="Add the missing entry, or the entries \\['place', 'goal'\\]"):
        exported.act({"goal": row[3:]})
    exported._joined = ["speed", "rest"]  # as if the first entry were a number
    found = exported.act({"speed": rows[0, :2, 0], "rest": rows[0, :2, 1:]})
    np.testing.assert_array_equal(found, exported.act(rows[0, :2]))
    exported._joined = ["rest", "arm/speed"]  # as if an entry were in a Dict
    found = exported.act({"rest": row[:5], "arm": {"speed": row[5]}})
    np.testing.assert_array_equal(found, exported.act(row))


def test_columns_of_a_table(words, run, tmp_path):
    """A mapping from the names of the columns is joined in their order; each is one number, or one for each state."""
    rows = np.random.default_rng(0).uniform(-1, 1, (ROWS, 4)).round(3)
    lines = [",".join(map(str, [*row, int(i % 10 == 9), i // 10])) for i, row in enumerate(rows)]
    (tmp_path / "d.csv").write_text("\n".join(["x,v,force,r,crashed,trip", *lines]))
    reader = "reader={observation: [v, x], action: [force], reward: r, terminated: crashed, episode: trip}"
    assert main(["train", *words(f"dataset={tmp_path / 'd.csv'}", reader, "evaluation.env=null")]) == 0
    out = tmp_path / "policy.onnx"
    assert main(["export", str(run), str(out)]) == 0
    exported = ExportedPolicy(out)
    np.testing.assert_array_equal(exported.act({"x": 0.1, "v": 0.2}), exported.act([0.2, 0.1]))
    many = {"x": [0.1, 0.3, 0.5], "v": [0.2, 0.4, 0.6]}
    np.testing.assert_array_equal(exported.act(many), exported.act([[0.2, 0.1], [0.4, 0.3], [0.6, 0.5]]))
    with pytest.raises(ValueError, match=r"Add the missing entry, or the entries \['v', 'x'\]"):
        exported.act({"x": 0.1})


def test_without_the_dataset(words, run, file, tmp_path, capsys):
    assert main(["train", *words()]) == 0
    file.unlink()
    out = tmp_path / "policy.onnx"
    capsys.readouterr()
    assert main(["export", str(run), str(out)]) == 1
    assert "To export without the dataset, use --random-states." in capsys.readouterr().err
    assert not out.exists()
    assert main(["export", str(run), str(out), "--random-states"]) == 0
    assert "checked with 1, 3 and 257 random states" in capsys.readouterr().out
    assert "low" not in ExportedPolicy(out).contract["inputs"][0]


def test_bad_arguments(words, run, tmp_path, capsys, monkeypatch):
    assert main(["export", str(tmp_path / "absent"), "policy.onnx"]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "policy.pt")]) == 1
    assert "expected the name of an ONNX file, such as policy.onnx" in capsys.readouterr().err
    assert main(["train", *words()]) == 0
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert main(["export", str(run), str(tmp_path / "policy.onnx")]) == 1
    assert capsys.readouterr().err.endswith("to export a policy: pip install 'torchrl-bcq[export]'\n")
