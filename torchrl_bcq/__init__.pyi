"""The public names of ``torchrl_bcq``."""

from . import (
    data as data,
    evaluation as evaluation,
    export as export,
    functional as functional,
    modules as modules,
    objectives as objectives,
    protocols as protocols,
    reports as reports,
    runs as runs,
    trainers as trainers,
)
from .data import (
    DatasetError as DatasetError,
    WeightedSampler as WeightedSampler,
    episode_weights as episode_weights,
    from_arrays as from_arrays,
    from_rollouts as from_rollouts,
    load_d4rl as load_d4rl,
    load_hdf5 as load_hdf5,
    load_memmap as load_memmap,
    load_minari as load_minari,
    load_npz as load_npz,
    load_table as load_table,
    load_transitions as load_transitions,
    make_replay_buffer as make_replay_buffer,
    multi_step as multi_step,
    return_weights as return_weights,
    split_episodes as split_episodes,
    stack_observations as stack_observations,
)
from .evaluation import (
    DatasetMetrics as DatasetMetrics,
    EnvironmentMetrics as EnvironmentMetrics,
    Estimate as Estimate,
    FQEMetrics as FQEMetrics,
    ImportanceSampling as ImportanceSampling,
    OffPolicyEvaluation as OffPolicyEvaluation,
    add_policy_actions as add_policy_actions,
    add_recorded_actions as add_recorded_actions,
    clone_probabilities as clone_probabilities,
    evaluate as evaluate,
    fit_fqe as fit_fqe,
    policy_actions as policy_actions,
)
from .export import Export as Export, ExportedPolicy as ExportedPolicy, export_policy as export_policy
from .modules import (
    ActionFlow as ActionFlow,
    ActionMixture as ActionMixture,
    ActionVAE as ActionVAE,
    BCQPolicy as BCQPolicy,
    BehaviorCloningPolicy as BehaviorCloningPolicy,
    DeterministicActor as DeterministicActor,
    DiscreteBCQPolicy as DiscreteBCQPolicy,
    DiscreteCloningPolicy as DiscreteCloningPolicy,
    History as History,
    MultiHeadNetwork as MultiHeadNetwork,
    Normalization as Normalization,
    PerturbationActor as PerturbationActor,
    Policy as Policy,
    QEnsemble as QEnsemble,
    Standardize as Standardize,
    make_bcq_modules as make_bcq_modules,
    make_cloning_modules as make_cloning_modules,
    make_discrete_bcq_modules as make_discrete_bcq_modules,
    make_discrete_cloning_modules as make_discrete_cloning_modules,
    make_fqe_modules as make_fqe_modules,
)
from .objectives import (
    BCQLoss as BCQLoss,
    CloningLoss as CloningLoss,
    DiscreteBCQLoss as DiscreteBCQLoss,
    DiscreteCloningLoss as DiscreteCloningLoss,
    DiscreteFQELoss as DiscreteFQELoss,
    DiscreteLoss as DiscreteLoss,
    FQELoss as FQELoss,
    OfflineLoss as OfflineLoss,
    ValueLoss as ValueLoss,
)
from .protocols import (
    CriticEnsemble as CriticEnsemble,
    DiscreteNetwork as DiscreteNetwork,
    GenerativeModel as GenerativeModel,
)
from .reports import describe as describe
from .runs import Algorithm as Algorithm, load_policy as load_policy
from .trainers import (
    BCQTrainer as BCQTrainer,
    KeepBest as KeepBest,
    NetworkLRScheduler as NetworkLRScheduler,
    OfflineCollector as OfflineCollector,
    OfflineOptimizationStepper as OfflineOptimizationStepper,
    OfflineTrainer as OfflineTrainer,
    Schedule as Schedule,
    WeightAverage as WeightAverage,
    make_checkpoint as make_checkpoint,
)

__version__: str
