"""
Tells rl-zoo3 of M3PO as soon as it is imported, unless ``SB3_M3PO_ZOO_HOOK`` is 0. A ``.pth`` file imports it whenever Python
starts, so it imports nothing itself before rl-zoo3 does; and what fails is a warning.
"""

import os
import sys


class ZooHook:
    """A finder of modules that waits for one, finds it once, and registers M3PO when it has been executed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        """:return: Where ``rl_zoo3.utils`` is, as the other finders say; ``None`` for all other modules"""
        if name != "rl_zoo3.utils":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        import importlib.util

        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), _register())  # type: ignore[assignment, func-returns-value, method-assign]
        return spec


def _register() -> None:
    try:
        from sb3_m3po.zoo import register

        register()
    except Exception as error:
        import warnings

        warnings.warn(f"rl-zoo3 goes without m3po: {error!r}; SB3_M3PO_ZOO_HOOK=0 switches this off", stacklevel=2)


if os.environ.get("SB3_M3PO_ZOO_HOOK", "1") != "0":
    sys.meta_path.insert(0, ZooHook())  # type: ignore[arg-type]
