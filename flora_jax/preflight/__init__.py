"""Does a run fit a TPU slice? Asked of the compiler alone, before anything is rented."""
