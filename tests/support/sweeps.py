"""Sweeps whose jobs are answered by functions, for tests/benchmarks alone."""

from __future__ import annotations

from benchmarks import measure
from benchmarks.quality_methods import Peer, ours
from benchmarks.quality_peers import PerChannel, PerToken
from benchmarks.results import Result
from benchmarks.sweep_jobs import Text, Tune, Tuned, unmeasured
from spark_compile.plan import Measured, Plan, PlannedLayer

CONTEXTS = (1024, 2048)
INT8 = ours("int8", key_dtype="int8", value_dtype="int8")
KIVI = Peer("KIVI-4", PerChannel(4), PerToken(4))
ROW = {"kl": 0.1, "nll": 3.1, "dense_nll": 3.0, "packed_share": 0.5, "whole_share": 0.6,
       "seconds": 1.0, "commit": "c"}  # fmt: skip
TEXT_TOKENS = 100_000


def described(**changes):
    return measure.lasting(measure.machine_facts()) | changes


def measured(job, **changes):
    """What a worker returns for a job of measuring."""
    return {"windows": {str(n): {**ROW, "machine": described(**changes)} for n in job.numbers}}


def plan(budget, key="quantized(bits=4)"):
    layer = PlannedLayer("model.layers.0.self_attn", key, "int8", 0.2, {key: 0.1}, {"int8": 0.2})
    facts = Measured("Llama", "bfloat16", "float32", 0.0, ((64, 64),), 4, 1024, 128, {"torch": "2"})
    return Plan(budget, 0.2, (layer,), facts)


def tuned(job, key="quantized(bits=4)", used=None):
    """What a worker returns for a job of tuning."""
    text = unmeasured(TEXT_TOKENS, 0, job.contexts, job.windows, 1152, job.settings["windows"])
    machine = measure.machine_facts()
    return Tuned(plan(job.budget, key), Text(TEXT_TOKENS, 0, used or text.used), machine, 1.0)


class Here:
    """Answers jobs one after the other; an answer may be an exception."""

    def __init__(self, answer):
        self.answer, self.waiting, self.titles, self.stopped = answer, [], [], False

    def start(self, job):
        self.waiting.append(job)

    def next(self):
        if not self.waiting:
            return None
        job = self.waiting.pop(0)
        self.titles.append(job.title)
        try:
            return job, self.answer(job)
        except Exception as error:
            return job, error

    def stop(self):
        self.stopped = True


def answered(job):
    return tuned(job) if isinstance(job, Tune) else measured(job)


def rows(folder, context=1024):
    result = Result.read(folder / f"quality-smollm2-{context}.jsonl")
    return {row["method"]: row for row in result.rows}
