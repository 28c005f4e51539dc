"""Layout of the packed cache and its kernels, imported as ``spark_compile.kernels``."""

if __name__ == "kernels":
    # transformers asks for a PyPI package of this name. With the repository root on sys.path it
    # would find this folder; an error here would escape from its question and break it. A stand-in
    # that has nothing of ours and is older than any version it accepts answers "not installed".
    import sys
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    _stand_in = ModuleType("kernels", "Not a package: import spark_compile.kernels instead.")
    _stand_in.__spec__ = ModuleSpec("kernels", None)
    _stand_in.__version__ = "0"  # type: ignore[attr-defined]
    sys.modules["kernels"] = _stand_in
