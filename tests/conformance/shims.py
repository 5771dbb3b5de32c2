"""
PPO, A2C and TRPO for tests that were written for them: M3PO under their names.

A shim translates keyword names and chooses sizes that train within seconds. It overrides nothing that M3PO does.
"""

from typing import Any

from sb3_m3po import M3PO

#: Networks for toy environments
SMALL = {"latent_dim": 32, "encoder_arch": [64], "model_arch": [64], "n_critics": 2}
#: What has no counterpart: the clipped objective, the advantages, RMSprop's variant, the conjugate gradient
DROPPED = (
    "clip_range", "clip_range_vf", "normalize_advantage", "vf_coef",
    "use_rms_prop", "rms_prop_eps",
    "cg_max_steps", "cg_damping", "line_search_shrinking_factor", "line_search_max_iter", "sub_sampling_factor",
    "sde_sample_freq",
)  # fmt: skip


def translate(kwargs: dict[str, Any], n_steps: int, n_epochs: int, batch_size: int | None) -> dict[str, Any]:
    """
    Translate the keyword arguments of PPO, A2C or TRPO.

    :param kwargs: What the test passes
    :param n_steps: Length of a rollout, if the test names none
    :param n_epochs: Updates per sample, likewise
    :param batch_size: Samples per update, likewise; ``None`` for all of a rollout
    :return: Keyword arguments of M3PO
    """
    passed = {name: value for name, value in kwargs.items() if name not in DROPPED}
    n_steps = passed.pop("n_steps", n_steps)
    n_epochs = passed.pop("n_epochs", passed.pop("n_critic_updates", n_epochs))
    batch_size = min(passed.pop("batch_size", batch_size) or n_steps, n_steps)
    policy_kwargs = {**SMALL, **(passed.pop("policy_kwargs", None) or {})}
    if passed.pop("use_sde", False):
        policy_kwargs["use_sde"] = True
    utd_ratio = n_epochs / batch_size
    sizes = {
        "n_steps": n_steps,
        "batch_size": 32,
        "utd_ratio": utd_ratio,
        "sync_interval": min(max(1, int(n_steps * utd_ratio)), 16),
        "learning_starts": min(n_steps, 64),
        "policy_kwargs": policy_kwargs,
    }
    return {**sizes, **passed}


class PPO(M3PO):
    def __init__(self, policy: Any, env: Any, learning_rate: Any = 1e-3, **kwargs: Any):
        super().__init__(policy, env, learning_rate, **translate(kwargs, n_steps=64, n_epochs=10, batch_size=64))


class A2C(M3PO):
    def __init__(self, policy: Any, env: Any, learning_rate: Any = 1e-3, **kwargs: Any):
        super().__init__(policy, env, learning_rate, **translate(kwargs, n_steps=5, n_epochs=1, batch_size=None))


class TRPO(M3PO):
    def __init__(self, policy: Any, env: Any, learning_rate: Any = 1e-3, **kwargs: Any):
        super().__init__(policy, env, learning_rate, **translate(kwargs, n_steps=128, n_epochs=10, batch_size=128))
