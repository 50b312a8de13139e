"""Rows out of files, folders and Hub names; every broken source gives one message that names the place."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chulengo.data.sources import file_of, is_hub_name, read_records
from chulengo.errors import DataError, NetworkError

ROWS = [
    {"question": "¿Qué?\nSecond line, with comma", "answer": 'He said "no" 🦙'},
    {"question": "b", "answer": "2"},
    {"question": "", "answer": " spaced "},
]


def rows(spec: Path | str, **more: Any) -> list[dict[str, Any]]:
    return [record.fields for record in read_records(str(spec), **more)]


def sources(spec: Path | str) -> list[str]:
    return [record.source for record in read_records(str(spec))]


def refusal(spec: Path | str, **more: Any) -> str:
    with pytest.raises(DataError) as caught:
        rows(spec, **more)
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def as_csv(delimiter: str, line_end: str = "\r\n") -> str:
    import io

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["question", "answer"], delimiter=delimiter, lineterminator=line_end)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


FILES: dict[str, str] = {
    "a.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "lines.json": "\n".join(json.dumps(row) for row in ROWS),
    "wrapped.json": json.dumps({"version": "1", "rows": ROWS}),
    "columns.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    "pandas.json": json.dumps({n: {str(i): row[n] for i, row in enumerate(ROWS)} for n in ROWS[0]}),
    "a.jsonl": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n",
    "a.csv": as_csv(","),
    "semicolons.csv": as_csv(";"),
    "unix.csv": as_csv(",", "\n"),
    "a.tsv": as_csv("\t"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", FILES)
def test_every_text_form_gives_the_same_rows(tmp_path: Path, name: str, mark: bytes, packed: bool) -> None:
    path = write(tmp_path / (name + ".gz" if packed else name), mark + FILES[name].encode())
    assert rows(path) == ROWS


@pytest.mark.parametrize("name", ["a.json", "pretty.json", "a.jsonl"])
def test_carriage_returns_at_line_ends_do_not_matter(tmp_path: Path, name: str) -> None:
    assert rows(write(tmp_path / name, FILES[name].replace("\n", "\r\n"))) == ROWS


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_parquet(tmp_path: Path, name: str) -> None:
    import pyarrow
    import pyarrow.parquet

    many = [{"text": f"row {i}", "turns": [{"role": "user", "content": str(i)}]} for i in range(1000)]
    plain = tmp_path / "plain.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(many), plain, row_group_size=300)
    path = write(tmp_path / name, plain.read_bytes())
    assert rows(path) == many
    assert sources(path)[-1] == f"{path}#1000"


def test_rows_by_key_keep_their_key(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps({"17": {"QUESTION": "q"}, "18": {"QUESTION": "r"}}))
    assert rows(path) == [{"id": "17", "QUESTION": "q"}, {"id": "18", "QUESTION": "r"}]


def test_one_object_with_turns_is_one_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    assert rows(write(tmp_path / "a.json", json.dumps(row))) == [row]


def test_squad_gives_one_row_a_question(tmp_path: Path) -> None:
    paragraph = {"context": "C", "qas": [{"id": str(i), "question": f"q{i}", "answers": []} for i in range(3)]}
    path = write(tmp_path / "a.json", json.dumps({"data": [{"title": "T", "paragraphs": [paragraph, paragraph]}]}))
    found = rows(path)
    assert [row["question"] for row in found] == ["q0", "q1", "q2"] * 2
    assert found[0] == {"title": "T", "context": "C", "id": "0", "question": "q0", "answers": []}
    assert sources(path)[3] == f"{path}#4"


def test_places_of_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": 2}\n')
    assert sources(path) == [f"{path}:1", f"{path}:3"]
    path = write(tmp_path / "a.csv", 'text,label\n"one\ntwo\nthree",x\n\nplain,y\n')
    assert sources(path) == [f"{path}:2", f"{path}:6"]
    assert file_of(f"{path}:6") == str(path)
    assert file_of("org/name[train]#12") == "org/name[train]"


def test_a_folder_is_read_recursively_in_order(tmp_path: Path) -> None:
    (tmp_path / "b" / ".cache").mkdir(parents=True)
    write(tmp_path / "b" / "x.jsonl", '{"n": 2}')
    write(tmp_path / "b" / ".cache" / "x.jsonl", '{"n": 99}')
    write(tmp_path / "a.csv", "n\n1\n")
    write(tmp_path / "c.json.gz", '[{"n": 3}]')
    write(tmp_path / ".hidden.jsonl", "not json")
    write(tmp_path / "README.md", "not data")
    assert [str(row["n"]) for row in rows(tmp_path)] == ["1", "2", "3"]


# ---- txt


def test_a_short_text_file_is_one_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\ufeffOne.\r\n\r\n\r\nTwo.\r\n")
    assert rows(path) == [{"text": "One.\n\n\nTwo.\n"}]


def test_a_long_text_file_is_cut_at_blank_lines_only_and_joins_to_itself(tmp_path: Path) -> None:
    draw = random.Random(0)
    text = "".join("x" * draw.randint(1, 200) + draw.choice(["\n", "\n\n", "\n \n"]) for _ in range(40_000)) + "\n\n"
    pieces = [row["text"] for row in rows(write(tmp_path / "a.txt", text))]
    assert len(pieces) > 2
    assert "".join(pieces) == text
    assert all(piece.splitlines()[-1].strip() == "" for piece in pieces[:-1])


def test_blank_lines_after_a_cut_are_no_document_of_their_own(tmp_path: Path) -> None:
    text = "x" * 80 + "\n"
    text = text * ((1 << 20) // len(text) + 1) + "\n\n\n"
    assert rows(write(tmp_path / "a.txt", text)) == [{"text": text}]


def test_a_text_file_of_blanks_holds_no_rows(tmp_path: Path) -> None:
    assert "holds no rows" in refusal(write(tmp_path / "a.txt", " \n\n"))


# ---- broken sources


def test_broken_jsonl_names_line_column_and_start(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2,, "b": "' + "z" * 200 + '"}\n')
    message = refusal(path)
    assert f"{path} is not valid JSON: line 2, column 9" in message
    assert '{"a": 2,, "b": "zzz' in message
    assert "…" in message


@pytest.mark.parametrize("lines_before", [0, 3, 20_000])
@pytest.mark.parametrize(
    ("broken", "column"),
    [('{"a": tru}', 7), ('{"a" 1}', 6), ('{"a": "x\ty"}', 9), ('{"a": 1}}', 9), ("[1]", 1), ('{"a": 1} {', 10)],
)
def test_broken_json_array_names_line_and_column(tmp_path: Path, lines_before: int, broken: str, column: int) -> None:
    good = "".join(f'{{"n": {i}, "text": "some words"}},\n' for i in range(lines_before))
    path = write(tmp_path / "a.json", f"[{good}\n{broken},\n" + '{"z": 1},\n' * 50 + '{"z": 1}]')
    assert f"line {lines_before + 2}, column {column}" in refusal(path)


def test_a_json_array_that_ends_early(tmp_path: Path) -> None:
    whole = json.dumps(ROWS)
    for end in range(1, len(whole)):
        assert "is not valid JSON: line 1" in refusal(write(tmp_path / "a.json", whole[:end])), whole[:end]
    assert "text after the end" in refusal(write(tmp_path / "a.json", whole + " x"))


def test_json_is_the_same_however_the_window_cuts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [{"t": "é🦙\\\"\n" * i, "n": i / 7, "x": [True, None, {"k": -1e-9}]} for i in range(60)]
    paths = [
        write(tmp_path / f"{indent}{ascii_only}.json", json.dumps(many, indent=indent, ensure_ascii=ascii_only))
        for indent in (None, 1)
        for ascii_only in (False, True)
    ]
    for size in (1, 2, 3, 7, 64, 1000):
        monkeypatch.setattr("chulengo.data.sources_text.CHUNK_BYTES", size)
        assert all(rows(path) == many for path in paths)


def test_rows_that_are_no_objects(tmp_path: Path) -> None:
    assert "line 2: a string where a JSON object is needed" in refusal(write(tmp_path / "a.jsonl", '{"a":1}\n"x"'))
    message = refusal(write(tmp_path / "b.jsonl", json.dumps(ROWS)))
    assert "line 1: a list" in message
    assert "suffix .json" in message
    assert "starts with [ or {" in refusal(write(tmp_path / "c.json", '"text"'))


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    good, bad = r'{"a": "\ud83e\udd99"}', r'{"a": "\ud83e"}'
    assert rows(write(tmp_path / "a.jsonl", good)) == [{"a": "🦙"}]
    assert "line 2: half of a surrogate pair" in refusal(write(tmp_path / "a.jsonl", good + "\n" + bad))
    assert "half of a surrogate pair" in refusal(write(tmp_path / "a.json", f"[{good}, {bad}]"))


def test_nesting_without_end_is_an_error_not_a_crash(tmp_path: Path) -> None:
    deep = '{"a": ' + "[" * 200_000
    assert "a.jsonl" in refusal(write(tmp_path / "a.jsonl", deep))
    assert "a.json" in refusal(write(tmp_path / "a.json", deep))


def test_two_lists_or_columns_of_two_lengths(tmp_path: Path) -> None:
    assert "several lists of rows: train, test" in refusal(
        write(tmp_path / "a.json", json.dumps({"train": ROWS, "test": ROWS}))
    )
    assert "different lengths" in refusal(write(tmp_path / "a.json", json.dumps({"q": ["a"], "a": ["b", "c"]})))


def test_csv_faults_name_the_line(tmp_path: Path) -> None:
    assert "row starting on line 3" in refusal(write(tmp_path / "a.csv", 'a,b\n1,2\n"open,3\nmore\n'))
    message = refusal(write(tmp_path / "a.csv", 'a,b\n"1\n1",2\n1,2,3\n'))
    assert "line 4: 3 cells where the header has 2 (a, b)" in message
    assert "column names occur twice: a" in refusal(write(tmp_path / "a.csv", "a,b,a\n1,2,3\n"))


def test_a_csv_cell_may_be_long(tmp_path: Path) -> None:
    assert len(rows(write(tmp_path / "a.csv", "text\n" + "x" * 300_000 + "\n"))[0]["text"]) == 300_000


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_bytes_that_are_not_utf8_are_located(tmp_path: Path, suffix: str) -> None:
    head = b"[" if suffix == ".json" else b""
    raw = head + b'{"a": "one"}' + (b"," if head else b"") + b"\n" + b" " * 70_000 + b'{"a": "caf\xe9"}\n'
    message = refusal(write(tmp_path / f"a{suffix}", raw))
    assert f"byte 0xe9 at offset {raw.index(0xE9)} (line 2)" in message
    assert "iconv -f latin1" in message


def test_utf16_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json"):
        assert "is UTF-16 text" in refusal(write(tmp_path / name, '{"a": 1}'.encode("utf-16")))


def test_a_character_cut_by_the_end_of_the_file(tmp_path: Path) -> None:
    assert "byte 0xf0 at offset 9 (line 1)" in refusal(write(tmp_path / "a.json", b'[{"a": "x\xf0\x9f'))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.txt.gz", "a.parquet.gz"])
def test_gzip_that_is_cut_off_or_none(tmp_path: Path, name: str) -> None:
    noise = os.urandom(200_000).hex()
    content = {".json": f'[{{"a": "{noise}"}}]', ".jsonl": f'{{"a": "{noise}"}}'}.get(Path(name).with_suffix("").suffix)
    packed = gzip.compress((content or f"a\n{noise}").encode())
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    assert "cut off" in refusal(tmp_path / name)
    (tmp_path / name).write_bytes(b'{"a": 1}')
    assert "not a readable gzip file" in refusal(tmp_path / name)


def test_parquet_that_is_none_or_cut_off(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert "not a readable parquet file" in refusal(path)
    path.write_bytes(b"nothing of the kind")
    assert "not a readable parquet file" in refusal(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.txt", "a.jsonl.gz"])
def test_empty_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert f"{tmp_path / name} is empty" in refusal(tmp_path / name)
    assert "is empty" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", "[]"), ("a.json", "{}"), ("a.jsonl", "\n"), ("a.csv", "a,b\n")]
)
def test_files_without_rows(tmp_path: Path, name: str, content: str) -> None:
    assert "holds no rows" in refusal(write(tmp_path / name, content))


def test_missing_files_name_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "conversations.jsonl", "{}")
    message = refusal(tmp_path / "conversation.jsonl")
    assert f"There is no file or folder {tmp_path / 'conversation.jsonl'}" in message
    assert f"--data {tmp_path / 'conversations.jsonl'}" in message
    assert f"{tmp_path} does" in refusal(tmp_path / "no" / "such" / "place.jsonl")
    assert "No data were named" in refusal("")
    assert "cannot be opened" in refusal("x" * 5000 + ".json")


def test_empty_folder_and_unknown_suffix(tmp_path: Path) -> None:
    assert "holds no data files (found: nothing)" in refusal(tmp_path)
    write(tmp_path / "data.xlsx", "x")
    assert "found: data.xlsx" in refusal(tmp_path)
    message = refusal(tmp_path / "data.xlsx")
    assert "unknown suffix" in message
    assert ".jsonl" in message


def test_what_can_be_known_at_once_is_raised_by_the_call(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        read_records(str(tmp_path / "missing.json"))
    with pytest.raises(DataError):
        read_records(str(tmp_path))


# ---- the Hub


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["mlabonne/guanaco-llama2-1k", "openai/gsm8k:main", "org/name-v1.5b-data", "a/b"]
    assert all(is_hub_name(name) for name in names)
    paths = ["data.jsonl", "guanaco", "./a/b", "/a/b", "../a/b", "a/b/c", "data/train.jsonl", "data/x.jsn", "~/a", ""]
    assert not any(is_hub_name(path) for path in paths)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert not is_hub_name("a/b")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    tried: list[Any] = []

    def refuse(*place: Any, **more: Any) -> Any:
        tried.append(place)
        raise OSError("the test allows no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tried


@pytest.mark.parametrize("how", ["argument", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_is_said_plainly_and_uses_no_network(
    how: str, monkeypatch: pytest.MonkeyPatch, no_network: list[Any]
) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if how != "argument":
        monkeypatch.setenv(how, "1")
    with pytest.raises(NetworkError) as caught:
        rows("someorg/some-set", offline=how == "argument")
    assert "someorg/some-set is a Hub data set, the run is offline" in str(caught.value)
    assert no_network == []
    assert datasets.config.HF_HUB_OFFLINE is False


def test_offline_reads_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[Any]
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    content = {"text": ["a", "b", "c"], "label": [1, 0, -1]}
    datasets.Dataset.from_dict(content, features=features).save_to_disk(str(tmp_path / "made"))
    place = tmp_path / "someorg___some_set" / "default" / "0.0.0" / "hash"
    place.mkdir(parents=True)
    shutil.copy(next((tmp_path / "made").glob("*.arrow")), place / "some_set-train.arrow")
    info = json.loads((tmp_path / "made" / "dataset_info.json").read_text())
    split = {"name": "train", "num_bytes": 1, "num_examples": 3, "dataset_name": "some_set"}
    info |= {"config_name": "default", "dataset_name": "some_set", "splits": {"train": split}}
    (place / "dataset_info.json").write_text(json.dumps(info))

    found = list(read_records("someorg/some_set", offline=True))
    assert [record.fields for record in found] == [
        {"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}, {"text": "c", "label": None}
    ]  # fmt: skip
    assert found[2].source == "someorg/some_set[train]#3"
    message = refusal("someorg/some_set", offline=True, hub_split="tran")
    assert "no split 'tran'" in message
    assert "--set data.hub_split=train" in message
    assert no_network == []


def hub_that_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import datasets

    def load_dataset(*args: Any, **more: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def test_hub_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "guanaco.jsonl", "{}")
    hub_that_raises(monkeypatch, ConnectionError("no route"))
    with pytest.raises(NetworkError) as caught:
        rows("data/guanaco")
    assert "cannot be reached" in str(caught.value)
    assert "nearest is data/guanaco.jsonl" in str(caught.value)
    hub_that_raises(monkeypatch, datasets.exceptions.DatasetNotFoundError("no"))
    assert "The Hub has no data set org/name" in refusal("org/name")
    hub_that_raises(monkeypatch, ValueError("Bad split: tran. Available splits: ['train', 'test']"))
    assert "allowed: train, test" in refusal("org/name", hub_split="tran")
    hub_that_raises(monkeypatch, ValueError("Config name is missing.\nPlease pick one among: ['main', 'socratic']\n"))
    assert "--data org/name:main" in refusal("org/name")


def test_a_connection_that_breaks_while_rows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    http_error = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")

    class Rows:
        features = None

        def __iter__(self) -> Any:
            yield {"text": "a"}
            raise http_error("slow")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: Rows())
    found = read_records("org/name")
    assert next(found).fields == {"text": "a"}
    with pytest.raises(NetworkError, match="cannot be reached"):
        next(found)


# ---- memory

_MEASURE = """
import resource, sys
from chulengo.data.load import stream_examples
next(iter(stream_examples(sys.argv[2])))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(1 for _ in stream_examples(sys.argv[1]))
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_sources_larger_than_memory_stream(tmp_path: Path, suffix: str) -> None:
    many = [{"question": f"{i} " + "q" * 500, "answer": "a" * 500} for i in range(40_000)]

    def make(path: Path, content: list[dict[str, str]]) -> Path:
        if suffix == ".json":
            path.write_text(json.dumps(content))
        elif suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        elif suffix == ".csv":
            path.write_text("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in content))
        else:
            import pyarrow
            import pyarrow.parquet

            table = pyarrow.Table.from_pylist(content)
            pyarrow.parquet.write_table(table, path, row_group_size=2000, use_dictionary=False, compression="none")
        return path

    big, small = make(tmp_path / f"big{suffix}", many), make(tmp_path / f"small{suffix}", many[:100])
    assert big.stat().st_size > 40_000_000
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(big), str(small)], capture_output=True, text=True, check=True
    )
    count, grown_mib = map(int, done.stdout.split())
    assert count == 40_000
    assert grown_mib < 16
