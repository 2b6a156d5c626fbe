"""What a contract may say, what it means, and that a drafted one reads the files that it was drafted from."""

import dataclasses
import gzip
import pathlib

import pyarrow as pa
import pytest

from schemas import contract as contracts
from schemas import draft
from schemas.contract import Column, Contract, ContractError
from schemas.csv_records import Layout
from schemas.rows import read_rows

KEY = Column("id", "bytes", frozenset({"key"}), required=True)
KEY_TEXT = 'feature { name: "id" type: BYTES annotation { tag: "key" } }'


def tagged(name: str, kind: str, *tags: str) -> Column:
    return Column(name, kind, frozenset(tags))


def feature(name: str, kind: str, *tags: str, more: str = "") -> str:
    """A column in the contract's text form."""
    annotation = " ".join(f'tag: "{tag}"' for tag in tags)
    return f'feature {{ name: "{name}" type: {kind} {more} annotation {{ {annotation} }} }}'


WHOLE = Contract(
    (
        KEY,
        Column("market", "int", frozenset({"key", "segment"}), required=True),
        tagged("photo", "bytes", "image"),
        Column("shown_at", "float", frozenset({"position"}), reference=0.12345678),
        tagged("n", "int", "impressions"),
        tagged("k", "int", "clicks"),
        Column("hour", "int", frozenset({"categorical"}), minimum=0, maximum=23),
        Column("bid", "float", minimum=0.0, maximum=1.5, required=True),
        tagged("note", "bytes", "ignore"),
        tagged("slot", "bytes", "segment"),
    )
)


def test_the_contract_of_the_sample_months_says_what_its_columns_mean() -> None:
    contract = contracts.load(contracts.DEFAULT)
    assert [column.name for column in contract.key] == ["ad_id"]
    assert [column.name for column in contract.segments] == ["format", "placement", "device"]
    assert [column.name for column in contract.features] == ["advertiser", "campaign", "format", "placement", "device", "hour", "bid"]
    assert [column.name for column in contract.outcomes] == ["clicks", "impressions"]
    assert contract.image and contract.image.name == "image"
    assert contract.position == Column("position", "int", frozenset({"position"}), minimum=1, reference=1.0)


def test_columns_are_sorted_by_what_they_are_for() -> None:
    assert [column.name for column in WHOLE.key] == ["id", "market"]
    assert [column.name for column in WHOLE.carried] == ["id", "market", "slot"]
    assert [column.name for column in WHOLE.features] == ["hour", "bid", "slot"]
    assert "note" not in [column.name for column in WHOLE.kept]
    assert [column.name for column in WHOLE.columns if column.categorical] == ["id", "photo", "hour", "note", "slot"]
    assert [column.arrow_type for column in WHOLE.columns[:2]] == [pa.string(), pa.int64()]


@pytest.mark.parametrize("contract", [WHOLE, Contract((KEY,)), Contract((KEY, tagged("c", "int", "clicked")))])
def test_text_form_and_back_is_the_same_contract(contract: Contract) -> None:
    again = contracts.parse(contracts.dumps(contract))
    assert again == contract
    assert again.fingerprint == contract.fingerprint


def test_the_default_contract_comes_back_too() -> None:
    contract = contracts.load(contracts.DEFAULT)
    assert contracts.parse(contracts.dumps(contract)) == contract


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (feature("a", "INT"), Column("a", "int")),
        (feature("a", "INT", more="int_domain { min: 0 max: 0 }"), Column("a", "int", minimum=0, maximum=0)),
        (feature("a", "FLOAT", more="float_domain { max: -0.5 }"), Column("a", "float", maximum=-0.5)),
        (feature("a", "BYTES", more="presence { min_fraction: 1.0 }"), Column("a", "bytes", required=True)),
        (feature("a", "BYTES", more="presence { min_fraction: 0.5 }"), Column("a", "bytes")),
        (feature("a", "INT", "position", "reference:3"), Column("a", "int", frozenset({"position"}), reference=3.0)),
        (feature("a", "INT", "position"), Column("a", "int", frozenset({"position"}), reference=1.0)),
        (feature("a", "BYTES", "key"), Column("a", "bytes", frozenset({"key"}), required=True)),
    ],
)
def test_a_column_is_what_its_feature_says(text: str, expected: Column) -> None:
    assert contracts.parse(KEY_TEXT + text).columns[1] == expected


def test_comments_and_layout_do_not_change_the_fingerprint() -> None:
    one = contracts.parse(KEY_TEXT + feature("a", "INT", "segment", "categorical"))
    other = contracts.parse(f"# a comment\n{KEY_TEXT}\n\n" + feature("a", "INT", "categorical", "segment").replace(" ", "\n"))
    assert one.fingerprint == other.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"name": "b"},
        {"kind": "float"},
        {"tags": frozenset({"categorical"})},
        {"tags": frozenset({"ignore"})},
        {"required": True},
        {"minimum": 1},
        {"maximum": 9},
        {"reference": 2.0},
    ],
)
def test_every_change_of_meaning_changes_the_fingerprint(change: dict[str, object]) -> None:
    column = Column("a", "int")
    assert Contract((KEY, dataclasses.replace(column, **change))).fingerprint != Contract((KEY, column)).fingerprint  # type: ignore[arg-type]


def test_the_fingerprint_of_the_sample_months_is_the_same_in_every_process() -> None:
    assert contracts.load(contracts.DEFAULT).fingerprint == contracts.load(contracts.DEFAULT).fingerprint == "d73b49950cc350f1"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ((KEY, KEY), "'id' is there twice; keep one"),
        ((KEY, tagged("a", "int", "click")), "'a' has the tag 'click'; expected one of key, image"),
        ((KEY, tagged("a", "bytes", "image"), tagged("b", "bytes", "image")), "a, b are all tagged 'image'; expected one at most"),
        ((KEY, tagged("a", "int", "clicked"), tagged("b", "int", "clicked")), "a, b are all tagged 'clicked'"),
        ((KEY, tagged("a", "int", "position"), tagged("b", "int", "position")), "a, b are all tagged 'position'"),
        ((), "no contract column is tagged 'key'"),
        ((tagged("a", "int"),), "no contract column is tagged 'key'"),
        ((KEY, tagged("a", "int", "clicks")), "the outcome is either one column tagged 'clicked', or"),
        ((KEY, tagged("a", "int", "impressions")), "the outcome is either"),
        ((KEY, tagged("a", "int", "clicked"), tagged("b", "int", "clicks"), tagged("c", "int", "impressions")), "the outcome is either"),
        ((KEY, tagged("a", "float", "clicked")), "'a' is an outcome of type 'float'; expected INT"),
        ((KEY, tagged("a", "bytes", "clicks"), tagged("b", "int", "impressions")), "'a' is an outcome of type 'bytes'; expected INT"),
        ((KEY, tagged("a", "bytes", "position")), "'a' is a position of type BYTES; expected INT or FLOAT"),
        ((KEY, tagged("a", "int", "image")), "'a' is an image of type 'int'; expected BYTES"),
        ((tagged("key", "bytes", "key"),), "'key' has a reserved name"),
        ((KEY, tagged("Run_ID", "bytes", "segment")), "'Run_ID' has a reserved name (creative, embedding, encoder_version,"),
        (
            (KEY, tagged("key", "int")),
            "'key' has a reserved name (creative, embedding, image_status, key, month_number); rename it in the export",
        ),
        ((KEY, tagged("creative", "bytes", "image")), "'creative' has a reserved name"),
        ((KEY, tagged("a", "bytes", "ignore", "image")), "'a' is tagged 'ignore' and image; keep one of them"),
        ((tagged("a", "bytes", "ignore", "key", "segment"),), "'a' is tagged 'ignore' and key, segment; keep one of them"),
        ((KEY, Column("a", "bytes", minimum=0)), "'a' is of type BYTES and has bounds"),
    ],
)
def test_columns_that_make_no_whole_are_refused(columns: tuple[Column, ...], message: str) -> None:
    with pytest.raises(ContractError) as refused:
        Contract(columns)
    assert message in str(refused.value)


@pytest.mark.parametrize("name", ["month", "run_id", "p_click"])
def test_a_plain_feature_may_be_named_like_a_score_column(name: str) -> None:
    assert [column.name for column in Contract((KEY, tagged(name, "int"))).features] == [name]


@pytest.mark.parametrize("name", ["key", "creative"])
def test_an_ignored_column_may_have_any_name(name: str) -> None:
    assert Contract((KEY, tagged(name, "int", "ignore"))).features == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("feature {", "c.pbtxt is not a TensorFlow Metadata Schema in text form"),
        ("columns: 3", "c.pbtxt is not a TensorFlow Metadata Schema in text form"),
        (KEY_TEXT + 'feature { name: "a" }', "'a' has type TYPE_UNKNOWN; expected BYTES, INT or FLOAT"),
        (KEY_TEXT + feature("a", "STRUCT"), "'a' has type STRUCT; expected BYTES, INT or FLOAT"),
        (KEY_TEXT + feature("a", "INT", "position", "reference:first"), "'a' has the tag 'reference:first'; expected reference:NUMBER"),
        (KEY_TEXT + feature("a", "BYTES", more="int_domain { min: 0 }"), "'a' is of type BYTES and has bounds"),
        ("", "no contract column is tagged 'key'"),
    ],
)
def test_text_that_is_no_contract_is_refused(text: str, message: str) -> None:
    with pytest.raises(ContractError) as refused:
        contracts.parse(text, "c.pbtxt")
    assert message in str(refused.value)


def test_a_contract_that_is_not_there_is_refused_with_the_way_to_draft_one(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ContractError, match=r"none.pbtxt' does not exist; draft one with `adstocrat infer-contract FILES`"):
        contracts.load(tmp_path / "none.pbtxt")


def test_a_contract_that_is_no_text_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "c.pbtxt"
    path.write_bytes(b'feature { name: "gr\xf6\xdfe" }')
    with pytest.raises(ContractError, match=r"c.pbtxt' is not UTF-8 \(.*\); save it as UTF-8"):
        contracts.load(path)


def infer(tmp_path: pathlib.Path, roles: dict[str, list[str]], **files: bytes) -> tuple[Contract, list[str]]:
    """The contract drafted from files; a name's `_` stands for a dot."""
    paths = []
    for name, data in files.items():
        path = tmp_path / name.replace("_", ".")
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        paths.append(str(path))
    return draft.infer(paths, roles), paths


def kinds(contract: Contract) -> dict[str, str]:
    return {column.name: column.kind for column in contract.columns}


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (b"1", b"-2", "int"),
        (b"1", b"2.5", "float"),
        (b"2.5", b"1", "float"),
        (b"", b"7", "int"),
        (b"7", b"", "int"),
        (b"1e-3", b"", "float"),
        (b"1", b"x", "bytes"),
        (b"x", b"1", "bytes"),
        (b"2.5", b"x", "bytes"),
        (b"", b"", "bytes"),
        (b"true", b"false", "bytes"),
        (b"2026-10-01", b"2026-10-02", "bytes"),
        (b"9223372036854775807", b"0", "int"),
        (b"9223372036854775808", b"0", "float"),
        (b" 1", b"2", "bytes"),
        (b"16", b"0x10", "bytes"),
        ("ü".encode(), b"2", "bytes"),
    ],
)
def test_a_type_is_the_narrowest_that_holds_every_file(tmp_path: pathlib.Path, first: bytes, second: bytes, kind: str) -> None:
    contract, _ = infer(tmp_path, {"key": ["id"]}, a_csv=b"id,x\na," + first + b"\n", b_csv_gz=b"id,x\nb," + second + b"\n")
    assert kinds(contract) == {"id": "bytes", "x": kind}


def test_every_value_of_a_file_is_looked_at(tmp_path: pathlib.Path) -> None:
    rows = b"".join(b"k%d,%d\n" % (n, n) for n in range(300_000))
    contract, _ = infer(tmp_path, {"key": ["id"]}, a_csv=b"id,x\n" + rows + b"last,no number\n")
    assert kinds(contract)["x"] == "bytes"


@pytest.mark.parametrize("role", ["key", "image"])
def test_names_that_look_like_numbers_stay_text(tmp_path: pathlib.Path, role: str) -> None:
    contract, _ = infer(tmp_path, {"key": ["id"], role: ["x"]}, a_csv=b"id,x\na,007\nb,7\n")
    assert kinds(contract)["x"] == "bytes"


@pytest.mark.parametrize("role", ["clicked", "position"])
def test_a_role_of_numbers_without_a_value_yet_is_a_number(tmp_path: pathlib.Path, role: str) -> None:
    contract, _ = infer(tmp_path, {"key": ["id"], role: ["x"]}, a_csv=b"id,x\na,\n")
    assert kinds(contract)["x"] == "int"


def test_roles_become_tags_and_keys_are_required(tmp_path: pathlib.Path) -> None:
    roles = {"key": ["id", "market"], "clicked": ["c"], "segment": ["market"]}
    contract, _ = infer(tmp_path, roles, a_csv=b"id,market,c\na,m,1\n")
    assert contract.columns == (
        KEY,
        Column("market", "bytes", frozenset({"key", "segment"}), required=True),
        Column("c", "int", frozenset({"clicked"})),
    )


def test_a_file_of_a_header_alone_makes_columns_of_text(tmp_path: pathlib.Path) -> None:
    contract, _ = infer(tmp_path, {"key": ["id"]}, a_csv=b"id,x\n")
    assert kinds(contract) == {"id": "bytes", "x": "bytes"}


@pytest.mark.parametrize(
    "data",
    [
        b"id,x,photo,c\na,1,p,1\nb,,,0\nc,2.5,007,\n",
        b"\xef\xbb\xbfid,x,photo,c\r\na,1,p,1\r\n",
        b'id,x,photo,c\n"a\nb","1,5","p""q",1\n',
        b"c,photo,id,x\n1,p,a,\n",
        "id,x,photo,c\nÜ,ü,名.jpg,1\n".encode(),
        b"id,x,photo,c\n" + b"".join(b'k%d,"line\nbreak %s",p,0\n' % (n, b"y" * 40) for n in range(40_000)),
    ],
    ids=["missing values", "byte order mark", "quoted", "another order", "not ASCII", "line breaks over several blocks"],
)
@pytest.mark.parametrize("name", ["a_csv", "a_csv_gz"])
def test_what_is_drafted_reads_every_row_of_the_file(tmp_path: pathlib.Path, name: str, data: bytes) -> None:
    contract, (path,) = infer(tmp_path, {"key": ["id"], "image": ["photo"], "clicked": ["c"]}, **{name: data})
    again = contracts.parse(contracts.dumps(contract))
    with open(path, "rb") as stream:
        blocks = list(read_rows(stream, again, path))
    assert sum(block.rows.num_rows for block in blocks) > 0
    assert sum(block.rejects.num_rows for block in blocks) == 0


@pytest.mark.parametrize(
    ("data", "roles", "message"),
    [
        (b"id,x\na,1\n", {"key": ["ad"]}, "--key 'ad' is not a column of the files; expected one of id, x"),
        (b"id,x\na,1\n", {"key": ["id"], "image": ["photo"]}, "--image 'photo' is not a column of the files"),
        (b"id,x\n", {"key": ["ad"]}, "--key 'ad' is not a column of the files; expected one of id, x"),
        (b"", {"key": ["id"]}, "none of ['"),
        (b"id,x,x\n", {"key": ["id"]}, "a.csv' has the column 'x' 2 times; expected a header of different names"),
        (b'"id,x\n' + bytes(2 << 20), {"key": ["id"]}, "a.csv' cannot be read as CSV: its header is none"),
        (b"id,x\na,1.0\n", {"key": ["id"], "clicked": ["x"]}, "'x' is an outcome of type 'float'; expected INT, so whole numbers in the"),
        (b"id,x\na,1\n", {"key": ["id"], "clicks": ["x"], "impressions": ["x"]}, "'x' is tagged clicks and impressions; expected"),
        (b"id,x\na,1\n", {"key": ["id"], "clicked": ["x"], "segment": ["x"]}, "'x' is tagged clicked and segment; expected an outcome to"),
        (b"key,x\na,1\n", {"key": ["key"]}, "'key' has a reserved name"),
    ],
)
def test_files_that_no_contract_can_be_drafted_from_are_refused(
    tmp_path: pathlib.Path, data: bytes, roles: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(ContractError) as refused:
        infer(tmp_path, roles, a_csv=data)
    assert message in str(refused.value)


def test_rows_that_ingest_rejects_say_nothing_and_are_counted(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    data = b'id,x\na,1\nb,many,many\n\xff,text\n,text\nc,"2\nd,3\n'
    contract, _ = infer(tmp_path, {"key": ["id"]}, a_csv=data, b_csv=b"x,id\n4,e\n")
    assert kinds(contract) == {"id": "bytes", "x": "int"}
    assert "4 of 7 rows cannot be read" in caplog.text
    for reason in ("field_count", "bad_encoding", "missing_required", "unclosed_quote"):
        assert f"{reason} 1" in caplog.text


@pytest.mark.parametrize("rest, told", [(b"20,n/a\n", True), (b"", False), (b"20,p\n21,q\n22,r\n", False), (b"20,1e3\n", False)])
def test_the_value_that_makes_a_column_of_numbers_text_is_told(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, rest: bytes, told: bool
) -> None:
    caplog.set_level("INFO")
    _, (path,) = infer(tmp_path, {"key": ["id"]}, a_csv=b"id,x\n" + b"".join(b"%d,%d.5\n" % (i, i) for i in range(20)) + rest)
    assert (f"'x' is text to the draft because of 'n/a' in {path}" in caplog.text) == told == ("is text to the draft" in caplog.text)


def test_a_column_without_a_name_is_left_out_and_told(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a data frame's index is written, or a comma at the end of each line."""
    caplog.set_level("INFO")
    contract, (path,) = infer(tmp_path, {"key": ["id"]}, a_csv=b",id,x,\n0,a,1,\n")
    assert kinds(contract) == {"id": "bytes", "x": "int"}
    assert f"{path}: column 1 has no name, so it is left out" in caplog.text


def test_files_are_read_in_their_own_layout(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.csv"
    for encoding in ("latin-1", "utf-16"):
        path.write_text('id,größe\nä,1\nb,19" oder\n', encoding)
        contract = draft.infer([str(path)], {"key": ["id"]}, Layout(encoding=encoding))
        assert kinds(contract) == {"id": "bytes", "größe": "bytes"}
    path.write_text('id,x\na,"1\nb,2\n')
    assert kinds(draft.infer([str(path)], {"key": ["id"]}, Layout(newlines_in_values=False))) == {"id": "bytes", "x": "int"}


def test_a_file_without_a_header_is_passed_over(tmp_path: pathlib.Path) -> None:
    contract, _ = infer(tmp_path, {"key": ["id"]}, a_csv=b"", b_csv=b"id,x\na,1\n", c_csv=b"\r\n\r\n")
    assert kinds(contract) == {"id": "bytes", "x": "int"}


def test_a_gz_file_that_is_none_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.csv.gz"
    for data in (b"id,x\na,1\n", gzip.compress(b"id,x\na,1\n" * 9999)[:-9]):
        path.write_bytes(data)
        with pytest.raises(ContractError, match=r"a\.csv\.gz'? cannot be read as CSV"):
            draft.infer([str(path)], {"key": ["id"]})


@pytest.mark.parametrize("name", ["none.csv", "."])
def test_what_is_no_file_is_refused_by_name(tmp_path: pathlib.Path, name: str) -> None:
    with pytest.raises(ContractError, match="cannot be read as CSV"):
        draft.infer([str(tmp_path / name)], {"key": ["id"]})


def test_no_file_at_all_is_refused() -> None:
    with pytest.raises(ContractError, match="no file to infer a contract from"):
        draft.infer([], {"key": ["id"]})
