"""`mfdist generate` on a real run: streamed text, JSON, repeatability, misuse."""

import io
import json
import sys


def test_text_follows_the_prompt(mfdist, finished):
    code, out, err = mfdist("generate", finished[0], "--prompt", "Document", "--tokens", 20)
    assert (code, err) == (0, "")
    assert out.startswith("Document")
    assert len(out) > len("Document\n")
    assert out.endswith("\n")


def test_json_is_one_document_with_the_same_text(mfdist, finished):
    arguments = ["generate", finished[0], "--prompt", "Document", "--tokens", "20", "--seed", "5"]
    document = json.loads(mfdist(*arguments, "--json")[1])
    assert document["prompt"] == "Document"
    assert (document["step"], document["num_tokens"], document["seed"]) == (12, 20, 5)
    assert mfdist(*arguments)[1] == f"Document{document['text']}\n"


def test_a_seed_decides_the_text_and_temperature_0_needs_none(mfdist, finished):
    def text(*more):
        return mfdist("generate", finished[0], "--prompt", "word", "--tokens", 40, *more)[1]

    assert text("--seed", 1) != text("--seed", 2)
    assert text("--seed", 1, "--temperature", 0) == text("--seed", 2, "--temperature", 0)


def test_an_earlier_step_can_be_asked_for(mfdist, finished):
    _, out, _ = mfdist("generate", finished[0], "--prompt", "word", "--tokens", 1, "--step", 10, "--json")
    assert json.loads(out)["step"] == 10


def test_a_step_that_was_not_kept_is_an_error(mfdist, finished):
    code, out, err = mfdist("generate", finished[0], "--prompt", "word", "--step", 3)
    assert (code, out, err.count("\n")) == (1, "", 1)


def test_the_prompt_can_come_from_stdin(mfdist, finished, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    _, out, _ = mfdist("generate", finished[0], "--prompt", "-", "--tokens", 3)
    assert out.startswith("from a pipe")


def test_impossible_sampling_is_misuse(mfdist, finished):
    code, out, err = mfdist("generate", finished[0], "--prompt", "word", "--top-p", 0)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "top_p" in err


def test_no_run_is_misuse(mfdist):
    code, out, err = mfdist("generate", "nowhere", "--prompt", "x")
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_tables_can_stay_in_their_files(mfdist, finished):
    arguments = ["generate", finished[0], "--prompt", "Document", "--tokens", 20, "--seed", 5]
    assert mfdist(*arguments, "--map-tables") == mfdist(*arguments)


def test_a_folder_for_transformers_writes_the_same_text(mfdist, finished, tmp_path):
    assert mfdist("checkpoint", "export", finished[0], "--out", tmp_path / "hf", "--format", "hf")[0] == 0
    more = ["--prompt", "Document", "--tokens", 20, "--seed", 5]
    assert mfdist("generate", tmp_path / "hf", *more) == mfdist("generate", finished[0], *more)
    code, _, err = mfdist("generate", tmp_path / "hf", *more, "--step", 3)
    assert code == 2 and "--step is for runs" in err
    (tmp_path / "hf" / "tokenizer.json").unlink()
    code, _, err = mfdist("generate", tmp_path / "hf", *more)
    assert code == 2 and "must have a tokenizer.json" in err


def test_the_speed_of_the_twin_is_told_beside_the_models(mfdist, finished):
    arguments = ["generate", finished[0], "--prompt", "word", "--tokens", 3, "--against-twin", "--threads", 1]
    code, out, err = mfdist(*arguments)
    assert code == 0 and out.startswith("word")
    assert "times as fast, on 1 thread\n" in err
    document = json.loads(mfdist(*arguments, "--json")[1])
    assert document["threads"] == 1
    assert min(document["tokens_per_s"], document["twin_tokens_per_s"], document["times_the_twin"]) > 0
