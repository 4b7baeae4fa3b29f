"""Compiled runs and lower precisions compared with eager runs in float32."""

from __future__ import annotations

import os
from shutil import which

import pytest
import torch
from torch._dynamo import config as dynamo
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from torchrl.objectives import SoftUpdate

from torchrl_bcq import BCQLoss, BCQTrainer, OfflineOptimizationStepper, make_bcq_modules
from torchrl_bcq.trainers.execution import Execution

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC, random_transitions
from .conftest import AfterStep, make_trainer, prioritised_buffer, staged, weights

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


def scheduled(loss: BCQLoss) -> OfflineOptimizationStepper:
    return staged(loss, warm_up=5, freeze_after=35, actor_every=2)


def small_loss(width: int = 8) -> BCQLoss:
    torch.manual_seed(0)
    loss = BCQLoss(*make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(width,), vae_hidden=(width,)))
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
def test_compiled_steps_equal_eager_ones_up_to_rounding(eager, compiled, show_figure, steps):
    deviation = distance(compiled[0][steps], eager[0][steps])
    show_figure(f"compiled, {steps} steps: weights deviate from eager ones by at most {deviation:.0e}")
    assert deviation < ROUNDING
    assert distance(eager[0][20], eager[0][40]) > 1e3 * ROUNDING


@needs_compiler
def test_three_graphs_are_compiled_in_a_thousand_steps(compiled):
    """The VAE's in step 1, the critics' after the warm-up, the actor's in its first step; none later."""
    _, graphs, breaks = compiled
    assert len(graphs) == 1000
    assert [graphs[0], graphs[4], graphs[5], graphs[6], graphs[-1]] == [1, 1, 2, 3, 3]
    assert breaks == {}


def test_a_compiled_run_resumes_from_an_eager_checkpoint(eager):
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
def test_other_kinds_of_compile_are_refused(compile):
    with pytest.raises(
        TypeError, match=f"compile is {compile!r}, expected True, False, or a mapping of torch.compile arguments"
    ):
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


@pytest.mark.parametrize("precision", ["bf16", "float32", "", True])
def test_unknown_precisions_are_refused(precision):
    expected = r"expected None or one of \['highest', 'high', 'medium', 'bf16-target', 'bf16-mixed'\]"
    with pytest.raises(ValueError, match=f"precision is {precision!r}, {expected}"):
        make_trainer(random_transitions(50), precision=precision)


ROWS, WIDTH = 64, 32  # PyTorch computes small products in float32, whatever precision is set
OF_TARGET = {"target_value", "gradient of qvalue"}


def product(precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Products of the critics' size in this precision, and in float64; batched, as PyTorch 2.11 rounds no others."""
    torch.manual_seed(0)
    a, b = torch.randn(2, ROWS, WIDTH), torch.randn(2, WIDTH, WIDTH)
    exact = a.double() @ b.double()
    if precision.startswith("bf16"):
        return (a.bfloat16() @ b.bfloat16()).float(), exact
    torch.set_float32_matmul_precision(precision)
    rough = a @ b
    torch.set_float32_matmul_precision("highest")
    return rough, exact


def evaluate(precision: str | None, compile=False, error=0.0, seed=0) -> dict[str, torch.Tensor]:
    """Values and gradients of one batch and one noise; all weights may be off by a relative error."""
    loss, noise, seen = small_loss(WIDTH), torch.Generator().manual_seed(seed), {}
    for name, value in loss.state_dict().items():
        if name.endswith(("weight", "bias")):
            value.mul_(1 + error * torch.randn(value.shape, generator=noise))
    execution, batch = Execution(loss, compile, precision), random_transitions(ROWS)
    for name in loss.network_names:
        torch.manual_seed(1)
        with execution.active():
            value, metadata = execution.compute(batch, f"{name}_loss")
            value.backward()
        parameters = getattr(loss, f"{name}_network_params").parameters()
        seen[f"gradient of {name}"] = torch.cat([parameter.grad.flatten() for parameter in parameters])
        seen |= {key: metadata[key].detach().clone() for key in {"pred_value", "target_value"} & metadata.keys()}
    return seen


@pytest.mark.parametrize(
    ("precision", "changed"),
    [
        ("highest", set()),
        ("high", None),  # the processor decides
        ("medium", None),
        ("bf16-target", OF_TARGET),
        ("bf16-mixed", OF_TARGET | {"pred_value", "gradient of vae", "gradient of actor"}),
    ],
)
def test_losses_are_as_exact_as_one_product_on_this_processor(matmul, precision, changed):
    """The error of one product is measured. What the precision changes in values and gradients is compared to what
    random relative errors of that size in all weights change: the layers, the choice of a candidate, and the mean over
    rows magnify both alike."""
    rough, exact = product(precision)
    error = ((rough - exact).norm() / exact.norm()).item()
    assert error < 3 / 2**9  # both factors and the result are rounded to 8 bits or more
    plain, seen = evaluate(None), evaluate(precision)
    off = [evaluate(None, error=error, seed=seed) for seed in range(4)]
    deviations = {key: (seen[key] - value).norm() for key, value in plain.items()}
    for key, deviation in deviations.items():
        assert deviation <= 3 * max((other[key] - plain[key]).norm() for other in off), key
    found = {key for key, deviation in deviations.items() if deviation > 0}
    if changed is None:
        assert found or torch.equal(rough, product("highest")[0])
    else:
        assert found == changed


@pytest.mark.parametrize("precision", ["bf16-target", "bf16-mixed"])
def test_bf16_leaves_all_that_is_kept_in_float32(precision):
    trainer, seen = run(20, at=(20,), precision=precision)
    optimizers = [o.state_dict()["state"] for o in trainer.optimization_stepper.optimizers.values()]
    kept = [value for states in optimizers for state in states.values() for value in state.values()]
    kept += [*trainer.loss_module.state_dict().values(), *trainer.optimization_stepper._logs.values()]
    kept += [p.grad for p in trainer.loss_module.parameters()]
    assert len(kept) > 100
    assert {value.dtype for value in kept} == {torch.float32}
    assert distance(seen[20], run(20, at=(20,))[1][20]) > 0


def test_a_target_in_bf16_compiles_as_one_graph():
    compiled, eager = (evaluate("bf16-target", compile) for compile in (TRACED, False))
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


def test_the_precision_of_targets_ends_with_training():
    trainer, batch = make_trainer(random_transitions(50), 2, precision="bf16-target"), random_transitions(6)
    latent = torch.randn(6, 10, 4)
    trainer.train()

    def target() -> torch.Tensor:
        return trainer.loss_module.qvalue_loss(batch, latent)[1]["target_value"]

    after = target()
    trainer.loss_module.target_dtype = torch.bfloat16
    assert not torch.equal(target(), after)
    with Execution(trainer.loss_module).active():  # leaves the user's choice
        assert not torch.equal(target(), after)
    trainer.loss_module.target_dtype = None
    assert torch.equal(target(), after)
