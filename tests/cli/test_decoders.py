"""`priorityprop finetune`, `predict` and `generate` with a tiny decoder, as a user runs them."""

import csv
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from priorityprop_jax import models
from priorityprop_jax.cli import decoders, runs
from priorityprop_jax.cli import main as cli
from priorityprop_jax.models.decoder import Decoder, DecoderConfig

tokenizers = pytest.importorskip("tokenizers", reason="priorityprop-jax[finetune] is not installed")
pytest.importorskip("safetensors", reason="priorityprop-jax[finetune] is not installed")

WORDS = ["<end>", "<pad>", "[UNK]", "a", "film", "plot", "is", "good", "bad", "Label", ":", "yes"]
WORDS += ["billing", "delivery", "fault", "praise"]  # the labels of the messages
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ' : ' + m.content + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
BLOCKS = 4


def write_tiny(folder):
    """A random decoder with a tokenizer of words."""
    config = DecoderConfig.from_dict(
        {
            "vocab_size": len(WORDS) + 2, "hidden_size": 8, "intermediate_size": 12,
            "num_hidden_layers": BLOCKS, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": 64, "tie_word_embeddings": True, "initializer_range": 0.3,
        }
    )  # fmt: skip
    words = [*WORDS, "user", "assistant"]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.WhitespaceSplit(),
            tokenizers.pre_tokenizers.Split(":", "isolated"),
        ]
    )
    tokenizer.add_special_tokens(["<end>", "<pad>"])
    language = models.Language(tokenizer, "<end>", None, "<pad>", TEMPLATE)
    models.save_decoder(Decoder(config, rngs=nnx.Rngs(0)), folder, language)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    write_tiny(folder)
    return folder


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    rng = np.random.default_rng(0)
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        for label in rng.integers(0, 2, 44):
            more = ["a", "plot", "film"][: rng.integers(1, 4)]
            table.writerow(
                [" ".join([*more, "is", ["bad", "good"][label]]), ["bad", "good"][label]]
            )
    yield tmp_path
    jax.config.update("jax_disable_most_optimizations", before)


def run(*arguments):
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as error:
        return error.code


def tune(tiny, *options):
    return run(
        "finetune", "--model", tiny, "--data", "reviews.csv", "--batch-size", "8",
        "--learning-rate", "0.02", "--epochs", "2", "--max-length", "16", *options,
    )  # fmt: skip


def report_of(directory):
    return json.loads((directory / "report.json").read_text())


def one_line(capsys):
    error = capsys.readouterr().err.strip()
    assert error.startswith("priorityprop: ") and len(error.splitlines()) == 1
    return error


def changed(tiny, directory):
    """Which blocks, and whether embedding and last norm, are not as they were."""
    old, new = (models.load_decoder(folder) for folder in (tiny, directory / "model"))
    differ = lambda a, b: not np.array_equal(a, b)  # noqa: E731
    pairs = [
        (np.asarray(a), np.asarray(b))
        for a, b in zip(
            jax.tree.leaves(nnx.state(old.blocks)),
            jax.tree.leaves(nnx.state(new.blocks)),
            strict=True,
        )
    ]
    blocks = [i for i in range(BLOCKS) if any(differ(a[i], b[i]) for a, b in pairs)]
    embedding = differ(old.embed.embedding[...], new.embed.embedding[...])
    return blocks, embedding, differ(old.head.norm.scale[...], new.head.norm.scale[...])


@pytest.mark.parametrize(
    ("policy", "trained"),
    [
        ("full", ([0, 1, 2, 3], True, True)),
        ("suffix:2", ([2, 3], False, True)),
        ("lora:2", ([0, 1, 2, 3], False, False)),
        ("badam:1", None),
    ],
)
def test_every_kind_of_policy(place, tiny, capsys, policy, trained):
    assert tune(tiny, "--policy", policy) == 0
    out = capsys.readouterr().out
    directory = place / "runs" / f"reviews-{policy.replace(':', '')}-1"
    assert {path.name for path in directory.iterdir()} == {
        "config.json", "losses.png", "metrics.jsonl", "report.json", "report.md", "model"
    }  # fmt: skip
    results = report_of(directory)["results"]
    assert results["validation_loss"] < 2.3 and results["steps"] == 2 * 5
    assert results["peak_bytes"] > 1e6 and results["tokens_per_second"] > 0
    for shown in ("dev loss", "dev accuracy", "FLOPs of a gradient", "tokens/s", "peak memory"):
        assert shown in out
    if trained is not None:
        assert changed(tiny, directory) == trained
    assert run("report", directory) == 0
    assert capsys.readouterr().out.strip() in out


def test_the_budget_chooses_the_suffix(place, tiny, capsys):
    assert tune(tiny, "--budget", "0.5") == 0
    compute = report_of(place / "runs" / "reviews-suffix1-1")["compute"]
    assert 0.2 < compute["share"] <= 0.5
    capsys.readouterr()
    assert tune(tiny, "--budget", "0.01") == 1
    assert "does not pay for one block" in one_line(capsys)


def test_hidden_rows_are_those_of_the_blocks_below(place, tiny):
    config = _config(tiny)
    task = decoders.load(config, tiny)
    tokens = [row.copy() for row in task.train["x"]]
    decoders.hidden_rows(task.model, task, config, 2, place)
    for row, hidden in zip(tokens[:5], task.train["x"], strict=False):
        below = task.model.below(np.asarray(row)[None], 2)[0]
        np.testing.assert_allclose(hidden, below, rtol=1e-4, atol=1e-5)


def _config(tiny, **options):
    from priorityprop_jax.cli import finetune

    given = {"model": str(tiny), "data": "reviews.csv", "batch_size": 8, "learning_rate": 0.02}
    return finetune.defaults(**given | options)


def test_an_interrupted_run_goes_on(place, tiny, capsys, monkeypatch):
    assert tune(tiny) == 0
    whole = place / "runs" / "reviews-suffix1-1"
    save = runs.save

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "save", stop)
    assert tune(tiny) == 130
    monkeypatch.setattr(runs, "save", save)
    broken = place / "runs" / "reviews-suffix1-2"
    assert f"--resume {broken.relative_to(place)}" in capsys.readouterr().out
    assert run("finetune", "--resume", broken) == 0
    timed = {"seconds", "compile_seconds", "tokens_per_second", "peak_bytes"}
    one, other = (report_of(d)["results"] for d in (whole, broken))
    assert {k: v for k, v in one.items() if k not in timed} == {
        k: v for k, v in other.items() if k not in timed
    }


def test_predictions(place, tiny, capsys):
    assert tune(tiny, "--policy", "full") == 0
    directory = place / "runs" / "reviews-full-1"
    (place / "new.csv").write_text("text,label\na film is good,good\na plot is bad,bad\n")
    capsys.readouterr()
    assert run("predict", directory, "new.csv") == 0
    assert "accuracy 100.00% of 2 labelled texts" in capsys.readouterr().out
    with (place / "new.predicted.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["predicted"] for row in rows] == ["good", "bad"]
    assert all(0.5 < float(row["probability"]) <= 1 for row in rows)
    (place / "other.csv").write_text("text,label\na film is good,good\na plot is bad,no\n")
    assert run("predict", directory, "other.csv") == 0
    out = capsys.readouterr().out
    assert "accuracy 50.00% of 2 labelled texts" in out
    assert "counted as wrong: row 2: training has not seen the labels 'no'" in out
    assert run("predict", place, "new.csv") == 1
    assert "no finished run" in one_line(capsys)


@pytest.mark.parametrize("policy", ["suffix:2", "lora:2"])
def test_a_head(place, tiny, capsys, policy):
    assert tune(tiny, "--head", "--policy", policy, "--epochs", "6") == 0
    directory = place / "runs" / f"reviews-{policy.replace(':', '')}-1"
    model = models.load_decoder(directory / "model")
    assert model.config.classes == 2 and model.head.weight.shape == (2, 8)
    config = json.loads((directory / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "bad", "1": "good"} and config["pad_token_id"] == 1
    fresh = models.load_decoder(tiny, classes=2)
    assert np.abs(model.head.weight[...] - fresh.head.weight[...]).max() > 0.02
    np.testing.assert_array_equal(model.embed.embedding[...], fresh.embed.embedding[...])
    assert report_of(directory)["results"]["validation"] == 1.0
    (place / "new.csv").write_text("text,label\na film is good,good\na plot a plot is bad,bad\n")
    capsys.readouterr()
    assert run("predict", directory, "new.csv") == 0
    assert "accuracy 100.00% of 2 labelled texts" in capsys.readouterr().out
    language = models.load_language(tiny)
    logits = model(np.array([language.encode("a film is good")]))[0, -1]
    with (place / "new.predicted.csv").open() as file:
        found = float(next(csv.DictReader(file))["probability"])
    assert abs(found - float(jax.nn.softmax(logits)[1])) < 1e-4
    task = directory / "model" / "task.json"
    task.write_text(json.dumps(json.loads(task.read_text()) | {"labels": ["a", "b", "c"]}))
    assert run("predict", directory, "new.csv") == 1
    assert "has 2 classes and 3 labels" in one_line(capsys)
    assert run("generate", directory, "a film") == 1
    assert "tells classes by a head, and cannot write" in one_line(capsys)
    assert tune(directory / "model") == 2
    assert "train it with --head" in one_line(capsys)


def losses(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line)[of] for of in ("loss", "accuracy")] for line in lines]


@pytest.mark.parametrize("options", [("--policy", "suffix:2"), ("--policy", "full", "--head")])
def test_packed_texts_train_as_single_ones(place, tiny, capsys, options):
    config = _config(tiny, pack=True, head="--head" in options, max_length=24)
    rows = len(decoders.load(config, tiny).train["x"])
    assert 2 <= rows <= 40 / 2
    capsys.readouterr()
    # All of the texts in each batch, so that steps can be compared.
    options = (*options, "--max-length", "24", "--epochs", "4")
    assert tune(tiny, *options, "--batch-size", "40") == 0
    assert tune(tiny, *options, "--batch-size", rows, "--pack") == 0
    assert f"40 texts are packed into {rows} rows of up to 24 tokens" in capsys.readouterr().out
    one, other = sorted((place / "runs").iterdir())
    assert len(losses(one)) == 4 + 4
    np.testing.assert_allclose(losses(other), losses(one), rtol=2e-4)
    pair = (nnx.state(models.load_decoder(folder / "model")) for folder in (one, other))
    for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-3)


def test_texts_that_are_cut_are_counted_and_fill_the_context(place, tiny, capsys):
    short = place / "short"
    shutil.copytree(tiny, short)
    config = json.loads((short / "config.json").read_text())
    # No multiple of 8: there is no room to fill up a row of 13 tokens.
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 13}))
    lines = (place / "reviews.csv").read_text().splitlines()
    lines[1:6] = ["a film " * 9 + ",good"] * 5
    (place / "reviews.csv").write_text("\n".join(lines))
    assert tune(short, "--policy", "suffix:1", "--max-length", "13") == 0
    assert "5 of 44 texts are cut to 13 tokens" in capsys.readouterr().out
    assert run("predict", place / "runs" / "reviews-suffix1-1", "reviews.csv") == 0
    assert "5 of 44 texts are cut to 13 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (6.0, 1.5)])
def test_how_much_lora_counts(place, tiny, alpha, scale):
    config = _config(tiny, policy="lora:4", alpha=alpha)
    trainer = decoders.trainer_of(place, config, decoders.load(config, tiny), 10)
    assert trainer.model.blocks.block.query.scale == scale


def test_predictions_leave_files_alone(place, capsys):
    (place / "new.csv").write_text("text\na film is good\n")
    for out in ("new.csv", ".", "nowhere/out.csv"):
        assert run("predict", "run", "new.csv", "--out", out) == 2
        assert "--out" in one_line(capsys)
    assert (place / "new.csv").read_text() == "text\na film is good\n"


def test_a_tokenizer_of_another_model_is_told(place, tiny, capsys):
    other = place / "other"
    shutil.copytree(tiny, other)
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["vocab"]["film"] = 99
    (other / "tokenizer.json").write_text(json.dumps(words))
    assert tune(other) == 1
    assert "tokens up to 99, and the model knows 18" in one_line(capsys)
    assert not (place / "runs").exists()
    assert run("generate", other, "a film") == 1
    assert "tokens up to 99" in one_line(capsys)
    assert run("generate", tiny, "a \udcff") == 1
    assert "surrogates" in one_line(capsys)


def test_completions_and_what_the_model_then_writes(place, tiny, capsys):
    rows = [{"prompt": "a film is", "completion": " good"}] * 20
    (place / "more.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert tune(tiny, "--data", "more.jsonl", "--head") == 2
    assert "--head tells labels" in one_line(capsys)
    options = ("--policy", "full", "--data", "more.jsonl", "--epochs", "8")
    assert tune(tiny, *options, "--dtype", "bfloat16", "--remat", "products") == 0
    directory = place / "runs" / "more-full-1"
    assert report_of(directory)["results"]["validation"] is None
    capsys.readouterr()
    assert run("generate", directory, "a film is", "--tokens", "5") == 0
    assert capsys.readouterr().out.strip().replace(" ", "") == "afilmisgood"
    assert run("generate", directory, "a " * 70) == 1
    assert "context of 64" in one_line(capsys)


def test_chats(place, tiny, capsys):
    chat = [{"role": "user", "content": "a film"}, {"role": "assistant", "content": "yes"}]
    (place / "chats.jsonl").write_text("\n".join([json.dumps({"messages": chat})] * 20))
    assert tune(tiny, "--policy", "full", "--data", "chats.jsonl", "--epochs", "8") == 0
    capsys.readouterr()
    directory = place / "runs" / "chats-full-1"
    assert run("generate", directory, "a film", "--chat", "--tokens", "5") == 0
    assert capsys.readouterr().out.split() == ["a", "film", "yes"]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--policy", "magic"), 2, "magic"),
        (("--policy", "suffix(2"), 2, "suffix(2"),
        (("--policy", "suffix:9"), 2, "4 blocks"),
        (("--policy", "lora"), 2, "rank"),
        (("--max-length", "65"), 2, "context, 64"),
        (("--batch-size", "60"), 2, "less than a batch"),
        (("--policy", "badam:1", "--accumulate", "2"), 2, "--accumulate"),
        (("--policy", "full", "--accumulate", "11"), 2, "all 10 batches"),
        (("--policy", "full:3"), 2, "takes no number"),
        (("--policy", ""), 2, "there is no policy ''"),
        (("--policy", "lora:2", "--budget", "0.5"), 2, "--budget does nothing for lora"),
        (("--policy", "suffix:2", "--budget", "0.5"), 2, "--budget does nothing for suffix"),
        (("--state", "offload"), 2, "--state does nothing for suffix of a decoder"),
        (("--numbers",), 2, "--numbers does nothing"),
        (("--policy", "full", "--alpha", "4"), 2, "--alpha does nothing for full"),
        (("--policy", "lora:2", "--alpha", "0"), 2, "number above 0"),
        (("--pack", "--batch-size", "20"), 2, "packed rows to train on, less than a batch of 20"),
        (("--cache",), 2, "--cache does nothing"),
        (("--data", "nowhere.csv"), 1, "nowhere.csv"),
        (("--model", "nowhere"), 1, "nowhere"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(place, tiny, capsys, options, code, said):
    assert tune(tiny, *options) == code
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (place / "runs").exists()


def test_accumulated_batches_make_one_update(place, tiny):
    assert tune(tiny, "--policy", "suffix:1", "--accumulate", "5") == 0
    updates = report_of(place / "runs" / "reviews-suffix1-1")["results"]
    assert updates["steps"] == 10


def test_models_by_name(capsys):
    assert run("models", "list") == 0
    out = capsys.readouterr().out
    assert "minilm" in out and "smollm2-135m" in out
    assert run("models", "get", "gpt-5") == 2
    assert "there is no model 'gpt-5'" in one_line(capsys)
    assert run("models", "list", "minilm") == 2
    assert "models get minilm" in one_line(capsys)
    assert run("models", "get") == 2
    assert "which model" in one_line(capsys)


def test_a_plan_has_what_finetune_does(place, tiny, capsys):
    assert run("plan", "--model", tiny, "--data", "reviews.csv", "--batch-size", "8") == 0
    out = capsys.readouterr().out
    for shown in ("full", "suffix(2), below run once", "lora(8)", "lisa(2)", "badam(1)"):
        assert f"\n{shown}" in out


def test_a_plan_takes_what_makes_the_steps_of_finetune_others(place, tiny, capsys):
    def flops(*options):
        given = (
            "--model",
            tiny,
            "--data",
            "reviews.csv",
            "--batch-size",
            "2",
            "--max-length",
            "48",
        )
        assert run("plan", *given, *options, "--out", "out") == 0
        out = capsys.readouterr().out
        found = json.loads(Path("out/plan.json").read_text())["choices"]
        return {choice["name"]: choice["flops"] for choice in found}, out

    plain, _ = flops()
    packed, out = flops("--pack", "--dtype", "bfloat16")
    assert "are packed into" in out and packed["full"] > 1.2 * plain["full"]
    again, _ = flops("--remat", "all")
    assert again["full"] > plain["full"] and again["lora(8)"] > plain["lora(8)"]
    headed, _ = flops("--head")
    assert len(headed) > len(plain) and headed["full"] < plain["full"]  # a layer more


@pytest.mark.parametrize("option", [("--head",), ("--remat", "all"), ("--model", "nowhere")])
def test_a_plan_refuses_what_changes_nothing_in_it(option, place, capsys):
    assert run("plan", "--task", "digits", *option) == 2
    assert f"{option[0]} does nothing for digits" in one_line(capsys)
