"""The package as a folder that Hugging Face's `kernels` loads, by build.toml beside this file.

python kernels/hub.py FOLDER       then: kernels.get_local_kernel(Path("FOLDER/build"))

Facts of the layout: the documentation of huggingface/kernels, "Kernel requirements".
"""

import base64
import hashlib
import json
import shutil
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
OPS = '''"""The operators' namespace of this build."""


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{id}::{{op_name}}"
'''


def write(folder: Path) -> list[Path]:
    """Writes folder/build/torch-BACKEND for each backend of build.toml, in the place of what was there, and
    returns their paths."""
    general = tomllib.loads((HERE / "build.toml").read_text())["general"]
    package = general["name"].replace("-", "_")
    sources = sorted((HERE / package).glob("*.py"))
    texts = "".join(f"{path.name}\0{path.read_text()}\0" for path in sources)
    number = hashlib.sha256(texts.encode()).hexdigest()[:7]
    written = []
    for backend in general["backends"]:
        variant, name = folder / "build" / f"torch-{backend}", f"_{package}_{backend}_{number}"
        shutil.rmtree(variant, ignore_errors=True)
        variant.mkdir(parents=True)
        for path in sources:
            shutil.copy(path, variant)
        (variant / "_ops.py").write_text(OPS.format(id=name))
        digest = {path.name: _sha256(path) for path in sorted(variant.iterdir())}
        metadata = {key: general[key] for key in ("name", "version", "license")}
        metadata |= {"id": name, "python-depends": [], "backend": {"type": backend}}
        metadata["digest"] = {"algorithm": "sha256", "files": digest}
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        written.append(variant)
    return written


def _sha256(path: Path) -> str:
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(*write(Path(sys.argv[1])), sep="\n")
