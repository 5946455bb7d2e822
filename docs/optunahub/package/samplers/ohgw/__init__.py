"""One-shot hyper-gradient warm starts: a sampler that records the values really trained."""

from optuna_ohgw import OhgwSampler, WarmStart, lookahead_loss, ohgw_suggest

__all__ = ["OhgwSampler", "WarmStart", "lookahead_loss", "ohgw_suggest"]
