"""Several processes: collectives, errors that all ranks raise, and a parameter's own rows. Nothing here knows a loss."""
