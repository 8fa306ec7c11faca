"""Other back ends against the engine: greedily they draw the same rows, and what they refuse is one line."""

import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import uvicorn

from thinkfast import pipeline, records
from thinkfast.data.problems import Problem
from thinkfast.data.wordproblems import generate
from thinkfast.errors import BadInput
from thinkfast.model.checkpoint import load_model, save_model
from thinkfast.model.config import ATTENTION, MAMBA, MambaConfig
from thinkfast.model.decoder import Decoder
from thinkfast.recipe import SampleSettings
from thinkfast.scale.sample import sample_model
from thinkfast.serve.app import create_app
from thinkfast.serve.draw import open_model

GREEDY = SampleSettings(n=2, seconds=600.0, temperature=0.0, max_tokens=20, slots=(4,))
LIVELY = SampleSettings(n=3, seconds=600.0, temperature=0.9, top_k=40, max_tokens=15, slots=(4,), seed=3)


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return [Problem(made.id, made.problem, made.answer) for made in generate(3, 5, "held-out", [1])]


def lively(words: Path, out: Path, layers: tuple[str, ...], seed: int) -> Path:
    """A random model whose samples differ, unlike those of a tied one, which repeats its last token."""
    mamba = MambaConfig(4, 16, 16, 1) if MAMBA in layers else None
    config = replace(load_model(words).config, tie_word_embeddings=False, layer_types=layers, mamba=mamba)
    torch.manual_seed(seed)
    model = Decoder(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.startswith(("embed_tokens", "lm_head")):
                value.normal_(0.0, 0.4)
    save_model(model, out, tokenizer_from=words)
    return out


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively(tiny_teacher, tmp_path_factory.mktemp("lively") / "teacher", (ATTENTION, ATTENTION), 1)


@pytest.fixture(scope="module")
def student(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively(tiny_teacher, tmp_path_factory.mktemp("lively") / "hybrid", (MAMBA, ATTENTION), 2)


@pytest.fixture(scope="module")
def address(teacher: Path) -> Iterator[str]:
    """Our own server, on a model it calls "teacher"."""
    served = open_model(teacher, 4, 512)
    app = create_app([served])
    server = uvicorn.Server(uvicorn.Config(app, port=0, http="h11", ws="none", log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)
    app.state.desk.grader.close()
    served.live.close()


def rows(directory: Path) -> dict[tuple[str, int], records.SampleRow]:
    return {(row.problem_id, row.sample_index): row for row in records.read_samples(directory)}


def same_rows(found: Path, wanted: Path, eos: bool = True) -> None:
    """eos: the sums of both hold the end of the sequence."""
    mine, ours = rows(found), rows(wanted)
    assert mine.keys() == ours.keys()
    for pair, row in mine.items():
        for field in ("text", "token_count", "finish_reason", "seed", "model"):
            assert getattr(row, field) == getattr(ours[pair], field), (pair, field)
        if eos or row.finish_reason != "stop":
            assert row.logprob_sum == pytest.approx(ours[pair].logprob_sum, rel=1e-3, abs=1e-2)
        assert 0 <= row.t_start < row.t_end


@pytest.mark.parametrize("which", ["teacher", "hybrid"])
def test_transformers_draws_the_engines_rows(
    teacher: Path, student: Path, problems: list[Problem], tmp_path: Path, which: str
) -> None:
    model = teacher if which == "teacher" else student
    sample_model(model, problems, GREEDY, tmp_path / "ours")
    sample_model(model, problems, GREEDY, tmp_path / "theirs", backend="transformers")
    same_rows(tmp_path / "theirs", tmp_path / "ours")
    assert len({row.text for row in rows(tmp_path / "ours").values()}) > 3, "not one text for all"
    record = records.read_json(tmp_path / "theirs" / "run.json")
    assert record["settings"]["backend"] == record["notes"]["engine"]["backend"] == "transformers"
    with pytest.raises(BadInput, match='was made with backend = "transformers", not null'):
        sample_model(model, problems, GREEDY, tmp_path / "theirs")


def test_transformers_samples_in_rounds_until_the_deadline(
    teacher: Path, problems: list[Problem], tmp_path: Path
) -> None:
    sample_model(teacher, problems, LIVELY, tmp_path / "a", backend="transformers")
    found = rows(tmp_path / "a")
    assert len(found) == 15
    assert len({row.text for row in found.values()}) > 5
    by_start = sorted(found.values(), key=lambda row: row.t_start)
    assert [row.sample_index for row in by_start] == sorted(row.sample_index for row in by_start)
    short = LIVELY.model_copy(update={"seconds": 0.001, "max_tokens": 200})
    sample_model(teacher, problems, short, tmp_path / "b", backend="transformers")
    cut = rows(tmp_path / "b")
    assert len(cut) == 4, "one batch had begun"
    assert {row.finish_reason for row in cut.values()} <= {"deadline", "stop"}


def test_a_server_draws_the_engines_rows(teacher: Path, problems: list[Problem], tmp_path: Path, address: str) -> None:
    sample_model(teacher, problems, GREEDY, tmp_path / "ours")
    sample_model(teacher, problems, GREEDY, tmp_path / "theirs", backend=address)
    same_rows(tmp_path / "theirs", tmp_path / "ours", eos=False)


def test_a_server_draws_different_samples_and_the_same_again(
    teacher: Path, problems: list[Problem], tmp_path: Path, address: str
) -> None:
    for name in ("a", "b"):
        sample_model(teacher, problems, LIVELY, tmp_path / name, backend=f"{address}/v1/")
    texts = [{pair: row.text for pair, row in rows(tmp_path / name).items()} for name in ("a", "b")]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 15
    assert len({texts[0][problems[0].id, index] for index in range(3)}) > 1


@contextlib.contextmanager
def answering(*answers: tuple[int, object]) -> Iterator[str]:
    """A server that gives these answers to POSTs, the last one for good, and serves the models `left` and `right`."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, {"data": [{"id": "teacher"}, {"id": "right"}]})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(*(left.pop(0) if len(left) > 1 else left[0]))

        def answer(self, status: int, document: object) -> None:
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


BARE = {"choices": [{"text": "#### 7", "finish_reason": "stop"}]}


def test_a_busy_server_is_asked_again_and_a_bare_answer_will_do(
    teacher: Path, problems: list[Problem], tmp_path: Path
) -> None:
    with answering((503, {}), (429, {}), (200, BARE)) as address:
        sample_model(teacher, problems, GREEDY, tmp_path, backend=address)
    found = rows(tmp_path)
    assert len(found) == 10
    assert {(row.text, row.token_count, row.logprob_sum) for row in found.values()} == {("#### 7", 0, 0.0)}


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ((400, {"error": {"message": "max_tokens is 20"}}), BadInput, "400: max_tokens is 20"),
        ((404, "nothing here"), BadInput, '404: "nothing here"'),
        ((500, {"error": {"message": "broken"}}), records.Failed, "500: broken"),
    ],
)
def test_a_server_that_refuses_is_quoted(
    teacher: Path,
    problems: list[Problem],
    tmp_path: Path,
    answer: tuple[int, object],
    kind: type[Exception],
    words: str,
) -> None:
    with answering(answer) as address, pytest.raises(kind, match=words):
        sample_model(teacher, problems, GREEDY, tmp_path, backend=address)


def test_back_ends_that_cannot_be_had_are_named(
    teacher: Path, student: Path, problems: list[Problem], tmp_path: Path
) -> None:
    def draw(model: Path = teacher, **how: object) -> None:
        sample_model(model, problems, GREEDY, tmp_path / "out", **how)
        pytest.fail("it drew")

    with pytest.raises(BadInput, match="backend is 'onnx', expected auto, transformers, vllm or an address"):
        draw(backend="onnx")
    (tmp_path / "out" / "run.json").unlink()
    with pytest.raises(BadInput, match=r"http://127\.0\.0\.1:9: no answer: .*refused"):
        draw(backend="http://127.0.0.1:9")
    (tmp_path / "out" / "run.json").unlink()
    with answering((200, BARE)) as address, pytest.raises(BadInput, match="serves teacher, right, expected hybrid"):
        draw(student, backend=address)
    with pytest.raises(BadInput, match="a backend, workers and a draft were given, expected one of them"):
        draw(backend="transformers", draft=student)
    if importlib.util.find_spec("vllm") is None:
        (tmp_path / "out" / "run.json").unlink()
        with pytest.raises(BadInput, match="backend vllm: vLLM is not installed"):
            draw(backend="vllm")


@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: a machine with a GPU and vLLM, this file"
)
def test_vllm_draws_the_engines_rows(teacher: Path, problems: list[Problem], tmp_path: Path) -> None:
    sample_model(teacher, problems, GREEDY, tmp_path / "ours")
    sample_model(teacher, problems, GREEDY, tmp_path / "theirs", backend="vllm")
    same_rows(tmp_path / "theirs", tmp_path / "ours")


def test_a_draft_draws_the_same_rows_from_the_command_line(
    teacher: Path, student: Path, problems: list[Problem], tmp_path: Path
) -> None:
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"problem": p.problem, "answer": p.answer}) + "\n" for p in problems)
    )
    told = pipeline.sample_files([teacher], str(tmp_path / "p.jsonl"), GREEDY, tmp_path / "a")
    options = ["--n", "2", "--temperature", "0", "--max-tokens", "20", "--slots", "2", "--seconds", "600"]
    command = [sys.executable, "-m", "thinkfast", "sample", str(teacher), str(tmp_path / "p.jsonl")]
    subprocess.run([*command, str(tmp_path / "b"), *options, "--draft", str(student)], check=True)
    assert told["samples"] == 10
    same_rows(tmp_path / "b", tmp_path / "a")
    assert records.read_json(tmp_path / "b" / "run.json")["notes"]["engine"]["backend"] == "speculative"
