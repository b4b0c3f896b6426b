"""Which layers `lora.targets` adapts: by family, name and pattern, and never the head."""

import json

import peft
import pytest
import torch
from checkpoints import write_a2d, write_dream, write_llada
from training import changed, go, resolved

from rgrl.config import ConfigError, LoraConfig
from rgrl.models import add_lora, load_policy
from rgrl.trainer import train

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in SEVEN[:4]]
ALL = [f"model.layers.{i}.{'self_attn' if name in SEVEN[:4] else 'mlp'}.{name}" for i in range(2) for name in SEVEN]

CASES = {
    "the family's": (["auto"], ALL),
    "its names": (SEVEN, ALL),
    "both": (["auto", "q_proj"], ALL),
    "some names": (["q_proj", "down_proj"], [p for p in ALL if p.endswith(("q_proj", "down_proj"))]),
    "the end of a path": (["1.self_attn.q_proj", "mlp.up_proj"], [ALL[5], ALL[7], ALL[12]]),
    "a whole path": (["model.layers.0.mlp.up_proj"], [ALL[5]]),
    "a pattern": ([r"model\.layers\.\d+\.self_attn\..*"], ATTENTION),
    "alternatives": ([r".*\.(q|v)_proj"], [p for p in ALL if p.endswith(("q_proj", "v_proj"))]),
    "a pattern and a name": ([r".*\.0\..*_proj", "q_proj"], [*ALL[:7], ALL[7]]),
}


def adapted(policy):
    return [name for name, m in policy.causal_lm.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


@pytest.mark.parametrize("case", CASES)
def test_the_layers_that_targets_name(case, dream_dir):
    targets, wanted = CASES[case]
    assert adapted(add_lora(load_policy(dream_dir), LoraConfig(r=2, targets=targets), 0)) == wanted


@pytest.mark.parametrize("case", ["the family's", "a pattern and a name"])
def test_peft_adapts_the_same_layers_from_what_is_saved(case, dream_dir):
    """Also where there are so many paths that peft writes their common ends."""
    policy = add_lora(load_policy(dream_dir), LoraConfig(r=2, targets=CASES[case][0]), 0)
    saved = json.loads(json.dumps(policy.peft_model.peft_config["default"].to_dict(), default=sorted))
    again = load_policy(dream_dir)
    again.peft_model = peft.get_peft_model(
        again.causal_lm, peft.LoraConfig(**{"target_modules": saved["target_modules"]})
    )
    assert adapted(again) == CASES[case][1]


def test_the_old_default_is_what_auto_means(dream_dir, llada_dir):
    """The same layers with the same first weights, so that recorded runs stay what they were."""
    for folder in (dream_dir, llada_dir):
        old, new = (add_lora(load_policy(folder), LoraConfig(r=4, targets=t), 3) for t in (SEVEN, ["auto"]))
        before, now = old.causal_lm.state_dict(), new.causal_lm.state_dict()
        assert before.keys() == now.keys() and all(torch.equal(before[name], now[name]) for name in now)
        assert old.peft_model.peft_config["default"].target_modules == {*SEVEN}


REFUSED = {
    "a name": (["q_proj", "query"], "no layer is called 'query'; there are down_proj, gate_proj, k_proj"),
    "a part of a name": (["proj"], "no layer is called 'proj'"),
    "a module that is no linear layer": (["self_attn"], "no layer is called 'self_attn'"),
    "a pattern of nothing": ([r".*query.*"], "no linear layer's path matches '.*query.*'; there are"),
    "a pattern that is only a part": (["(q|v)_proj"], "no linear layer's path matches '(q|v)_proj'"),
    "the head": (["q_proj", "lm_head"], "'lm_head' also hits lm_head, the output head"),
    "the embedding": (["embed_tokens"], "'embed_tokens' also hits model.embed_tokens, the embedding"),
    "everything": ([".*"], "'.*' also hits"),
    "a pattern that hits the head too": ([r".*(proj|head)"], "also hits lm_head, the output head"),
}


@pytest.mark.parametrize("write", [write_dream, write_llada, write_a2d])
@pytest.mark.parametrize("case", REFUSED)
def test_a_target_of_nothing_or_of_the_head_is_one_line(case, write, tmp_path_factory):
    targets, told = REFUSED[case]
    folder = tmp_path_factory.getbasetemp() / f"lora_{write.__name__}"
    policy = load_policy(folder if folder.exists() else write(folder))
    with pytest.raises(ConfigError) as error:
        add_lora(policy, LoraConfig(targets=targets), 0)
    assert told in str(error.value) and "\n" not in str(error.value) and not adapted(policy)


def test_what_is_no_regular_expression_is_told_with_the_settings():
    with pytest.raises(ConfigError, match=r"`lora.targets`: '\*proj' is not a regular expression: nothing to repeat"):
        LoraConfig(targets=["q_proj", "*proj"])


def test_a_run_by_auto_goes_on_by_the_names_it_meant_and_no_others(tiny, tmp_path):
    tiny |= {"judge": {}}
    go(tiny, tmp_path, steps=1, eval_steps=0)
    names = changed(tiny, lora={"targets": SEVEN})
    go(names, tmp_path, steps=2, eval_steps=0, resume_from_checkpoint="latest")
    few = changed(tiny, lora={"targets": ["q_proj"]}, run={"resume_from_checkpoint": "latest"})
    with pytest.raises(ConfigError, match=r"`lora.targets` was \['q_proj', .* and is now \['q_proj'\]"):
        train(resolved(few, tmp_path))
    go(few, tmp_path, output_dir="few", steps=1, eval_steps=0, resume_from_checkpoint=None)
    with pytest.raises(ConfigError, match=r"`lora.targets` was \['q_proj'\] and is now \['q_proj', 'k_proj'"):
        go(tiny, tmp_path, output_dir="few", steps=2, resume_from_checkpoint="latest")
