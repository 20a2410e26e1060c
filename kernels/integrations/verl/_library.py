"""The functions of verl that have replacements."""

from warpo.kernels.integrations.patching import Library, Registry

library = Library(
    "verl",
    tested=("0.9.1",),
    registries=(
        Registry(
            "verl.trainer.ppo.core_algos", "POLICY_LOSS_REGISTRY", register="register_policy_loss"
        ),
        # set directly: register_adv_est refuses a second function of a name
        Registry("verl.trainer.ppo.core_algos", "ADV_ESTIMATOR_REGISTRY"),
    ),
)
