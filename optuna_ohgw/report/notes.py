"""What a report says under its tables, for readers who know neither the method nor the statistics."""

CRITERIA = (
    "Figures are relative to the baseline cell of the same seed. Pass and fail are decided by 95% "
    "intervals over independent seeds; what they leave open is undecided. The first criterion passes "
    "only with medians at least 15% apart and p < 0.05 after Holm's correction."
)
RESULTS = (
    "T@τ is the Kaplan-Meier median over seeds of the mini-batch units (mbu) until a cell first reaches "
    "τ; a dash where too few did. All else are medians [quartiles] over seeds. AUC: the best value so "
    "far, averaged over the budget that a seed's cells share."
)
PAIRS = (
    "Ratio: Hodges-Lehmann estimate of T@τ over that of the cell that it is compared with; below 1 is "
    "sooner. Its interval resamples seeds. p: two-sided Wilcoxon signed-rank test on log min(T, C), C the "
    "budget that both cells of a pair had, with Pratt's zeros, after Holm over the variations; the sign "
    "test stands beside as a check. A pair of which neither cell reached the target is of unknown order "
    "and counts as a zero. Any censored time draws ratio and interval towards 1: they are of times cut at "
    "C, not of what an endless budget would show. p is adjusted for the number of variations, intervals "
    "are not. Restricted means are of min(T, h), h the budget to which every cell was observed."
)
COST = (
    "Overhead: a cell's warm starts over its own training (seconds: over training and evaluation); the "
    "limit is the published 5%. The criterion on device time compares a whole epoch with the baseline's "
    "of the same seed, so it also holds the noise of timing. Memory: the peak over a cell's trials against "
    "the baseline cell of the same seed; on a CPU it is that of the whole process, with what earlier cells "
    "left in it, and small differences do not show."
)
MOVED = (
    "Moves are in search coordinates (log10 of a log-distributed parameter), sizes in unit coordinates "
    "(bounds mapped to 0 and 1). Divergences are Kullback-Leibler's in nats, each point's own origin left "
    "out of the search for neighbours; values within twice the noise are none; piled: points "
    "with others exactly alike, as at a bound. Benefit: how much better the validation "
    "value is than that of the baseline's trial of the same configuration, at the last epoch of both."
)
FILES = (
    "Beside this page: summary.json (all of this as values), trials.parquet (the whole record, one row an "
    "epoch), table.csv and table.tex (the results)."
)
