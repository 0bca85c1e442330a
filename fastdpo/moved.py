"""Old import paths that were documented: they work for one more version, and say where things are now."""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings

MOVED = {
    "fastdpo.cache_file": "fastdpo.reference.cache_file",
    "fastdpo.groups": "fastdpo.data.groups",
    "fastdpo.packing": "fastdpo.data.packing",
    "fastdpo.ref_fill": "fastdpo.reference.fill",
    "fastdpo.support": "fastdpo.model.support",
    "fastdpo.trainer": "fastdpo.api",
}


class Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the old names, as modules of the new ones' contents."""

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in MOVED else None

    def exec_module(self, module):
        new = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is {new} now", FutureWarning, stacklevel=2)
        found = vars(importlib.import_module(new))
        vars(module).update({name: x for name, x in found.items() if not name.startswith("__")})


sys.meta_path.append(Moved())
