"""DATA: every form from every place, every refusal in words, and tokens as the trainer counts them."""

import contextlib
import copy
import importlib
import json
import os
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankwise import errors
from rankwise.errors import (
    AccessError,
    ChatTemplateError,
    DataFormatError,
    DataRowError,
    MissingDependencyError,
    NoDataError,
    RankwiseError,
    SourceNotFoundError,
    TooLongError,
    UsageError,
)
from rankwise.tuning.data import Examples, check_examples, read_data
from rankwise.tuning.data_files import KINDS
from rankwise.tuning.data_rows import _HINTS, FORMS

fsspec = pytest.importorskip("fsspec")

TEXT = [{"text": "one two"}, {"text": "Zürich\nis a town"}]
PAIR = [{"prompt": "Who?", "completion": " Ann"}, {"prompt": "", "completion": "x"}]
CHAT = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"messages": [{"role": "system", "content": ""}, {"role": "assistant", "content": "Hello"}]},
]
ROWS = {"text": TEXT, "prompt-completion": PAIR, "messages": CHAT}


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_bytes(content.encode())
    return path


def write_parquet(path, columns):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table(columns), path)
    return path


def save(path, rows):
    """Write rows in the format that the ending of the path asks for."""
    if path.suffix == ".jsonl":
        return written(path, lines(rows))
    if path.suffix == ".json":
        return written(path, json.dumps(rows))
    return write_parquet(path, {name: [row[name] for row in rows] for name in rows[0]})


def refusal(content, name="train.jsonl", *, tmp_path, kind=RankwiseError, **options):
    with pytest.raises(kind) as caught:
        read_data(written(tmp_path / name, content), **options)
    return str(caught.value)


# --- what is read


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_from_every_kind_of_file(form, suffix, tmp_path):
    more = [row | {"id": 7, "note": None} for row in ROWS[form]]
    path = save(tmp_path / f"train{suffix}", more)
    read = read_data(path)
    assert read == Examples(str(path), form, tuple(ROWS[form]), ())
    unit = "line" if suffix == ".jsonl" else "row"
    assert list(read.places) == [f"train{suffix}, {unit} 1", f"train{suffix}, {unit} 2"]
    assert len(read) == 2
    assert "places" not in repr(read)


@pytest.mark.parametrize("form", FORMS)
def test_lists_and_live_datasets_are_read(form):
    datasets = pytest.importorskip("datasets")
    rows = tuple(ROWS[form])
    assert read_data(ROWS[form]).rows == rows
    assert read_data(tuple(ROWS[form])).places[1] == "the list, row 2"
    live = datasets.Dataset.from_list([row | {"id": 1} for row in ROWS[form]])
    assert read_data(live).rows == rows
    assert read_data(live.with_format("numpy")).rows == rows
    assert read_data(live.to_iterable_dataset()).rows == rows
    assert read_data(live).places[0] == "the Dataset, row 1"
    both = datasets.DatasetDict({"train": live, "test": live.select([0])})
    assert read_data(both).rows == rows
    assert read_data(both, split="test").rows == rows[:1]
    with pytest.raises(UsageError, match=r"the DatasetDict has no split 'dev'; it has: train, test$"):
        read_data(both, split="dev")


def test_json_may_hold_its_list_inside_an_object(tmp_path):
    path = written(tmp_path / "a.json", json.dumps({"version": 1, "data": TEXT}))
    assert read_data(path).rows == tuple(TEXT)


@pytest.mark.parametrize(
    ("content", "expected", "places"),
    [
        ("a b\nc d\n", ["a b", "c d"], [1, 2]),
        ("a b\r\nc d\r\n\r\n", ["a b", "c d"], [1, 2]),  # a blank line at the end parts nothing
        ("\n\na\nb\n\n  \nc\n", ["a\nb", "c"], [3, 7]),
        ("a\r\nb\r\n\r\nc", ["a\nb", "c"], [1, 4]),
        ("a\u2028b\fc", ["a\u2028b\fc"], [1]),  # other marks are part of the text
    ],
)
def test_text_files_hold_documents_or_lines(content, expected, places, tmp_path):
    read = read_data(written(tmp_path / "a.txt", content))
    assert [row["text"] for row in read.rows] == expected
    assert list(read.places) == [f"a.txt, line {number}" for number in places]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_byte_order_mark_and_windows_line_ends_are_taken(name, tmp_path):
    content = {"a.jsonl": '{"text":"a"}\r\n\r\n{"text":"b"}\r\n', "a.json": '[{"text":"a"},\r\n{"text":"b"}]'}
    path = written(tmp_path / name, b"\xef\xbb\xbf" + content.get(name, "a\r\nb\r\n").encode())
    assert [row["text"] for row in read_data(path).rows] == ["a", "b"]


def test_blank_lines_count_in_places(tmp_path):
    read = read_data(written(tmp_path / "a.jsonl", '\n{"text":"a"}\n\n \n{"text":"b"}'))
    assert list(read.places) == ["a.jsonl, line 2", "a.jsonl, line 5"]
    assert read.places[-1] == "a.jsonl, line 5"
    assert read.places[0:1] == ("a.jsonl, line 2",)
    with pytest.raises(IndexError):
        read.places[2]


def test_a_folder_is_read_in_the_order_of_names_without_what_lies_beside(tmp_path):
    save(tmp_path / "b.jsonl", TEXT[:1])
    save(tmp_path / "a.parquet", TEXT[1:])
    for beside in (
        "README.md",
        "readme.txt",
        "LICENSE",
        ".hidden.jsonl",
        "_SUCCESS",
        "dataset_infos.json",
        "card.yaml",
    ):
        written(tmp_path / beside, "x")
    read = read_data(str(tmp_path))
    assert read.rows == (TEXT[1], TEXT[0])
    assert list(read.places) == ["a.parquet, row 1", "b.jsonl, line 1"]


def test_a_folder_with_splits_gives_the_one_asked_for(tmp_path):
    for name, row in (("train-00.jsonl", "a"), ("train-01.jsonl", "b"), ("test.jsonl", "c"), ("my_dev.jsonl", "d")):
        written(tmp_path / name, lines([{"text": row}]))
    texts = {split: "".join(r["text"] for r in read_data(tmp_path, split=split).rows) for split in ("train", "test")}
    assert texts == {"train": "ab", "test": "c"}
    with pytest.raises(UsageError, match=r"has no split 'all'; its files are of: test, train, validation$"):
        read_data(tmp_path, split="all")
    written(tmp_path / "more.jsonl", lines(TEXT))
    with pytest.raises(DataFormatError, match=r"my_dev\.jsonl is named after a split and more\.jsonl is not"):
        read_data(tmp_path)


def test_limit_stops_early(tmp_path):
    path = written(tmp_path / "a.jsonl", lines(TEXT) + "broken")
    assert read_data(path, limit=2).rows == tuple(TEXT)
    assert len(read_data(TEXT, limit=1)) == 1
    save(tmp_path / "f" / "a.jsonl", TEXT)
    written(tmp_path / "f" / "b.jsonl", "broken")
    assert len(read_data(tmp_path / "f", limit=2)) == 2
    with pytest.raises(UsageError, match="limit must be 1 or more, got 0"):
        read_data(path, limit=0)


def test_nulls_of_a_table_do_not_count(tmp_path):
    """A table gives every row every column; what a row does not have is null."""
    path = write_parquet(tmp_path / "a.parquet", {"text": ["a", "b"], "messages": [None, None], "prompt": ["x", None]})
    assert read_data(path).rows == ({"text": "a"}, {"text": "b"})
    assert read_data([{"text": "a", "messages": None, "prompt": "x", "completion": None}]).form == "text"


def test_fsspec_urls_are_read():
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe_file("/data/train.jsonl", lines(PAIR).encode())
    memory.pipe_file("/data/README.md", b"x")
    memory.pipe_file("/empty/x/a.jsonl", b"")
    try:
        assert read_data("memory://data/train.jsonl").rows == tuple(PAIR)
        assert read_data("memory://data").rows == tuple(PAIR)
        assert read_data("memory://data").places[0] == "train.jsonl, line 1"
        with pytest.raises(SourceNotFoundError, match=r"memory://data/none\.jsonl is not there"):
            read_data("memory://data/none.jsonl")
        with pytest.raises(DataFormatError, match=r"holds no data files; .* Its subfolders .* give one: x\."):
            read_data("memory://empty")
    finally:
        memory.store.clear()
    with pytest.raises(SourceNotFoundError, match=r"'nope://a.jsonl' cannot be opened: Protocol not known: nope"):
        read_data("nope://a.jsonl")
    with pytest.raises(DataFormatError, match="has no ending that tells its format"):
        read_data("https://example.org/data?name=train.jsonl")


def test_file_urls_and_the_home_folder_are_local(tmp_path, monkeypatch):
    path = save(tmp_path / "my data.jsonl", TEXT)
    assert read_data(path.as_uri()).rows == tuple(TEXT)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_data("~/my data.jsonl").rows == tuple(TEXT)


# --- the hub


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache; returns a function that puts files of a data set into it."""
    constants = pytest.importorskip("huggingface_hub.constants")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    commit = "0123456789abcdef0123456789abcdef01234567"

    def add(repo, files, revision="main"):
        root = tmp_path / "hub" / f"datasets--{repo.replace('/', '--')}"
        written(root / "refs" / revision, commit)
        for name, content in files.items():
            written(root / "snapshots" / commit / name, content)

    return add


def test_a_dataset_in_the_hubs_cache_is_read_offline(cache, tmp_path, monkeypatch, capfd):
    datasets = importlib.import_module("datasets")
    cache("org/name", {"train.jsonl": lines(CHAT), "test.jsonl": lines(CHAT[:1]), "README.md": "# x"})
    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    for spelled in ("org/name", "org/name@main", "hf://datasets/org/name", "hf://datasets/org/name@main"):
        assert read_data(spelled) == Examples(spelled, "messages", tuple(CHAT), ())
    assert read_data("org/name").places[1] == "org/name (train), row 2"
    assert len(read_data("org/name", split="test")) == 1
    with pytest.raises(UsageError, match=r'org/name has no split \'dev\': Unknown split "dev"\. Should be one of'):
        read_data("org/name", split="dev")
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == (bars, level)
    assert capfd.readouterr().err == ""
    save(tmp_path / "org" / "name" / "a.jsonl", TEXT)  # a local path wins
    monkeypatch.chdir(tmp_path)
    assert read_data("org/name").rows == tuple(TEXT)


def test_datasets_that_cannot_be_read_say_why(cache):
    with pytest.raises(SourceNotFoundError, match=r"'org/none' is no local path, .* hf download .*dataset org/none$"):
        read_data("org/none")
    card = (
        "---\nconfigs:\n- config_name: one\n  data_files: one.jsonl\n- config_name: two\n  data_files: two.jsonl\n---\n"
    )
    cache("org/two", {"README.md": card, "one.jsonl": lines(TEXT), "two.jsonl": lines(TEXT)})
    with pytest.raises(
        UsageError, match=r"org/two has several configurations.*\['one', 'two'\].*hf://datasets/org/two/"
    ):
        read_data("org/two")
    cache("org/script", {"script.py": "print('run')"})
    with pytest.raises(DataFormatError, match=r"org/script.*cannot be read as a data set"):
        read_data("org/script")
    cache("org/broken", {"train.jsonl": '{"text": "a"}\n{"text": b"}\n'})
    with pytest.raises(DataFormatError, match=r"org/broken.*DatasetGenerationError.*JSON parse error"):
        read_data("org/broken")
    cache("org/alpaca", {"train.jsonl": lines([{"instruction": "a", "output": "b"}])})
    with pytest.raises(
        DataFormatError, match=r'org/alpaca \(train\) has the columns "instruction", "output"; .* Rename'
    ):
        read_data("org/alpaca")


def test_answers_of_the_hub_become_errors_of_ours(monkeypatch):
    datasets = pytest.importorskip("datasets")
    failures = {
        datasets.exceptions.DatasetNotFoundError("Dataset 'org/x' doesn't exist"): SourceNotFoundError,
        RuntimeError("Dataset scripts are no longer supported, but found x.py"): DataFormatError,
        ConnectionError("Couldn't reach the Hub (timed out)"): AccessError,
        PermissionError("no"): AccessError,
    }
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for failure, kind in failures.items():

        def fail(*args, failure=failure, **options):
            assert "trust_remote_code" not in options
            raise failure

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(kind, match="org/x"):
            read_data("org/x")


# --- refusals


ONE_ROW = [
    ("[1]", "begins with a JSON list; a .jsonl file has one object a line. Name it .json."),
    ("7", "line 1 is a number; wanted an object"),
    ("null", "line 1 is null; wanted an object"),
    ('"a"', "line 1 is a string; wanted an object"),
    ("{}", "line 1 has no columns; wanted"),
    ('{"text": "a"', "line 1 is not JSON: Expecting ',' delimiter at column 13. Mend it or take it out."),
    ('{"text": "a"} {"text": "b"}', "line 1 is not JSON: Extra data at column 15."),
    ('{"text": NaN}', "line 1 is not strict JSON: NaN is no JSON number."),
    ('{"text": "a", "x": -Infinity}', "-Infinity is no JSON number"),
    ('{"text": "a", "text": "b"}', "not strict JSON: the key 'text' is there twice."),
    ('{"text": "a", "x": {"y": 1, "y": 1}}', "the key 'y' is there twice"),
    ('{"text": "a", "x": ' + "9" * 5000 + "}", "not strict JSON: Exceeds the limit"),
    ("[" * 200_000, "nested too deep"),
    ('{"text": "a\tb"}', "not JSON: Invalid control character at"),
    ('{"text": null}', '"text" is null; wanted a string. Mend the row'),
    ('{"text": 3}', '"text" is a number; wanted a string.'),
    ('{"text": true}', '"text" is true or false; wanted a string.'),
    ('{"text": ["a"]}', '"text" is a list; wanted a string.'),
    ('{"text": {"a": 1}}', '"text" is an object; wanted a string.'),
    ('{"text": ""}', '"text" is empty, so there is nothing to learn.'),
    ('{"text": " \\n\\t"}', '"text" is blank, so there is nothing to learn.'),
    ('{"text": "ab\\u0000"}', '"text" has a NUL character at position 3.'),
    ('{"text": "a\\ud800b"}', '"text" has half a surrogate pair (U+D800) at position 2'),
    ('{"prompt": "a", "completion": " "}', '"completion" is blank'),
    ('{"prompt": "a", "completion": ""}', '"completion" is empty'),
    ('{"prompt": "a", "completion": null}', '"completion" is null; wanted a string.'),
    ('{"prompt": null, "completion": "a"}', '"prompt" is null; wanted a string.'),
    ('{"prompt": [{"role": "user", "content": "a"}], "completion": "a"}', '"prompt" is a list; wanted a string.'),
    ('{"text": "a", "messages": []}', 'has "text" as well as "messages"; which of them to train on is unclear.'),
    ('{"messages": []}', '"messages" is an empty list'),
    ('{"messages": null}', '"messages" is null; wanted a list of {"role": ..., "content": ...}.'),
    ('{"messages": "a"}', '"messages" is a string; wanted a list of'),
    ('{"messages": ["a"]}', '"messages[0]" is a string; wanted {"role": ..., "content": ...}.'),
    ('{"messages": [{"content": "a"}]}', '"messages[0]" has no "role"; wanted'),
    ('{"messages": [{"role": "user"}]}', '"messages[0]" has no "content"; wanted'),
    ('{"messages": [{"from": "human", "value": "a"}]}', 'Rename "from" to "role" and "value" to "content".'),
    (
        '{"messages": [{"role": "human", "content": "a"}]}',
        "the role of \"messages[0]\" is 'human'; wanted one of: system, developer, user, assistant, tool. "
        'Did you mean "user"?',
    ),
    ('{"messages": [{"role": "Assistant", "content": "a"}]}', 'Did you mean "assistant"?'),
    ('{"messages": [{"role": 3, "content": "a"}]}', 'the role of "messages[0]" is a number'),
    ('{"messages": [{"role": [], "content": "a"}]}', 'the role of "messages[0]" is a list'),
    ('{"messages": [{"role": "assistant", "content": null}]}', '"messages[0].content" is null; wanted a string.'),
    ('{"messages": [{"role": "assistant", "content": [{"a": 1}]}]}', '"messages[0].content" is a list of parts'),
    ('{"messages": [{"role": "assistant", "content": "\\u0000"}]}', '"messages[0].content" has a NUL character'),
    ('{"messages": [{"role": "user", "content": "a"}]}', '"messages" has no turn of the role "assistant"'),
    ('{"messages": [{"role": "assistant", "content": " "}]}', '"messages" has no turn of the role "assistant"'),
    ('{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}', '"messages[0]" has "tool_calls"'),
]  # fmt: skip


@pytest.mark.parametrize(("row", "words"), ONE_ROW)
def test_broken_rows_are_refused_with_their_place(row, words, tmp_path):
    message = refusal(row + "\n", tmp_path=tmp_path)
    assert words in message
    assert message.startswith("train.jsonl")
    assert len(message) < 500


def test_the_place_is_that_of_the_row(tmp_path):
    message = refusal(lines(TEXT) + '\n{"text": 3}\n', tmp_path=tmp_path, kind=DataRowError)
    assert message == 'train.jsonl, line 4: "text" is a number; wanted a string.'


HINTS = {
    ("conversations",): 'Rename "conversations" to "messages", and in each turn "from" to "role"',
    ("instruction", "input", "output"): 'Rename "output" to "completion", and "instruction" (with "input" after it',
    ("question", "answer"): 'Rename "question" to "prompt" and "answer" to "completion"',
    ("prompt", "chosen", "rejected"): "Preferences are not trained on",
    ("Text", "id"): 'Rename "Text" to "text"',
    ("role", "content"): "These are turns of one conversation",
    ("completion",): 'Add "prompt" (it may be empty)',
    ("a", "b"): 'wanted "text", or "prompt" and "completion", or "messages". Rename the columns.',
}


@pytest.mark.parametrize("columns", HINTS)
def test_other_layouts_are_told_what_to_rename(columns, tmp_path):
    message = refusal(lines([dict.fromkeys(columns, "x")]), tmp_path=tmp_path, kind=DataFormatError)
    assert HINTS[columns] in message
    assert ", ".join(f'"{name}"' for name in columns) in message
    table = write_parquet(tmp_path / "a.parquet", {name: ["x"] for name in columns})
    with pytest.raises(DataFormatError) as caught:
        read_data(table)
    assert HINTS[columns] in str(caught.value)


def test_every_hint_is_for_columns_that_are_no_form():
    for columns in _HINTS:
        assert not any(set(fields) <= set(columns) for fields in FORMS.values())


def test_mixed_forms_name_both_places(tmp_path):
    message = refusal(lines([*PAIR, TEXT[0]]), tmp_path=tmp_path, kind=DataFormatError)
    assert message.startswith(
        'train.jsonl, line 3 has "text", and train.jsonl, line 1 has "prompt" and "completion"; all'
    )
    folder = tmp_path / "folder"
    save(folder / "a.jsonl", TEXT)
    save(folder / "b.json", CHAT)
    with pytest.raises(
        DataFormatError, match=r'^b\.json, row 1 has "messages", and a\.jsonl, line 1 has "text"; all rows'
    ):
        read_data(folder)


def test_a_second_form_that_fills_up_later_is_seen():
    rows = [{"text": "a", "messages": None}, {"text": "b", "messages": CHAT[0]["messages"]}]
    with pytest.raises(DataFormatError, match='row 2 has "text" as well as "messages"'):
        read_data(rows)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b" \n\n"])
def test_empty_files_are_refused(name, content, tmp_path):
    words = f"{name} has no rows; nothing can be learnt from it."
    assert words in refusal(content, name, tmp_path=tmp_path, kind=NoDataError)


def test_nothing_at_all_is_refused(tmp_path):
    for empty in ([], ()):
        with pytest.raises(NoDataError, match="the list has no rows"):
            read_data(empty)
    with pytest.raises(NoDataError, match=r"a\.parquet has no rows"):
        read_data(write_parquet(tmp_path / "a.parquet", {"text": np.array([], dtype="U1")}))
    with pytest.raises(
        DataFormatError, match=r"holds no data files; wanted \.jsonl, \.json, \.parquet, \.txt files\.$"
    ):
        read_data(written(tmp_path / "d" / "README.md", "x").parent)
    save(tmp_path / "f" / "a.jsonl", TEXT)
    written(tmp_path / "f" / "b.jsonl", "")
    with pytest.raises(NoDataError, match=r"^b\.jsonl has no rows"):
        read_data(tmp_path / "f")
    for name in ("", " "):
        with pytest.raises(SourceNotFoundError, match="the name of the data is empty"):
            read_data(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.pkl", "a.pkl is a pickle, which can run code when it is opened; data is read from .jsonl, .json, .parquet"),
        ("a.PT", "is a pickle"),
        ("a.jsonl.gz", "a.jsonl.gz is compressed; unpack it first;"),
        ("a.arrow", "write it with Dataset.to_parquet"),
        ("a.csv", "is a table; write it as .parquet or .jsonl"),
        ("a.docx", "a.docx has the ending '.docx'"),
        ("a", "a has no ending that tells its format"),
    ],
)
def test_other_formats_are_refused_by_name(name, words, tmp_path):
    assert words in refusal("x", name, tmp_path=tmp_path, kind=DataFormatError)
    save(tmp_path / "0.jsonl", TEXT)
    with pytest.raises(DataFormatError) as caught:
        read_data(tmp_path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "a.json is not JSON: Expecting property name"),
        ('[{"text": "a"},\n{"text": b}]', "a.json is not JSON: Expecting value at line 2, column 10."),
        (lines(TEXT), "another begins at line 2. If it has one object a line, name it .jsonl."),
        ('"a"', "a.json holds a JSON str; wanted a list of objects"),
        ('{"text": "a"}', "a.json holds one object with 'text'; wanted a list of rows"),
        ('{"a": [], "b": []}', "a.json holds one object with 'a', 'b'; wanted"),
        ('{"messages": []}', "A single row also stands in a list: [{...}]."),
        ('[{"text": "a"}, 3]', "a.json, row 2 is a number; wanted an object"),
        (
            b'[{"text":\n "a\xff"}]',
            "a.json, line 2 is not UTF-8 text (byte 0xff at position 4). Save the file as UTF-8.",
        ),
    ],
)
def test_broken_json_files_are_refused(content, words, tmp_path):
    assert words in refusal(content, "a.json", tmp_path=tmp_path)


def test_bytes_that_are_no_utf8_are_refused(tmp_path):
    latin = '{"text": "Zürich"}'.encode("latin-1")
    message = refusal(lines(TEXT).encode() + latin, tmp_path=tmp_path, kind=DataRowError)
    assert message == "train.jsonl, line 3 is not UTF-8 text (byte 0xfc at position 12). Save the file as UTF-8."
    for name in ("a.jsonl", "a.json", "a.txt"):
        assert "looks like UTF-16" in refusal("text".encode("utf-16"), name, tmp_path=tmp_path, kind=DataRowError)
    assert "a.txt, line 2 is not UTF-8" in refusal(b"a\nb\xff\n", "a.txt", tmp_path=tmp_path, kind=DataRowError)
    assert "NUL character" in refusal(b"a\0b", "a.txt", tmp_path=tmp_path, kind=DataRowError)


def test_broken_parquet_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": [f"row {i}" * 9 for i in range(500)]})
    whole = path.read_bytes()
    for content in (b"", b"PAR1", b"x" * 100, whole[:-10], whole[:50] + b"\xff" * 200 + whole[250:]):
        message = refusal(content, "b.parquet", tmp_path=tmp_path, kind=DataFormatError)
        assert "b.parquet is no whole parquet file" in message
    bytes_column = write_parquet(tmp_path / "c.parquet", {"text": [b"a"]})
    with pytest.raises(DataRowError, match=r'c\.parquet, row 1: "text" is bytes; wanted a string'):
        read_data(bytes_column)


def test_missing_packages_name_the_extra(tmp_path, monkeypatch):
    path = save(tmp_path / "a.parquet", TEXT)
    real = importlib.import_module

    def without(name, *rest):
        if name.partition(".")[0] in ("pyarrow", "datasets"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(
        MissingDependencyError, match=r"reading a\.parquet needs pyarrow.*pip install 'rankwise\[train\]'"
    ):
        read_data(path)
    with pytest.raises(
        MissingDependencyError, match=r"reading the data set org/name needs datasets.*rankwise\[train\]"
    ):
        read_data("org/name")


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        ("nope.jsonl", SourceNotFoundError, "'nope.jsonl' is not there: no file or folder of that name."),
        ("a/b/c", SourceNotFoundError, "'a/b/c' is not there"),
        ("a\0b", SourceNotFoundError, "is not there"),
        ("rankwise:nothing", UsageError, "'rankwise:nothing' is no data set that is read from a file"),
        ("hf://org/name", UsageError, "data sets are spelled hf://datasets/org/name"),
        (
            7,
            UsageError,
            "data is of the type int; wanted a path, a hub id, a URL, a datasets.Dataset or a list of dicts",
        ),
        ({"text": ["a"]}, UsageError, "data is of the type dict; wanted"),
        (["a"], DataRowError, "the list, row 1 is a string; wanted an object"),
        ([{"text": "\0"}], DataRowError, 'the list, row 1: "text" has a NUL'),
    ],
)
def test_names_and_values_that_are_no_data(data, kind, words):
    with pytest.raises(kind) as caught:
        read_data(data)
    assert words in str(caught.value)


def test_a_data_frame_is_told_how_to_pass():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(
        UsageError, match=r"data is of the type DataFrame; .*of a data frame: frame\.to_dict\('records'\)$"
    ):
        read_data(pandas.DataFrame({"text": ["a"]}))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission_are_refused(tmp_path):
    path = save(tmp_path / "a.jsonl", TEXT)
    path.chmod(0)
    with pytest.raises(AccessError, match="may not be read"):
        read_data(path)


def test_files_are_closed_whatever_happens(tmp_path, monkeypatch):
    import pathlib

    opened = []
    real = pathlib.Path.open
    monkeypatch.setattr(pathlib.Path, "open", lambda *a, **o: opened.append(real(*a, **o)) or opened[-1])
    read_data(save(tmp_path / "a.jsonl", TEXT), limit=1)
    opened.clear()
    for content in ("{", lines(TEXT), '{"a": 1}'):
        path = tmp_path / "a.jsonl"
        path.write_text(content)
        opened.clear()
        with contextlib.suppress(RankwiseError):
            read_data(path, limit=1)
        assert [file.closed for file in opened] == [True]
    table = write_parquet(tmp_path / "a.parquet", {"x": [1]})
    opened.clear()
    with pytest.raises(DataFormatError):
        read_data(table)
    assert [file.closed for file in opened] == [True]


def test_long_lines_and_many_rows_take_linear_time(tmp_path):
    start = time.process_time()
    path = written(tmp_path / "a.jsonl", json.dumps({"text": "wort ü " * 1_500_000}, ensure_ascii=False))
    assert len(read_data(path).rows[0]["text"]) == 10_500_000
    many = written(tmp_path / "b.jsonl", '{"prompt": "a", "completion": "b"}\n' * 50_000)
    assert len(read_data(many)) == 50_000
    assert time.process_time() - start < 5


# --- anything at all

pieces = st.sampled_from(
    [b'{"text": "a"}', b"\n", b"\r\n", b"{", b"}", b'"', b"[", b"]", b",", b":", b'"text"', b'"messages"', b'"role"',
     b"null", b"NaN", b"1e999", b"-0", b"\\ud800", b"\\u0000", b"\xff", b"\xef\xbb\xbf", b"\0",
     b'{"prompt": "", "completion": "b"}',
     b'{"messages": [{"role": "assistant", "content": "a"}]}', "é\u2028".encode()]
)  # fmt: skip
contents = st.one_of(st.binary(max_size=60), st.lists(pieces, max_size=12).map(b"".join))
values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "assistant", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["text", "prompt", "completion", "messages", "role", "content"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=contents, suffix=st.sampled_from([suffix for suffix in KINDS if suffix != ".parquet"]))
def test_any_bytes_are_read_or_refused(content, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    try:
        read = read_data(path)
    except RankwiseError as error:
        str(error).encode()  # any terminal takes it
    else:
        assert_whole(read)


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(values, max_size=4))
def test_any_values_are_read_or_refused(rows):
    try:
        read = read_data(rows)
    except RankwiseError as error:
        str(error).encode()
    else:
        assert_whole(read)


def assert_whole(read):
    assert len(read.rows) == len(read.places) > 0
    for row in read.rows:
        assert tuple(row) == FORMS[read.form]
    json.dumps(read.rows, ensure_ascii=False).encode()


# --- tokens


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, a beginning token before every text, and </s> at the end."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def test_tokens_of_text(tokenizer):
    counts = check_examples(read_data([{"text": "abc"}, {"text": "abcdef"}]), tokenizer, 6)
    assert (counts.examples, counts.longest, counts.truncated) == (2, 8, 1)
    assert counts.tokens == 5 + 6  # <s> abc </s>, and <s> abcde
    assert counts.target_tokens == 4 + 5
    assert counts.mean == 5.5
    assert check_examples(read_data([{"text": "abcdef"}]), tokenizer, None).truncated == 0


def test_tokens_of_prompt_and_completion(tokenizer):
    rows = [{"prompt": "ab", "completion": "cd"}, {"prompt": "", "completion": "x</s>"}]
    counts = check_examples(read_data(rows), tokenizer, 16)
    assert (counts.tokens, counts.target_tokens, counts.longest, counts.truncated) == (6 + 3, 3 + 2, 6, 0)
    cut = check_examples(read_data(rows), tokenizer, 4)
    assert (cut.tokens, cut.target_tokens, cut.longest, cut.truncated) == (4 + 3, 1 + 2, 6, 1)


TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m['role'][0] }}]{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }};"
    "{% endgeneration %}{% else %}{{ m['content'] }};{% endif %}{% endfor %}"
)


def chatting(tokenizer, template):
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    return made


def test_tokens_of_messages(tokenizer):
    rows = read_data([{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}])
    counts = check_examples(rows, chatting(tokenizer, TEMPLATE), 64)
    assert counts.tokens == len("[user]Hi;[assistant]Yes;")
    assert counts.target_tokens == len("Yes;")
    marked = check_examples(rows, chatting(tokenizer, MARKED), 64)
    assert marked.target_tokens == len("Yes;")
    with pytest.raises(
        TooLongError, match=r"^the list, row 1: the conversation before the answer takes 20 tokens, and"
    ):
        check_examples(rows, chatting(tokenizer, TEMPLATE), 20)


def test_prompts_that_fill_the_context_are_refused(tokenizer):
    rows = [{"prompt": "a" * n, "completion": "b"} for n in (3, 7, 12, 8)]
    with pytest.raises(TooLongError) as caught:
        check_examples(read_data(rows), tokenizer, 8)
    assert str(caught.value) == (
        "the list, row 2: the prompt takes 8 tokens, and max_length is 8, so nothing of what follows it would be "
        "trained on. So it is with 3 of 4 rows, the longest with 13. Raise max_length if the model's context allows, "
        "or shorten these rows or take them out."
    )
    one = check_examples(read_data(rows[:1]), tokenizer, 5)
    assert (one.truncated, one.target_tokens) == (1, 1)
    with pytest.raises(UsageError, match="max_length must be 2 or more, got 1"):
        check_examples(read_data(rows), tokenizer, 1)


def test_rows_without_a_token_to_learn_are_refused(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = None
    bare.eos_token = None
    with pytest.raises(DataRowError, match=r"^the list, row 2: the tokenizer makes 1 tokens of it, and none"):
        check_examples(read_data([{"text": "ab"}, {"text": "a"}]), bare, 8)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "(TemplateError): roles must alternate. Mend the row"),
        ("{% for m in messages %}", "(TemplateSyntaxError): Unexpected end of template"),
        ("{{ messages[0]['content'] / 2 }}", "(TypeError): unsupported operand"),
    ],
)
def test_chat_templates_that_fail_name_the_row(template, words, tokenizer):
    with pytest.raises(ChatTemplateError) as caught:
        check_examples(read_data(CHAT), chatting(tokenizer, template), 64)
    assert words in str(caught.value)
    assert str(caught.value).startswith("the list, row 1: the chat template of the tokenizer fails")


def test_messages_without_a_chat_template_are_refused(tokenizer):
    with pytest.raises(
        ChatTemplateError, match=r"^a list of 2 rows has messages, and the tokenizer has no chat template"
    ):
        check_examples(read_data(CHAT), tokenizer, 64)


@pytest.mark.interop
@pytest.mark.parametrize("form", ["text", "prompt-completion"])
def test_counts_are_those_of_the_trainer(form, tokenizer):
    """TRL tokenises row by row; the counts come from batches."""
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    rows = (
        [{"text": "abc def"}, {"text": "Zoë</s>"}] if form == "text" else [*PAIR, {"prompt": "é ", "completion": " ü"}]
    )
    read = read_data(rows)
    tokens = targets = 0
    for row in read.rows:
        row = dict(row)
        last = "text" if form == "text" else "completion"
        row[last] += "" if row[last].endswith("</s>") else "</s>"
        whole = sft._tokenize(tokenizer, "".join(row.values()))["input_ids"]
        start = (
            sft.common_prefix_length(sft._tokenize(tokenizer, row["prompt"])["input_ids"], whole) if len(row) > 1 else 1
        )
        tokens += len(whole)
        targets += len(whole) - max(start, 1)
    counts = check_examples(read, tokenizer, 64)
    assert (counts.tokens, counts.target_tokens) == (tokens, targets)


def test_ten_thousand_rows_are_counted_in_seconds(tokenizer):
    rows = [{"prompt": f"What is the number of person {i}?", "completion": f" It is {i * 7}."} for i in range(10_000)]
    read = read_data(rows)
    start = time.process_time()
    assert check_examples(read, tokenizer, 64).examples == 10_000
    assert time.process_time() - start < 10  # 2 s on two cores at rest


def test_errors_of_this_room_are_documented(root):
    page = (root / "docs" / "reference" / "messages.md").read_text(encoding="utf-8")
    for kind in (DataFormatError, DataRowError, NoDataError, TooLongError, ChatTemplateError):
        assert f"\n## {kind.slug}\n" in page
        assert getattr(errors, kind.__name__) is kind
