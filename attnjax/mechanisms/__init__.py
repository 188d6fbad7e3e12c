"""One file per mechanism; calling the package, `attnjax.mechanisms()`, gives the table of them."""

import sys
import types

from attnjax.spec import Mechanism, mechanisms


class _Table(types.ModuleType):
    """The package is callable: its name is also the name of the table that it holds."""

    def __call__(self) -> dict[str, Mechanism]:
        return mechanisms()


sys.modules[__name__].__class__ = _Table
