import os
import signal
import time
from pathlib import Path

import pytest

from thinkfast import records
from thinkfast.data.problems import Problem
from thinkfast.data.wordproblems import generate
from thinkfast.errors import BadInput
from thinkfast.recipe import SampleSettings
from thinkfast.scale import cluster
from thinkfast.scale.sample import sample_model

pytest.importorskip("ray", reason="ray is not installed: pip install -e '.[ray]', then this file")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # ray's own warnings are not ours
SETTINGS = SampleSettings(n=6, seconds=600.0, temperature=0.9, max_tokens=20, slots=(4,), seed=11)


@pytest.fixture(scope="module", autouse=True)
def ray_here():
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return [Problem(made.id, made.problem, made.answer) for made in generate(3, 7, "held-out", [1])]


def drawn(directory: Path) -> set[tuple[str, int, str, int, str]]:
    rows = records.read_samples(directory)
    return {(r.problem_id, r.sample_index, r.text, r.token_count, r.finish_reason) for r in rows}


def test_the_rows_are_the_same_whatever_the_number_of_workers(tiny_teacher, problems, tmp_path):
    for workers in (0, 1, 2):
        sample_model(tiny_teacher, problems, SETTINGS, tmp_path / str(workers), workers=workers)
    alone = drawn(tmp_path / "0")
    assert len(alone) == 42
    assert alone == drawn(tmp_path / "1") == drawn(tmp_path / "2")


def test_a_killed_worker_costs_only_what_it_was_decoding(tiny_teacher, problems, tmp_path, monkeypatch):
    """It dies in the middle of decoding, once the driver has what ended before: none of that is drawn again."""
    died, ended, arrived = tmp_path / "died", tmp_path / "ended", tmp_path / "arrived"
    ended.touch()
    arrived.touch()

    class Mortal(cluster.Worker):
        def draw(self, pairs, origin, deadline):
            honest, places = self._engine.stream, list(dict.fromkeys(place for place, _ in pairs))

            def stream(*given):
                for count, (i, index, sample) in enumerate(honest(*given), 1):
                    with ended.open("a") as lines:
                        lines.write(f"{places[i]} {index}\n")
                    yield i, index, sample
                    if count == 3 and not died.exists():
                        patience = time.monotonic() + 120
                        while not set(ended.read_text().split("\n")) <= set(arrived.read_text().split("\n")):
                            assert time.monotonic() < patience, "what ended was not handed over"
                            time.sleep(0.01)
                        died.touch()
                        os.kill(os.getpid(), signal.SIGKILL)

            self._engine.stream = stream
            yield from super().draw(pairs, origin, deadline)
            self._engine.stream = honest

    honest = cluster._dispatch

    def dispatch(*given):
        for problem, index, sample in honest(*given):
            with arrived.open("a") as lines:
                lines.write(f"{problem} {index}\n")
            yield problem, index, sample

    monkeypatch.setattr(cluster, "Worker", Mortal)
    monkeypatch.setattr(cluster, "_dispatch", dispatch)
    sample_model(tiny_teacher, problems, SETTINGS, tmp_path / "killed", workers=1)
    assert died.exists()
    once = ended.read_text().splitlines()
    assert len(once) == len(set(once)) == 42
    monkeypatch.undo()
    sample_model(tiny_teacher, problems, SETTINGS, tmp_path / "whole")
    assert drawn(tmp_path / "killed") == drawn(tmp_path / "whole")


def test_what_breaks_in_a_worker_is_told(tiny_teacher, problems, tmp_path, monkeypatch):
    class Broken(cluster.Worker):
        def draw(self, pairs, origin, deadline):
            def stream(*given):
                raise MemoryError("no room for states")
                yield

            self._engine.stream = stream
            yield from super().draw(pairs, origin, deadline)

    monkeypatch.setattr(cluster, "Worker", Broken)
    with pytest.raises(records.Failed, match=r"a sampling worker failed: .*no room for states"):
        sample_model(tiny_teacher, problems, SETTINGS, tmp_path / "broken", workers=1)


def test_a_session_on_workers_goes_on_where_another_was_cut_off(tiny_teacher, problems, tmp_path):
    def interrupt(share, text):
        if share > 0.3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_model(tiny_teacher, problems, SETTINGS, tmp_path / "a", update=interrupt)
    before = drawn(tmp_path / "a")
    sample_model(tiny_teacher, problems, SETTINGS, tmp_path / "a", workers=2)
    assert before < drawn(tmp_path / "a")
    assert len(drawn(tmp_path / "a")) == 42


def test_more_workers_than_cores_and_several_slots_are_refused(tiny_teacher, problems, tmp_path):
    with pytest.raises(BadInput, match="--ray 3: the cluster has 2 cores"):
        sample_model(tiny_teacher, problems, SETTINGS, tmp_path / "a", workers=3)
    several = SETTINGS.model_copy(update={"slots": (4, 8)})
    with pytest.raises(BadInput, match=r"slots = \[4, 8\]: one number"):
        sample_model(tiny_teacher, problems, several, tmp_path / "b", workers=1)
