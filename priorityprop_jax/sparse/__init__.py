"""Weights that are sparse: layers, products and the kernels behind them (SparseProp)."""
