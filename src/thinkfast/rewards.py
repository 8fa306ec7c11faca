"""Rewards of stored samples, and verifiers trained on them: from files to files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkfast import progress, records
from thinkfast.data.problems import Problem
from thinkfast.errors import BadInput
from thinkfast.records import RewardRow, SampleRow, ScoreRow
from thinkfast.results import CUT_OFF, Graded, read_source, read_texts

if TYPE_CHECKING:
    from thinkfast.data.tokenizer import Tokenizer
    from thinkfast.scale.estimate import Floats
    from thinkfast.scale.reward import How
    from thinkfast.scale.verifier import Example, Verifier

ROWS_A_PART = 512
HELD_OUT = 4  # every fourth problem is kept from training to measure the verifier on


def score_file(
    model: Path, source: Path, problems_file: Path | None, out: Path, how: How, layout: str | None
) -> dict[str, Any]:
    """Scores every sample of a source with a verifier or a published reward model into part files of `out`.

    A step-wise score is folded by `how`; a verifier's is its total. Goes on where it was cut off. Returns how many rows
    there are and the seconds they took.
    """
    problems, samples, _ = read_texts(source, problems_file, answers=False)
    settings = {"how": how, "layout": layout}
    inputs = {
        "reward model": records.hash_path(model),
        "samples": records.hash_path(source, ("*.parquet", source.name)),
    }
    with records.locked(out), records.stage(out, name="reward", settings=settings, inputs=inputs) as run:
        held = {(row.problem_id, row.sample_index) for row in records.read_rewards(out)}
        left = [row for row in samples if (row.problem_id, row.sample_index) not in held]
        if not run.done and left:
            rows: list[RewardRow] = []
            scored = _scored(model, problems, left, how, layout)
            with progress.bar("reward", len(samples)) as update:
                for done, row in enumerate(scored, len(held) + 1):
                    rows.append(row)
                    if len(rows) == ROWS_A_PART:
                        records.append_rows(out, rows, RewardRow)
                        rows = []
                    update(done, "")
            if rows:
                records.append_rows(out, rows, RewardRow)
    stored = records.read_rewards(out)
    return {"samples": len(stored), "seconds": round(sum(row.seconds for row in stored), 3)}


def known_how(name: str) -> How:
    """The way to fold step scores that has this name."""
    from thinkfast.scale.reward import HOW

    for how in HOW:
        if how == name:
            return how
    raise BadInput(f"how = {name!r}: expected one of {', '.join(HOW)}")


def verification_in_words(found: Mapping[str, Any]) -> list[str]:
    """Lines that tell what `verification` found."""
    lines = [f"{found['problems']} problems, {found['k']} samples each: majority {found['majority']:.3f}"]
    for name in ("verifier", "logprob"):
        row = found[name]
        areas = ", ".join(
            f"{kind} {'-' if row[key] is None else format(row[key], '.3f')}"
            for kind, key in (("AUC", "auc"), ("within problems", "auc_within"))
        )
        gain = f"{row['difference']['mean']:+.3f} [{row['difference']['low']:+.3f}, {row['difference']['high']:+.3f}]"
        told = f"best of n {row['best_of_n']:.3f}, weighted {row['weighted']:.3f}, against majority {gain}"
        lines.append(f"{name:<9} {areas}; {told}")
    gain = found["verifier"]["against_logprob"]
    lines.append(f"verifier against logprob, weighted {gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]")
    return lines


def _scored(
    model: Path, problems: Sequence[Problem], samples: Sequence[SampleRow], how: How, layout: str | None
) -> Iterator[RewardRow]:
    """The rewards of samples; the model is loaded, or refused, before the first is asked for."""
    from thinkfast.scale.reward import RewardModel, fold_steps
    from thinkfast.scale.verifier import NOTE, load_verifier, score_examples

    texts = {problem.id: problem.problem for problem in problems}
    if (model / NOTE).is_file():
        verifier, tokenizer = load_verifier(model)
        examples = [_example(tokenizer, texts[row.problem_id], row, False) for row in samples]
        return (
            RewardRow(samples[place].problem_id, samples[place].sample_index, total, json.dumps(steps), seconds)
            for place, total, steps, seconds in score_examples(verifier, examples, tokenizer.pad_id)
        )
    loaded = RewardModel(model, layout)

    def one(row: SampleRow) -> RewardRow:
        started = time.monotonic()
        steps = loaded.steps(texts[row.problem_id], row.text)
        reward = fold_steps(steps, how) if steps else 0.0
        return RewardRow(row.problem_id, row.sample_index, reward, json.dumps(steps), time.monotonic() - started)

    return map(one, samples)


def _example(tokenizer: Tokenizer, problem: str, row: SampleRow, correct: bool) -> Example:
    from thinkfast.data.chat import render_prompt
    from thinkfast.scale.verifier import Example

    answer = tokenizer.encode(row.text) + ([tokenizer.eos_id] if row.finish_reason == "stop" else [])
    prompt = tuple(render_prompt(tokenizer, problem))
    return Example(prompt, tuple(answer or [tokenizer.eos_id]), correct, logprob=row.logprob_sum)


def train_file(
    model: Path, source: Path, problems_file: Path | None, out: Path, values: Mapping[str, Any], rollouts: int
) -> dict[str, Any]:
    """Trains a verifier on the graded samples of a source and measures it on the problems kept from training.

    values: fields of `VerifierSettings`.
    rollouts: continuations drawn from behind every step of up to four samples a mixed problem to label steps with; 0
    labels none. Returns and stores `verification` of the held-out problems.
    """
    from dataclasses import asdict

    from thinkfast.data.tokenizer import load_tokenizer
    from thinkfast.scale.verifier import VerifierSettings, load_verifier, train_verifier

    settings = VerifierSettings(**values)
    tokenizer = load_tokenizer(model)
    problems, graded = read_source(source, problems_file)
    inputs = {
        "model": records.hash_path(model, records.MODEL_FILES),
        "samples": records.hash_path(source, ("*.parquet", source.name)),
    }
    described = asdict(settings) | {"rollouts": rollouts}
    with records.locked(out), records.stage(out, name="train-reward", settings=described, inputs=inputs) as run:
        if run.done:
            found: dict[str, Any] = run.notes["held_out"]
            return found
        groups = _groups(tokenizer, problems, graded)
        kept = {problem.id for problem in problems[HELD_OUT - 1 :: HELD_OUT]}
        training = [group for name, group in groups.items() if name not in kept]
        if rollouts:
            training = _labelled(model, tokenizer, problems, [n for n in groups if n not in kept], training, rollouts)
        with progress.bar("verifier", settings.steps) as update:
            train_verifier(model, training, settings, out, update)
        verifier, _ = load_verifier(out)
        found = verification(verifier, tokenizer.pad_id, problems, graded, groups, kept)
        run.note("held_out", found)
    return found


def _groups(tokenizer: Tokenizer, problems: Sequence[Problem], graded: Graded) -> dict[str, list[Example]]:
    texts = {problem.id: problem.problem for problem in problems}
    groups: dict[str, list[Example]] = {problem.id: [] for problem in problems}
    for row, score in _pairs(graded):
        groups[row.problem_id].append(_example(tokenizer, texts[row.problem_id], row, score.correct))
    return groups


def _labelled(
    model: Path,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    names: Sequence[str],
    groups: Sequence[list[Example]],
    n: int,
) -> list[list[Example]]:
    """Step labels for the two likeliest right and wrong samples of every mixed problem; the others stay as they are."""
    from thinkfast.engine import Engine, SamplingParams
    from thinkfast.model.checkpoint import load_model
    from thinkfast.scale.grade import Grader, extract_answer
    from thinkfast.scale.verifier import rollout_labels, step_ends

    decoder = load_model(model)
    engine, ends = Engine(decoder), step_ends(tokenizer, decoder.config.vocab_size)
    gold = {problem.id: problem.answer for problem in problems}
    chosen: list[tuple[int, int]] = []
    for g, group in enumerate(groups):
        for kind in (True, False):
            alike = [i for i, example in enumerate(group) if example.correct is kind]
            alike.sort(key=lambda i: -group[i].logprob)
            chosen += [(g, i) for i in alike[:2]] if 0 < len(alike) < len(group) else []
    longest = max((len(e.answer) for group in groups for e in group), default=1)

    def roll(prefixes: Sequence[Sequence[int]], count: int) -> list[list[tuple[int, ...]]]:
        params = SamplingParams(max_tokens=longest, temperature=0.8, seed=1)
        return [[sample.token_ids for sample in row] for row in engine.sample(prefixes, count, params)]

    with Grader() as grader:

        def right(i: int, answer: tuple[int, ...]) -> bool:
            found = extract_answer(tokenizer.decode(list(answer)))
            return found is not None and grader.equal(gold[names[chosen[i][0]]], found)

        labelled = rollout_labels([groups[g][i] for g, i in chosen], ends, roll, right, n)
    result = [list(group) for group in groups]
    for (g, i), example in zip(chosen, labelled, strict=True):
        result[g][i] = example
    return result


def verification(
    verifier: Verifier,
    pad: int,
    problems: Sequence[Problem],
    graded: Graded,
    groups: Mapping[str, Sequence[Example]],
    kept: set[str],
) -> dict[str, Any]:
    """`worth` of the verifier's scores on the problems of `kept`."""
    from thinkfast.scale.verifier import score_examples

    pairs = [pair for pair in _pairs(graded) if pair[0].problem_id in kept]
    examples = {name: iter(groups[name]) for name in kept}
    flat = [next(examples[row.problem_id]) for row, _ in pairs]
    scores: dict[tuple[str, int], float] = {}
    for place, total, _, _ in score_examples(verifier, flat, pad):
        row = pairs[place][0]
        scores[row.problem_id, row.sample_index] = total
    return worth([problem for problem in problems if problem.id in kept], graded, scores)


def worth_of_rewards(source: Path, problems_file: Path | None, rewards: Path) -> dict[str, Any]:
    """`worth` of stored rewards on the samples of a source."""
    problems, graded = read_source(source, problems_file)
    scores = {(row.problem_id, row.sample_index): row.reward for row in records.read_rewards(rewards)}
    return worth(problems, graded, scores)


def worth(problems: Sequence[Problem], graded: Graded, scores: Mapping[tuple[str, int], float]) -> dict[str, Any]:
    """What scores are worth on problems: areas overall and within problems, and best of k of all samples.

    k is the fewest samples of a problem that has any. `logprob` are the same figures for the summed log-probability of
    the samples, the baseline; `difference` is weighted best of k minus majority with its 95 % interval over problems,
    `against_logprob` minus that of the log-probability. Raises BadInput without samples, and for one without a score.
    """
    import numpy as np

    from thinkfast.scale.estimate import bootstrap_weights, percentile_interval
    from thinkfast.scale.ranked import best_at_k, soft_weights, weighted_at_k, within_auc

    asked = {problem.id for problem in problems}
    flat = [pair for pair in _pairs(graded) if pair[0].problem_id in asked]
    place = {name: i for i, name in enumerate(dict.fromkeys(row.problem_id for row, _ in flat))}
    if not flat:
        raise BadInput("no held-out problem has a sample: at least four problems with samples are expected")
    lacking = next((row for row, _ in flat if (row.problem_id, row.sample_index) not in scores), None)
    if lacking is not None:
        raise BadInput(f"no reward for sample {lacking.sample_index} of problem {lacking.problem_id}")
    problem = np.array([place[row.problem_id] for row, _ in flat], dtype=np.int64)
    correct = np.array([score.correct for _, score in flat], dtype=bool)
    klass = np.array([score.answer_class for _, score in flat], dtype=np.int64)
    columns = {
        "verifier": np.array([scores[row.problem_id, row.sample_index] for row, _ in flat], dtype=np.float64),
        "logprob": np.array([row.logprob_sum for row, _ in flat], dtype=np.float64),
    }
    count, k = len(place), [int(np.bincount(problem).min())]
    weights = bootstrap_weights(count, 2000, 0)

    def gain(values: Floats) -> dict[str, float]:
        low, high = percentile_interval(values[:, None], weights, 0.95)
        return {"mean": values.mean(), "low": low[0], "high": high[0]}

    majority = weighted_at_k(problem, np.ones(len(flat)), klass, correct, count, k)[:, 0]
    voted = {
        name: weighted_at_k(problem, soft_weights(problem, values, count), klass, correct, count, k)[:, 0]
        for name, values in columns.items()
    }
    found: dict[str, Any] = {"problems": count, "samples": len(flat), "k": k[0], "majority": majority.mean()}
    for name, values in columns.items():
        overall, within = within_auc(problem, values, correct)
        found[name] = {
            "auc": overall,
            "auc_within": within,
            "best_of_n": best_at_k(problem, values, klass >= 0, correct, count, k)[:, 0].mean(),
            "weighted": voted[name].mean(),
            "difference": gain(voted[name] - majority),
        }
    found["verifier"]["against_logprob"] = gain(voted["verifier"] - voted["logprob"])
    cleaned: dict[str, Any] = json.loads(json.dumps(found, default=float).replace("NaN", "null"))
    return cleaned


def _pairs(graded: Graded) -> list[tuple[SampleRow, ScoreRow]]:
    """The samples that ended by themselves or at their length, each with its verdict."""
    pairs = zip(graded.samples, graded.scores, strict=True)
    return [(row, score) for row, score in pairs if row.finish_reason != CUT_OFF]
