"""What goes over the wire: requests as pydantic checks them, responses and errors in OpenAI's shapes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _unicode(text: str) -> str:
    """JSON lets half a surrogate pair through; no tokenizer takes one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("unicode", "Expected Unicode text") from None
    return text


Words = Annotated[str, AfterValidator(_unicode)]
Text = Annotated[str, Field(min_length=1), AfterValidator(_unicode)]
Strategy = Literal["majority", "best_of_n", "weighted", "adaptive"]
Neutral = Annotated[float, Field(ge=0, le=0)]


class Wire(BaseModel):
    """Nothing is converted, nothing unknown is let through."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Wire):
    """Whether a stream ends with a chunk that holds the usage."""

    include_usage: bool = False


class Common(Wire):
    """What chats and completions have in common; the last five fields are thinkfast's own."""

    model: Text
    n: Annotated[int, Field(ge=1)] | None = Field(None, description="Choices; with a budget, chains at most.")
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Words | None = None
    presence_penalty: Neutral = 0
    frequency_penalty: Neutral = 0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    time_budget: Annotated[float, Field(gt=0)] | None = Field(None, description="Seconds from the request's arrival.")
    strategy: Strategy | None = None
    min_samples: Annotated[int, Field(ge=1)] = 1
    return_samples: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def votes(self) -> bool:
        """Whether the best answer by a deadline is asked for, rather than completions."""
        return self.time_budget is not None or self.strategy is not None


class Part(Wire):
    """A part of a message's content."""

    type: Literal["text"]
    text: Words


class Message(Wire):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Words | Annotated[list[Part], Field(min_length=1)]
    name: Words | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Common):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def limit(self) -> int | None:
        given = [value for value in (self.max_tokens, self.max_completion_tokens) if value is not None]
        return min(given, default=None)

    @property
    def characters(self) -> int:
        """Of all messages together."""
        return sum(len(message.text) for message in self.messages)

    @property
    def likeliest(self) -> int | None:
        """Alternatives wanted beside each token; None where no log-probabilities are."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Common):
    """The body of /v1/completions."""

    prompt: Text | Annotated[list[int], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def characters(self) -> int:
        """Of the prompt, none where it is given in tokens."""
        return len(self.prompt) if isinstance(self.prompt, str) else 0

    @property
    def likeliest(self) -> int | None:
        return self.logprobs


class Refused(Exception):
    """A request that is answered with an error. `retry`: seconds after which it may be tried again."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry = status, param, code, retry

    def document(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Retry-After where it has a sense, and the challenge of a 401."""
        found = {} if self.retry is None else {"Retry-After": str(self.retry)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def refuse_body(errors: Sequence[Any], fields: Sequence[str]) -> Refused:
    """The first thing that is wrong with a body: the field, what was expected and what was found."""
    # The first wrong field. Of a union's alternatives, the one that got furthest tells most, a wrong type least.
    mine = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    error = max(mine, key=lambda e: (len(e["loc"]), not e["type"].endswith("_type"), -mine.index(e)))
    place = [str(part) for part in error["loc"] if part != "body"]
    place = [part for part in place if part.isdigit() or (part.isidentifier() and part not in ("str", "list", "int"))]
    if error["type"] == "json_invalid":
        return Refused(400, f"the body is not valid JSON: {error['ctx']['error']}", code="invalid_json")
    if not place:
        return Refused(400, "the body: expected a JSON object, with content type application/json")
    param = ".".join(place)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place[-1], fields, 1)
        hint = f", did you mean {near[0]}?" if near else ""
        return Refused(400, f"{ascii(param)[1:-1]}: unknown field{hint}", param)
    found = "" if error["type"] == "missing" else f", not {_short(error['input'])}"
    said = error["msg"][0].lower() + error["msg"][1:]
    return Refused(400, f"{param}: {said}{found}", param)


def _short(value: object) -> str:
    # ascii: half a surrogate pair, which JSON lets through, cannot be sent back.
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
