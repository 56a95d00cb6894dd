"""Several devices and processes: where arrays live, who writes, how a batch is shared."""
