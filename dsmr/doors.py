"""Front doors: a package offers names without importing what they stand for before they are asked for (PEP 562)."""

import importlib
from collections.abc import Callable, Mapping
from importlib.abc import MetaPathFinder
from typing import Any


def door(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of `package`, which takes each of `names` from the module named beside it."""

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(names[name]), name)

    return __getattr__


class Moved(MetaPathFinder):
    """Says where a module went. To be the last of `sys.meta_path`: asked only for what nobody finds."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname in self.names:
            raise ModuleNotFoundError(f"{fullname} is now {self.names[fullname]}", name=fullname)
