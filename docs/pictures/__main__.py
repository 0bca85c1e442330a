"""Draws the documentation's pictures anew, each as an SVG beside its script.

python -m docs.pictures
"""

from pathlib import Path

from docs.pictures import ladder, memory, packing, rows

FOLDER = Path(__file__).parent
PICTURES = {"packing": packing.draw, "memory": memory.draw, "ladder": ladder.draw}
PICTURES |= {"rows": rows.draw}


def main() -> None:
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")
        print(f"docs/pictures/{name}.svg")


if __name__ == "__main__":
    main()
