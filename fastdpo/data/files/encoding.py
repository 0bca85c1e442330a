"""The text of a data file: UTF-8, or an error that says what it is and how to make it UTF-8."""

import shlex
from pathlib import Path

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


def read_bytes(file: Path) -> bytes:
    """A file in UTF-8, or nearly so, without its BOM. Raises DataError for one in UTF-16 or UTF-32."""
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise DataError(f"data: cannot read {file}: {error}") from None
    found = next((name for bom, name in _BOMS.items() if raw.startswith(bom)), None)
    found = found or _WITHOUT_BOM.get(tuple(byte == 0 for byte in raw[:4]))
    if found:
        raise DataError(f"data: {file} is {found}, not UTF-8. Save it as UTF-8, or: {_iconv(found, file)}")
    return raw.removeprefix(_BOM)


def decode(raw: bytes, file: Path) -> str:
    """The text of a file that has to be right as a whole. Raises DataError."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line, byte = raw.count(b"\n", 0, error.start) + 1, raw[error.start]
        way_out = f"Correct it; or, where all of the file is in another encoding: {_iconv('CP1252', file)}"
        raise DataError(f"data: {file}: byte {byte:#x} on line {line} is not UTF-8. {way_out}") from None


def _iconv(encoding: str, file: Path) -> str:
    to = file.with_stem(f"{file.stem}_utf8")
    return f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(file))} > {shlex.quote(str(to))}"
