"""The data format: plain WebDataset tars, `dataset.json` and one Arrow index per split. Imports no torch."""
