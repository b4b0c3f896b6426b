"""Ways of training that `compare.py` compares: name -> (recipe of this folder, overrides)."""

Variants = dict[str, tuple[str, list[str]]]

REFERENCE = "diffu_grpo"  # whose time the others get
MAIN: Variants = {
    name: (name, []) for name in ("likelihood", "aps_likelihood", REFERENCE, "guided", "reinforce", "rgrl")
}


def changed(start: str, changes: dict[str, str]) -> Variants:
    """Variants of base.yaml with the settings of `start`, whatever the shipped recipes have become."""
    return {name: ("base", f"{start} {words}".split()) for name, words in changes.items()}


GRADIENT = changed(
    "--guidance.kind entrgi --objective.weight 0 --optim.updates 4 --gradient.weight 1 --gradient.kl 2 "
    "--gradient.states late",
    {
        "gradient": "",
        "gradient, unguided": "--guidance.kind none",
        "gradient, half guided": "--guidance.share 0.5",
        "gradient, uniform states": "--gradient.states uniform",
        "gradient, its block alone": "--gradient.places block",
        "gradient, no blocks": "--rollout.block_length 0",
        "gradient, w = 0": "--gradient.blend expectation",
        "gradient, w = 0, kl 4": "--gradient.blend expectation --gradient.kl 4",
        "gradient, w = 0, kl 6": "--gradient.blend expectation --gradient.kl 6",
        "gradient, w = 0, kl 4, falling rate": "--gradient.blend expectation --gradient.kl 4 --optim.schedule linear "
        "--optim.learning_rate 6e-4",
        "gradient, unguided, kl 4": "--guidance.kind none --gradient.kl 4",
        "gradient, unguided, w = 0, kl 4": "--guidance.kind none --gradient.blend expectation --gradient.kl 4",
        "gradient, unguided, w = 0, kl 6": "--guidance.kind none --gradient.blend expectation --gradient.kl 6",
        "gradient, unguided, w = 0, kl 10": "--guidance.kind none --gradient.blend expectation --gradient.kl 10",
        "gradient, w = 1": "--gradient.blend aps",
        "gradient, kl 1": "--gradient.kl 1",
        "gradient, kl 4": "--gradient.kl 4",
        "gradient, 2 updates": "--optim.updates 2",
        "gradient, 2 updates, 2 states": "--optim.updates 2 --gradient.draws 2",
        "gradient, falling rate": "--optim.schedule linear --optim.learning_rate 6e-4",
        "gradient, kl 3": "--gradient.kl 3",
        "gradient + reinforce": "--objective.weight 1",
        "gradient + reinforce, unguided": "--objective.weight 1 --guidance.kind none",
        "gradient + reinforce, half guided": "--objective.weight 1 --guidance.share 0.5",
        "gradient + reinforce, kl 4": "--objective.weight 1 --gradient.kl 4",
        "tilt matching": "--gradient.weight 0 --objective.weight 1 --objective.name tilt_matching --objective.beta 0 "
        "--objective.advantage tilted --guidance.kind none",
    },
)
# The reward's gradient beside a comparison within groups that are half guided (guided.yaml).
TERM = "--gradient.states late --gradient.weight"
GUIDED = changed(
    "--guidance.kind entrgi --guidance.share 0.5 --objective.name grpo --optim.updates 4 --objective.beta 0.1",
    {
        "half guided": "",
        "half guided + gradient": f"{TERM} 1 --gradient.kl 3 --objective.beta 0",
        "half guided + half gradient": f"{TERM} 0.5 --gradient.kl 3 --objective.beta 0",
        "half guided + half gradient, kl 5": f"{TERM} 0.5 --gradient.kl 5 --objective.beta 0",
        "half guided, full KL": "--objective.kl full",
        "half guided, falling rate": "--optim.schedule linear --optim.learning_rate 6e-4",
    },
)
# What led to reinforce.yaml, when it was the default.
PLAIN = (
    "--objective.name reinforce --objective.estimator one_step --optim.updates 1 --objective.correction none "
    "--guidance.kind entrgi --guidance.share 1.0 --guidance.support guided --rollout.block_length 0 "
    "--optim.learning_rate 4e-4 --optim.schedule constant --objective.beta 0.075"
)
FOUR = "--objective.name grpo --optim.updates 4"
BOTH = f"{FOUR} --guidance.share 0.5 --rollout.block_length 10"
BLOCKS = "--guidance.kind none --rollout.block_length 10"
ABLATION = changed(
    PLAIN,
    {
        "plain": "",
        "unguided": "--guidance.kind none",
        "half guided": "--guidance.share 0.5",
        "half guided, truncate": "--guidance.share 0.5 --objective.correction truncate",
        "4 updates": FOUR,
        "unguided, 4 updates": f"{FOUR} --guidance.kind none",
        "half guided, 4 updates": f"{FOUR} --guidance.share 0.5",
        "half guided, 4 updates, blocks": BOTH,
        "half guided, 4 updates, blocks, falling rate": f"{BOTH} --optim.schedule linear",
        "half guided, 4 updates, blocks, falling rate, double KL": f"{BOTH} --optim.schedule linear "
        "--objective.beta 0.15",
        "half guided, 4 updates, blocks, mask": f"{BOTH} --objective.correction mask",
        "fading, half guided, blocks": "--guidance.eta_final 0 --guidance.share 0.5 --rollout.block_length 10",
        "unguided, blocks": BLOCKS,
        "unguided, blocks, coupled": f"{BLOCKS} --objective.estimator coupled",
        "unguided, blocks, trajectory_sampled": f"{BLOCKS} --objective.estimator trajectory_sampled",
        "unguided, 4 updates, blocks": f"{FOUR} {BLOCKS} --objective.beta 0.1",
        "unguided, double rate": "--guidance.kind none --optim.learning_rate 8e-4",
        "unguided, blocks, double rate": f"{BLOCKS} --optim.learning_rate 8e-4",
    },
)
# What the guide is shown of tokens that its own tokenizer does not have.
BRIDGE: Variants = {mode: ("llada", ["--reward.bridge", mode]) for mode in ("compose", "unknown", "zero")}
# A reward of 0 or 1 by rule, with the reward model as guide.
SPARSE: Variants = {
    "sparse, unguided": ("sparse", ["--guidance.kind", "none"]),
    "sparse, guided": ("sparse", []),
    "sparse, half guided": ("sparse", ["--guidance.share", "0.5"]),
    "sparse, guided, corrected": ("sparse", ["--objective.correction", "truncate"]),
    # The term of rgrl.yaml, of the guide, beside the rule's policy gradient.
    "sparse, the guide's gradient too": (
        "sparse",
        "--gradient.weight 1 --gradient.of guide --gradient.kl 4 --gradient.blend expectation --gradient.states late "
        "--objective.name grpo --objective.beta 0 --optim.updates 4".split(),
    ),
}
SETS = {"main": MAIN, "gradient": MAIN | GRADIENT | GUIDED, "ablation": ABLATION, "bridge": BRIDGE, "sparse": SPARSE}
