"""What a round of `dsakv bench` keeps of the engine's steps: when tokens came, and what each pass over the model moved.

A pass is one walk through all layers: a decode step, or a chunk of a prefill. Where weights stream, a prefill takes all
of its chunks through a layer before the next one, so that its steps are one pass together; the last of them says what
it moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal

from dsakv.request import Phase, Request, Step, TierTraffic, WeightTraffic

POOLS = ("local_pool", "remote_pool")
"""Tiers whose reads and writes cross a link to the device."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One walk through the layers."""

    kind: Literal["prefill", "decode"]
    wall_us: int
    tokens: int
    """Prompt tokens of a prefill, new tokens of a decode step."""
    weights: WeightTraffic | None
    """None where all weights are in place."""
    traffic: Mapping[tuple[Phase, str], TierTraffic]

    def pool(self, name: str) -> TierTraffic:
        """What a KV tier did in this pass, whatever for."""
        total = TierTraffic()
        for (_, tier), counts in self.traffic.items():
            if tier == name:
                total.add(counts)
        return total

    def busy_us(self) -> dict[str, float]:
        """Time that each link was at work, by its name; links of KV without a block in this pass are left out."""
        busy: dict[str, float] = {}
        if self.weights is not None:
            busy = {"disk": self.weights.disk_us, "device": self.weights.device_us}
        for name in POOLS:
            tier = self.pool(name)
            if tier.reads or tier.writes:
                busy[name] = tier.read_us + tier.write_us
        return busy


@dataclass(slots=True)
class RoundLog:
    """Filled step by step. Times are seconds on the engine's clock; all requests of a round arrive at ``begin_s``."""

    begin_s: float
    end_s: float = 0.0
    token_s: dict[int, list[float]] = field(default_factory=dict)
    """When each token came, by request."""
    tokens: dict[int, list[int]] = field(default_factory=dict)
    prompt_tokens: int = 0
    decode_tokens: int = 0
    passes: list[Pass] = field(default_factory=list)
    _waiting: list[Step] = field(default_factory=list)
    """Prefill steps of which it is not clear yet whether they are one pass with those that follow."""

    @classmethod
    def begin(cls, requests: list[Request], now_s: float) -> RoundLog:
        """A log of a round of ``requests``, which all arrive now."""
        log = cls(now_s, now_s)
        log.prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        log.token_s = {request.request_id: [] for request in requests}
        log.tokens = {request.request_id: [] for request in requests}
        return log

    def add(self, step: Step, now_s: float) -> None:
        """Count a step that was handed over at ``now_s``."""
        self.end_s = now_s
        for request_id, token in step.new_tokens:
            self.token_s[request_id].append(now_s)
            self.tokens[request_id].append(token)
        if step.kind == "decode":
            self.flush()
            self.decode_tokens += len(step.new_tokens)
            self.passes.append(_pass([step]))
        else:
            self._waiting.append(step)
            if step.weights is not None:
                self.passes.append(_pass(self._waiting))
                self._waiting = []

    def flush(self) -> None:
        """Prefill steps that nothing was said of stand for themselves: called at the end of a round, and by ``add``."""
        self.passes += [_pass([step]) for step in self._waiting]
        self._waiting = []

    def of(self, kind: str) -> list[Pass]:
        """The passes of one kind."""
        return [one for one in self.passes if one.kind == kind]

    def digest(self) -> str:
        """Tells whether rounds generated the same tokens, in hex."""
        text = repr(sorted(self.tokens.items()))
        return blake2b(text.encode(), digest_size=16).hexdigest()


def _pass(steps: list[Step]) -> Pass:
    """The pass that these steps are together."""
    last = steps[-1]
    traffic: dict[tuple[Phase, str], TierTraffic] = {}
    for step in steps:
        for key, counts in step.traffic.items():
            traffic.setdefault(key, TierTraffic()).add(counts)
    return Pass(
        kind=last.kind,
        wall_us=sum(step.wall_us for step in steps),
        tokens=sum(step.prompt_tokens or len(step.new_tokens) for step in steps),
        weights=last.weights,
        traffic=traffic,
    )
