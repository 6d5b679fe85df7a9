"""The card that a run leaves beside its weights: the hub's own reader parses it, what it says to
type works, and it tells nothing of the machine."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import model
import train
from evaluation.embed import embed
from plumbing import model_card
from plumbing.run import held_out_table
from tests.conftest import FLAGS, ROOT, python


def run(*flags, out="run"):
    train.main([*FLAGS, "--steps", "2", "--out", out, *flags])
    return read(out)


def read(out="run"):
    return ModelCard.load(Path(out) / "model" / "README.md")


def manifest(*entries):
    """Writes sources.json, of the toy's files."""
    entries = [{"path": f"{path}.jsonl"} | entry
               for path, entry in zip(("left", "right"), entries)]
    Path("sources.json").write_text(json.dumps(entries))


def table(card):
    """The cells of the sources' rows."""
    lines = [line for line in card.text.splitlines() if line.startswith("| ")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def flags_of_command(card):
    return shlex.split(re.search(r"^    python train.py (.*)$", card.text, re.M)[1])


# what it says

def test_the_card_of_a_run_parses_and_holds_the_table_as_printed(folder, capsys):
    card = run("--dropout", "0")
    assert card.data.to_dict() == {
        "library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "sentence-similarity", "feature-extraction",
                 "custom_code"]}
    assert "mean pooling: a text becomes a vector of 32 numbers" in card.text
    assert "from a local model, toy, as stage II (§5.1" in card.text
    assert "Longest text: 8,192 tokens; in training, texts were cut after 128 tokens." in card.text
    assert "trained without prompts" in card.text
    # 3 of the 60 rows of each source are held out
    assert table(card) == [["left", "57", "1", "not said"], ["right", "57", "2", "not said"]]
    printed = capsys.readouterr().out
    start = printed.index("held-out:")
    lines = printed[start:].splitlines()[:4]
    assert [line.split()[0] for line in lines[1:]] == ["left", "right", "mean"]
    assert "\n".join(f"    {line}" for line in lines) in card.text


def test_its_command_gives_its_weights(folder):
    """But for rounding: other micro-batches, and no dropout."""
    card = run("--dropout", "0", "--stage", "3", "--negatives", "2", "--weight-decay", "0.1")
    train.main([*flags_of_command(card), "--out", "again"])
    ours, theirs = (load_file(f"{out}/model/model.safetensors") for out in ("run", "again"))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["jina", "bert"])
def test_its_code_opens_the_model_and_gives_its_vectors(folder, monkeypatch, kind):
    pytest.importorskip("sentence_transformers")
    _, tokenizer = model.load("toy")
    if kind == "bert":
        config = transformers.BertConfig(vocab_size=20, hidden_size=32, num_hidden_layers=2,
                                         num_attention_heads=2, intermediate_size=32)
        model.save(model.PooledEncoder(transformers.BertModel(config)), tokenizer, "bert")
        os.rename("toy", "gone")
        os.rename("bert", "toy")
    prompts = {"query": "f f f f f f f ", "document": "g g g g g g g "}
    card = run("--prompts", json.dumps(prompts))
    for word in ("trust_remote_code=True", "custom_code", "random weights.\n"):
        assert (word in card.content) == (kind == "jina")
    encoder, tokenizer = model.load("run/model")
    code = re.search(r"```python\n(.*?)```", card.text, re.S)[1]
    query, *documents = re.findall(r'"(\S+ .*?)"', code)
    monkeypatch.chdir("run")
    ended = python("-c", f"{code}\nimport torch; torch.save([queries, documents], 'out.pt')")
    assert ended.returncode == 0, ended.stderr
    found = torch.load("out.pt", weights_only=False)
    for texts, prompt, theirs in zip(([query], documents), prompts.values(), found):
        ours = embed(encoder, tokenizer, texts, prompt=prompt)
        torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-4, atol=1e-5)


def test_prompts_are_shown_as_they_are(folder):
    manifest({"name": "left", "prompts": {"query": "a `|`\n", "document": "{b} "}},
             {"name": "right"})
    card = run("--prompts", '{"query": "query: "}')
    assert '\n\n    {"query": "query: ", "document": ""}\n' in card.text
    card = run(out="by source")
    assert '\n    left: {"query": "a `|`\\n", "document": "{b} "}\n    right: {' in card.text


# where it comes from

def test_a_hub_name_is_the_base_model(folder, monkeypatch):
    """A hub's cache, laid by hand, without a network."""
    home = folder / "home" / "hub" / "models--org--name"
    (home / "refs").mkdir(parents=True)
    (home / "snapshots").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    os.rename("toy", home / "snapshots" / ("0" * 40))
    monkeypatch.setenv("HF_HOME", str(folder / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ended = python(ROOT / "train.py", *FLAGS, "--model", "org/name", "--steps", "1", "--out", "run")
    assert ended.returncode == 0, ended.stderr
    card = read()
    assert card.data.base_model == ["org/name"]
    assert "(https://huggingface.co/org/name)" in card.text
    flags = flags_of_command(card)
    assert flags[flags.index("--model") + 1] == "org/name"


@pytest.mark.parametrize("said, base", [
    ("base_model: org/name", ["org/name"]),
    ("base_model: [org/name, org/two]", ["org/name", "org/two"]),
    ("base_model: /home/someone/models/name", None), ("license: mit", None),
    ("base_model: 7", None), ("no: YAML: at all", None)])
def test_of_a_directory_the_base_is_what_its_own_card_says(folder, said, base):
    Path("toy/README.md").write_text(f"---\n{said}\n---\n")
    card = run()
    assert card.data.base_model == base
    assert ("which derives from org/name" in card.text) == bool(base)
    assert "someone" not in card.content


def test_random_weights_have_no_base(folder):
    card = run("--model", "tiny")
    assert card.data.base_model is None and "random weights (tiny)" in card.text


def test_no_path_of_the_machine_is_told(folder):
    manifest({"name": str(folder / "left.jsonl")}, {"name": "right"})
    card = run("--model", str(folder / "toy"), "--sources", str(folder / "sources.json"),
               out=str(folder / "run"))
    assert str(folder) not in card.content and folder.name not in card.content
    flags = flags_of_command(card)
    assert {"toy", "sources.json"} < set(flags) and table(card)[0][0] == "left.jsonl"


def test_a_run_resumed_elsewhere_ends_in_the_same_card(folder, monkeypatch):
    """From there `toy` is no directory, but it is no hub name either."""
    card = run()
    os.rename("run/model", "gone")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    train.main(["--resume", "--out", "../run"])
    assert read("../run").content == card.content and card.data.base_model is None


def test_the_default_corpus_is_of_packages_under_their_own_licences(folder, monkeypatch):
    """Resumed, it is given by its path."""
    built = folder / "installed_docs-0"
    built.mkdir()
    for file in ("left.jsonl", "right.jsonl", "sources.json"):
        os.rename(file, built / file)
    card = run("--sources", str(built / "sources.json"))
    assert [row[3] for row in table(card)] == ["that of each Python package it is cut from"] * 2
    assert "--sources" not in flags_of_command(card)


# what must not break it

@pytest.mark.parametrize("name", [
    "a|b", "a\\|b", 'a "b" \'c\'', "a\nb", "no: 1", "---", "```", "{x} {sources}", "<b>*a*</b>",
    "日本"])
def test_no_name_breaks_the_table_or_the_metadata(folder, name):
    manifest({"name": name, "licence": name}, {"name": "plain", "licence": "CC BY-SA 4.0"})
    card = run()
    rows = table(card)
    assert [len(row) for row in rows] == [4, 4]
    assert rows[1] == ["plain", "57", "1", "CC BY-SA 4.0"]
    for cell in (rows[0][0], rows[0][3]):  # as Markdown shows it
        assert re.sub(r"\\(.)", r"\1", cell) == " ".join(name.split())
    assert card.data.library_name == "sentence-transformers"
    outside = [line for line in card.text.splitlines() if line.startswith("```")]
    assert outside == ["```python", "```"]


def test_a_card_that_cannot_be_written_leaves_no_model(folder, monkeypatch, capsys):
    monkeypatch.setattr(model_card, "TEMPLATE", Path("none.md"))
    with pytest.raises(SystemExit):
        run()
    assert "none.md" in capsys.readouterr().err
    assert sorted(os.listdir("run")) == [".lock", "checkpoints", "metrics.jsonl"]


def test_without_held_out_pairs_or_from_before_a_source_had_any():
    scores = {"recall@1": 0.5, "ndcg@10": 0.75, "targets": 3}
    nothing, some = {"mean": {}, "sources": {}}, {"mean": scores, "sources": {"s": scores}}
    assert held_out_table([]) == held_out_table([nothing, nothing])
    late = held_out_table([nothing, some])
    assert "nan -> 0.500" in late and "nan -> 0.750" in late
