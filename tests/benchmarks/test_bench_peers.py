"""Arithmetic of the benchmark, its floor, and a small run of the command."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Unbounded
from torchrl.objectives import SoftUpdate

from torchrl_bcq import BCQLoss, make_bcq_modules

HIDDEN, VAE_HIDDEN, BATCH = (7, 5), (9, 11), 8


@pytest.fixture
def floor(load):
    transitions = load("transitions")
    data = transitions.make_transitions()
    data["next", "terminated"] = torch.rand(len(data), 1) < 0.3
    return load("floor").Floor(data, BATCH, "cpu", transitions.Sizes(HIDDEN, VAE_HIDDEN))


def test_ratios_are_taken_within_rounds(load):
    rounds = load("rounds")
    assert rounds.median_ratio([3.0, 30.0, 8.0], [1.0, 10.0, 8.0]) == 3  # the medians' ratio would be 1
    with pytest.raises(ValueError, match="zip"):
        rounds.median_ratio([1.0], [1.0, 2.0])


def test_summary_compares_with_each_peer_and_with_the_faster_one(load):
    seconds = {"eager": [0.1, 0.2, 0.4], "slow": [0.4, 0.8, 0.8], "fast": [0.3, 0.2, 0.4], "floor": [0.1, 0.1, 0.1]}
    measured = {"seconds": seconds, "flops": 30, "limit": 300.0}
    rows = load("speeds").summarize(measured, {"slow": "", "fast": ""})
    assert rows["eager"]["slower"] == pytest.approx({"slow": 4, "fast": 1, "faster peer": 1, "eager": 1})
    assert rows["floor"]["slower"] == pytest.approx({"slow": 8, "fast": 3, "faster peer": 3, "eager": 2})
    assert rows["fast"]["slower"] == rows["slow"]["slower"] == {}
    assert rows["eager"]["per_second"] == pytest.approx(5)
    assert rows["eager"]["share"] == pytest.approx(0.1 / 0.2)
    alone = load("speeds").summarize({**measured, "seconds": {"eager": [0.5]}}, ["fast"])
    assert alone["eager"]["slower"] == {"eager": 1}


def test_rounds_take_turns_and_reverse(load, monkeypatch):
    rounds = load("rounds")
    now, order = [0.0], []
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: now[0])

    def run(name: str, seconds: float):
        def steps(number: int) -> None:
            order.append(name)
            now[0] += number * seconds

        return steps

    contenders = {"a": rounds.Stopwatch(run("a", 0.1), "cpu"), "b": rounds.Stopwatch(run("b", 3.0), "cpu")}
    contenders["matmul"] = rounds.Stopwatch(run("matmul", 0.01), "cpu", parts=5)
    found = {}
    for found in rounds.measure(contenders, rounds=2, seconds=1.0):
        if not found["a"]["seconds"]:
            order.clear()  # drops the calibration's calls
    assert order == ["a", "b", *["matmul"] * 10, "b", "a"]
    assert {name: one["steps"] for name, one in found.items()} == {"a": 10, "b": 1, "matmul": 100}
    assert {name: one["seconds"] for name, one in found.items()} == {
        "a": pytest.approx([0.1, 0.1]),
        "b": pytest.approx([3, 3]),
        "matmul": pytest.approx([0.01, 0.01]),
    }


@pytest.mark.parametrize(
    ("intervals", "busy"),
    [
        ([], 0),
        ([(5, 2)], 2),
        ([(0, 1), (2, 1)], 2),  # a gap
        ([(0, 1), (1, 1)], 2),  # they touch
        ([(0, 3), (1, 1)], 3),  # one within another
        ([(0, 9), (1, 1), (5, 1)], 9),  # two within another
        ([(0, 2), (1, 2)], 3),  # they overlap
        ([(4, 1), (0, 3), (2, 2), (2, 1), (10, 0)], 5),  # in any order
    ],
)
def test_time_in_which_a_kernel_runs(load, intervals, busy):
    assert load("kernels").busy_time(intervals) == busy


def test_only_kernels_of_a_trace_count(load):
    events = [
        {"cat": "kernel", "ts": 1_000_000.0, "dur": 500_000.0},
        {"cat": "gpu_user_annotation", "ts": 0.0, "dur": 9e6},  # spans the gaps between kernels
        {"cat": "gpu_memcpy", "ts": 0.0, "dur": 1.0},
        {"ph": "M", "name": "process_name"},
    ]
    assert load("kernels").kernel_intervals({"traceEvents": events}) == [(1.0, 0.5)]


def multiply_adds(inputs: int, hidden: tuple[int, int], outputs: int) -> int:
    """Multiply-adds of one row in a network with two hidden layers."""
    return inputs * hidden[0] + hidden[0] * hidden[1] + hidden[1] * outputs


def flops_of_update(hidden: tuple[int, int], vae_hidden: tuple[int, int]) -> int:
    """FLOP of one row with 17 observations, 6 actions, 12 latents: forward, and backward where a gradient is used."""
    encoder, decoder = multiply_adds(17 + 6, vae_hidden, 24), multiply_adds(17 + 12, vae_hidden, 6)
    actor, critic = multiply_adds(17 + 6, hidden, 6), multiply_adds(17 + 6, hidden, 1)
    no_input_gradient, vae_no_input_gradient = 23 * hidden[0], 23 * vae_hidden[0]
    vae = 3 * (encoder + decoder) - vae_no_input_gradient
    target = 10 * (decoder + actor + 2 * critic)
    critics = 2 * (3 * critic - no_input_gradient)
    actor_loss = decoder + 3 * actor - no_input_gradient + 2 * critic  # the critic: forward, and to its inputs
    return 2 * (vae + target + critics + actor_loss)


def test_flops_are_those_counted_by_hand(load, floor):
    count = load("rounds").count_flops
    assert count(lambda: floor.update(1)) == BATCH * flops_of_update(HIDDEN, VAE_HIDDEN)
    row = multiply_adds(29, VAE_HIDDEN, 6) + multiply_adds(23, HIDDEN, 6) + multiply_adds(23, HIDDEN, 1)
    assert count(lambda: floor.act(torch.zeros(3, 17), 100)) == 3 * 100 * 2 * row
    assert 100 * flops_of_update((400, 300), (750, 750)) == pytest.approx(3.06e9, rel=2e-3)


def test_an_update_of_the_floor_learns_and_moves_its_targets(floor):
    before = [source.clone() for source in floor.sources]
    encoder = [weight.detach().clone() for weight, _ in floor.encoder]
    floor.update(1)
    for old, source, target in zip(before, floor.sources, floor.targets, strict=True):
        assert (source != old).any()
        torch.testing.assert_close(target, 0.995 * old + 0.005 * source)
    assert all((weight != old).any() for (weight, _), old in zip(floor.encoder, encoder, strict=True))
    assert all(
        (own == shared).all() for (own, _), (shared, _) in zip(floor.critics[0], floor.first_critic, strict=True)
    )


def test_losses_of_the_floor_are_those_of_the_package(floor):
    specs = Unbounded((17,)), Bounded(-1, 1, (6,))
    vae, actor, critics = make_bcq_modules(*specs, hidden=HIDDEN, vae_hidden=VAE_HIDDEN)
    networks = [vae.encoder, vae.decoder, actor.network, *(critic.module for critic in critics.critics)]

    def copy_weights() -> None:
        for network, layers in zip(networks, [floor.encoder, floor.decoder, floor.actor, *floor.critics], strict=True):
            for layer, (weight, bias) in zip([*network][::2], layers, strict=True):
                layer.weight.data.copy_(weight)
                layer.bias.data.copy_(bias)

    copy_weights()
    loss = BCQLoss(vae, actor, critics)
    SoftUpdate(loss, tau=0.005)
    for source in floor.sources:
        source.add_(torch.randn_like(source))
    copy_weights()  # the targets stay

    state, action, reward, following, terminated = (field[:BATCH] for field in floor.fields)
    outcome = {"observation": following, "reward": reward, "terminated": terminated.bool(), "done": terminated.bool()}
    batch = TensorDict({"observation": state, "action": action, "next": outcome}, [BATCH])
    noise, latent = torch.randn(BATCH, 12), torch.randn(BATCH, 12).clamp(-0.5, 0.5)
    latents = torch.randn(BATCH, 10, 12).clamp(-0.5, 0.5)
    pairs = [
        (floor.vae_loss(state, action, noise), loss.vae_loss(batch, noise)[0]),
        (
            floor.critic_loss(state, action, reward, following, terminated, latents),
            loss.qvalue_loss(batch, latents)[0],
        ),
        (floor.actor_loss(state, latent), loss.actor_loss(batch, latent)[0]),
    ]
    for theirs, own in pairs:
        torch.testing.assert_close(theirs, own, rtol=1e-5, atol=1e-6)


def test_command_writes_what_it_measured(load, tmp_path, capsys):
    command = load("bench_peers")
    small = ["--hidden", "8", "--vae-hidden", "8", "--rounds", "3", "--seconds", "0.01", "--threads", "1"]
    sizes = ["--batch-sizes", "16", "--vectors", "--frames", "--states", "1", "2"]
    command.main([*small, *sizes, "--only", "floor", "eager", "--out", f"{tmp_path}"])
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["benchmark.json", "benchmark.png"]
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert results["machine"]["threads"] == 1
    assert results["machine"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert [measured["size"] for measured in results["training"]] == [16]
    assert [measured["size"] for measured in results["acting"]] == [1, 2]
    for measured in [*results["training"], *results["acting"]]:
        assert list(measured["summary"]) == list(measured["seconds"]) == ["eager", "floor"]
        assert all(len(times) == 3 and min(times) > 0 for times in measured["seconds"].values())
        assert measured["limit"] == measured["matmul"]["flops"] / min(measured["matmul"]["seconds"])
    assert results["training"][0]["matmul"]["shape"] == [160, 750, 750]
    out = capsys.readouterr().out
    assert "batch size 16: 0.000 GFLOP" in out
    assert out.count("eager ") == 3


def test_a_peer_that_fails_is_left_out_and_our_own_failure_is_not(load, capfd):
    command, processes, left_out = load("bench_peers"), load("processes"), {}
    works, fails = partial(load("rounds").make_matmul, 1, 9, 9, "cpu"), partial(int, "too old")
    with processes.in_processes(["tianshou", "d3rlpy", "floor"], threads=1) as contenders:
        makes = {"tianshou": fails, "d3rlpy": partial(os._exit, 3), "floor": works}
        ready = command.set_up(contenders, makes, "cpu", left_out)
        assert ready == {"floor": contenders["floor"]}
        assert left_out["tianshou"].startswith("ValueError: invalid literal")
        assert left_out["d3rlpy"] == "its process ended with exit code 3"
        assert "tianshou is left out: ValueError: invalid literal" in capfd.readouterr().err
        assert ready["floor"].time(steps=ready["floor"].calibrate(seconds=0.01)) > 0
        with pytest.raises(processes.ContenderError, match=r"(?s)too old.*Traceback.*in set_up\n"):
            command.set_up(contenders, {"floor": fails}, "cpu", left_out)
    assert not multiprocessing.active_children()


@pytest.fixture
def heed_interrupts():
    """Raise KeyboardInterrupt at SIGINT, which workers of pytest-xdist ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heed_interrupts")
def test_a_contender_at_work_ends_with_an_interrupted_command(load, monkeypatch):
    processes = load("processes")
    monkeypatch.setattr(processes, "PATIENCE", 0)
    interrupt = threading.Timer(0.5, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    with processes.in_processes(["busy"], threads=1) as contenders:
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            contenders["busy"].set_up(partial(time.sleep, 60), "cpu")
    assert not multiprocessing.active_children()


def test_absent_peers_say_how_to_install_them(load, monkeypatch):
    contenders = load("contenders")
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    reasons = contenders.absent("cpu")
    assert reasons.keys() == {*contenders.PEERS, *contenders.CUDA_MODES}
    for name in ("tianshou", "d3rlpy", "d3rlpy-graph", "d3rlpy-onnx"):
        assert reasons[name].endswith(f"is not installed: {contenders.INSTALL}")
