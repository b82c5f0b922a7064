"""The operators and all below them: slabs of the class table, formats, kernels. No module here knows a margin or an optimiser."""
