from pathlib import Path

import numpy as np
import pytest
import torch

from thinkfast import records
from thinkfast.data.chat import render_prompt
from thinkfast.data.tokenizer import load_tokenizer
from thinkfast.data.wordproblems import generate
from thinkfast.engine import Engine, SamplingParams
from thinkfast.errors import BadInput
from thinkfast.model.checkpoint import load_model
from thinkfast.scale.ranked import within_auc
from thinkfast.scale.verifier import (
    STATE,
    Example,
    Verifier,
    VerifierSettings,
    collate,
    load_verifier,
    rollout_labels,
    score_examples,
    step_ends,
    train_verifier,
    verifier_loss,
)


@pytest.fixture(scope="module")
def groups(tiny_teacher: Path) -> list[list[Example]]:
    """Worked solutions beside the same with one digit of one step changed: what is wrong can be seen in the text."""
    tokenizer = load_tokenizer(tiny_teacher)
    dice = np.random.default_rng(0)
    made = []
    for problem in generate(5, 24, "train", [1]):
        prompt = tuple(render_prompt(tokenizer, problem.problem))
        right = [*tokenizer.encode(problem.solution), tokenizer.eos_id]
        strange = tokenizer.encode("#")[0]
        wrong = list(right)
        wrong[int(dice.integers(2, len(wrong) - 4))] = strange
        made.append([Example(prompt, tuple(right), True), Example(prompt, tuple(wrong), False)] * 2)
    return made


def test_an_untrained_one_is_the_summed_log_probability_plus_a_constant_a_step(tiny_teacher: Path) -> None:
    decoder, tokenizer = load_model(tiny_teacher), load_tokenizer(tiny_teacher)
    model = Verifier(decoder, step_ends(tokenizer, decoder.config.vocab_size)).eval()
    prompt = render_prompt(tokenizer, "Ava has 5 eggs. How many eggs does Ava have?")
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=3)
    (samples,) = Engine(decoder, slots=4, kv_dtype="float32").sample([prompt], 4, params)
    ended = [[*s.token_ids, *([tokenizer.eos_id] if s.finish_reason == "stop" else [])] for s in samples]
    examples = [Example(tuple(prompt), tuple(ids), True) for ids in ended]
    found = {place: (total, steps) for place, total, steps, _ in score_examples(model, examples, tokenizer.pad_id)}
    line = step_ends(tokenizer, decoder.config.vocab_size).numpy()
    sound = float(torch.nn.functional.logsigmoid(torch.tensor(3.0)))
    for place, (sample, ids) in enumerate(zip(samples, ended, strict=True)):
        steps = int(line[ids[:-1]].sum()) + 1
        assert found[place][0] == pytest.approx(sample.logprob_sum + steps * sound, abs=2e-3)
        assert len(found[place][1]) == steps
        assert found[place][1][-1] == pytest.approx(found[place][0], abs=1e-4)


def test_padding_changes_nothing(tiny_teacher: Path, groups: list[list[Example]]) -> None:
    decoder, tokenizer = load_model(tiny_teacher), load_tokenizer(tiny_teacher)
    model = Verifier(decoder, step_ends(tokenizer, decoder.config.vocab_size)).eval()
    flat = [example for group in groups[:3] for example in group]
    with torch.inference_mode():
        together = model(*collate(flat, tokenizer.pad_id))[0]
        alone = torch.cat([model(*collate([example], tokenizer.pad_id))[0] for example in flat])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-5)


def test_the_terms_of_the_loss_are_what_they_say(tiny_teacher: Path, groups: list[list[Example]]) -> None:
    decoder, tokenizer = load_model(tiny_teacher), load_tokenizer(tiny_teacher)
    model = Verifier(decoder, step_ends(tokenizer, decoder.config.vocab_size)).eval()
    batch = [groups[0], [groups[1][0]]]  # the second has no pair

    def loss(**weights: float) -> float:
        none = {"text_weight": 0.0, "pair_weight": 0.0, "step_weight": 0.0}
        return verifier_loss(model, batch, tokenizer.pad_id, VerifierSettings(**(none | weights))).item()

    with torch.inference_mode():
        one = [model(*collate([example], tokenizer.pad_id)) for group in batch for example in group]
    right = [scores for scores, e in zip(one, [*groups[0], groups[1][0]], strict=True) if e.correct]
    wrong = [scores for scores, e in zip(one[:4], groups[0], strict=True) if not e.correct]
    likely = -np.mean([float(scores.likelihood) for scores in right])
    pairs = np.mean([np.log1p(np.exp(float(b.total - a.total))) for a in right[:2] for b in wrong])
    assert loss(text_weight=1.0) == pytest.approx(likely, rel=1e-4)
    assert loss(pair_weight=1.0) == pytest.approx(pairs, rel=1e-3)
    assert loss(text_weight=2.0, pair_weight=3.0) == pytest.approx(2 * likely + 3 * pairs, rel=1e-3)


def test_it_learns_within_problems_and_is_read_back(
    tiny_teacher: Path, groups: list[list[Example]], tmp_path: Path
) -> None:
    settings = VerifierSettings(steps=60, batch_tokens=1500, lr=3e-3)
    losses = train_verifier(tiny_teacher, groups[:20], settings, tmp_path / "v")
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    assert not (tmp_path / "v" / STATE).exists()
    model, tokenizer = load_verifier(tmp_path / "v")
    unseen = [example for group in groups[20:] for example in group]
    scores = np.zeros(len(unseen))
    for place, total, _, _ in score_examples(model, unseen, tokenizer.pad_id):
        scores[place] = total
    owner = np.repeat(np.arange(len(groups[20:])), 4)
    assert within_auc(owner, scores, np.array([example.correct for example in unseen]))[1] > 0.9


def test_a_killed_training_goes_on_to_the_same_weights(
    tiny_teacher: Path, groups: list[list[Example]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thinkfast.scale.verifier.SAVE_SECONDS", 0.0)
    settings = VerifierSettings(steps=6, batch_tokens=1000)

    def interrupt(done: float, text: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_verifier(tiny_teacher, groups, settings, tmp_path / "cut", interrupt)
    assert (tmp_path / "cut" / STATE).exists()
    again = train_verifier(tiny_teacher, groups, settings, tmp_path / "cut")
    assert again == train_verifier(tiny_teacher, groups, settings, tmp_path / "whole")
    a, b = (load_verifier(tmp_path / name)[0].state_dict() for name in ("cut", "whole"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_step_labels_come_from_roll_outs_and_teach(tiny_teacher: Path) -> None:
    decoder, tokenizer = load_model(tiny_teacher), load_tokenizer(tiny_teacher)
    ends = step_ends(tokenizer, decoder.config.vocab_size)
    answer = tuple(tokenizer.encode("5 eggs.\n6 eggs.\n#### 6"))
    prompt = tuple(tokenizer.encode("Ava has 5 eggs.\n"))
    example = Example(prompt, answer, False)
    asked: list[int] = []

    def roll(prefixes, n):
        asked.extend(map(len, prefixes))
        return [[(i, j) for j in range(n)] for i in range(len(prefixes))]

    (labelled,) = rollout_labels([example], ends, roll, lambda i, ids: ids[-2:] in {(0, 0), (0, 1), (1, 3)}, 4)
    assert labelled.labels == (0.5, 0.25, 0.0)
    cuts = [place for place, token in enumerate(answer) if ends[token]]
    assert asked == [len(prompt) + cut + 1 for cut in cuts]
    model = Verifier(decoder, ends)
    right = Example(prompt, answer, True)
    plain = verifier_loss(model, [[right, example]], tokenizer.pad_id, VerifierSettings())
    taught = verifier_loss(model, [[right, labelled]], tokenizer.pad_id, VerifierSettings())
    assert taught > plain
    taught.backward()
    assert torch.isfinite(model.head.weight.grad).all()


def test_what_cannot_teach_or_be_read_is_told(tiny_teacher: Path, groups: list[list[Example]], tmp_path: Path) -> None:
    rights = [[group[0], group[2]] for group in groups[:2]]
    with pytest.raises(BadInput, match="no problem has right and wrong samples"):
        train_verifier(tiny_teacher, rights, VerifierSettings(steps=1), tmp_path)
    with pytest.raises(BadInput, match="no problem has right and wrong samples"):
        train_verifier(tiny_teacher, [[groups[0][0]]], VerifierSettings(steps=1), tmp_path)
    with pytest.raises(BadInput, match="not a verifier made by train-reward"):
        load_verifier(tiny_teacher)
    train_verifier(tiny_teacher, groups[:2], VerifierSettings(steps=1), tmp_path / "v")
    records.write_bytes(tmp_path / "v" / "verifier.json", b"{}")
    (tmp_path / "v" / "verifier.safetensors").unlink()
    with pytest.raises(BadInput, match=r"verifier\.safetensors: missing"):
        load_verifier(tmp_path / "v")
