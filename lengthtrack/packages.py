"""The packages of the distribution, found by their location: a user's file of the same name does not hide them.

Python takes `collate.py` next to a script for the package `collate`, since the script's folder comes first on its path.
`claim_packages` makes the folders next to this one come first, and says which files it passed over.
"""

import inspect
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Final

PACKAGES: Final = ("collate", "samplers")
_HOME: Final = Path(__file__).resolve().parents[1]


class ShadowWarning(UserWarning):
    """A file of the user's has the name of a package of lengthtrack."""


class OwnPackages:
    """Finds the two packages where lengthtrack was installed.

    It has no base class: importing `importlib.abc` takes longer than Python's own start.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The package of that name next to this one; None for every other name."""
        del path, target
        if fullname not in PACKAGES:
            return None
        home = _HOME / fullname
        return spec_from_file_location(fullname, home / "__init__.py", submodule_search_locations=[str(home)])


def claim_packages() -> None:
    """Make `import collate` and `import samplers` give lengthtrack's packages, in this process.

    Warns:
        ShadowWarning: Another file has such a name, and comes first on the path or has been imported already.
    """
    for name in PACKAGES:
        module = sys.modules.get(name)
        shadow = _first_on_path(name) if module is None else getattr(module, "__file__", None)
        if shadow is None or Path(shadow).resolve() == _HOME / name / "__init__.py":
            continue
        warnings.warn(_describe(name, shadow, imported=module is not None), ShadowWarning, stacklevel=_user_level())
        # Code that has imported the other module keeps it.
        for imported in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[imported]
        if not any(isinstance(finder, OwnPackages) for finder in sys.meta_path):
            sys.meta_path.insert(0, OwnPackages())


def _first_on_path(name: str) -> str | None:
    """The file that `import name` would load."""
    spec = PathFinder.find_spec(name)
    return None if spec is None else spec.origin


def _user_level() -> int:
    """The stack level, for `claim_packages`, of the line that imports lengthtrack."""
    frame, level = inspect.currentframe(), 0
    while frame is not None:
        package = frame.f_globals.get("__name__", "").split(".")[0]
        if package not in {"lengthtrack", "importlib"}:
            break
        # `warnings` does not count the frames of the import system.
        level += package == "lengthtrack"
        frame = frame.f_back
    return level


def _describe(name: str, shadow: str, *, imported: bool) -> str:
    state = "was imported before" if imported else "comes first on Python's path"
    return (
        f"{shadow} has the name of lengthtrack's package {name!r} and {state}; from now on `import {name}` gives "
        "lengthtrack's. Rename that file to import it"
    )
