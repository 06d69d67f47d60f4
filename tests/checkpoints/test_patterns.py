"""PEFT's pattern semantics in closed form; tests/interop/test_peft_patterns.py holds them to PEFT itself."""

import math
import re

import pytest

from rankwise.checkpoints.patterns import Pattern, idle_keys, read_settings
from rankwise.errors import ConfigError
from rankwise.scaling import scaling


@pytest.mark.parametrize(
    ("key", "name", "matches"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("q_proj", "q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("self_attn", "model.layers.0.self_attn.q_proj", False),
        ("layers.0", "model.layers.0.self_attn.q_proj", False),
        ("layers.1.q", "model.layers.11.q", False),
        ("layers.1.q", "model.layers.1xq", True),  # an unescaped dot is any character
        ("q|v", "a.v", True),
        ("^q", "a.q", False),
        ("^a.q", "a.q", True),
        (r".*\.q", "a.b.q", True),
        ("q", "a.q\n", True),  # `$` of Python, as PEFT uses it
    ],
)
def test_a_key_covers_the_end_of_the_name_from_a_dot_on(key, name, matches):
    assert (Pattern({key: 1}).matches(name) == (0,)) is matches
    assert (re.match(rf"(.*\.)?({key})$", name) is not None) is matches  # the line of PEFT


def test_the_short_cut_for_plain_keys_changes_nothing(rng):
    """Plain paths are told by their length first; any key and name over few letters agree with the bare line."""
    letters = list("ab.\n0_")
    for _ in range(3000):
        key, name = ("".join(rng.choice(letters, rng.integers(1, n))) for n in (5, 8))
        assert bool(Pattern({key: 1}).matches(name)) is bool(re.match(rf"(.*\.)?({key})$", name)), (key, name)


def test_the_short_cut_for_whole_paths_changes_nothing(rng):
    """Keys of `^` and an escaped path are looked up; with others around them, positions agree with the bare line."""
    parts = ["a", "b", "_0", "-", "\\.", "\\-", "\\[", ".", "\\b", "$"]
    letters = list("ab.\n0_-[")
    hit = 0
    for _ in range(2000):
        keys = ["^" + "".join(rng.choice(parts, rng.integers(1, 4))) for _ in range(3)] + ["a", "a"]
        pattern = Pattern(dict.fromkeys(keys, 1))
        name = "".join(rng.choice(letters, rng.integers(1, 5)))
        wanted = tuple(i for i, key in enumerate(pattern.keys) if re.match(rf"(.*\.)?({key})$", name))
        assert pattern.matches(name) == wanted, (keys, name)
        hit += bool(wanted)
    assert hit > 50  # or nothing was compared


def test_first_in_the_order_of_the_file_wins():
    config = {"r": 2, "lora_alpha": 4, "rank_pattern": {"q": 8, "layers.0.q": 64}}
    assert read_settings(config, "c").rank_of("layers.0.q") == 8
    config["rank_pattern"] = {"layers.0.q": 64, "q": 8}
    assert read_settings(config, "c").rank_of("layers.0.q") == 64


@pytest.mark.parametrize("rslora", [False, True])
def test_rank_and_alpha_are_looked_up_independently(rslora):
    config = {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": rslora,
        "rank_pattern": {"q": 16},
        "alpha_pattern": {"v": 2.5},
    }
    settings = read_settings(config, "c")
    for name, r, alpha in (("a.q", 16, 8.0), ("a.v", 4, 2.5), ("a.o", 4, 8.0)):
        assert (settings.rank_of(name), settings.alpha_of(name)) == (r, alpha)
        assert scaling(settings.rule, alpha, r) == alpha / (math.sqrt(r) if rslora else r)


def test_keys_that_do_nothing_are_told_apart():
    config = {
        "rank_pattern": {"q": 8, "layers.0.q": 64, "nothing": 1, "v": 3},
        "alpha_pattern": {"nor_this": 1, "q": 2},
    }
    unmatched, shadowed = idle_keys(read_settings(config, "c"), ["layers.0.q", "layers.1.q", "layers.0.v"])
    assert unmatched == ["rank_pattern['nothing']", "alpha_pattern['nor_this']"]
    assert shadowed == ["rank_pattern['layers.0.q']"]


def test_defaults_are_pefts():
    settings = read_settings({}, "c")
    assert (settings.r, settings.lora_alpha, settings.rule, settings.defaulted) == (8, 8.0, "lora", ("r", "lora_alpha"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": "8"}, r"`r` is '8'; wanted an integer .* without quotes"),
        ({"r": 8.0}, r"`r` is 8\.0"),
        ({"r": True}, "`r` is True"),
        ({"r": 0}, "`r` is 0"),
        ({"r": 10**40}, "`r` is 1"),
        ({"lora_alpha": "16"}, "`lora_alpha` is '16'; wanted a number"),
        ({"lora_alpha": 0}, "finite number above 0"),
        ({"lora_alpha": -1.5}, "finite number above 0"),
        ({"lora_alpha": math.nan}, "finite number above 0"),
        ({"lora_alpha": 10**400}, "finite number above 0"),
        ({"use_rslora": "yes"}, "`use_rslora` is 'yes'; wanted true or false"),
        ({"rank_pattern": [["q", 8]]}, "`rank_pattern` is a JSON list; wanted an object"),
        ({"alpha_pattern": "q"}, "`alpha_pattern` is a JSON str"),
        ({"rank_pattern": {"q": "8"}}, r"`rank_pattern\['q'\]` is '8'"),
        ({"alpha_pattern": {"q": None}}, r"`alpha_pattern\['q'\]` is None"),
        ({"rank_pattern": {"(": 8}}, r"the key '\(' of `rank_pattern` is no regular expression"),
        ({"rank_pattern": {"a(?i)": 8}}, "no regular expression"),
    ],
)
def test_wrong_values_name_field_got_and_expected(config, words):
    with pytest.raises(ConfigError, match=f"where: .*{words}"):
        read_settings(config, "where")
