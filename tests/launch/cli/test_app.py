"""The command as a whole: version, help, misuse, and a quick start."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import typer

import mfdist
import mfdist.config
from mfdist.config import config_keys, parse_config
from mfdist.launch.cli import app, train


def ended(capsys, *arguments):
    code = app.run(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def words(text):
    """Return help text without its boxes and line breaks."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


def test_version_says_what_is_running(capsys):
    code, out, err = ended(capsys, "--version")
    assert (code, err) == (0, "")
    version, origin, libraries = out.splitlines()
    assert version == f"mfdist {mfdist.__version__}"
    assert str(Path(mfdist.__file__).parents[1]) in origin
    assert f"torch {metadata.version('torch')}" in libraries


@pytest.mark.parametrize(
    "arguments", [["--debug", "train", "dmeo", "--out", "x"], ["train", "dmeo", "--out", "x", "--debug"]]
)
def test_debug_shows_the_traceback_of_what_a_user_can_mend(capsys, arguments):
    code, _, err = ended(capsys, *arguments)
    assert code == 2
    assert err.startswith("Traceback")
    assert "ConfigError" in err
    assert err.splitlines()[-1].startswith("mfdist: ")


def test_debug_behind_two_dashes_is_left_to_the_command(capsys):
    code, _, err = ended(capsys, "train", "--", "--debug")
    assert code == 2
    assert "Traceback" not in err


def test_no_verb_shows_the_help_and_is_misuse(capsys):
    code, out, err = ended(capsys)
    assert code == 2
    assert "mfdist train demo --out" in words(out + err)


GROUPS = typer.main.get_command(app.app).commands


def verbs(command, path=()):
    """Yield the words of every verb that does something."""
    children = getattr(command, "commands", {})
    if not children:
        yield [*path]
    for name, child in children.items():
        yield from verbs(child, (*path, name))


@pytest.mark.parametrize("verb", [*verbs(typer.main.get_command(app.app))], ids=" ".join)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_verb_has_help_with_an_example(capsys, verb, flag):
    code, out, err = ended(capsys, *verb, flag)
    assert (code, err) == (0, "")
    assert f"Example: mfdist {' '.join(verb)} " in words(out)


@pytest.mark.parametrize("group", [name for name, verb in GROUPS.items() if hasattr(verb, "commands")])
def test_a_group_of_verbs_has_an_example_too(capsys, group):
    _, out, _ = ended(capsys, group, "--help")
    assert f"Example: mfdist {group} " in words(out)


def test_the_help_of_train_lists_the_presets_and_says_what_prints_the_keys(capsys):
    _, out, _ = ended(capsys, "train", "--help")
    assert list(train.PRESETS) == mfdist.config.preset_names()
    assert all(f"{name} (" in words(out) for name in train.PRESETS)
    assert "--keys prints them with their defaults and meanings" in words(out)


@pytest.mark.parametrize("verb", [*verbs(typer.main.get_command(app.app))], ids=" ".join)
def test_no_help_names_a_file_that_an_installation_lacks(capsys, verb):
    _, out, _ = ended(capsys, *verb, "--help")
    assert "docs/" not in words(out)
    assert ".md" not in words(out)


def test_the_keys_of_train_are_a_configuration_once_what_must_be_given_is(capsys):
    code, out, err = ended(capsys, "train", "--keys")
    assert (code, err) == (0, "")
    required = {"num_layers": 2, "hidden_dim": 64, "num_heads": 4, "steps": 7, "batch_size": 2, "seq_len": 8}
    text = re.sub(r"# (\w+) =    \(must be given\)", lambda key: f"{key[1]} = {required[key[1]]}", out)
    text = text.replace("[optimizer.dense]", "[optimizer.dense]\nlr = 0.01", 1)
    config = parse_config(text, origin="--keys")
    assert (config.training.steps, config.model.bits, config.checkpoint.keep_last) == (7, 8, 2)
    named = {key.rpartition(".")[2] for key in config_keys()}
    assert named == set(re.findall(r"^(?:# )?(\w+) =", out, re.MULTILINE))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["checkpoint"], "Missing command"),
        (["train", "--steps"], "requires an argument"),
        (["train", "--steps", "many"], "'--steps'"),
        (["train", "--steps", "0"], "'--steps'"),
        (["train", "--frobnicate"], "No such option"),
        (["train"], "train needs a configuration or a run"),
        (["train", "demo"], "a new run needs a folder; give one: mfdist train demo --out RUN"),
        (["train", "demo", "--resume", "x"], 'got the configuration "demo" too'),
        (["train", "--resume", "x", "--out", "y"], "got --out too"),
        (["train", "dmeo", "--out", "x"], 'did you mean "demo"?'),
        (["train", "demo", "--out", "x", "--set", "model.bitz=4"], 'did you mean "model.bits"?'),
        (["train", "demo", "--out", "x", "--set", "bits"], "--set takes section.key=value"),
        (["train", "demo", "--out", "x", "--device", "tpu"], "training.device"),
        (["generate", "x"], "Missing option '--prompt'"),
        (["generate"], "Missing argument 'RUN'"),
        (["evaluate", "x", "--step", "-1"], "'--step'"),
    ],
)
def test_misuse_is_one_line_and_changes_nothing(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = ended(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("mfdist: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["train", "demo"]])
def test_what_needs_no_model_imports_nothing_heavy(arguments):
    script = (
        "import sys\nfrom mfdist.launch.cli import app\napp.run(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'zarr', 'numba', 'triton', 'tokenizers', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
