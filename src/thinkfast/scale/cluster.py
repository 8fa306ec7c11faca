"""Spreads sampling over the workers of a Ray cluster. Needs `pip install thinkfast[ray]`.

Every worker is a process with a model and an engine of its own. The driver hands out sample indices round by round in
portions and gets the samples as they finish, so that a worker that dies costs only what it was decoding: its engine
runs beside the thread that hands over, and nothing that has ended waits for what has not.
What is drawn depends on the seed, the prompt and the sample index alone, hence not on the number of workers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from thinkfast.errors import BadInput
from thinkfast.records import Failed

if TYPE_CHECKING:
    from thinkfast.engine.sampling import Sample, SamplingParams
    from thinkfast.scale.endpoints import Completion

Pair = tuple[int, int]
Stream = Callable[[Collection[Pair], float, float], Iterator[tuple[int, int, "Sample | Completion"]]]
"""Takes the pairs already drawn, the clock's start and its deadline; yields prompt index, sample index, sample."""

Finished = list[tuple[int, int, "Sample"]]

ROUNDS_A_PORTION = 4
DEATHS_IN_A_ROW = 8


class Worker:
    """What runs in a worker process; Ray makes an actor of it."""

    def __init__(self, model_dir: str, prompts: Sequence[Sequence[int]], params: SamplingParams, slots: int) -> None:
        import torch

        from thinkfast.engine.engine import Engine
        from thinkfast.model.checkpoint import load_model

        torch.set_num_threads(1)
        self._prompts, self._params = prompts, params
        self._engine = Engine(load_model(Path(model_dir)), slots=slots)
        for _ in self._engine.stream(prompts[:1], 1, params, deadline=0.5):
            pass

    def ready(self) -> str:
        """The backend; answering means that the model is loaded and warm."""
        return self._engine.backend

    def draw(self, pairs: Sequence[Pair], origin: float, deadline: float) -> Iterator[Finished]:
        """Draws these samples, yielding all that have ended as soon as one has; the clock shows 0 at `origin`, seconds
        since the epoch."""
        places = list(dict.fromkeys(problem for problem, _ in pairs))
        wanted = set(pairs)
        n = 1 + max(index for _, index in pairs)
        skip = {(i, j) for i, place in enumerate(places) for j in range(n) if (place, j) not in wanted}
        prompts = [self._prompts[place] for place in places]
        clock = time.time() - origin
        ended: SimpleQueue[tuple[int, int, Sample] | None] = SimpleQueue()

        def work() -> None:
            try:
                for i, index, sample in self._engine.stream(prompts, n, self._params, deadline, skip, clock):
                    ended.put((places[i], index, sample))
            finally:
                ended.put(None)

        with ThreadPoolExecutor(1) as thread:
            working = thread.submit(work)
            more = True
            while more:
                found = [ended.get()]
                while not ended.empty():
                    found.append(ended.get())
                more = found[-1] is not None
                yield [entry for entry in found if entry is not None]
            working.result()


@contextmanager
def workers(
    model_dir: Path,
    prompts: Sequence[Sequence[int]],
    n: int,
    params: SamplingParams,
    slots: int,
    count: int,
    dropped: Collection[int] = frozenset(),
) -> Iterator[Stream]:
    """Starts `count` workers and yields what draws on them, as `Engine.stream` does; ends them with the block.

    dropped: prompts of which nothing more is handed out; it may grow meanwhile.

    Joins the cluster that Ray's address names, or starts one on this machine. Raises BadInput without Ray or when the
    cluster has fewer cores than workers.
    """
    try:
        import ray
    except ImportError:
        raise BadInput("--ray: needs the extra: pip install 'thinkfast[ray]'") from None
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    actors: list[Any] = []
    try:
        cores = int(ray.cluster_resources().get("CPU", 0))
        if count > cores:
            raise BadInput(f"--ray {count}: the cluster has {cores} cores, one a worker is needed")
        held = [tuple(prompt) for prompt in prompts]
        actor = ray.remote(num_cpus=1)(Worker)

        def start() -> Any:
            actors.append(actor.remote(str(model_dir.resolve()), held, params, slots))
            return actors[-1]

        ray.get([start().ready.remote() for _ in range(count)])

        def stream(skip: Collection[Pair], clock_start: float, deadline: float) -> Iterator[tuple[int, int, Sample]]:
            left = deque((i, j) for j in range(n) for i in range(len(prompts)) if (i, j) not in skip)
            origin = time.time() - clock_start
            return _dispatch(start, actors[:count], left, slots * ROUNDS_A_PORTION, origin, deadline, dropped)

        yield stream
    finally:
        for one in actors:
            ray.kill(one)
        if started:
            ray.shutdown()


def _dispatch(
    start: Callable[[], Any],
    actors: Sequence[Any],
    left: deque[Pair],
    portion: int,
    origin: float,
    deadline: float,
    dropped: Collection[int],
) -> Iterator[tuple[int, int, Sample]]:
    """Keeps every worker busy with one portion; a dead one is replaced and what it owed goes back to the front."""
    import ray

    running: dict[Any, tuple[Any, set[Pair]]] = {}
    idle, deaths = list(actors), 0
    while True:
        while idle and left and time.time() - origin < deadline:
            # The last portions are small, so that the workers end together, but not smaller than all slots: a batch of
            # few samples takes about as long as a full one.
            shared = min(portion // ROUNDS_A_PORTION, -(-len(left) // len(actors)))
            size = min(portion, max(shared, len(left) // (2 * len(actors))))
            pairs: list[Pair] = []
            while left and len(pairs) < size:
                pair = left.popleft()
                if pair[0] not in dropped:
                    pairs.append(pair)
            if not pairs:
                break
            actor = idle.pop()
            running[actor.draw.options(num_returns="streaming").remote(pairs, origin, deadline)] = (actor, set(pairs))
        if not running:
            return
        for generator in ray.wait(list(running), num_returns=1, fetch_local=False)[0]:
            actor, owed = running[generator]
            try:
                ended: Finished = ray.get(next(generator))
            except StopIteration:
                del running[generator]
                idle.append(actor)
                continue
            except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
                deaths += 1
                if isinstance(error, ray.exceptions.RayTaskError) or deaths > DEATHS_IN_A_ROW:
                    raise Failed(f"a sampling worker failed: {str(error).splitlines()[-1]}") from None
                del running[generator]
                left.extendleft(sorted(owed, key=lambda pair: (pair[1], pair[0]), reverse=True))
                idle.append(start())
                continue
            deaths = 0
            owed.difference_update((problem, index) for problem, index, _ in ended)
            yield from ended
