"""A configuration comes back as it was written, and a wrong one says what, where and what instead."""

from pathlib import Path

import pytest

from mfdist.config import RunConfig, config_keys, load_config, parse_config, preset_names
from mfdist.errors import ConfigError

SMALL = """\
[model]  # the smallest that validates
num_layers = 1
hidden_dim = 16
num_heads = 2

[training]
steps = 2
batch_size = 4
seq_len = 8
"""


def message_of(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, origin="run.toml", overrides=overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_survives_a_round_trip(name: str) -> None:
    config = load_config(name)
    assert parse_config(config.to_toml(), origin="again") == config
    assert config.name == name


def test_the_presets_have_the_papers_shapes() -> None:
    shapes = {
        name: (m.num_layers, m.hidden_dim, m.num_heads, m.bits, m.extra_bits)
        for name in ("tiny", "small", "base")
        for m in [load_config(name).model]
    }
    assert shapes == {"tiny": (6, 512, 8, 8, 2), "small": (12, 768, 12, 8, 2), "base": (24, 1024, 16, 8, 2)}
    assert preset_names()[:4] == ["demo", "tiny", "small", "base"]


def test_values_that_toml_must_quote_survive_a_round_trip(tmp_path: Path) -> None:
    config = parse_config(SMALL, origin="run.toml", overrides=[f"data.cache_dir={tmp_path}/a b"])
    odd = config.model_copy(update={"name": 'run "7" \\ α\n'})
    assert parse_config(odd.to_toml(), origin="again") == odd
    assert odd.data.cache_dir == tmp_path / "a b"


def test_a_configuration_cannot_be_changed() -> None:
    config = parse_config(SMALL, origin="run.toml")
    with pytest.raises(ValueError, match="frozen"):
        config.training.steps = 3  # type: ignore[misc]


def test_overrides_apply_in_order_and_the_last_wins() -> None:
    config = load_config("demo", ["model.bits=4", "training.precision=bf16", "model.bits=2", "optimizer.dense.lr=1e-4"])
    assert (config.model.bits, config.training.precision, config.optimizer.dense.lr) == (2, "bf16", 1e-4)
    assert config.model.hidden_dim == load_config("demo").model.hidden_dim


def test_an_override_may_be_a_list_or_a_quoted_string() -> None:
    config = load_config("demo", ["optimizer.tables.betas=[0.5, 0.75]", 'name="7"', "data.source=my text/ü"])
    assert config.optimizer.tables.betas == (0.5, 0.75)
    assert (config.name, config.data.source) == ("7", "my text/ü")


def test_of_two_equal_overrides_the_message_names_the_last() -> None:
    message = message_of(SMALL, "model.bits=99", "model.bits=98")
    assert "--set model.bits=98" in message
    assert "99" not in message


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("modl.bits=4", "model"),
        ("model.bit=4", "model.bits"),
        ("model.hiden_dim=4", "model.hidden_dim"),
        ("training.num_heads=4", "model.num_heads"),  # the same name elsewhere beats a similar one here
        ("training.lr=1e-3", "optimizer.dense.lr"),
        ("optimizer.weight_decay=0", "optimizer.dense.weight_decay"),
        ("optimiser.dense.lr=1e-3", "optimizer"),
        ("checkpoint.keep=3", "checkpoint.keep_last"),
        ("steps=3", "training.steps"),
        ("tables.lr=1", "optimizer.tables"),
    ],
)
def test_an_unknown_key_names_the_nearest_right_one(override: str, nearest: str) -> None:
    message = message_of(SMALL, override)
    assert f"--set {override}" in message
    assert f'did you mean "{nearest}"?' in message


def test_a_key_like_no_other_lists_its_section() -> None:
    assert message_of(SMALL, "checkpoint.zzz=1").endswith(
        "; keys here are every, keep_last, keep_every, url, asynchronous, max_copy_gib, incremental"
    )


def test_a_misspelt_key_or_section_names_its_line() -> None:
    assert message_of(SMALL.replace("num_heads", "n_heads")).startswith(
        'unknown key "model.n_heads" in run.toml, line 4; did you mean "model.num_heads"?'
    )
    assert message_of(SMALL.replace("[training]", "[trainning]")).startswith(
        'unknown key "trainning" in run.toml, line 6; did you mean "training"?'
    )


def test_a_wrong_value_names_the_value_and_its_line() -> None:
    message = message_of(SMALL.replace("num_layers = 1", 'num_layers = "many"'))
    assert message.startswith("num_layers should be a valid integer")
    assert message.endswith("got model.num_layers='many' in run.toml, line 2")


def test_a_wrong_part_of_a_list_names_the_lists_line() -> None:
    assert message_of(SMALL + "[optimizer.dense]\nlr = 1e-3\nbetas = [0.9, 1.5]\n").endswith(
        "got optimizer.dense.betas.1=1.5 in run.toml, line 12"
    )


@pytest.mark.parametrize("bits", [0, 25, -1])
def test_bits_outside_1_to_24_are_refused(bits: int) -> None:
    assert f"got model.bits={bits} in --set model.bits={bits}" in message_of(SMALL, f"model.bits={bits}")


def test_not_finite_is_refused() -> None:
    assert "optimizer.dense.lr" in message_of(SMALL, "optimizer.dense.lr=inf")
    assert "optimizer.dense.lr" in message_of(SMALL, "optimizer.dense.lr=nan")


def test_a_missing_key_says_how_to_give_it() -> None:
    assert message_of(SMALL.replace("steps = 2\n", "")) == (
        'key "training.steps" is missing in run.toml; add it to the file or give --set training.steps=...'
    )
    assert message_of("name = 'x'") == (
        "section [model] is missing in run.toml; add it to the file, or start from a preset"
    )


@pytest.mark.parametrize(
    ("overrides", "rule", "blamed"),
    [
        (["model.bits=5"], "bits must divide hidden_dim", "--set model.bits=5"),
        (["training.steps=9", "model.num_heads=3"], "num_heads must divide hidden_dim", "--set model.num_heads=3"),
        (["model.bits=16", "model.hidden_dim=32", "model.extra_bits=8", "model.bits=24", "model.hidden_dim=48"],
         "bits + extra_bits must be at most 24", "--set"),
        (["training.micro_batches=3"], "micro_batches must divide batch_size", "--set training.micro_batches=3"),
        (["training.steps=9", "training.seq_len=4096"], "training.seq_len must be at most", "--set training.seq_len"),
        (["training.steps=9", "model.max_seq_len=4"], "training.seq_len must be at most", "--set model.max_seq_len=4"),
    ],
)  # fmt: skip
def test_a_rule_between_keys_names_the_override_that_broke_it(overrides: list[str], rule: str, blamed: str) -> None:
    message = message_of(SMALL, *overrides)
    assert message.startswith(rule)
    assert blamed in message


def test_a_rule_broken_in_the_file_is_not_blamed_on_an_override() -> None:
    message = message_of(SMALL.replace("num_heads = 2", "num_heads = 3"), "model.score=released", "training.steps=9")
    assert message.endswith("got hidden_dim=16, num_heads=3 (in run.toml, line 1)")


def test_the_dense_twin_needs_no_whole_chunks() -> None:
    assert parse_config(SMALL, origin="run.toml", overrides=["model.kind=dense", "model.bits=5"]).model.bits == 5


@pytest.mark.parametrize("override", ["model.bits", "=3", "model..bits=3", "model bits=3", ""])
def test_a_malformed_override_shows_the_form(override: str) -> None:
    assert message_of(SMALL, override) == (f'--set takes section.key=value, such as model.bits=10; got "{override}"')


def test_a_value_is_not_a_section() -> None:
    assert message_of(SMALL, "model.num_heads.x=1") == '--set model.num_heads.x: "num_heads" is a value, not a section'


def test_a_file_that_is_not_toml_names_itself_and_the_line(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[model]\nbits = = 8\n")
    with pytest.raises(ConfigError, match=rf"{path}: .*line 2"):
        load_config(path)


def test_a_file_that_cannot_be_read_names_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml cannot be read \(No such file or directory\)"):
        load_config(tmp_path / "nowhere.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml cannot be read \(not UTF-8\)"):
        load_config(tmp_path / "latin.toml")


def test_a_misspelt_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r'got "dmeo"; did you mean "demo"\?'):
        load_config("dmeo")


def test_every_key_has_a_description() -> None:
    keys = list(config_keys())
    assert len(keys) == len(set(keys)) > 40
    undocumented = []
    for key in keys:
        model: type = RunConfig
        *sections, leaf = key.split(".")
        for section in sections:
            model = model.model_fields[section].annotation  # type: ignore[attr-defined]
        if not model.model_fields[leaf].description:  # type: ignore[attr-defined]
            undocumented.append(key)
    assert undocumented == []
