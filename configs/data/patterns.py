"""Write the folder `patterns` next to this file: 300 small pictures of dots, rings and stripes.

Size, colours, place, angle and width are random; every sixth picture is grey. The seed is fixed, so a run with the same
version of Pillow writes the same bytes.
"""

import random
from pathlib import Path

from PIL import Image, ImageDraw


def main() -> None:
    """Draw the pictures and write the files."""
    draw = random.Random(0)
    for name in ("dots", "rings", "stripes"):
        folder = Path(__file__).with_suffix("") / name
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(100):
            width, height = draw.randint(40, 64), draw.randint(40, 64)
            back, front = (tuple(draw.randrange(low, low + 128) for _ in range(3)) for low in draw.sample([0, 128], 2))
            picture = Image.new("RGB", (128, 128), back)
            pen = ImageDraw.Draw(picture)
            step, x, y = draw.randint(8, 14), draw.randint(40, 88), draw.randint(40, 88)
            if name == "dots":
                for left in range(x % step, 128, step):
                    for top in range(y % step, 128, step):
                        pen.ellipse((left, top, left + step // 2, top + step // 2), front)
            elif name == "rings":
                for radius in range(step, 192, step):
                    pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=front, width=step // 3)
            else:
                for left in range(x % step, 128, step):
                    pen.line((left, 0, left, 128), front, step // 2)
            if name != "rings":
                picture = picture.rotate(draw.uniform(0, 180), Image.Resampling.BICUBIC)
            left, top = (128 - width) // 2, (128 - height) // 2
            picture = picture.crop((left, top, left + width, top + height))
            picture = picture.convert("L") if index % 6 == 0 else picture.quantize(16, dither=Image.Dither.NONE)
            picture.save(folder / f"{name}{index:02}.png", optimize=True)


if __name__ == "__main__":
    main()
