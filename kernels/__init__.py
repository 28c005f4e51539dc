"""Layout of the packed cache and its kernels, imported as ``spark_compile.kernels``."""

if __name__ == "kernels":
    # transformers imports a PyPI package of this name; with the repository root on sys.path this
    # folder would pass for it.
    raise ModuleNotFoundError(
        "the folder 'kernels' of spark-compile is no top-level package: import "
        "'spark_compile.kernels' instead. If the PyPI package 'kernels' was meant, take the "
        "repository root off sys.path.",
        name="kernels",
    )
