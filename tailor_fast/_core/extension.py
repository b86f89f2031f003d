"""The C++ extension, imported when a native backend is first asked for."""

import functools
import importlib
from types import ModuleType


@functools.cache
def load_extension() -> ModuleType | ImportError:
    """Return ``tailor_fast._C``, or the error that kept it from loading."""
    try:
        return importlib.import_module("tailor_fast._C")
    except ImportError as error:
        return error


def extension() -> ModuleType:
    """Return ``tailor_fast._C``; raises ``ImportError`` when it was not built."""
    module = load_extension()
    if isinstance(module, ImportError):
        raise module
    return module
