"""Drawing many samples a prompt: slots that refill, on a native or a torch backend."""

from thinkfast.engine.engine import Engine
from thinkfast.engine.sampling import Sample, SamplingParams

__all__ = ["Engine", "Sample", "SamplingParams"]
