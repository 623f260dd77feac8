"""Estimators of hypergradients: one file a solver."""
