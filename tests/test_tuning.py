"""Tuning tables: what ships is sound, the user's file is found and guarded, and `vqkernels tune` finds what is fastest."""

import importlib
import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("typer", reason="the command line needs typer and rich; pip install 'vqkernels[cli]'")

from typer.testing import CliRunner
from vqkernels.triton_kernels import tuning
from vqkernels.triton_kernels.offline import TARGETS, compiled_for

from vqkernels import dispatch
from vqkernels.cli import app
from vqkernels.registry import SPECS

tune = importlib.import_module("vqkernels.cli.tune")  # the name belongs to its function
TRITON_OPS = [name for name, spec in SPECS.items() if "triton" in spec.compiled]
CARD = "Test card"


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A user's file of the test's own, and no memory of other tests'."""
    monkeypatch.setenv("VQK_TUNING", str(tmp_path / "cache" / "tuning.json"))
    caches = (tuning._config, tuning._measured, tuning._chip, tuning._say_untuned, tuning.preference)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def card(monkeypatch):
    """A machine with one card, device 0, of a chip that has no table."""
    monkeypatch.setattr(tuning, "card", lambda device=None: CARD)
    monkeypatch.setattr(tuning, "_device", lambda: 0)
    monkeypatch.setattr(tuning, "_chip", lambda device: "sm_999")


def saved(configs=None, preference=None):
    return tuning.save({CARD: {"configs": configs or {}, "preference": preference or {}}})


# what ships


def test_every_operator_has_a_default_for_every_key():
    assert [name for name in TRITON_OPS if "*" not in tuning.default().get(name, {})] == []


@pytest.mark.parametrize("name", ["default", "candidates", *TARGETS])
def test_shipped_tables_name_known_operators_and_numbers(name):
    table = json.loads((tuning._FOLDER / f"{name}.json").read_text())
    for op, rows in table.items():
        if name == "candidates":
            rows = {"*": rows}
        for key, row in rows.items():
            known = set(tuning.default()["nearest_codeword" if op == "*" else op]["*"]) | {"ARITHMETIC"}
            assert row and row.keys() <= known, f"{name}: {op} {key} has unknown numbers {row.keys() - known}"
            if name not in ("default", "candidates"):
                missing = tuning.default()[op]["*"].keys() - row.keys()
                assert not missing, f"{name}: {op} {key} lacks {missing}"


def test_each_chip_is_served_by_its_own_table():
    for target in TARGETS:
        with compiled_for(target):
            assert tuning._shipped(target), target
            for op, rows in tuning._shipped(target).items():
                for key, row in rows.items():
                    assert tuning.config(op, key) == row


# which table answers


def test_the_users_file_goes_first_then_the_chip_then_the_default(card, monkeypatch):
    monkeypatch.setattr(tuning, "_shipped", {
        "sm_999": {"fsq": {"a": {"x": 2}}},
        "default": {"fsq": {"*": {"x": 1}}},
    }.get)  # fmt: skip
    assert tuning.config("fsq", "a") == {"x": 2} and tuning.config("fsq", "b") == {"x": 1}
    saved({"fsq": {"a": {"x": 3}}})
    assert tuning.config("fsq", "a") == {"x": 3} and tuning.config("fsq", "b") == {"x": 1}


def test_another_cards_measurements_do_not_count(card, monkeypatch):
    saved({"fsq": {"*": {"x": 3}}})
    monkeypatch.setattr(tuning, "card", lambda device=None: "Other card")
    with pytest.warns(UserWarning, match="no tuning table for sm_999"):
        assert tuning.config("fsq", "a") == tuning.default()["fsq"]["*"]


def test_a_chip_without_a_table_warns_once_and_runs(card, recwarn):
    for op in TRITON_OPS:
        assert tuning.config(op, "any key") == tuning.default()[op]["*"]
    assert len([w for w in recwarn if "no tuning table for sm_999" in str(w.message)]) == 1


def test_without_a_gpu_the_default_answers_without_a_warning(recwarn):
    assert tuning.config("fsq", "any key") == tuning.default()["fsq"]["*"]
    assert not [w for w in recwarn if "tuning" in str(w.message)]


def test_using_a_table_for_a_while():
    with tuning.using({"fsq": {"a": {"x": 5}}}):
        assert tuning.config("fsq", "a") == {"x": 5}
        assert tuning.config("fsq", "b") == tuning.default()["fsq"]["*"]
    assert tuning.config("fsq", "a") == tuning.default()["fsq"]["*"]


def test_an_answer_may_be_changed_by_its_reader():
    tuning.config("fsq", "a")["num_warps"] = -1
    assert tuning.config("fsq", "a")["num_warps"] > 0


def test_an_operator_without_a_row_is_named():
    with pytest.raises(KeyError, match=r"no tuning table has a row for nothing 'k'.*default\.json"):
        tuning.config("nothing", "k")


# the user's file


def test_the_file_lies_in_the_users_cache_folder(monkeypatch):
    monkeypatch.delenv("VQK_TUNING")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(tuning.user_file()) == "/somewhere/vqkernels/tuning.json"


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("", "is not JSON"),
        ('{"format": "vqkernels-tun', "is not JSON"),
        ("[1, 2]", "no tuning file of vqkernels"),
        ('{"fsq": {"BLOCK": 128}}', "no tuning file of vqkernels"),
        ('{"format": "vqkernels-tuning-0", "cards": {}}', "no tuning file of vqkernels"),
        ('{"format": "vqkernels-tuning-1"}', "is damaged"),
        ('{"format": "vqkernels-tuning-1", "cards": {"a": {"configs": {"fsq": 3}, "preference": {}}}}', "is damaged"),
        ('{"format": "vqkernels-tuning-1", "cards": {"a": {"configs": {"fsq": {"k": {"x": "1"}}}, "preference": {}}}}', "is damaged"),
        ('{"format": "vqkernels-tuning-1", "cards": {"a": {"configs": {}, "preference": {"fsq": [1]}}}}', "is damaged"),
    ],
)  # fmt: skip
def test_a_corrupt_or_foreign_file_is_named_with_the_way_out(card, content, complaint):
    tuning.user_file().parent.mkdir(parents=True)
    tuning.user_file().write_text(content)
    for read in (lambda: tuning.config("fsq", "a"), lambda: tuning.preference("fsq")):
        with pytest.raises(ValueError, match=complaint) as error:
            read()
        assert str(tuning.user_file()) in str(error.value) and "vqkernels tune" in str(error.value)
    result = CliRunner().invoke(app, ["tune"])
    assert result.exit_code == 2 and complaint in " ".join(result.output.split())
    assert tuning.user_file().read_text() == content  # not overwritten


def test_a_failed_write_leaves_the_old_file():
    saved({"fsq": {"a": {"x": 1}}})
    before = tuning.user_file().read_text()
    with pytest.raises(TypeError):
        tuning.save({CARD: {"configs": object()}})
    assert tuning.user_file().read_text() == before
    assert [p.name for p in tuning.user_file().parent.iterdir()] == ["tuning.json"]


# tune


def test_tune_without_a_gpu_says_so():
    result = CliRunner().invoke(app, ["tune"])
    assert result.exit_code == 2 and "no GPU to measure on" in " ".join(result.output.split())


def test_tune_names_the_operators_it_knows(card):
    result = CliRunner().invoke(app, ["tune", "--op", "nonsense"])
    assert result.exit_code == 2 and "codebook_usage" in result.output


class Fake:
    """An operator whose config has three numbers and whose time is known."""

    CANDIDATES = {"BLOCK": [128, 256, 512], "num_warps": [2, 4, 8], "num_stages": [1, 2, 3]}  # noqa: RUF012

    def __init__(self, broken=None, wrong=None):
        self.broken, self.wrong, self.calls = broken, wrong, 0

    def config(self):
        return tuning.config("codebook_usage", "key")

    def launch(self, indices, codebook_size):
        self.calls += 1
        config = self.config()
        if self.broken and self.broken(config):
            raise ValueError("these tiles do not fit")
        return torch.full((1, codebook_size), 1 if self.wrong and self.wrong(config) else 0)

    def bench(self, call):
        call()
        config = self.config()
        return 1 + abs(config["BLOCK"] - 512) / 512 + abs(config["num_warps"] - 8) / 8 + config["num_stages"] / 100


@pytest.fixture
def fake(card, monkeypatch):
    def install(**options):
        fake = Fake(**options)
        start = {"BLOCK": 128, "num_warps": 2, "num_stages": 3}
        monkeypatch.setattr(
            tuning, "_shipped", lambda name: {"codebook_usage": {"*": start}} if name == "default" else {}
        )
        monkeypatch.setattr(tune, "candidates", lambda op: Fake.CANDIDATES)
        monkeypatch.setattr(tune, "launcher", lambda op: fake.launch)
        monkeypatch.setattr(
            tune, "workloads", lambda op, dtype, device: [("w", (torch.zeros(1, 5, dtype=torch.int64), 9))]
        )
        monkeypatch.setattr("triton.testing.do_bench", fake.bench)
        return fake

    return install


@pytest.mark.filterwarnings("ignore:vqkernels. no tuning table")
def test_the_fastest_config_is_found(fake):
    args = (torch.zeros(1, 5, dtype=torch.int64), 9)
    best, before, after = tune.fastest("codebook_usage", "key", args, fake().bench)
    assert best == {"BLOCK": 512, "num_warps": 8, "num_stages": 1} and after < before
    best, _, _ = tune.fastest("codebook_usage", "key", args, fake(broken=lambda c: c["BLOCK"] == 512).bench)
    assert best["BLOCK"] == 256
    best, _, _ = tune.fastest("codebook_usage", "key", args, fake(wrong=lambda c: c["num_warps"] == 8).bench)
    assert best["num_warps"] == 4
    with pytest.raises(RuntimeError, match="please report it"):
        tune.fastest("codebook_usage", "key", args, fake(broken=lambda c: True).bench)


@pytest.mark.filterwarnings("ignore:vqkernels. no tuning table")
def test_tune_writes_what_later_processes_read(fake, monkeypatch):
    fake()
    monkeypatch.setattr(tune, "backend_order", lambda op, bench: ["triton", "reference"])
    tuning.save({"Other card": {"configs": {"fsq": {"a": {"x": 1}}}, "preference": {}}})
    result = CliRunner().invoke(app, ["tune", "--op", "codebook_usage"])
    assert result.exit_code == 0, result.output
    assert tuning.config("codebook_usage", "key") == {"BLOCK": 512, "num_warps": 8, "num_stages": 1}
    assert tuning.preference("codebook_usage") == ("triton", "reference") and tuning.preference("fsq") == ()
    assert set(tuning.load()) == {"Other card", CARD}


@pytest.mark.filterwarnings("ignore:vqkernels. no tuning table")
def test_ctrl_c_keeps_what_was_measured(fake, monkeypatch):
    fake()

    def interrupted(op, bench):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "backend_order", interrupted)
    result = CliRunner().invoke(app, ["tune", "--op", "codebook_usage"])
    assert result.exit_code == 130 and "1 configs are kept" in " ".join(result.output.split())
    assert tuning.load()[CARD]["configs"]["codebook_usage"]["key"]["BLOCK"] == 512


def test_keys_are_what_the_launcher_asks_for():
    z = torch.randn(40, 64)
    with compiled_for("sm_90"):
        asked = tune.keys("rotation_trick_backward", (z, z, z, 1))
    assert len(asked) == 1 and asked.pop().startswith("float32")


def test_candidates_of_every_operator():
    for op in TRITON_OPS:
        tunable = tune.candidates(op)
        for number in tuning.default()[op]["*"]:
            assert number in tunable, f"candidates.json has no values for {op} {number}"


# the order of backends


def test_backends_are_ordered_by_time(monkeypatch):
    times = iter([3.0, 1.0, 2.0] * 20)
    monkeypatch.setattr(tune, "AVAILABLE", {"fsq": {"triton": True, "cuda": True, "reference": True, "cpu": True}})
    monkeypatch.setattr(tune, "_OVERLOAD", dict.fromkeys(("triton", "cuda", "reference"), "reference"))
    monkeypatch.setattr(tune, "_bounded", lambda call, bench, best: bench(call))
    assert tune.backend_order("fsq", lambda call: next(times), "meta") == ["cuda", "reference", "triton"]
    monkeypatch.setattr(tune, "AVAILABLE", {"fsq": {"triton": "no", "cuda": "no", "reference": True}})
    assert tune.backend_order("fsq", lambda call: 1.0, "meta") == []


def test_dispatch_follows_the_measured_order(card, monkeypatch):
    for backend in ("cuda", "triton"):
        monkeypatch.setitem(dispatch.AVAILABLE["fsq"], backend, True)
    device = torch.device("cuda")
    assert dispatch.pick("fsq", device) is SPECS["fsq"].op.default
    saved(preference={"fsq": ["triton", "cuda", "reference"]})
    assert dispatch.pick("fsq", device) is SPECS["fsq"].op.triton
    saved(preference={"fsq": ["reference", "triton", "cuda"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_say_slow", lambda *a: pytest.fail("a measured choice needs no warning"))
        assert dispatch.pick("fsq", device) is SPECS["fsq"].op.reference


@pytest.mark.parametrize(
    ("generation", "first"), [(None, "cuda"), (8, "cuda"), (9, "triton"), (10, "triton"), (12, "cuda")]
)
def test_the_order_where_nothing_was_measured(card, monkeypatch, generation, first):
    monkeypatch.setattr(dispatch, "_generation", lambda: generation)
    other = "triton" if first == "cuda" else "cuda"
    assert dispatch.gpu_order("nearest_codeword") == ((first, other, "reference"), False)
    assert dispatch.gpu_order("fsq") == (("cuda", "triton", "reference"), False)
    assert list(dispatch.backends()["nearest_codeword"]) == ["reference", "cpu", first, other]
    saved(preference={"nearest_codeword": [other, first, "reference"], "fsq": ["reference", "triton"]})
    assert dispatch.gpu_order("nearest_codeword") == ((other, first, "reference"), True)
    assert list(dispatch.backends()["nearest_codeword"]) == ["reference", "cpu", other, first]
    assert list(dispatch.backends()["fsq"]) == ["reference", "cpu", "triton", "cuda"]
