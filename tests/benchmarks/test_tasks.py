"""Tasks through lm-eval on a tiny random model: essays, questions, bytes, metrics, going on."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval")

import datasets
import torch
import transformers
import typer
from lm_eval.api.model import LM
from rich.console import Console
from tokenizer import of_bytes

from benchmarks import measure, tasks, tasks_bench, tasks_report, tasks_suites
from benchmarks.quality_methods import SNAPKV, ours
from benchmarks.results import Result
from benchmarks.tasks_methods import compiled
from benchmarks.tasks_model import TasksLM, question_start

CONTEXT = 1024
DENSE, INT8 = ours("dense"), ours("int8", key_dtype="int8", value_dtype="int8")
EVICTED = ours("SnapKV", **SNAPKV)
TEXT = "What is written well is read with joy, says Mr. Graham. So write it well! " * 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token per byte, in a folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    of_bytes().save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=257, max_position_embeddings=2048,
        eos_token_id=256, bos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).float().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def needle(tokenizer):
    return tasks_suites.ruler(["niah_single_1"], CONTEXT, tokenizer.name_or_path, TEXT)


def answers(model, tokenizer, method, needle, questions):
    """Texts of a sample by question, and the stored shares."""
    task = needle["niah_single_1"]
    task._instances = None
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(samples=[0])
    reader, texts, shares = compiled(model, method, "eager"), [], []
    for question in questions:
        own = TasksLM(reader, tokenizer, question, answer_tokens=12)
        texts += own.generate_until(task.instances)
        shares += own.shares
    return texts, shares


def test_hidden_and_visible_questions_are_the_same_to_a_dense_cache(model, tokenizer, needle):
    texts, shares = answers(model, tokenizer, DENSE, needle, ["visible", "hidden"])
    assert texts[0] == texts[1]
    assert len(texts[0]) >= 12
    assert min(shares) >= 1


def test_less_is_stored_and_an_evicted_prompt_is_answered(model, tokenizer, needle):
    _, shares = answers(model, tokenizer, INT8, needle, ["visible"])
    assert 0.25 < shares[0] < 0.4  # of float32
    _, shares = answers(model, tokenizer, EVICTED, needle, ["hidden"])
    assert shares[0] < 0.5  # the question stays dense, too


def test_essays_are_ours_and_samples_those_of_any_run(tokenizer):
    path = tokenizer.name_or_path
    names = ["niah_single_1", "niah_multikey_1"]
    doc = tasks_suites.ruler(names, 4096, path, TEXT)[names[1]].eval_docs[3]
    assert "What is written well is read with joy" in doc["input"]
    assert all(output in doc["input"] for output in doc["outputs"])
    alone = tasks_suites.ruler(names[1:], 4096, path, TEXT)[names[1]]
    assert alone.eval_docs[3] == doc


def test_questions_of_all_templates_are_found():
    from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, vt_utils

    words = {"context": "\nQuestion: an example?\n", "query": "q", "num_v": 1, "type_needle_v": "n"}
    for template, question in (
        (niah_utils.TEMPLATE, "\nWhat are all the special magic n for q"),
        (niah_utils.TEMPLATE.replace("are all", "is"), "\nWhat is the special magic n for q"),
        (vt_utils.TEMPLATE, "\nQuestion: Find all variables"),
        (cwe_utils.TEMPLATE, "\nQuestion: What are the 10 most common"),
        (fwe_utils.TEMPLATE, "\nQuestion: Do not provide any explanation."),
    ):
        prompt = template.format(**words)
        assert prompt[question_start(prompt, {}) :].startswith(question)
    prompt = "Read.\nA story.\nNow answer: who?"
    assert prompt[question_start(prompt, {"context": "A story."}) :] == "\nNow answer: who?"
    with pytest.raises(ValueError, match="no question in a prompt that ends with 'Read"):
        question_start("Read.", {})


def test_a_long_prompt_loses_its_middle(model, tokenizer):
    own = TasksLM(model, tokenizer, "visible")
    ids, mask = own.tok_batch_encode(["abcdefgh"], left_truncate_len=4)
    assert tokenizer.decode(ids[0]) == "abgh"
    assert mask.tolist() == [[1] * 4]
    assert own.tok_batch_encode(["abc"], left_truncate_len=4)[0].shape == (1, 3)


class Scripted(LM):
    """Gives answers that are written beforehand."""

    def __init__(self, texts):
        super().__init__()
        self.texts, self.prompts = texts, []

    def generate_until(self, requests):
        self.prompts = [request.args[0] for request in requests]
        return self.texts

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


CODE = "    return x + 1"
LONGBENCH = {
    "longbench_qasper": ("BERT and the GPT model", "BERT", ["GPT model", "BERT"], [2 / 3, 1]),
    "longbench_hotpotqa": ("in the city of Paris", "London", ["Paris"], [2 / 5, 0]),
    "longbench_gov_report": ("the cat sat", "dogs run", ["the cat sat"], [1, 0]),
    "longbench_trec": ("Type: Date", "Date or Place", ["Date"], [1, 0.5]),
    "longbench_passage_retrieval_en": ("Paragraph 3", "3 or 4", ["Paragraph 3"], [1, 0.5]),
    "longbench_lcc": (f"\n# a comment\n{CODE}\nmore", "", [CODE], [1, 0]),
}
"""A task of each type: two answers, what is right, and the scores after THUDM's metrics."""


@pytest.mark.parametrize("name", LONGBENCH)
def test_longbench_on_made_up_records(name, monkeypatch):
    *texts, right, expected = LONGBENCH[name]
    record = {
        "context": "A long story.", "question": "Who?", "answers": right,
        "all_classes": ["Date", "Place"], "length": 3, "dataset": name, "language": "en",
    }  # fmt: skip
    asked = []

    def made_up(path, name, **_):
        asked.append((path, f"longbench_{name}"))
        return {"test": datasets.Dataset.from_list([record, record])}

    monkeypatch.setattr(datasets, "load_dataset", made_up)
    task = tasks_suites.longbench([name])[name]
    assert asked == [(tasks_suites.LONGBENCH_DATA, name)]
    scripted = Scripted(texts)
    assert tasks_bench.answer(scripted, name, task, [0, 1]) == pytest.approx(expected, abs=1e-6)
    prompt = scripted.prompts[0]
    assert "A long story." in prompt[: question_start(prompt, record)]


@pytest.fixture
def on_a_tiny_model(monkeypatch, tmp_path, model, tokenizer, needle):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(tasks_report, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(tasks, "load", lambda name: (model, tokenizer))
    monkeypatch.setattr(tasks, "essays", lambda: TEXT * 4)
    monkeypatch.setattr(tasks, "methods", lambda *_: (DENSE, INT8))
    monkeypatch.setattr(tasks_bench, "compiled", lambda model, *_: model)  # takes seconds
    monkeypatch.setattr(tasks_suites, "hub_is_there", lambda: False)
    monkeypatch.setattr(tasks_suites, "ruler", lambda *_: needle)
    return tmp_path


def run(samples=1, only="int8", suites="ruler,essays,longbench"):
    tasks.main(
        model="smollm2", context=str(CONTEXT), question="hidden", samples=samples, suites=suites,
        only=only, tasks="*", answer_tokens=4, dtype="float32", inner="eager", threads=1,
        fresh=False, report=False,
    )  # fmt: skip


def test_runs_go_on_where_they_stopped(on_a_tiny_model, monkeypatch, capsys):
    asked = []

    def watched(model, name, task, numbers):
        asked.append(list(numbers))
        return answer(model, name, task, numbers)

    answer = tasks_bench.answer
    monkeypatch.setattr(tasks_bench, "answer", watched)
    run()
    shown = " ".join(capsys.readouterr().out.split())
    assert tasks_suites.NO_HUB in shown
    assert tasks_report.LEFT_OUT in shown
    run()
    run(samples=2)
    assert asked == [[0], [1]]
    result = Result.read(on_a_tiny_model / "tasks-smollm2.jsonl")
    assert result.settings["answer_tokens"] == 4
    assert sorted((row["task"], row["samples"]) for row in result.rows) == [
        ("essays", 2), ("niah_single_1", 2),
    ]  # fmt: skip
    assert all(row["share"] == 1 for row in result.rows)
    assert "int8" in (on_a_tiny_model / "results.md").read_text()


def test_options_are_checked():
    with pytest.raises(typer.BadParameter, match="--question is 'asked': allowed is visible, hid"):
        tasks.check_names("question", "visible,asked", ("visible", "hidden"))
    assert tasks.matching("niah_*,ruler_vt", tasks_suites.RULER)[-1] == "niah_multiquery"
    assert tasks.longbench_tasks("niah*", Console()) == {}
