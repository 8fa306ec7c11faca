"""Every mixer with a state, by kind."""

from __future__ import annotations

from thinkfast.model.config import DISCRETE, MAMBA1, MAMBA2
from thinkfast.model.discrete import DiscreteMamba2
from thinkfast.model.mamba1 import Mamba1
from thinkfast.model.mamba2 import Mamba2
from thinkfast.model.mixer import StateMixer

MIXERS: dict[str, type[StateMixer]] = {MAMBA2: Mamba2, DISCRETE: DiscreteMamba2, MAMBA1: Mamba1}
