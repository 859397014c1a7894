"""Intervals, tests and verdicts of a comparison on little data: pure functions on numpy arrays."""

from mrl.stats.bootstrap import (
    Resamples,
    bca,
    bca_interval,
    ratio_of_medians,
    resample,
)
from mrl.stats.hypotheses import (
    CorrectedT,
    McNemar,
    SignFlip,
    holm,
    mcnemar_exact,
    nadeau_bengio,
    sign_flip,
)
from mrl.stats.intervals import DeLong, Interval, combine, delong, newcombe_paired, wilson
from mrl.stats.repeated import CorrelatedT, correlated_t, detectable_by_folds, holm_levels
from mrl.stats.verdict import (
    Reason,
    decide,
    latency_verdict,
    minimum_detectable_effect,
    more_images,
    primary_metric,
    quality_verdict,
)

__all__ = [
    "CorrectedT",
    "CorrelatedT",
    "DeLong",
    "Interval",
    "McNemar",
    "Reason",
    "Resamples",
    "SignFlip",
    "bca",
    "bca_interval",
    "combine",
    "correlated_t",
    "decide",
    "delong",
    "detectable_by_folds",
    "holm",
    "holm_levels",
    "latency_verdict",
    "mcnemar_exact",
    "minimum_detectable_effect",
    "more_images",
    "nadeau_bengio",
    "newcombe_paired",
    "primary_metric",
    "quality_verdict",
    "ratio_of_medians",
    "resample",
    "sign_flip",
    "wilson",
]
