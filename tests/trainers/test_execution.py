"""Compiled or not, and in whatever precision: it is the same run."""

from __future__ import annotations

import os
from shutil import which

import pytest
import torch
from torch._dynamo import config as dynamo
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from torchrl.objectives import SoftUpdate

from torchrl_bcq import BCQLoss, BCQOptimizationStepper, BCQTrainer, make_bcq_modules
from torchrl_bcq.trainers.execution import Execution

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC, random_transitions
from .conftest import AfterStep, make_trainer, weights
from .test_bcq import prioritised_buffer

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt_nn_modules:FutureWarning"),  # tensordict's
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),  # PyTorch's, 2.13
]

INDUCTOR = {"options": {"fallback_random": True}}  # as compile=True, but it draws what PyTorch would
TRACED = {"backend": "eager"}  # the graphs are made and run as they are, without a compiler
# A step of Adam is some 1e-3 long, whatever the gradient's size, and rounding changes a gradient by some 1e-6 of it:
# 40 steps add up to 4e-8 of their 4e-2. Where a gradient is mere rounding it may be another altogether; few are.
ROUNDING = 1e-5
needs_compiler = pytest.mark.skipif(which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")


def run(steps: int, at: tuple[int, ...] = (), **settings) -> tuple[BCQTrainer, dict[int, dict[str, torch.Tensor]]]:
    """A run on the same transitions, and its weights after some steps."""
    torch.manual_seed(0)
    trainer, seen = make_trainer(random_transitions(50), steps, **settings), {}
    AfterStep(lambda step: seen.update({step: weights(trainer)} if step in at else {})).register(trainer)
    trainer.train()
    return trainer, seen


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest one between two entries."""
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one)


def scheduled(loss: BCQLoss) -> BCQOptimizationStepper:
    return BCQOptimizationStepper.adam(loss, vae_warmup_steps=5, freeze_vae_after=35, actor_update_interval=2)


def small_loss() -> BCQLoss:
    torch.manual_seed(0)
    loss = BCQLoss(*make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,)))
    SoftUpdate(loss, tau=0.005)
    return loss


# compiled


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """Weights after 20 and 40 steps, and a checkpoint of the former."""
    folder = tmp_path_factory.mktemp("eager") / "checkpoint"
    run(20, stepper=scheduled, save_trainer_file=folder)
    return run(40, at=(20, 40), stepper=scheduled)[1], folder


@pytest.fixture(scope="module")
def compiled():
    """Weights after 20 and 40 of 1,000 steps, and what was compiled until then."""
    counters.clear()
    graphs = []
    torch.manual_seed(0)
    trainer, seen = make_trainer(random_transitions(50), 1000, stepper=scheduled, compile=INDUCTOR), {}
    AfterStep(lambda step: graphs.append(counters["stats"]["unique_graphs"])).register(trainer)
    AfterStep(lambda step: seen.update({step: weights(trainer)} if step in (20, 40) else {})).register(trainer)
    trainer.train()
    return seen, graphs, dict(counters["graph_break"])


@needs_compiler
@pytest.mark.parametrize("steps", [20, 40])
def test_compiled_steps_are_the_eager_ones_to_rounding(eager, compiled, show_figure, steps):
    deviation = distance(compiled[0][steps], eager[0][steps])
    show_figure(f"compiled, {steps} steps: weights deviate from eager ones by at most {deviation:.0e}")
    assert deviation < ROUNDING
    assert distance(eager[0][20], eager[0][40]) > 1e3 * ROUNDING


@needs_compiler
def test_three_graphs_are_compiled_and_nothing_anew_in_a_thousand_steps(compiled):
    """The VAE's in step 1, the critics' after the warm-up, the actor's in its first step; whole ticks later as well."""
    _, graphs, breaks = compiled
    assert len(graphs) == 1000
    assert [graphs[0], graphs[4], graphs[5], graphs[6], graphs[-1]] == [1, 1, 2, 3, 3]
    assert breaks == {}


def test_a_compiled_run_goes_on_from_a_checkpoint_as_an_eager_one(eager):
    torch.manual_seed(0)
    trainer = make_trainer(random_transitions(50), 40, seed=9, stepper=scheduled, compile=TRACED)
    trainer.load_from_file(eager[1])
    trainer.train()
    assert trainer.optimization_stepper.steps == 40
    assert distance(weights(trainer), eager[0][40]) == 0


def test_priorities_are_written_by_compiled_losses_too():
    """With importance weights in each batch; other graphs than without."""
    torch.manual_seed(0)
    transitions, trees = random_transitions(50), []
    for compile in (False, TRACED):
        buffer = prioritised_buffer(transitions)
        make_trainer(None, 20, buffer=buffer, compile=compile).train()
        trees.append([buffer.sampler._sum_tree[row] for row in range(50)])
    assert trees[0] == trees[1]
    assert len(set(trees[0])) > 40


def test_any_number_of_trainers_can_be_compiled_in_a_process():
    """PyTorch compiles one code object 8 times; TorchRL has all losses of all LossModules share one."""
    with dynamo.patch(recompile_limit=1, error_on_recompile=True):
        for _ in range(3):
            Execution(small_loss(), TRACED).compute(random_transitions(6), "vae_loss")


def test_a_graph_that_breaks_is_an_error():
    def broken(tensordict, noise=None):
        torch._dynamo.graph_break()
        return training_loss(tensordict, noise=noise)

    loss = small_loss()
    training_loss, loss.vae_network.training_loss = loss.vae_network.training_loss, broken
    with pytest.raises(Unsupported):
        Execution(loss, TRACED).compute(random_transitions(6), "vae_loss")


def test_keywords_reach_the_compiler_which_is_called_once():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    trainer = make_trainer(random_transitions(50), 2, compile={"backend": backend})
    for _ in range(3):
        trainer._execution.compute(random_transitions(6), "vae_loss")
    assert len(graphs) == 1


@pytest.mark.parametrize("compile", ["max-autotune", None, 1])
def test_what_says_nothing_about_compiling_is_refused(compile):
    with pytest.raises(TypeError, match=f"compile is {compile!r}, expected True, False, or keywords of torch.compile"):
        make_trainer(random_transitions(50), compile=compile)


# precision


@pytest.fixture
def matmul():
    """PyTorch's own precision, which is global, put back."""
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("before", ["highest", "high"])
@pytest.mark.parametrize("precision", [None, "highest", "high", "medium"])
def test_the_precision_holds_while_it_trains_and_is_set_back(matmul, precision, before):
    torch.set_float32_matmul_precision(before)
    trainer, seen = make_trainer(random_transitions(50), 20, precision=precision), []
    AfterStep(lambda step: seen.append(torch.get_float32_matmul_precision())).register(trainer)
    trainer.train()
    assert seen == [precision or before] * 20
    assert torch.get_float32_matmul_precision() == before


def test_the_precision_is_set_back_after_an_error(matmul):
    transitions = random_transitions(50)
    transitions["next", "reward"][:] = 1e38
    with pytest.raises(FloatingPointError):
        make_trainer(transitions, precision="medium").train()
    assert torch.get_float32_matmul_precision() == "highest"


def test_no_precision_leaves_what_was_set_for_a_backend(matmul):
    """PyTorch then refuses to say what its one precision is."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()
    run(2)
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.parametrize(("precision", "bound"), [("highest", 0), ("high", 1 / 256), ("medium", 1 / 256)])
def test_precisions_of_products_give_the_same_run(matmul, precision, bound):
    """Where a processor has units for shorter floats, these have 8 bits or more: a gradient, and so a step of Adam of
    1e-3, may be off by 1/256 in each product on its way, of which there are up to 6 (three layers and back)."""
    plain, other = (run(20, at=(20,), precision=p)[1][20] for p in (None, precision))
    assert distance(plain, other) <= 20 * 1e-3 * 6 * bound


@pytest.mark.parametrize("precision", ["bf16", "float32", "", True])
def test_unknown_precisions_are_refused(precision):
    expected = r"expected None or one of \['highest', 'high', 'medium', 'bf16-target', 'bf16-mixed'\]"
    with pytest.raises(ValueError, match=f"precision is {precision!r}, {expected}"):
        make_trainer(random_transitions(50), precision=precision)


def evaluate(precision: str | None, compile=False, names=("vae", "qvalue", "actor")) -> dict[str, tuple]:
    """Losses and their metadata, of the same weights on the same batch and noise."""
    execution, batch, out = Execution(small_loss(), compile, precision), random_transitions(64), {}
    for name in names:
        torch.manual_seed(1)
        out[name] = execution.compute(batch, f"{name}_loss")
    return out


def share(rough: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest deviation, in standard deviations of what is exact (of one number: in units of it)."""
    scale = exact.abs() if exact.ndim == 0 else exact.std()
    return ((rough - exact).abs().max() / scale).item()


def test_bf16_target_changes_the_target_and_nothing_else():
    """bfloat16 has 8 bits: 1/256 in each of the layers that lead to the target, of which most averages out."""
    exact, rough = evaluate(None), evaluate("bf16-target")
    for name in ("vae", "actor"):
        torch.testing.assert_close(rough[name], exact[name], rtol=0, atol=0)
    (exact_loss, exact_rows), (rough_loss, rough_rows) = exact["qvalue"], rough["qvalue"]
    assert torch.equal(rough_rows["pred_value"], exact_rows["pred_value"])
    assert 0 < share(rough_rows["target_value"], exact_rows["target_value"]) < 0.02
    assert 0 < share(rough_loss, exact_loss) < 0.02


def test_bf16_mixed_changes_all_losses_by_little():
    exact, rough = evaluate(None), evaluate("bf16-mixed")
    for name in exact:
        assert 0 < share(rough[name][0], exact[name][0]) < 0.02, name
    for key in ("pred_value", "target_value"):
        assert 0 < share(rough["qvalue"][1][key], exact["qvalue"][1][key]) < 0.05, key


@pytest.mark.parametrize(("precision", "bound"), [("bf16-target", 0.005), ("bf16-mixed", 0.05)])
def test_bf16_leaves_all_that_is_kept_in_float32(precision, bound):
    """And the same run, but for a small part of the way that weights go in it."""
    _, exact = run(20, at=(1, 20))
    trainer, seen = run(20, at=(20,), precision=precision)
    optimizers = [o.state_dict()["state"] for o in trainer.optimization_stepper.optimizers.values()]
    kept = [value for states in optimizers for state in states.values() for value in state.values()]
    kept += [*trainer.loss_module.state_dict().values(), *trainer.optimization_stepper._logs.values()]
    kept += [p.grad for p in trainer.loss_module.parameters()]
    assert len(kept) > 100
    assert {value.dtype for value in kept} == {torch.float32}
    way, deviation = (
        torch.cat([(exact[20][key] - start[key]).flatten() for key in exact[20]]).norm()
        for start in (exact[1], seen[20])
    )
    assert 0 < deviation < bound * way


def test_a_target_in_bf16_compiles_as_one_graph():
    compiled, eager = (evaluate("bf16-target", compile, names=("qvalue",)) for compile in (TRACED, False))
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


def test_the_next_trainer_of_a_loss_decides_anew():
    trainer = make_trainer(random_transitions(50), 2, precision="bf16-target")
    assert trainer.loss_module.target_dtype == torch.bfloat16
    Execution(trainer.loss_module)
    assert trainer.loss_module.target_dtype is None
