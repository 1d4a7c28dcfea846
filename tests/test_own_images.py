"""docs/own-images.md from top to bottom, as a reader does it, on a few bundled images with fewer steps."""

import pathlib
import re
import shlex
import shutil

import pytest
import torch
import yaml
from conftest import ROOT, run

import network
from images import bundled

BLOCK = re.compile(r"^(?:<!-- commands: ([^\n]*) -->\n)?```(\w+)\n(.*?)^```$", re.M | re.S)
PAGE = (ROOT / "docs" / "own-images.md").read_text()
FEWER = {
    "common": {"heldout-per-class": 2, "loader": "torchvision", "workers": 0, "threads": 1, "device": "cpu"},
    "supernet": {"iterations": 2, "batch-size": 8, "val-every": 2, "warmup": 1, "bn-batches": 1, "bn-batch-size": 8},
    "search": {"population": 4, "generations": 2, "bn-batches": 1, "bn-batch-size": 8},
    "scratch": {"iterations": 2, "batch-size": 8, "val-every": 2, "warmup": 1, "bn-pass": 1},
}


@pytest.mark.slow
def test_the_page_from_top_to_bottom(tmp_path, monkeypatch, forked):
    monkeypatch.chdir(tmp_path)
    classes = (bundled.unpack(ROOT / "data" / "fashion-mnist") / "train").iterdir()
    for folder in sorted(path for path in classes if path.is_dir()):
        for path in sorted(folder.iterdir())[:6]:
            target = tmp_path / "photos" / folder.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    shutil.copy(target, tmp_path / "photo.jpg")
    printed = {}
    for tag, language, text in BLOCK.findall(PAGE):
        if language == "yaml":
            settings = yaml.safe_load(text)
            for section, values in FEWER.items():
                settings[section] |= values
            pathlib.Path("own.yml").write_text(yaml.safe_dump(settings))
        elif tag == "run in order by a test":
            for line in text.splitlines():
                _, script, *words = shlex.split(line)
                printed[line], _ = run(script.removeprefix("data/"), *words)
    assert len(printed) == 8 and sum(len(list(pathlib.Path(f"sorted/{p}").glob("*/*"))) for p in ("train", "val")) == 60
    assert pathlib.Path("own/report.html").exists() and pathlib.Path("network.pt2").exists()
    predicted = next(out for line, out in printed.items() if "--predict" in line)
    model = network.load("own/checkpoints/scratch/bnps-checkpoint.pth")
    assert predicted.startswith("photo.jpg: ") and any(f" {name} " in predicted for name in model.classes)
    assert model.config.val_resize == 36 and isinstance(model, torch.nn.Module)


def test_the_table_has_the_numbers_of_the_files():
    """cifar10.yml, and the file that the page shows."""
    settings = yaml.safe_load((ROOT / "examples/cifar10.yml").read_text())
    cells = [f"{settings[s]['iterations']:,} x {settings[s]['batch-size']}, {settings[s]['lr']}" for s in
             ("supernet", "scratch")]  # fmt: skip
    common = settings["common"]
    row = f"| `examples/cifar10.yml` | {common['input-size']} | {cells[0]} | {cells[1]} | {common['bn-batches']} | "
    assert f"{row}{common['heldout-per-class']} |" in PAGE
    own = yaml.safe_load(next(text for _, language, text in BLOCK.findall(PAGE) if language == "yaml"))
    cells = [f"{own[s]['iterations']:,} x {own[s]['batch-size']}, {own[s]['lr']}" for s in ("supernet", "scratch")]
    row = f"| `varied` | {own['common']['input-size']} | {cells[0]} | {cells[1]} | {own['common']['bn-batches']} |"
    assert f"{row} {own['common']['heldout-per-class']} |" in PAGE
