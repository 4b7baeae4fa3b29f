"""The parts put together, each a group to choose from: ``compose("bcq")``, or ``- bcq`` in the defaults of a file."""

from typing import Any

BCQ: dict[str, Any] = {
    "defaults": [
        {"env": None},  # optional: override env=gym
        {"dataset": None},
        {"replay_buffer": "bcq"},
        {"model@networks": "bcq_modules"},
        {"loss": "bcq"},
        {"target_net_updater": "bcq"},
        {"hook@optimization_stepper": "bcq_optimization"},
        {"logger": None},
        {"trainer": "bcq"},
        {"model@policy": "bcq_policy"},
        "_self_",
    ],
    "trainer": {
        "env": "${oc.select:env}",  # null where nothing is chosen
        "dataset": "${oc.select:dataset}",
        "replay_buffer": "${replay_buffer}",
        "networks": "${networks}",
        "loss_module": "${loss}",
        "target_net_updater": "${target_net_updater}",
        "optimization_stepper": "${optimization_stepper}",
        "logger": "${oc.select:logger}",
    },
}
