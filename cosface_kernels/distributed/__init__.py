"""Several processes: collectives, errors that all ranks raise, this rank's rows of a parameter. No module here knows a loss."""
