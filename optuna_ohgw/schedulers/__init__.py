"""Schedulers: which configuration is trained how long, decided by a fold over events."""
