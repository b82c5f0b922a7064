"""The operators and all below: slabs of the class table, formats, kernels. Nothing here knows a margin or an optimiser."""
