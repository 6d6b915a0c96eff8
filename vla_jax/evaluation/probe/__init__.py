"""Published probes of what a model understood, put to any saved model: ``python -m vla_jax.evaluation.probe``."""
