"""``spark-optimize demo``: one small real model, dense and pruned, measured side by side.

Each configuration runs in a process of its own (``python -m spark_compile.demo JOB``), so that its
peak memory is its own. A worker reports on its standard output, one JSON object a line:
``{"stage": name, "seconds": duration}`` after each stage, ``{"ready": true}`` when everything is
compiled, after which it waits for a line on its standard input, and ``{"result": {...}}``.
"""
