import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkfast.scale.grade import Grader, equivalent, extract_answer

DATA = Path(__file__).parents[3] / "shared" / "data"
TOWER = r"\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}"


def data(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is missing: runs where shared/data stands beside the checkout")
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def grader():
    with Grader(seconds=5.0) as shared:
        yield shared


@pytest.fixture(scope="module")
def reverse_grader():
    """One that has not cached the same pair asked the other way round."""
    with Grader(seconds=5.0) as shared:
        yield shared


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{12}.", "12"),
        (r"\boxed{1} or rather \boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{3} then \boxed{\frac{1}{2}", None),
        (r"\boxed{3} then \boxed{", None),
        (r"\boxed{3} then \boxed", None),
        (r"\boxed{}", None),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        (r"$\boxed 7$", "7"),
        (r"\fbox{8}", "8"),
        (r"#### 5 but \boxed{6}", "6"),
        ("work\n#### 1,234\n", "1234"),
        ("#### 3\n#### $4.50", "4.50"),
        ("#### 9\nThe answer is 10.", "9"),
        ("The answer is 3. No, the answer is 1,000.5.", "1000.5"),
        ("The final answer is $\\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
        ("the answer is **73**", "73"),
        ("The answer is: $18.", "18"),
        ("The answer is 18 dollars.", "18"),
        ("The answer is 3 million dollars.", "3 million dollars"),
        ("The answer is 28 percent.", "28 percent"),
        ("The answer is 6 and 8.", "6 and 8"),
        ("The answer is (1,234).", "(1,234)"),
        ("The answer is 1,2,3.", "1,2,3"),
        ("so it is 26\nA: 26", "26"),
        ("**Answer:** −5", "-5"),
        ("no answer here, only 12", None),
        ("", None),
    ],
)
def test_extraction(text, answer):
    assert extract_answer(text) == answer


@given(
    st.recursive(st.sampled_from(["1", "x", r"\{", r"\}", r"\\", " "]), lambda s: s.map("{{{}}}".format), max_leaves=4)
)
def test_a_box_gives_back_what_was_put_in(content):
    expected = extract_answer(rf"\boxed{{{content}}}")
    assert expected is None or expected in content
    assert extract_answer(rf"first \boxed{{1}} then \boxed{{{content}}} end") == expected
    assert extract_answer(rf"first \boxed{{1}} then \boxed{{{content}") is None


@pytest.mark.parametrize(
    ("gold", "prediction", "equal"),
    [
        ("12", "12.0", True),
        ("1,234", "1234", True),
        ("14{,}916", "14916", True),
        ("1/2", "0.5", True),
        (r"\frac{1}{2}", ".5", True),
        (r"\dfrac12", "2/4", True),
        (r"-\frac{10}{9}", "-10/9", True),
        (r"\$10", "10", True),
        ("13/4.", r"\frac{13}{4}", True),
        ("1/3", "0.333333", False),
        ("12345678901234567890", "12345678901234567891", False),
        ("1 1/2", "11/2", False),
        ("1/0", "5", False),
        ("5", "-5", False),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        ("(x-2)(x+2)", "x^2-4", True),
        ("(1,2)", "(2,1)", False),
        ("(1,234)", "(1234)", False),
        (r"\text{Monday}", "Monday", True),
        ("", "", False),
        ("5", "", False),
    ],
)
def test_equality_is_mathematical_and_symmetric(grader, reverse_grader, gold, prediction, equal):
    assert grader.equal(gold, prediction) is equal
    assert reverse_grader.equal(prediction, gold) is equal


def test_math_verify_is_not_symmetric_but_we_are(grader, reverse_grader):
    assert grader.equal("1<x<2", "(1,2)")
    assert reverse_grader.equal("(1,2)", "1<x<2")


NUMBERS = st.builds(
    lambda top, bottom, form: form.format(top=top, bottom=bottom, decimal=top / 4),
    st.integers(-8, 8),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["{top}", "{top}/{bottom}", r"\frac{{{top}}}{{{bottom}}}", "{decimal}", "${top}$", "{top}.0"]),
)


@settings(deadline=None)
@given(NUMBERS, st.lists(st.one_of(st.none(), NUMBERS), max_size=12), st.randoms())
def test_classes_are_the_same_whatever_the_order(gold, answers, random):
    with Grader() as numbers_only:
        classes, correct = numbers_only.grade(gold, answers)
        order = random.sample(range(len(answers)), len(answers))
        again, verdicts = numbers_only.grade(gold, [answers[i] for i in order])
        assert numbers_only.grade(gold, answers)[1] == [a is not None and numbers_only.equal(gold, a) for a in answers]
    assert [correct[i] for i in order] == verdicts
    for i in range(len(answers)):
        assert (classes[i] == -1) == (answers[i] is None)
        for j in range(len(answers)):
            assert (classes[order[i]] == classes[order[j]]) == (again[i] == again[j])
    seen = list(dict.fromkeys(klass for klass in classes if klass >= 0))
    assert seen == list(range(len(seen)))


def test_answers_of_one_value_share_a_class(grader):
    answers = [r"\sqrt{4}", "3", None, "2", r"\frac{6}{2}", "x+1", "1+x", "2.0", ""]
    classes, correct = grader.grade("2", answers)
    assert classes == [0, 1, -1, 0, 1, 2, 2, 0, -1]
    assert correct == [True, False, False, True, False, False, False, True, False]
    assert grader.grade("", ["5", None]) == ([0, -1], [False, False])


def test_plain_numbers_need_no_process(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with Grader() as numbers_only:
        assert numbers_only.grade("18", ["18", "18.0", "26", "$18", None]) == (
            [0, 0, 1, 0, -1],
            [True, True, False, True, False],
        )


@pytest.mark.parametrize("answer", [r"\boxed{2^{1000000007}}", TOWER])
def test_a_hanging_answer_costs_its_limit_and_nothing_else(answer):
    with Grader(seconds=1.0) as quick:
        before = workers_of_this_process()
        assert quick.equal("x+1", "1+x")
        (worker,) = set(workers_of_this_process()) - set(before)
        spent = processor_seconds(worker), ended_processor_seconds()
        classes, correct = quick.grade("7", [answer, "7", r"\sqrt{49}", answer, "8", "9", "10"])
        assert 0.9 < ended_processor_seconds() - sum(spent) < 1.5  # of the processor: a busy machine changes nothing
        assert classes == [0, 1, 1, 0, 2, 3, 4]
        assert correct == [False, True, True, False, False, False, False]
        held = workers_of_this_process()
        assert not quick.equal("7", answer)
        assert workers_of_this_process() == held  # remembered, not tried again
        assert quick.equal(r"\sqrt{9}", "3")


def processor_seconds(pid):
    return time.clock_gettime((~pid << 3) | 2)  # the clock that clock_getcpuclockid(3) names


def ended_processor_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


STOPPED = """
import time
from thinkfast.scale import grade

with grade._limited(0.2):
    print("in", flush=True)
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
print("out")
"""


def test_a_process_that_gets_no_core_is_waited_for():
    """What a busy machine does to a worker, driven to the end: no time at all for twice the patience."""
    with subprocess.Popen([sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.7)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == "out\n"
    assert process.returncode == 0


BLOCKED = """
import time
from thinkfast.scale import grade

real, calls = grade._verify, []

def verify(first, second):
    calls.append(0)
    if len(calls) > 1:
        time.sleep(1e6)
    return real(first, second)

grade._verify = verify
grade._serve(0.2, 2048)
"""


def test_a_comparison_that_does_not_even_compute_is_ended():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], input='["1", "2"]\n', stdout=subprocess.PIPE, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("ready\n", 1)


def workers_of_this_process():
    children = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children")
    if not children.exists():
        pytest.skip(f"{children} is missing: runs on Linux, whose kernel lists a thread's children")
    pids = [int(pid) for pid in children.read_text().split()]
    return [pid for pid in pids if b"grade.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_worker_has_a_memory_limit():
    before = workers_of_this_process()
    with Grader(memory_mb=1234) as small:
        assert small.equal("z+1", "1+z")
        (pid,) = set(workers_of_this_process()) - set(before)
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert f"Max address space         {1234 * 2**20} " in limits
    assert workers_of_this_process() == before


def test_a_worker_that_was_killed_is_replaced(grader):
    assert grader.equal("y+1", "1+y")
    for pid in workers_of_this_process():
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
    assert grader.equal("y+2", "2+y")


def test_many_threads_share_a_grader():
    verdicts = {}
    with Grader(workers=2) as shared:

        def work(i):
            verdicts[i] = shared.equal(f"{i}x+{i}", f"{i}(x+1)"), shared.equal(f"{i}x", f"{i}x+1")

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2, 12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert verdicts == dict.fromkeys(range(2, 12), (True, False))


def test_a_script_without_a_main_guard_may_grade():
    code = "from thinkfast.scale.grade import equivalent; print(equivalent('x+1', '1+x'), equivalent('1/2', '0.5'))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("True True\n", "")


def test_the_module_loads_neither_math_verify_nor_torch():
    code = "import sys, thinkfast.scale.grade; print({'math_verify', 'sympy', 'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.slow
def test_every_disagreement_with_other_graders_is_listed_with_its_reason(grader):
    rows = data("equivalence/cases.jsonl")
    wrong = [row for row in rows if grader.equal(row["gold"], row["pred"]) != row["equal"]]
    reasons = tomllib.loads(Path(__file__).with_name("disagreements.toml").read_text())["reasons"]
    assert [row["id"] for row in wrong] == sorted(reasons, key=[row["id"] for row in rows].index)
    core = sum(row["core"] for row in rows)
    assert sum(row["core"] for row in wrong) <= 0.02 * core


@pytest.mark.parametrize(
    ("equation", "value", "equal"),
    [
        ("2x + z = 1", "1", False),
        ("7 = 11a + c", "11a + c", False),
        ("a^2 + b = 0", "0", False),
        ("x = 5", "5", True),
        ("f(x) = 2x", "2x", True),
        ("2 + 3 = 5", "5", True),
        (r"\angle ABC = 30", "30", True),
        ("2x + z = 1", "z + 2x = 1", True),
    ],
)
def test_an_equation_between_unknowns_has_no_value(grader, equation, value, equal):
    assert grader.equal(equation, value) is equal
    assert grader.equal(value, equation) is equal


TEXTS = [
    "2x+z=1",
    "1",
    "1.0",
    "x=1",
    "y=1",
    "z+2x=1",
    "(1,2)",
    "1<x<2",
    "{1,2}",
    "50\\%",
    "1/2",
    "0.5",
    r"\sqrt{4}/4",
    "",
]


@pytest.mark.parametrize("gold", ["1", "1/2", "(1,2)"])
def test_classes_partition_whatever_is_asked(grader, gold):
    """Equal classes for equal answers in any order: a vote is well defined although `equal` alone is not transitive."""
    classes, correct = grader.grade(gold, TEXTS)
    turned, verdicts = grader.grade(gold, TEXTS[::-1])
    assert correct == verdicts[::-1]
    pairs = [(i, j) for i in range(len(TEXTS)) for j in range(len(TEXTS))]
    assert all((classes[i] == classes[j]) == (turned[::-1][i] == turned[::-1][j]) for i, j in pairs)
    assert all(correct[i] == correct[j] for i, j in pairs if classes[i] == classes[j])


def test_published_verdicts_on_gsm8k(grader):
    rows = data("completions/openai_gsm8k_4models.jsonl.gz")
    verdicts = [grader.grade(row["answer"], [extract_answer(text) for text in row["completions"]])[1] for row in rows]
    assert verdicts == [row["is_correct"] for row in rows]
    shares = [round(100 * sum(column) / len(rows), 1) for column in zip(*verdicts, strict=True)]
    assert shares == [21.7, 39.0, 34.7, 56.3]


def test_the_shared_grader():
    assert equivalent("1/2", "0.5")
    assert not equivalent("1/2", "0.6")
