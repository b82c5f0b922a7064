"""Drop-in heads for code written against other packages, each imported by name: `pytorch_metric_learning`, `insightface`."""
