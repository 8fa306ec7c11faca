"""The model card: what a student is, how it was made, what was measured, who reads it right."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import thinkfast
from thinkfast.model.checkpoint import read_config
from thinkfast.model.config import ATTENTION, MAMBA, DecoderConfig
from thinkfast.records import read_json
from thinkfast.sections import StageName

TEACHER = "teacher"
OF_STUDENTS = ("kl", "train_tokens")
FIGURES = {
    "pass@1": "accuracy of one sample (pass@1)",
    "majority": "accuracy of the majority vote",
    "coverage": "coverage, any sample right",
    "tokens_per_second": "tokens per second",
    "kl": "KL divergence to the teacher, nats a token",
    "train_tokens": "tokens trained on",
}


def model_card(
    source: Path, exported: Path, name: str, parity: Mapping[str, Any] | None, warnings: Sequence[str] = ()
) -> str:
    """The text of README.md. Facts come from the model's run.json and from the files of the run around it."""
    config = read_config(exported)
    record, run = _read(source / "run.json"), run_of(source)
    made = [_how(source, record, run), _data(run), _measured(source, record, run)]
    parts = [_front(config), f"# {name}", _shape(config), *made]
    if parity is not None:
        parts.append(_checked(parity))
    parts += [_use(name), _notes(config, warnings)]
    return "\n\n".join(part for part in parts if part) + "\n"


def run_of(source: Path) -> Path:
    """The directory of the run that made a model: RUN of RUN/models/NAME, and of RUN/NAME."""
    above = source.resolve().parent
    return above.parent if above.name == "models" else above


def _front(config: DecoderConfig) -> str:
    tags = ["mamba2", "distillation"] if MAMBA in config.layer_types else []
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    return "\n".join([*lines, *(f"- {tag}" for tag in [*tags, "thinkfast"]), "---"])


def _shape(config: DecoderConfig) -> str:
    attention = [str(index) for index, kind in enumerate(config.layer_types) if kind == ATTENTION]
    kind = "Transformer" if MAMBA not in config.layer_types else "hybrid" if attention else "pure Mamba-2 model"
    text = f"A {kind}, written by thinkfast {thinkfast.__version__}."
    rows = {
        "layers": f"{config.num_layers}, attention in {', '.join(attention) if attention else 'none'}",
        "width": f"{config.hidden_size}, feed-forward {config.intermediate_size}",
        "vocabulary": config.vocab_size,
        "context": f"{config.max_position_embeddings} tokens",
    }
    if config.mamba is not None:
        m = config.mamba
        rows["Mamba-2"] = f"{m.n_heads} heads of {m.head_dim}, state {m.d_state}, {m.n_groups} groups"
    if attention:
        rows["attention"] = f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} for keys and values"
    return f"{text}\n\n{_table(rows)}"


def _how(source: Path, record: Mapping[str, Any], run: Path) -> str:
    """Command, teacher, the settings of the stages that ran, and what those took."""
    if not record:
        return ""
    notes, settings = record.get("notes", {}), record.get("settings", {})
    lines = [f"## How it was made\n\n`{record.get('command', '')}`, thinkfast {record.get('code', '')}."]
    if source.resolve().name != TEACHER and (run / "recipe.toml").is_file():
        teacher = tomllib.loads((run / "recipe.toml").read_text()).get(TEACHER, {}).get("path", "")
        about = _read(run / "models" / TEACHER / "run.json").get("notes", {}).get("result", "")
        lines.append(f"Its teacher: {', '.join(filter(None, (Path(teacher).name, about)))}.")
    unused = {*get_args(StageName)} - {*settings.get("stages", get_args(StageName))}
    used = {key: value for key, value in settings.items() if key not in unused and value is not None}
    if used:
        lines.append("```json\n" + json.dumps(used, indent=2) + "\n```")
    if isinstance(train := notes.get("train"), Mapping):
        told = [f"{stage}: {row['tokens']:,} tokens in {row['seconds']:,.0f} s" for stage, row in train.items()]
        lines.append("; ".join(told) + ".")
    lines.append(_machine(record) + ".")
    return "\n\n".join(lines)


def _machine(record: Mapping[str, Any]) -> str:
    machine = record.get("machine", {})
    return f"On {machine.get('cores', '?')} cores of {machine.get('processor', 'an unknown processor')}"


def _data(run: Path) -> str:
    corpus, problems = _read(run / "corpus" / "run.json"), _read(run / "problems" / "run.json")
    if not corpus:
        return ""
    rows = {"trained on": _setting(corpus), "measured on": _setting(problems)}
    return f"## Data\n\n{_table({key: value for key, value in rows.items() if value})}"


def _setting(record: Mapping[str, Any]) -> str:
    settings = {key: value for key, value in record.get("settings", {}).items() if value not in (None, [])}
    result = record.get("notes", {}).get("result", "")
    return f"{result} ({', '.join(f'{key} {value}' for key, value in settings.items())})" if settings else str(result)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _measured(source: Path, record: Mapping[str, Any], run: Path) -> str:
    """Figures of RUN/summary.json for this model and, beside them, for its teacher, and what they were measured on."""
    summary = _read(run / "summary.json")
    models, name = summary.get("models", {}), source.resolve().name
    if name not in models:
        result = record.get("notes", {}).get("result")
        return "## Measured\n\n" + (f"{result}. " if result else "") + "Accuracy and speed were not measured."
    shown = [name, *(other for other in (TEACHER,) if other in models and other != name)]
    head = f"| on {summary.get('problems', '?')} problems | " + " | ".join(shown) + " |"
    lines = [head, "| --- |" + " --- |" * len(shown)]
    for key, words in FIGURES.items():
        if any(key in models[other] for other in shown) and not (name == TEACHER and key in OF_STUDENTS):
            lines.append(f"| {words} | " + " | ".join(_figure(models[other], other, key) for other in shown) + " |")
    return "\n".join(["## Measured\n", *lines, "", _conditions(name, models, run)])


def _figure(figures: Mapping[str, Any], name: str, key: str) -> str:
    return "–" if key not in figures or (name == TEACHER and key in OF_STUDENTS) else _number(figures[key])


def _conditions(name: str, models: Mapping[str, Any], run: Path) -> str:
    record = _read(run / "samples" / name / "run.json")
    settings, figures = record.get("settings", {}), models[name]
    backend = record.get("notes", {}).get("engine", {}).get("backend", "")
    said = [f"{_machine(record)}, {figures.get('slots', '?')} chains at once in thinkfast's engine ({backend})"]
    if settings.get("seconds"):
        said.append(f"{settings['seconds']:g} seconds for each model")
    said += [f"{key} {settings[key]:g}" for key in ("temperature", "top_p", "max_tokens") if key in settings]
    return ", ".join(said) + "."


def _checked(parity: Mapping[str, Any]) -> str:
    rows = {
        "full forward": f"{parity['logits']:.2g}",
        f"{parity['generated']} greedy tokens with a cache": f"{parity['cached']:.2g}",
        "left-padded batch": f"{parity['padded']:.2g}",
        "saved and loaded again": f"{parity['reloaded']:.2g}",
    }
    text = f"Largest differences of logits (largest logit {parity['scale']:.3g}) between thinkfast and transformers"
    return f"## Checked\n\n{text} {parity['transformers']}, in float32 on random tokens:\n\n{_table(rows)}"


def _use(name: str) -> str:
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
messages = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=512)[0]))
```"""


def _notes(config: DecoderConfig, warnings: Sequence[str]) -> str:
    notes = [*warnings]
    if MAMBA in config.layer_types:
        notes.append("serve it with the recurrent state in float32: vLLM's `--mamba-ssm-cache-dtype float32`")
    if MAMBA in config.layer_types and ATTENTION not in config.layer_types:
        notes.append("the last layer of the file is an attention layer that adds zero: stock engines need one")
    return "## Notes\n\n" + "\n".join(f"- {note}" for note in notes) if notes else ""


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())])


def _read(path: Path) -> dict[str, Any]:
    document = read_json(path) if path.is_file() else {}
    return document if isinstance(document, dict) else {}
