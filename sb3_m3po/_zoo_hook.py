"""
Tells rl-zoo3 of M3PO as soon as it is imported: ``python -m rl_zoo3.train --algo m3po``. ``SB3_M3PO_ZOO_HOOK=0``: not.

It is installed beside the packages, with a ``.pth`` file that imports it whenever Python starts; so it imports nothing that
Python has not imported by then, and what fails in it is a warning: rl-zoo3 has other algorithms too.
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

            def execute_and_register(module: object) -> None:
                execute(module)  # type: ignore[arg-type]
                try:
                    from sb3_m3po.zoo import register

                    register()
                except Exception as error:
                    import warnings

                    advice = "SB3_M3PO_ZOO_HOOK=0 switches this off"
                    warnings.warn(f"rl-zoo3 goes without m3po: {type(error).__name__}: {error} ({advice})", stacklevel=2)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if os.environ.get("SB3_M3PO_ZOO_HOOK", "1") != "0":
    sys.meta_path.insert(0, ZooHook())  # type: ignore[arg-type]
