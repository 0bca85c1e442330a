"""Configs to train with, and `examples.prior_exams`, which makes its own pictures, reports and start model."""
