import csv

import numpy as np
import pytest

from common.annotations import (
    CLASS_IMPORTANCE,
    check_disjoint,
    count_labels,
    read_annotations,
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
        ("Filename;Defect\na;1\n", ["'Filename' is missing"]),
        ("Filename,Defect\na,1\nb,yes\n", ["a.csv:3", "Defect", "'yes'", "0, 1 or empty"]),
        ("Filename,Defect\na, 1\n", ["a.csv:2", "Defect", "' 1'"]),
        ("Filename,Defect\na,2\n", ["a.csv:2", "'2'"]),
        ("Filename,RB,Defect\na,,1\n", ["a.csv:2", "RB", "''", "0 or 1"]),
        ("Filename,RB,Defect\na,0.5,1\n", ["a.csv:2", "RB", "'0.5'"]),
        ("Filename,Defect\na,1\nb\n", ["a.csv:3", "1 cells", "2"]),
        ("Filename,Defect\na,1,0\n", ["a.csv:2", "3 cells"]),
        ("Filename,Defect\na,1\nb,0\na,0\n", ["a.csv:4", "'a'", "more than once"]),
        ("Filename,Defect\n../a,1\n", ["a.csv:2", "outside"]),
        ("Filename,Defect\na/../../b,1\n", ["outside"]),
        ("Filename,Defect\n/etc/passwd,1\n", ["outside"]),
        ("Filename,Defect\n..\\a,1\n", ["outside"]),
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
    with pytest.raises(UserError, match="none.csv"):
        read_annotations(tmp_path / "none.csv")


def test_defect_must_be_any_of_the_17_where_all_17_are_there(tmp_path):
    row = ",0,0," + ",".join(["0"] * 17) + ",0,1\n"
    with pytest.raises(UserError, match="contradicts"):
        read(tmp_path, f"{SEWER_HEADER}\na{row}")


def test_a_column_without_any_0_or_1_is_no_class(tmp_path):
    a = read(tmp_path, "Filename,Video,RB,Date,Empty,Defect\na,v7,1,2020-01-01,,1\nb,v8,0,x,,0\n")
    assert a.class_names == ("RB",) and a.classes.tolist() == [[True], [False]]


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
