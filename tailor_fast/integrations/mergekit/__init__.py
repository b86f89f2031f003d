"""The merge method ``model_tailor`` for mergekit, and the command ``tailor-mergekit``.

::

    from tailor_fast.integrations.mergekit import register

    register()  # from here on `merge_method: model_tailor` is known to mergekit in this process

mergekit 0.1.5 and the API of 0.1.4 are supported; mergekit is imported by ``register`` only.
"""

from tailor_fast.integrations.mergekit.method import PARAMETERS, Settings
from tailor_fast.integrations.mergekit.registering import register

__all__ = ["PARAMETERS", "Settings", "register"]
