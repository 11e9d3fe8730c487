"""How much of the KV is where."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from dsakv.errors import InputError
from dsakv.policies.placement import Scope, Tiers
from dsakv.sizes import parse_bytes

_NUMBER = re.compile(r"(\d{1,30}(?:\.\d+)?|\.\d+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Amount:
    """A size as users give it: blocks of each layer, bytes of all layers, or a share of all blocks."""

    number: float
    unit: Literal["blocks", "bytes", "share"]
    text: str

    @classmethod
    def parse(cls, text: str, flag: str) -> Amount:
        """``256`` blocks, ``0.25`` of them, ``512MiB`` or ``2GB``. Raises InputError, which names ``flag``."""
        if (n_bytes := parse_bytes(text)) is not None:
            return cls(n_bytes, "bytes", text)
        if not _NUMBER.fullmatch(text.strip()):
            raise InputError(
                f"{flag} {text!r} is no size", "give blocks a layer (256), a share of the KV (0.25) or bytes (512MiB)"
            )
        number = float(text)
        if "." in text:
            if not 0 < number <= 1:
                raise InputError(f"{flag} {text} is no share", "shares lie above 0 and up to 1.0")
            return cls(number, "share", text)
        return cls(number, "blocks", text)

    def blocks(self, n_blocks: int, block_bytes: int, layers: int, flag: str) -> int:
        """Blocks of each layer that it means, of ``n_blocks``; at most these, and of a share at least one.

        Raises InputError for bytes or blocks that are not enough for one.
        """
        if self.unit == "share":
            return max(1, int(self.number * n_blocks))
        wanted = self.number / (block_bytes * layers) if self.unit == "bytes" else self.number
        if wanted < 1:
            raise InputError(
                f"{flag} {self.text} is less than a block in each layer ({block_bytes * layers:,} bytes in all)",
                "give more, or a smaller --kv-block-size",
            )
        return min(int(wanted), n_blocks)


@dataclass(frozen=True, slots=True)
class TierOptions:
    """Which part of the KV the device keeps, and where the rest lives."""

    hot: Amount
    """On the device."""
    policy: str = "lru"
    """Name in ``policies.POLICIES``."""
    scope: Scope = "layer"
    local: Amount | None = None
    """In host memory; None is all that is needed without ``remote``, and nothing with it."""
    remote: str | None = None
    """Where KV lives when host memory does not hold it; a URL."""
    write: Literal["through", "back"] = "through"
    """Whether a block is written home once it is full, or when it leaves the device."""
    start: Literal["cold", "warm"] = "cold"
    """Whether decode finds its prompt at home alone, or also on the device as far as that has room."""
    timeout_s: float = 5.0
    """What a remote pool may take to connect or answer."""

    def resolve(self, n_blocks: int, block_bytes: int, layers: int) -> Tiers:
        """Raises InputError where a capacity holds no block, or home not all of them."""
        hot = self.hot.blocks(n_blocks, block_bytes, layers, "--kv-hot-capacity")
        local = 0 if self.remote else n_blocks
        if self.local is not None:
            local = self.local.blocks(n_blocks, block_bytes, layers, "--kv-local")
            if local < n_blocks and not self.remote:
                raise InputError(
                    f"--kv-local {self.local.text} holds {local:,} blocks of each layer; {n_blocks:,} may be in use",
                    "raise it, give --kv-remote for the rest, or lower --batch-size or --kv-blocks",
                )
        return Tiers(
            policy=self.policy,
            scope=self.scope,
            hot_blocks=hot,
            local_blocks=local,
            home="remote_pool" if self.remote else "local_pool",
            write=self.write,
            start=self.start,
            n_blocks=n_blocks,
            block_bytes=block_bytes,
        )
