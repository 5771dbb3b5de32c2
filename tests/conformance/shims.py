"""
PPO, A2C and TRPO for tests that were written for them: M3PO under their names.

A shim translates keyword names and chooses sizes that train within seconds. It overrides nothing that M3PO does.
"""

from typing import Any, ClassVar

from stable_baselines3.common.policies import BasePolicy

from sb3_m3po import M3PO, CnnPolicy, MlpPolicy, MultiInputPolicy

#: Smaller than the default, for toy environments; one critic, as the originals have
SMALL = {"model_arch": [256], "n_critics": 1}
#: What has no counterpart: epochs over a rollout, the clipped objective, the advantages, RMSprop's variant, the conjugate
#: gradient. M3PO's updates per transition are its default.
DROPPED = (
    "n_epochs", "n_critic_updates", "batch_size",
    "clip_range", "clip_range_vf", "normalize_advantage", "vf_coef",
    "use_rms_prop", "rms_prop_eps",
    "cg_max_steps", "cg_damping", "line_search_shrinking_factor", "line_search_max_iter", "sub_sampling_factor",
    "sde_sample_freq",
)  # fmt: skip


class SmallMlpPolicy(MlpPolicy):
    """Small by default, so that a model's `policy_kwargs` stay what the test passed."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**SMALL, **kwargs})


class SmallCnnPolicy(CnnPolicy):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**SMALL, **kwargs})


class SmallMultiInputPolicy(MultiInputPolicy):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**SMALL, **kwargs})


class Shim(M3PO):
    """
    :cvar N_STEPS: Length of a rollout, if the test names none
    :cvar SIZES: Of M3PO's own keyword arguments, what fits the algorithm whose name the shim bears
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": SmallMlpPolicy,
        "CnnPolicy": SmallCnnPolicy,
        "MultiInputPolicy": SmallMultiInputPolicy,
    }
    N_STEPS = 64
    SIZES: ClassVar[dict[str, Any]] = {}

    def __init__(self, policy: Any, env: Any, **kwargs: Any):
        super().__init__(policy, env, **self.translate(kwargs))

    @classmethod
    def translate(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        """
        :param kwargs: Keyword arguments of PPO, A2C or TRPO
        :return: Keyword arguments of M3PO
        """
        passed = {name: value for name, value in kwargs.items() if name not in DROPPED}
        n_steps = passed.pop("n_steps", cls.N_STEPS)
        if passed.pop("use_sde", False):
            passed["policy_kwargs"] = {**(passed.get("policy_kwargs") or {}), "use_sde": True}
        sizes = {
            "n_steps": n_steps,
            "batch_size": 64,
            # At least one sync per rollout, at the default of one update per transition
            "sync_interval": min(max(1, n_steps // 2), 16),
            "learning_starts": min(n_steps, 64),
        }
        return {**sizes, **cls.SIZES, **passed}

    def learn(self, *args: Any, **kwargs: Any) -> Any:
        # The default of a keyword: the folder of the logs bears the algorithm's name
        return super().learn(*args, **{"tb_log_name": type(self).__name__, **kwargs})


class PPO(Shim):
    # An update per step, where PPO's epochs make several passes: tests look at scores after 1,000 steps
    SIZES: ClassVar[dict[str, Any]] = {"utd_ratio": 1.0, "batch_size": 32}


class A2C(Shim):
    # An update per step and returns of several steps: tests look at values after 500 steps. The rate of steps is logged after
    # each rollout, before what it has brought is learned, so a rollout is long, as by default.
    N_STEPS = 128
    SIZES: ClassVar[dict[str, Any]] = {"utd_ratio": 1.0, "batch_size": 32, "sync_interval": 8, "n_step_returns": 8}


class TRPO(Shim):
    N_STEPS = 128
