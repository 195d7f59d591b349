"""Write `bicycles.csv` next to this file: prices of 600 second-hand bicycles, all invented.

The price is a formula of kind, frame, brakes, age and kilometres, times random noise. Then each input cell is emptied
with probability 0.04. The seed is fixed, so every run writes the same bytes.
"""

import csv
import random
from pathlib import Path

KINDS = {"city": 420, "mountain": 640, "racing": 810, "folding": 380, "cargo": 1450}
FRAMES = {"steel": 1.0, "aluminium": 1.2, "carbon": 2.1}
BRAKES = {"rim": 0.9, "disc": 1.15, "coaster": 0.8}


def main() -> None:
    """Generate the rows and write the file."""
    draw = random.Random(0)
    rows = []
    for _ in range(600):
        kind, frame, brakes = (draw.choice(list(each)) for each in (KINDS, FRAMES, BRAKES))
        age = round(draw.uniform(0, 15), 1)
        kilometres = round(age * draw.lognormvariate(6.5, 0.7) / 10) * 10
        price = KINDS[kind] * FRAMES[frame] * BRAKES[brakes] * 0.9**age / (1 + kilometres / 40_000)
        inputs = [kind, frame, brakes, age, kilometres]
        with_missing = ["" if draw.random() < 0.04 else value for value in inputs]
        rows.append([*with_missing, round(price * draw.lognormvariate(0, 0.08))])
    with Path(__file__).with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [["kind", "frame", "brakes", "age", "kilometres", "price"], *rows]
        )


if __name__ == "__main__":
    main()
