"""``instantiate(cfg.trainer)`` builds the example's trainer: the same seed gives the same weights, bit by bit."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv
from torchrl.objectives import HardUpdate, SoftUpdate
from torchrl.record import CSVLogger

import torchrl_bcq as bcq
from torchrl_bcq.runs.algorithms import ALGORITHMS
from torchrl_bcq.trainers.stepper import Schedule

SMALL = ["networks.hidden=[8]", "networks.vae_hidden=[9]"]
small_by_hand = partial(bcq.make_bcq_modules, hidden=[8], vae_hidden=[9])


def compose_file(name, dataset):
    with initialize_config_dir(str(Path(__file__).parent / "files"), version_base=None):
        return compose(name, overrides=[f"dataset.path={dataset}"])


def test_a_file_gives_the_trainer_of_the_example(tmp_path, monkeypatch, dataset, by_hand, assert_learn_the_same):
    """Sizes and settings of the paper, with logger and checkpoint."""
    monkeypatch.chdir(tmp_path)
    cfg = compose_file("example", dataset)

    def build():
        logger = CSVLogger("log", log_dir="hand")
        return by_hand(log_interval=2, logger=logger, save_trainer_file="hand/checkpoint", save_trainer_interval=1)

    assert_learn_the_same(lambda: instantiate(cfg.trainer), build)
    logs = {file.name: file.read_bytes() for file in (tmp_path / "hand/log/scalars").iterdir()}
    assert {"loss_vae.csv", "loss_qvalue.csv", "loss_actor.csv"} <= logs.keys()
    assert logs == {name: (tmp_path / "conf/log/scalars" / name).read_bytes() for name in logs}
    assert instantiate(cfg.trainer).load_from_file("hand/checkpoint").collected_frames == 5


def test_overrides_reach_their_place(compose_bcq, by_hand, assert_learn_the_same):
    cfg = compose_bcq(
        *("networks.hidden=[8,7]", "networks.vae_hidden=[9]", "networks.latent_dim=3", "networks.latent_clip=0.3"),
        *("networks.phi=0.3", "networks.num_critics=3", "networks.kl_weight=0.2", "loss.reduction=sum"),
        *("loss.lmbda=0.5", "loss.gamma=0.8", "loss.num_target_samples=4", "target_net_updater.tau=0.3"),
        *("optimization_stepper.lr=3e-4", "replay_buffer.batch_size=7", "replay_buffer.seed=5", "trainer.seed=4"),
        *("trainer.clip_norm=0.1", "trainer.clip_grad_norm=false"),
    )

    def make_loss(*networks):
        loss = bcq.BCQLoss(*networks, lmbda=0.5, num_target_samples=4, reduction="sum")
        return loss.make_value_estimator(gamma=0.8)

    sizes = {"hidden": [8, 7], "vae_hidden": [9], "latent_dim": 3, "latent_clip": 0.3, "num_critics": 3}
    build = partial(
        by_hand,
        make_buffer=partial(bcq.make_replay_buffer, batch_size=7, seed=5),
        make_modules=partial(bcq.make_bcq_modules, **sizes, phi=0.3, kl_weight=0.2),
        make_loss=make_loss,
        make_updater=partial(SoftUpdate, tau=0.3),
        make_stepper=partial(bcq.OfflineOptimizationStepper.adam, lr=3e-4),
        seed=4,
        clip_norm=0.1,
        clip_grad_norm=False,
    )
    assert_learn_the_same(lambda: instantiate(cfg.trainer), build)


def test_execution_is_the_trainers(compose_bcq):
    cfg = compose_bcq(*SMALL, "trainer.precision=bf16-target", "trainer.compile={mode: max-autotune}")
    trainer = instantiate(cfg.trainer)
    assert trainer._execution._settings == {"fullgraph": True, "mode": "max-autotune"}
    with pytest.raises(InstantiationException, match="CUDA graphs need a GPU, but the loss is on"):
        instantiate(compose_bcq(*SMALL, "trainer.cudagraph=true").trainer)


def test_parts_of_torchrls_groups(compose_bcq, by_hand, assert_learn_the_same):
    """A hard update, an optimizer for one network, and a replay buffer, which is filled with the dataset."""
    cfg = compose_bcq(
        *SMALL,
        *("target_net_updater=hard", "target_net_updater.value_network_update_interval=2"),
        *("optimization_stepper.qvalue.optimizer=SGD", "optimization_stepper.qvalue.lr=0.1"),
        *("replay_buffer=tensordict", "replay_buffer.batch_size=20"),
        *("+storage@replay_buffer.storage=lazy_tensor", "replay_buffer.storage.max_size=60"),
    )

    def make_buffer(transitions):
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(60), batch_size=20)
        buffer.extend(transitions)
        return buffer

    def make_stepper(loss):
        adam = bcq.OfflineOptimizationStepper.adam(loss).optimizers
        critics = torch.optim.SGD(loss.qvalue_network_params.parameters(), lr=0.1)
        return bcq.OfflineOptimizationStepper({**adam, "qvalue": critics})

    build = partial(
        by_hand,
        make_buffer=make_buffer,
        make_modules=small_by_hand,
        make_updater=partial(HardUpdate, value_network_update_interval=2),
        make_stepper=make_stepper,
    )
    assert_learn_the_same(lambda: instantiate(cfg.trainer), build)


def test_networks_of_your_own(dataset, by_hand, assert_learn_the_same):
    """The author's, written out network by network; the action bounds are Pendulum's."""
    cfg = compose_file("own_networks", dataset)
    assert_learn_the_same(lambda: instantiate(cfg.trainer), partial(by_hand, make_modules=small_by_hand))


def node(group, name, **fields):
    """A config of the store with these fields."""
    made = OmegaConf.structured(ConfigStore.instance().load(f"{group}/{name}.yaml").node)
    return OmegaConf.merge(made, OmegaConf.create(fields))


def test_nested_keys_are_lists_and_dtypes_names():
    spec = {"_target_": "torchrl.data.Bounded", "low": -1.0, "high": 1.0, "shape": [1]}
    keys = {"observation_keys": [["agent", "position"], "goal"], "action_key": ["agent", "action"]}
    mlp = {"_target_": "torch.nn.Identity"}
    read = [("agent", "position"), "goal", ("agent", "action")]
    vae = instantiate(node("model", "action_vae", encoder=mlp, decoder=mlp, action_spec=spec, latent_dim=1, **keys))
    actor = instantiate(node("model", "perturbation_actor", network=mlp, action_spec=spec, **keys))
    cloned = instantiate(node("model", "deterministic_actor", network=mlp, action_spec=spec, **keys))
    assert vae.in_keys == actor.in_keys == read
    assert (cloned.in_keys, cloned.out_keys) == (read[:2], read[2:])
    networks = node("model", "bcq_modules", action_key=["agent", "action"], value_key=["agent", "value"])
    networks.env = {"_target_": "torchrl.envs.GymEnv", "env_name": "Pendulum-v1"}
    assert instantiate(networks)[2].in_keys == ["observation", ("agent", "action")]
    assert instantiate(networks)[2].out_keys == [("agent", "value")]
    double = {"_target_": "torchrl.data.Unbounded", "shape": [3], "dtype": {"_target_": "hydra.utils.get_object"}}
    double["dtype"]["path"] = "torch.float64"
    networks = node("model", "bcq_modules", dtype="float64", observation_spec=double, action_spec=spec)
    assert next(instantiate(networks)[0].parameters()).dtype == torch.float64


def test_built_parts_take_the_place_of_configs(compose_bcq, dataset, by_hand, assert_learn_the_same):
    cfg = compose_bcq(*SMALL, "dataset.path=nowhere")
    transitions = bcq.load_hdf5(dataset)

    def with_buffer():
        return instantiate(cfg.trainer, replay_buffer=bcq.make_replay_buffer(transitions, seed=3))

    assert_learn_the_same(with_buffer, partial(by_hand, make_modules=small_by_hand))

    def with_networks():
        env = GymEnv("Pendulum-v1")
        torch.manual_seed(3)
        networks = small_by_hand(env.observation_spec, env.action_spec)
        trainer = instantiate(cfg.trainer, _partial_=True)(networks=networks, dataset=transitions, env=None)
        assert trainer.loss_module.vae_network is networks[0]
        return trainer

    assert_learn_the_same(with_networks, partial(by_hand, make_modules=small_by_hand))
    loss = by_hand(make_modules=small_by_hand).loss_module
    assert instantiate(cfg.trainer, loss_module=loss, dataset=transitions).loss_module is loss


@pytest.mark.parametrize(("setting", "fit"), [("true", {}), ("{scale_rewards: false}", {"scale_rewards": False})])
def test_normalization_is_fitted_to_the_dataset(compose_bcq, dataset, by_hand, assert_learn_the_same, setting, fit):
    def make_modules(*specs):
        fitted = bcq.Normalization.fit(bcq.load_hdf5(dataset), **fit)
        assert (fitted.reward_scale == 1) == bool(fit)
        return small_by_hand(*specs, normalization=fitted)

    cfg = compose_bcq(*SMALL, f"networks.normalization={setting}")
    assert_learn_the_same(lambda: instantiate(cfg.trainer), partial(by_hand, make_modules=make_modules))


def test_normalization_of_a_loss_that_is_built_is_refused(compose_bcq):
    cfg = compose_bcq(*SMALL, "networks.normalization=true")
    loss = instantiate(cfg.trainer).loss_module
    with pytest.raises(InstantiationException, match="normalization is set, but loss_module is built already"):
        instantiate(cfg.trainer, loss_module=loss)


def test_normalization_without_the_dataset(compose_bcq):
    cfg = compose_bcq(*SMALL, "networks.normalization=true")
    trainer = instantiate(cfg.trainer)
    env, trained = GymEnv("Pendulum-v1"), trainer.loss_module.vae_network
    with pytest.raises(
        InstantiationException, match="=true needs the data whose mean and scale it computes: .*=identity"
    ):
        instantiate(cfg.networks, env=env)
    with pytest.raises(InstantiationException, match="normalization is 'yes', expected true, false, identity"):
        instantiate(cfg.networks, env=env, normalization="yes")
    vae, _, _ = instantiate(cfg.networks, env=env, normalization="identity")
    assert vae.encoder[0].loc.tolist() == [0] * 4
    vae.load_state_dict(trained.state_dict())
    assert torch.equal(vae.encoder[0].loc, trained.encoder[0].loc)
    vae, _, _ = instantiate(cfg.networks, env=env, normalization=False)
    assert not hasattr(vae.encoder[0], "loc")


def test_device_is_of_those_that_do_not_say(compose_bcq):
    own = ["trainer.device=nowhere", "replay_buffer.device=cpu"]
    for overrides in (own[:1], own):  # refused by the replay buffer, then by the networks
        with pytest.raises(InstantiationException, match="device string: nowhere"):
            instantiate(compose_bcq(*SMALL, *overrides).trainer)
    instantiate(compose_bcq(*SMALL, *own, "networks.device=cpu").trainer).train()


def test_policy_acts_with_what_was_learned(compose_bcq):
    cfg = compose_bcq(*SMALL, "policy.num_action_samples=3")
    trainer = instantiate(cfg.trainer)
    loss = trainer.loss_module
    vae, actor, critics = loss.vae_network, loss.actor_network, loss.qvalue_network
    policy = instantiate(cfg.policy, vae=vae, actor=actor, critics=critics)
    by_hand = bcq.BCQPolicy(vae, actor, critics, num_action_samples=3)
    states = TensorDict({"observation": torch.randn(20, 3)}, [20])

    def act(policy):
        torch.manual_seed(0)
        return policy(states.copy())["action"]

    before = act(policy)
    trainer.train()
    assert torch.equal(act(policy), act(by_hand))
    assert not torch.equal(act(policy), before)


@pytest.mark.parametrize("word", ["loss.actor_network=null", "networks.phi=null"])
def test_null_is_a_loss_without_an_actor(compose_bcq, word):
    trainer = instantiate(compose_bcq(*SMALL, word).trainer)
    assert trainer.loss_module.networks[1] is None
    assert list(trainer.optimization_stepper.optimizers) == ["vae", "qvalue"]
    trainer.train()


# configs follow from signatures


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_algorithm_has_a_root_config(compose_bcq, choices, name):
    data = [f"dataset.path={choices}", "env.env_name=CartPole-v1"] if ALGORITHMS[name].discrete else []
    cfg = compose_bcq("networks.hidden=[8]", *data, root=name)
    trainer = instantiate(cfg.trainer)
    trainer.train()
    assert isinstance(trainer.loss_module, ALGORITHMS[name].loss)
    assert trainer.collected_frames == 5


def test_cloning_acts_with_its_network(compose_bcq):
    cfg = compose_bcq("networks.hidden=[8]", root="cloning")
    actor = instantiate(cfg.trainer).loss_module.actor_network
    assert instantiate(cfg.policy, network=actor) is actor


def test_parts_are_instantiated_alone(compose_bcq):
    cfg = compose_bcq(*SMALL, "loss.gamma=0.5", "target_net_updater.tau=0.25", "optimization_stepper.vae.stop_after=3")
    vae, actor, critics = instantiate(cfg.networks, env=GymEnv("Pendulum-v1"))
    loss = instantiate(cfg.loss, vae_network=vae, actor_network=actor, qvalue_network=critics)
    assert float(loss.value_estimator.gamma) == 0.5
    updater = instantiate(cfg.target_net_updater)(loss_module=loss)
    assert (type(updater), updater.eps, updater.loss_module) == (SoftUpdate, 0.75, loss)
    stepper = instantiate(cfg.optimization_stepper, loss=loss)
    assert stepper.schedules == {"vae": Schedule(stop_after=3), "qvalue": Schedule(), "actor": Schedule()}


GROUPS = {
    "dataset": {"hdf5", "npz", "table", "minari", "d4rl", "memmap"},
    "model": {"action_vae", "perturbation_actor", "q_ensemble", "deterministic_actor", "bcq_modules", "bcq_policy"},
    "loss": {"bcq", "cloning"},
    "target_net_updater": {"bcq"},
    "replay_buffer": {"bcq"},
    "hook": {"bcq_optimization", "cloning_optimization"},
    "trainer": {"bcq", "cloning"},
}


def test_a_config_has_the_settings_of_what_it_calls():
    for group, names in GROUPS.items():
        assert {f"{name}.yaml" for name in names} <= set(ConfigStore.instance().list(group))
    table = {
        ("dataset", "table"): bcq.load_table,
        ("dataset", "d4rl"): bcq.load_d4rl,
        ("replay_buffer", "bcq"): bcq.make_replay_buffer,
        ("model", "action_vae"): bcq.ActionVAE.__init__,
        ("model", "bcq_modules"): bcq.make_bcq_modules,
        ("model", "bcq_policy"): bcq.BCQPolicy.__init__,
        ("loss", "bcq"): bcq.BCQLoss.__init__,
        ("trainer", "bcq"): bcq.OfflineTrainer.__init__,
    }
    other = {"target_net_updater": None, "observation_spec": None, "action_spec": None}  # which other parts give
    for (group, name), constructor in table.items():
        found = OmegaConf.to_container(node(group, name))
        for argument, parameter in inspect.signature(constructor).parameters.items():
            default = "???" if parameter.default is parameter.empty else parameter.default
            default = list(default) if isinstance(default, tuple) else default
            if argument != "self":
                assert found[argument] in (default, other.get(argument, default)), (name, argument)


@pytest.mark.parametrize(
    "wrong",
    ["networks.latent_dim=many", "loss.lmbda=high", "trainer.clip_norm=low", "optimization_stepper.vae.lr=fast"],
)
def test_types_are_checked(compose_bcq, wrong):
    with pytest.raises(HydraException, match=f"Error merging override {wrong}"):
        compose_bcq(wrong)
