"""The data sets that dsakv knows, at the commits that it was written for."""

from __future__ import annotations

from dsakv.hub.client import Source

RULER = Source("allenai/ruler_data", "data_100_samples.tgz", "b2d1d948dc4f6ca37c0135123f3b3afbed741130")
LONGBENCH_V2 = Source("zai-org/LongBench-v2", "data.json", "2b48e494f2c7a2f0af81aae178e05c7e1dde0fe9")
SHAREGPT = Source(
    "anon8231489123/ShareGPT_Vicuna_unfiltered",
    "ShareGPT_V3_unfiltered_cleaned_split.json",
    "192ab2185289094fc556ec8ce5ce1e8e587154ca",
)
BURSTGPT = Source("lzzmm/BurstGPT", "data/BurstGPT_1.csv", "main")
