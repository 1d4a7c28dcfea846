"""Draws letters from the fonts of this machine, as images that nobody tuned for: data/letters.

    python data/make_letters.py
    python data/make_letters.py --fonts FOLDER --out FOLDER

Classes are 16 letters, each a capital and a small one from up to two faces of a family, in greyscale and 28 px.
Families whose letters are missing or look alike are left out; every fifth of the others is val. With
`--group-by '(.*)_'` a family's letter is held out whole. Debian's fonts-* packages have some hundred families.
"""

import argparse
import collections
import hashlib
import pathlib

from PIL import Image, ImageDraw, ImageFont

HERE = pathlib.Path(__file__).resolve().parent
LETTERS = "ABDEFGHKMNPQRSTY"
SIDE, BOX = 28, 22  # px of an image, and of the letter in it
FACES = 2  # faces of a family
NO_LETTERS = ("symbol", "dingbat", "keyboard", "d05", "emoji", "barcode")  # fonts whose letters are something else


def draw(font, letter):
    """An image with the letter in its middle, as high or wide as BOX; None if the font has none."""
    left, top, right, bottom = font.getbbox(letter)
    if right - left < 1 or bottom - top < 1:
        return None
    image = Image.new("L", (right - left, bottom - top), 255)
    ImageDraw.Draw(image).text((-left, -top), letter, font=font, fill=0)
    scale = BOX / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    whole = Image.new("L", (SIDE, SIDE), 255)
    whole.paste(image, [(SIDE - side) // 2 for side in image.size])
    return whole


def faces(folder):
    """{family: its font files, sorted}, of those that can be read."""
    found = collections.defaultdict(list)
    for path in sorted(folder.rglob("*.[ot]tf"), key=lambda path: path.name):
        try:
            family = ImageFont.truetype(path, 10).getname()[0]
        except OSError:
            continue
        if family and not any(word in family.lower() for word in NO_LETTERS):
            found["".join(c for c in family.lower() if c.isascii() and c.isalnum())].append(path)
    return found


def letters(path):
    """{character: image} of a font file; None if letters are missing or look alike."""
    font = ImageFont.truetype(path, 64)
    found = {c: draw(font, c) for letter in LETTERS for c in (letter, letter.lower())}
    if not all(found.values()):
        return None
    missing = draw(font, "\uffff")
    pixels = {image.tobytes() for image in found.values()}
    alike = len({found[letter].tobytes() for letter in LETTERS}) < len(LETTERS)
    return None if alike or (missing and missing.tobytes() in pixels) else found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fonts", type=pathlib.Path, default=pathlib.Path("/usr/share/fonts"), metavar="FOLDER")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "letters", metavar="FOLDER")
    options = parser.parse_args(argv)
    drawn = {}
    for family, paths in faces(options.fonts).items():
        chosen = [found for path in (paths[0], paths[-1])[: min(FACES, len(paths))] if (found := letters(path))]
        if chosen:
            drawn[family] = chosen
    if not drawn:
        parser.error(f"--fonts {options.fonts}: has no fonts with these letters")
    order = sorted(drawn, key=lambda family: hashlib.sha256(family.encode()).digest())
    for i, family in enumerate(order):
        for number, found in enumerate(drawn[family]):
            for character, image in found.items():
                case = "capital" if character in LETTERS else "small"
                part = "train" if i % 5 else "val"
                path = options.out / part / character.upper() / f"{family}_{number}-{case}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
    print(f"{options.out}: letters of {len(drawn)} families")


if __name__ == "__main__":
    main()
