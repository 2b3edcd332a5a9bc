"""Metrics, protocols, and the evaluator."""
