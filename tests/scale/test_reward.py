"""Each layout against the plain reading of its published recipe, on a small random model of the same architecture."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from thinkfast.errors import BadInput
from thinkfast.scale.reward import LAYOUTS, RewardModel, fold_steps, layout_of, split_steps

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: the extra dev, with `make test`"
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


MARKS = ["<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<extra_0>", "<unk>", "ки"]
PROBLEM, STEPS = "what is 2+3-1?", ["add: 2+3=5", "take: 5-1=4", "the answer is 4"]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def characters(without=()):
    """A tokenizer of single characters with the marks of all layouts."""
    marks = [mark for mark in MARKS if mark not in without]
    vocabulary = {token: i for i, token in enumerate([*marks, *map(chr, range(32, 127)), "\n"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(marks)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|end|>", unk_token="<unk>", pad_token="<|end|>"
    )
    fast.chat_template = TEMPLATE
    return fast


def directory(tmp_path, kind, heads=None, architecture=None, tokenizer=None):
    tokenizer = tokenizer or characters()
    config = getattr(transformers, f"{kind}Config")(**SIZES, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3) if parameter.dim() > 1 else None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if heads:
        file = tmp_path / "model.safetensors"
        save_file(load_file(file) | heads, file, metadata={"format": "pt"})
    if architecture:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    return model.eval(), tokenizer


def test_rlhflow_asks_step_by_step_what_comes_before_the_plus(tmp_path):
    model, tokenizer = directory(tmp_path, "Llama")
    plus, minus = (tokenizer.encode(sign, add_special_tokens=False)[-1] for sign in "+-")
    expected, turns = [], []
    for index, step in enumerate(STEPS):
        turns.append({"role": "user", "content": f"{PROBLEM} {step}" if index == 0 else step})
        turns.append({"role": "assistant", "content": "+"})
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
        # -3: behind the place lie the plus itself and the end of the turn.
        expected.append(float(model(ids).logits[0, -3, [plus, minus]].softmax(-1)[0]))
    assert layout_of(tmp_path) == "rlhflow"
    assert RewardModel(tmp_path).steps(PROBLEM, "\n\n".join(STEPS)) == pytest.approx(expected, abs=1e-5)


def test_math_shepherd_reads_plus_against_minus_at_every_mark(tmp_path):
    model, tokenizer = directory(tmp_path, "Mistral")
    text = f"{PROBLEM} {STEPS[0]} ки\n{STEPS[1]} ки\n{STEPS[2]} ки"
    ids = torch.tensor([[0, *tokenizer.encode(text, add_special_tokens=False)]])
    plus, minus, mark = (tokenizer.encode(sign, add_special_tokens=False)[-1] for sign in ("+", "-", "ки"))
    scores = model(ids).logits[:, :, [plus, minus]].softmax(-1)[:, :, 0]
    assert layout_of(tmp_path) == "math-shepherd"
    measured = RewardModel(tmp_path).steps(PROBLEM, "\n".join(STEPS))
    assert measured == pytest.approx(scores[ids == mark].tolist(), abs=1e-5)
    assert len(measured) == 3


def test_skywork_reads_a_value_head_at_the_end_of_every_line(tmp_path):
    torch.manual_seed(1)
    heads = {"v_head.summary.weight": torch.randn(1, 32), "v_head.summary.bias": torch.randn(1)}
    model, tokenizer = directory(tmp_path, "Qwen2", heads)
    ids = [0, *tokenizer.encode(f"{PROBLEM}\n" + "".join(f"{step}\n" for step in STEPS), add_special_tokens=False)]
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0]
    values = (hidden @ heads["v_head.summary.weight"][0] + heads["v_head.summary.bias"]).sigmoid()
    line = tokenizer.encode("\n", add_special_tokens=False)[-1]
    expected = values[torch.tensor(ids) == line][1:].tolist()
    assert layout_of(tmp_path) == "skywork"
    assert RewardModel(tmp_path).steps(PROBLEM, "\n".join(STEPS)) == pytest.approx(expected, abs=1e-5)


def test_qwen_reads_two_classes_at_every_separator(tmp_path):
    torch.manual_seed(2)
    heads = {
        "score.0.weight": torch.randn(32, 32),
        "score.0.bias": torch.randn(32),
        "score.2.weight": torch.randn(2, 32),
        "score.2.bias": torch.randn(2),
    }
    model, tokenizer = directory(tmp_path, "Qwen2", heads, "Qwen2ForProcessRewardModel")
    turns = [
        {"role": "system", "content": "Please reason step by step, and put your final answer within \\boxed{}."},
        {"role": "user", "content": PROBLEM},
        {"role": "assistant", "content": "<extra_0>".join(STEPS) + "<extra_0>"},
    ]
    ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
    hidden = model.model(ids).last_hidden_state[0][ids[0] == tokenizer.convert_tokens_to_ids("<extra_0>")]
    middle = (hidden @ heads["score.0.weight"].T + heads["score.0.bias"]).relu()
    expected = (middle @ heads["score.2.weight"].T + heads["score.2.bias"]).softmax(-1)[:, 1].tolist()
    assert layout_of(tmp_path) == "qwen"
    assert RewardModel(tmp_path).steps(PROBLEM, "\n\n".join(STEPS)) == pytest.approx(expected, abs=1e-5)


def test_a_preference_model_gives_the_last_token_one_score(tmp_path):
    tokenizer = characters()
    config = transformers.LlamaConfig(**SIZES, vocab_size=len(tokenizer), num_labels=1, pad_token_id=1)
    torch.manual_seed(3)
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    expected = model(tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)).logits[0, 0].item()
    assert layout_of(tmp_path) == "preference"
    assert RewardModel(tmp_path).steps("hello", "good day") == pytest.approx([expected], abs=1e-6)


def test_unusable_models_are_named(tmp_path):
    directory(tmp_path, "Qwen2", architecture="Qwen2ForProcessRewardModel")
    with pytest.raises(BadInput, match=r"no score\.0\.weight"):
        RewardModel(tmp_path)
    with pytest.raises(BadInput, match="layout 'magic': expected one of rlhflow"):
        RewardModel(tmp_path, "magic")
    (tmp_path / "other").mkdir()
    directory(tmp_path / "other", "Mistral", tokenizer=characters(without=("ки",)))
    with pytest.raises(BadInput, match="no token for 'ки'"):
        RewardModel(tmp_path / "other")
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["BertModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="architectures names 'BertModel'"):
        layout_of(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    directory(tmp_path, "Mistral", tokenizer=characters(without=("<extra_0>",)))
    characters().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="more tokens than the model"):
        RewardModel(tmp_path)


def test_steps_fold_as_named():
    steps = [0.5, 0.2, 0.4]
    assert [fold_steps(steps, how) for how in ("last", "min", "product", "mean")] == pytest.approx(
        [0.4, 0.2, 0.04, 1.1 / 3]
    )
    assert math.isnan(fold_steps([], "min"))
    assert split_steps("a\n\n\n b\n", "\n\n") == ["a", "b"]
    assert set(LAYOUTS) == {"rlhflow", "math-shepherd", "skywork", "qwen"}
