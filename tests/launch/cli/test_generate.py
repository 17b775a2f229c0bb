"""`mfdist generate` on a real run: streamed text, JSON, repeatability, misuse."""

import json


def test_text_follows_the_prompt(mfdist, finished):
    done = mfdist("generate", finished[0], "--prompt", "Document", "--tokens", 20)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Document")
    assert len(done.stdout) > len("Document\n")
    assert done.stdout.endswith("\n")


def test_json_is_one_document_with_the_same_text(mfdist, finished):
    arguments = ["generate", finished[0], "--prompt", "Document", "--tokens", "20", "--seed", "5"]
    document = json.loads(mfdist(*arguments, "--json").stdout)
    assert document["prompt"] == "Document"
    assert (document["step"], document["num_tokens"], document["seed"]) == (12, 20, 5)
    assert mfdist(*arguments).stdout == f"Document{document['text']}\n"


def test_a_seed_decides_the_text_and_temperature_0_needs_none(mfdist, finished):
    def text(*more):
        return mfdist("generate", finished[0], "--prompt", "word", "--tokens", 40, *more).stdout

    assert text("--seed", 1) != text("--seed", 2)
    assert text("--seed", 1, "--temperature", 0) == text("--seed", 2, "--temperature", 0)


def test_an_earlier_step_can_be_asked_for(mfdist, finished):
    done = mfdist("generate", finished[0], "--prompt", "word", "--tokens", 1, "--step", 10, "--json")
    assert json.loads(done.stdout)["step"] == 10


def test_a_step_that_was_not_kept_is_an_error(mfdist, finished):
    done = mfdist("generate", finished[0], "--prompt", "word", "--step", 3)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1


def test_the_prompt_can_come_from_stdin(mfdist, finished):
    done = mfdist("generate", finished[0], "--prompt", "-", "--tokens", 3, input="from a pipe")
    assert done.stdout.startswith("from a pipe")


def test_impossible_sampling_is_misuse(mfdist, finished):
    done = mfdist("generate", finished[0], "--prompt", "word", "--top-p", 0)
    assert (done.returncode, done.stdout) == (2, "")
    assert "top_p" in done.stderr


def test_no_run_is_misuse(mfdist):
    done = mfdist("generate", "nowhere", "--prompt", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
