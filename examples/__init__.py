"""Configs to train with, and `examples.prior_exams`, which makes what it trains on."""
