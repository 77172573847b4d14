"""Published formats: small files of each, written as their owners write them, and what hostile lines are told."""

import gzip
import json
import re

import numpy as np
import pytest

from vqkernels import data
from vqkernels.data import DataError, import_data, read_index
from vqkernels.data.formats import clean


def write(folder, files):
    for name, content in files.items():
        content = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def review(user, item, time, **more):
    return {"reviewerID": user, "asin": item, "overall": 5.0, "unixReviewTime": time, **more}


META_2014 = (
    "{'asin': 'B2', 'title': \"Rock &amp;amp; Roll's\", 'categories': [['Music', 'Rock'], ['Music']], 'brand': 'X'}\n"
    "{'asin': 'B1', 'price': 9.99, 'related': {'also_bought': ['B2']}}\n"
    "{'asin': 'B9', 'title': 'never bought'}\n{'asin': 'B2', 'title': 'a later line'}\n"
)
META_2018 = lines(
    {"asin": "B1", "title": "A &amp; B", "brand": "by\n\n    Acme", "category": ["Games", "<span>PC</span>"]},
    {"asin": "B2", "title": "var aPageStart = (new Date()).getTime(); function(){}", "category": []},
)
REVIEWS = lines(review("A2", "B1", 200), review("A1", "B2", 100), review("A2", "B2", 100), review("A1", "B1", 100))
META_2023 = lines({"parent_asin": "B1", "title": "One", "store": "Shop", "categories": ["C"], "main_category": None})
REVIEWS_2023 = lines(
    *(
        {"user_id": u, "parent_asin": i, "asin": "other", "timestamp": t, "rating": 1.0}
        for u, i, t in [("A2", "B1", 1588687728923), ("A1", "B2", 1), ("A2", "B2", 1588687728922), ("A1", "B1", 1)]
    )
)
INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ML = "A2 B1 5 200|A1 B2 5 100|A2 B2 5 100|A1 B1 5 100".replace("A", "").replace("B", "1")
LAST = "|http://x|" + "|".join("0" * 17) + "|1|1\n"
U_ITEM = "12|Café (1995)|01-Jan-1995||".encode("latin-1")[:-1] + LAST.encode()
B1, B2 = "item B1", "item B2"

GOOD = {
    # format: files, users, sequences, items, texts
    "amazon2014": (
        {"reviews_X_5.json.gz": REVIEWS, "meta_X.json.gz": META_2014},
        ["A1", "A2"],
        [[2, 1], [2, 1]],
        ["B1", "B2"],
        [B1, "Rock & Roll's. X. Music, Rock"],
    ),
    "amazon2014 csv": (
        {"ratings_X.csv": "A2,B1,5.0,200\nA1,B2,5.0,100\nA2,B2,1.0,100\nA1,B1,5.0,100\n"},
        ["A1", "A2"],
        [[2, 1], [2, 1]],
        ["B1", "B2"],
        [B1, B2],
    ),
    "amazon2018": (
        {"X_5.json.gz": REVIEWS, "meta_X.json.gz": META_2018},
        ["A1", "A2"],
        [[2, 1], [2, 1]],
        ["B1", "B2"],
        ["A & B. Acme. Games, PC", B2],
    ),
    "amazon2018 csv": (
        {"X.csv": "B1,A2,5.0,200\nB2,A1,5.0,100\nB2,A2,1.0,100\nB1,A1,5.0,100\n"},
        ["A1", "A2"],
        [[2, 1], [2, 1]],
        ["B1", "B2"],
        [B1, B2],
    ),
    "amazon2023": (
        {"X.jsonl.gz": REVIEWS_2023, "meta_X.jsonl.gz": META_2023},
        ["A1", "A2"],
        [[2, 1], [2, 1]],
        ["B1", "B2"],
        ["One. Shop. C", B2],
    ),
    "amazon2023 csv": (
        {  # the last interaction, split off for testing, has the time of the one before and its file a smaller name
            "X.test.csv": "user_id,parent_asin,rating,timestamp,history\nA2,B1,5.0,9,B2\n",
            "X.train.csv": "user_id,parent_asin,rating,timestamp,history\nA1,B2,5.0,9,\nA2,B2,5.0,9,\n",
            "X.valid.csv": "user_id,parent_asin,rating,timestamp,history\nA1,B1,5.0,9,B2\n",
        },
        ["A1", "A2"],
        [[2, 1], [2, 1]],
        ["B1", "B2"],
        [B1, B2],
    ),
    "recbole": (
        {
            "X.inter": INTER + "A2\tB1\t5\t200\nA1\tB2\t5\t100\nA2\tB2\t1\t100\nA1\tB1\t5\t100\n",
            "X.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
            "B1\tToy Story\t1995\tAnimation Children's\n",
        },
        ["A1", "A2"],
        [[2, 1], [2, 1]],
        ["B1", "B2"],
        ["Toy Story. 1995. Animation Children's", B2],
    ),
    "movielens": (
        {"u.data": ML.replace(" ", "\t").replace("|", "\n"), "u.item": U_ITEM},
        ["1", "2"],
        [[2, 1], [2, 1]],
        ["11", "12"],
        ["item 11", "Café (1995). War, Western"],
    ),
    "movielens 1m": (
        {
            "ratings.dat": ML.replace(" ", "::").replace("|", "\n"),
            "movies.dat": "11::Amélie (2001)::Comedy|Romance\n".encode("latin-1"),
        },
        ["1", "2"],
        [[2, 1], [2, 1]],
        ["11", "12"],
        ["Amélie (2001). Comedy, Romance", "item 12"],
    ),
    "movielens csv": (
        {
            "ratings.csv": "userId,movieId,rating,timestamp\n" + ML.replace(" ", ",").replace("|", "\n"),
            "movies.csv": 'movieId,title,genres\n11,"Usual Suspects, The (1995)",Crime|Mystery\n',
        },
        ["1", "2"],
        [[2, 1], [2, 1]],
        ["11", "12"],
        ["Usual Suspects, The (1995). Crime, Mystery", "item 12"],
    ),
    "s3rec": (
        {"X.txt": "10 9 100\n2 100 9 9\n"},
        ["2", "10"],
        [[2, 1, 1], [1, 2]],
        ["9", "100"],
        ["item 9", "item 100"],
    ),
    "sasrec": (
        {"X.txt": "10 9\n2 100\n2 9\n10 100\n"},
        ["2", "10"],
        [[2, 1], [1, 2]],
        ["9", "100"],
        ["item 9", "item 100"],
    ),
    "lcrec": (
        {
            "X.inter.json": '{"1": [3, 0],\n"0": [0, 3]}',
            "X.item.json": '{"0": {"title": "Zero", "brand": "B", "categories": "C, D", "description": ""},\n"7": {}}',
            "X.index.json": '{"3": ["<a_5>", "<b_6>"], "0": ["<a_1>", "<b_2>", "<c_1>"], "1": ["<a_1>", "<b_2>"]}',
        },
        ["0", "1"],
        [[1, 2], [2, 1]],
        ["0", "3"],
        ["Zero. B. C, D", "item 3"],
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_formats(name, tmp_path):
    files, users, sequences, items, texts = GOOD[name]
    imported = import_data(write(tmp_path, files), name.split()[0])
    catalogue = imported.catalogue
    assert catalogue.users == users and [s.tolist() for s in catalogue.sequences] == sequences
    assert catalogue.source_ids == items and catalogue.item_texts == texts and catalogue.num_items == 2
    again = data.load_folder(data.save_folder(catalogue, tmp_path / "out"))
    assert again.item_texts == texts and again.source_ids == items and again.users == users
    assert [s.tolist() for s in again.sequences] == sequences and again.item_titles == catalogue.item_titles
    assert (imported.semantic_ids is None) == (name != "lcrec")
    if name == "lcrec":
        assert imported.semantic_ids.tolist() == [[1, 2, 1], [5, 6, 0]]
    if name.startswith(("amazon", "recbole", "movielens")):  # user A1's two are at one time: B2 first, as in the file
        assert any("share one time on their last two interactions" in note for note in imported.warnings)


def test_files_by_name_are_those_of_the_folder(tmp_path):
    files = GOOD["amazon2014"][0]
    write(tmp_path, files | {"readme.md": "x", "qa_X.csv.bak": ""})
    whole = import_data(tmp_path, "amazon2014").catalogue
    some = import_data([tmp_path / name for name in files], "amazon2014").catalogue
    assert whole.item_texts == some.item_texts and whole.users == some.users


BAD = [
    ("amazon2014", "reviews_X.json.gz", lines(review("A", "B", 1)) + "{'asin': 1}\n", r"X.json.gz:2: not JSON"),
    (
        "amazon2014",
        "reviews_X.json",
        lines({"asin": "B", "unixReviewTime": 1}),
        r"X.json:1: reviewerID missing \(it has asin",
    ),
    (
        "amazon2014",
        "reviews_X.json",
        lines(review("A", "B", "yesterday")),
        r":1: timestamp 'yesterday' is not a number",
    ),
    ("amazon2014", "reviews_X.json", lines(review("A", "B", -5)), r":1: timestamp -5.0 is not a time since 1970"),
    ("amazon2014", "reviews_X.json", '{"reviewerID": "A", "asin": "B", "unixReviewTime": NaN}', r":1: timestamp nan"),
    ("amazon2014", "reviews_X.json", lines(review("A", "B", True)), r":1: timestamp -1.0"),
    ("amazon2014", "reviews_X.json", lines(review("A B", "C", 1)), r":1: user 'A B' is not a name without white space"),
    ("amazon2014", "reviews_X.json", lines(review("A", ["C"], 1)), r":1: item \['C'\] is not a name"),
    ("amazon2014", "reviews_X.json", "\n[1]\n", r":2: a list, not an object"),
    ("amazon2014", "reviews_X.json", "[" * 100_000, r":1: not JSON"),
    ("amazon2014", "reviews_X.json", b'{"a": "\xff"}', r":1: byte 0xff is not UTF-8"),
    ("amazon2014", "reviews_X.json", b'{"a":\x001}', r":1: holds a zero byte"),
    (
        "amazon2014",
        "meta_X.json",
        "{'asin': 'B1'}\n__import__('os').mkdir('HACKED')\n",
        r"meta_X.json:2: not Python literal",
    ),
    ("amazon2014", "meta_X.json", "{'asin': 'B1', 'title': (lambda: 1)()}\n", r"meta_X.json:1: not Python literal"),
    (
        "amazon2014",
        "meta_X.json",
        "{'asin': 'B1', 'title': " + "(" * 5000 + "}\n",
        r"meta_X.json:1: not Python literal",
    ),
    ("amazon2014", "meta_X.json", "{'asin': 'B1', 'title': 7}\n", r"meta_X.json:1: title holds a int: 7"),
    ("amazon2014", "meta_X.json", "{'title': 'no asin'}\n", r"meta_X.json:1: item None is not a name"),
    ("amazon2018", "meta_X.json", "{'asin': 'B1'}\n", r"meta_X.json:1: not JSON"),
    ("amazon2014", "ratings_X.csv", "A,B,5.0,1\nA,B,5.0\n", r"ratings_X.csv:2: 3 columns. A row is user,item,rating"),
    ("amazon2014", "ratings_X.csv", "user,item,rating,timestamp\n", r":1: timestamp 'timestamp' is not a number"),
    ("amazon2014", "ratings_X.csv", 'A,B,5.0,1\nA,"B,5.0,1\n', r"ratings_X.csv:2: not a CSV row"),
    (
        "amazon2014",
        "ratings_X.csv",
        "0123456789,A012345678901,5.0,1\n" * 20,
        r":20: users and items seem to be swapped.*Try amazon2018",
    ),
    (
        "amazon2018",
        "X.csv",
        "A012345678901,0123456789,5.0,1\n" * 20,
        r":20: users and items seem to be swapped.*Try amazon2014",
    ),
    ("amazon2023", "X.csv", "user_id,asin,timestamp\n", r"X.csv:1: no column parent_asin in the header"),
    ("amazon2023", "X.csv", "user_id,parent_asin,timestamp\nA,B\n", r"X.csv:2: 2 columns, but the header has 3"),
    ("recbole", "X.inter", "user_id\titem_id\n1\t2\n", r"X.inter:1: header column 'user_id' is not name:type"),
    ("recbole", "X.inter", "user_id:token\titem_id:word\n", r"X.inter:1: header column 'item_id:word'"),
    ("recbole", "X.inter", "user_id:token\trating:float\n", r"X.inter:1: no column item_id"),
    ("recbole", "X.inter", INTER + "1\t2\t3\n", r"X.inter:2: 3 columns, but the header has 4"),
    ("recbole", "X.inter", INTER + "1\t2\tgood\t4\n", r"X.inter:2: 'good' is not a number"),
    ("recbole", "X.item", "id:token\n1\n", r"X.item:1: no column item_id:token"),
    ("movielens", "u.data", "1\t2\t3\n", r"u.data:1: 3 columns. A row is user, item, rating, timestamp"),
    ("movielens", "u.item", "1|Toy\n", r"u.item:1: 2 columns"),
    ("movielens", "movies.csv", "id,title\n", r"movies.csv:1: the header is 'id,title'"),
    ("movielens", "movies.csv", "movieId,title,genres\n1,x\n", r"movies.csv:2: 2 columns"),
    ("movielens", "movies.csv", 'movieId,title,genres\n1,"over\ntwo lines"\n', r"movies.csv:2: 2 columns"),
    ("s3rec", "X.txt", "1 2 3\n\n2\n", r"X.txt:3: user '2' has no items"),
    ("s3rec", "X.txt", "1 2\n1 3\n", r"X.txt:2: user '1' was already on line 1"),
    ("s3rec", "X.txt", "\n\n", r"no interactions"),
    ("s3rec", "X.txt.gz", gzip.compress(b"1 2\n2 1\n", mtime=0)[:-6], r"X.txt.gz:\d: not a whole gzip file"),
    ("sasrec", "X.txt", "1 2\n1 2 3\n", r"X.txt:2: 3 columns. A line is 'user item'"),
    ("lcrec", "X.inter.json", '{"0": [1],\n"1": {"a": 1}}', r"X.inter.json:2: user '1' has no list of items"),
    ("lcrec", "X.inter.json", '{"0": [1],\n\n"0": [2]}', r"X.inter.json:3: '0' is there twice"),
    ("lcrec", "X.inter.json", '{"0": [1],\n"1": [true]}', r"X.inter.json:2: user '1' has no list of items"),
    ("lcrec", "X.inter.json", '{"0": [1],\n"1": }', r"X.inter.json:2: not JSON"),
    ("lcrec", "X.inter.json", "[]", r"X.inter.json:1: a list, not an object"),
    ("lcrec", "X.item.json", '{"0": {},\n"1": []}', r"X.item.json:2: item '1' has no object"),
    (
        "lcrec",
        "X.index.json",
        '{"1": ["<a_1>"],\n"2": ["a1"]}',
        r"X.index.json:2: item '2' has token 'a1' at place 1. Write <a_NUMBER>",
    ),
    ("lcrec", "X.index.json", '{"1": ["<a_1>", "<c_1>"]}', r"token '<c_1>' at place 2. Write <b_NUMBER>"),
    ("lcrec", "X.index.json", '{"1": []}', r"item '1' has no list of tokens"),
    ("lcrec", "X.index.json", '{"2": ["<a_1>"]}', r"1 of 1 items have no semantic ID, such as '1'"),
]
INTERACTIONS = {
    "amazon2014": ("reviews_X.json", lines(review("A", "B1", 1))),
    "amazon2018": ("X.json", lines(review("A", "B1", 1))),
    "recbole": ("X.inter", INTER + "1\t1\t1\t1\n"),
    "movielens": ("ratings.csv", "userId,movieId,rating,timestamp\n1,1,5,1\n"),
    "lcrec": ("X.inter.json", '{"0": [1]}'),
}


@pytest.mark.parametrize("format, name, content, message", BAD, ids=lambda v: re.sub(r"\W+", "-", str(v))[:40])
def test_hostile_lines_name_file_and_line(format, name, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name.endswith(".gz") and isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        write(tmp_path, {name: content})
    if re.match(r"meta_|.*item|movies|.*index", name):
        write(tmp_path, dict([INTERACTIONS[format]]))
    with pytest.raises(DataError, match=message):
        import_data(tmp_path, format)
    assert not (tmp_path / "HACKED").exists()


def test_what_cannot_be_read_at_all(tmp_path):
    write(tmp_path, {"X.txt": "1 2\n", "x.pkl": b"\x80\x04.", "reviews_X.json": "", "ratings_X.csv": ""})
    for sources, format, message in (
        (tmp_path, "yelp", r"format 'yelp' is unknown. Use one of amazon2014, "),
        (tmp_path / "none", "s3rec", r"none: no such file or folder"),
        (tmp_path / "x.pkl", "s3rec", r"x.pkl: pickles are refused"),
        (tmp_path / "X.txt", "recbole", r"X.txt: no file with interactions in format recbole .* match \.\*\\.inter"),
        (tmp_path, "amazon2014", r"the same interactions in two files"),
        ([tmp_path / "X.txt"], "s3rec", None),
    ):
        if message is None:
            assert import_data(sources, format).catalogue.num_items == 1
            continue
        with pytest.raises(DataError, match=message):
            import_data(sources, format)
    with pytest.raises(DataError, match=r"core=-1 is not"):
        import_data(tmp_path / "X.txt", "s3rec", core=-1)
    with pytest.raises(DataError, match=r"no interactions are left with core=3"):
        import_data(tmp_path / "X.txt", "s3rec", core=3)


def test_core_is_repeated_until_nothing_falls_out(tmp_path):
    write(tmp_path, {"X.txt": "u1 1 2\nu2 1 2\nu3 1 3\nu4 3 4\nu5 4\n"})
    catalogue = import_data(tmp_path, "s3rec", core=2).catalogue
    # 4 loses u5, so u4 has only 3 left, so 3 has only u3, so u3 has only 1
    assert catalogue.users == ["u1", "u2"] and catalogue.source_ids == ["1", "2"]
    assert [s.tolist() for s in catalogue.sequences] == [[1, 2], [1, 2]]
    assert import_data(tmp_path, "s3rec", core=1).catalogue.num_interactions == 9


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("<b>bold</b> <script>alert(1)</script>text", "bold text"),
        ("5 < 6 and 7 > 3", "5 < 6 and 7 > 3"),
        ("$(function() { x(); })", ""),
        (".ac-icon { color: red; }", ""),
        ("Function of the Var (2 {parts})", "Function of the Var (2 {parts})"),
        ("  a \n\t b ", "a b"),
    ],
)
def test_texts_are_cleaned(text, expected):
    assert clean(text) == expected


def test_warnings(tmp_path):
    rows = [f"{u},{i},5,{t}" for u in range(30) for t, i in ((1, 1), (2, 2), (2, 3))]
    write(
        tmp_path,
        {
            "ratings.csv": "\n".join(
                ["userId,movieId,rating,timestamp", *rows, "98,1,5,1", "98,2,5,1", "98,3,5,2", "99,4,5,1", "99,4,5,1"]
            )
        },
    )
    write(tmp_path, {"movies.csv": "movieId,title,genres\n1,Same,X\n2,Same,X\n3,Other,X\n"})
    np.save(tmp_path / "e.npy", np.array([[1.0, 0], [1, 0], [0, 0], [0, 1]]))
    imported = import_data(tmp_path, "movielens", embeddings=tmp_path / "e.npy")
    assert [re.sub(r"[.:,] .*", "", note) for note in imported.warnings] == [
        "31 of 31 sequences are sorted by item id",
        "1 users have fewer than 3 interactions",
        "1 interactions repeat the user's one before",
        "1 items have no text",
        "2 items have the text of another",
        "1 embeddings repeat another",
        "1 embeddings are zero",
        "31 of 32 users (97%) share one time on their last two interactions",
        "32 interactions (34%) are at the time of the one before",
        "1 interactions are there twice",
    ]
    falling = tmp_path / "out"
    falling.mkdir()
    write(falling, {"X.txt": "".join(f"{u} 3 2 1\n" for u in range(20)) + "x 1 2 1\n"})
    [note] = import_data(falling, "s3rec").warnings[:1]
    assert note.startswith("20 of 21 sequences are sorted")
    write(falling, {"X.txt": "".join(f"{u} 3 1 2\n" for u in range(20))})
    assert import_data(falling, "s3rec").warnings == ["3 items have no text: their embeddings say nothing"]
    catalogue = import_data(falling, "s3rec").catalogue
    catalogue.num_items, catalogue.item_texts, catalogue.source_ids = 4, ["a", "b", "c", "d"], None
    assert data.look_over(catalogue) == ["1 items have no interactions: only content can recommend them"]


# ---------------------------------------------------------------- the command


def test_data_commands(tmp_path):
    pytest.importorskip("typer", reason="the command line needs typer and rich")
    from typer.testing import CliRunner

    from vqkernels.cli import app

    def vqkernels(*arguments):
        result = CliRunner().invoke(app, ["data", *map(str, arguments)])
        return result.exit_code, " ".join(result.output.split())

    source = tmp_path / "source"
    source.mkdir()
    write(source, GOOD["lcrec"][0])
    code, said = vqkernels("import", source, "--format", "lcrec", "--out", tmp_path / "out")
    assert code == 0 and "2 users have fewer than 3 interactions" in said
    assert read_index(tmp_path / "out" / "semantic_ids.json")[0].tolist() == [[1, 2, 1], [5, 6, 0]]
    assert data.load_folder(tmp_path / "out").source_ids == ["0", "3"]
    before = sorted(tmp_path.rglob("*"))
    for arguments in (("describe", tmp_path / "out"), ("describe", source, "--format", "lcrec")):
        code, said = vqkernels(*arguments)
        assert code == 0 and "2 users have fewer" in said and re.search(r"interactions\W+4 ", said)
    assert sorted(tmp_path.rglob("*")) == before
    code, said = vqkernels("import", source, "--format", "lcrec", "--out", tmp_path / "out")
    assert code == 2 and said.startswith("vqkernels data import: ") and "is not empty" in said
    code, said = vqkernels("describe", source, source)
    assert code == 2 and "a data folder is described alone" in said
    write(source, {"X.inter.json": '{"0": [1],\n"1": 5}'})
    code, said = vqkernels("describe", source, "--format", "lcrec")
    assert code == 2 and "X.inter.json:2: user '1' has no list" in said and "Traceback" not in said
