"""data/sort_images.py: photographs into train and val, in whole groups, again and again."""

import errno
import os
import pathlib

import pytest
import sort_images

from utils import UserError


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """The folder, in the current one, of 100 files in each of two classes: five views of twenty things."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    for name in ("mugs", "pans"):
        (folder / name).mkdir(parents=True)
        for i in range(100):
            (folder / name / f"thing{i // 5:02}_view{i % 5}.jpg").write_text(f"{name} {i}")
    return folder


def sort(*words):
    """{part: its files} after a run."""
    sort_images.main(sort_images.parse_args(list(map(str, words))))
    return {part: {str(p.relative_to(f"sorted/{part}")) for p in pathlib.Path("sorted", part).glob("*/*")}
            for part in ("train", "val")}  # fmt: skip


def of(name, paths):
    """The names of a class's files."""
    return {path.removeprefix(f"{name}/") for path in paths if path.startswith(name)}


def test_a_fifth_of_each_class_goes_to_val_by_chance(photos, capsys):
    found = sort()
    for name in ("mugs", "pans"):
        val = of(name, found["val"])
        assert len(val) == 20 and {path.split("_")[1] for path in val} == {f"view{i}.jpg" for i in range(5)}
    assert len(found["train"]) == 160 and of("mugs", found["val"]) != of("pans", found["val"])
    for part, paths in found.items():
        assert all(os.path.samefile(photos / path, f"sorted/{part}/{path}") for path in paths)
    assert capsys.readouterr().out == "sorted: 200 images of 2 classes, in val 40; groups: 200, in val 40\n"


@pytest.mark.parametrize(("group_by", "across"), [("(.*/.*?)_", False), ("/(.*?)_", True)])
def test_groups_of_one_class_or_of_all_stay_together(photos, group_by, across):
    """The expression stands in a settings file; the things of both classes have the same names."""
    pathlib.Path("own.yml").write_text(f"common: {{group-by: '{group_by}', input-size: 32}}\nsearch: {{seed: 1}}")
    found = sort("--config", "own.yml")
    named = {(part, name): {path.split("_")[0] for path in of(name, paths)}
             for part, paths in found.items() for name in ("mugs", "pans")}  # fmt: skip
    assert [len(things) for things in named.values()] == [16, 16, 4, 4]
    assert (named["val", "mugs"] == named["val", "pans"]) == across
    for name in ("mugs", "pans"):
        assert not named["train", name] & named["val", name]


def test_another_run_adds_what_is_new_and_moves_nothing(photos, capsys):
    """Of the new groups of a class, as many go to val as it lacks then."""
    before = sort("--group-by", "(.*/.*?)_")
    old = min(before["val"]).split("_")[0]
    new = {f"{old}_new.jpg", *(f"mugs/new{i // 5}_view{i % 5}.jpg" for i in range(50))}
    for name in (*new, "mugs/.DS_Store", ".DS_Store", "mugs/notes.txt"):
        (photos / name).write_text(name)
    gone = min(before["train"])
    (photos / gone).unlink()
    after = sort("--group-by", "(.*/.*?)_")
    assert before["val"] <= after["val"] and before["train"] <= after["train"]
    added = {part: after[part] - before[part] for part in after}
    assert not added["train"] & added["val"] and added["train"] | added["val"] == new
    assert f"{old}_new.jpg" in added["val"] and len(added["val"]) == 11
    printed = capsys.readouterr().out
    assert f"sorted/train/{gone}: its photograph is gone\n" in printed and "1 files are ignored" in printed
    with pytest.raises(UserError, match="its group is in train and val, as sorted before"):
        sort("--group-by", "(view.)")


def test_a_photograph_that_was_edited_is_put_again(photos):
    """Editors write a new file and rename it; its part stays."""
    before = sort()
    for part in before:
        path = min(before[part])
        (photos / "new").write_text("edited, in another size")
        os.replace(photos / "new", photos / path)
        assert sort() == before and pathlib.Path("sorted", part, path).read_text() == "edited, in another size"


def test_files_that_cannot_be_linked_are_copied_whole(photos, monkeypatch):
    def refused(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    for part, paths in sort().items():
        assert all(pathlib.Path("sorted", part, p).read_bytes() == (photos / p).read_bytes() for p in paths)
    assert len(list(pathlib.Path("sorted").rglob("*.*"))) == 200


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["none"], "none: no such folder; name the one that has a folder of images"),
        (["photos", "sorted", "--group-by", "^(.)"], "class 'mugs' has 100 images in one group"),
        (["photos", "sorted", "--group-by", "nothing"], "none of the 200 files of photos is in a group"),
    ],
)
def test_what_cannot_be_sorted_is_one_line(photos, words, says):
    with pytest.raises(UserError, match=says):
        sort(*words)
    assert not pathlib.Path("sorted").exists()


def test_a_class_whose_groups_are_uneven_is_told(photos, capsys):
    sort("--group-by", "(mugs/thing.|pans/.*?_)")
    assert capsys.readouterr().out.startswith("mugs: 50 of 100 images are in val, since groups are whole\nsorted: ")
