"""The text of a data file: UTF-8, or an error that says what it is and how to make it UTF-8."""

import codecs
import shlex
from collections.abc import Iterator
from pathlib import Path

from fastdpo.data.files.stamps import pieces
from fastdpo.errors import DataError

_BOM = b"\xef\xbb\xbf"  # UTF-8's
_BOMS = {  # those of 32 bits first: UTF-16's begins UTF-32's
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
# by where the NULs are in the first two characters, which are ASCII in every format
_WITHOUT_BOM: dict[tuple[bool, ...], str] = {
    (False, True, True, True): "UTF-32LE",
    (True, True, True, False): "UTF-32BE",
    (False, True, False, True): "UTF-16LE",
    (True, False, True, False): "UTF-16BE",
}


def text_start(file: Path) -> int:
    """Where the text begins of a file in UTF-8, or nearly so: behind its BOM. Raises DataError for one in
    UTF-16 or UTF-32."""
    head = next(pieces(file, size=4), b"")
    found = next((name for bom, name in _BOMS.items() if head.startswith(bom)), None)
    found = found or _WITHOUT_BOM.get(tuple(byte == 0 for byte in head))
    if found:
        raise DataError(f"data: {file} is {found}, not UTF-8. Save it as UTF-8, or: {_iconv(found, file)}")
    return len(_BOM) if head.startswith(_BOM) else 0


def text_pieces(file: Path, at: int) -> Iterator[str]:
    """The text from a byte on, of a file that has to be right as a whole. Raises DataError."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    try:
        for piece in pieces(file, at):
            yield decoder.decode(piece)
            line += piece.count(b"\n")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line, byte = line + error.object.count(b"\n", 0, error.start), error.object[error.start]
        way_out = f"Correct it; or, where all of the file is in another encoding: {_iconv('CP1252', file)}"
        raise DataError(f"data: {file}: byte {byte:#x} on line {line} is not UTF-8. {way_out}") from None


def check_text(file: Path) -> None:
    """Raises DataError for a file that is not UTF-8 as a whole."""
    for _ in text_pieces(file, text_start(file)):
        pass


def _iconv(encoding: str, file: Path) -> str:
    to = file.with_stem(f"{file.stem}_utf8")
    return f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(file))} > {shlex.quote(str(to))}"
