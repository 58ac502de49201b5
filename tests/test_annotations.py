import csv
import random

import numpy as np
import pytest

from common.annotations import (
    CLASS_IMPORTANCE,
    check_disjoint,
    count_labels,
    read_annotations,
    subset_text,
)
from common.running.errors import UserError

SEWER_HEADER = "Filename,WaterLevel,VA," + ",".join(CLASS_IMPORTANCE) + ",ND,Defect"


def read(tmp_path, text, name="a.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return read_annotations(path)


def test_any_table_with_filename_and_defect(tmp_path):
    a = read(tmp_path, "x,Filename,Defect,ND,WaterLevel\n1,a.png,1,0,junk\n0,b/c.jpg,0,1,\n,d,,,\n")
    assert [a.name(i) for i in range(3)] == ["a.png", "b/c.jpg", "d"]
    assert a.defect.tolist() == [1, 0, -1] and a.defect.dtype == np.int8
    assert a.class_names == ("x",) and a.classes.tolist() == [[True], [False], [False]]
    assert count_labels(a.defect) == {"normal": 1, "defect": 1, "unlabelled": 1}


def test_bom_crlf_quotes_and_unicode(tmp_path):
    a = read(tmp_path, '\ufeffFilename,Defect\r\n"a, b.png",1\r\nü.png,0\r\n')
    assert [a.name(i) for i in range(2)] == ["a, b.png", "ü.png"]
    assert a.class_names == ()


def test_names_of_any_length_stay_whole_over_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("common.label_table._ROWS_AT_ONCE", 2)
    names = ["x" * n for n in (3, 1, 40, 2, 7)]
    a = read(tmp_path, "Filename,Defect\n" + "".join(f"{n},0\n" for n in names))
    assert [a.name(i) for i in range(5)] == names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty"]),
        ("Filename,Defect\n", ["no row"]),
        ("filename,Defect\na,1\n", ["'Filename' is missing", "'filename'"]),
        ("Filename,RB\na,1\n", ["'Defect' is missing", "RB"]),
        ("Filename,Defect,RB,RB\na,1,1,0\n", ["'RB' stands twice"]),
        ("Filename|Defect\na|1\n", ["'Filename' is missing"]),
        ("\nFilename,Defect\na,1\n", ["first line is empty"]),
        ("Filename,Defect\na,1\nb,yes\n", ["a.csv:3", "Defect", "'yes'", "0, 1 or empty"]),
        ("Filename,Defect\na, 2\n", ["a.csv:2", "Defect", "' 2'"]),
        ("Filename,Defect\na,nan\n", ["a.csv:2", "Defect", "'nan'"]),
        ("Filename,Defect\na,2\n", ["a.csv:2", "'2'"]),
        ("Filename,RB,Defect\na,,1\n", ["a.csv:2", "RB", "''", "0 or 1"]),
        ("Filename,RB,Defect\na,0.5,1\n", ["a.csv:2", "RB", "'0.5'"]),
        ("Filename,Defect\na,1\nb\n", ["a.csv:3", "1 cells", "2"]),
        ("Filename,Defect\na,1,0\n", ["a.csv:2", "3 cells"]),
        ("Filename,Defect\na\n1,1,0\n", ["a.csv:2", "1 cells", "a.csv:3", "3 cells"]),
        ("Filename,Defect\na,1\nb,0\na,0\n", ["a.csv:4", "'a'", "more than once"]),
        ("Filename,Defect\n../a,1\n", ["a.csv:2", "outside"]),
        ("Filename,Defect\na/../../b,1\n", ["outside"]),
        ("Filename,Defect\n/etc/passwd,1\n", ["outside"]),
        ("Filename,Defect\n..\\a,1\n", ["outside"]),
        ("Filename,Defect\n./../a,1\n", ["outside"]),
        ("Filename,Defect\n\\\\server\\a,1\n", ["outside"]),
        ("Filename,Defect\n./C:\\a,1\n", ["outside"]),
        ("Filename,Defect\n./,1\n", ["a.csv:2", "empty"]),
        ("Filename,Defect\n./a,1\na,0\n", ["a.csv:3", "'a'", "more than once"]),
        ("Filename,Defect\na/b,1\na\\.//b,0\n", ["a.csv:3", "'a/b'", "more than once"]),
        ("Filename,Defect\na\x1b[2J,1\n", ["a.csv:2", r"'a\x1b[2J'", "control character"]),
        ('Filename,Defect\n"a\nb",1\n', ["a.csv:3", r"'a\nb'", "line break"]),
        ("Filename,Defect\na\tb,1\n", ["a.csv:2", "control character"]),
        ("Filename,Defect\na\x7f,1\n", ["a.csv:2", "control character"]),
        ("Filename,Defect\na\0b,1\n", ["a.csv:2"]),
        ("Filename,Defect\na\x85,1\n", ["a.csv:2", "control character"]),
        ("Filename,Defect\na\u2028,1\n", ["a.csv:2", "control character"]),
        ("Filename,Defect,R\x07B\na,1,1\n", [r"column 'R\x07B'", "control character"]),
        ("Filename,Defect\n,1\n", ["a.csv:2", "empty"]),
        ('Filename,Defect\n"a,1\nb,0\n', ["a.csv"]),
        ("Filename,Defect\n" + "a,3\n" * 9, ["9 such rows"]),
    ],
)
def test_a_bad_table_is_refused_by_line_and_column(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    assert all(word in str(error.value) for word in ["a.csv", *words]), str(error.value)


def test_other_encodings_and_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="UTF-8"):
        read(tmp_path, "Filename,Defect\nä,1\n", encoding="utf-16")
    rows = "".join(f"{i},1\n" for i in range(9999))
    with pytest.raises(UserError, match="UTF-8"):
        read(tmp_path, f"Filename,Defect\n{rows}ä,1\n", encoding="latin-1")
    with pytest.raises(UserError, match="none.csv"):
        read_annotations(tmp_path / "none.csv")


def test_defect_must_be_any_of_the_17_where_all_17_are_there(tmp_path):
    row = ",0,0," + ",".join(["0"] * 17) + ",0,1\n"
    with pytest.raises(UserError, match="contradicts"):
        read(tmp_path, f"{SEWER_HEADER}\na{row}")


def test_a_column_without_any_0_or_1_is_no_class(tmp_path):
    a = read(tmp_path, "Filename,Video,RB,Date,Empty,Defect\na,v7,1,2020-01-01,,1\nb,v8,0,x,,0\n")
    assert a.class_names == ("RB",) and a.classes.tolist() == [[True], [False]]


def test_cells_are_read_as_programs_write_them(tmp_path):
    cells = ["1", "0", "1.0", "0.0", "True", "False", "TRUE", "false", " 1 ", " 0.0"]
    rows = "".join(f"{i},{cell},{cell}\n" for i, cell in enumerate(cells))
    a = read(tmp_path, f"Filename,Defect,RBx\n{rows}x, ,\n")
    assert a.defect.tolist() == [1, 0] * 5 + [-1]
    assert a.class_names == ("RBx",) and a.classes[:, 0].tolist() == [True, False] * 5 + [False]


@pytest.mark.parametrize(
    "cell", ["true.0", "1.0.0", "10", "1true", "1.00", "T", "yes", "1,0", "-1"]
)
def test_no_other_cell_is_read(tmp_path, cell):
    for cells in (["1", f'"{cell}"'], ["True", f'"{cell}"'], ["", f'"{cell}"']):
        rows = "".join(f"{i},{c}\n" for i, c in enumerate(cells))
        with pytest.raises(UserError, match=f"Defect is '{cell}', expected 0, 1 or empty"):
            read(tmp_path, f"Filename,Defect\n{rows}")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters_are_told_apart_by_the_header(tmp_path, delimiter):
    others = [d for d in ",;" if d != delimiter]
    text = f"Filename|Defect|RB|'{''.join(others * 5)}'\n'a{others[0]} b.png'|1|0|x\nc|0|0|y\n"
    a = read(tmp_path, text.replace("|", delimiter).replace("'", '"'))
    assert [a.name(i) for i in range(2)] == [f"a{others[0]} b.png", "c"]
    assert a.class_names == ("RB",) and a.defect.tolist() == [1, 0]
    b = read(tmp_path, f"Filename{delimiter} Defect\r\na{delimiter} 1\r\n")
    assert b.defect.tolist() == [1]


NAMES = ("{}.png", "b/{}", "ü{}", "x y{}", "漢{}", "d\\e{}", "./f{}", "\u00b0{}", "g{}.")
BAD_NAMES = ("../{}", "/{}", "", "a\x85{}", "a\u2028{}", "C:{}", "same", "x\0{}", "h" * 1020 + "{}")
CELLS = ("0", "1", "0.0", "1.0", "True", "false", " 1", "", "x", "2", "10:30", "\xa01", "é")


def random_table(rng):
    """Bytes of a table of any layout; some hold quotes, blank lines or something wrong."""
    delimiter = rng.choice(",;\t")
    breaks = rng.choice([["\n"], ["\r\n"], ["\r"], ["\n", "\r\n", "\r"]])
    odd, quoted = rng.choice([0, 0, 0.1]), rng.choice([0, 0, 0, 0.2])
    header = ["Filename", "Defect", *rng.sample(["RB", "WaterLevel", "Date", "X", ""], 3)]
    rng.shuffle(header)
    kinds = {name: rng.choice([2, 2, 6, 13]) for name in header} | {"Defect": rng.choice([2, 8])}
    lines = [header]
    for i in range(rng.choice([0, 1, 2, 30])):
        cells = {name: rng.choice(CELLS[: kinds[name]]) for name in header}
        cells["Filename"] = rng.choice(BAD_NAMES if rng.random() < odd / 9 else NAMES).format(i)
        cells["Defect"] = rng.choice(CELLS[: 13 if rng.random() < odd / 9 else kinds["Defect"]])
        if rng.random() < odd:
            cells = dict.fromkeys(header, "") | {"Filename": cells["Filename"]}  # not labelled
        lines.append([f'"{x}"' if rng.random() < quoted else x for x in cells.values()])
        lines += [[]] * (rng.random() < odd / 9) + [["x"], ["1"] * 9] * (rng.random() < odd / 20)
    text = "".join(delimiter.join(cells) + rng.choice(breaks) for cells in lines)
    text = rng.choice(["", "\ufeff"]) + rng.choice([text, text.rstrip()])
    return text.encode()


def found(path):
    try:
        a = read_annotations(path)
    except UserError as error:
        return str(error)
    return a.sha256(), a.filename.dtype, a.line.tolist(), a.class_names, a.ignored


def test_bytes_and_csv_reader_give_the_same_tables_and_messages(tmp_path, monkeypatch):
    def not_plain(*how):
        raise ValueError

    rng, path, answers = random.Random(0), tmp_path / "a.csv", []
    for _ in range(500):
        path.write_bytes(random_table(rng))
        monkeypatch.setattr("common.label_table._BYTES_AT_ONCE", rng.choice([1, 50, 1 << 20]))
        monkeypatch.setattr("common.label_table._ROWS_AT_ONCE", rng.choice([3, 65536]))
        answers.append(found(path))
        with monkeypatch.context() as patch:
            patch.setattr("common.label_table._plain_rows", not_plain)
            assert answers[-1] == found(path), path.read_bytes()
    assert 100 < sum(isinstance(answer, str) for answer in answers) < 400


@pytest.mark.parametrize("size", [1, 20, 1 << 20])
def test_a_plain_file_needs_no_csv_reader(tmp_path, monkeypatch, size):
    monkeypatch.setattr("common.label_table._BYTES_AT_ONCE", size)
    monkeypatch.setattr("common.label_table._csv_rows", None)
    a = read(
        tmp_path, "\ufeffRB,Filename,Defect,Date\r\n1,a/b.png,1.0,x y\r\n,./ü.png,,\r\n0,c,0,1"
    )
    assert [a.name(i) for i in range(3)] == ["a/b.png", "ü.png", "c"]
    assert a.defect.tolist() == [1, -1, 0] and a.line.tolist() == [2, 3, 4]
    assert a.class_names == ("RB",) and a.classes.tolist() == [[True], [False], [False]]


def mostly(values, other, n=40):
    """A table of n labelled rows; its column Extra is 0 or 1 in `values` of them, else `other`."""
    cells = ["1" if i % 2 else "0" for i in range(values)] + [other] * (n - values)
    return "Filename,Defect,Extra\n" + "".join(f"{i},{i % 2},{c}\n" for i, c in enumerate(cells))


@pytest.mark.parametrize("other", ["x", "", "7", "0.5"])
def test_a_class_is_a_column_of_95_percent_values(tmp_path, monkeypatch, other):
    monkeypatch.setattr("common.label_table._ROWS_AT_ONCE", 16)
    a = read(tmp_path, mostly(37, other))
    assert a.class_names == () and a.ignored == ("Extra",)
    with pytest.raises(UserError, match=f"a.csv:40: Extra is '{other}', expected 0 or 1"):
        read(tmp_path, mostly(38, other))
    unlabelled = "".join(f"u{i},,\n" for i in range(20))  # do not count
    assert read(tmp_path, mostly(37, other) + unlabelled).class_names == ()
    assert read(tmp_path, mostly(40, other) + unlabelled).class_names == ("Extra",)


def test_the_first_wrong_cells_of_many_chunks_are_shown_and_all_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("common.label_table._ROWS_AT_ONCE", 2)
    rows = "".join(f"{i},0,{'x' if i > 3 else 0}\n" for i in range(20))
    with pytest.raises(UserError) as error:
        read(tmp_path, f"Filename,Defect,RB\n{rows}")
    lines = str(error.value).splitlines()
    assert [line.split(":")[1] for line in lines[:5]] == ["6", "7", "8", "9", "10"]
    assert lines[5] == "... 16 such rows in all"


def test_what_is_no_class_is_ignored_and_named(tmp_path):
    header = ",Filename,Index,Empty,ND,All,None,Defect,\n"  # pandas' index, a last delimiter
    rows = "".join(f"{i},{i}.png,{i},,x,True,0.0,{i % 2},\n" for i in range(9))
    a = read(tmp_path, header + rows)
    assert a.class_names == ("All", "None")
    assert a.ignored == ("column 1 (no name)", "Index", "Empty", "ND", "column 9 (no name)")


def test_both_kinds_of_columns_are_said(tmp_path):
    train = read(tmp_path, "Filename,RB,Date,Defect\na,0,today,0\nb,1,today,1\n", "train.csv")
    val = read(tmp_path, "Filename,RB,Date,Defect\nc,0,never,0\n", "val.csv")
    said = subset_text(**count_labels(train.defect), train=train, val=val)
    assert "1 normal, 1 defect (50.00% of the labelled), 0 not labelled; validation: 1" in said
    assert said.endswith("\nclasses: RB; ignored columns: Date")
    other = read(tmp_path, "Filename,Defect\nc,0\n", "val.csv")
    said = subset_text(**count_labels(train.defect), train=train, val=other)
    assert "\ntrain: classes: RB; ignored columns: Date\n" in said
    assert said.endswith("\nvalidation: classes: none; ignored columns: none")


@pytest.mark.parametrize(
    ("name", "normal"),
    [
        ("./a.png", "a.png"),
        ("b//c.png", "b/c.png"),
        ("d\\e.png", "d/e.png"),
        (".\\f/./g..png", "f/g..png"),
        ("h/", "h"),
        ("k/.", "k"),
        ("...", "..."),
        (".i/j .png", ".i/j .png"),
        (" k", " k"),
    ],
)
def test_names_have_one_form(tmp_path, name, normal):
    a = read(tmp_path, f"Filename,Defect\nx,0\n{name},0\n")
    assert a.name(1) == normal


def test_places_are_lines_of_the_file(tmp_path):
    a = read(tmp_path, 'Filename,Video,Defect\na,x,1\n\n\nb,"two\nlines",0\nc,x,1\n')
    assert [a.place(i).rsplit(":", 1)[1] for i in range(3)] == ["2", "6", "7"]
    with pytest.raises(UserError, match="a.csv:5: Defect is '3'"):
        read(tmp_path, "Filename,Defect\na,1\n\n\nb,3\n")


def test_a_file_in_train_and_val_is_refused(tmp_path):
    train = read(tmp_path, "Filename,Defect\na,1\nlonger,0\n", "train.csv")
    val = read(tmp_path, "Filename,Defect\nb,1\nlonger,0\nmuch longer,0\n", "val.csv")
    with pytest.raises(UserError, match="longer"):
        check_disjoint(train, val)
    check_disjoint(train, read(tmp_path, "Filename,Defect\nb,1\n", "val.csv"))
    for same in ("./longer", ".\\\\longer", "longer/"):
        with pytest.raises(UserError, match="share 1 file names, such as longer"):
            check_disjoint(train, read(tmp_path, f"Filename,Defect\n{same},1\n", "val.csv"))


def test_hash_covers_names_labels_and_classes(tmp_path):
    texts = ["a,1,1\nb,0,0\n", "a,1,1\nc,0,0\n", "a,1,0\nb,0,0\n", "a,1,1\nb,,\n"]
    hashes = [read(tmp_path, "Filename,RB,Defect\n" + t.replace("a,1,0", "a,0,1")) for t in texts]
    assert len({a.sha256() for a in hashes}) == 4
    assert hashes[0].sha256([0]) == hashes[1].sha256([0]) != hashes[0].sha256([1])


def test_real_rows(sewer_ml):
    path = sewer_ml / "annotations/SewerML_Val_sub_0.0625.csv"
    a = read_annotations(path)
    with open(path) as file:
        rows = list(csv.DictReader(file))
    assert len(a) == len(rows) == 8127 and a.class_names == tuple(CLASS_IMPORTANCE)
    assert a.defect.tolist() == [int(row["Defect"]) for row in rows]
    assert [a.name(i) for i in range(len(a))] == [row["Filename"] for row in rows]
    for c, name in enumerate(a.class_names):
        assert a.classes[:, c].tolist() == [row[name] == "1" for row in rows]


def test_real_rows_without_a_label(sewer_ml):
    a = read_annotations(sewer_ml / "train.csv")
    assert count_labels(a.defect) == {"normal": 39, "defect": 21, "unlabelled": 971}
    assert not a.classes[a.defect == -1].any()


def test_weights_are_the_published_ones():
    assert len(CLASS_IMPORTANCE) == 17
    assert sum(CLASS_IMPORTANCE.values()) == pytest.approx(6.7024)
