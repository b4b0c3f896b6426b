"""`extends`: files and presets, one or several, laid over each other."""

import pytest

from rgrl.cli import main
from rgrl.config import ConfigError, RolloutConfig, as_yaml, load_config, presets

NEEDED = "model: {path: a}\ndata: {path: b}\nreward: {path: c}\nrun: {output_dir: d}\n"


def write_all(folder, **files):
    """Files of settings by their names, without .yaml."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def test_of_a_list_later_ones_win_and_the_file_itself_last(tmp_path):
    path = write_all(
        tmp_path,
        mine="extends: [needed.yaml, a.yaml, b.yaml]\nrollout: {top_k: 9}\n",
        needed=NEEDED,
        a="rollout: {top_k: 5, top_p: 0.5, steps: 16}\nreward: {functions: {'m:f': 1, 'm:g': 2}}\n",
        b="extends: base.yaml\nrollout: {top_k: 7, top_p: 0.75}\nreward: {functions: {'m:g': 3}}\n",
        base="rollout: {top_p: 0.1, steps: 4}\n",
    )
    config = load_config(path, ["--rollout.temperature", "2"])
    # What b.yaml extends is part of it, and so comes after a.yaml too.
    assert (config.rollout.top_k, config.rollout.top_p, config.rollout.steps) == (9, 0.75, 4)
    assert config.rollout.temperature == 2 and config.reward.functions == {"m:f": 1.0, "m:g": 3.0}
    assert load_config(path) == load_config(path)  # nothing of one call is left for the next


def test_a_list_of_one_is_that_one_and_an_empty_one_is_nothing(tmp_path):
    paths = [
        write_all(tmp_path, **{name: f"extends: {text}\nrollout: {{top_k: 3}}\n", "needed": NEEDED})
        for name, text in {"a": "needed.yaml", "b": "[needed.yaml]", "c": "[needed.yaml, needed.yaml]"}.items()
    ]
    (tmp_path / "d.yaml").write_text(f"extends: []\n{NEEDED}rollout: {{top_k: 3}}\n")
    configs = [load_config(path) for path in [*paths, tmp_path / "d.yaml"]]
    assert configs.count(configs[0]) == 4 and configs[0].rollout.top_k == 3


def test_the_same_file_by_two_ways_is_no_circle_and_is_read_once(tmp_path):
    """Thirty files that name the one before twice: a billion readings, if each were read anew."""
    write_all(tmp_path, f0=NEEDED, **{f"f{i}": f"extends: [f{i - 1}.yaml, ./f{i - 1}.yaml]" for i in range(1, 30)})
    assert load_config(tmp_path / "f29.yaml") == load_config(tmp_path / "f0.yaml")
    write_all(tmp_path, f0="extends: f3.yaml")
    with pytest.raises(ConfigError, match=r"f3\.yaml extends itself, by way of .*f3\.yaml and .*f2\.yaml and"):
        load_config(tmp_path / "f3.yaml")


def test_a_section_of_comments_alone_changes_nothing(tmp_path):
    path = write_all(
        tmp_path, mine="extends: base.yaml\nrollout:\n  # top_k: 4\n", base=f"{NEEDED}rollout: {{top_k: 3}}\n"
    )
    assert load_config(path).rollout.top_k == 3
    path.write_text("extends: base.yaml\njudge: {path: null}\nrollout: null\n")
    assert load_config(path).rollout.top_k == RolloutConfig().top_k  # `null` itself means the defaults


def test_a_weight_laid_over_a_verifier_keeps_its_settings(tmp_path):
    path = write_all(
        tmp_path,
        mine="extends: [base.yaml, math500]\nreward: {functions: {math: 0, 'm:f': {clip: [0, 1]}}}\n",
        base="run: {output_dir: d}\nmodel: {path: a}\nreward: {path: r, functions: {'m:f': 3, 'm:g': 1}}\n",
    )
    functions = load_config(path).reward.functions
    settings = {"column": "expected_answer", "where": "boxed"}
    assert (functions["math"].weight, functions["math"].settings) == (0.0, settings)
    assert (functions["m:f"].weight, functions["m:f"].clip, functions["m:g"]) == (3.0, [0, 1], 1.0)
    again = load_config(path, ["--reward.functions.math", "2", "--reward.functions.m:f", "4"]).reward.functions
    assert (again["math"].weight, again["math"].settings) == (2.0, settings)
    assert (again["m:f"].weight, again["m:f"].clip) == (4.0, [0, 1])


def test_an_empty_mapping_leaves_nothing_of_what_it_is_laid_over(tmp_path):
    path = write_all(tmp_path, mine="extends: [lmsys_chat, needed.yaml]\ndata: {where: {}}\nrun: {}\n", needed=NEEDED)
    config = load_config(path)
    assert config.data.where == {} and config.data.turns == "first_user" and config.run.output_dir == "d"


def test_a_language_is_no_truth_value(tmp_path):
    path = write_all(tmp_path, mine="extends: needed.yaml\ndata: {where: {language: [no, en]}}\n", needed=NEEDED)
    with pytest.raises(ConfigError, match=r"`data\.where\.language` must be true or false, or text in quotes"):
        load_config(path)
    path.write_text("extends: needed.yaml\ndata: {where: {language: ['no', en], toxic: false}}\n")
    assert load_config(path).data.where == {"language": ["no", "en"], "toxic": False}
    path.write_text(as_yaml(load_config(path)))
    assert load_config(path).data.where == {"language": ["no", "en"], "toxic": False}


@pytest.mark.parametrize("name", presets.names())
def test_presets_load_beside_what_a_run_needs(name, tmp_path):
    needed = "model: {path: a}\nreward: {path: c}\n"
    path = write_all(tmp_path, mine=f"extends: [needed.yaml, {name}]\nrun: {{output_dir: here}}\n", needed=needed)
    config = load_config(path)
    assert config.run.output_dir == "here" and config.data.max_prompt_length >= 512
    assert presets.about(name) and len(presets.about(name)) < 100
    path.write_text(as_yaml(config))
    assert load_config(path) == config


def test_presets_are_listed_and_printed(capsys):
    main(["presets"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == presets.names() and len(lines) >= 7
    main(["presets", "gsm8k"])
    assert capsys.readouterr().out.strip() == (presets.FOLDER / "gsm8k.yaml").read_text().strip()


def test_a_preset_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["presets", "gsm9k"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: there is no preset 'gsm9k'; did you mean gsm8k?\n"
