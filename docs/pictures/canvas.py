"""A canvas of boxes, dots, lines and words, and the SVG they become."""

from html import escape

from fastdpo.report.plots import COLOURS

WIDTH = 480  # units; on 360 pixels the smallest words are 9 pixels high
MARGIN = 16
RIGHT = WIDTH - MARGIN
LARGE, MEDIUM, SMALL = 16, 13.5, 12.5  # sizes of words
INK = COLOURS["ink"]
SOFT = "#5d6671"  # words that say more
PALE = "#e6e9ed"
PAPER = "#ffffff"  # a ground of its own, so that a dark page does not swallow the words


class Canvas:
    """x goes right, y goes down, from the upper left corner. title: the first words of the picture."""

    def __init__(self, title: str, height: float):
        self.title, self.height = title, height
        self._parts: list[str] = []
        self.words(MARGIN, 30, title, LARGE, bold=True)

    def words(self, x, y, text: str, size=MEDIUM, colour=INK, bold=False, anchor="start") -> None:
        """y is the base line; x where the words start, or their middle or end."""
        look = f'font-size="{size}" font-weight="{"bold" if bold else "normal"}" text-anchor="{anchor}"'
        place = f'x="{x:.5g}" y="{y:g}"'
        self._parts.append(f'<text {place} {look} fill="{colour}">{escape(text)}</text>')

    def notes(self, x, y, lines: list[str]) -> None:
        """Lines in small print, from the base line y downwards."""
        for number, line in enumerate(lines):
            if line:
                self.words(x, y + 17 * number, line, SMALL, SOFT)

    def box(self, x, y, width, height, colour: str) -> None:
        place = f'x="{x:.5g}" y="{y:g}" width="{width:.5g}" height="{height:g}"'
        self._parts.append(f'<rect {place} fill="{colour}"/>')

    def dot(self, x, y, colour: str) -> None:
        self._parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="2" fill="{colour}"/>')

    def line(self, places: list[tuple[float, float]], colour: str) -> None:
        """From place to place."""
        points = " ".join(f"{x:.5g},{y:.5g}" for x, y in places)
        self._parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')

    def legend(self, y, entries: dict[str, str], columns: int) -> None:
        """{word: its colour} in so many columns; y is the first base line."""
        for number, (word, colour) in enumerate(entries.items()):
            row, column = divmod(number, columns)
            x, base = MARGIN + column * (RIGHT - MARGIN) / columns, y + 18 * row
            self.box(x, base - 10, 12, 12, colour)
            self.words(x + 17, base, word, SMALL)

    def svg(self, description: str) -> str:
        """description: the picture for those who cannot see it."""
        scale = 700 / WIDTH
        size = f'width="700" height="{scale * self.height:.0f}" viewBox="0 0 {WIDTH} {self.height:g}"'
        frame = f'width="{WIDTH - 1}" height="{self.height - 1:g}" rx="8" fill="{PAPER}"'
        lines = (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" role="img" '
            'aria-labelledby="title description">',
            f'<title id="title">{escape(self.title)}</title>',
            f'<desc id="description">{escape(description)}</desc>',
            f'<rect x="0.5" y="0.5" {frame} stroke="{COLOURS["grid"]}"/>',
            *self._parts,
            "</svg>",
        )
        return "\n".join(lines) + "\n"
