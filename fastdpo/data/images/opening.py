"""An image, as a row gives it -> its pixels: a path, bytes, a base64 data URL, an image cell of Arrow, or a
picture of PIL. What cannot be one is the row's problem, by name."""

import base64
import binascii
import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image as PIL
from PIL import ImageOps, UnidentifiedImageError

from fastdpo.data.report import RowProblem, kind

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_NO_PATHS = ("data:", "http://", "https://")
_REPOSITORIES = ("datasets--", "models--", "spaces--")  # how their folders in the hub's cache begin
_WIDE = {"I", "F", "I;16", "I;16B", "I;16L", "I;16N"}  # modes of more than 8 bits, which PIL would clip


@dataclass(frozen=True)
class Places:
    """Where paths may lead: into the data file's own folder, and into the one that the config names."""

    own: Path | None = None  # None: the data has no folder (a data set of the hub)
    named: Path | None = None  # media_dir

    def of(self, source: Any) -> list[Path]:
        """The files that an image may be; none where the row itself holds it."""
        if isinstance(source, Mapping) and source.get("bytes") is None:
            source = source.get("path")
        if not isinstance(source, str | Path) or str(source).startswith(_NO_PATHS):
            return []
        given = Path(str(source).removeprefix("file://"))
        return [(folder / given).resolve() for folder in self._folders] or [given.resolve()]

    @property
    def _folders(self) -> list[Path]:
        return [folder.resolve() for folder in (self.own, self.named) if folder is not None]

    @property
    def _roots(self) -> list[Path]:
        """What a file must be in, once all links are followed."""
        return [*self._folders, *(blobs for folder in self._folders for blobs in _blobs_of(folder))]

    def find(self, source: Any, field: str) -> Path | None:
        """The file; None where the row itself holds the image. Raises RowProblem where it is not, or
        elsewhere."""
        if not (tried := self.of(source)):
            return None
        inside = [file for file in tried if any(file.is_relative_to(root) for root in self._roots)]
        if not inside:
            where = f"not in {self.own}" if self.own else "and the data has no folder of its own"
            message = f"{tried[0]} is {where}; say media_dir: FOLDER if images are to be read from there"
            raise RowProblem("image_outside", field, message)
        found = next((file for file in inside if file.is_file()), None)
        if found is None:
            raise RowProblem("image_missing", field, f"there is no file {inside[0]}")
        return found


def _blobs_of(folder: Path) -> list[Path]:
    """Where the links of a snapshot in the hub's cache lead: the files of the same repository."""
    return [
        revision.parents[1] / "blobs"
        for revision in (folder, *folder.parents)
        if revision.parent.name == "snapshots"
        and re.fullmatch("[0-9a-f]{40}", revision.name)
        and revision.parents[1].name.startswith(_REPOSITORIES)
    ]


def open_image(
    source: Any, field: str, places: Places, max_pixels: int | None = None, notes: Counter | None = None
) -> PIL.Image:
    """The picture: RGB, upright, of at most max_pixels. `notes` counts changes. Raises RowProblem."""
    notes = Counter() if notes is None else notes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.DecompressionBombWarning)  # it is told by its error
            picture = _decoded(source, field, places)
            picture.load()
    except PIL.DecompressionBombError as error:
        raise RowProblem("image_too_large", field, f"{error}; make it smaller") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        why = "no image that PIL can read" if isinstance(error, UnidentifiedImageError) else str(error)
        raise RowProblem("image_unreadable", field, f"{_name(source)}: {why}") from None
    # the further frames of an MPO, a photo of many cameras, are other views of it
    if (frames := getattr(picture, "n_frames", 1)) > 1 and picture.format != "MPO":
        message = f"{_name(source)} has {frames} frames; give the one that is meant"
        raise RowProblem("image_animated", field, message)
    if picture.mode in _WIDE:
        message = f"{_name(source)} has more than 8 bits a pixel ({picture.mode}); scale it to 8 bits"
        raise RowProblem("image_mode", field, message)
    if picture.mode == "CMYK":
        notes["image_cmyk"] += 1
    picture = ImageOps.exif_transpose(picture).convert("RGB")
    if max_pixels is not None and picture.width * picture.height > max_pixels:
        notes["image_resized"] += 1
        picture = _smaller(picture, max_pixels)
    return picture


def image_key(picture: PIL.Image, processor: str) -> bytes:
    """What the model sees: the pixels, through a processor of this digest."""
    digest = blake2b(repr((picture.size, processor)).encode(), digest_size=16)
    digest.update(picture.tobytes())
    return digest.digest()


def _decoded(source: Any, field: str, places: Places) -> PIL.Image:
    if isinstance(source, PIL.Image):
        return source
    if isinstance(source, Mapping) and source.get("bytes") is not None:
        source = source["bytes"]
    if isinstance(source, bytes | bytearray):
        return _opened(io.BytesIO(source))
    if isinstance(source, str) and source.startswith("data:"):
        return _opened(io.BytesIO(_of_url(source, field)))
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        message = f"{source[:80]} is an address, and nothing is fetched; download it and give its path"
        raise RowProblem("image_url", field, message)
    if file := places.find(source, field):
        return _opened(file)
    raise RowProblem("wrong_type", field, f"a path, bytes, {{bytes, path}} or a data URL, not {kind(source)}")


def _opened(file: Any) -> PIL.Image:
    """Of formats that PIL itself decodes: of an EPS it would start Ghostscript."""
    return PIL.open(file, formats=_FORMATS)


def _of_url(text: str, field: str) -> bytes:
    head, _, body = text.partition(",")
    if not head.endswith(";base64"):
        raise RowProblem("image_unreadable", field, f"{head[:40]}: a data URL in base64 is needed")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise RowProblem("image_unreadable", field, f"{head[:40]}: no base64 ({error})") from None


def _name(source: Any) -> str:
    path = source.get("path") if isinstance(source, Mapping) else source
    return str(path)[:200] if isinstance(path, str | Path) and not str(path).startswith("data:") else "it"


def _smaller(picture: PIL.Image, max_pixels: int) -> PIL.Image:
    share = math.sqrt(max_pixels / (picture.width * picture.height))
    size = (max(1, int(picture.width * share)), max(1, int(picture.height * share)))
    return picture.resize(size, PIL.Resampling.BICUBIC)
