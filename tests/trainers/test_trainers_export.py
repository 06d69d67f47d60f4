"""Every trainer's files, read again here by other means, are the plan; what cannot be said is refused in words."""

from __future__ import annotations

import ast
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from trainer_plans import LLAMA, mixed, names, peft_gives, planned, uniform, wanted

from rankwise.errors import CannotCarryError, ReadBackError, UsageError
from rankwise.records.plan import PlanChoice, PlannedModule, UniformRank
from rankwise.scaling import alpha_for, scaling
from rankwise.trainers import TRAINERS, exporting
from rankwise.trainers import export as export_with_peft
from rankwise.trainers.model import Written

PER_MODULE = [name for name, trainer in TRAINERS.items() if trainer.per_module]
FLAT = [name for name, trainer in TRAINERS.items() if not trainer.per_module]
RULES = ["lora", "rslora", "unscaled"]


def export(plan, trainer, **more):
    """Without PEFT itself, which tests/trainers/test_trainers_interop.py asks."""
    return export_with_peft(plan, trainer, ask_peft=False, **more)


def python_call(text, name):
    """Run nothing; return the arguments of the call assigned to a name."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return {k.arg: ast.literal_eval(k.value) for k in node.value.keywords}
    raise AssertionError(name)


def lora_config(trainer, files):
    """Return the LoraConfig that each file makes, by the trainers' own keys and other code than the export's."""
    if trainer == "peft":
        return [json.loads(files["adapter_config.json"])]
    if trainer == "axolotl":
        y = yaml.safe_load(files["axolotl.yaml"])
        return [
            {
                "r": y["lora_r"],
                "lora_alpha": y["lora_alpha"],
                "use_rslora": y["peft_use_rslora"],
                "target_modules": y["lora_target_modules"],
                "rank_pattern": y.get("lora_rank_pattern"),
                "alpha_pattern": y.get("lora_alpha_pattern"),
            }
        ]
    if trainer == "llamafactory":
        y = yaml.safe_load(files["llamafactory.yaml"])
        assert y["finetuning_type"] == "lora"
        return [
            {
                "r": y["lora_rank"],
                "lora_alpha": y["lora_alpha"],
                "use_rslora": y["use_rslora"],
                "target_modules": y["lora_target"].split(","),
            }
        ]
    if trainer == "unsloth":
        return [python_call(files["unsloth_lora.py"], "LORA")]
    found = [python_call(files["trl_lora.py"], "PEFT_CONFIG")]
    if "trl_sft.yaml" in files:
        y = yaml.safe_load(files["trl_sft.yaml"])
        assert y["use_peft"] is True
        targets = y["lora_target_modules"]
        found.append(
            {
                "r": y["lora_r"],
                "lora_alpha": y["lora_alpha"],
                "use_rslora": y["use_rslora"],
                "target_modules": targets if len(targets) > 1 else targets[0],
            }
        )
    return found


def scale_of(trainer, files):
    """Return (rank, scale) of a trainer that is no PEFT."""
    y = yaml.safe_load(next(iter(files.values())))
    if trainer == "torchtune":
        return y["model"]["lora_rank"], y["model"]["lora_alpha"] / y["model"]["lora_rank"]
    if trainer == "litgpt":
        return y["lora_r"], y["lora_alpha"] / y["lora_r"]
    return y["lora_parameters"]["rank"], y["lora_parameters"]["scale"]


def assert_is_plan(plan, trainer, made, outside=(), rel=1e-9):
    if trainer in ("torchtune", "litgpt", "mlx"):
        got = scale_of(trainer, made.files)
        for asked in wanted(plan).values():
            assert (got[0], pytest.approx(got[1], rel=rel)) == asked
    else:
        for config in lora_config(trainer, made.files):
            for name, (r, scale) in wanted(plan).items():
                assert peft_gives(config, name) == (r, pytest.approx(scale, rel=rel)), name
            for name in outside:
                assert peft_gives(config, name) is None, name
    assert {m.module: (m.r, pytest.approx(m.scaling, rel=rel)) for m in made.modules} == wanted(plan)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_uniform_plan_comes_out_the_same_everywhere(trainer, rule):
    plan = uniform(16, {"lora": 32.0, "rslora": 8.0, "unscaled": 2.0}[rule], rule)  # a scale of 2 each
    made = export(plan, trainer)
    assert_is_plan(plan, trainer, made)
    assert all(m.scale_error == pytest.approx(0, abs=1e-12) for m in made.modules)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("trainer", PER_MODULE)
def test_a_mixed_plan_comes_out_the_same_where_the_trainer_takes_one(trainer, rule):
    plan = mixed(rule)
    made = export(plan, trainer)
    assert_is_plan(plan, trainer, made)
    config = lora_config(trainer, made.files)[0]
    assert config["rank_pattern"].keys() == config["alpha_pattern"].keys()  # never a rank alone
    assert (config["r"], len(config["rank_pattern"])) == (4, 4)  # the most common pair needs no key
    assert config["use_rslora"] is (rule == "rslora")


@pytest.mark.parametrize("trainer", FLAT)
def test_a_mixed_plan_is_refused_where_the_trainer_takes_one_rank(trainer):
    with pytest.raises(CannotCarryError, match=r"one rank and one alpha .* 2 ranks \(4 to 16\)") as caught:
        export(mixed(), trainer)
    assert "--uniform" in str(caught.value)
    assert ("--as-adapter" in str(caught.value)) is (trainer == "llamafactory")


@pytest.mark.parametrize("trainer", FLAT)
def test_one_rank_and_several_scales_are_refused_too(trainer):
    rows = [(n, s, 8, 8.0 * (1 + i % 2)) for i, (n, s) in enumerate(names().items())]
    with pytest.raises(CannotCarryError, match="one rank and 2 scales"):
        export(planned(rows), trainer)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_uniform_makes_one_rank_of_no_more_parameters(trainer):
    plan = mixed()
    made = export(plan, trainer, uniform=True)
    ranks = {m.r for m in made.modules}
    cost = sum(sum(m.shape) for m in plan.modules)
    assert ranks == {plan.params // cost}
    assert all(m.scaling == pytest.approx(2.0) for m in made.modules)  # the scale is what the modules share
    assert any("in place of ranks 4 to 16" in note for note in made.notes)
    assert not any("trl sft` takes no rank" in note for note in made.notes)


def test_uniform_keeps_the_alpha_where_that_is_what_the_modules_share():
    rows = [("a.q", (64, 64), 4, 8.0), ("a.v", (64, 64), 16, 8.0)]
    made = export(planned(rows, "rslora"), "peft", uniform=True)
    assert {(m.r, m.lora_alpha, m.scaling) for m in made.modules} == {(10, 8.0, 8.0 / math.sqrt(10))}
    rows = [("a.q", (64, 64), 4, 8.0), ("a.v", (64, 64), 16, 9.0)]
    with pytest.raises(CannotCarryError, match="share neither scale"):
        export(planned(rows), "peft", uniform=True)


def test_uniform_obeys_the_multiples_and_the_largest_rank_of_the_plan():
    rows = [("a.q", (64, 64), 8, 8.0), ("a.v", (64, 64), 24, 24.0)]
    for more, r in ({}, 16), ({"multiple_of": 12}, 12), ({"max_rank": 9}, 9), ({"multiple_of": 32}, 16):
        choice = PlanChoice(kind="budget", value=1.0, text="1", **more)
        assert {m.r for m in export(planned(rows, choice=choice), "peft", uniform=True).modules} == {r}


def test_uniform_of_one_rank_for_all_is_that_rank_beside_a_smaller_weight():
    rows = [("a.q", (64, 64), 16, 16.0), ("a.gate", (8, 64), 8, 8.0)]
    plan = planned(rows, choice=PlanChoice(kind="rank", value=16.0, text="16"))
    made = export(plan, "llamafactory", uniform=True)
    assert {m.r for m in made.modules} == {16}
    assert any("above the smaller side of 1 weights (first a.gate)" in note for note in made.notes)


def test_uniform_says_a_bound_on_the_error_that_holds():
    """The top k of r values hold at least k / r of what all r hold: planted with equal values, where it is tight."""
    modules = tuple(
        PlannedModule(
            module=name, shape=(64, 64), r=r, lora_alpha=2.0 * r, scaling=2.0, kept_energy_share=share, energy=energy
        )
        for name, r, share, energy in (("a.q", 12, 0.96, 10.0), ("a.v", 4, 0.5, 6.0))
    )
    plan = planned([], modules=modules, params=16 * 128)
    (note,) = [n for n in export(plan, "peft", uniform=True).notes if "Uniform rank 8" in n]
    bound = math.sqrt((10 * (1 - 0.96 * 8 / 12) + 6 * 0.5) / 16)
    before = math.sqrt((10 * 0.04 + 6 * 0.5) / 16)
    assert f"at most {bound:.4f}, where the plan has {before:.4f}" in note


def test_uniform_may_spend_the_budget_and_says_the_error_that_the_plan_knows():
    """The plan left a little of its budget; the uniform rank that the budget meant still fits."""
    rows = [("a.q", (64, 64), 5, 5.0), ("a.v", (64, 60), 3, 3.0)]
    known = UniformRank(r=4, params=4 * 252, relative_error=0.25)
    plan = planned(rows, budget=4 * 252 + 3, relative_error=0.125, uniform=known)
    assert plan.params < 4 * 252 + 4 * 124
    made = export(plan, "peft", uniform=True)
    assert {m.r for m in made.modules} == {4}
    assert any("Relative error: 0.2500, where the plan has 0.1250." in note for note in made.notes)
    other = planned(
        rows, budget=4 * 252 + 3, relative_error=0.125, uniform=UniformRank(r=4, params=1, relative_error=0.3)
    )
    assert any("is not known" in note for note in export(other, "peft", uniform=True).notes)  # of other modules


def test_uniform_says_the_error_of_the_spectra_where_they_are_at_hand():
    sigma = {"a.q": (3.0, 2.0, 1.0, 1.0), "a.v": (2.0, 1.0, 1.0, 0.5)}
    spectra = SimpleNamespace(
        modules=[
            SimpleNamespace(module=name, energy=sum(v * v for v in values), singular_values=values, complete=True)
            for name, values in sigma.items()
        ]
    )
    plan = planned([("a.q", (64, 64), 3, 3.0), ("a.v", (64, 64), 1, 1.0)])
    (note,) = [n for n in export(plan, "peft", uniform=True, spectra=spectra).notes if "Uniform" in n]
    flat, before = math.sqrt((2.0 + 1.25) / 21.25), math.sqrt((1.0 + 2.25) / 21.25)
    assert f"{flat:.4f}, where the plan has {before:.4f}" in note


def test_a_plan_that_is_uniform_already_says_so():
    assert "The plan is uniform as it is: rank 8." in export(uniform(), "llamafactory", uniform=True).notes


# whole alphas


@pytest.mark.parametrize("trainer", ["axolotl", "llamafactory", "litgpt"])
def test_whole_alphas_are_refused_where_the_scale_would_be_off(trainer):
    """rsLoRA at scale 2 and rank 32 needs alpha 11.31; LitGPT, without rsLoRA, needs 64 and has no trouble."""
    plan = uniform(32, 2 * math.sqrt(32), "rslora")
    if trainer == "litgpt":
        assert {m.lora_alpha for m in export(plan, trainer).modules} == {64}
        plan = uniform(32, 10.4)  # alpha / r
    with pytest.raises(CannotCarryError) as caught:
        export(plan, trainer)
    words = str(caught.value)
    alpha = 10.4 if trainer == "litgpt" else 2 * math.sqrt(32)
    assert f"needs alpha = {alpha:.6g}" in words
    assert f"off by {round(alpha) / alpha - 1:+.2%}" in words
    assert ("--scaling lora" in words) is (trainer != "litgpt")
    suggested = float(re.search(r"--scale ([\d.]+)", words)[1])
    rule = plan.rule
    again = uniform(32, alpha_for(rule, suggested, 32), rule)
    assert_is_plan(again, trainer, export(again, trainer), rel=1e-3)  # what the message proposes is taken


@pytest.mark.parametrize("trainer", ["axolotl", "llamafactory"])
def test_whole_alphas_are_taken_within_the_tolerance_and_the_error_is_said(trainer):
    plan = uniform(32, 2 * math.sqrt(32), "rslora")
    made = export(plan, trainer, alpha_tolerance=0.03)
    error = 11 / (2 * math.sqrt(32)) - 1  # -2.8 %
    assert {m.lora_alpha for m in made.modules} == {11}
    assert all(m.scale_error == pytest.approx(error) for m in made.modules)
    text = next(iter(made.files.values()))
    assert f"{abs(error):.2%}" in text
    assert any(f"{abs(error):.2%}" in note for note in made.notes)


def test_a_scale_for_several_ranks_fits_all_of_them():
    rows = [("a.q", (64, 64), 9, 3.1 * 3), ("a.v", (64, 64), 16, 3.1 * 4)]
    with pytest.raises(CannotCarryError, match=r"--scale 3,|--scale 3 ?,?") as caught:
        export(planned(rows, "rslora"), "axolotl")
    assert "--as-adapter" in str(caught.value)


def test_trl_leaves_the_yaml_out_where_alpha_is_not_whole():
    made = export(uniform(32, 2 * math.sqrt(32), "rslora"), "trl")
    assert set(made.files) == {"trl_lora.py"}
    assert any("without the YAML" in note and "needs alpha = 11.3137" in note for note in made.notes)


def test_real_alphas_stay_real():
    plan = uniform(32, 2 * math.sqrt(32), "rslora")
    for trainer in ("peft", "trl", "unsloth", "torchtune", "mlx"):
        assert_is_plan(plan, trainer, export(plan, trainer))


# names

HARD = {
    "a block 11 beside a block 1": ["model.layers.1.q_proj", "model.layers.11.q_proj", "model.layers.111.q_proj"],
    "a vision tower beside a language model": [
        "model.language_model.layers.0.self_attn.q_proj",
        "model.visual.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.q_proj",
    ],
    "a dot that is any character": ["net.a.b", "net.axb", "net.a.b.c"],
    "characters of regular expressions": [
        "net.w+q",
        "net.wwq",
        "net.(x)|y",
        "net.[ab]*",
        "net.a$",
        "net.^a",
        "net.\\d",
    ],
    "names that end alike": ["tower.fc", "fc", "tower.deep.fc"],
    "a whole name that ends another": ["model.layers.0.q", "layers.0.q", "visual.model.layers.0.q"],
    "names with spaces and quotes": ["net.a b", "net.a'b", 'net.a"b', "net.ä", "net.{x}", "net.#c", "net.a: b"],
}


@pytest.mark.parametrize("trainer", PER_MODULE)
@pytest.mark.parametrize("case", HARD)
def test_names_that_look_alike_keep_their_own_ranks(case, trainer):
    rows = [(name, (64, 32), 2 ** (i + 1), 2.0 ** (i + 2)) for i, name in enumerate(HARD[case])]
    plan = planned(rows)
    made = export(plan, trainer)
    assert_is_plan(plan, trainer, made)
    for config in lora_config(trainer, made.files):
        turned = config | {f: dict(reversed((config[f] or {}).items())) for f in ("rank_pattern", "alpha_pattern")}
        for name, (r, scale) in wanted(plan).items():
            assert peft_gives(turned, name) == (r, scale)  # no order changes the meaning
        for field in ("rank_pattern", "alpha_pattern"):
            for key in config[field]:
                assert sum(re.match(rf"(.*\.)?({key})$", name) is not None for name in HARD[case]) == 1


@pytest.mark.parametrize("trainer", ["peft", "axolotl", "unsloth", "trl", "llamafactory"])
def test_a_module_of_rank_zero_that_would_get_an_adapter_is_an_error(trainer):
    rows = [("fc", (8, 8), 4, 8.0), ("other", (8, 8), 4, 8.0), ("tower.fc", (8, 8), 0, 8.0)]
    with pytest.raises(ReadBackError, match=r"gives an adapter to tower\.fc, which is not planned"):
        export(planned(rows), trainer)


def test_a_module_of_rank_zero_is_left_out():
    rows = [("net.a.q", (8, 8), 4, 8.0), ("net.b.q", (8, 8), 0, 8.0)]
    made = export(planned(rows), "peft")
    assert_is_plan(planned(rows), "peft", made, outside=["net.b.q"])


def test_one_target_in_the_yaml_of_trl_is_a_regular_expression():
    """TRL turns a list of one into a string, which PEFT matches against the whole name."""
    made = export(planned([("net.w+q.x", (8, 8), 4, 8.0)]), "trl")
    config = lora_config("trl", made.files)[1]
    assert config["target_modules"] == re.escape("net.w+q.x")
    assert peft_gives(config, "net.w+q.x") == (4, 2.0)
    assert peft_gives(config, "net.w+qqx") is None


def test_names_with_a_comma_are_refused_for_llamafactory():
    with pytest.raises(UsageError, match="holds a comma"):
        export(planned([("a,b", (8, 8), 4, 8.0)]), "llamafactory")


leaves = st.sampled_from(sorted(LLAMA))


@settings(max_examples=30, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    blocks=st.integers(1, 13),
    stem=st.sampled_from(["layers", "model.layers", "model.language_model.layers", "transformer.h"]),
    data=st.data(),
)
def test_any_plan_gives_exactly_its_ranks_and_scales(rule, blocks, stem, data):
    """Under PEFT's lines, for all modules of the tree: those planned, and those left out at rank 0."""
    rows = []
    for name, shape in names(blocks, stem).items():
        r = data.draw(st.integers(0, 64))
        rows.append((name, shape, r, data.draw(st.floats(0.01, 1e4))))
    rows[0] = (*rows[0][:2], max(1, rows[0][2]), rows[0][3])
    plan = planned(rows, rule)
    outside = [name for name, _, r, _ in rows if r == 0]
    for trainer in ("peft", "unsloth", "trl"):
        assert_is_plan(plan, trainer, export(plan, trainer), outside)


# switches: LitGPT and torchtune


@pytest.mark.parametrize("trainer", ["litgpt", "torchtune"])
def test_switches_say_which_kinds_are_adapted(trainer):
    rows = [(n, s, 8, 16.0) for n, s in names(3).items() if "q_proj" in n or "o_proj" in n or "mlp" in n]
    made = export(planned([*rows, ("lm_head", (100, 32), 8, 16.0)]), trainer)
    y = yaml.safe_load(next(iter(made.files.values())))
    if trainer == "litgpt":
        assert {k for k, on in y.items() if on is True} == {"lora_query", "lora_projection", "lora_mlp", "lora_head"}
        assert y["lora_key"] is y["lora_value"] is False
    else:
        model = y["model"]
        assert model["lora_attn_modules"] == ["q_proj", "output_proj"]
        assert (model["apply_lora_to_mlp"], model["apply_lora_to_output"]) == (True, True)
    assert any("blocks in the plan: 3." in note for note in made.notes)


@pytest.mark.parametrize("trainer", ["litgpt", "torchtune"])
@pytest.mark.parametrize(
    ("drop", "words"),
    [
        ("layers.1.self_attn.q_proj", r"leaves self_attn\.q_proj out of block 1"),
        ("layers.0.", r"out of block 0"),
        ("up_proj", r"leaves mlp\.up_proj out"),
    ],
)
def test_plans_that_are_no_choice_of_kinds_are_refused(trainer, drop, words):
    rows = [(n, s, 8, 16.0) for n, s in names(3).items() if drop not in n]
    with pytest.raises(CannotCarryError, match=words):
        export(planned(rows), trainer)
    with pytest.raises(CannotCarryError, match=r"attn\.c_attn is none that its switches mean"):
        export(planned([("transformer.h.0.attn.c_attn", (96, 32), 8, 16.0)]), trainer)
    twice = [(n, s, 8, 16.0) for stem in ("model.layers", "vision.layers") for n, s in names(1, stem).items()]
    with pytest.raises(CannotCarryError, match="one stack of blocks"):
        export(planned(twice), trainer)


# the rest


def test_unsloth_gets_the_full_name_of_an_embedding():
    """A target that is just `embed_tokens` would be trained whole, without LoRA."""
    from rankwise.trainers.model import Asked, Job

    modules = (Asked("model.embed_tokens", (40, 32), 4, 8.0, 2.0),)
    job = Job(modules, (), "lora", None, 1e-3, ("embed_tokens",), conv1d=False)
    (text,) = TRAINERS["unsloth"].write(job).files.values()
    assert python_call(text, "LORA")["target_modules"] == ["model.embed_tokens"]
    with pytest.raises(CannotCarryError, match="a table to train whole"):
        export(planned([("embed_tokens", (40, 32), 4, 8.0)]), "unsloth")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_learning_rate_stands_in_the_file_or_its_absence_is_said(trainer):
    made = export(uniform(learning_rate=3e-5), trainer)
    everything = "\n".join([*made.files.values(), *made.notes])
    assert "3e-05" in everything or "3.0e-05" in everything
    for name, text in made.files.items():
        if name.endswith(".yaml"):
            y = yaml.safe_load(text)
            if name == "torchtune.yaml":
                y = {"learning_rate": y["optimizer"]["lr"]}
            if name == "litgpt.yaml":
                y = {"learning_rate": y["optimizer"]["init_args"]["lr"]}
            assert y["learning_rate"] == 3e-5  # a number, not a word, to PyYAML
    made = export(uniform(), trainer)
    assert "The plan has no learning rate" in "\n".join([*made.files.values(), *made.notes])


@pytest.mark.parametrize("trainer", TRAINERS)
def test_words_of_the_plan_stay_in_their_comments(trainer):
    plan = uniform(why="first\nr: 99\nimport os\x85x: 1\u2028y: 2\r\nlora_r: 3")
    made = export(plan, trainer)
    assert_is_plan(plan, trainer, made)
    for name, text in made.files.items():
        if name.endswith(".yaml"):
            assert not {"r", "x", "y"} & set(yaml.safe_load(text))
        elif name.endswith(".py"):
            assert "import os" not in [ast.unparse(node) for node in ast.parse(text).body]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_text_that_is_not_the_plan_is_never_handed_out(trainer, monkeypatch):
    """The rank in the text is changed after it was written: the read-back sees it."""
    real = TRAINERS[trainer]

    def write(job):
        written = real.write(job)
        return Written(
            {n: re.sub(r"(rank|\br|lora_r)(['\"]?\s*[:=]\s*)8\b", r"\g<1>\g<2>9", t) for n, t in written.files.items()}
        )

    monkeypatch.setitem(exporting.TRAINERS, trainer, replace(real, write=write))
    with pytest.raises(
        ReadBackError, match=r"is not the plan in 14 of 14 modules; first: model\.layers\.0\..* gets rank 9"
    ):
        export(uniform(), trainer)


def test_a_pattern_that_matches_nothing_is_an_error(monkeypatch):
    real = TRAINERS["peft"]

    def write(job):
        config = json.loads(real.write(job).files["adapter_config.json"])
        config["rank_pattern"]["^model\\.layers\\.7\\.mlp\\.up_proj"] = 4
        return Written({"adapter_config.json": json.dumps(config)})

    monkeypatch.setitem(exporting.TRAINERS, "peft", replace(real, write=write))
    with pytest.raises(ReadBackError, match=r"rank_pattern\[.*layers.*7.*\] selects no planned module"):
        export(mixed(), "peft")


def test_bad_plans_are_refused_at_the_door():
    good = uniform()
    with pytest.raises(UsageError, match="unknown trainer 'llama-factory'; the trainers are: peft, axolotl"):
        export(good, "llama-factory")
    with pytest.raises(UsageError, match="no module of a rank above 0"):
        export(planned([("a", (8, 8), 0, 8.0)]), "peft")
    with pytest.raises(UsageError, match="names a module twice"):
        export(planned([("a", (8, 8), 4, 8.0)] * 2), "peft")
    with pytest.raises(CannotCarryError, match=r"experts\.down_proj\[3\] is one expert of a stacked parameter"):
        export(planned([("mlp.experts.down_proj[3]", (8, 8), 4, 8.0)]), "peft")
    with pytest.raises(UsageError, match="--alpha-tolerance"):
        export(good, "axolotl", alpha_tolerance=1.5)
    with pytest.raises(UsageError, match="not both"):
        export(good, "peft", adapter="there", uniform=True)
    wrong = PlannedModule(module="a", shape=(8, 8), r=4, lora_alpha=8.0, scaling=4.0, kept_energy_share=None)
    with pytest.raises(UsageError, match=r"a has scaling 4, and alpha 8 at rank 4 gives 2 under lora"):
        export(planned([], modules=(wrong,)), "peft")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_adapter_is_named_where_the_trainer_can_start_from_one(trainer):
    """A folder that is not on this machine is named as given, and the note says that it was not compared."""
    if not TRAINERS[trainer].from_adapter:
        with pytest.raises(CannotCarryError, match="cannot start from a PEFT adapter folder"):
            export(mixed(), trainer, adapter="there/adapter")
        return
    made = export(mixed(), trainer, adapter="there/adapter")
    (text,) = made.files.values()
    assert "there/adapter" in text
    assert "pattern" not in text.lower()
    assert any("not compared" in note for note in made.notes)
    assert {m.module: (m.r, m.scaling) for m in made.modules} == wanted(mixed())
    if trainer == "llamafactory":
        y = yaml.safe_load(text)
        assert (y["adapter_name_or_path"], y["create_new_adapter"]) == ("there/adapter", False)
    if trainer == "axolotl":
        y = yaml.safe_load(text)
        assert (y["adapter"], y["lora_model_dir"], y["lora_r"]) == ("lora", "there/adapter", 16)


def test_every_rule_of_scaling_is_covered_above():
    from rankwise.scaling import SCALINGS

    assert sorted(SCALINGS) == sorted(RULES)
    assert scaling("unscaled", 2.0, 16) == 2.0
