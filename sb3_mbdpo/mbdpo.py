"""Model-Based Diffusion Policy Optimization as a Stable-Baselines3 algorithm (arXiv 2605.26282).

What was checked against the authors' released implementation: the world model, the search and one update, to 1e-5
(tests/test_golden.py). What differs is named at the head of each module: `search`, `losses`, `distillation`.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule

from sb3_mbdpo.adaptation import set_trainable
from sb3_mbdpo.arguments import check_arguments, resolve_defaults
from sb3_mbdpo.buffers import SequenceReplayBuffer, SequenceSamples
from sb3_mbdpo.building import current_arguments, make_learner, policy_arguments
from sb3_mbdpo.collecting import CollectingAlgorithm
from sb3_mbdpo.distributed_learning import learn_together
from sb3_mbdpo.hub import HubAlgorithm
from sb3_mbdpo.imagination import Imagination, Observation, PlanTrace, imagine, plan
from sb3_mbdpo.metrics import RunningMeans
from sb3_mbdpo.policies import CnnPolicy, MBDPOPolicy, MlpPolicy, MultiInputPolicy
from sb3_mbdpo.ranks import ALONE, Ranks
from sb3_mbdpo.resuming import RandomState
from sb3_mbdpo.tasks import TaskSet, plain_tasks

SelfMBDPO = TypeVar("SelfMBDPO", bound="MBDPO")


class MBDPO(CollectingAlgorithm, HubAlgorithm):
    """
    Model-Based Diffusion Policy Optimization.

    A latent world model is learned from replayed sequences; actions come from a diffusion over action sequences whose
    score is estimated by rollouts in that model (``act_mode="search"``), or from the network it is distilled into.

    Paper: https://arxiv.org/abs/2605.26282. In the list below symbols are the paper's; "preset" marks arguments whose
    default the preset decides, and an explicit value always wins.

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy" or a policy class
    :param env: Environment, its id, or a vector environment; None when loading, or for a model of ``tasks`` whose
        environments come later
    :param learning_rate: Adam's learning rate, or a schedule of the remaining progress (1 to 0). Preset: 3e-4 for the
        paper's sizes, 1e-3 for the small models of the cpu preset
    :param buffer_size: Transitions kept for replay
    :param learning_starts: Random environment steps before the first update. None: max(1000, 5 L) for episodes of
        length L, followed by ``warmup_updates``. With several tasks L is the sum over those that the environment plays
    :param batch_size: Windows per update. Preset (256)
    :param tau: Polyak step of the target critics and of the prior's value range (0.01). Values travel at about this
        rate per update: a larger one learns sooner and is less stable. Preset
    :param gamma: Discount factor. None: clip((L/5 - 1) / (L/5), 0.95, 0.995), or 0.99 when L is unknown. Multi-task
        models have a discount per task instead
    :param train_freq: Environment steps (per environment) between updates, or e.g. ``(1, "episode")``
    :param gradient_steps: Updates after each rollout; -1, the default, is one per collected transition
    :param action_noise: Additional noise on actions while collecting, as in TD3 or SAC
    :param replay_buffer_class: A subclass of ``SequenceReplayBuffer`` or ``DictSequenceReplayBuffer``; None selects one
    :param replay_buffer_kwargs: Its further arguments
    :param optimize_memory_usage: Not supported: sequences need the terminal observations
    :param n_steps: Not supported (1): targets are one-step, the planning horizon is ``horizon``
    :param preset: "paper" (the paper's sizes and search), "cpu" (what learns fastest on a few cores), "debug"
        (everything tiny, for tests) or "auto": paper on a GPU, cpu otherwise
    :param model_size: Millions of parameters: 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5, 19, 48 or 317. Larger models are slower
        and reach higher returns on hard tasks. Preset
    :param horizon: Plan length H and length of replayed windows, environment steps (3). Longer plans lean more on the
        model and less on the critics, and cost in proportion. Preset
    :param denoising_steps: Length T of the noise schedule; a search takes T - 1 steps. Cost in proportion. Preset
    :param n_samples: Candidate plans N of each denoising step. Cost in proportion; given alone, K and M keep their
        shares of it. Preset
    :param n_elites: Best candidates K that form the next plan; fewer are greedier. Preset
    :param n_prior_trajectories: Candidates M that are rollouts of the prior. Preset
    :param temperature: Temperature lambda of the weights over normalised returns (0.5); lower is greedier. Preset
    :param beta_start: First beta of the noise schedule; sets the finest spread of candidates. Preset
    :param beta_end: Last beta of the noise schedule; a larger one looks further around the warm start. Preset
    :param exploration_noise: Standard deviation of the Gaussian noise on executed actions while exploring, in units of
        the scaled action (-1 to 1); not added when acting by the prior, which draws for itself. Preset
    :param energy_coef: Weight eta of the energy F in the search (0.01): the trust region around the data. 0 ignores it
    :param energy_unit: What the energy is weighted in. "reward", as released: at most 5 eta a step, whatever a task's
        rewards are. "value_range": that times the range S of values, the same trust region for rewards of every size
    :param prior_margin: Return by which a plan must beat the prior's rollouts, in units of the value range S (0 in the
        paper). Values err by some hundredths of their range; where waiting looks as good as acting, a search that
        plans anew at every step can wait forever. Preset
    :param act_mode: "search": plan with the world model; "score": the distilled diffusion policy alone, far cheaper;
        "prior": the Gaussian prior alone
    :param bootstrap: Policy whose actions the critics' targets take: "prior" (as released) or "score" (the distilled
        diffusion policy, closer to the one that acts; costs more time per update). Preset
    :param target_horizon: Steps that the bootstrap policy is unrolled in the model before the targets take the critics'
        word (0 in the paper). More steps let values travel faster and trust the model more. Preset
    :param prior_horizon: Steps that the prior is unrolled in the model in its own objective, at most ``horizon`` (0 in
        the paper: the critics alone judge its actions). With more, gradients come through the model, which tells
        actions apart sooner than critics do. Preset
    :param warmup_updates: Updates done at once when learning starts. None: one per step collected so far when
        ``learning_starts`` is None too (the paper's rule), otherwise 0 (as in other SB3 algorithms)
    :param consistency_coef: Weight of the latent consistency loss (20)
    :param reward_coef: Weight of the reward loss (0.1)
    :param value_coef: Weight of the value loss (0.1)
    :param termination_coef: Weight of the termination loss (1)
    :param energy_loss_coef: Weight of the energy's noise-contrastive loss (1); 0 leaves the energy untrained at zero
    :param score_coef: Weight of the score network's loss (1); 0 leaves the network out, and with it acting by score
    :param entropy_coef: Weight of the prior's scaled entropy (1e-4)
    :param saturation_coef: Weight of log(1 - a^2) in the prior's objective (0 in the paper): a barrier that keeps the
        prior off the action bounds, where a tanh has no gradient left and critics would bootstrap from a stuck policy.
        Preset
    :param behaviour_coef: Weight of the squared distance between the prior's actions and the data's in the prior's
        objective (0 in the paper), whose values count in units of their range. For ``learn_offline`` alone: 1 or more
        keeps the prior, and with ``bootstrap="prior"`` the values, where there is data; ``learn`` can try things out
    :param rho: Temporal weight of the losses, rho^t (0.5): lower trusts the first model steps more
    :param encoder_lr_scale: Learning rate of the encoder relative to ``learning_rate`` (0.3)
    :param max_grad_norm: Gradient-norm clip, for world model, prior and score network each (20)
    :param policy_delay: Updates of the world model per update of the prior (1), as in TD3. Preset
    :param energy_interval: Updates of the rest of the world model per update of the energy (1). Preset
    :param score_batch_size: Latents per update on which the score network is trained. Preset
    :param score_samples: Candidate plans per latent in the score network's targets. Preset
    :param score_interval: Updates of the world model per update of the score network. Preset
    :param search_dtype: Type of the search's matrix products: "float32", "bfloat16" (half the time or less on hardware
        that has it; plans then differ by rounding) or "auto": bfloat16 where it is fast. Preset
    :param update_dtype: The same for updates, as mixed precision: weights, losses and optimizers stay in float32
        ("float32")
    :param gradient_accumulation: Parts into which each batch is split (1), worked through one after the other with one
        step at the end. The result is that of the whole batch but for rounding; activations take as much less memory,
        and small parts more time
    :param activation_checkpointing: Compute the activations of encoder, rollouts and heads again in the backward pass
        instead of keeping them (False): the same gradients from less memory, in more time
    :param compile: Compile search, losses and acting by score with torch.compile: faster after a first search and a
        first update that take minutes. On a CPU a C++ compiler is needed, and a process compiles for a few different
        models at most; further ones run as without. On a GPU each search and each update is captured as one CUDA graph
        as well, for each number of observations and windows (updates of several processes, and of accumulated
        gradients, are not): optimizers must be fused ones, as they are by default
    :param warm_denoising_steps: Denoising steps of a search that continues a plan, at most T - 1, or a share of them
        below 1 (0.5: half as many as at an episode's first step); fewer are faster and stay closer to the plan. None:
        all of them
    :param episodic: Whether episodes can terminate. None: the termination head joins in with the first termination seen
    :param tasks: Tasks of a multi-task model, a :class:`~sb3_mbdpo.tasks.TaskSet` or its plain data. None: taken from
        the environments if they are ``MultiTaskEnv``, see :func:`~sb3_mbdpo.multitask_env.make_multitask_env`;
        otherwise the model is one of a single task. The policy is then "MultiInputPolicy"
    :param task_sampling: How tasks share a batch: "proportional" to what is stored of each, or "balanced"
    :param normalize_observations: Standardise each task's observations by the mean and standard deviation of its data,
        taken when ``learn_offline`` first sees them (False, as in the paper). Entries of very different size are then
        told apart from the start. For models of several tasks; others have ``VecNormalize``
    :param stats_window_size: Episodes averaged in the logs
    :param tensorboard_log: Folder of the tensorboard logs
    :param policy_kwargs: Arguments of the policy: net_arch, activation_fn, n_critics, widths, features extractor,
        optimizer; see ``MBDPOPolicy``
    :param verbose: 0: nothing, 1: device, wrappers, preset and warm-up, 2: also what Stable-Baselines3 adds
    :param seed: Seed of everything random
    :param device: "auto", "cpu", "cuda", ...
    :param _init_setup_model: Build the networks at construction
    :raises ValueError: for arguments that cannot work, naming the argument
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: MBDPOPolicy
    replay_buffer: SequenceReplayBuffer | None

    def __init__(
        self,
        policy: str | type[MBDPOPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule | None = None,
        buffer_size: int = 1_000_000,
        learning_starts: int | None = None,
        batch_size: int | None = None,
        tau: float | None = None,
        gamma: float | None = None,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = -1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        preset: str = "auto",
        model_size: float | None = None,
        horizon: int | None = None,
        denoising_steps: int | None = None,
        n_samples: int | None = None,
        n_elites: int | None = None,
        n_prior_trajectories: int | None = None,
        temperature: float | None = None,
        beta_start: float | None = None,
        beta_end: float | None = None,
        exploration_noise: float | None = None,
        energy_coef: float = 0.01,
        energy_unit: str = "reward",
        prior_margin: float | None = None,
        act_mode: str = "search",
        bootstrap: str | None = None,
        target_horizon: int | None = None,
        prior_horizon: int | None = None,
        warmup_updates: int | None = None,
        consistency_coef: float = 20.0,
        reward_coef: float = 0.1,
        value_coef: float = 0.1,
        termination_coef: float = 1.0,
        energy_loss_coef: float = 1.0,
        score_coef: float = 1.0,
        entropy_coef: float = 1e-4,
        saturation_coef: float | None = None,
        behaviour_coef: float = 0.0,
        rho: float = 0.5,
        encoder_lr_scale: float = 0.3,
        max_grad_norm: float = 20.0,
        policy_delay: int | None = None,
        energy_interval: int | None = None,
        score_batch_size: int | None = None,
        score_samples: int | None = None,
        score_interval: int | None = None,
        search_dtype: str | None = None,
        update_dtype: str = "float32",
        gradient_accumulation: int = 1,
        activation_checkpointing: bool = False,
        compile: bool = False,
        warm_denoising_steps: int | float | None = None,
        episodic: bool | None = None,
        tasks: TaskSet | dict[str, Any] | list[dict[str, Any]] | None = None,
        task_sampling: str = "proportional",
        normalize_observations: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate,  # type: ignore[arg-type]  # resolved below, as what else is None here
            buffer_size,
            learning_starts,  # type: ignore[arg-type]
            batch_size,  # type: ignore[arg-type]
            tau,  # type: ignore[arg-type]
            gamma,  # type: ignore[arg-type]
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=seed,
            sde_support=False,
            supported_action_spaces=(spaces.Box,),
        )
        self.preset, self.model_size, self.horizon = preset, model_size, horizon
        self.denoising_steps, self.n_samples, self.n_elites = denoising_steps, n_samples, n_elites
        self.n_prior_trajectories, self.temperature = n_prior_trajectories, temperature
        self.beta_start, self.beta_end = beta_start, beta_end
        self.exploration_noise, self.energy_coef = exploration_noise, energy_coef
        self.energy_unit, self.prior_margin = energy_unit, prior_margin
        self.act_mode, self.bootstrap, self.warmup_updates = act_mode, bootstrap, warmup_updates
        self.target_horizon, self.prior_horizon = target_horizon, prior_horizon
        self.consistency_coef, self.reward_coef, self.value_coef = consistency_coef, reward_coef, value_coef
        self.termination_coef, self.energy_loss_coef = termination_coef, energy_loss_coef
        self.score_coef, self.entropy_coef, self.rho = score_coef, entropy_coef, rho
        self.saturation_coef, self.policy_delay = saturation_coef, policy_delay
        self.behaviour_coef = behaviour_coef
        self.energy_interval = energy_interval
        self.encoder_lr_scale, self.max_grad_norm = encoder_lr_scale, max_grad_norm
        self.score_batch_size, self.score_samples = score_batch_size, score_samples
        self.score_interval, self.episodic = score_interval, episodic
        self.search_dtype, self.update_dtype, self.compile = search_dtype, update_dtype, compile
        self.warm_denoising_steps = warm_denoising_steps
        self.gradient_accumulation, self.activation_checkpointing = gradient_accumulation, activation_checkpointing
        # The preset that has decided what was not given
        self._decided_by: str | None = None
        self._tasks = plain_tasks(tasks)
        self.task_sampling, self.normalize_observations = task_sampling, normalize_observations
        self._trainable: list[str] | None = None
        self._acts_from_start = self._counts_offline_steps = False
        self._rehearsal, self._rehearsal_share = None, 0.0
        self._task_returns: dict[str, list[float]] = {}
        self._task_sources = {}
        # Running plans while collecting, and the rows whose episode has just ended
        self._plans: np.ndarray | None = None
        self._restarts: np.ndarray | None = None
        self._metrics = RunningMeans()
        # Called after each update; see WeightAveraging
        self._after_update: Callable[[], None] | None = None
        # What the random generators were like when the model was saved
        self._random_state: RandomState | None = None

        if _init_setup_model:
            self._setup_model()

    # --- construction -------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        self._resolve_tasks()
        resolve_defaults(self)
        check_arguments(self)
        self._fit_action_noise()
        if self.replay_buffer_class is None:
            self.replay_buffer_class = self._default_buffer_class()
        # Policy and buffer take the algorithm's own arguments; the user's stay what they were
        user_kwargs = self.policy_kwargs, self.replay_buffer_kwargs
        self.policy_kwargs = {**policy_arguments(self), **self.policy_kwargs}
        self.replay_buffer_kwargs = {**self.replay_buffer_kwargs, **self._buffer_arguments()}
        saved_buffer = self.replay_buffer
        try:
            super()._setup_model()
        finally:
            self.policy_kwargs, self.replay_buffer_kwargs = user_kwargs
        assert self.replay_buffer is not None
        goes_on = self._restore_random_state()
        if saved_buffer is None or not goes_on:
            self.replay_buffer.seed(self.seed)
        if saved_buffer is not None:
            self._take_running_plans()
        if self._trainable is not None:
            set_trainable(self.policy.world_model, self._trainable)
        self.learner = make_learner(self)
        self._followed = current_arguments(self)

    # --- learning -----------------------------------------------------------------------------------------------

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        # What was interrupted may have left one
        self._after_update = None
        return super()._init_callback(callback, progress_bar)

    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        """
        Update the world model, the prior and the score network from replayed windows.

        :param gradient_steps: Updates to do; the first call adds ``warmup_updates``
        :param batch_size: Windows per update
        """
        assert self.replay_buffer is not None and self.warmup_updates is not None
        self._prepare_updates()
        if self._n_updates == 0 and self.warmup_updates > 0:
            if self.verbose >= 1 and self.learner.ranks.is_main:
                print(f"Warm-up: {self.warmup_updates} updates on what was collected at random")
            gradient_steps += self.warmup_updates
        for _ in range(gradient_steps):
            self._update(self._sample(batch_size))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        # Where reading costs nothing; those of several processes are averaged first, when they are logged
        if self.device.type == "cpu" and self.learner.ranks.size == 1:
            self._record_metrics()

    def _prepare_updates(self) -> None:
        self._follow_arguments()
        self.policy.set_training_mode(True)
        optimizers = [self.policy.optimizer, self.policy.prior_optimizer]
        if self.policy.score_optimizer is not None:
            optimizers.append(self.policy.score_optimizer)
        self._update_learning_rate(optimizers)

    def _update(self, samples: SequenceSamples) -> None:
        self._metrics.add(self.learner.update(samples, self._n_updates))
        self._n_updates += 1
        if self._after_update is not None:
            self._after_update()

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            for group in optimizer.param_groups:
                group["lr"] *= group.get("lr_scale", 1.0)

    def _record_metrics(self) -> None:
        for name, value in self._metrics.pop().items():
            if name.endswith("grad_norm") and not math.isfinite(value):
                raise ValueError(
                    f"{name} is {value} at update {self._n_updates}: learning has diverged. Go on from a checkpoint, "
                    "with a lower learning_rate or with observations and rewards scaled down (VecNormalize)."
                )
            self.logger.record_mean(name, value)

    def dump_logs(self) -> None:
        """Write log data; on an accelerator this is where training metrics are read from the device."""
        self._record_metrics()
        super().dump_logs()

    def learn(
        self: SelfMBDPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "MBDPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        ranks: Ranks = ALONE,
    ) -> SelfMBDPO:
        """
        Collect experience and learn from it.

        With several processes (see :func:`~sb3_mbdpo.distributed.process_group`) all call this with the same arguments
        on models of the same arguments, each with as many environments of its own and its own replay buffer. They begin
        with the first one's weights and share each batch of ``batch_size`` windows. Steps, episodes and
        ``learning_starts`` count over all of them. Callbacks (whose locals are those of the first process), logs and
        evaluation are the first one's alone, but for those that say otherwise, such as
        :class:`~sb3_mbdpo.shared_checkpoints.SharedCheckpoints`; a callback must not change the model.

        :param total_timesteps: Environment steps in all
        :param callback: Callback(s) called at every step
        :param log_interval: Episodes between logs
        :param tb_log_name: Name of the run in tensorboard
        :param reset_num_timesteps: Start counting from zero
        :param progress_bar: Show a progress bar
        :param ranks: The processes that share each batch
        :return: The model itself
        :raises ValueError: with several processes, for what cannot be shared or is not the same in all of them
        :raises LostProcessError: if another process has ended
        :raises OtherProcessError: if another process has failed
        """
        if ranks.size > 1:
            learn_together(
                self, ranks, total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar
            )
            return self
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    # --- looking inside -------------------------------------------------------------------------------------------

    def predict(
        self,
        observation: Observation,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Act, as every Stable-Baselines3 algorithm does; see :meth:`~sb3_mbdpo.acting.ActingPolicy.predict`.

        :param observation: One observation or a batch of them
        :param state: Plans of the previous decision; None starts cold
        :param episode_start: Rows whose episode has just begun [B]
        :param deterministic: The same candidates at every call, no exploration noise
        :return: Actions in the environment's units, and the plans as the next state
        """
        self._follow_arguments()
        return super().predict(observation, state, episode_start, deterministic)

    def imagine(self, observation: Observation, actions: np.ndarray) -> Imagination:
        """
        What the world model expects of a plan: see :func:`~sb3_mbdpo.imagination.imagine`.

        :param observation: One observation or a batch of them
        :param actions: Plan in the environment's units, [T, *action_shape] or [B, T, *action_shape]
        :return: Latents, rewards, values, energies and terminations
        :raises ValueError: if the shapes do not fit
        """
        self._follow_arguments()
        return imagine(self.policy, observation, actions)

    def plan(
        self,
        observation: Observation,
        state: np.ndarray | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
        return_trace: bool = False,
    ) -> np.ndarray | tuple[np.ndarray, PlanTrace]:
        """
        The whole plan behind ``predict``, and on request the path of its search: see
        :func:`~sb3_mbdpo.imagination.plan`, and :func:`~sb3_mbdpo.plots.plot_plan` for a picture of it.

        :param observation: One observation or a batch of them
        :param state: Plans of the previous decision; None starts cold
        :param episode_start: Rows whose episode has just begun [B]
        :param deterministic: The same candidates at every call
        :param return_trace: Return the denoising path as well
        :return: Plan in the environment's units [H, *action_shape] or [B, H, *action_shape], and the path
        :raises ValueError: if shapes do not fit, or a path is wanted from a policy that does not search
        """
        self._follow_arguments()
        return plan(self.policy, observation, state, episode_start, deterministic, return_trace)
