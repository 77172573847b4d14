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
