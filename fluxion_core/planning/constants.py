"""Numbers of planning that torch, C++ and Triton share, each said once.

`python -m fluxion_core.planning.generate` writes them where the other two languages read them; see
generate.py. Nothing is imported here, so that nothing can depend on how or where it is read.
"""

from __future__ import annotations

BUDGETS = (0.0, 1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Shares of the retrieval region at which a curve has a value. At 1 the error is 0.

Above the first each is twice the one before: the GPU makes them of their indices."""

SMALL_BUDGET = BUDGETS.index(1 / 32)
"""The budget whose errors are features, beside those of reading nothing."""

GROWTH_OF_BUDGET = (0, 0, 0, 1, 1, 2, 2, 2)
"""Which growth a budget goes by; budget 0 does not grow."""

NUM_GROWTHS = 3

NUM_OUTPUTS = len(BUDGETS) + NUM_GROWTHS
"""Of the network for a head: the curve at block size 16, then the growths."""

ERROR_FLOOR = 1e-4
"""Head output errors below this count as this."""

READ_ALL = -1
"""In place of a level: read the whole region."""

READ_NOTHING = -2
"""In place of a level: the default window is enough."""

RADII = (0.3, 0.3, 0.3, 0.15)
"""By block size: what half the extent of a block's keys counts, per channel; see ranking.py."""

QUEST_RADII = (1.0, 1.0, 1.0, 1.0)
"""Scores are bounds of the best q.k."""

CLIP = 60.0
"""Features are clipped to [-CLIP, CLIP]: empty sets have an lse of minus infinity."""

CLIP_DEVIATIONS = 6.0
"""Standardised features are clipped to this."""

TINY = 1e-20
"""Smallest norm that is divided by or taken the logarithm of."""

TINY_MASS = 1e-37
"""Smallest mass that is divided by or taken the logarithm of."""

NO_SHARE_LOG2 = -10.0
"""The feature `read_share` where no step came before: log2 of its least share, 1/1024."""

FEATURE_GROUPS: dict[str, dict[str, str]] = {
    "structure": {
        "layer_depth": "layer / (layers - 1)",
        "region_length": "log2 of the tokens of the retrieval region",
        "prior_nothing": "log mean squared error of this head at budget 0 in training",
        "prior_small": "the same at budget 1/32, block size 16",
        "prior_growth": "growth of the latter's log from block size 16 to 128, a third of it",
    },
    "kv_distribution": {
        "key_scale": "log of the root mean square norm of the prompt's keys",
        "key_mean_share": "norm of the mean key / root mean square norm",
        "value_scale": "log of the root mean square norm of the prompt's values",
        "value_mean_share": "norm of the mean value / root mean square norm",
        "sink_value_scale": "log of the first token's value norm / root mean square norm",
    },
    "qk_interaction": {
        "query_scale": "log of the query's norm / sqrt(head_dim)",
        "window_lse": "lse of the default window",
        "bound_1st": "highest bound of a 128-token block",
        "bound_2nd": "second highest",
        "bound_4th": "fourth highest",
        "bound_lse": "log of the sum over blocks of 128 exp(bound)",
        "bound_mean": "mean bound",
        "bound_deviation": "standard deviation of the bounds",
    },
    "output_contribution": {
        "window_output_share": "log of the window output's norm / the largest of the layer's heads",
        "window_output_scale": "log of the window output's norm / root mean square value norm",
        "sink_mass": "log share of the first 16 tokens in the window's attention",
        "recent_mass": "log share of the last, possibly incomplete, 16-token block",
        "window_peak": "log of the largest share of one token in the window's attention",
    },
    "query_dynamics": {
        "query_cosine": "cosine to the previous step's query of this head",
        "query_change": "norm of the query's change / its norm",
        "window_lse_change": "change of the window's lse since the previous step",
        "bound_change": "change of the highest bound since the previous step",
        "read_mass": "log of region mass that the previous step read / window mass",
        "read_share": "log2 of the share of the region it read, plus 1/1024",
    },
    "prefill_estimate": {
        "estimate_nothing": "log mean squared error at budget 0 over the prompt's last queries",
        "estimate_nothing_worst": "log largest squared error at budget 0 over them",
        "estimate_small": "log mean squared error at budget 1/32, block size 16, over them",
        "estimate_small_worst": "log largest over them",
        "estimate_mass": "mean log of region mass / window mass over them",
        "estimate_mass_worst": "largest over them",
        "bound_excess": "bound_lse minus its mean over them",
        "bound_1st_excess": "bound_1st minus its largest over them",
    },
    "cross_head": {
        "group_bound": "highest bound_1st of the heads that share the KV head",
        "layer_bound": "highest bound_1st of the layer's heads",
        "layer_bound_lse": "mean bound_lse of the layer's heads",
        "bound_rank": "share of the layer's heads with a higher bound_lse",
    },
}
"""Group, name and meaning of every feature, in the order that the network takes them."""

FEATURE_NAMES = tuple(name for members in FEATURE_GROUPS.values() for name in members)
"""Their order in a row of features, in every language."""

NUM_FEATURES = len(FEATURE_NAMES)

FIRST_PRIOR = FEATURE_NAMES.index("prior_nothing")
NUM_PRIORS = 3
"""Features that are fitted with the weights and not observed; they lie side by side."""

NUM_KV_STATISTICS = len(FEATURE_GROUPS["kv_distribution"])
